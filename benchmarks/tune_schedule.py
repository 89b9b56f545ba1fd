"""How the defaults were chosen: dense start, extrapolation and evaluations between meetings, by budget (`--about
schedule`); what single tokens win by K/V that are held, drift or are fresh, with and without meetings (`--about sync`).

Runs `HSAConfig` variants on captions of the bundled model that no comparison reports (those from number 1000 on), in
batches, and prints a table and one JSON line. PSNR in dB to the dense video of the same noise, mean over the captions.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heterostep import tiny
from heterostep.compare.measure import generate
from heterostep.compare.own import heterostep_method, in_rotation
from heterostep.compare.prompts import held_out
from heterostep.files import replacing
from heterostep.metrics import psnr

FIRST_CAPTION = 1000


def variants(share: float, num_steps: int) -> list[dict[str, Any]]:
    """Options beside the share: the defaults first, then one thing changed at a time."""
    starts = sorted({max(1, round(part * share * num_steps) - 1) for part in (0.2, 0.35, 0.5, 0.65, 0.8)})
    changed: list[dict[str, Any]] = [{}]
    changed += [{"dense_start": start} for start in starts]
    changed += [{"extrapolate": weight} for weight in (0.0, 0.25, 0.75, 1.0)]
    changed += [{"between": between} for between in (0.1, 0.2, 0.5)]
    changed += [{"between": between, "sync": "fresh"} for between in (0.1, 0.2, 0.5)]
    changed += [{"divisors": (1, 2, 4, 8)}, {"divisors": (1, 2, 4, 8), "extrapolate": 0.0}]
    changed += [{"divisors": (1, 2, 4, 8), "extrapolate": 0.0, "dense_start": max(1, round(0.2 * share * num_steps))}]
    return changed


def sync_variants(share: float, num_steps: int) -> list[dict[str, Any]]:
    """The defaults, then single tokens between meetings and in rotation, with each way to keep K and V."""
    kinds: list[dict[str, Any]] = [
        {"between": 0.1},
        {"between": 0.2},
        in_rotation(share, num_steps),
    ]
    return [{}] + [{**kind, "sync": sync} for kind in kinds for sync in ("hold", "drift", "fresh")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--about", default="schedule", choices=["schedule", "sync"])
    parser.add_argument("--modes", nargs="+", default=["text", "image"], choices=["text", "image"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.35, 0.25])
    parser.add_argument("--count", type=int, default=8, help="captions, generated in one batch")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    options = {name: tiny.DEFAULTS[name] for name in ("height", "width", "num_frames", "guidance_scale")}
    options["num_inference_steps"] = args.steps
    rows = []
    for mode in args.modes:
        pipe = tiny.load(image_to_video=mode == "image").to(args.device)
        prompts = held_out(args.count, FIRST_CAPTION, with_image=mode == "image")
        dense = generate(pipe, prompts, None, 1.0, options).clips
        for share in args.shares:
            for changed in (variants if args.about == "schedule" else sync_variants)(share, args.steps):
                clips = generate(pipe, prompts, heterostep_method("variant", "", **changed), share, options).clips
                # Clips that are equal count as 100 dB.
                values = [min(psnr(a, b), 100.0) for a, b in zip(clips, dense)]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                rows.append({"mode": mode, "share": share, **changed, "psnr": float(np.mean(values)), "spread": spread})
                said = ", ".join(f"{name}={value}" for name, value in changed.items()) or "defaults"
                _write(args, rows)
                print(f"{mode:6} {share:5} {said:50} {rows[-1]['psnr']:5.1f} ± {spread:.1f} dB", flush=True)
    print(json.dumps(_result(args, rows)))


def _result(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    return {"device": device, "torch": torch.__version__, "captions": args.count, "rows": rows}


def _write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """After each row, for a run may be stopped."""
    if args.json:
        with replacing(args.json) as part:
            part.write_text(json.dumps(_result(args, rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
