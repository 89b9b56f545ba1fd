"""The steps of one run, whoever calls the transformer.

A *front* stands between these and a program that samples: `runner.py` between them and diffusers' pipelines,
`integrations/comfyui` between them and ComfyUI. It makes a `Schedule` of the sampler's noise levels, begins a run with
it, tells each step before the first of its calls, lets `heterostep.engine.velocity` keep or give the velocities of each
guidance branch, and tells the guided velocity and the end of each step.

    generation = begin(schedule, ...)
    for each step:
        start_step(generation, step)       the step's count of tokens is generation.counts[step]
        record(...) or held(...)           for each of the transformer's calls
        v = end_step(generation, v, ...)   v is what the sampler is to be given
        stepped(generation)                the sampler has made its step

Shapes: B samples, N tokens.
"""

from __future__ import annotations

import torch

from heterostep.engine import budget, ranking
from heterostep.engine.clock import StepClock
from heterostep.engine.generation import Generation
from heterostep.engine.report import log_summary
from heterostep.engine.schedule import Schedule
from heterostep.engine.trajectory import Correction, SchedulerInput, Trajectory
from heterostep.grid import TokenGrid
from heterostep.parallel import ALONE, Ranks
from heterostep.policy import Change
from heterostep.sigmas import log_alpha


def begin(
    schedule: Schedule,
    *,
    timesteps: torch.Tensor,
    grid: TokenGrid,
    samples: int,
    device: torch.device,
    correction: Correction,
    first: int = 0,
    clean: torch.Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Generation:
    """A run before its first step; its clock starts.

    Args:
        schedule: of the run's noise levels and tokens, checked.
        timesteps: the tensor by which the front knows this run from the next.
        grid: the tokens; as many as the schedule's.
        samples: B.
        device: where the transformer runs.
        correction: how the sampler can be told what a gap has missed.
        first: the sampler's step that the run begins with.
        clean: bool [B, N], tokens that carry no noise; None where all do.
        ranks: the processes that share the tokens.
    """
    sigmas, total, config = schedule.run.sigmas, schedule.run.tokens.total, schedule.config
    log_alphas = log_alpha(torch.tensor(sigmas, dtype=torch.float32, device="cpu")).tolist()
    generation = Generation(
        timesteps=timesteps,
        first=first,
        grid=grid,
        samples=samples,
        schedule=schedule,
        counts=schedule.plan(),
        clean=clean,
        clock=StepClock(device, ranks),
        log_alphas=log_alphas,
        trajectory=Trajectory(sigmas, log_alphas, correction if schedule.policy.corrects else Correction.NONE),
        evaluations=torch.zeros(samples, total, dtype=torch.int32, device=device),
        evaluated_at=torch.full((samples, total), sigmas[0], dtype=torch.float32, device=device),
        elapsed_sigma=torch.zeros(samples, total, dtype=torch.float32, device=device),
        interval=torch.ones(samples, total, dtype=torch.float32, device=device),
        weight=torch.full((samples,), float(config.extrapolate or 0.0), dtype=torch.float32, device=device),
        ranks=ranks,
    )
    generation.clock.mark()
    return generation


def start_step(generation: Generation, step: int) -> None:
    """A step begins: what it will evaluate is settled."""
    generation.step, generation.calls = step, 0
    count, sigma = generation.counts[step], generation.schedule.run.sigmas[step]
    generation.elapsed_sigma = generation.evaluated_at - sigma
    generation.index = None
    if generation.is_dense:
        if step:
            generation.interval = generation.elapsed_log_alpha
        generation.evaluated_at = torch.full_like(generation.evaluated_at, sigma)
        # Between two experts a velocity's change tells them apart rather than the tokens.
        generation.unranked = generation.ranking is None or step not in generation.schedule.run.restarts
    elif count and generation.config.score != "oracle":
        ranking.rank(generation)
        ranking.activate(generation)


def end_step(generation: Generation, velocity: torch.Tensor, ignored: torch.Tensor | None = None) -> SchedulerInput:
    """A step's guided velocity is known, [B, ...].

    Args:
        ignored: values that do not count, bool, of a shape that broadcasts to the velocity's. By default those of the
            tokens that carry no noise.

    Returns:
        what the sampler is to be given instead; the same velocity where nothing is changed.
    """
    step, count = generation.step, generation.counts[generation.step]
    called = generation.samples_called
    generation.samples_by_step[step] = called
    if generation.samples_by_step.get(step - 1, called) != called:
        # Guidance begins or ends here: no line goes from a guided velocity to one that is not.
        generation.trajectory.restart()
    if not generation.is_dense:
        weight, evaluated = generation.weight, None
        if len(weight) != len(velocity):
            weight = weight.mean(0, keepdim=True)
        if count > generation.schedule.run.tokens.least and generation.trajectory.corrects_gap:
            evaluated = _values_of_active_tokens(generation, velocity)
            if evaluated is None:
                generation.trajectory.leave_gap()
        return SchedulerInput(generation.trajectory.on_skipped_step(step, velocity, weight, evaluated))
    before = generation.trajectory.last_step
    if ignored is None and generation.clean is not None:
        ignored = generation.grid.values_of(generation.clean, velocity.shape)
    if not generation.schedule.replans and generation.all_dense:
        # Where nothing is skipped there is nothing to agree on.
        return generation.trajectory.on_dense_step(step, velocity, ignored)[1]
    change, given = generation.trajectory.on_dense_step(step, velocity, ignored, generation.ranks.broadcast)
    if change is not None:
        policy = generation.schedule.policy
        if len(change) == generation.samples:
            weight = policy.weight(change)
            ranking.check_shape("weight", weight, change.shape, generation)
            generation.weight = weight
        if generation.schedule.replans and policy.adapts:
            # To read it is to wait for the GPU.
            generation.changes.append(Change(before, step, float(change.mean()), generation.guided))
    return given


def _values_of_active_tokens(generation: Generation, velocity: torch.Tensor) -> torch.Tensor | None:
    """Those that the policy has chosen to evaluate at a sparse step; None where that cannot be told."""
    if generation.index is None:
        return None
    tokens = torch.zeros_like(generation.elapsed_sigma, dtype=torch.bool).scatter(1, generation.index, True)
    return generation.grid.values_of(tokens, velocity.shape)


def stepped(generation: Generation) -> None:
    """The sampler has made the step: it counts, and the rest is planned anew; after the last one memory is freed."""
    generation.clock.mark()
    if generation.is_dense:
        generation.evaluations += 1
    elif (index := generation.index) is not None:
        generation.evaluations.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))
    generation.steps_done = generation.step + 1
    if generation.steps_done == generation.schedule.run.num_steps:
        generation.finished = True
        generation.clock.agree()
        generation.release()
        log_summary(generation)
    else:
        budget.plan_anew(generation)
