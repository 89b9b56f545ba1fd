"""The guided velocities along a run, as the scheduler is given them: how they change, and what a gap has missed.

Shapes: B samples; a velocity is [B, ...] in the layout of the pipeline's latents.
"""

from __future__ import annotations

from collections.abc import Sequence

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


class Trajectory:
    """What the scheduler was given since the last dense step.

    At a dense step k the velocity is known at both ends of the gap that began at dense step j. Over it the sample was
    moved by extrapolated velocities; a line between the two known ones would have moved it by `missed` more:

        missed = sum over i in j..k-1 of (sigma_i+1 - sigma_i) (line_i - given_i),  line over `log_alpha`

    A scheduler without memory (Euler) is then given, at step k alone, v_k + (1 - change) (1/dsigma + 1/sigma) missed:
    the first part moves the sample by what it lacks, the second keeps the prediction of the clean sample, made from the
    sample as it was. It costs no evaluation. The larger the change over the gap, the less a line says of it.

    Args:
        sigmas: noise levels 1..0 of the run's steps, one more than steps.
        times: `heterostep.sigmas.log_alpha` of each.
        corrects: whether velocities at a gap's end are corrected.
    """

    def __init__(self, sigmas: Sequence[float], times: Sequence[float], corrects: bool) -> None:
        self._sigmas, self._times, self._corrects = sigmas, times, corrects
        self._known: torch.Tensor | None = None  # velocity of the last dense step
        self.step = -1  # which that was
        self._moved: torch.Tensor | None = None  # sum of (sigma' - sigma) v since, float32
        self._open = True  # the gap's velocities were all extrapolated

    def restart(self) -> None:
        """Forget: another model's velocities say nothing of this one's."""
        self._known, self._moved = None, None

    def skipped(self, step: int, velocity: torch.Tensor, sparse: bool) -> None:
        """Take note of a step whose velocities were extrapolated, all or (`sparse`) most of them."""
        self._open = self._open and not sparse
        if self._corrects and self._moved is not None:
            self._moved = self._moved + (self._sigmas[step + 1] - self._sigmas[step]) * velocity.float()

    def evaluated(
        self, step: int, velocity: torch.Tensor, ignored: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Take note of a dense step.

        Returns:
            the relative change since the last one, [B] (None where there is none), and the velocity for the scheduler:
            the same object where nothing is to be corrected.
        """
        change, given = None, velocity
        if self._known is not None and self._known.shape == velocity.shape:
            change = relative_change(velocity, self._known, ignored)
            if self._corrects and self._open and self._moved is not None and step - self.step > 1:
                given = self._corrected(step, velocity, change)
        self._known, self.step, self._open = velocity, step, True
        if self._corrects:
            self._moved = (self._sigmas[step + 1] - self._sigmas[step]) * velocity.float()
        return change, given

    def _corrected(self, step: int, velocity: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        assert self._known is not None and self._moved is not None
        sigmas, times, before = self._sigmas, self._times, self.step
        new, old = velocity.float(), self._known.float()
        widths = [sigmas[i + 1] - sigmas[i] for i in range(before, step)]
        ahead = [(times[i] - times[before]) / (times[step] - times[before]) for i in range(before, step)]
        along = sum(width * part for width, part in zip(widths, ahead))
        missed = sum(widths) * old + along * (new - old) - self._moved
        trust = (1 - change).clamp(0.0, 1.0).view(-1, *[1] * (velocity.ndim - 1))
        factor = 1 / (sigmas[step + 1] - sigmas[step]) + 1 / sigmas[step]
        return (new + trust * factor * missed).to(velocity.dtype)
