"""Which tokens a sparse step evaluates: those of the policy's highest scores, given frames last.

Shapes: B samples, N tokens, n active tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from heterostep.engine.generation import Generation
from heterostep.errors import HeterostepError, shorten


def rank(generation: Generation) -> None:
    """Rank the tokens for a sparse step, the same for all branches."""
    policy = generation.schedule.policy
    if generation.unranked or policy.ranks_each_step:
        again = generation.ranking is None or generation.rankings % generation.config.regroup_every == 0
        generation.rankings += generation.unranked
        generation.unranked = False
        if again or policy.ranks_each_step:
            scores = scores_of(generation)
            ranked = policy.rank(scores, generation.elapsed_sigma, generation.step)
            check_shape("rank", ranked, scores.shape, generation)
            set_ranking(generation, ranked)


def check_shape(method: str, given: Any, shape: torch.Size, generation: Generation) -> None:
    """Check what a policy's method gave.

    Raises:
        HeterostepError: it is no tensor of this shape.
    """
    if not isinstance(given, torch.Tensor) or given.shape != shape:
        what = f"{type(given).__name__} {list(given.shape)}" if hasattr(given, "shape") else shorten(given)
        name = f"policy={generation.config.policy!r}"
        raise HeterostepError(f"{name}: {method} gave {what}, which should be a tensor {list(shape)}", "policy")


def scores_of(generation: Generation) -> torch.Tensor:
    """How urgent each token is [B, N], from what all branches know of it."""
    scores = torch.zeros_like(generation.elapsed_sigma)
    known = [branch.scores for branch in generation.branches if branch.scores is not None]
    if generation.config.score == "random":
        generator = torch.Generator().manual_seed(generation.step)
        scores = torch.rand(scores.shape, generator=generator).to(scores.device)
    elif known:
        scores = torch.cat([scores.view(-1, *generation.elapsed_sigma.shape) for scores in known]).mean(0)
    return scores


def set_ranking(generation: Generation, scores: torch.Tensor) -> None:
    """The tokens by these scores [B, N], the highest first."""
    if generation.clean is not None:
        # What is given needs no velocity, so it comes last; it runs at dense steps and where its turn has come, for
        # its K/V change with the other tokens'.
        scores = torch.where(generation.clean & scores.isfinite(), -1.0, scores)
    generation.ranking = generation.ranks.broadcast(by_falling_score(scores))


def activate(generation: Generation) -> None:
    """The tokens ranked first are this step's active ones."""
    assert generation.ranking is not None
    generation.index = index = active_tokens(generation.ranking, generation.counts[generation.step])
    sigma = generation.schedule.run.sigmas[generation.step]
    generation.interval = generation.interval.scatter(1, index, generation.elapsed_log_alpha.gather(1, index))
    generation.evaluated_at = generation.evaluated_at.scatter(1, index, sigma)


def by_falling_score(scores: torch.Tensor) -> torch.Tensor:
    """Token indices by falling score, int64 [B, N]; ties keep the tokens' order, so that a run can be repeated."""
    return scores.argsort(dim=1, descending=True, stable=True)


def active_tokens(ranking: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` tokens ranked first, ascending by index, int64 [B, n]."""
    return ranking[:, :count].sort(dim=1).values
