"""A run's counts of active tokens: the plan of a policy, kept within the share or the seconds that were asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError
from heterostep.policy import Change, Run, make
from heterostep.policy.allocation import evaluations_within

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
        """Whether the run can meet the target.

        Raises:
            HeterostepError: it cannot; the message names the lowest possible target.
        """
        sigmas = self.run.sigmas
        flat = next((step for step, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])) if after >= sigma), None)
        if flat is not None:
            raise HeterostepError(
                f"the scheduler's sigmas must fall from step to step, but step {flat} goes from {sigmas[flat]:g} to "
                f"{sigmas[flat + 1]:g}: give sigmas that fall, with final_sigmas_type='zero' and without invert_sigmas"
            )
        config, num_steps = self.config, self.run.num_steps
        if isinstance(config.share, tuple):
            self._check_replay(config.share)
        elif config.target < self.lowest_share:
            name = "runtime" if config.runtime is not None else "share"
            steps = f"{num_steps} step{'' if num_steps == 1 else 's'}"
            switch = ", with one where the second transformer takes over" if self.run.restarts else ""
            raise HeterostepError(
                f"{name}={config.target:g} is below the lowest possible {math.ceil(self.lowest_share * 1000) / 1000:g} "
                f"for {steps} ({self.policy.describe_minimum()}{switch}): raise {name} or take more steps",
                name,
            )

    def _check_replay(self, shares: tuple[float, ...]) -> None:
        if len(shares) != self.run.num_steps:
            raise HeterostepError(f"share has {len(shares)} active shares, but the run has {self.run.num_steps} steps")
        if shares[0] < 1:
            raise HeterostepError("share[0] must be 1: the first step has no previous velocity to reuse")
        first = next((step for step, share in enumerate(shares) if 0 < share < 1), len(shares))
        if shares[:first].count(1.0) < 2 and first < len(shares):
            raise HeterostepError(
                f"the first sparse step (step {first}) needs two dense steps before it, to rank tokens"
            )
        for step in self.run.restarts:
            if shares[step] < 1:
                raise HeterostepError(
                    f"the active share of step {step} must be 1: there the second transformer takes over"
                )

    def plan(self) -> list[int]:
        """Active tokens at each step, before anything has been measured."""
        tokens = self.run.tokens
        if isinstance(self.config.share, tuple):
            return [max(round(share * tokens.total), tokens.least) for share in self.config.share]
        return self.policy.plan(self.budget)

    def anew_from(self, counts: Sequence[int], step: int) -> int | None:
        """The step from which the plan is made anew once `step` has been made; None where it stays.

        Where tokens run alone, the gap that begins with this step is as it was: its K and V were kept for it, or not.
        """
        total = self.run.tokens.total
        begin = self.policy.replans_from(step, counts[step] == total) if self.replans else None
        if begin == step and self.policy.sparse:
            begin = next((at for at in range(step + 1, len(counts)) if counts[at] == total), None)
        return None if begin is None or begin >= self.run.num_steps else begin

    def has_no_dense_ahead(self, counts: Sequence[int], step: int) -> bool:
        """Whether a timed run planned no dense step after `step`: should seconds be left, the next one can be.

        First calls may be so slow that the plan gives up dense steps which later calls show to be affordable.
        """
        total, timed = self.run.tokens.total, self.policy.adapts and self.replans and self.config.runtime is not None
        return timed and not self.policy.sparse and step + 1 < len(counts) and total not in counts[step + 1 :]

    def within_share(self, counts: Sequence[int], begin: int, changes: Sequence[Change]) -> list[int]:
        """The counts of the whole run, those from `begin` on planned anew for what is left of the share."""
        done = list(counts[:begin])
        return [*done, *self.policy.replan(self.budget - sum(done), begin, changes)]

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
            return self.policy.replan(evaluations, begin, changes, spend_remainder=False)

        most = self.run.tokens.total * (self.run.num_steps - begin)
        return [*counts[:begin], *plan(evaluations_within(seconds, cost, most, plan))]

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
