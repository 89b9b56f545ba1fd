"""What a policy decides: how many tokens each step evaluates, which ones, and how the others' velocities are continued.

A step is dense (all tokens), sparse (some) or skipped (none). A policy is one class in one file: `auto.py` is the
default, `hsa.py` the paper's, and `register_policy` adds another.

Shapes: B samples, N tokens.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from heterostep.config import HSAConfig

# Counts of sparse steps come from this many sizes, so that compiled code and CUDA graphs can be reused.
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
        """Counts of sparse steps are multiples of this."""
        return max(1, self.total // SIZES)


@dataclass(frozen=True)
class Run:
    """What is known of a run before its first step.

    Attributes:
        sigmas: noise levels 1..0, falling, one more than there are steps.
        tokens: by default very many, for a forecast before they are known.
        restarts: steps at which another transformer takes over; they are dense.
        from_frames: whether the video continues given frames (image-to-video).
    """

    sigmas: tuple[float, ...]
    tokens: Tokens = Tokens(1_000_000)
    restarts: tuple[int, ...] = ()
    from_frames: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def evaluations(self, share: float) -> int:
        """Token evaluations that a share (0..1) of the dense run's pays for."""
        return int(share * self.num_steps * self.tokens.total + 1e-6)


@dataclass(frozen=True)
class Change:
    """How much the guided velocity changed from one dense step to the next: `|v_stop - v_start|_1 / |v_stop|_1`.

    Attributes:
        start, stop: dense steps, counted from the run's first, which is 0.
        value: the mean over the samples; given tokens (a first frame) have no part in it.
        guided: False where the velocity is one prediction, not made of several by guidance.
    """

    start: int
    stop: int
    value: float
    guided: bool = True


class Policy(abc.ABC):
    """Where and which. An object belongs to one run.

    Its plans depend on their arguments alone, and on whether `leave_out_single_tokens` was called.

    Args:
        config: the user's options.
        run: what is known before its first step.

    Attributes:
        name: as in `HSAConfig(policy=)`.
        adapts: whether changes alter the plan, so that it is made anew also where no seconds are to be kept.
        sparse: whether it evaluates some of the tokens at a step by its own choice.
        ranks_each_step: whether tokens are ranked anew at each sparse step in place of the first after a dense one.
        corrects: whether the sample is moved by what a gap between dense steps has missed, once its end is known
            (`heterostep.engine.trajectory`).
    """

    name: ClassVar[str]
    adapts: bool = False
    sparse: bool = True
    ranks_each_step: bool = False
    corrects: bool = False

    def __init__(self, config: HSAConfig, run: Run) -> None:
        self.config, self.run = config, run

    @abc.abstractmethod
    def replan(
        self, evaluations: int, step: int, changes: Sequence[Change] = (), spend_remainder: bool = True
    ) -> list[int]:
        """Active tokens at each step from `step` to the end.

        Args:
            evaluations: token evaluations that these steps may spend together.
            step: 0, or one that `replans_from` gives.
            changes: what has been measured so far, one after another.
            spend_remainder: let one count fall between the sizes, so that the last evaluation is spent; else spend a
                little less.

        Returns:
            Counts in `tokens.least`..N. Their sum is at most `evaluations`, or the least that is possible. The run's
            first step and its restarts are dense, and where tokens are ranked by their changes (not
            `ranks_each_step`), so are two steps before the first sparse one.
        """

    def plan(self, evaluations: int) -> list[int]:
        """Active tokens at each step of the run, before anything has been measured; see `replan`."""
        return self.replan(evaluations, 0)

    def replans_from(self, step: int, dense: bool) -> int | None:
        """The step from which the run is planned anew once `step` has been made; None where the plan stays.

        By default after each dense step, which then is the first of the new plan.
        """
        return step if dense else None

    def rank(self, scores: torch.Tensor, elapsed_sigma: torch.Tensor, step: int) -> torch.Tensor:
        """Scores [B, N] by which tokens become active at a sparse step, the highest first.

        Args:
            scores: relative change of each token's velocity per unit of sigma (HSA's score), [B, N].
            elapsed_sigma: since each token's last evaluation, [B, N].
            step: the sparse step.
        """
        return scores

    def weight(self, change: torch.Tensor) -> torch.Tensor:
        """How far held velocities follow their last change over log(1 - sigma), 0..1, [B].

        Args:
            change: of each sample's guided velocity between the last two dense steps, as in `Change`, [B].
        """
        return torch.full_like(change, self.config.extrapolate or 0.0)

    def leave_out_single_tokens(self) -> bool:
        """Evaluate whole steps alone from now on; False, and nothing changes, where single tokens were asked for."""
        return not self.sparse

    def replay_options(self) -> dict[str, Any]:
        """Options that a replay by shares needs beside the run's own: what was made of the target."""
        return {}

    def describe_minimum(self) -> str:
        """The plan of the fewest evaluations in a few words, as in "dense steps: 3"; errors say it."""
        return f"dense steps: {sum(count == self.run.tokens.total for count in self.plan(0))}"


def distribute_evenly(
    counts: list[int], left: int, steps: Sequence[int], tokens: Tokens, spend_remainder: bool
) -> None:
    """Add `left` evaluations to the counts of these steps, as evenly as the sizes allow."""
    left = min(left, (tokens.total - tokens.least) * len(steps))
    if not spend_remainder:
        left -= left % tokens.unit
    for position, step in enumerate(steps):
        ahead = len(steps) - position
        extra = left if ahead == 1 else min(math.ceil(left / ahead / tokens.unit) * tokens.unit, left)
        counts[step] = min(tokens.least + extra, tokens.total)
        left -= counts[step] - tokens.least
