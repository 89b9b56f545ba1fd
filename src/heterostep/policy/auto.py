"""The default policy: evaluate at equal change.

    plan       all tokens are evaluated at steps between which the guided velocity changes by equal amounts (near pure
               noise a change counts for less)
    evaluate   at such a dense step; what it changed by is measured, and the steps ahead are planned anew
    extrapolate  in between, each velocity follows its last change over log(1 - sigma), the less the larger that was
    correct    at the next dense step the sample is moved by what the gap behind has missed (`engine/trajectory.py`)

How fast a velocity changes is measured in the run itself. Over sigma its relative change goes like

    rate(sigma) = level * ((1 - sigma + 0.02)^-exponent + 0.2 / (sigma + 0.02))

fast while the video takes its shape, and again at the very end; the margin of 0.02 keeps both terms finite. The level
hardly differs between tasks, guidance scales, shifts and solvers (without guidance it is a third); the exponent does
(1.4 to 1.7 in text-to-video, 1.0 to 1.3 where a first frame is given). So the first changes tell the exponent, and
later ones steady both (docs/background/method.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from heterostep.policy.base import Change, Policy, Run, distribute_evenly
from heterostep.sigmas import MARGIN

if TYPE_CHECKING:
    from heterostep.config import HSAConfig

# Weight of the rate's second term, which is that of the run's end.
END_WEIGHT = 0.2
# What is expected of a run before it is seen, and its standard deviation; of log(level) for the level. How they were
# chosen: benchmarks/tiny-ti2v.
EXPONENT, EXPONENT_STD = 1.4, 0.3
LEVEL, LEVEL_STD = 0.3, 0.3
# The exponent where frames are given, until a change has been measured: that tells more than the task does.
EXPONENT_FROM_FRAMES = 1.2
# The level without guidance, where less is known: a model that guidance was distilled into may change as a guided one.
UNGUIDED_LEVEL, UNGUIDED_LEVEL_STD = 0.1, 0.6
# Where 1 - sigma, the signal, is less than this, a change counts for less: gaps there cost less than their change says,
# as if later steps hardly saw what was done to so little signal. By skipping single steps (benchmarks/skips.py).
FAINT_SIGNAL = 0.002
# Standard deviation of a measured log(change) about the law.
LOG_CHANGE_STD = 0.25
# Grid over which the exponent's posterior mode is searched, step 0.05.
EXPONENTS = np.linspace(0.6, 2.2, 33)
# Weight of a velocity's last change in what follows: 1 less so much of it. Measured on dense runs in 11 regimes; others
# were tried (docs/background/tried.md).
EXTRAPOLATION_DAMPING = 1.8
# A sparse step takes this part of the tokens, or more: each has its overhead. Chosen by hand.
MIN_SPARSE_FRACTION = 1 / 8
# Single tokens get what whole steps leave of a share where that is this part of them or more, and half of the steps or
# more are dense: then the K and V that they attend to are of the step before. Elsewhere it gained nothing
# (docs/background/tried.md).
MIN_REMAINDER = 1 / 20


class Auto(Policy):
    """See the module's description.

    With `sparse_share` a part of the evaluations goes to single tokens in the gaps. Without, they get what whole steps
    leave of a share in short runs (`MIN_REMAINDER`), in the last gap.
    """

    name = "auto"
    adapts = True

    def __init__(self, config: HSAConfig, run: Run) -> None:
        super().__init__(config, run)
        self.sparse = bool(config.sparse_share) or self._has_large_remainder()
        self.corrects = config.extrapolate is None
        sigmas = np.asarray(run.sigmas)
        self._middles, self._widths = (sigmas[:-1] + sigmas[1:]) / 2, -np.diff(sigmas)
        self._visible = 1 - np.exp((self._middles - 1) / FAINT_SIGNAL)
        self._fitted: dict[tuple[Change, ...], float] = {}

    def replan(
        self, evaluations: int, step: int, changes: Sequence[Change] = (), spend_remainder: bool = True
    ) -> list[int]:
        tokens, num_steps, sparse_share = self.run.tokens, self.run.num_steps, self.config.sparse_share or 0.0
        each = max(tokens.total - tokens.least, 1)
        affordable = (evaluations - tokens.least * (num_steps - step)) / each
        number = math.floor(affordable * (1 - sparse_share) + 1e-9)
        fixed = self._fixed(step, affordable)
        number = max(number, len(fixed))
        dense = self.dense_steps(number, step, self.exponent(changes), fixed)
        counts = [tokens.total if at in dense else tokens.least for at in range(step, num_steps)]
        left = max(evaluations - sum(counts), 0)
        # In seconds the rest is left: a call of a new size takes longer than its tokens do.
        if sparse_share or (spend_remainder and (self.sparse or tokens.least)):
            # Without a first change there is nothing to rank tokens by.
            ranked = [at - step for at in (dense if step else dense[1:])]
            self._spend_on_tokens(counts, left, ranked, spend_remainder)
        return counts

    def _has_large_remainder(self) -> bool:
        """Whether whole steps leave much of the share beside them, and gaps are short, so that K and V are recent."""
        share, tokens = self.config.share, self.run.tokens
        if self.config.sparse_share is not None or tokens.least or not isinstance(share, float):
            return False
        whole, left = divmod(self.run.evaluations(share), tokens.total)
        return whole >= max(2, self.run.num_steps / 2) and left >= tokens.total * max(
            whole * MIN_REMAINDER, MIN_SPARSE_FRACTION
        )

    def leave_out_single_tokens(self) -> bool:
        if not self.config.sparse_share:
            self.sparse = False
        return not self.sparse

    def _fixed(self, step: int, affordable: float) -> set[int]:
        """Steps from `step` on that are dense in any case, where about so many can be."""
        num_steps, config = self.run.num_steps, self.config
        fixed = {step, *(at for at in self.run.restarts if at > step)}
        fixed |= set(range(step, min(config.dense_start or 1, num_steps)))
        fixed |= set(range(max(step, num_steps - config.dense_end), num_steps))
        # Tokens are ranked by a first change, and K and V that every step reads are kept from the second or third on.
        soon = fixed | set(range(step, min(2, num_steps)))
        wanted = config.sparse_share and len(soon) <= affordable + 1e-9
        return soon if self.run.tokens.least or wanted else fixed

    def rates(self, exponent: float) -> np.ndarray:
        """Predicted change of the velocity from each step to the next, up to the level; float64 [num_steps]."""
        signal, noise = 1 - self._middles + MARGIN, self._middles + MARGIN
        return (signal**-exponent + END_WEIGHT / noise) * self._widths

    def counted(self, exponent: float, step: int) -> np.ndarray:
        """What of the predicted changes counts where dense steps are placed from `step` on; float64 [num_steps].

        Here the same whatever the step is; it is for policies that derive from this one (benchmarks/placing.py).
        """
        return self.rates(exponent) * self._visible

    @functools.cached_property
    def _candidates(self) -> list[tuple[float, np.ndarray]]:
        return [(float(exponent), np.concatenate([[0.0], np.cumsum(self.rates(exponent))])) for exponent in EXPONENTS]

    def exponent(self, changes: Sequence[Change]) -> float:
        """The most probable exponent, given what has been measured; the level that goes with it is fitted too."""
        key = tuple(changes)
        if key not in self._fitted:
            self._fitted[key] = self._fit(key)
        return self._fitted[key]

    def _fit(self, changes: Sequence[Change]) -> float:
        known = [change for change in changes if change.value > 0 and math.isfinite(change.value)]
        if not known:
            return EXPONENT_FROM_FRAMES if self.run.from_frames else EXPONENT
        starts, stops = [change.start for change in known], [change.stop for change in known]
        levels = np.log([LEVEL if change.guided else UNGUIDED_LEVEL for change in known])
        level_std = LEVEL_STD if all(change.guided for change in known) else UNGUIDED_LEVEL_STD
        measured = np.log([change.value for change in known]) - levels

        def cost(exponent: float, passed: np.ndarray) -> float:
            """-2 log of the posterior at the level that suits this exponent best; `passed`: the law up to each step."""
            off = measured - np.log(passed[stops] - passed[starts])
            level = off.sum() / LOG_CHANGE_STD**2 / (len(off) / LOG_CHANGE_STD**2 + 1 / level_std**2)
            prior = (level / level_std) ** 2 + ((exponent - EXPONENT) / EXPONENT_STD) ** 2
            return float((((off - level) / LOG_CHANGE_STD) ** 2).sum() + prior)

        return min(self._candidates, key=lambda candidate: cost(*candidate))[0]

    def dense_steps(self, number: int, step: int, exponent: float, fixed: set[int]) -> list[int]:
        """`number` steps from `step` on, ascending, with `fixed` among them: what changes in between counts alike.

        The free ones go, one by one, to where most change is left between two fixed ones, and are then set evenly.
        """
        num_steps = self.run.num_steps
        passed = np.concatenate([[0.0], np.cumsum(self.counted(exponent, step))])
        ends = [*sorted(fixed), num_steps]
        sections = list(zip(ends, ends[1:]))
        inside = [0] * len(sections)
        for _ in range(min(number, num_steps - step) - len(fixed)):
            gaps = [
                (passed[b] - passed[a]) / (more + 1) if more < b - a - 1 else -1.0
                for (a, b), more in zip(sections, inside)
            ]
            inside[gaps.index(max(gaps))] += 1
        chosen: list[int] = []
        for (a, b), more in zip(sections, inside):
            chosen.append(a)
            for ahead in range(more, 0, -1):
                last = chosen[-1]
                due = passed[last] + (passed[b] - passed[last]) / (ahead + 1)
                nearest = int(np.abs(passed - due).argmin())
                chosen.append(min(max(nearest, last + 1), b - ahead))
        return chosen

    def _spend_on_tokens(self, counts: list[int], left: int, dense: list[int], spend_remainder: bool) -> None:
        """Spend evaluations on sparse steps: one in the middle of each gap, more where that would be nearly dense."""
        tokens, size = self.run.tokens, len(counts)
        each = max(tokens.total - tokens.least, 1)
        middles: list[int] = []
        for number in range(1, size + 1):
            middles = []
            for a, b in zip(dense, [*dense[1:], size]):
                within = min(number, b - a - 1)
                middles += [a + (b - a) * position // (within + 1) for position in range(1, within + 1)]
            if left <= each * len(middles) / 2:
                break
        enough = max(1, int(tokens.total * MIN_SPARSE_FRACTION))
        # What is left over by chance comes last: as seconds come in it is spent once, and in one gap.
        wanted = max(1, left // enough) if self.config.sparse_share else math.ceil(left / each)
        used = min(len(middles), wanted)
        if used and (spend_remainder or left >= enough):
            distribute_evenly(counts, left, middles[-used:], tokens, spend_remainder)

    def weight(self, change: torch.Tensor) -> torch.Tensor:
        if self.config.extrapolate is not None:
            return super().weight(change)
        return (1 - EXTRAPOLATION_DAMPING * change).clamp(0.0, 1.0)
