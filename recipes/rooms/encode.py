"""Clips to latents, once: of clips that `data` wrote, or rendered as they are needed. Each GPU takes its share.

With `--statistics` the latents' mean and deviation are written into the autoencoder's settings, for the pipeline; later
parts of a training leave them as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan

import world
from data import open_clips
from sizes import to_tensor
from training import join_others, leave_others, save_atomically


class Clips(torch.utils.data.Dataset):
    """Clips [FRAMES, SIZE, SIZE, 3] with their captions, from a folder or by seed."""

    def __init__(self, folder: Path | None, first: int, indexes: list[int]):
        self.folder, self.first, self.indexes = folder, first, indexes
        self.captions = [r["caption"] for r in json.loads((folder / "clips.json").read_text())] if folder else []
        self.clips, self.maker = None, None

    def __len__(self) -> int:
        return len(self.indexes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        index = self.indexes[index]
        if self.folder:
            if self.clips is None:
                self.clips, _ = open_clips(self.folder)
            return torch.from_numpy(self.clips[index].copy()), self.captions[index]
        if self.maker is None:
            self.maker = world.World()
        frames, _, caption = self.maker.clip(self.first + index)
        return torch.from_numpy(frames), caption


def main() -> None:
    parser = argparse.ArgumentParser(prog="rooms encode", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/rooms"))
    parser.add_argument("--clips", type=Path, help="what `data` wrote; without it clips are rendered")
    parser.add_argument("--first", type=int, default=0, help="the first rendered clip's seed")
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="of all GPUs together")
    parser.add_argument("--statistics", action="store_true")
    parser.add_argument("--frames", type=int, default=world.FRAMES, help="fewer for tests")
    parser.add_argument("--crop", type=int, default=world.SIZE, help="smaller for tests")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rank, count, device = join_others(args.device)
    started = time.perf_counter()
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae").to(device).eval()
    number = len(open_clips(args.clips)[1]) if args.clips else args.count
    source = Clips(args.clips, args.first, list(range(min(number, args.count)))[rank::count])
    workers = args.workers // count
    loader = torch.utils.data.DataLoader(
        source,
        batch_size=args.batch,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=device.type == "cuda",
        multiprocessing_context="spawn" if workers else None,
        in_order=not workers,
    )
    latents, captions = [], []
    moments = torch.zeros(2, vae.config.z_dim, dtype=torch.float64, device=device)
    values, said = torch.zeros((), dtype=torch.float64, device=device), 0.0
    for frames, texts in loader:
        frames = frames[:, : args.frames, : args.crop, : args.crop]
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latent = vae.encode(to_tensor(frames.to(device, non_blocking=True))).latent_dist.mode().float()
        latents.append(latent.half().cpu())
        captions += texts
        flat = latent.transpose(0, 1).flatten(1)
        moments += torch.stack([flat.sum(1), flat.square().sum(1)]).double()
        values += flat.shape[1]
        spent = time.perf_counter() - started
        if rank == 0 and (spent - said > 5 or len(captions) == len(source)):
            said = spent
            print(f"{len(captions) * count}/{len(source) * count} clips  {spent:.0f} s", flush=True)
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
