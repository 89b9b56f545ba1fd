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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "auto", "rotation": 4, "divisors": (1, 2)}, "leave out divisors"),
        ({"policy": "hsa", "between": 0.2}, "between belongs to policy='auto'"),
        ({"policy": "rotation"}, "wants rotation="),
        ({"policy": "rotation", "rotation": 3, "divisors": (1, 2)}, "leave out divisors"),
        ({"policy": "hsa", "rotation": 3}, "rotation belongs to policy='rotation'"),
    ],
)
def test_options_of_one_policy_do_not_go_with_another(options, message):
    with pytest.raises(HeterostepError, match=message):
        HSAConfig(share=0.5, **options)


def test_the_former_name_of_the_default_still_works():
    with pytest.warns(DeprecationWarning, match="between=None is the default now"):
        assert HSAConfig(share=0.5, between=None).between == 0
