"""A run's counts of active tokens: the plan of a policy, kept within the share or the seconds that were asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError, shorten
from heterostep.policy import Change, Run, make
from heterostep.sigmas import HIGHEST_SIGMA

# Runs may exceed a target in seconds by at most this fraction. A plan of dense steps alone meets it to the nearest of
# them; beside its steps a call takes some more (LTX-2: 0.7 % of a dense run).
TOLERANCE = 0.02
# From given frames, with 4 and 8 steps plain sampling with fewer of them is better or level; with 12 it is not, nor is
# it from text alone.
FEW_STEPS = 8


class Schedule:
    """What a config means for one run.

    Args:
        config: the dial and options.
        run: what is known of it.

    Attributes:
        policy: see `heterostep.policy`.
        sparse: whether a step may evaluate some of the tokens.
        replans: whether the plan is made anew as changes and seconds come in.
    """

    def __init__(self, config: HSAConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.policy = make(config, run)
        shares = config.share if isinstance(config.share, tuple) else None
        single = self.policy.sparse if shares is None else any(0 < share < 1 for share in shares)
        self.sparse = single or run.tokens.least > 0
        # A target of 1 is the dense run, however long a step takes.
        self.replans = shares is None and config.target < 1 and (config.runtime is not None or self.policy.adapts)

    def leave_out_single_tokens(self) -> bool:
        """Evaluate whole steps alone from now on; False, and nothing changes, where single tokens have to be."""
        if isinstance(self.config.share, tuple) or self.run.tokens.least or not self.policy.leave_out_single_tokens():
            return False
        self.sparse = False
        return True

    @property
    def budget(self) -> int:
        """Token evaluations of the whole run by the asked share."""
        return self.run.evaluations(self.config.target)

    @property
    def advice(self) -> str | None:
        """Where plain sampling with fewer steps was measured to be better, or as good; None elsewhere."""
        steps, target = self.run.num_steps, self.config.target
        if target == 1 or steps > FEW_STEPS or not self.run.from_frames:
            return None
        little = f"with {steps} steps from a first frame there is little to leave out"
        fewer = max(1, round(target * steps))
        return f"{little}: {fewer} step{'' if fewer == 1 else 's'} may give as good a video"

    @property
    def lowest_share(self) -> float:
        """What policy and restarts take at the least, 0..1; where the target is below, the smallest that can be met."""
        return sum(self.policy.plan(0)) / (self.run.num_steps * self.run.tokens.total)

    def check(self) -> None:
        """Check that the run can meet the target.

        Raises:
            HeterostepError: it cannot; the message names the lowest possible target. Or there is no `plan` to go by.
        """
        sigmas = self.run.sigmas
        flat = next((step for step, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])) if after >= sigma), None)
        if flat is not None:
            raise HeterostepError(
                f"the scheduler's sigmas must fall from step to step, but step {flat} goes from {sigmas[flat]:g} to "
                f"{sigmas[flat + 1]:g}: give sigmas that fall, with final_sigmas_type='zero' and without invert_sigmas"
            )
        if sigmas[0] > HIGHEST_SIGMA:
            raise HeterostepError(f"the first sigma is {sigmas[0]:g}: give sigmas from 1, which is noise, down to 0")
        self.plan()
        config, num_steps = self.config, self.run.num_steps
        if not isinstance(config.share, tuple) and config.target < self.lowest_share:
            name = "runtime" if config.runtime is not None else "share"
            steps = f"{num_steps} step{'' if num_steps == 1 else 's'}"
            switch = ", with one where the second transformer takes over" if self.run.restarts else ""
            raise HeterostepError(
                f"{name}={config.target:g} is below the lowest possible {math.ceil(self.lowest_share * 1000) / 1000:g} "
                f"for {steps} ({self.policy.describe_minimum()}{switch}): raise {name} or take more steps",
                name,
            )

    def plan(self) -> list[int]:
        """Active tokens at each step, before anything has been measured.

        Raises:
            HeterostepError: no run goes by the shares that were asked for, or by the counts that the policy gives.
        """
        tokens, share = self.run.tokens, self.config.share
        if isinstance(share, tuple):
            return self._checked([max(round(each * tokens.total), tokens.least) for each in share])
        return self._checked(self.policy.plan(self.budget))

    def _checked(self, planned: Sequence[int], done: Sequence[int] = ()) -> list[int]:
        """The counts of the whole run: those of the steps that are done, and those planned."""
        tokens, num_steps = self.run.tokens, self.run.num_steps
        if isinstance(self.config.share, tuple):
            field, who, dense = "share", "share", "1"
        else:
            field, who, dense = "policy", f"policy={self.config.policy!r}", "dense"

        def fault(message: str) -> HeterostepError:
            return HeterostepError(f"{who} {message}", field)

        counts = [*done, *_counts_of(self.config, planned)]
        if len(counts) != num_steps:
            raise fault(f"is for {len(counts)} steps, but the run has {num_steps}")
        for step, count in enumerate(counts):
            if not isinstance(count, Integral) or not tokens.least <= count <= tokens.total:
                bounds = f"{tokens.least} to {tokens.total}"
                raise fault(f"evaluates {count!r} tokens at step {step}, which should be a whole number, {bounds}")
        for step in (0, *self.run.restarts):
            if counts[step] < tokens.total:
                why = "there the second transformer takes over" if step else "there is no velocity before it to reuse"
                raise fault(f"must be {dense} at step {step}: {why}")
        first = next((at for at, count in enumerate(counts) if tokens.least < count < tokens.total), num_steps)
        if first < num_steps and counts[:first].count(tokens.total) < 2 and not self.policy.ranks_each_step:
            raise fault(f"needs two dense steps before the first sparse one (step {first}), to rank tokens")
        return [int(count) for count in counts]

    def anew_from(self, counts: Sequence[int], step: int) -> int | None:
        """The step from which the plan is made anew once `step` has been made; None where it stays.

        Where tokens run alone, the gap that begins with this step is as it was: its K and V were kept for it, or not.
        """
        total = self.run.tokens.total
        begin = self.policy.replans_from(step, counts[step] == total) if self.replans else None
        if begin is not None and not (isinstance(begin, Integral) and begin >= step):
            name = f"policy={self.config.policy!r}"
            raise HeterostepError(
                f"{name}: replans_from gave {begin!r}, which should be {step} or a later step", "policy"
            )
        if begin is not None and ((begin == step and self.policy.sparse) or self._holds_next(step)):
            begin = next((at for at in range(max(begin, step + 1), len(counts)) if counts[at] == total), None)
        return None if begin is None or begin >= self.run.num_steps else begin

    def has_no_dense_ahead(self, counts: Sequence[int], step: int) -> bool:
        """Whether a timed run planned no dense step after `step`: should seconds be left, the next one can be.

        First calls may be so slow that the plan gives up dense steps which later calls show to be affordable.
        """
        total, timed = self.run.tokens.total, self.policy.adapts and self.replans and self.config.runtime is not None
        held = self.policy.sparse or self._holds_next(step)
        return timed and not held and step + 1 < len(counts) and total not in counts[step + 1 :]

    def _holds_next(self, step: int) -> bool:
        """Whether the step after this one stays as planned, for this one kept K and V for it, or did not: of LTX-2's
        second step (`Generation.wants_kv`)."""
        return self.run.tokens.least > 0 and step == 1

    def within_share(self, counts: Sequence[int], begin: int, changes: Sequence[Change]) -> list[int]:
        """The counts of the whole run, those from `begin` on planned anew for what is left of the share."""
        done = counts[:begin]
        return self._checked(self.policy.replan(self.budget - sum(done), begin, changes), done)

    def within_seconds(
        self,
        counts: Sequence[int],
        begin: int,
        changes: Sequence[Change],
        seconds: float,
        cost: Callable[[int], float],
    ) -> list[int]:
        """The counts of the whole run, those from `begin` on made to fit into `seconds`.

        Args:
            counts: the plan so far.
            begin: a step that `anew_from` gave.
            changes: measured so far.
            seconds: what the steps from there on may take together.
            cost: active tokens of one step -> its seconds.
        """

        def plan(evaluations: int) -> list[int]:
            return _counts_of(self.config, self.policy.replan(evaluations, begin, changes, spend_remainder=False))

        most = self.run.tokens.total * (self.run.num_steps - begin)
        return self._checked(plan(evaluations_within(seconds, cost, most, plan)), counts[:begin])

    def with_seconds_left(
        self,
        counts: Sequence[int],
        begin: int,
        changes: Sequence[Change],
        seconds: float,
        cost: Callable[[int], float],
    ) -> list[int]:
        """As `within_seconds`, where no dense step is ahead: `begin` is one if there is the time for it."""
        planned = self.within_seconds(counts, begin, changes, seconds, cost)
        return planned if sum(map(cost, planned[begin:])) <= seconds else list(counts)


def _counts_of(config: HSAConfig, planned: Any) -> list[int]:
    """A policy's counts, if it gave any."""
    if not isinstance(planned, Iterable):
        what = f"policy={config.policy!r} gives {shorten(planned)} for a plan"
        raise HeterostepError(f"{what}, which should be a list of each step's tokens", "policy")
    return [*planned]


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
