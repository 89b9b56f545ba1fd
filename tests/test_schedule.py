import pytest

from heterostep.allocation import Tokens
from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError
from heterostep.schedule import Schedule


def test_lowest_share_is_the_boundary_of_what_is_feasible():
    config = HSAConfig(share=0.25, dense_start=2, dense_end=0)
    lowest = Schedule(config, 40).lowest_share
    assert lowest == pytest.approx((2 + 5) / 40)
    Schedule(HSAConfig(share=lowest, dense_start=2, dense_end=0), 40).check()
    with pytest.raises(HeterostepError, match="lowest possible"):
        Schedule(HSAConfig(share=lowest - 0.001, dense_start=2, dense_end=0), 40).check()
    with pytest.raises(HeterostepError, match="runtime=0.01"):
        Schedule(HSAConfig(runtime=0.01), 40).check()


def test_a_replay_needs_one_share_a_step_and_two_dense_ones():
    config = HSAConfig(share=[1, 1, 0.5, 0])
    Schedule(config, 4).check()
    assert config.target == pytest.approx(0.625)
    with pytest.raises(HeterostepError, match="4 active shares"):
        Schedule(config, 5).check()
    with pytest.raises(HeterostepError, match="first two"):
        Schedule(HSAConfig(share=[1, 0.5, 1]), 3).check()


def test_the_second_expert_costs_one_dense_step():
    config = HSAConfig(share=0.5, dense_start=2, dense_end=0)
    assert Schedule(config, 40, restarts=(13,)).lowest_share > Schedule(config, 40).lowest_share
    counts = Schedule(config, 40, Tokens(100), (13,)).plan()
    assert counts[13] == 100 and counts[:3] == [100, 100, 100] and sum(counts) == 2000
    with pytest.raises(HeterostepError, match="second transformer"):
        Schedule(HSAConfig(share=0.01), 40, restarts=(13,)).check()
    with pytest.raises(HeterostepError, match="step 2 must be 1"):
        Schedule(HSAConfig(share=[1, 1, 0.5, 0.5]), 4, restarts=(2,)).check()


def test_what_is_behind_and_outside_the_window_is_not_corrected():
    schedule = Schedule(HSAConfig(runtime=0.5), 40, Tokens(640))
    counts = schedule.plan()
    start, stop = schedule.window
    corrected = schedule.corrected(counts, start + 8, 5000.0, float)
    assert corrected[: start + 8] == counts[: start + 8] and corrected[stop:] == counts[stop:]
    assert 5000 - 640 < sum(corrected[start + 8 : stop]) <= 5000
