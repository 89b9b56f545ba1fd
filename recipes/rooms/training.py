"""The training loop of the recipe: one or several GPUs, averaged weights, checkpoints, an end by the clock."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def add_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/rooms"), help="the run's folder")
    parser.add_argument("--steps", type=int, default=steps, help="no more than these in all")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="save and end after these, compilation counted in"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def join_others(device: str) -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes, and its device; torchrun sets them, one process a GPU."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    where = torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if count > 1:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return rank, count, where


def leave_others() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix update is made orthogonal by five Newton-Schulz steps (K. Jordan et al., 2024).

    Takes weights of two or more axes; a convolution's is seen as a matrix [out, in * kernel]. Matrices of one shape are
    moved together.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for (rows, columns), weights in alike.items():
                gradients = [p.grad for p in weights]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in weights]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
                update = torch.stack([u.reshape(rows, columns) for u in updates]).bfloat16()
                update = update.mT if rows > columns else update
                update = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = update @ update.mT
                    update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
                update = update.mT if rows > columns else update
                size = max(1.0, rows / columns) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                moves = [u.to(p.dtype).reshape(p.shape) for u, p in zip(update, weights)]
                torch._foreach_add_(weights, moves, alpha=-group["lr"] * size)


def learning_rate(progress: float, peak: float, decay_from: float) -> float:
    """Constant until `decay_from` of the run, then a straight line to a fiftieth; 1.0 and above keeps it constant."""
    if decay_from >= 1 or progress <= decay_from:
        return peak
    return peak * max(0.02, 1 - (min(progress, 1.0) - decay_from) / (1 - decay_from))


def save_atomically(state: dict, path: Path) -> None:
    """A stopped run never leaves half a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    torch.save(state, part)
    os.replace(part, path)


def train(
    module: torch.nn.Module,
    loss_at: Callable[[int, float], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    args: argparse.Namespace,
    *,
    rank: int,
    muon_rate: float,
    adam_rate: float,
    edges: tuple[str, ...],
    checkpoint: Path,
    averaging: float,
    decay_from: float = 0.6,
    warm_up: int = 50,
    log_every: int = 50,
    begun: float | None = None,
) -> dict[str, torch.Tensor]:
    """Train `module` for `args.steps` or `args.seconds`; returns its averaged state dict.

    Muon moves the hidden weights, AdamW the rest: vectors, and weights whose name holds one of `edges`.
    `loss_at(step, progress)` returns this process's loss, from a forward through the data-parallel module where there
    is one, and what to log; `progress` is the share of the run that is over, the same in all processes.
    The clock runs from `begun` (time.perf_counter()), or from the call.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    hidden = [p for n, p in named if p.ndim >= 2 and p.shape[0] > 1 and not any(edge in n for edge in edges)]
    matrices = {id(p) for p in hidden}
    optimizers = [
        (Muon(hidden, lr=muon_rate), muon_rate),
        (
            torch.optim.AdamW(
                [p for p in parameters if id(p) not in matrices], lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0
            ),
            adam_rate,
        ),
    ]
    averaged = {k: v.detach().clone().float() for k, v in module.state_dict().items()}
    first = 0
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=parameters[0].device, weights_only=True)
        module.load_state_dict(state["live"] or state["averaged"])
        averaged = {k: v.float() for k, v in state["averaged"].items()}
        first = state["step"]
        for (optimizer, _), saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if rank == 0:
            print(f"resumed at step {first}", flush=True)

    def save(step: int) -> None:
        if rank == 0:
            save_atomically(
                {
                    "averaged": averaged,
                    "live": module.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
                    "step": step,
                },
                checkpoint,
            )

    live = module.state_dict()
    keys = [k for k, v in live.items() if v.is_floating_point()]
    started = time.perf_counter() if begun is None else begun
    saved_at, pace_from, logs, step, progress = time.perf_counter(), None, [], first, 0.0
    device = parameters[0].device
    while step < args.steps:
        elapsed = time.perf_counter() - started
        # All processes end at the same step, the first one's clock decides; asked seldom, for it waits for the device.
        if step % 10 == 0:
            over = torch.tensor(float(elapsed >= args.seconds), device=device)
            if dist.is_initialized():
                dist.broadcast(over, 0)
            if over:
                break
            at = torch.tensor(max(step / args.steps, elapsed / args.seconds), device=device)
            if dist.is_initialized():
                dist.broadcast(at, 0)
            progress = float(at)
        loss, log = loss_at(step, progress)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, peak, decay_from) * min(1.0, (step + 1 - first) / warm_up)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(averaging, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_([averaged[k] for k in keys], [live[k].float() for k in keys], 1 - decay)
        logs.append({k: v.detach() for k, v in log.items()})
        step += 1
        if step % log_every == 0 or step == args.steps:
            if rank == 0:
                means = {k: float(torch.stack([entry[k].float() for entry in logs if k in entry]).mean()) for k in log}
                now = time.perf_counter()
                pace = (now - pace_from[1]) / (step - pace_from[0]) if pace_from else float("nan")
                pace_from = (step, now)
                text = "  ".join(f"{k} {v:.4f}" for k, v in means.items())
                print(f"step {step}  {text}  {pace:.3f} s/step  {now - started:.0f} s", flush=True)
            logs = []
        if time.perf_counter() - saved_at > args.save_every:
            save(step)
            saved_at = time.perf_counter()
    save(step)
    if rank == 0:
        print(f"ended at step {step} after {time.perf_counter() - started:.0f} s", flush=True)
    return averaged
