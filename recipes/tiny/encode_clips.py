"""Stage 3: clips to latents, once, with the statistics that the pipeline needs to normalise them.

Clips come in three lengths: the causal autoencoder gives a short clip the same first latents as a long one, and short
ones are cheap, so the first phases of training see more of the world than full clips alone would show them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import save_atomically, scene_and_caption, to_tensor
from diffusers import AutoencoderKLWan

from heterostep.tiny import world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--clips", type=int, nargs="*", default=[33, 4000], help="pairs: frames count frames count ...")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae").to(args.device).eval()
    started, seed, total = time.perf_counter(), 0, sum(args.clips[1::2])
    moments = torch.zeros(2, vae.config.z_dim, dtype=torch.float64)
    values = 0
    for frames, count in zip(args.clips[::2], args.clips[1::2], strict=True):
        latents, captions = [], []
        for _ in range(count):
            scene, caption = scene_and_caption(seed)
            seed += 1
            clip = to_tensor(world.render(scene, num_frames=frames))[None].to(args.device)
            with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
                latent = vae.encode(clip).latent_dist.mode()[0].float().cpu()
            latents.append(latent.half())
            captions.append(caption)
            flat = latent.double().flatten(1)
            moments += torch.stack([flat.sum(1), flat.square().sum(1)])
            values += flat.shape[1]
            if seed % 100 == 0 or seed == total:
                pace = (time.perf_counter() - started) / seed
                print(f"{seed}/{total} clips, {frames} frames  {pace * (total - seed):.0f} s left", flush=True)
        save_atomically({"latents": torch.stack(latents), "captions": captions}, args.out / f"latents-{frames}.pt")
    mean = moments[0] / values
    std = (moments[1] / values - mean.square()).sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(args.out / "vae")
    print("latents' mean", [round(m, 2) for m in mean.tolist()], "std", [round(s, 2) for s in std.tolist()])


if __name__ == "__main__":
    main()
