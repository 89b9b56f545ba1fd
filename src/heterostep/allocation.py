"""How many tokens are active at each step of the caching window, and which.

A *meeting step* evaluates every token; a cycle runs from one to the next and is as long as the larger of two adjacent
step divisors d1 < d2. In between, at the multiples of d1, the tokens ranked first are evaluated: those have divisor d1,
the others d2. So a run is a list of counts, one a step, and a ranking of the tokens for each cycle.

Shapes: B batch, N tokens, n active tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Counts between meetings come from this many sizes, so that compiled code and CUDA graphs can be reused.
SIZES = 32


@dataclass(frozen=True)
class Tokens:
    """The tokens among which evaluations are shared out.

    Attributes:
        total: N.
        least: tokens that every step evaluates at the least.
    """

    total: int
    least: int = 0

    @property
    def unit(self) -> int:
        """Counts between meetings are multiples of this."""
        return max(1, self.total // SIZES)


def allocate(
    evaluations: int,
    tokens: Tokens,
    num_steps: int,
    divisors: Sequence[int],
    restarts: Sequence[int] = (),
    exact: bool = True,
) -> list[int]:
    """Active tokens at each of the window's steps, spending exactly `evaluations` (as far as the divisors allow it).

    The first step is a meeting step. Of all pairs of adjacent divisors there is one whose all-d1 and all-d2 spending
    bracket the budget; what the meeting steps leave is spread evenly over the steps at multiples of d1.

    Args:
        evaluations: token evaluations that may be spent, 0..N * num_steps.
        tokens: how many there are.
        num_steps: steps of the window, or what is left of it.
        divisors: ascending, each a multiple of the one before.
        restarts: steps at which another model takes over: dense, and a new cycle begins.
        exact: let one count fall between the sizes, so that the last evaluation is spent; else spend up to a unit less.

    Returns:
        `num_steps` counts in 0..N. Their sum is `evaluations`, or the nearest that is possible: all tokens at the
        smallest divisor, or all at the largest.
    """
    ladder = list(divisors)
    if len(ladder) == 1:
        ladder = ladder * 2
    restarts = [step for step in restarts if 0 <= step < num_steps]
    # Steps since the cycle began.
    phase = [step - max((r for r in restarts if r <= step), default=0) for step in range(num_steps)]

    def meetings_only(divisor: int) -> list[int]:
        return [tokens.least if step % divisor else tokens.total for step in phase]

    pairs = zip(ladder, ladder[1:])
    affordable = (pair for pair in pairs if sum(meetings_only(pair[1])) <= evaluations)
    small, large = next(affordable, (ladder[-2], ladder[-1]))
    counts = meetings_only(large)
    between = [step for step in range(num_steps) if phase[step] % small == 0 and phase[step] % large]
    left = min(max(evaluations - sum(counts), 0), (tokens.total - tokens.least) * len(between))
    if not exact:
        left -= left % tokens.unit
    for position, step in enumerate(between):
        ahead = len(between) - position
        extra = left if ahead == 1 else min(math.ceil(left / ahead / tokens.unit) * tokens.unit, left)
        counts[step] = min(tokens.least + extra, tokens.total)
        left -= counts[step] - tokens.least
    return counts


def evaluations_within(
    seconds: float, cost: Callable[[int], float], most: int, plan: Callable[[int], Sequence[int]]
) -> int:
    """The most token evaluations whose steps take at most `seconds` together.

    Args:
        seconds: what the steps may take.
        cost: active tokens of one step -> its seconds; must not fall as the count rises.
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
