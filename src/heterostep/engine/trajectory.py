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


class Given(NamedTuple):
    """What the sampler is to be given at a step: the velocity, and what the sample is to be moved by, if at all."""

    velocity: torch.Tensor
    move: torch.Tensor | None = None


class Trajectory:
    """What the scheduler was given since the last dense step.

    At a dense step k the velocity is known at both ends of the gap that began at dense step j. Over it the sample was
    moved by extrapolated velocities; a line between the two known ones would have moved it by `missed` more:

        missed = sum over i in j..k-1 of (sigma_i+1 - sigma_i) (line_i - given_i),  line over `log_alpha`

    The sample is moved by (1 - change) missed, for the larger the change over the gap, the less a line says of it. The
    prediction of the clean sample x - sigma v, made from the sample as it was, is kept, so the velocity grows by
    (1 - change) missed / sigma_k. It costs no evaluation. There are two ways (`Correction`):

    - Euler is given, at step k alone, v_k + (1 - change) (1/dsigma + 1/sigma_k) missed, which does both.
    - For solvers of higher order the sample is moved itself. The velocities that are extrapolated from v_k grow as it
      does, up to the next dense step: else the clean sample that follows from them would jump, and such solvers go by
      how it changes. With Euler that measured worse. (UniPC's corrector goes once more from the sample before, which is
      moved as far; what arrives at step k is sigma_k / sigma_k-1 of it.)

    Args:
        sigmas: noise levels 1..0 of the run's steps, one more than steps.
        times: `heterostep.sigmas.log_alpha` of each.
        correction: how velocities or samples are corrected at a gap's end.
    """

    def __init__(self, sigmas: Sequence[float], times: Sequence[float], correction: Correction) -> None:
        self._sigmas, self._times, self._correction = sigmas, times, correction
        self._known: torch.Tensor | None = None  # velocity of the last dense step
        self.step = -1  # which that was
        self._moved: torch.Tensor | None = None  # sum of (sigma' - sigma) v since, float32
        self._open = True  # the gap's velocities were all extrapolated
        self._stride = 1.0  # time between the last two dense steps
        # What the last dense step's velocity lacks by its sample's move, float32; the same of the one before it.
        self._lack: torch.Tensor | None = None
        self._lack_before: torch.Tensor | None = None

    def restart(self) -> None:
        """Forget: another model's velocities say nothing of this one's."""
        self._known = self._moved = self._lack = self._lack_before = None

    def skipped(self, step: int, velocity: torch.Tensor, sparse: bool, weight: torch.Tensor) -> torch.Tensor:
        """Take note of a step whose velocities were extrapolated, all or (`sparse`) most of them.

        Args:
            weight: of the last slope in them, [B].

        Returns:
            the velocity for the scheduler: the same object where nothing is to be corrected.
        """
        if sparse:
            self._open, self._lack, self._lack_before = False, None, None
        given = self._followed(step, velocity, weight)
        if self._correction is not Correction.NONE and self._moved is not None:
            self._moved = self._moved + (self._sigmas[step + 1] - self._sigmas[step]) * given.float()
        return given

    def evaluated(
        self,
        step: int,
        velocity: torch.Tensor,
        ignored: torch.Tensor | None,
        agree: Callable[[torch.Tensor], torch.Tensor] = lambda change: change,
    ) -> tuple[torch.Tensor | None, Given]:
        """Take note of a dense step.

        Args:
            velocity: the guided one.
            ignored: values that do not count, as in `relative_change`.
            agree: gives the change that all processes go by, of this one's.

        Returns:
            the relative change since the last one, [B] (None where there is none), and what the scheduler is given: the
            same velocity where nothing is to be corrected.
        """
        change, given, lack = None, Given(velocity), None
        if self._known is not None and self._known.shape == velocity.shape:
            old = self._known if self._lack is None else self._known.float() + self._lack
            change = agree(relative_change(velocity, old, ignored))
            # A sampler may make a step twice.
            self._stride = self._times[step] - self._times[self.step] or self._stride
            if self._open and self._moved is not None and step - self.step > 1:
                move = (1 - change).clamp(0.0, 1.0).view(-1, *[1] * (velocity.ndim - 1))
                move = move * self._missed(step, velocity.float(), old.float())
                lack = move / self._sigmas[step]
                if self._correction is Correction.SAMPLE:
                    given = Given((velocity.float() + lack).to(velocity.dtype), move)
                else:
                    width = self._sigmas[step + 1] - self._sigmas[step]
                    given, lack = Given((velocity.float() + move / width + lack).to(velocity.dtype)), None
        else:
            self._lack = None
        self._known, self.step, self._open = velocity, step, True
        self._lack, self._lack_before = lack, self._lack
        if self._correction is not Correction.NONE:
            # Without the move itself, which belongs to the gap behind.
            known = velocity.float() if lack is None else velocity.float() + lack
            self._moved = (self._sigmas[step + 1] - self._sigmas[step]) * known
        return change, given

    def _missed(self, step: int, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        assert self._moved is not None
        sigmas, times, before = self._sigmas, self._times, self.step
        widths = [sigmas[i + 1] - sigmas[i] for i in range(before, step)]
        ahead = [(times[i] - times[before]) / (times[step] - times[before]) for i in range(before, step)]
        along = sum(width * part for width, part in zip(widths, ahead))
        return sum(widths) * old + along * (new - old) - self._moved

    def _followed(self, step: int, velocity: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """An extrapolated velocity as it would be, had the two that it comes from been made where the sample is now."""
        if self._lack is None and self._lack_before is None:
            return velocity
        ahead = weight.view(-1, *[1] * (velocity.ndim - 1)) * (self._times[step] - self._times[self.step])
        ahead = ahead / self._stride
        followed = velocity.float()
        if self._lack is not None:
            followed = followed + (1 + ahead) * self._lack
        if self._lack_before is not None:
            followed = followed - ahead * self._lack_before
        return followed.to(velocity.dtype)
