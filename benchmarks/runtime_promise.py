"""Is the promised runtime kept at real sizes? Wan 2.1 1.3B's configuration with random weights, on a GPU.

The pipeline's own loop, 480 x 832 x 81 frames unless told otherwise, bf16, cuDNN attention. A dense loop before the
first sparse one and after each (--dense 1: after the first alone); ratios are to the median of all. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import heterostep
from capped import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--dense", type=int, help="dense loops; by default one more than there are targets")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pipe = build("wan2.1-t2v-1.3b")
    text = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16)

    def seconds(steps: int) -> float:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        pipe(
            prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), height=args.height, width=args.width,
            num_frames=args.frames, num_inference_steps=steps, guidance_scale=5.0, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(3)
    dense, rows = [], []
    if args.dense is None:
        dense.append(seconds(args.steps))
    for target in args.targets:
        with heterostep.enabled(pipe, runtime=target):
            took = seconds(args.steps)
        report = heterostep.report(pipe)
        rows.append(
            {
                "target": target,
                "seconds": took,
                "by_own_account": report.runtime.achieved,
                "share": report.share.achieved,
                "kv_store": report.memory.kv_store,
                "kv_gigabytes": report.memory.kv_cache_bytes / 1e9,
                "peak_gigabytes": report.memory.peak_bytes / 1e9,
            }
        )
        if args.dense is None or len(dense) < args.dense:
            dense.append(seconds(args.steps))
        print(rows[-1], flush=True)
    for row in rows:
        row["runtime"] = row["seconds"] / statistics.median(dense)
        print(f"promised {row['target']:g}, took {row['runtime']:.4f} of the dense loop")
    line = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dense_seconds": dense, "rows": rows}
    line |= {"height": args.height, "width": args.width, "frames": args.frames, "steps": args.steps}
    print(json.dumps(line))
    if args.json:
        args.json.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
