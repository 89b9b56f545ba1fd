"""What is told of a run: its report, the line of a log, and where it is."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import psutil
import torch

from heterostep.config import HSAConfig
from heterostep.engine.budget import fitted_cost, out_of_reach
from heterostep.engine.clock import StepCost
from heterostep.engine.generation import Generation
from heterostep.engine.report import MemoryReport, Report, RuntimeReport, ShareReport, StepInfo, StepsReport

_log = logging.getLogger("heterostep")


def report(generation: Generation, pipeline: str) -> Report:
    """A generation's account; `pipeline` is the name of its class."""
    num_steps, total = generation.schedule.run.num_steps, generation.total
    fitted = fitted_cost(generation)
    seconds, dense_seconds, warmup = 0.0, None, 0.0
    if fitted is not None:
        cost, durations = fitted
        seconds, warmup = sum(durations), cost.warmup
        dense_seconds = cost.dense_run(num_steps)
    steps = generation.evaluations.cpu()
    done = generation.counts[: generation.steps_done]
    config, grid = generation.config, generation.grid.shape
    achieved = float(steps.double().mean()) / num_steps
    target = None if config.share is None else config.target
    left = 0.0 if target is None or not generation.finished else target - achieved
    return Report(
        pipeline=pipeline,
        num_inference_steps=num_steps,
        runtime=RuntimeReport(
            target=config.runtime,
            achieved=(seconds - warmup) / dense_seconds if dense_seconds and generation.finished else None,
            seconds=seconds,
            dense_seconds=dense_seconds,
            warmup_seconds=warmup,
        ),
        share=ShareReport(target=target, achieved=achieved, unspent=left if left > 1e-4 else 0.0),
        steps=StepsReport(mean=float(steps.float().mean()), min=int(steps.min()), max=int(steps.max())),
        active_share=[count / total for count in done],
        memory=MemoryReport(
            kv_cache_bytes=generation.kv_bytes_peak,
            peak_bytes=_peak_bytes(generation),
            kv_host_bytes=generation.kv_host_bytes_peak,
            kv_store=generation.kv_store,
            fell_back=generation.fell_back,
        ),
        replay=_replay_options(generation, [count / total for count in done]),
        policy=config.policy,
        steps_maps=steps[:, : math.prod(grid)].view(-1, *grid).numpy().astype(np.int64),
        solver=config.solver,
        finished=generation.finished,
        advice=generation.schedule.advice or (fitted and _missed(generation, fitted[0])),
    )


def _missed(generation: Generation, cost: StepCost) -> str | None:
    """Why the target in seconds was out of reach; None where it was not."""
    if not (generation.finished and out_of_reach(generation, cost)):
        return None
    tokens, runtime = generation.schedule.run.tokens, generation.config.runtime
    part = cost.seconds(tokens.least / tokens.total) / cost.plain
    fewer = "Take fewer steps" + (" or one GPU" if generation.ranks.size > 1 else "")
    return (
        f"runtime={runtime:g} could not be reached: a step without the video tokens took {part:.2f} of a full step. "
        f"The run used share={runtime:g} instead. {fewer}, or raise runtime"
    )


def _replay_options(generation: Generation, shares: list[float]) -> dict[str, Any]:
    """What repeats a run beside the seed: its shares, its stores, and options that are not the default."""
    fields = HSAConfig.__dataclass_fields__
    changed = {name: getattr(generation.config, name) for name in fields}
    options = {
        name: value
        for name, value in changed.items()
        if value != fields[name].default and name not in ("runtime", "share", "kv_store", "vram")
    }
    names = generation.store_names
    if names:
        options["kv_store"] = names[0] if len(set(names)) == 1 else names
    return {"share": shares, **options}


def log_end(generation: Generation) -> None:
    """One line for a service's log."""
    if not _log.isEnabledFor(logging.INFO):
        return
    fitted = fitted_cost(generation)
    config, total = generation.config, generation.total
    dense = [step for step, count in enumerate(generation.counts) if count == total]
    asked = f"runtime {config.runtime:g}" if config.runtime is not None else f"share {config.target:.3g}"
    spent = sum(generation.counts) / total / len(generation.counts)
    seconds = ""
    if fitted is not None:
        cost, durations = fitted
        seconds = f", {sum(durations):.2f} s (dense about {cost.dense_run(len(generation.counts)):.2f})"
    _log.info(
        "%s: %s asked, share %.3f spent%s; dense steps %s of %d; K/V: %s",
        config.policy, asked, spent, seconds, dense, len(generation.counts), generation.kv_store,
    )  # fmt: skip


def step_info(generation: Generation) -> StepInfo:
    """Where a generation is."""
    fitted = fitted_cost(generation)
    total, num_steps = generation.total, generation.schedule.run.num_steps
    elapsed, runtime = 0.0, None
    if fitted is not None:
        cost, durations = fitted
        elapsed = sum(durations)
        ahead = generation.counts[generation.steps_done :]
        seconds = elapsed - cost.warmup + sum(cost.seconds(count / total) for count in ahead)
        runtime = seconds / cost.dense_run(num_steps)
    return StepInfo(
        step=generation.step,
        num_inference_steps=num_steps,
        active_share=generation.counts[generation.step] / total,
        elapsed_seconds=elapsed,
        projected_runtime=runtime,
        projected_share=sum(generation.counts) / total / num_steps,
    )


def _peak_bytes(generation: Generation) -> int:
    device = generation.evaluated_at.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory_info = psutil.Process().memory_info()
    # Windows and Linux (by the field that it has there) tell the peak; elsewhere what is held now is the best there is.
    return getattr(memory_info, "peak_wset", 0) or _linux_peak() or memory_info.rss


def _linux_peak() -> int:
    try:
        with open("/proc/self/status") as status:
            lines = [line for line in status if line.startswith("VmHWM:")]
    except OSError:
        return 0
    return int(lines[0].split()[1]) * 1024 if lines else 0
