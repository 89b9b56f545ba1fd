"""Other ways to place dense steps, to weigh a velocity's last change and to end a gap, beside the default.

PSNR in dB to the dense video; with --latents, SNR of the final latents to the dense run's, without given frames. By
default videos are short (9 frames) and made one by one, so that a row of 50 steps and one caption takes a CPU's core
half a minute for each policy. What came of it is in docs/background/tried.md.

    python benchmarks/placing.py --regime wan2.1-t2v-1.3b --policies veto reserve
    python benchmarks/placing.py --regime wan2.1-t2v-1.3b --policies width-4 law --frames 33 --count 16 --batch 16
"""

from __future__ import annotations

import abc
import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from heterostep import HSAConfig, enabled, register_policy, tiny
from heterostep.compare.measure import generate
from heterostep.compare.prompts import held_out
from heterostep.compare.regimes import REGIMES, in_regime
from heterostep.engine.trajectory import Trajectory
from heterostep.policy import Change, Run
from heterostep.policy.auto import LEVEL, LEVEL_STD, LOG_CHANGE_STD, Auto
from heterostep.sigmas import MARGIN
from made import Made

ABOVE = 1.3  # a change of so many times its forecast is a surprise


class Forecasting(Auto):
    """Knows what was measured when it places dense steps."""

    seen: Sequence[Change] = ()

    def replan(
        self, evaluations: int, step: int, changes: Sequence[Change] = (), spend_remainder: bool = True
    ) -> list[int]:
        self.seen = tuple(change for change in changes if change.value > 0)
        return super().replan(evaluations, step, changes, spend_remainder)

    def off(self, known: Sequence[Change], change: Change) -> float:
        """log(change / its forecast): by the law fitted to the known ones, exponent and level."""
        passed = np.concatenate([[0.0], np.cumsum(Auto.rates(self, self.exponent(known)))])

        def above(each: Change) -> float:
            return math.log(each.value / LEVEL / (passed[each.stop] - passed[each.start]))

        level = sum(map(above, known)) / LOG_CHANGE_STD**2 / (len(known) / LOG_CHANGE_STD**2 + 1 / LEVEL_STD**2)
        return above(change) - level

    def surprise(self, number: int) -> bool:
        """Whether the change of this number was far above what those before it led to expect."""
        return number > 0 and self.off(self.seen[:number], self.seen[number]) > math.log(ABOVE)


@register_policy
class Veto(Forecasting):
    """After a surprise the next gap is half as long, and what is left is planned anew."""

    name = "veto"

    def dense_steps(self, number: int, step: int, exponent: float, fixed: set[int]) -> list[int]:
        chosen = super().dense_steps(number, step, exponent, fixed)
        if len(chosen) < 2 or number <= len(fixed) or not self.surprise(len(self.seen) - 1):
            return chosen
        return super().dense_steps(number, step, exponent, fixed | {step + max((chosen[1] - step) // 2, 1)})


@register_policy
class Reserve(Forecasting):
    """One evaluation is kept for the first surprise; without one it is spent with the last third of them."""

    name = "reserve"

    def dense_steps(self, number: int, step: int, exponent: float, fixed: set[int]) -> list[int]:
        kept = not any(map(self.surprise, range(len(self.seen))))
        kept &= number > max((number + len(self.seen)) / 3, len(fixed) + 1)
        return super().dense_steps(number - kept, step, exponent, fixed)


class Placing(Forecasting):
    """Places dense steps by the predicted change times a factor of each step's, [num_steps]."""

    @abc.abstractmethod
    def factor(self, step: int) -> np.ndarray:
        """As seen at `step`."""

    def counted(self, exponent: float, step: int) -> np.ndarray:
        return super().counted(exponent, step) * self.factor(step)


@register_policy
class Wide(Placing):
    """A step counts more the wider it is in sigma: an error of the velocity is made over all of it."""

    name = "wide"

    def factor(self, step: int) -> np.ndarray:
        return 1 + 0.075 * self.run.num_steps * self._widths


@register_policy
class Carry(Placing):
    """What follows a change that was off the law is expected to be off it too, less and less."""

    name = "carry"

    def factor(self, step: int) -> np.ndarray:
        if not self.seen:
            return np.ones(self.run.num_steps)
        last = self.seen[-1]
        passed = np.concatenate([[0.0], np.cumsum(self.rates(self.exponent(self.seen)))])
        gaps = np.maximum(passed[:-1] - passed[step], 0) / (passed[last.stop] - passed[last.start])
        return np.exp(0.6 * self.off(self.seen, last) * np.exp(-gaps / 2))


@register_policy
class WideCarry(Wide, Carry):
    """Both."""

    name = "wide-carry"

    def factor(self, step: int) -> np.ndarray:
        return Wide.factor(self, step) * Carry.factor(self, step)


@register_policy
class Uncorrected(Auto):
    """The sample is not moved by what a gap has missed."""

    name = "uncorrected"

    def __init__(self, config: HSAConfig, run: Run) -> None:
        super().__init__(config, run)
        self.corrects = False


@register_policy
class End(Auto):
    """The last two steps are dense, as with `dense_end=2`."""

    name = "end"

    def _fixed(self, step: int, affordable: float) -> set[int]:
        num_steps = self.run.num_steps
        return super()._fixed(step, affordable) | set(range(max(step, num_steps - 2), num_steps))


@register_policy
class Alike(Auto):
    """Changes near pure noise count as all others do."""

    name = "alike"

    def counted(self, exponent: float, step: int) -> np.ndarray:
        return self.rates(exponent)


@register_policy
class Soon(Alike):
    """The same, and the second step is dense, so that a first change is known."""

    name = "soon"

    def _fixed(self, step: int, affordable: float) -> set[int]:
        return super()._fixed(step, affordable) | ({1} if step == 0 else set())


class ByWidth(Placing):
    """Dense steps are as close as (width rate^order)^(1 / (order + 1)), the width that of a step in sigma.

    That is what makes the sum of the errors least if the velocity's error over a gap goes like its change to the power
    of `order`, and the sample's like that times the gap's width (equidistribution, as in adaptive integration).
    """

    order = 4.0

    def factor(self, step: int) -> np.ndarray:
        # The rate has the width in it.
        return (self._widths / self.rates(self.exponent(self.seen))) ** (1 / (self.order + 1))


@register_policy
class ByWidth4(ByWidth):
    """Of order 4."""

    name = "width-4"


@register_policy
class ByWidth8(ByWidth):
    """Of order 8."""

    name = "width-8"
    order = 8.0


@register_policy
class Law(Auto):
    """The law of the rate ends in 0.4 / sigma^1.5, which fits dense runs' last changes better than 0.2 / sigma."""

    name = "law"

    def rates(self, exponent: float) -> np.ndarray:
        signal, noise = 1 - self._middles + MARGIN, self._middles + MARGIN
        return (signal**-exponent + 0.4 * noise**-1.5) * self._widths


@register_policy
class LawByWidth(ByWidth8, Law):
    """Both, of order 8."""

    name = "law-width-8"


@register_policy
class Second(Placing):
    """The second expert's changes count half as much again."""

    name = "second"

    def factor(self, step: int) -> np.ndarray:
        factor = np.ones(self.run.num_steps)
        for restart in self.run.restarts:
            factor[restart:] = 1.5
        return factor


class Slopes:
    """The last two slopes of the guided velocity: how much of the one before would have been best over the last gap."""

    best: torch.Tensor | None = None  # [B]

    def watch(self) -> None:
        """From now on; there is one run at a time."""
        on_dense_step, seen = Trajectory.on_dense_step, self

        def watched(
            self: Any, step: int, velocity: torch.Tensor, ignored: torch.Tensor | None, *args: Any, **options: Any
        ) -> Any:
            flat = (velocity if ignored is None else velocity.masked_fill(ignored, 0)).float().flatten(1)
            known = self.__dict__.setdefault("points", [])
            if self._last_velocity is None:
                known.clear()
            known[:] = [*known, (self._log_alphas[step], flat)][-3:]
            seen.best = None
            if len(known) == 3:
                before, last = ((b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(known, known[1:]))
                seen.best = (before * last).sum(1) / (before * before).sum(1).clamp_min(1e-20)
            return on_dense_step(self, step, velocity, ignored, *args, **options)

        Trajectory.on_dense_step = watched  # type: ignore[method-assign]


SLOPES = Slopes()


@register_policy
class Agree(Auto):
    """Half of the last slope's weight is by how well the slope before it forecast the last change."""

    name = "agree"

    def weight(self, change: torch.Tensor) -> torch.Tensor:
        weight = super().weight(change)
        return weight if SLOPES.best is None else (weight + SLOPES.best.clamp(0, 1)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", default="wan2.1-t2v-1.3b", choices=REGIMES)
    parser.add_argument("--task", choices=("text", "image"), default="text")
    parser.add_argument("--policies", nargs="+", default=["veto", "reserve", "carry", "wide", "wide-carry", "agree"])
    parser.add_argument("--first", type=int, default=2000, help="number of the first caption")
    parser.add_argument("--count", type=int, default=4, help="captions")
    parser.add_argument("--batch", type=int, default=1, help="captions made in one call, with one plan")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--latents", action="store_true", help="SNR of latents in place of PSNR: nothing is decoded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    image, policies = args.task == "image", ["auto", *args.policies]
    pipe = tiny.load(image_to_video=image).to(args.device)
    made = Made(pipe, latents=args.latents, given=int(image))
    SLOPES.watch()
    found: dict[tuple[float, str], list[float]] = {(share, policy): [] for share in args.shares for policy in policies}
    with in_regime(pipe, REGIMES[args.regime]) as options:
        options = {"height": 192, "width": 192, "num_frames": args.frames} | options
        prompts = held_out(args.count, args.first, with_image=image)
        for at in range(0, args.count, args.batch):
            some = prompts[at : at + args.batch]
            generate(pipe, some, None, 1.0, options)
            dense = made.last()
            for share, policy in found:
                with enabled(pipe, share=share, policy=policy):
                    generate(pipe, some, None, 1.0, options)
                found[share, policy] += made.decibels(dense)
            print(f"{at + len(some)}/{args.count}", file=sys.stderr)
    print(f"| share | policy | {' | '.join(str(args.first + i) for i in range(args.count))} | mean | worst |")
    print("|---" * (args.count + 4) + "|")
    for (share, policy), values in found.items():
        cells = [*values, sum(values) / len(values), min(values)]
        print(f"| {share:g} | {policy} | {' | '.join(f'{value:.1f}' for value in cells)} |")


if __name__ == "__main__":
    main()
