"""Heterogeneous Step Allocation as published (arXiv 2605.06892): step divisors in groups of tokens, velocities held.

Inside a window every token is evaluated at each d-th step, where d is its step divisor: small for the tokens whose
velocity changes fastest. All meet at multiples of the largest divisor in play; held velocities stay as they are. The
first steps are dense; how many the paper's public text does not say, and here the target chooses.
"""

from __future__ import annotations

from collections.abc import Sequence

from heterostep.policy.base import Tokens, distribute_evenly
from heterostep.policy.window import Windowed

DIVISORS = (1, 2, 4, 8)


class HSA(Windowed):
    """See the module's description. `extrapolate` and `divisors` of the config change it."""

    name = "hsa"

    def inside(self, evaluations: int, steps: range, spend_remainder: bool) -> list[int]:
        restarts = [at - steps.start for at in self.run.restarts]
        divisors = self.config.divisors or DIVISORS
        return by_divisors(evaluations, self.run.tokens, len(steps), divisors, restarts, spend_remainder)

    def describe_minimum(self) -> str:
        (start, stop), divisors = self.window, self.config.divisors or DIVISORS
        return f"dense steps: {self.run.num_steps - stop + start}, then one in {divisors[-1]}"


def by_divisors(
    evaluations: int,
    tokens: Tokens,
    num_steps: int,
    divisors: Sequence[int],
    restarts: Sequence[int] = (),
    spend_remainder: bool = True,
) -> list[int]:
    """Active tokens at each of the window's steps, in groups of step divisors.

    A token of divisor d is evaluated at every d-th step. A cycle is as long as the larger of two adjacent divisors
    d1 < d2 and begins with a dense step; at the multiples of d1 the tokens ranked first are evaluated: those have d1,
    the others d2. Of all pairs there is one whose all-d1 and all-d2 spending bracket the budget; what the dense steps
    leave is spread evenly over the steps at multiples of d1.

    Args:
        evaluations: token evaluations that may be spent, 0..N * num_steps.
        tokens: how many there are.
        num_steps: steps of the window, or what is left of it.
        divisors: ascending, each a multiple of the one before.
        restarts: steps at which another model takes over: dense, and a new cycle begins.
        spend_remainder: let one count fall between the sizes, so that the last evaluation is spent; else spend up to a
            unit less.

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

    def dense_only(divisor: int) -> list[int]:
        return [tokens.least if step % divisor else tokens.total for step in phase]

    pairs = zip(ladder, ladder[1:])
    affordable = (pair for pair in pairs if sum(dense_only(pair[1])) <= evaluations)
    small, large = next(affordable, (ladder[-2], ladder[-1]))
    counts = dense_only(large)
    between = [step for step in range(num_steps) if phase[step] % small == 0 and phase[step] % large]
    distribute_evenly(counts, max(evaluations - sum(counts), 0), between, tokens, spend_remainder)
    return counts
