import math

import numpy as np
import pytest

from heterostep.errors import HeterostepError
from heterostep.metrics import psnr


def test_psnr_of_equal_videos_is_infinite():
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(frames, frames) == math.inf


def test_psnr_does_not_wrap_8_bit_differences():
    black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 255, np.uint8)
    assert psnr(black, white) == pytest.approx(0)
    assert psnr(black, np.full_like(black, 1)) == pytest.approx(20 * math.log10(255))


def test_psnr_scales_with_the_peak():
    a, b = np.zeros((4, 4)), np.full((4, 4), 0.1)
    assert psnr(a, b, peak=1.0) == pytest.approx(20)


def test_psnr_knows_the_peak_of_floats_and_of_8_bits():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
    assert psnr(a / 255, b / 255) == pytest.approx(psnr(a, b)) == pytest.approx(psnr(a / 255, b / 255, peak=1))
    for wrong in ((a, b / 255), (a / 255, b / 1.0)):
        with pytest.raises(HeterostepError, match="floats"):
            psnr(*wrong)


def test_psnr_wants_one_shape():
    with pytest.raises(HeterostepError, match="shapes differ"):
        psnr(np.zeros((2, 2)), np.zeros((1, 2)))
