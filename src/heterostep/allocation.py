"""How many tokens are active at each step of the caching window, and which.

A *meeting step* evaluates every token; a cycle runs from one to the next and is as long as the larger of two adjacent
step divisors d1 < d2. In between, at the multiples of d1, the tokens ranked first are evaluated: those have divisor d1,
the others d2. So a run is a list of counts, one a step, and a ranking of the tokens for each cycle.

Shapes: B batch, N tokens, n active tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


def allocate(evaluations: int, num_tokens: int, num_steps: int, divisors: Sequence[int]) -> list[int]:
    """Active tokens at each of the window's steps, spending exactly `evaluations` (as far as the divisors allow it).

    The first step is a meeting step. Of all pairs of adjacent divisors there is one whose all-d1 and all-d2 spending
    bracket the budget; what the meeting steps leave is spread evenly over the steps at multiples of d1.

    Args:
        evaluations: token evaluations that may be spent, 0..num_tokens * num_steps.
        num_tokens: N.
        num_steps: steps of the window, or what is left of it.
        divisors: ascending, each a multiple of the one before.

    Returns:
        `num_steps` counts in 0..N. Their sum is `evaluations`, or the nearest that is possible: all tokens at the
        smallest divisor, or all at the largest.
    """
    ladder = list(divisors)
    if len(ladder) == 1:
        ladder = ladder * 2
    pairs = zip(ladder, ladder[1:])
    affordable = (pair for pair in pairs if num_tokens * math.ceil(num_steps / pair[1]) <= evaluations)
    small, large = next(affordable, (ladder[-2], ladder[-1]))
    meetings = set(range(0, num_steps, large))
    between = [step for step in range(0, num_steps, small) if step not in meetings]
    left = min(max(evaluations - num_tokens * len(meetings), 0), num_tokens * len(between))
    counts = [num_tokens if step in meetings else 0 for step in range(num_steps)]
    for position, step in enumerate(between):
        counts[step] = left // len(between) + (position < left % len(between))
    return counts


def evaluations_within(
    seconds: float, cost: Callable[[int], float], num_tokens: int, num_steps: int, divisors: Sequence[int]
) -> int:
    """The most token evaluations whose steps take at most `seconds` together.

    Args:
        seconds: what the window's steps may take.
        cost: active tokens of one step -> its seconds; must not fall as the count rises.
    """

    def takes(evaluations: int) -> float:
        return sum(cost(count) for count in allocate(evaluations, num_tokens, num_steps, divisors))

    low, high = 0, num_tokens * num_steps
    while low < high:
        middle = (low + high + 1) // 2
        if takes(middle) <= seconds:
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
