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

    At a dense step k the velocity is known at both ends of the gap that began at dense step j. Over it the sample was
    moved by extrapolated velocities; a line between the two known ones would have moved it by `missed` more:

        missed = sum over i in j..k-1 of (sigma_i+1 - sigma_i) (line_i - given_i),  line over `log_alpha`

    The sample is moved by (1 - change) missed, for the larger the change over the gap, the less a line says of it. The
    prediction of the clean sample x - sigma v, made from the sample as it was, is kept, so the velocity grows by
    (1 - change) missed / sigma_k. It costs no evaluation. There are two ways (`Correction`):

    - Euler is given, at step k alone, v_k + (1 - change) (1/dsigma + 1/sigma_k) missed, which does both.
    - For multistep solvers the sample itself is moved. Velocities extrapolated from v_k are shifted by the same amount
      until the next dense step; otherwise the implied clean sample would jump, and these solvers use its differences.
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
        self._last_velocity: torch.Tensor | None = None  # of the last dense step, as the model gave it
        self.last_step = -1
        self._displacement: torch.Tensor | None = None  # sum of (sigma' - sigma) v since that step began, float32
        self._gap_is_extrapolated = True  # all of the gap's velocities were
        self._last_interval = 1.0  # log_alpha between the last two dense steps
        # What the last dense step's velocity, and that of the one before it, would have had more, had it been evaluated
        # where the sample was moved to: float32, None for nothing.
        self._velocity_shift: torch.Tensor | None = None
        self._previous_velocity_shift: torch.Tensor | None = None

    def restart(self) -> None:
        """Forget: another model's velocities say nothing of this one's."""
        self._last_velocity = self._displacement = self._velocity_shift = self._previous_velocity_shift = None

    def on_skipped_step(self, step: int, velocity: torch.Tensor, sparse: bool, weight: torch.Tensor) -> torch.Tensor:
        """Take note of a step whose velocities were extrapolated, all or (`sparse`) most of them.

        Args:
            step: which it is, from 0.
            velocity: the guided one, [B, ...].
            sparse: whether tokens were evaluated at it by the policy's choice. Then the gap is not corrected, nor are
                velocities shifted any more.
            weight: of the last slope in the velocities, [B].

        Returns:
            the velocity for the scheduler: the same object where nothing is to be corrected.
        """
        if sparse:
            self._gap_is_extrapolated, self._velocity_shift, self._previous_velocity_shift = False, None, None
        given = self._shifted(step, velocity, weight)
        if self._correction is not Correction.NONE and self._displacement is not None:
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
            old = self._last_velocity
            old = old if self._velocity_shift is None else old.float() + self._velocity_shift
            change = agree(relative_change(velocity, old, ignored))
            # A sampler may make a step twice.
            self._last_interval = self._log_alphas[step] - self._log_alphas[self.last_step] or self._last_interval
            if self._gap_is_extrapolated and self._displacement is not None and step - self.last_step > 1:
                sample_shift = (1 - change).clamp(0.0, 1.0).view(-1, *[1] * (velocity.ndim - 1))
                sample_shift = sample_shift * self._gap_error(step, velocity.float(), old.float())
                shift = sample_shift / self._sigmas[step]
                if self._correction is Correction.SAMPLE:
                    given = SchedulerInput((velocity.float() + shift).to(velocity.dtype), sample_shift)
                else:
                    dsigma = self._sigmas[step + 1] - self._sigmas[step]
                    moving = velocity.float() + sample_shift / dsigma + shift
                    given, shift = SchedulerInput(moving.to(velocity.dtype)), None
        else:
            self._velocity_shift = None
        self._last_velocity, self.last_step, self._gap_is_extrapolated = velocity, step, True
        self._velocity_shift, self._previous_velocity_shift = shift, self._velocity_shift
        if self._correction is not Correction.NONE:
            # Without the sample's own move, which belongs to the gap behind.
            shifted = velocity.float() if shift is None else velocity.float() + shift
            self._displacement = (self._sigmas[step + 1] - self._sigmas[step]) * shifted
        return change, given

    def _gap_error(self, step: int, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """`missed` of the class's description for the gap that ends at `step`, float32 [B, ...].

        With w_i = sigma_i+1 - sigma_i and part_i, how much of the gap's way over log_alpha lies before step i, a line
        moves the sample by sum of w_i (old + part_i (new - old)).
        """
        assert self._displacement is not None
        sigmas, log_alphas, before = self._sigmas, self._log_alphas, self.last_step
        dsigma = [sigmas[i + 1] - sigmas[i] for i in range(before, step)]
        way = log_alphas[step] - log_alphas[before]
        part = [(log_alphas[i] - log_alphas[before]) / way for i in range(before, step)]
        along = sum(width * each for width, each in zip(dsigma, part))
        return sum(dsigma) * old + along * (new - old) - self._displacement

    def _shifted(self, step: int, velocity: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """An extrapolated velocity as it would be, had the two that it comes from been made where the sample is now."""
        if self._velocity_shift is None and self._previous_velocity_shift is None:
            return velocity
        # v_last + ahead (v_last - v_previous), of the shifts in place of the velocities.
        ahead = weight.view(-1, *[1] * (velocity.ndim - 1)) * (
            self._log_alphas[step] - self._log_alphas[self.last_step]
        )
        ahead = ahead / self._last_interval
        shifted = velocity.float()
        if self._velocity_shift is not None:
            shifted = shifted + (1 + ahead) * self._velocity_shift
        if self._previous_velocity_shift is not None:
            shifted = shifted - ahead * self._previous_velocity_shift
        return shifted.to(velocity.dtype)
