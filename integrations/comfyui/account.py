# SPDX-License-Identifier: GPL-3.0-or-later
"""What is told of a sampling in ComfyUI: a text, a picture of the plan, a map of each token's evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from heterostep.engine import account
from heterostep.engine.generation import Generation
from heterostep.engine.report import Report

if TYPE_CHECKING:
    from .run import Run

# Pixels of a token in the map.
TOKEN = 16


@dataclass(frozen=True)
class Account:
    """One sampling.

    Attributes:
        text: what was asked for and done, for people.
        report: the same as the library reports it.
        sigmas: the noise levels.
        changes: (step, relative change of the guided velocity since the evaluated step before).
    """

    text: str
    report: Report
    sigmas: tuple[float, ...]
    changes: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, run: Run, generation: Generation) -> Account:
        """A sampling's account."""
        report = account.report(generation, run.model_name)
        changes = tuple((change.stop, change.value) for change in generation.changes)
        return cls(_text(run, generation, report), report, generation.schedule.run.sigmas, changes)

    def plan(self) -> np.ndarray:
        """The plan as a picture, uint8 [height, width, 3]."""
        from heterostep.plan_picture import plan_picture

        return plan_picture(self.report.active_share, self.sigmas, self.changes)

    def steps_map(self) -> np.ndarray:
        """Evaluations of each token, uint8 [token frames, height, width, 3]: dark for few, light for many."""
        from heterostep.viz import heat

        steps = self.report.steps_map
        frames, height, width = steps.shape
        return heat(np.zeros((frames, height * TOKEN, width * TOKEN, 3), np.uint8), steps)


def _text(run: Run, generation: Generation, report: Report) -> str:
    sigmas, shares = generation.schedule.run.sigmas, report.active_share
    dense = [step + 1 for step, share in enumerate(shares) if share == 1]
    some = sum(0 < share < 1 for share in shares)
    lines = [
        f"{run.model_name}, {run.sampler}, {len(sigmas) - 1} steps, noise {sigmas[0]:.3f} to {sigmas[-1]:.3f}",
        f"share of the evaluations: {report.share.target:g} asked, {report.share.achieved:.3g} spent",
        f"steps: {len(dense)} evaluated" + (f", {some} with some of the tokens" if some else "")
        + f", {len(shares) - len(dense) - some} extrapolated",
        f"evaluated steps: {', '.join(map(str, dense))}",
        f"calls of the transformer: {run.evaluated} made, {run.extrapolated} saved",
    ]  # fmt: skip
    runtime = report.runtime
    if runtime.dense_seconds:
        lines.append(f"seconds: {runtime.seconds:.1f}, about {runtime.dense_seconds:.1f} if every step were evaluated")
    if report.memory.kv_store != "none":
        lines.append(f"K and V: {report.memory.kv_store}, {report.memory.kv_cache_bytes / 1e9:.2f} GB on the device")
    if run.gave_up is not None:
        lines.append(f"note: {run.gave_up}; every step from there on was evaluated")
    elif not report.finished:
        lines.append(f"note: it was stopped after {generation.steps_done} of {len(sigmas) - 1} steps")
    if report.advice is not None:
        lines.append(f"note: with {len(sigmas) - 1} steps there is little to leave out; try fewer steps without it")
    return "\n".join(lines)
