"""Does a video's camera move as its caption says? Measured by phase correlation, on generated or on real clips.

Blocks of a frame are compared with the same blocks four frames later. Their shifts are fitted with a shift and an
expansion; which of still, image left, right, up, down, expanding and contracting it is, is read off the sums over time.
Turning left and stepping left look alike to it (the image moves right), a walk that turns counts as either of its two.
Real clips tell what the measure can reach.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import world
from captions import parse
from manifest import held_out

BLOCK, STEP, APART = 64, 48, 2
# What the image does under each camera; None where any of them is right.
EXPECTED = {
    "still": {"still"},
    "forward": {"expands"},
    "backward": {"contracts"},
    "strafe left": {"right"},
    "strafe right": {"left"},
    "turn left": {"right"},
    "turn right": {"left"},
    "forward left": {"right", "expands"},
    "forward right": {"left", "expands"},
    "pan left": {"right"},
    "pan right": {"left"},
    "pan up": {"down"},
    "pan down": {"up"},
    "zoom in": {"expands"},
    "zoom out": {"contracts"},
    "slide left": {"right"},
    "slide right": {"left"},
}


def shifts(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions [N, 2], shifts [N, 2] (x, y in pixels) and clarity [N] of all blocks of two gray frames [H, W]."""
    window = np.outer(np.hanning(BLOCK), np.hanning(BLOCK))
    rows, columns = (range(0, n - BLOCK + 1, STEP) for n in before.shape)
    at = [(y, x) for y in rows for x in columns]
    spectra = []
    for frame in (before, after):
        blocks = np.stack([frame[y : y + BLOCK, x : x + BLOCK] for y, x in at]).astype(np.float64)
        spectra.append(np.fft.fft2((blocks - blocks.mean((1, 2), keepdims=True)) * window))
    cross = spectra[1] * np.conj(spectra[0])
    # Flattened partly: wholly flattened, noise of weak frequencies decides.
    surface = np.fft.ifft2(cross / (np.abs(cross) ** 0.7 + 1e-3)).real
    best = surface.reshape(len(at), -1).argmax(1)
    y, x = best // BLOCK, best % BLOCK
    wrap = np.stack([x, y], 1)
    moved = np.where(wrap > BLOCK // 2, wrap - BLOCK, wrap).astype(float)
    clear = surface.reshape(len(at), -1).max(1) / (surface.std((1, 2)) + 1e-9)
    return np.array([(px, py) for py, px in at], float) + BLOCK / 2, moved, clear


def image_motion(video: np.ndarray) -> dict[str, float]:
    """Sums over a clip uint8 [F, H, W, 3]: shift in x and y (pixels), expansion (1 doubles), share of moving blocks."""
    gray = video.astype(np.float32).mean(-1)
    total = np.zeros(3)
    moving = []
    for i in range(0, len(gray) - APART, APART):
        at, moved, clear = shifts(gray[i], gray[i + APART])
        use = clear > 6
        if use.sum() < 4:
            continue
        centre = at[use] - np.array(gray.shape[:0:-1]) / 2
        # Robustly: thrice by least squares, each time with less weight on what does not fit.
        weight = np.ones(len(centre))
        for _ in range(4):
            w = weight / weight.sum()
            shift = (w[:, None] * moved[use]).sum(0)
            middle = (w[:, None] * centre).sum(0)
            spread = (w[:, None] * (centre - middle) ** 2).sum() + 1e-6
            growth = (w[:, None] * (centre - middle) * (moved[use] - shift)).sum() / spread
            shift = shift - growth * middle
            rest = np.abs(moved[use] - shift - growth * centre).sum(1)
            weight = 1 / (1 + (rest / 2) ** 2)
        total += [shift[0], shift[1], growth]
        moving.append(float((np.abs(moved[use]).sum(1) >= 1).mean()))
    return {"x": total[0], "y": total[1], "growth": total[2], "moving": float(np.mean(moving)) if moving else 0.0}


def what_it_does(video: np.ndarray) -> str:
    """One of still, left, right, up, down, expands, contracts."""
    motion = image_motion(video)
    size = video.shape[2]
    if motion["moving"] < 0.22:
        return "still"
    # A growth moves the outer parts by a quarter of the picture's width times itself, in the mean.
    strengths = {
        "right" if motion["x"] > 0 else "left": abs(motion["x"]),
        "down" if motion["y"] > 0 else "up": abs(motion["y"]),
        "expands" if motion["growth"] > 0 else "contracts": abs(motion["growth"]) * size / 4,
    }
    return max(strengths, key=strengths.get)


def judge(videos: np.ndarray, captions: list[str]) -> dict:
    """Share of the videos whose camera moves as said, by camera, and which were wrong how."""
    right, seen, wrong = Counter(), Counter(), []
    for video, text in zip(videos, captions):
        camera = parse(text)["camera"]
        found = what_it_does(video)
        seen[camera] += 1
        right[camera] += found in EXPECTED[camera]
        if found not in EXPECTED[camera]:
            wrong.append(f"{text}: {found}")
    by_camera = {key: f"{right[key]}/{seen[key]}" for key in sorted(seen)}
    return {"agree": sum(right.values()) / max(1, sum(seen.values())), "by camera": by_camera, "wrong": wrong}


def main() -> None:
    from sheet import generate, load

    parser = argparse.ArgumentParser(prog="rooms check", description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=Path("runs/rooms/pipeline"))
    parser.add_argument("--real", action="store_true", help="judge the real clips instead")
    parser.add_argument("--split", default="held-out", choices=("tuning", "held-out"))
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--frames", type=int, default=world.FRAMES)
    parser.add_argument("--size", type=int, default=world.SIZE)
    parser.add_argument("--to", type=Path, help="write the result here as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    clips = held_out(args.split)[: args.count]
    captions = [clip["caption"] for clip in clips]
    if args.real:
        maker = world.World()
        videos = np.stack([maker.clip(clip["seed"])[0] for clip in clips])
        maker.close()
    else:
        pipe = load(args.pipeline, False, args.device)
        options = {"steps": args.steps, "guidance": args.guidance, "frames": args.frames, "size": args.size}
        videos = generate(pipe, captions, list(range(1000, 1000 + len(captions))), **options)
    result = judge(videos, captions)
    print(json.dumps(result, indent=1))
    if args.to:
        args.to.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
