"""Policies that skip inside a window of the run, with dense steps before it, as many as suit the target, and behind."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from dataclasses import replace

from heterostep.policy.base import Change, Policy


class Windowed(Policy):
    """A policy whose plan is that of its window; the steps outside are dense."""

    @functools.cached_property
    def window(self) -> tuple[int, int]:
        """The caching window [start, stop): the steps at which tokens may be skipped; the first one is dense."""
        config, num_steps = self.config, self.run.num_steps
        start = config.dense_start
        if start is None:
            # The more the larger the budget is, as suits the equal gaps behind; both numbers were chosen by hand. One
            # less, for the window's first step is dense too; seconds take three steps to be timed. A budget that does
            # not pay for what is left of the window begins it earlier.
            least = 3 if config.runtime is not None else 1
            wanted = round(min(0.65, 1.45 * config.target) * config.target * num_steps) - 1
            start = next((at for at in range(wanted, least, -1) if self._affords(at)), least)
        start = min(start, num_steps)
        return start, max(start, num_steps - config.dense_end)

    def _affords(self, start: int) -> bool:
        """Whether the target pays for what a window that begins there takes at the least."""
        fixed = type(self)(replace(self.config, dense_start=start), self.run)
        return sum(fixed.plan(0)) <= self.run.evaluations(self.config.target)

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
