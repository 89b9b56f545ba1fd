"""PSNR to the dense video of the same noise: heterostep by solver and dial, beside plain sampling with fewer steps.

Runs on the bundled model, interleaved (each seed goes through every method), and prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import heterostep
from heterostep import tiny
from heterostep.metrics import psnr
from heterostep.tiny import world


def held_out(seed: int) -> tuple[np.ndarray, str]:
    """First frame and caption of a clip that was kept out of training."""
    rng = np.random.default_rng(10_005_000 + seed)
    scene = world.sample_scene(rng)
    return world.render(scene, num_frames=1)[0], world.caption(scene, rng)


def generate(pipe, frame, caption: str, seed: int, steps: int) -> tuple[np.ndarray, float]:
    """Frames uint8 [F, H, W, 3] and the denoising loop's seconds."""
    marks = []

    def mark(pipe, step, timestep, tensors):
        marks.append(time.perf_counter())
        return {}

    hook = pipe.transformer.register_forward_pre_hook(
        lambda *_: marks.append(time.perf_counter()) if not marks else None
    )
    options = tiny.generation_options() | ({"image": Image.fromarray(frame)} if frame is not None else {})
    try:
        clip = pipe(
            prompt=caption, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=mark, **options,
        ).frames[0]  # fmt: skip
    finally:
        hook.remove()
    return (clip * 255).round().astype(np.uint8), marks[-1] - marks[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--dial", choices=["runtime", "share"], default="runtime")
    parser.add_argument("--solvers", nargs="+", default=["pipeline", "euler"])
    parser.add_argument("--modes", nargs="+", default=["text", "image"], choices=["text", "image"])
    parser.add_argument("--option", action="append", default=[], help="more of HSAConfig, as name=value")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    extra = {name: json.loads(value) for name, value in (option.split("=", 1) for option in args.option)}
    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for mode in args.modes:
        pipe = tiny.load(image_to_video=mode == "image")
        # The first steps of a process are slow: allocators and kernels warm up.
        generate(pipe, held_out(0)[0] if mode == "image" else None, "a red circle", 0, 4)
        for seed in range(args.seeds):
            frame, caption = held_out(seed)
            given = (frame if mode == "image" else None, caption, seed)
            dense, dense_seconds = generate(pipe, *given, args.steps)
            methods = {f"plain, {round(t * args.steps)} steps": None for t in args.targets}
            methods |= {f"heterostep {args.dial}={t:g}, {s}": (t, s) for t in args.targets for s in args.solvers}
            for name, chosen in methods.items():
                if chosen is None:
                    steps = int(name.split()[1])
                    clip, seconds = generate(pipe, *given, steps)
                    share = steps / args.steps
                else:
                    with heterostep.enabled(pipe, **{args.dial: chosen[0]}, solver=chosen[1], **extra):
                        clip, seconds = generate(pipe, *given, args.steps)
                    share = heterostep.report(pipe).share.achieved
                rows.setdefault((mode, name), []).append((psnr(clip, dense), seconds / dense_seconds, share))
                print(
                    f"{mode} seed {seed} {name}: {rows[mode, name][-1][0]:.2f} dB, {seconds / dense_seconds:.3f}",
                    flush=True,
                )
    print(f"\n{'':6}{'method':42}{'PSNR dB':>9}{'spread':>8}{'runtime':>9}{'share':>7}")
    table = []
    for (mode, name), values in rows.items():
        quality, runtime, share = zip(*values, strict=True)
        spread = statistics.stdev(quality) if len(quality) > 1 else 0.0
        row = {"mode": mode, "method": name, "psnr": statistics.mean(quality), "spread": spread}
        row |= {"runtime": statistics.median(runtime), "runtimes": runtime, "share": statistics.mean(share)}
        table.append(row)
        last = table[-1]
        print(f"{mode:6}{name:42}{last['psnr']:9.2f}{spread:8.2f}{last['runtime']:9.3f}{last['share']:7.3f}")
    line = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
            "seeds": args.seeds, "steps": args.steps, "rows": table}  # fmt: skip
    print(json.dumps(line))
    if args.json:
        args.json.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
