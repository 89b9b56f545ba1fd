"""The default method as one function: what `heterostep.enable(pipe, share=...)` makes of a run with Euler's scheduler.

For reading, and for trying the method on a model of one's own: it wants a velocity function and noise levels, no
pipeline. Which steps are evaluated is planned by `heterostep.policy.auto`; all else is here. `heterostep.engine` does
the same beneath a pipeline, with what that takes: other solvers, targets in seconds, single tokens, two experts,
several GPUs. `tests/test_sampling.py` compares the two (docs/background/method.md).

Shapes: B samples; latents and velocities are [B, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError
from heterostep.policy import Change, Run, Tokens
from heterostep.policy.auto import Auto
from heterostep.sigmas import HIGHEST_SIGMA, log_alpha


def sample(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    x: torch.Tensor,
    sigmas: Sequence[float],
    share: float,
    *,
    from_frames: bool = False,
    guided: bool = True,
) -> torch.Tensor:
    """Denoise with a part of the evaluations: at some steps the velocity is evaluated, at the others extrapolated.

    Flow matching: x = (1 - sigma) video + sigma noise, v = dx / dsigma, and Euler's step is x += (sigma' - sigma) v.

    Args:
        velocity: `velocity(x, sigma)` gives v [B, ...], with guidance where there is any, in a tensor of its own each
            time. It is called at floor(share * steps) steps, the first among them.
        x: latents at the first noise level, float32 [B, ...].
        sigmas: noise levels 1..0, falling, one more than there are steps.
        share: evaluations over steps, above 0 and at most 1.
        from_frames: whether the video continues given frames (image-to-video), which v and x are without.
        guided: whether v is made of several predictions by guidance: then it changes about three times as fast.

    Returns:
        latents at the last noise level, float32 [B, ...].

    Raises:
        HeterostepError: the share is out of its range or less than one step, or the noise levels do not fall from 1
            or below.
    """
    num_steps = len(sigmas) - 1
    if num_steps < 1 or not all(later < earlier for earlier, later in zip(sigmas, sigmas[1:])):
        raise HeterostepError("sigmas must fall from step to step, and be two or more")
    if sigmas[0] > HIGHEST_SIGMA:
        raise HeterostepError(f"sigmas must begin at 1 or below, not at {sigmas[0]:g}")
    if isinstance(share, Sequence):
        raise HeterostepError("share must be one number here: heterostep.enable takes a share for each step")
    # A step is evaluated as a whole, so all tokens are as one.
    run = Run(tuple(sigmas), Tokens(1), from_frames=from_frames)
    policy, budget = Auto(HSAConfig(share=share), run), run.evaluations(share)
    if budget < 1:
        raise HeterostepError(f"share={share:g} of {num_steps} steps is less than one")
    t = log_alpha(torch.tensor(sigmas)).tolist()
    dsigma = [later - earlier for earlier, later in zip(sigmas, sigmas[1:])]

    def per_sample(values: torch.Tensor) -> torch.Tensor:
        """[B] as [B, 1, ...], to multiply latents by."""
        return values.view(-1, *[1] * (x.ndim - 1))

    # Before anything is measured the plan goes by what is expected, and skipped steps repeat the first velocity.
    evaluated = policy.plan(budget)  # 1 or 0 for each step
    changes: list[Change] = []
    last, v = 0, velocity(x, sigmas[0])  # the last evaluated step, and its velocity
    slope = torch.zeros_like(v)  # of v over t = log(1 - sigma + 0.02)
    weight = per_sample(v.new_zeros(len(v)))  # how much of that slope is followed, 0..1
    moved = dsigma[0] * v  # what x has been moved by since step `last` began
    x = x + moved
    for k in range(1, num_steps):
        if evaluated[k]:
            new = velocity(x, sigmas[k])
            # Measure: D = |v_new - v_old|_1 / |v_new|_1. The larger it is, the less the slope tells of what follows.
            size = new.abs().flatten(1).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
            change = (new - v).abs().flatten(1).sum(1) / size
            changes.append(Change(last, k, float(change.mean()), guided))
            slope, weight = (new - v) / (t[k] - t[last]), per_sample(policy.weight(change))
            # Correct: had v gone along the line between its two known values, x would have been moved by `line`. What
            # is lacking, times 1 - D, is made up for by this step's velocity, in two parts: missed / dsigma moves x by
            # it, and missed / sigma keeps the clean sample x - sigma v that was predicted from x as it was. Where no
            # step was skipped nothing is lacking.
            line = sum(dsigma[i] * (v + (t[i] - t[last]) * slope) for i in range(last, k))
            missed = per_sample((1 - change).clamp(0, 1)) * (line - moved)
            used = new + missed / dsigma[k] + missed / sigmas[k]
            # Without the move, which belongs to the gap behind.
            last, v, moved = k, new, dsigma[k] * new
            # Plan: what is left of the budget goes to steps between which v is now expected to change alike.
            evaluated[k:] = policy.replan(budget - sum(evaluated[:k]), k, changes)
        else:
            # Extrapolate.
            used = v + weight * (t[k] - t[last]) * slope
            moved = moved + dsigma[k] * used
        x = x + dsigma[k] * used
    return x
