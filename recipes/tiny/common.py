"""What the recipe's stages share: the model's sizes, the training loop with its checkpoint, captions and data."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def to_tensor(clip: torch.Tensor) -> torch.Tensor:
    """uint8 [..., F, H, W, 3] -> float32 [..., 3, F, H, W] in -1..1."""
    return clip.movedim(-1, -4).float() / 127.5 - 1


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(**VAE, latents_mean=[0.0] * VAE["z_dim"], latents_std=[1.0] * VAE["z_dim"])


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(**TRANSFORMER)


def parse_phases(text: str) -> list[tuple[int, int, int]]:
    """ "1:48:300,9:8:200" -> [(frames, batch, steps), ...]."""
    return [tuple(int(n) for n in phase.split(":")) for phase in text.split(",")]


def phase_at(phases: list[tuple[int, int, int]], step: int) -> tuple[int, int]:
    """Frames and batch of the phase that `step` is in."""
    for frames, batch, steps in phases:
        if step < steps:
            return frames, batch
        step -= steps
    raise IndexError("the step lies behind the last phase")


def learning_rate(progress: float, peak: float) -> float:
    """A cosine from the peak to a hundredth of it; `progress` in 0..1."""
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


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


def prefetch(make: Callable[[int], Any], count: int, first: int = 0, workers: int = 0) -> Iterator[Any]:
    """make(first), make(first + 1), ..., `count` of them, made ahead by `workers` processes."""

    class Steps(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> Any:
            return make(first + index)

    yield from torch.utils.data.DataLoader(
        Steps(), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )


@dataclass
class Budget:
    """How long a stage trains: `steps`, or until `seconds` have passed over all its runs; `pause` ends this run early.

    The learning rate follows whichever of the two is farther on.
    """

    steps: int
    seconds: float = math.inf
    pause: float = math.inf

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seconds", type=float, default=math.inf, help="train no longer than this, over all runs")
        parser.add_argument("--pause", type=float, default=math.inf, help="stop after these seconds, to be resumed")


def train(
    modules: dict[str, torch.nn.Module],
    loss_at: Callable[[int], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    *,
    budget: Budget,
    muon_rate: float,
    adam_rate: float,
    edges: tuple[str, ...],
    checkpoint: Path,
    save_every: int = 200,
    log_every: int = 50,
    averaging: float = 0.0,
) -> dict[str, dict[str, torch.Tensor]] | None:
    """Train `modules` within the budget, resuming from `checkpoint` where it exists.

    Muon moves the hidden weights, AdamW the rest: vectors, and weights whose name holds one of `edges`.
    `loss_at(step)` returns the loss and what to log; a step's data depends on the step alone, so a resumed run sees
    what an unbroken one would. Returns the state dict of each module, averaged with decay `averaging` where that is
    not 0; None where the run was paused.
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
    first, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=parameters[0].device, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        averaged, first, spent = state["averaged"], state["step"], state["spent"]
        print(f"resumed at step {first} from {checkpoint}", flush=True)
    started = time.perf_counter()

    def save(step: int) -> None:
        save_atomically(
            {
                "modules": {n: m.state_dict() for n, m in modules.items()},
                "averaged": averaged,
                "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
                "step": step,
                "spent": spent + time.perf_counter() - started,
            },
            checkpoint,
        )

    live = {name: m.state_dict() for name, m in modules.items()}
    logs: list[dict[str, torch.Tensor]] = []
    for step in range(first, budget.steps):
        elapsed = time.perf_counter() - started
        if spent + elapsed >= budget.seconds:
            save(step)
            break
        if elapsed >= budget.pause:
            save(step)
            print(f"paused at step {step}", flush=True)
            return None
        loss, log = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        progress = max(step / budget.steps, (spent + elapsed) / budget.seconds)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, peak) * min(1.0, (step + 1) / 50)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # A short memory at first, so that the random start is forgotten.
        decay = min(averaging, (1 + step) / (10 + step))
        with torch.no_grad():
            for name in modules:
                torch._foreach_lerp_(list(averaged[name].values()), [v.float() for v in live[name].values()], 1 - decay)
        logs.append(log)
        if (step + 1) % log_every == 0 or step + 1 == budget.steps:
            means = {k: float(torch.stack([entry[k].float().cpu() for entry in logs]).mean()) for k in log}
            pace = (time.perf_counter() - started) / (step + 1 - first)
            text = "  ".join(f"{k} {v:.4f}" for k, v in means.items())
            left = min(pace * (budget.steps - step - 1), budget.seconds - spent - elapsed)
            print(f"step {step + 1}/{budget.steps}  {text}  {pace:.3f} s/step  {left:.0f} s left", flush=True)
            logs = []
        if (step + 1) % save_every == 0 or step + 1 == budget.steps:
            save(step + 1)
    return averaged
