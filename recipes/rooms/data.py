"""Render clips, many at a time, into one file of bytes that other stages map into memory."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np

import world

Shape = tuple[int, int, int, int]
CLIP: Shape = (world.FRAMES, world.SIZE, world.SIZE, 3)
_maker: world.World | None = None


def open_clips(folder: Path, count: int | None = None) -> tuple[np.memmap, np.memmap]:
    """The clips uint8 [N, FRAMES, SIZE, SIZE, 3] and which are there, uint8 [N]; made where `count` is given."""
    if count is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, size in (("clips.u8", count * int(np.prod(CLIP))), ("done.u8", count)):
            with open(folder / name, "ab") as file:
                file.truncate(size)
    number = os.path.getsize(folder / "done.u8")
    mode = "r" if count is None else "r+"
    clips = np.memmap(folder / "clips.u8", np.uint8, mode, shape=(number, *CLIP))
    return clips, np.memmap(folder / "done.u8", np.uint8, mode, shape=(number,))


def _write(job: tuple[Path, int, int, int]) -> tuple[int, str, dict[str, str]]:
    global _maker
    folder, index, seed, count = job
    if _maker is None:
        _maker = world.World()
    frames, labels, caption = _maker.clip(seed)
    clips, done = open_clips(folder, count)
    clips[index] = frames
    done[index] = 1
    return index, caption, labels


def main() -> None:
    parser = argparse.ArgumentParser(prog="rooms data", description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("runs/rooms/clips"), help="a folder on a local disk")
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--first", type=int, default=0, help="the first clip's seed")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    args = parser.parse_args()
    started, said = time.perf_counter(), 0.0
    open_clips(args.to, args.count)
    jobs = ((args.to, i, args.first + i, args.count) for i in range(args.count))
    records: list[dict] = [{} for _ in range(args.count)]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for ready, (index, caption, labels) in enumerate(pool.imap_unordered(_write, jobs, chunksize=2), 1):
            records[index] = {"seed": args.first + index, "caption": caption, "labels": labels}
            spent = time.perf_counter() - started
            if spent - said > 5 or ready == args.count:
                said = spent
                print(f"{ready}/{args.count} clips  {ready / spent:.1f} clips/s  {spent:.0f} s", flush=True)
        pool.close()
        pool.join()
    (args.to / "clips.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main()
