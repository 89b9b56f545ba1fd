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

    Most values have one line, from j to k. Those of tokens that ran in the gap have several, from one of their
    evaluations to the next. The sample is moved by (1 - change) missed, for the larger the change over the gap, the
    less a line says of it. The prediction of the clean sample x - sigma v, made from the sample as it was, is kept, so
    the velocity grows by (1 - change) missed / sigma_k. It costs no evaluation. There are two ways (`Correction`):

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
        self._gap: _Gap | None = None  # the one under way; None where it will not be corrected
        # What each value's last evaluated velocity, and the one before, would have had more, had they been evaluated
        # where the sample was moved to: float32 [B, ...], None for nothing.
        self._velocity_shift: torch.Tensor | None = None
        self._previous_velocity_shift: torch.Tensor | None = None
        self._interval: float | torch.Tensor = 1.0  # log_alpha between these two; see `_Gap.since_evaluation`

    @property
    def corrects_gap(self) -> bool:
        """Whether the gap under way will be corrected at its end, as far as is known."""
        return self._gap is not None

    def restart(self) -> None:
        """Forget: another model's velocities say nothing of this one's."""
        self._last_velocity = None
        self.leave_gap()

    def leave_gap(self) -> None:
        """Do not correct the gap under way, nor shift velocities any more: which values were evaluated is not known."""
        self._gap = self._velocity_shift = self._previous_velocity_shift = None
        self._interval = 1.0

    def on_skipped_step(
        self, step: int, velocity: torch.Tensor, weight: torch.Tensor, evaluated: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Take note of a step whose velocities were extrapolated, all or most of them.

        Args:
            step: which it is, from 0.
            velocity: the guided one, [B, ...].
            weight: of the last slope in the velocities, [B].
            evaluated: which values were evaluated at it by the policy's choice, bool, of a shape that broadcasts to the
                velocity's; None for none.

        Returns:
            the velocity for the scheduler: the same object where nothing is to be corrected.
        """
        if self._gap is None:
            return velocity
        if evaluated is not None:
            self._shift_no_more(self._gap.since_evaluation(step), evaluated)
            self._gap.note_evaluations(step, velocity.float(), evaluated)
        given = self._shifted(velocity, weight, self._gap.since_evaluation(step))
        self._gap.note_given(step, given.float())
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
            if self._gap is not None and step != self.last_step:  # a sampler may make a step twice
                self._interval = self._gap.since_evaluation(step)
            if self._gap is not None and step - self.last_step > 1:
                sample_shift = (1 - change).clamp(0.0, 1.0).view(-1, *[1] * (velocity.ndim - 1))
                sample_shift = sample_shift * self._gap.missed(step, velocity.float())
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
            # The sample's own move at this step belongs to the gap behind.
            self._gap = _Gap(self._sigmas, self._log_alphas, step, self._last_velocity.float())
        return change, given

    def _shift_no_more(self, since: float | torch.Tensor, evaluated: torch.Tensor) -> None:
        """These values are evaluated where the sample is now, so much `log_alpha` after their last time."""
        known = [each for each in (self._velocity_shift, self._previous_velocity_shift) if each is not None]
        if not known:
            return
        nothing = torch.zeros_like(known[0])
        shift = nothing if self._velocity_shift is None else self._velocity_shift
        before = nothing if self._previous_velocity_shift is None else self._previous_velocity_shift
        self._previous_velocity_shift = torch.where(evaluated, shift, before)
        self._velocity_shift = shift.masked_fill(evaluated, 0.0)
        interval, since = _filled(self._interval, evaluated), _filled(since, evaluated)
        # A sampler may make a step twice.
        self._interval = torch.where(evaluated & (since > 0), since, interval)

    def _shifted(self, velocity: torch.Tensor, weight: torch.Tensor, since: float | torch.Tensor) -> torch.Tensor:
        """An extrapolated velocity as it would be, had the two that it comes from been made where the sample is now."""
        if self._velocity_shift is None and self._previous_velocity_shift is None:
            return velocity
        # v_last + ahead (v_last - v_previous), of the shifts in place of the velocities.
        ahead = weight.view(-1, *[1] * (velocity.ndim - 1)) * since / self._interval
        shifted = velocity.float()
        if self._velocity_shift is not None:
            shifted = shifted + (1 + ahead) * self._velocity_shift
        if self._previous_velocity_shift is not None:
            shifted = shifted - ahead * self._previous_velocity_shift
        return shifted.to(velocity.dtype)


class _Gap:
    """How far the sample was moved since a dense step, and how far lines between evaluations would have moved it.

    Where no token has run in the gap, sigma and the like are the same for all values, and numbers. Else they are
    float32 tensors that broadcast to the velocity's shape.

    Args:
        sigmas, log_alphas: as of `Trajectory`.
        first: the dense step.
        velocity: at it, where the sample was moved to: float32 [B, ...].
    """

    def __init__(
        self, sigmas: Sequence[float], log_alphas: Sequence[float], first: int, velocity: torch.Tensor
    ) -> None:
        self._sigmas, self._log_alphas, self._first = sigmas, log_alphas, first
        self._displacement = (sigmas[first + 1] - sigmas[first]) * velocity  # sum of (sigma' - sigma) v
        # Of each value's last evaluation: its velocity, how far lines have moved the sample until then (None: nowhere),
        # its sigma, and `_way` and `_along` of its step.
        self._velocity = velocity
        self._moved: torch.Tensor | None = None
        self._sigma: float | torch.Tensor = sigmas[first]
        self._way: float | torch.Tensor = 0.0
        self._along: float | torch.Tensor = 0.0

    def since_evaluation(self, step: int) -> float | torch.Tensor:
        """`log_alpha` from each value's last evaluation to a step."""
        return self._way_to(step) - self._way

    def note_given(self, step: int, velocity: torch.Tensor) -> None:
        """The scheduler is given a velocity, float32 [B, ...]."""
        self._displacement = self._displacement + (self._sigmas[step + 1] - self._sigmas[step]) * velocity

    def note_evaluations(self, step: int, velocity: torch.Tensor, where: torch.Tensor) -> None:
        """Velocities, float32 [B, ...], of which some values were evaluated at this step, bool as in `Trajectory`."""
        moved = self._moved_to(step, velocity)
        self._moved = torch.where(where, moved, torch.zeros_like(moved) if self._moved is None else self._moved)
        self._velocity = torch.where(where, velocity, self._velocity)
        self._sigma = _filled(self._sigma, where).masked_fill(where, self._sigmas[step])
        self._way = _filled(self._way, where).masked_fill(where, self._way_to(step))
        self._along = _filled(self._along, where).masked_fill(where, self._along_to(step))

    def missed(self, step: int, velocity: torch.Tensor) -> torch.Tensor:
        """`missed` of `Trajectory`, where all values are evaluated at this step: float32 [B, ...]."""
        return self._moved_to(step, velocity) - self._displacement

    def _moved_to(self, step: int, velocity: torch.Tensor) -> torch.Tensor:
        """How far lines move the sample that end at this step, at these velocities.

        With w_i = sigma_i+1 - sigma_i, and part_i of a line's way over log_alpha behind it at step i, a line moves it
        by the sum of w_i (old + part_i (new - old)).
        """
        width, length = self._sigmas[step] - self._sigma, self.since_evaluation(step)
        if isinstance(length, torch.Tensor):
            length = length.clamp_min(1e-6)  # a sampler may make a step twice
        part = (self._along_to(step) - self._along - self._way * width) / length
        moved = width * self._velocity + part * (velocity - self._velocity)
        return moved if self._moved is None else self._moved + moved

    def _way_to(self, step: int) -> float:
        """`log_alpha` from the dense step to this one."""
        return self._log_alphas[step] - self._log_alphas[self._first]

    def _along_to(self, step: int) -> float:
        """Sum of w_i times the way to step i, over the steps from the dense one to this one."""
        return sum((self._sigmas[i + 1] - self._sigmas[i]) * self._way_to(i) for i in range(self._first, step))


def _filled(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A number as a float32 tensor of the shape of another; a tensor as it is."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full(like.shape, value, dtype=torch.float32, device=like.device)
