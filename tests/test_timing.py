import time

import pytest
import torch

from heterostep.timing import StepClock, StepCost


def test_fit_recovers_a_line_through_the_dense_steps():
    shares = [1.0, 1.0, 1.0, 0.5, 0.0, 0.25]
    cost = StepCost([9.0] + [0.2 + 0.8 * s if s else 0.01 for s in shares[1:]], shares)
    assert cost.dense == pytest.approx(1.0)
    assert cost.fixed == pytest.approx(0.2)
    assert cost.seconds(0.125) == pytest.approx(0.3)
    assert cost.seconds(0) == pytest.approx(0.01)
    assert cost.dense_run(40) == pytest.approx(9.0 + 39)


def test_before_a_sparse_step_cost_follows_the_tokens():
    cost = StepCost([2.0, 1.0], [1.0, 1.0])
    assert cost.seconds(0.25) == pytest.approx(0.25)
    assert cost.seconds(0) == 0


def test_cost_never_falls_with_the_share():
    cost = StepCost([1.0, 1.0, 3.0], [1.0, 1.0, 0.5])
    assert 0 <= cost.seconds(0.1) <= cost.seconds(0.5) <= cost.seconds(1)


def test_clock_measures_between_marks():
    clock = StepClock(torch.device("cpu"))
    clock.mark()
    time.sleep(0.02)
    clock.mark()
    assert len(clock.durations()) == 1 and clock.durations()[0] >= 0.02
