import pytest

from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"runtime": 0.5, "share": 0.5},
        {"runtime": 0},
        {"runtime": 1.2},
        {"share": -0.1},
        {"share": float("nan")},
        {"share": []},
        {"share": [1, 1, 2]},
        {"share": 0.5, "divisors": (2, 3)},
        {"share": 0.5, "divisors": ()},
        {"share": 0.5, "dense_start": 0},
        {"share": 0.5, "dense_end": -1},
        {"share": 0.5, "regroup_every": 0},
        {"share": 0.5, "solver": "heun"},
        {"share": 0.5, "score": "psychic"},
    ],
)
def test_wrong_options_are_refused_in_one_line(options):
    with pytest.raises(HeterostepError) as error:
        HSAConfig(**options)
    assert "\n" not in str(error.value)


def test_lowest_share_is_the_boundary_of_what_is_feasible():
    lowest = HSAConfig(share=0.25).lowest_share(40)
    HSAConfig(share=0.25, dense_start=2, dense_end=0).check_feasible(40)
    with pytest.raises(HeterostepError, match="lowest possible"):
        HSAConfig(share=lowest / 3).check_feasible(40)
    with pytest.raises(HeterostepError, match="runtime=0.01"):
        HSAConfig(runtime=0.01).check_feasible(40)


def test_a_replay_needs_one_share_a_step_and_two_dense_ones():
    config = HSAConfig(share=[1, 1, 0.5, 0])
    config.check_feasible(4)
    assert config.target == pytest.approx(0.625)
    with pytest.raises(HeterostepError, match="4 active shares"):
        config.check_feasible(5)
    with pytest.raises(HeterostepError, match="first two"):
        HSAConfig(share=[1, 0.5, 1]).check_feasible(3)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("target", [0.1, 0.5, 1.0])
def test_window_stays_inside_the_run(steps, target):
    for config in (HSAConfig(share=target), HSAConfig(runtime=target)):
        start, stop = config.window(steps)
        assert 0 < start <= stop <= steps
