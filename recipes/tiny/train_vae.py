"""Stage 1: the video autoencoder, on crops of rendered clips (L1 + L2 + a little KL)."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import VAE, build_vae, scene_and_caption, to_tensor, train

from heterostep.tiny import world


def crops(step: int, batch: int, size: int, frames: int) -> torch.Tensor:
    """[batch, 3, frames, size, size]; two in three crops follow a shape, for most of a clip is plain background."""
    out = []
    for index in range(batch // 2):
        seed = step * (batch // 2) + index
        scene, _ = scene_and_caption(seed)
        clip = world.render(scene)
        rng = np.random.default_rng([seed, 1])
        for _ in range(2):
            start = int(rng.integers(world.NUM_FRAMES - frames + 1))
            if rng.random() < 0.67:
                shape = scene.shapes[int(rng.integers(len(scene.shapes)))]
                centre = shape.centres()[start + frames // 2] + rng.uniform(-size / 3, size / 3, 2)
            else:
                centre = rng.uniform(0, world.SIZE, 2)
            x, y = np.clip(centre - size / 2, 0, world.SIZE - size).astype(int)
            out.append(to_tensor(clip[start : start + frames, y : y + size, x : x + size]))
    return torch.stack(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--image-steps", type=int, default=400, help="single frames first: they are cheap")
    parser.add_argument("--steps", type=int, default=1600, help="steps in all")
    parser.add_argument("--batch", type=int, default=4, help="clips a step; three times as many single frames")
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = build_vae().to(args.device)
    with torch.no_grad():
        # Little noise on the latents at first, or it drowns what they carry.
        vae.quant_conv.bias[VAE["z_dim"] :] = -4.0

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        image = step < args.image_steps
        target = crops(step, args.batch * (3 if image else 1), args.crop, 1 if image else args.frames).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        error = output - target
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.logvar.float().exp() - 1 - posterior.logvar.float()).mean()
        squared = error.square().mean()
        loss = error.abs().mean() + 2 * squared + 1e-4 * kl
        return loss, {"loss": float(loss.detach()), "psnr": float(10 * torch.log10(4 / squared.detach())), "kl": float(kl.detach())}

    averaged = train(
        {"vae": vae},
        loss_at,
        steps=args.steps, muon_rate=args.rate, adam_rate=1.5e-3,
        edges=("conv_in", "decoder.conv_out"), checkpoint=args.out / "vae.pt", averaging=0.99,
    )  # fmt: skip
    vae.load_state_dict(averaged["vae"])
    vae.save_pretrained(args.out / "vae")


if __name__ == "__main__":
    main()
