"""Budgets and rankings that every policy shares: seconds -> evaluations, scores -> the active tokens.

Shapes: B batch, N tokens, n active tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def evaluations_within(
    seconds: float, cost: Callable[[int], float], most: int, plan: Callable[[int], Sequence[int]]
) -> int:
    """The most token evaluations whose steps take at most `seconds` together.

    Args:
        seconds: what the steps may take.
        cost: active tokens of one step -> its seconds. A plan of more evaluations should not take less, or what is
            found may not be the most.
        most: token evaluations of a dense run over these steps.
        plan: token evaluations -> active tokens at each step.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if sum(map(cost, plan(middle))) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low


def rank(scores: torch.Tensor) -> torch.Tensor:
    """Token indices by falling score, int64 [B, N]; ties keep the tokens' order, so that a run can be repeated."""
    return scores.argsort(dim=1, descending=True, stable=True)


def active_tokens(ranking: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` tokens ranked first, ascending by index, int64 [B, n]."""
    return ranking[:, :count].sort(dim=1).values
