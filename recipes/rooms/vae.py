"""Train the video autoencoder on crops of rendered clips: L1, L2, the differences between neighbours, a little KL.

Short crops and whole clips take turns: trained on short ones alone, the causal convolutions drift over a clip.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from data import open_clips
from sizes import VAE, build_vae, to_tensor
from training import add_arguments, join_others, leave_others, train
from whole import decode, encode

KL = 1e-4


def widen(vae: AutoencoderKLWan, narrow: dict[str, torch.Tensor]) -> None:
    """Take over the weights of an autoencoder with fewer latent channels; the added ones begin small.

    Weights of the latents' means and of their log variances stand in the two halves of an axis.
    """
    state = vae.state_dict()
    for name, weight in narrow.items():
        target = state[name]
        if target.shape == weight.shape:
            target.copy_(weight)
            continue
        if weight.ndim > 1:
            target.mul_(0.3)
        halves = weight.shape[0] != target.shape[0] and name.startswith(("encoder.conv_out", "quant_conv"))
        inner = weight.shape[1:2]
        for half in range(2 if halves else 1):
            old, new = (w.shape[0] // (2 if halves else 1) for w in (weight, target))
            rows, source = target[half * new : half * new + old], weight[half * old : half * old + old]
            if weight.ndim > 1 and name.startswith("quant_conv"):
                wide, thin = target.shape[1] // 2, weight.shape[1] // 2
                rows[:, :thin].copy_(source[:, :thin])
                rows[:, wide : wide + thin].copy_(source[:, thin:])
            elif weight.ndim > 1:
                rows[:, : inner[0]].copy_(source)
            else:
                rows.copy_(source)
    vae.load_state_dict(state)


class Crops(torch.utils.data.Dataset):
    """Batches uint8 [B, F, size, size, 3] by step; every third one is of whole clips."""

    def __init__(self, folder: Path, batch: int, size: int, rank: int, first: int, last: int):
        self.folder, self.batch, self.size, self.rank, self.first, self.last = folder, batch, size, rank, first, last
        self.clips: np.memmap | None = None

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.clips is None:
            self.clips, self.done = open_clips(self.folder)
        rng = np.random.default_rng([self.first + index, self.rank, 5])
        whole = (self.first + index) % 3 == 2
        frames = self.clips.shape[1] if whole else 9
        # A copy: others may be writing.
        ready = np.flatnonzero(np.array(self.done))
        out = []
        for clip in rng.choice(ready, max(1, self.batch // 4) if whole else self.batch):
            t, y, x = (
                int(rng.integers(n + 1)) for n in np.array(self.clips.shape[1:4]) - (frames, self.size, self.size)
            )
            out.append(self.clips[clip, t : t + frames, y : y + self.size, x : x + self.size])
        return torch.from_numpy(np.stack(out))


def stream(crops: Crops, workers: int) -> Iterator[torch.Tensor]:
    yield from torch.utils.data.DataLoader(
        crops,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def differences(x: torch.Tensor) -> torch.Tensor:
    """How far neighbours in x, y and time lie apart, of errors [B, 3, F, H, W]: what blur costs."""
    total = x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
    return total + x.diff(dim=2).abs().mean() if x.shape[2] > 1 else total


class Reconstruction(torch.nn.Module):
    """One forward of both halves, so that a data-parallel wrapper sees it."""

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__()
        self.vae = vae

    def forward(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = encode(self.vae, target)
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return decode(self.vae, latents), mean, log_variance


def main() -> None:
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(prog="rooms vae", description=__doc__)
    add_arguments(parser, steps=20000)
    parser.add_argument("--clips", type=Path, default=Path("runs/rooms/clips"), help="what `data` wrote")
    parser.add_argument("--init", type=Path, help="an autoencoder to start from, of fewer latent channels")
    parser.add_argument(
        "--batch", type=int, default=24, help="crops of nine frames a process; of whole clips a quarter"
    )
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.008)
    parser.add_argument("--adam-rate", type=float, default=1e-3)
    parser.add_argument("--decay-from", type=float, default=0.5, help="share of the run after which the rate falls")
    parser.add_argument("--workers", type=int, default=6, help="processes that read, for each GPU")
    parser.add_argument("--measure", type=int, default=12, help="clips whose reconstruction is measured at the end")
    parser.add_argument("--wait-for", type=int, default=1, help="begin when so many clips are there")
    args = parser.parse_args()
    rank, count, device = join_others(args.device)
    torch.manual_seed(rank)
    vae = build_vae()
    with torch.no_grad():
        # Little noise on the latents at first, or it drowns what they carry.
        vae.quant_conv.bias[VAE["z_dim"] :] = -4.0
    if args.init and not (args.resume and (args.out / "vae.pt").exists()):
        widen(vae, AutoencoderKLWan.from_pretrained(args.init, dtype=torch.float32).state_dict())
    vae.to(device).train()
    while not (args.clips / "done.u8").exists() or open_clips(args.clips)[1].sum() < args.wait_for:
        time.sleep(0.5)
    both: torch.nn.Module = Reconstruction(vae)
    if count > 1:
        ids = [device] if device.type == "cuda" else None
        both = torch.nn.parallel.DistributedDataParallel(both, device_ids=ids, broadcast_buffers=False)
    batches = stream(Crops(args.clips, args.batch, args.crop, rank, 0, args.steps), args.workers)

    def loss_at(step: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        target = to_tensor(next(batches).to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16):
            output, mean, logvar = both(target)
        error = output.float() - target
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        squared = error.square().mean()
        loss = error.abs().mean() + 2 * squared + 0.5 * differences(error) + KL * kl
        return loss, {"loss": loss, "psnr": 10 * torch.log10(4 / squared.detach()), "kl": kl}

    averaged = train(
        vae,
        loss_at,
        args,
        rank=rank,
        muon_rate=args.rate,
        adam_rate=args.adam_rate,
        edges=("conv_in", "decoder.conv_out"),
        checkpoint=args.out / "vae.pt",
        averaging=0.995,
        decay_from=args.decay_from,
        begun=begun,
    )
    if rank == 0:
        vae.load_state_dict(averaged)
        vae.save_pretrained(args.out / "vae")
        if args.measure:
            found = measure(vae, args.clips, device, args.measure, args.out / "vae.png")
            print(f"{args.out / 'vae'}: {found:.2f} dB over whole clips", flush=True)
    leave_others()


@torch.no_grad()
def measure(vae: AutoencoderKLWan, folder: Path, device: torch.device, count: int, picture: Path) -> float:
    """Mean PSNR of the last clips that are there, each of them whole; a late frame of some, above what became of it."""
    clips, done = open_clips(folder)
    values, shown = [], []
    for index in np.flatnonzero(done)[-count:]:
        target = to_tensor(torch.from_numpy(clips[index][None])).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            output = vae.decode(vae.encode(target).latent_dist.mode()).sample.float().clamp(-1, 1)
        values.append(10 * torch.log10(4 / (output - target).square().mean()))
        both = torch.cat([target, output], -2)[0, :, -6].movedim(0, -1)
        shown.append(((both + 1) * 127.5).round().byte().cpu().numpy())
    Image.fromarray(np.concatenate(shown[:8], 1)).save(picture)
    return float(torch.stack(values).mean())


if __name__ == "__main__":
    main()
