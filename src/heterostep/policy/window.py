"""Policies that skip inside a window of the run: dense steps before it, as many as the target suggests, and behind."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from heterostep.policy.base import Change, Policy


class Windowed(Policy):
    """A policy whose plan is that of its window; the steps outside are dense."""

    @property
    def window(self) -> tuple[int, int]:
        """The caching window [start, stop): the steps at which tokens may be skipped; the first one is dense."""
        config, num_steps = self.config, self.run.num_steps
        start = config.dense_start
        if start is None:
            # The more the larger the budget is, as suits the equal gaps behind; both numbers were chosen by hand. One
            # less, for the window's first step is dense too; seconds take three steps to be timed.
            least = 3 if config.runtime is not None else 1
            start = max(least, round(min(0.65, 1.45 * config.target) * config.target * num_steps) - 1)
        start = min(start, num_steps)
        return start, max(start, num_steps - config.dense_end)

    def replan(
        self, evaluations: int, step: int, changes: Sequence[Change] = (), spend_remainder: bool = True
    ) -> list[int]:
        (start, stop), total = self.window, self.run.tokens.total
        before, after = max(start - step, 0), self.run.num_steps - max(stop, step)
        steps = range(step + before, max(stop, step + before))
        inside = self.inside(evaluations - (before + after) * total, steps, spend_remainder)
        return [total] * before + inside + [total] * after

    @abc.abstractmethod
    def inside(self, evaluations: int, steps: range, spend_remainder: bool) -> list[int]:
        """Active tokens at these steps of the window, numbered from the run's first; see `replan`."""
