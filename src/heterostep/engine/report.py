"""What a run was asked for and what it did: the report, where the run is after a step, and a line for a log."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import psutil
import torch

from heterostep.config import HSAConfig
from heterostep.engine.budget import fitted_cost, out_of_reach
from heterostep.engine.clock import StepCost
from heterostep.engine.generation import Generation

SCHEMA = 3

_log = logging.getLogger("heterostep")


@dataclass(frozen=True)
class RuntimeReport:
    """The time of the denoising loop.

    Attributes:
        target: seconds asked for, over the dense loop's; None where a share was asked for.
        achieved: seconds taken, over the dense loop's, without warm-up; None where the run was
            interrupted or its steps could not be timed.
        seconds: all of the loop's, warm-up included, but for what callbacks took.
        dense_seconds: what the dense loop would take without heterostep, estimated from the run's dense steps, where
            there are such from those that kept no K and V.
        warmup_seconds: of `seconds`, those of calls that the process made for the first time (compilation,
            autotuning): a second run of the kind has none. And those in which the process stood still.
    """

    target: float | None
    achieved: float | None
    seconds: float
    dense_seconds: float | None
    warmup_seconds: float = 0.0


@dataclass(frozen=True)
class ShareReport:
    """Token evaluations over those of the dense run.

    Attributes:
        target: asked for; None where a runtime was.
        achieved: spent. Where steps differ in their guidance calls, more or less than planned, for plans are of steps.
        unspent: what is left of the asked share, if anything: less than one dense step, or what `divisors` without 1
            cannot spend.
    """

    target: float | None
    achieved: float
    unspent: float = 0.0


@dataclass(frozen=True)
class StepsReport:
    """How often a token was evaluated: the mean over all tokens, the rarest, the most frequent."""

    mean: float
    min: int
    max: int


@dataclass(frozen=True)
class MemoryReport:
    """Where K and V were kept, and bytes.

    Attributes:
        kv_cache_bytes: the most K/V held at once on the device, with what decoding and transfers use.
        peak_bytes: the process's peak (on CUDA: the device's peak of allocated memory).
        kv_host_bytes: the most held in host memory for it.
        kv_store: the store's name, or how many layers had which; "none" where nothing was kept.
        fell_back: memory ran out in the run, and `kv_store` took over from a larger one.
    """

    kv_cache_bytes: int
    peak_bytes: int
    kv_host_bytes: int = 0
    kv_store: str = "none"
    fell_back: bool = False


@dataclass(frozen=True)
class StepInfo:
    """Where a run is, as `on_step` is told after each step.

    Attributes:
        step: the step that was made, from 0.
        num_inference_steps: of the run.
        active_share: of the tokens, those that this step evaluated, 0..1.
        elapsed_seconds: of the denoising loop so far.
        projected_runtime: seconds that the whole run will take as it is planned now, over the dense loop's; None while
            no step has been timed.
        projected_share: token evaluations of the whole run as it is planned now, over the dense run's.
    """

    step: int
    num_inference_steps: int
    active_share: float
    elapsed_seconds: float
    projected_runtime: float | None
    projected_share: float


@dataclass(frozen=True)
class Report:
    """What one generation was asked for and what it did.

    Attributes:
        pipeline: its class name.
        num_inference_steps: denoising steps.
        runtime: the time of the denoising loop.
        share: token evaluations.
        steps: evaluations per token.
        memory: where K and V were kept.
        active_share: tokens evaluated over all tokens, one per step; as `share=` it replays the run.
        replay: options that repeat the run bit for bit: `enable(pipe, **report.replay)`, then the same call and seed.
            Beside the shares they name the stores that K and V were in, which free memory would choose anew. Where
            memory ran out in mid-run (`memory.fell_back`), a replay has the store of its end throughout. Of a run that
            was interrupted it goes on as was planned.
        steps_maps: evaluations per token of each sample, int [samples, frames, height, width] of the token grid.
        policy: what decided where evaluations went.
        solver: how steps were made.
        finished: False where the run was interrupted.
        advice: what would probably serve better than this run's settings, or why its target was out of reach, one
            sentence; None where nothing is known.
        seed: of the noise, where the command made the video; None from Python, where it is in your generator.
        schema: the version of the keys of `to_json`.
    """

    pipeline: str
    num_inference_steps: int
    runtime: RuntimeReport
    share: ShareReport
    steps: StepsReport
    active_share: list[float]
    memory: MemoryReport
    steps_maps: np.ndarray = field(repr=False, compare=False)
    replay: dict[str, Any] = field(default_factory=dict)
    policy: str = "auto"
    solver: str = "pipeline"
    finished: bool = True
    advice: str | None = None
    seed: int | None = None
    schema: int = SCHEMA

    @property
    def steps_map(self) -> np.ndarray:
        """Evaluations per token of the first sample, int [frames, height, width]."""
        return self.steps_maps[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, the steps maps as nested lists."""
        out = asdict(self)
        out["steps_maps"] = self.steps_maps.tolist()
        return out

    def to_json(self, *, indent: int | None = None) -> str:
        """The report as JSON; `schema` tells the version of its keys."""
        return json.dumps(self.to_dict(), indent=indent)


def build_report(generation: Generation, pipeline: str) -> Report:
    """A generation's report; `pipeline` is the name of its class."""
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
    achieved = _share_of_dense(generation)
    target = None if config.share is None else config.target
    left = 0.0 if target is None or not generation.finished else target - sum(done) / total / num_steps
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
        replay=_replay_options(generation, [count / total for count in generation.counts]),
        policy=config.policy,
        steps_maps=steps[:, : math.prod(grid)].view(-1, *grid).numpy().astype(np.int64),
        solver=config.solver,
        finished=generation.finished,
        advice=generation.schedule.advice or (fitted and _missed(generation, fitted[0])),
    )


def _share_of_dense(generation: Generation) -> float:
    """Token evaluations so far over the dense run's, in all guidance calls: a step without guidance has fewer."""
    samples = generation.samples_by_step
    done = range(generation.steps_done)
    latest = samples[max(samples)] if samples else generation.samples
    of_steps = [samples.get(step, latest) for step in range(generation.schedule.run.num_steps)]
    made = sum(generation.counts[step] * of_steps[step] for step in done) + generation.unplanned_evaluations
    return made / (generation.total * sum(of_steps))


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
    options |= generation.schedule.policy.replay_options()
    names = generation.store_names
    if names:
        options["kv_store"] = names[0] if len(set(names)) == 1 else names
    return {"share": shares, **options}


def log_summary(generation: Generation) -> None:
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
