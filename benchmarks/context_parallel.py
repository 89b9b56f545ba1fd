"""What several GPUs gain: seconds of calls and of the loop, and bytes of K and V on each, on 1 GPU and on more.

Calls are timed by `heterostep bench`, dense and with a share of the tokens; the target in seconds by the pipeline's own
loop, dense (`share=1`) and with `runtime=`. Real configurations, random weights, bf16. Prints a table and a JSON line.

    python benchmarks/context_parallel.py --gpus 1 2 --json context_parallel.json
    python benchmarks/context_parallel.py --gpus 1 2 --sizes wan2.1-t2v-1.3b:480x832x81 --frames 33
    python benchmarks/context_parallel.py --gpus 1 2 --device cpu --sizes tiny:64x64x9 --steps 12   # a try without GPUs

What two H200s gave is in docs/guide/several-gpus.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from heterostep import launch

# A name and height x width x frames; the calls of 14B at 720p with as many of its 40 layers as one GPU has room for.
SIZES = (
    "wan2.1-t2v-1.3b:480x832x81",
    "wan2.1-t2v-14b:480x832x81",
    "wan2.1-t2v-14b:720x1280x81",
    "ltx-2:512x768x121",
)
LAYERS = {"wan2.1-t2v-14b:720x1280x81": 20}
SHARES = "0.5,0.25,0.125"


def parsed(size: str) -> tuple[str, int, int, int]:
    """A name, height, width and frames."""
    name, _, numbers = size.partition(":")
    height, width, frames = map(int, numbers.split("x"))
    return name, height, width, frames


def calls(size: str, gpus: int, args: argparse.Namespace) -> dict[str, Any]:
    """`heterostep bench` of a size."""
    name, height, width, frames = parsed(size)
    command = [sys.executable, "-m", "heterostep", "bench", "--quiet", "--config", name, "--shares", SHARES]
    command += ["--height", str(height), "--width", str(width), "--frames", str(frames), "--device", args.device]
    command += ["--gpus", str(gpus), "--repeats", str(args.repeats)]
    command += ["--layers", str(LAYERS[size])] if size in LAYERS else []
    command += ["--attention-backend", args.backend] if args.backend else []
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def pipeline(name: str, device: Any) -> tuple[Any, dict[str, Any]]:
    """With random weights (the bundled model has its own), and its call's options but for sizes and steps."""
    if name == "tiny":
        from heterostep import tiny

        return tiny.load().to(device), {"prompt": "a red circle moving right", "guidance_scale": 5.0}
    from runtime_target import ltx2, wan

    return (ltx2 if name.startswith("ltx") else wan)(name)


def loops(args: argparse.Namespace) -> None:
    """In each process: the loop's seconds, dense and with a target, from the first of them to a file."""
    import torch

    import heterostep
    from heterostep.pipeline import enable_context_parallel

    name, height, width, frames = parsed(args.loops)
    with launch.joined(args.device) as device, torch.no_grad():
        pipe, options = pipeline(name, device)
        pipe.set_progress_bar_config(disable=True)
        if launch.size() > 1:
            enable_context_parallel(pipe, launch.size())

        def run(config: dict[str, Any], steps: int = args.steps, on_step: Any = None) -> tuple[float, Any]:
            with heterostep.enabled(pipe, **config, on_step=on_step):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                pipe(
                    height=height, width=width, num_frames=args.frames or frames, num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(0), output_type="latent", **options,
                )  # fmt: skip
                if device.type == "cuda":
                    torch.cuda.synchronize()
                return time.perf_counter() - began, heterostep.report(pipe)

        run({"share": 1.0}, steps=3)
        dense, rows = [run({"share": 1.0})[0]], []
        for config in ({"runtime": target, "policy": policy} for target in args.targets for policy in args.policies):
            if config["runtime"] < 0.3 and config["policy"] == "hsa" and args.steps < 20:
                # Below what its dense steps take.
                continue
            steps: list[heterostep.StepInfo] = []
            seconds, report = run(config, on_step=steps.append)
            memory = report.memory
            rows.append(
                {
                    **config,
                    "seconds": seconds,
                    "by_own_account": report.runtime.achieved,
                    "kv_store": memory.kv_store,
                    "kv_bytes": memory.kv_cache_bytes + memory.kv_host_bytes,
                    "peak_bytes": memory.peak_bytes,
                    "active_share": [round(share, 4) for share in report.active_share],
                    "elapsed_seconds": [round(info.elapsed_seconds, 3) for info in steps],
                }
            )
            dense.append(run({"share": 1.0})[0])
    for row in rows:
        row["ratio"] = row["seconds"] / statistics.median(dense)
    if launch.rank() == 0:
        args.to.write_text(json.dumps({"dense_seconds": statistics.median(dense), "rows": rows}))


def measured_loops(size: str, gpus: int, args: argparse.Namespace) -> dict[str, Any]:
    """`loops` in as many processes."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder, "loops.json")
        given = ["--loops", size, "--to", str(to), "--device", args.device, "--steps", str(args.steps)]
        given += ["--targets", *map(str, args.targets), "--policies", *args.policies]
        given += ["--frames", str(args.frames)] if args.frames else []
        launch.run(given, gpus, program=(__file__,))
        return json.loads(to.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="name:height x width x frames")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--backend", help="attention backend of the timed calls, such as _native_cudnn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of a loop")
    parser.add_argument("--frames", type=int, help="of a loop's video; by default the size's")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--policies", nargs="+", choices=("auto", "hsa"), default=["auto", "hsa"], help="of a loop")
    parser.add_argument("--only", choices=("calls", "loops"), help="one of the two")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--loops", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loops:
        launch.follow()
        loops(args)
        return
    out: list[dict[str, Any]] = []
    for size in args.sizes:
        for gpus in args.gpus:
            row: dict[str, Any] = {"size": size, "gpus": gpus}
            if not size.startswith("tiny") and args.only != "loops":
                row["calls"] = calls(size, gpus, args)
                plain = row["calls"]["plain_seconds"]
                print(f"{size}, {gpus} GPUs: a dense call takes {plain * 1000:.1f} ms")
                for each in row["calls"]["rows"]:
                    print(
                        f"    share {each['share']:<6g} {each['seconds'] * 1000:9.1f} ms, {each['ratio']:.3f} of it, "
                        f"K/V {each['device_bytes'] / 1e9:.2f} GB on each"
                    )
            if args.only == "calls":
                out.append(row)
                continue
            row["loops"] = measured_loops(size, gpus, args)
            print(f"{size}, {gpus} GPUs: a dense loop takes {row['loops']['dense_seconds']:.2f} s")
            for each in row["loops"]["rows"]:
                print(
                    f"    runtime {each['runtime']:g}, {each['policy']}: {each['ratio']:.3f} of it, "
                    f"K/V {each['kv_bytes'] / 1e9:.2f} GB on each ({each['kv_store']})"
                )
            out.append(row)
    print(json.dumps(out))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
