"""A contact sheet of real clips, five frames and the caption of each, to be looked at."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import world


def row(frames: np.ndarray, text: str, count: int = 5, width: int = 160) -> np.ndarray:
    """Some frames of a clip uint8 [F, H, W, 3] side by side, the words above them."""
    pick = np.linspace(0, len(frames) - 1, count).round().astype(int)
    pictures = [np.asarray(Image.fromarray(frames[i]).resize((width, width), Image.Resampling.BOX)) for i in pick]
    head = Image.new("RGB", (width * count, 14), "white")
    ImageDraw.Draw(head).text((2, 1), text, fill="black")
    return np.concatenate([np.asarray(head), np.concatenate(pictures, 1)])


def sheet(rows: list[np.ndarray], columns: int = 2) -> Image.Image:
    """Rows of one size in `columns` columns."""
    rows = rows + [np.full_like(rows[0], 255)] * (-len(rows) % columns)
    high = len(rows) // columns
    stacks = [np.concatenate(rows[i * high : (i + 1) * high]) for i in range(columns)]
    return Image.fromarray(np.concatenate(stacks, 1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="rooms look", description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    maker = world.World()
    rows = []
    for seed in range(args.first, args.first + args.count):
        frames, _, caption = maker.clip(seed)
        rows.append(row(frames, f"{seed}  {caption}"))
    maker.close()
    sheet(rows).save(args.to)


if __name__ == "__main__":
    main()
