"""What the recipe's stages share: the model's sizes, the training loop with its checkpoint, captions and data."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from heterostep.tiny import world

VAE = dict(
    base_dim=24,
    decoder_base_dim=32,
    z_dim=24,
    dim_mult=[1, 2, 4],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=8,
    scale_factor_temporal=4,
)
TRANSFORMER = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=64,
    in_channels=24,
    out_channels=24,
    text_dim=128,
    freq_dim=128,
    ffn_dim=1024,
    num_layers=6,
    rope_max_seq_len=64,
)
TEXT_LENGTH = 40
# Clips of these seeds are never trained on; every figure in the README is measured on them.
HELD_OUT_SEED = 10_000_000


def scene_and_caption(seed: int) -> tuple[world.Scene, str]:
    """The clip of one seed: training takes seeds below HELD_OUT_SEED, evaluation from there up."""
    rng = np.random.default_rng(seed)
    scene = world.sample_scene(rng)
    return scene, world.caption(scene, rng)


def to_tensor(clip: np.ndarray) -> torch.Tensor:
    """uint8 [F, H, W, 3] -> float32 [3, F, H, W] in -1..1."""
    return torch.from_numpy(clip).permute(3, 0, 1, 2).float() / 127.5 - 1


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(**VAE, latents_mean=[0.0] * VAE["z_dim"], latents_std=[1.0] * VAE["z_dim"])


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(**TRANSFORMER)


def learning_rate(progress: float, peak: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak; `progress` in 0..1."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))))


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix update is made orthogonal by five Newton-Schulz steps (K. Jordan et al., 2024).

    Takes weights of two or more axes; a convolution's is seen as a matrix [out, in * kernel]. On these small models it
    needs several times fewer steps than AdamW does.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1).bfloat16()
                tall = update.shape[0] > update.shape[1]
                update = update.T if tall else update
                update = update / (update.norm() + 1e-7)
                for _ in range(5):
                    gram = update @ update.T
                    update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
                update = update.T if tall else update
                size = max(1.0, p.shape[0] / p[0].numel()) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype).reshape(p.shape), alpha=-group["lr"] * size)


def save_atomically(state: dict, path: Path) -> None:
    """A stopped run never leaves half a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    torch.save(state, part)
    os.replace(part, path)


def train(
    modules: dict[str, torch.nn.Module],
    loss_at: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    *,
    steps: int,
    muon_rate: float,
    adam_rate: float,
    edges: tuple[str, ...],
    checkpoint: Path,
    save_every: int = 200,
    log_every: int = 50,
    averaging: float = 0.0,
) -> dict[str, dict[str, torch.Tensor]]:
    """Train `modules` for `steps` steps, resuming from `checkpoint` where it exists.

    Muon moves the hidden weights, AdamW the rest: vectors, and weights whose name holds one of `edges`.
    `loss_at(step)` returns the loss and what to log; a step's data depends on the step alone, so a resumed run sees what
    an unbroken one would. Returns the state dict of each module, averaged with decay `averaging` where that is not 0.
    """
    named = [(n, p) for m in modules.values() for n, p in m.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    hidden = [p for n, p in named if p.ndim >= 2 and p.shape[0] > 1 and not any(edge in n for edge in edges)]
    matrices = {id(p) for p in hidden}
    rest = [p for p in parameters if id(p) not in matrices]
    optimizers = [
        (Muon(hidden, lr=muon_rate), muon_rate),
        (torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0), adam_rate),
    ]
    averaged = {name: {k: v.detach().clone().float() for k, v in m.state_dict().items()} for name, m in modules.items()}
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        averaged, first = state["averaged"], state["step"]
        device = parameters[0].device
        averaged = {n: {k: v.to(device) for k, v in s.items()} for n, s in averaged.items()}
        print(f"resumed at step {first} from {checkpoint}", flush=True)

    def save(step: int) -> None:
        save_atomically(
            {
                "modules": {n: m.state_dict() for n, m in modules.items()},
                "averaged": averaged,
                "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
                "step": step,
            },
            checkpoint,
        )

    started, logs = time.perf_counter(), []
    for step in range(first, steps):
        loss, log = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step / steps, peak)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # A short memory at first, so that the random start is forgotten.
        decay = min(averaging, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, module in modules.items():
                for key, value in module.state_dict().items():
                    averaged[name][key].lerp_(value.float(), 1 - decay)
        logs.append(log)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            means = {k: float(np.mean([entry[k] for entry in logs])) for k in log}
            pace = (time.perf_counter() - started) / (step + 1 - first)
            text = "  ".join(f"{k} {v:.4f}" for k, v in means.items())
            print(f"step {step + 1}/{steps}  {text}  {pace:.3f} s/step  {pace * (steps - step - 1):.0f} s left", flush=True)
            logs = []
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(step + 1)
    return averaged
