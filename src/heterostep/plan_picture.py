"""A picture of a run's plan: which steps were evaluated, over the noise levels, and how much changed between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

DENSE, SPARSE, SKIPPED, NOISE, CHANGE = "#3366aa", "#8fb3dd", "#e3e3e3", "#222222", "#c8502d"


def plan_picture(
    active_share: Sequence[float],
    sigmas: Sequence[float],
    changes: Sequence[tuple[int, float]] = (),
    size: tuple[float, float] = (9.6, 3.2),
) -> np.ndarray:
    """Draw a plan.

    Args:
        active_share: tokens evaluated over all tokens, 0..1, of each step that was made.
        sigmas: noise levels of all steps, one more than there are steps.
        changes: (step, relative change of the guided velocity since the dense step before).
        size: width and height in inches of 100 pixels.

    Returns:
        uint8 [height, width, 3].
    """
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = np.arange(1, len(sigmas))
    shares = np.full(len(steps), np.nan)
    shares[: len(active_share)] = active_share
    done = ~np.isnan(shares)
    axes.bar(steps[done], 1, width=0.86, color=SKIPPED)
    colours = [DENSE if share == 1 else SPARSE for share in shares[done]]
    axes.bar(steps[done], shares[done], width=0.86, color=colours)
    axes.plot(np.append(steps, steps[-1] + 1) - 0.5, sigmas, color=NOISE, linewidth=1.4)
    handles: list[Artist] = [Patch(color=DENSE, label="evaluated"), Patch(color=SKIPPED, label="extrapolated")]
    if any(0 < share < 1 for share in active_share):
        handles.insert(1, Patch(color=SPARSE, label="part of the tokens"))
    handles.append(Line2D([], [], color=NOISE, label="noise level"))
    if changes:
        at, values = zip(*changes)
        axes.plot(np.array(at) + 1, np.minimum(values, 1), "o", markersize=4, color=CHANGE)
        handles.append(
            Line2D([], [], linestyle="", marker="o", color=CHANGE, label="change since the last evaluated step")
        )
    axes.set(xlabel="step", ylim=(0, 1.05), xlim=(0.4, len(steps) + 0.6))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
