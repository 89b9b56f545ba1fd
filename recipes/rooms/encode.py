"""Clips to latents, once: of clips that `data` wrote, or rendered as they are needed. Each GPU takes its share.

With `--statistics` the latents' mean and deviation are written into the autoencoder's settings, for the pipeline; later
parts of a training leave them as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan

import whole
import world
from data import open_clips
from sizes import to_tensor
from training import join_others, leave_others, save_atomically

Batch = tuple[torch.Tensor, list[str]]
# Batches of a folder that are read ahead, each by a thread of its own.
AHEAD = 6
_maker: world.World | None = None


def read(folder: Path, indexes: list[int], batch: int) -> Iterator[Batch]:
    """Clips uint8 [B, FRAMES, SIZE, SIZE, 3] that `data` wrote, with their captions."""
    clips, _ = open_clips(folder)
    captions = [record["caption"] for record in json.loads((folder / "clips.json").read_text())]
    groups = [indexes[at : at + batch] for at in range(0, len(indexes), batch)]
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[Future[np.ndarray]] = deque()
        for at, group in enumerate(groups):
            while len(waiting) < AHEAD and at + len(waiting) < len(groups):
                waiting.append(pool.submit(clips.__getitem__, groups[at + len(waiting)]))
            yield torch.from_numpy(waiting.popleft().result()), [captions[index] for index in group]


def _render(seed: int) -> tuple[np.ndarray, str]:
    global _maker
    _maker = _maker or world.World()
    frames, _, caption = _maker.clip(seed)
    return frames, caption


def render(seeds: list[int], batch: int, workers: int) -> Iterator[Batch]:
    """The same of clips that are made now."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        made = pool.imap(_render, seeds, chunksize=2)
        while some := list(itertools.islice(made, batch)):
            frames, captions = zip(*some)
            yield torch.from_numpy(np.stack(frames)), list(captions)
        pool.close()
        pool.join()


def main() -> None:
    parser = argparse.ArgumentParser(prog="rooms encode", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/rooms"))
    parser.add_argument("--clips", type=Path, help="what `data` wrote; without it clips are rendered")
    parser.add_argument("--first", type=int, default=0, help="the first rendered clip's seed")
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that render, of all GPUs together"
    )
    parser.add_argument("--statistics", action="store_true")
    parser.add_argument("--frames", type=int, default=world.FRAMES, help="fewer for tests")
    parser.add_argument("--crop", type=int, default=world.SIZE, help="smaller for tests")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rank, count, device = join_others(args.device)
    started = time.perf_counter()
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae").to(device).eval()
    number = len(open_clips(args.clips)[1]) if args.clips else args.count
    indexes = list(range(min(number, args.count)))[rank::count]
    if args.clips:
        batches = read(args.clips, indexes, args.batch)
    else:
        batches = render([args.first + index for index in indexes], args.batch, max(1, args.workers // count))
    latents, captions = [], []
    moments = torch.zeros(2, vae.config.z_dim, dtype=torch.float64, device=device)
    values, said = torch.zeros((), dtype=torch.float64, device=device), 0.0
    for frames, texts in batches:
        frames = frames[:, : args.frames, : args.crop, : args.crop]
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latent = whole.encode(vae, to_tensor(frames.to(device, non_blocking=True)))[0].float()
        latents.append(latent.half().cpu())
        captions += texts
        flat = latent.transpose(0, 1).flatten(1)
        moments += torch.stack([flat.sum(1), flat.square().sum(1)]).double()
        values += flat.shape[1]
        spent = time.perf_counter() - started
        if rank == 0 and (spent - said > 5 or len(captions) == len(indexes)):
            said = spent
            print(f"{len(captions) * count}/{len(indexes) * count} clips  {spent:.0f} s", flush=True)
    save_atomically({"latents": torch.cat(latents), "captions": captions}, args.out / f"latents-{args.first}-{rank}.pt")
    if count > 1:
        dist.all_reduce(moments)
        dist.all_reduce(values)
    if rank == 0 and args.statistics:
        mean = moments[0] / values
        std = (moments[1] / values - mean.square()).sqrt()
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        vae.save_pretrained(args.out / "vae")
        print("latents' deviation", [round(s, 2) for s in std.tolist()], flush=True)
    leave_others()


if __name__ == "__main__":
    main()
