import pytest

from heterostep.allocation import Tokens
from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError
from heterostep.schedule import Schedule


def test_lowest_share_is_the_boundary_of_what_is_feasible():
    for divisors, expected in (((1, 2, 4, 8), 2 + 5), (None, 2 + 1)):
        options = dict(divisors=divisors, dense_start=2)
        lowest = Schedule(HSAConfig(share=0.25, **options), 40).lowest_share
        assert lowest == pytest.approx(expected / 40)
        Schedule(HSAConfig(share=lowest, **options), 40).check()
        with pytest.raises(HeterostepError, match="lowest possible"):
            Schedule(HSAConfig(share=lowest - 0.001, **options), 40).check()
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
    for options in ({}, {"between": 0.3}, {"divisors": (1, 2, 4, 8)}):
        schedule = Schedule(HSAConfig(runtime=0.5, dense_end=2, **options), 40, Tokens(640))
        counts = schedule.plan()
        start, stop = schedule.window
        corrected = schedule.corrected(counts, start + 8, 4000.0, float)
        assert corrected[: start + 8] == counts[: start + 8] and corrected[stop:] == counts[stop:] == [640, 640]
        assert 4000 - 640 < sum(corrected[start + 8 : stop]) <= 4000


@pytest.mark.parametrize("target", [0.1, 0.25, 0.5, 0.75, 0.95])
def test_the_dense_start_leaves_something_to_place(target):
    for steps in (10, 20, 40, 100):
        config = HSAConfig(share=target)
        start, stop = config.window(steps)
        assert start <= max(1, 0.65 * target * steps) and stop == steps
        if target * steps >= 2:
            counts = Schedule(config, steps, Tokens(320)).plan()
            assert sum(counts) == int(target * steps * 320 + 1e-6) and counts[: start + 1] == [320] * (start + 1)
