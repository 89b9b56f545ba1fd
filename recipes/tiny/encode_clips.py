"""Stage 3: clips to latents, once, with the statistics that the pipeline needs to normalise them.

Shorter clips may be added for the transformer's first phases: the causal autoencoder gives a short clip the same first
latents as a long one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from common import prefetch, save_atomically, scene_and_caption, to_tensor
from heterostep.tiny import world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--clips", type=int, nargs="*", default=[33, 8000], help="pairs: frames count frames count ...")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that render")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae").to(args.device).eval()
    started, first, total = time.perf_counter(), 0, sum(args.clips[1::2])
    moments = torch.zeros(2, vae.config.z_dim, dtype=torch.float64)
    values = done = 0
    for frames, count in zip(args.clips[::2], args.clips[1::2], strict=True):
        seeds = list(range(first, first + count))
        first += count
        batches = [seeds[i : i + args.batch] for i in range(0, count, args.batch)]

        def clips(index: int, batches=batches, frames=frames) -> torch.Tensor:
            scenes = (scene_and_caption(seed)[0] for seed in batches[index])
            return torch.stack([torch.from_numpy(world.render(scene, num_frames=frames)) for scene in scenes])

        latents = []
        for batch in prefetch(clips, len(batches), workers=args.workers):
            with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
                latent = vae.encode(to_tensor(batch.to(args.device))).latent_dist.mode().float()
            latents.append(latent.half().cpu())
            flat = latent.double().transpose(0, 1).flatten(1)
            moments += torch.stack([flat.sum(1), flat.square().sum(1)]).cpu()
            values += flat.shape[1]
            before, done = done, done + len(batch)
            if done // 200 > before // 200 or done == total:
                pace = (time.perf_counter() - started) / done
                print(f"{done}/{total} clips, {frames} frames  {pace * (total - done):.0f} s left", flush=True)
        captions = [scene_and_caption(seed)[1] for seed in seeds]
        save_atomically({"latents": torch.cat(latents), "captions": captions}, args.out / f"latents-{frames}.pt")
    mean = moments[0] / values
    std = (moments[1] / values - mean.square()).sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(args.out / "vae")
    print("latents' mean", [round(m, 2) for m in mean.tolist()], "std", [round(s, 2) for s in std.tolist()])


if __name__ == "__main__":
    main()
