"""The velocities of each branch: kept where tokens were evaluated, extrapolated elsewhere, and how they change.

From that follow the score that decides who gets more steps (HSA, arXiv 2605.06892) and the slope that a held velocity
goes along.

Shapes: B batch, N tokens, C values a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from heterostep import sigmas

if TYPE_CHECKING:
    from heterostep.engine.generation import Branch, Generation


def velocity_change(new: torch.Tensor, old: torch.Tensor, elapsed_sigma: torch.Tensor) -> torch.Tensor:
    """Relative L1 change of each token's velocity per unit of sigma, float32 [B, N].

    s_j = |v_j^new - v_j^old|_1 / |v_j^old|_1, over the sigma elapsed between the token's two evaluations.

    Args:
        new, old: velocities [B, N, C].
        elapsed_sigma: sigma that passed between the two, > 0, [B, N].
    """
    change = (new.float() - old.float()).abs().sum(-1)
    size = old.float().abs().sum(-1)
    tiny = torch.finfo(torch.float32).tiny
    return change / size.clamp_min(tiny) / elapsed_sigma.clamp_min(1e-6)


def velocity_slope(new: torch.Tensor, old: torch.Tensor, interval: torch.Tensor) -> torch.Tensor:
    """Change of each velocity per unit of `log_alpha` between two evaluations, float32 [B, N, C].

    Held velocities are extrapolated along it. With sigma in place of log_alpha the full slope would be second-order
    Adams-Bashforth.

    Args:
        new, old: velocities [B, N, C].
        interval: `log_alpha` that passed between the two, > 0, [B, N].
    """
    return (new.float() - old.float()) / interval.clamp_min(1e-6)[..., None]


def held(generation: Generation, branch: Branch, log_alpha: float | None = None) -> torch.Tensor:
    """Everyone's velocities at this step [b, N, C]: of the tokens evaluated at it, and extrapolated ones. A new tensor,
    for whoever gets the model's output may write to it.

    Args:
        log_alpha: of the call's sigma, where that is not the step's: some samplers call the model between two steps.
    """
    velocity = branch.velocity
    assert velocity is not None
    if branch.slope is None:
        return velocity.clone()
    now = generation.log_alphas[generation.step] if log_alpha is None else log_alpha
    ahead = generation.weight[:, None] * (now - sigmas.log_alpha(generation.evaluated_at))
    ahead = ahead.repeat(velocity.shape[0] // generation.samples, 1)[..., None]
    return (velocity.float() + ahead * branch.slope).to(velocity.dtype)


def record(
    generation: Generation, branch: Branch, rows: torch.Tensor, active: torch.Tensor | None, stale: bool, scored: bool
) -> torch.Tensor:
    """Keep the velocities that a call has evaluated.

    Args:
        rows: of the active tokens, [b, n, C]; n = N where `active` is None.
        active: int64 [b, n].
        stale: whether what the branch has is of a step too long ago, or of another model.
        scored: whether a sparse step follows, which ranks by the change.

    Returns:
        everyone's velocities at this step, [b, N, C].
    """
    old = branch.velocity
    # What is returned becomes the model's output, which a hook of the user's may write to.
    kept = rows.clone() if generation.skips_follow else rows
    if old is None or stale:
        # Of a change over missed steps, or from another model's velocity, nothing follows.
        branch.velocity, branch.slope = kept, None
        return rows
    copies = rows.shape[0] // generation.samples
    elapsed_sigma = generation.elapsed_sigma.repeat(copies, 1)
    interval = generation.interval.repeat(copies, 1)
    if active is None:
        branch.velocity = kept
        if scored:
            branch.scores = velocity_change(rows, old, elapsed_sigma)
        if generation.config.extrapolate != 0 and generation.skips_follow:
            branch.slope = velocity_slope(rows, old, interval)
        return rows
    where = active[..., None].expand_as(rows)
    branch.velocity, before = old.scatter(1, where, rows), old.gather(1, where)
    if generation.config.extrapolate != 0:
        slope = torch.zeros_like(old, dtype=torch.float32) if branch.slope is None else branch.slope
        branch.slope = slope.scatter(1, where, velocity_slope(rows, before, interval.gather(1, active)))
    if scored and branch.scores is not None:
        change = velocity_change(rows, before, elapsed_sigma.gather(1, active))
        branch.scores = branch.scores.scatter(1, active, change)
    return held(generation, branch)
