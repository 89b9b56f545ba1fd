"""What the README of this recipe states: the autoencoder's PSNR, and how many captions the dense model meets.

All on clips and captions that were kept out of training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from common import HELD_OUT_SEED, scene_and_caption, to_tensor
from heterostep import tiny
from heterostep.tiny import world

KEYS = ("colour", "direction", "kind", "background")


def reconstruction(vae, clips: int) -> list[float]:
    """PSNR in dB of each held-out clip through the autoencoder, 8-bit frames."""
    out = []
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + clips):
        clip = world.render(scene_and_caption(seed)[0])
        with torch.no_grad():
            decoded = vae.decode(vae.encode(to_tensor(torch.from_numpy(clip))[None]).latent_dist.mode()).sample[0]
        pixels = ((decoded + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 3, 0).numpy()
        out.append(float(10 * np.log10(255**2 / np.mean((pixels - clip.astype(np.float32)) ** 2))))
    return out


def captions_met(pipe, captions: list[str], steps: int, batch: int) -> list[dict]:
    """The judge's verdict on one dense clip of each caption; clip i starts from noise of seed i."""
    verdicts, started = [], time.perf_counter()
    # Half precision on a GPU, as a user would run it there.
    half = torch.autocast("cuda", torch.bfloat16, enabled=pipe.device.type == "cuda")
    for first in range(0, len(captions), batch):
        chosen = captions[first : first + batch]
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(chosen))]
        with half:
            clips = pipe(chosen, num_inference_steps=steps, generator=generators, **tiny.generation_options()).frames
        for text, clip in zip(chosen, clips):
            verdict = world.judge((clip * 255).round().astype(np.uint8), text)
            verdicts.append({"caption": text} | {key: getattr(verdict, key) for key in KEYS})
        left = (time.perf_counter() - started) / len(verdicts) * (len(captions) - len(verdicts))
        print(f"{len(verdicts)}/{len(captions)} captions  {left:.0f} s left", flush=True)
    return verdicts


def mean(verdicts: list[dict], key: str) -> float | None:
    known = [v[key] for v in verdicts if v[key] is not None]
    return float(np.mean(known)) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a pipeline folder; by default the bundled one")
    parser.add_argument("--clips", type=int, default=32, help="held-out clips for the autoencoder")
    parser.add_argument("--captions", type=int, default=64, help="held-out captions for the dense model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    pipe = tiny.load(path=args.model)
    quality = reconstruction(pipe.vae, args.clips) if args.clips else []
    if quality:
        print(
            f"autoencoder: {np.mean(quality):.2f} dB mean, {np.min(quality):.2f} worst, {len(quality)} clips",
            flush=True,
        )
    captions = [scene_and_caption(HELD_OUT_SEED + 1000 + i)[1] for i in range(args.captions)]
    verdicts = captions_met(pipe.to(args.device), captions, args.steps, args.batch)
    means = {key: mean(verdicts, key) for key in KEYS}
    print("captions met:", {k: None if v is None else round(v, 3) for k, v in means.items()})
    if args.json:
        args.json.write_text(json.dumps({"vae_psnr": quality, "met": means, "verdicts": verdicts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
