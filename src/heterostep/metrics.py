"""How far one video is from another."""

from __future__ import annotations

import numpy as np

from heterostep.errors import HeterostepError


def psnr(a: np.ndarray, b: np.ndarray, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, of the mean squared error over all frames; infinite where a equals b.

    Args:
        a, b: arrays of one shape, such as uint8 [F, H, W, 3], or floats in 0..1 as `output_type="np"` gives.
        peak: the largest value a sample can have. By default 255 for whole numbers and 1 for floats.

    Raises:
        HeterostepError: the shapes differ; or without `peak`, one has floats and the other not, or floats are above 1.
    """
    if a.shape != b.shape:
        raise HeterostepError(f"the shapes differ: {a.shape} and {b.shape}")
    if peak is None:
        floats = [np.issubdtype(each.dtype, np.floating) for each in (a, b)]
        if floats[0] != floats[1]:
            raise HeterostepError(f"give both as floats in 0..1 or both as 8-bit frames, not {a.dtype} and {b.dtype}")
        if floats[0] and a.size and max(a.max(), b.max()) > 1:
            raise HeterostepError("floats above 1: give peak=, the largest value that a sample can have")
        peak = 1.0 if floats[0] else 255.0
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))
