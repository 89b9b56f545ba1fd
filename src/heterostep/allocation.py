"""How many tokens are active at each step of the caching window, and which.

A *meeting step* evaluates every token. Where meetings lie is a question of time: by default the gaps between them grow
with the step, for velocities change most at the beginning (`by_growing_gaps`); the paper has equal ones
(`by_divisors`). Between two meetings the tokens that are ranked first are evaluated once or more. Or there is one
meeting alone, and from then on each step evaluates some tokens in rotation beside those ranked first (`by_rotation`).
So a run is a list of counts, one a step, and a ranking of the tokens.

Shapes: B batch, N tokens, n active tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Counts between meetings come from this many sizes, so that compiled code and CUDA graphs can be reused.
SIZES = 32
# A step between meetings takes one token in so many, or more.
LEAST_SHARE = 8


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


def by_growing_gaps(
    evaluations: int,
    tokens: Tokens,
    steps: range,
    between: float | None = 0.0,
    restarts: Sequence[int] = (),
    exact: bool = True,
) -> list[int]:
    """Active tokens at each of the window's steps: meetings whose gaps grow in proportion to the step's number.

    What the meetings leave is spent in the middle of the last gap; with `between`, in the middle of all, or at several
    steps in each.

    Args:
        evaluations: token evaluations that may be spent, 0..N * len(steps).
        tokens: how many there are.
        steps: the window's steps, or what is left of them, numbered from the run's first; the first one is a meeting.
        between: share of the evaluations, 0..1, that is not for meetings; None leaves what they leave unspent.
        restarts: steps at which another model takes over: they are meetings.
        exact: let one count fall between the sizes, so that the last evaluation is spent; else spend up to a unit less.

    Returns:
        A count in 0..N for each step. Their sum is `evaluations` (less than N fewer where `between` is None), or the
        least that is possible.
    """
    first, stop, restarts = steps.start, steps.stop, tuple(step for step in restarts if step in steps)
    each = max(tokens.total - tokens.least, 1)
    count = max(1, math.floor((evaluations - tokens.least * len(steps)) / each * (1 - (between or 0)) + 1e-9))
    while True:
        meetings = meeting_steps(count, first, stop, restarts)
        counts = [tokens.total if step in meetings else tokens.least for step in steps]
        left = max(evaluations - sum(counts), 0)
        if count >= len(steps) or left <= each * (len(steps) - len(meetings)):
            break
        count += 1
    if between is None:
        return counts
    # One step in each gap, and more where that would be nearly a meeting.
    for number in range(1, len(steps) + 1):
        inside = _inside(meetings, stop, number)
        if left <= each * len(inside) / 2:
            break
    # Each step has its overhead, so that little is not scattered over many. What is left over by chance comes last: as
    # seconds come in it is spent once, and in one gap.
    enough = max(1, tokens.total // LEAST_SHARE)
    used = min(len(inside), max(1, left // enough) if between else math.ceil(left / each))
    if used and (exact or left >= enough):
        _spread(counts, left, [step - first for step in inside[-used:]], tokens, exact)
    return counts


def _inside(meetings: Sequence[int], stop: int, number: int) -> list[int]:
    """Up to `number` steps between each meeting and the next, evenly spaced."""
    steps = []
    for a, b in zip(meetings, [*meetings[1:], stop]):
        within = min(number, b - a - 1)
        steps += [a + (b - a) * position // (within + 1) for position in range(1, within + 1)]
    return steps


@functools.lru_cache(maxsize=4096)
def meeting_steps(count: int, first: int, stop: int, restarts: tuple[int, ...] = ()) -> tuple[int, ...]:
    """At most `count` steps of first..stop-1, in gaps that grow in proportion to the step's number.

    A gap is never shorter than one step. `first`, which must be at least 1, and `restarts` are among them in any case.
    """

    def at_density(density: float) -> tuple[int, ...]:
        meetings, due = [], 1.0
        for step in range(first, stop):
            if due > 1 - 1e-9 or step in restarts:
                meetings.append(step)
                due = max(due - 1, 0.0) if step not in restarts else 0.0
            due += min(1.0, density / step)
        return tuple(meetings)

    def least_density(number: int) -> float:
        low, high = 0.0, 2.0 * stop
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if len(at_density(middle)) >= number else (middle, high)
        return high

    # In the middle of those densities that give this number, the last gap is neither stretched nor cut short.
    low = least_density(count)
    meetings = at_density((low + least_density(count + 1)) / 2)
    # Two meetings can come in at once; then there is one too few.
    return meetings if len(meetings) <= count else at_density(low * (1 - 1e-9) - 1e-9)


def by_divisors(
    evaluations: int,
    tokens: Tokens,
    num_steps: int,
    divisors: Sequence[int],
    restarts: Sequence[int] = (),
    exact: bool = True,
) -> list[int]:
    """Active tokens at each of the window's steps, in groups of step divisors (HSA, arXiv 2605.06892).

    A token of divisor d is evaluated at every d-th step. A cycle is as long as the larger of two adjacent divisors
    d1 < d2 and begins with a meeting; at the multiples of d1 the tokens ranked first are evaluated: those have d1, the
    others d2. Of all pairs there is one whose all-d1 and all-d2 spending bracket the budget; what the meeting steps
    leave is spread evenly over the steps at multiples of d1.

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
    _spread(counts, max(evaluations - sum(counts), 0), between, tokens, exact)
    return counts


def by_rotation(
    evaluations: int,
    tokens: Tokens,
    steps: range,
    rotation: int,
    meetings: Sequence[int] = (),
    exact: bool = True,
) -> list[int]:
    """Active tokens at each of the window's steps: as many at each, and enough that all come round.

    Args:
        evaluations: token evaluations that may be spent, 0..N * len(steps).
        tokens: how many there are.
        steps: the window's steps, or what is left of it, numbered from the run's first.
        rotation: no token sleeps longer than so many steps.
        meetings: steps at which all tokens are evaluated: the window's first, and where another model takes over.
        exact: let one count fall between the sizes, so that the last evaluation is spent; else spend up to a unit less.

    Returns:
        A count in 0..N for each step. Their sum is `evaluations`, or the nearest that is possible.
    """
    least = Tokens(tokens.total, max(tokens.least, probes(tokens.total, rotation)))
    counts = [least.total if step in meetings else least.least for step in steps]
    between = [position for position, step in enumerate(steps) if step not in meetings]
    _spread(counts, max(evaluations - sum(counts), 0), between, least, exact)
    return counts


def probes(total: int, rotation: int) -> int:
    """Tokens whose turn it is at a step, at the most, so that all have had theirs in `rotation` steps."""
    return -(-total // rotation)


def with_probes(scores: torch.Tensor, turn: int, rotation: int) -> torch.Tensor:
    """Scores [B, N] in which the tokens whose turn it is come first: neighbours, such as a frame or a part of it.

    Args:
        scores: higher is more urgent, [B, N].
        turn: 0..rotation - 1.
        rotation: turns until all have had theirs.
    """
    total = scores.shape[1]
    scores = scores.clone()
    scores[:, turn * total // rotation : (turn + 1) * total // rotation] = torch.inf
    return scores


def _spread(counts: list[int], left: int, steps: Sequence[int], tokens: Tokens, exact: bool) -> None:
    """Add `left` evaluations to the counts of these steps, as evenly as the sizes allow."""
    left = min(left, (tokens.total - tokens.least) * len(steps))
    if not exact:
        left -= left % tokens.unit
    for position, step in enumerate(steps):
        ahead = len(steps) - position
        extra = left if ahead == 1 else min(math.ceil(left / ahead / tokens.unit) * tokens.unit, left)
        counts[step] = min(tokens.least + extra, tokens.total)
        left -= counts[step] - tokens.least


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
