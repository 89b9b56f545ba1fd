"""Noise levels of flow matching: sigma 1 is noise, 0 the video, and 1 - sigma (alpha) the part of the signal."""

from __future__ import annotations

import torch

# Near pure noise log(1 - sigma) has no end, and velocities go straight over sigma itself (docs/background/method.md).
MARGIN = 0.02
# The highest noise level there is, and what rounding may add to it.
HIGHEST_SIGMA = 1 + 1e-3


def log_alpha(sigma: torch.Tensor) -> torch.Tensor:
    """What velocities, keys and values go nearly straight over: log(1 - sigma + 0.02), which rises as sigma falls.

    1 - sigma is the part of the signal in the latents. Over sigma itself a line through two evaluations overshoots, the
    more so the earlier and the farther it is followed: measured on the bundled model's dense runs
    (docs/background/method.md).

    Args:
        sigma: flow-matching noise levels, 0..1, of any shape.
    """
    return (1 - sigma + MARGIN).log()


def nominal_sigmas(num_steps: int, shift: float = 5.0) -> tuple[float, ...]:
    """Flow-matching sigmas for a forecast, where no scheduler is at hand."""
    times = [1 - step / num_steps for step in range(num_steps + 1)]
    return tuple(shift * time / (1 + (shift - 1) * time) for time in times)
