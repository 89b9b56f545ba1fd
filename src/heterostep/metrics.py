"""How far one video is from another."""

from __future__ import annotations

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB, of the mean squared error over all frames; infinite where a equals b.

    Args:
        a, b: arrays of one shape, such as uint8 [F, H, W, 3].
        peak: the largest value a sample can have: 255 for 8-bit frames, 1 for frames in 0..1.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"the shapes differ: {a.shape} and {b.shape}")
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))
