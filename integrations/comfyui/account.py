# SPDX-License-Identifier: GPL-3.0-or-later
"""What is told of a sampling in ComfyUI: a text, a picture of the plan, a map of each token's evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from heterostep.engine.generation import Generation
from heterostep.engine.report import Report, build_report

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
        report = build_report(generation, run.model_name)
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
    steps, asked = len(sigmas) - 1, f"share of the evaluations: {report.share.target:g} asked"
    lines = [f"{run.model_name}, {run.sampler}, {steps} steps, noise {sigmas[0]:.3f} to {sigmas[-1]:.3f}"]
    if run.gave_up is not None:
        since = f"every step from step {max(generation.step, 0) + 1} on was evaluated"
        lines += [f"{asked}, not kept", f"note: {run.gave_up}, so {since}"]
    else:
        dense = [step + 1 for step, share in enumerate(shares) if share == 1]
        some = sum(0 < share < 1 for share in shares)
        with_some = f", {some} with some of the tokens" if some else ""
        lines += [
            f"{asked}, {report.share.achieved:.3g} spent",
            f"steps: {len(dense)} evaluated{with_some}, {len(shares) - len(dense) - some} extrapolated",
            f"evaluated steps: {', '.join(map(str, dense))}",
        ]
    lines.append(f"calls of the transformer: {run.evaluated} made, {run.extrapolated} extrapolated")
    runtime = report.runtime
    if runtime.dense_seconds and run.gave_up is None:
        lines.append(f"seconds: {runtime.seconds:.1f}, about {runtime.dense_seconds:.1f} if every step were evaluated")
    if report.memory.kv_store != "none":
        lines.append(f"K and V: {report.memory.kv_store}, {report.memory.kv_cache_bytes / 1e9:.2f} GB on the device")
    if not report.finished and run.gave_up is None:
        lines.append(f"note: it was stopped after {generation.steps_done} of {steps} steps")
    # Of a part of the steps (one of two experts) nothing like it is known.
    if report.advice is not None and sigmas[0] > 0.95 and sigmas[-1] < 0.05:
        lines.append(f"note: with {steps} steps there is little to leave out; try fewer steps without it")
    return "\n".join(lines)
