"""The guided velocities along a run, as the scheduler is given them: how they change, and what a gap has missed.

Shapes: B samples; a velocity is [B, ...] in the layout of the pipeline's latents.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


def relative_change(new: torch.Tensor, old: torch.Tensor, ignored: torch.Tensor | None = None) -> torch.Tensor:
    """|new - old|_1 / |new|_1 of each sample, float32 [B].

    Args:
        new, old: velocities [B, ...].
        ignored: bool, of their shape or one that broadcasts to it: values that do not count, such as a given frame's.
    """
    new, old = new.float(), old.float()
    changed, size = (new - old).abs(), new.abs()
    if ignored is not None:
        changed, size = changed.masked_fill(ignored, 0.0), size.masked_fill(ignored, 0.0)
    return changed.flatten(1).sum(1) / size.flatten(1).sum(1).clamp_min(torch.finfo(torch.float32).tiny)


class Correction(enum.Enum):
    """How a sampler can be told what a gap has missed."""

    NONE = enum.auto()
    VELOCITY = enum.auto()  # it has no memory (Euler): one velocity moves the sample by any amount
    SAMPLE = enum.auto()  # it has: the sample is moved, and what the sampler remembers of it


class SchedulerInput(NamedTuple):
    """What the scheduler is to be given at a step.

    Attributes:
        velocity: [B, ...].
        sample_shift: what the sample is to be moved by first, float32 [B, ...]; None where it stays.
    """

    velocity: torch.Tensor
    sample_shift: torch.Tensor | None = None


class Trajectory:
    """What the scheduler was given since the last dense step.

    At a dense step k all velocities are known, as they were at the gap's beginning, dense step j. In between the sample
    was moved by extrapolated velocities. A line over `log_alpha` from each value's evaluation to its next would have
    moved it by `missed` more:

        missed = sum over i in j..k-1 of (sigma_i+1 - sigma_i) (line_i - given_i)

    Where no token ran in the gap, there is one line for all, from j to k; the values of tokens that did have more,
    shorter ones. The sample is moved by (1 - change) missed, for the larger the change over the gap, the less a line
    says of it. The prediction of the clean sample x - sigma v, made from the sample as it was, is kept, so the velocity
    grows by (1 - change) missed / sigma_k. It costs no evaluation. There are two ways (`Correction`):

    - Euler is given, at step k alone, v_k + (1 - change) (1/dsigma + 1/sigma_k) missed, which does both.
    - For multistep solvers the sample itself is moved. Velocities extrapolated from v_k are shifted by the same amount
      until their next evaluation; otherwise the implied clean sample would jump, and these solvers use its differences.
      (With Euler this measured worse.) UniPC's corrector restarts from the previous sample, so that is moved too; of
      its move sigma_k / sigma_k-1 arrives at step k.

    Args:
        sigmas: noise levels 1..0 of the run's steps, one more than steps.
        log_alphas: `heterostep.sigmas.log_alpha` of each.
        correction: how velocities or samples are corrected at a gap's end.

    Attributes:
        last_step: the last dense step; -1 before the first.
    """

    def __init__(self, sigmas: Sequence[float], log_alphas: Sequence[float], correction: Correction) -> None:
        self._sigmas, self._log_alphas, self._correction = sigmas, log_alphas, correction
        self.last_step = -1
        self._last_velocity: torch.Tensor | None = None  # of the last dense step, where the sample was moved to
        # Of the gap under way; None where nothing is corrected.
        self._displacement: torch.Tensor | None = None  # sum of (sigma' - sigma) v since it began, float32
        self._lines: _Lines | None = None
        # What each value's last evaluated velocity, and the one before, would have had more, had they been evaluated
        # where the sample was moved to: float32, None for nothing.
        self._velocity_shift: torch.Tensor | None = None
        self._previous_velocity_shift: torch.Tensor | None = None
        self._interval: float | torch.Tensor = 1.0  # log_alpha between these two evaluations

    def restart(self) -> None:
        """Forget: another model's velocities say nothing of this one's."""
        self._last_velocity = self._displacement = self._lines = None
        self._velocity_shift = self._previous_velocity_shift = None

    def leave_gap(self) -> None:
        """Do not correct the gap under way, nor shift velocities any more: which values were evaluated is not known."""
        self._lines = self._velocity_shift = self._previous_velocity_shift = None

    def on_skipped_step(
        self, step: int, velocity: torch.Tensor, weight: torch.Tensor, evaluated: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Take note of a step whose velocities were extrapolated, all or most of them.

        Args:
            step: which it is, from 0.
            velocity: the guided one, [B, ...].
            weight: of the last slope in the velocities, [B].
            evaluated: which values were evaluated at it by the policy's choice, bool of the velocity's shape; None for
                none.

        Returns:
            the velocity for the scheduler: the same object where nothing is to be corrected.
        """
        if evaluated is not None and self._lines is not None:
            self._shift_no_more(step, evaluated)
            self._lines.draw_to(step, velocity.float(), evaluated)
        given = self._shifted(step, velocity, weight)
        if self._displacement is not None:
            self._displacement = self._displacement + (self._sigmas[step + 1] - self._sigmas[step]) * given.float()
        return given

    def on_dense_step(
        self,
        step: int,
        velocity: torch.Tensor,
        ignored: torch.Tensor | None,
        agree: Callable[[torch.Tensor], torch.Tensor] = lambda change: change,
    ) -> tuple[torch.Tensor | None, SchedulerInput]:
        """Take note of a dense step.

        Args:
            step: which it is, from 0.
            velocity: the guided one, [B, ...].
            ignored: values that do not count, as in `relative_change`.
            agree: gives the change that all processes go by, of this one's.

        Returns:
            the relative change since the last one, [B] (None where there is none), and what the scheduler is given: the
            same velocity where nothing is to be corrected.
        """
        change, given, shift = None, SchedulerInput(velocity), None
        if self._last_velocity is not None and self._last_velocity.shape == velocity.shape:
            change = agree(relative_change(velocity, self._last_velocity, ignored))
            if step != self.last_step:  # a sampler may make a step twice
                self._interval = self._log_alphas[step] - self._evaluated(self._log_alphas)
            if self._lines is not None and self._displacement is not None and step - self.last_step > 1:
                missed = self._lines.draw_to(step, velocity.float()) - self._displacement
                sample_shift = (1 - change).clamp(0.0, 1.0).view(-1, *[1] * (velocity.ndim - 1)) * missed
                shift = sample_shift / self._sigmas[step]
                if self._correction is Correction.SAMPLE:
                    given = SchedulerInput((velocity.float() + shift).to(velocity.dtype), sample_shift)
                else:
                    dsigma = self._sigmas[step + 1] - self._sigmas[step]
                    moving = velocity.float() + sample_shift / dsigma + shift
                    given, shift = SchedulerInput(moving.to(velocity.dtype)), None
        else:
            self._velocity_shift = None
        self._velocity_shift, self._previous_velocity_shift = shift, self._velocity_shift
        self._last_velocity, self.last_step = velocity if shift is None else velocity.float() + shift, step
        if self._correction is not Correction.NONE:
            moved_to = self._last_velocity.float()
            # Without the sample's own move, which belongs to the gap behind.
            self._displacement = (self._sigmas[step + 1] - self._sigmas[step]) * moved_to
            self._lines = _Lines(self._sigmas, self._log_alphas, step, moved_to)
        return change, given

    def _evaluated(self, known: Sequence[float]) -> float | torch.Tensor:
        """What `known` says of the step at which each value was evaluated last."""
        return known[self.last_step] if self._lines is None else self._lines.at_evaluation(known)

    def _shift_no_more(self, step: int, evaluated: torch.Tensor) -> None:
        """These values are evaluated where the sample is now."""
        if self._velocity_shift is None and self._previous_velocity_shift is None:
            return
        shift = 0.0 if self._velocity_shift is None else self._velocity_shift
        before = 0.0 if self._previous_velocity_shift is None else self._previous_velocity_shift
        self._previous_velocity_shift = torch.where(evaluated, shift, before)
        self._velocity_shift = torch.where(evaluated, 0.0, shift)
        interval = torch.as_tensor(self._log_alphas[step] - self._evaluated(self._log_alphas))
        # A sampler may make a step twice.
        self._interval = torch.where(evaluated & (interval > 0).to(evaluated.device), interval, self._interval)

    def _shifted(self, step: int, velocity: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """An extrapolated velocity as it would be, had the two that it comes from been made where the sample is now."""
        if self._velocity_shift is None and self._previous_velocity_shift is None:
            return velocity
        # v_last + ahead (v_last - v_previous), of the shifts in place of the velocities.
        ahead = weight.view(-1, *[1] * (velocity.ndim - 1)) * (
            self._log_alphas[step] - self._evaluated(self._log_alphas)
        )
        ahead = ahead / self._interval
        shifted = velocity.float()
        if self._velocity_shift is not None:
            shifted = shifted + (1 + ahead) * self._velocity_shift
        if self._previous_velocity_shift is not None:
            shifted = shifted - ahead * self._previous_velocity_shift
        return shifted.to(velocity.dtype)


class _Lines:
    """How far velocities would move a sample that go straight over `log_alpha` from each evaluation to the next.

    Args:
        sigmas, log_alphas: as of `Trajectory`.
        first: the dense step at which they begin.
        velocity: all values' at it, float32 [B, ...].
    """

    def __init__(
        self, sigmas: Sequence[float], log_alphas: Sequence[float], first: int, velocity: torch.Tensor
    ) -> None:
        self._sigmas, self._log_alphas, self._first = sigmas, log_alphas, first
        self._velocity = velocity  # of each value's last evaluation
        self._steps: torch.Tensor | None = None  # steps since `first` until that, int64 [B, ...]; None: 0 for all
        self._moved: torch.Tensor | float = 0.0  # up to there

    def at_evaluation(self, known: Sequence[float]) -> float | torch.Tensor:
        """What `known`, which has an entry for each of the run's steps, says of each value's last evaluation."""
        if self._steps is None:
            return known[self._first]
        return torch.tensor(known[self._first :], device=self._steps.device)[self._steps]

    def draw_to(self, step: int, velocity: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        """Draw lines to velocities that were evaluated at a later step.

        Args:
            step: which it is.
            velocity: float32 [B, ...].
            where: the values that were, bool of the velocity's shape; None where all were.

        Returns:
            how far lines to all values of this step move the sample in all, float32 [B, ...].
        """
        lines = [self._line(start, step) for start in range(self._first, step + 1)]
        width, part = (
            lines[0] if self._steps is None else torch.tensor(lines, device=velocity.device)[self._steps].unbind(-1)
        )
        # The sum of w_i (old + part_i (new - old)): w_i = sigma_i+1 - sigma_i, and part_i of a line lies before step i.
        moved = self._moved + width * self._velocity + part * (velocity - self._velocity)
        if where is not None:
            steps = torch.zeros_like(velocity, dtype=torch.int64) if self._steps is None else self._steps
            self._steps = steps.masked_fill(where, step - self._first)
            self._velocity = torch.where(where, velocity, self._velocity)
            self._moved = torch.where(where, moved, self._moved)
        return moved

    def _line(self, start: int, stop: int) -> tuple[float, float]:
        """Over a line's steps the sum of w_i, and of w_i part_i."""
        sigmas, log_alphas = self._sigmas, self._log_alphas
        way = log_alphas[stop] - log_alphas[start]
        dsigma = [sigmas[i + 1] - sigmas[i] for i in range(start, stop)]
        part = [(log_alphas[i] - log_alphas[start]) / way for i in range(start, stop)]
        return sum(dsigma), sum(width * each for width, each in zip(dsigma, part))
