"""What has changed since an older version: its default beside today's, on the bundled model.

Both run in one process, on the same captions and noise, beside the same dense videos: PSNR in dB, mean and worst tenth.
The older version is a folder with its `src`, such as `git worktree add ../older REVISION` makes. It must know
`enabled(pipe, share=)`; regimes, captions and the model are today's.

    python benchmarks/against.py ../older/src --regime wan2.1-t2v-1.3b 20-steps --task text --count 64 --batch 32
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import heterostep
from heterostep import tiny
from heterostep.compare.measure import generate
from heterostep.compare.prompts import held_out
from heterostep.compare.regimes import in_regime, named
from heterostep.precision import use_tf32
from made import Made

OLDER = "heterostep_older"


def imported(source: Path, folder: Path) -> Any:
    """The package in `source`, under another name, so that both can be imported; copied to `folder`."""
    shutil.copytree(source / "heterostep", folder / OLDER, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    for file in (folder / OLDER).rglob("*.py"):
        file.write_text(re.sub(r"\bheterostep\b", OLDER, file.read_text()))
    sys.path.insert(0, str(folder))
    return importlib.import_module(OLDER)


def row(pipe: Any, made: Made, regime: str, older: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One regime: of each version and share the PSNR of each caption."""
    shares = {f"{share:g}": share for share in args.shares}
    found: dict[str, dict[str, list[float]]] = {name: {key: [] for key in shares} for name in ("older", "now")}
    with in_regime(pipe, named(regime)) as options:
        options = {name: tiny.DEFAULTS[name] for name in ("height", "width", "num_frames")} | options
        prompts = held_out(args.count, args.first, with_image=args.task == "image")
        for at in range(0, args.count, args.batch):
            some = prompts[at : at + args.batch]
            generate(pipe, some, None, 1.0, options)
            dense = made.last()
            for version, package in (("older", older), ("now", heterostep)):
                for key, share in shares.items():
                    try:
                        with package.enabled(pipe, share=share):
                            generate(pipe, some, None, 1.0, options)
                    except package.errors.HeterostepError as error:
                        print(f"{regime}, {version}: {error}", file=sys.stderr)
                        continue
                    found[version][key] += [round(value, 3) for value in made.decibels(dense)]
            print(f"{regime}: {at + len(some)}/{args.count}", file=sys.stderr, flush=True)
    return {"regime": regime, "task": args.task, "first": args.first, "psnr": found}


def described(values: list[float]) -> str:
    """Mean and the mean of the worst tenth; without any, a share was refused."""
    if not values:
        return "-"
    worst = sorted(values)[: max(1, len(values) // 10)]
    return f"{statistics.mean(values):.1f} (low {statistics.mean(worst):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the older version's src")
    parser.add_argument("--regime", nargs="+", default=["bundled"])
    parser.add_argument("--task", choices=("text", "image"), default="text")
    parser.add_argument("--count", type=int, default=2, help="captions")
    parser.add_argument("--first", type=int, default=0, help="number of the first caption")
    parser.add_argument("--batch", type=int, default=1, help="captions made in one call, with one plan")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--tf32", action="store_true", help="as heterostep compare --dtype tf32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="a line for each regime is added here")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.tf32:
        use_tf32()
    pipe = tiny.load(image_to_video=args.task == "image").to(args.device)
    made = Made(pipe)
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    with tempfile.TemporaryDirectory() as folder:
        older = imported(args.source, Path(folder))
        print("| regime | share | older | now | better by |\n|---|---|---|---|---|")
        for regime in args.regime:
            started = time.perf_counter()
            result = row(pipe, made, regime, older, args)
            for key, before in result["psnr"]["older"].items():
                after = result["psnr"]["now"][key]
                gain = f"{statistics.mean(after) - statistics.mean(before):.1f}" if before and after else "-"
                print(f"| {regime} | {key} | {described(before)} | {described(after)} | {gain} |", flush=True)
            if args.json:
                result |= {"machine": machine, "torch": torch.__version__}
                with args.json.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            print(f"{regime}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
