"""What a report says of a target that was out of reach."""

from types import SimpleNamespace

import pytest

from heterostep.config import HSAConfig
from heterostep.engine.account import out_of_reach
from heterostep.engine.clock import StepCost
from heterostep.policy import Run, Tokens
from heterostep.sigmas import nominal_sigmas


def told(least=1, sparse=0.4, finished=True, ranks=1, **asked):
    """Of a run whose dense steps took half a second, and those that left the video out `sparse`."""
    shares = [1.0, 1.0, *[least / 100] * 8]
    cost = StepCost([0.5, 0.5, *[sparse] * 8], shares, warm=True)
    schedule = SimpleNamespace(run=Run(nominal_sigmas(10), Tokens(100, least)))
    config, size = HSAConfig(**asked), SimpleNamespace(size=ranks)
    return out_of_reach(SimpleNamespace(schedule=schedule, config=config, finished=finished, ranks=size), cost)


def test_a_target_that_no_plan_meets_is_told_of():
    advice = told(runtime=0.5, ranks=2)
    assert "0.80 of a whole one" in advice and "runtime=0.5 was out of reach" in advice and "or one GPU" in advice
    assert "GPU" not in told(runtime=0.5)


@pytest.mark.parametrize(
    "run",
    [
        {"runtime": 0.85},
        {"runtime": 0.5, "sparse": 0.05},
        {"share": 0.5},
        {"runtime": 0.5, "finished": False},
        {"runtime": 0.5, "least": 0},
    ],
)
def test_others_are_not(run):
    assert told(**run) is None
