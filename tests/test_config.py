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
        {"share": 0.5, "between": 1.5},
        {"share": 0.5, "between": "0.2"},
        {"share": 0.5, "extrapolate": -0.5},
        {"share": 0.5, "dense_start": 0},
        {"share": 0.5, "dense_end": -1},
        {"share": 0.5, "regroup_every": 0},
        {"share": 0.5, "solver": "heun"},
        {"share": 0.5, "score": "psychic"},
        {"share": 0.5, "sync": "never"},
    ],
)
def test_wrong_options_are_refused_in_one_line(options):
    with pytest.raises(HeterostepError) as error:
        HSAConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("target", [0.1, 0.5, 1.0])
def test_window_stays_inside_the_run(steps, target):
    for config in (HSAConfig(share=target), HSAConfig(runtime=target)):
        start, stop = config.window(steps)
        assert 0 < start <= stop <= steps
