"""What fp8 K and V cost in quality: PSNR of the videos to those with K and V in the model's precision, bundled model.

The same noise and plan, another store; `offload` keeps the same numbers as `device` (tests/engine/test_stores.py).

python benchmarks/store_quality.py --json benchmarks/store-quality.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import heterostep
from heterostep.compare.prompts import held_out
from heterostep.metrics import psnr
from heterostep.tiny import DEFAULTS, load

STORES = ("device", "fp8")
SIZES = {name: DEFAULTS[name] for name in ("height", "width", "num_frames", "guidance_scale")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3, help="held-out captions")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--tasks", nargs="+", default=["text", "image"])
    parser.add_argument("--dense", action="store_true", help="print how far both are from dense too")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--sparse-share", type=float, default=0.2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for task in args.tasks:
        image = task == "image"
        pipe = load(image_to_video=image)
        pipe.set_progress_bar_config(disable=True)
        for share in args.shares:
            found = []
            for prompt in held_out(args.count, args.first, image):
                clips = {}
                stores = {
                    store: {"share": share, "sparse_share": args.sparse_share, "kv_store": store} for store in STORES
                }
                for store, options in (stores | ({"dense": {"share": 1.0}} if args.dense else {})).items():
                    given = {"image": Image.fromarray(prompt.image)} if image else {}
                    noise = torch.Generator().manual_seed(prompt.seed)
                    with heterostep.enabled(pipe, **options):
                        out = pipe(prompt=prompt.text, generator=noise, num_inference_steps=40, **SIZES, **given)
                    clips[store] = (np.asarray(out.frames[0]) * 255).round().astype(np.uint8)
                found.append(psnr(clips["fp8"], clips["device"]))
                for store in STORES if args.dense else ():
                    print(f"{store} to dense: {psnr(clips[store], clips['dense']):.1f} dB")
                print(f"{task} {share:g} {prompt.text!r}: {found[-1]:.1f} dB", flush=True)
            mean = statistics.mean(found)
            rows.append({"task": task, "share": share, "psnr": found, "mean": mean})
    line = {"sparse_share": args.sparse_share, "torch": torch.__version__, "device": "cpu", "rows": rows}
    print(json.dumps(line))
    if args.json:
        args.json.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
