import numpy as np
import pytest
import torch

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
        {"share": True},
        {"runtime": True},
        {"share": "0.5"},
        {"share": [1, 1, None]},
        {"share": 0.5, "divisors": 4},
        {"share": 0.5, "divisors": (1, 2.5)},
        {"share": 0.5, "dense_start": "3"},
        {"share": 0.5, "dense_end": 1.5},
        {"share": 0.5, "dense_end": float("inf")},
        {"share": 0.5, "regroup_every": 1.5},
        {"share": 0.5, "policy": 3},
        {"share": 0.5, "vram": "16"},
        {"share": 0.5, "kv_store": ["disk"]},
        {"share": 0.5, "kv_store": []},
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


def test_numbers_of_any_kind_are_taken():
    config = HSAConfig(share=np.float32(0.5), between=torch.tensor(0.25), dense_start=np.int64(2), vram=16)
    assert (config.share, config.between, config.dense_start, config.vram) == (0.5, 0.25, 2, 16.0)
    assert all(type(value) in (int, float) for value in (config.share, config.between, config.dense_start))
    for shares in (np.ones(4), torch.ones(4), [1, True + 0, 1.0, np.float16(1)]):
        assert HSAConfig(share=shares).share == (1.0,) * 4


def test_a_config_of_another_kind_is_one_line():
    with pytest.raises(HeterostepError, match="must be an HSAConfig, not dict"):
        HSAConfig.of({"share": 0.5}, {})
