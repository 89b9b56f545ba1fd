"""A run's plan: the active tokens of each step, before anything has been timed and again as the seconds come in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heterostep.allocation import Tokens, by_divisors, by_growing_gaps, by_rotation, evaluations_within
from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError


@dataclass(frozen=True)
class Schedule:
    """What a config means for one run.

    Attributes:
        config: the dial and options.
        num_steps: denoising steps of the run.
        tokens: the run's tokens; by default very many, for a forecast before they are known.
        restarts: steps at which another transformer takes over.
    """

    config: HSAConfig
    num_steps: int
    tokens: Tokens = Tokens(1_000_000)
    restarts: tuple[int, ...] = ()

    @property
    def window(self) -> tuple[int, int]:
        """The caching window [start, stop)."""
        return self.config.window(self.num_steps)

    @property
    def lowest_share(self) -> float:
        """The smallest share that the window, the largest divisor where there are any, and the restarts allow."""
        return sum(self._spend(0)) / (self.num_steps * self.tokens.total)

    def check(self) -> None:
        """Whether the run can meet the target.

        Raises:
            HeterostepError: it cannot; the message names the lowest possible target.
        """
        config, num_steps = self.config, self.num_steps
        if isinstance(config.share, tuple):
            self._check_replay(config.share)
        elif config.target < self.lowest_share:
            name = "runtime" if config.runtime is not None else "share"
            start, stop = self.window
            dense, divisors = num_steps - stop + start, config.divisors
            then = f", then every {divisors[-1]}th" if divisors else ", one more at the window's start"
            then += f", then 1/{config.rotation} of the tokens at each" if config.rotation else ""
            then = then if start < stop else ""
            switch = ", one more where the second transformer takes over" if self.restarts else ""
            longer = "allow larger divisors" if divisors else "allow a longer rotation" if config.rotation else ""
            advice = f"take more steps, or {longer}" if longer else "or take more steps"
            raise HeterostepError(
                f"{name}={config.target:g} is below the lowest possible {math.ceil(self.lowest_share * 1000) / 1000:g} "
                f"for {num_steps} steps (dense ones: {dense}{then}{switch}): raise {name}, {advice}"
            )

    def _check_replay(self, shares: tuple[float, ...]) -> None:
        if len(shares) != self.num_steps:
            raise HeterostepError(f"share has {len(shares)} active shares, but the run has {self.num_steps} steps")
        if any(share < 1 for share in shares[:2]):
            raise HeterostepError("the first two active shares must be 1: a velocity's change needs two evaluations")
        for step in self.restarts:
            if shares[step] < 1:
                raise HeterostepError(
                    f"the active share of step {step} must be 1: there the second transformer takes over"
                )

    def plan(self) -> list[int]:
        """Active tokens at each step, before anything has been timed."""
        total = self.tokens.total
        if isinstance(self.config.share, tuple):
            return [max(round(share * total), self.tokens.least) for share in self.config.share]
        start, stop = self.window
        dense = self.num_steps - stop + start
        return self._spend(int(self.config.target * self.num_steps * total + 1e-6) - dense * total)

    def corrected(self, counts: Sequence[int], step: int, seconds: float, cost: Callable[[int], float]) -> list[int]:
        """The counts of the whole run, those from `step` on to the window's end made to fit into `seconds`.

        Args:
            counts: the plan so far.
            step: a step inside the window; where there is no rotation, a meeting.
            seconds: what the steps from there to the window's end may take together.
            cost: active tokens of one step -> its seconds.
        """
        _, stop = self.window

        def plan(evaluations: int) -> list[int]:
            return self._allocate(evaluations, step, exact=False)

        evaluations = evaluations_within(seconds, cost, self.tokens.total * (stop - step), plan)
        return [*counts[:step], *plan(evaluations), *counts[stop:]]

    def _spend(self, evaluations: int) -> list[int]:
        """Counts of the whole run, with these evaluations for the window."""
        start, stop = self.window
        total = self.tokens.total
        return [total] * start + self._allocate(evaluations, start) + [total] * (self.num_steps - stop)

    def _allocate(self, evaluations: int, step: int, exact: bool = True) -> list[int]:
        config, (start, stop) = self.config, self.window
        if config.rotation is not None:
            meetings = (start, *self.restarts)
            return by_rotation(evaluations, self.tokens, range(step, stop), config.rotation, meetings, exact)
        if config.divisors is None:
            steps = range(step, stop)
            return (
                by_growing_gaps(evaluations, self.tokens, steps, config.between, self.restarts, exact) if steps else []
            )
        restarts = [restart - step for restart in self.restarts]
        return by_divisors(evaluations, self.tokens, stop - step, config.divisors, restarts, exact)
