"""Stage 1: the video autoencoder, on crops of rendered clips (L1 + L2 + a little KL).

Single frames first, for they are cheap; then short clips; then whole ones, or the causal convolutions, which carry what
they have seen from frame to frame, drift on clips longer than those they were trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from common import (
    HELD_OUT_SEED,
    VAE,
    Budget,
    build_vae,
    parse_phases,
    phase_at,
    prefetch,
    scene_and_caption,
    to_tensor,
    train,
)
from heterostep.tiny import world


def crops(step: int, batch: int, size: int, frames: int) -> torch.Tensor:
    """uint8 [batch, frames, size, size, 3]; two in three crops follow a shape, for most of a clip is background."""
    out = []
    for index in range(batch // 2):
        # Seeds go round before they reach the held-out ones.
        seed = (step * (batch // 2) + index) % HELD_OUT_SEED
        scene, _ = scene_and_caption(seed)
        rng = np.random.default_rng([seed, 1])
        clip = world.render(scene)
        for _ in range(2):
            start = int(rng.integers(world.NUM_FRAMES - frames + 1))
            if rng.random() < 0.67:
                shape = scene.shapes[int(rng.integers(len(scene.shapes)))]
                centre = shape.centres()[start + frames // 2] + rng.uniform(-size / 3, size / 3, 2)
            else:
                centre = rng.uniform(0, world.SIZE, 2)
            x, y = np.clip(centre - size / 2, 0, world.SIZE - size).astype(int)
            out.append(clip[start : start + frames, y : y + size, x : x + size])
    return torch.from_numpy(np.stack(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--phases", default="1:48:600,9:16:900,33:8:900", help="frames:batch:steps, ...")
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--init", type=Path, help="start from this autoencoder's weights")
    parser.add_argument("--workers", type=int, default=0, help="processes that render")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    Budget.add_arguments(parser)
    args = parser.parse_args()
    phases = parse_phases(args.phases)
    budget = Budget(sum(steps for _, _, steps in phases), args.seconds, args.pause)
    torch.manual_seed(0)
    if args.init:
        vae = AutoencoderKLWan.from_pretrained(args.init).to(args.device)
    else:
        vae = build_vae().to(args.device)
        with torch.no_grad():
            # Little noise on the latents at first, or it drowns what they carry.
            vae.quant_conv.bias[VAE["z_dim"] :] = -4.0
    checkpoint = args.out / "vae.pt"
    first = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0

    def clips(step: int) -> torch.Tensor:
        frames, batch = phase_at(phases, step)
        return crops(step, batch, args.crop, frames)

    stream = prefetch(clips, budget.steps - first, first, args.workers)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        target = to_tensor(next(stream).to(args.device))
        with torch.autocast(args.device, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        error = output - target
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.logvar.float().exp() - 1 - posterior.logvar.float()).mean()
        squared = error.square().mean()
        loss = error.abs().mean() + 2 * squared + 1e-4 * kl
        psnr = 10 * torch.log10(4 / squared.detach())
        return loss, {"loss": loss.detach(), "psnr": psnr, "kl": kl.detach()}

    averaged = train(
        {"vae": vae},
        loss_at,
        budget=budget,
        muon_rate=args.rate,
        adam_rate=1.5e-3,
        edges=("conv_in", "decoder.conv_out"),
        checkpoint=checkpoint,
        averaging=0.99,
    )
    if averaged is not None:
        vae.load_state_dict(averaged["vae"])
        vae.save_pretrained(args.out / "vae")


if __name__ == "__main__":
    main()
