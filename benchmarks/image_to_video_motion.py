"""Does image-to-video still move? First frames and shapes' displacement at half the runtime, beside the dense run.

Runs on the bundled model from held-out first frames, and prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

import numpy as np
import torch
from psnr_to_dense import generate, held_out

import heterostep
from heterostep import tiny
from heterostep.metrics import psnr
from heterostep.tiny import world


def displacement(clip: np.ndarray) -> float | None:
    """Mean pixels from where a shape is first seen to where it is last seen; None where no shape is seen."""
    moves = [float(np.hypot(*shape.displacement)) for shape in world.read(clip).shapes]
    return statistics.mean(moves) if moves else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--runtime", type=float, default=0.5)
    parser.add_argument("--first", type=int, default=100, help="number of the first held-out clip")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pipe = tiny.load(image_to_video=True)
    generate(pipe, held_out(0)[0], "a red circle", 0, 4)
    rows = []
    for seed in range(args.first, args.first + args.clips):
        frame, caption = held_out(seed)
        dense, _ = generate(pipe, frame, caption, seed, 40)
        with heterostep.enabled(pipe, runtime=args.runtime):
            sparse, _ = generate(pipe, frame, caption, seed, 40)
        report = heterostep.report(pipe)
        rows.append(
            {
                "caption": caption,
                "first_frame_psnr": psnr(sparse[:1], frame[None]),
                "first_frame_psnr_dense": psnr(dense[:1], frame[None]),
                "displacement": displacement(sparse),
                "displacement_dense": displacement(dense),
                "psnr_to_dense": psnr(sparse, dense),
                "runtime": report.runtime.achieved,
                "share": report.share.achieved,
            }
        )
        row = rows[-1]
        print(
            f"{caption[:60]:60} first frame {row['first_frame_psnr']:.1f} dB (dense "
            f"{row['first_frame_psnr_dense']:.1f}), displacement {row['displacement']} px (dense "
            f"{row['displacement_dense']})",
            flush=True,
        )
    seen = [row for row in rows if row["displacement"] is not None and row["displacement_dense"] is not None]
    moved, dense_moved = (statistics.mean(row[name] for row in seen) for name in ("displacement", "displacement_dense"))
    worst = min(row["first_frame_psnr"] for row in rows)
    print(f"\nmean displacement {moved:.1f} px, dense {dense_moved:.1f} px: ratio {moved / dense_moved:.3f}")
    print(f"first frame: worst {worst:.1f} dB")
    line = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
            "target": args.runtime, "displacement_ratio": moved / dense_moved, "worst_first_frame_psnr": worst,
            "rows": rows}  # fmt: skip
    print(json.dumps(line))
    if args.json:
        args.json.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
