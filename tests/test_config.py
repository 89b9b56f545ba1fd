import dataclasses
import inspect
import re

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
        {"share": 0.5, "sparse_share": 1.5},
        {"share": 0.5, "sparse_share": "0.2"},
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
        {"share": 0.5, "kv_store": ["auto", "device"]},
        {"share": 0.5, "kv_store": [["device"]]},
        {"share": 0.5, "policy": ["auto"]},
        {"share": 0.5, "dense_end": None},
        {"share": 0.5, "regroup_every": None},
        {"share": {0.5, 1.0}},
        {"share": {0.5: 1}},
        {"share": torch.rand(40, 40)},
        {"share": 0.5, "kv_store": {"fp8"}},
        {"share": 0.5, "sync": torch.rand(40, 40).tolist()},
        {"share": 0.5, "cuda_graphs": "yes"},
        {"share": 0.5, "cuda_graphs": None},
        {"share": 10**400},
        {"share": 0.5, "dense_start": 10**400},
    ],
)
def test_wrong_options_are_refused_in_one_line(options):
    with pytest.raises(HeterostepError) as error:
        HSAConfig(**options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "auto", "round_robin": 4, "divisors": (1, 2)}, "leave out divisors"),
        ({"policy": "hsa", "sparse_share": 0.2}, "sparse_share belongs to policy='auto'"),
        ({"policy": "round-robin"}, "needs round_robin="),
        ({"policy": "round-robin", "round_robin": 3, "divisors": (1, 2)}, "leave out divisors"),
        ({"policy": "hsa", "round_robin": 3}, "round_robin belongs to policy='round-robin'"),
    ],
)
def test_options_of_one_policy_do_not_go_with_another(options, message):
    with pytest.raises(HeterostepError, match=message):
        HSAConfig(share=0.5, **options)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"between": 0.2}, {"sparse_share": 0.2}),
        ({"between": None}, {}),
        ({"rotation": 3}, {"round_robin": 3}),
        ({"policy": "rotation", "rotation": 3}, {"policy": "round-robin", "round_robin": 3}),
    ],
)
def test_options_go_on_working_under_their_old_names(old, new):
    with pytest.warns(DeprecationWarning, match="is called") as caught:
        assert HSAConfig.of(None, {"share": 0.5, **old}) == HSAConfig(share=0.5, **new)
    # Python shows it where the line to be changed is.
    assert all(warning.filename == __file__ for warning in caught)


def test_old_names_can_be_read_but_not_given_beside_the_new_ones():
    with pytest.warns(DeprecationWarning, match="sparse_share now"):
        assert HSAConfig(share=0.5, sparse_share=0.2).between == 0.2
    with (
        pytest.warns(DeprecationWarning, match="sparse_share= now"),
        pytest.raises(HeterostepError, match="give sparse_share without between"),
    ):
        HSAConfig(share=0.5, sparse_share=0.2, between=0.3)


def test_numbers_of_any_kind_are_taken():
    config = HSAConfig(share=np.float32(0.5), sparse_share=torch.tensor(0.25), dense_start=np.int64(2), vram=16)
    assert (config.share, config.sparse_share, config.dense_start, config.vram) == (0.5, 0.25, 2, 16.0)
    assert all(type(value) in (int, float) for value in (config.share, config.sparse_share, config.dense_start))
    for shares in (np.ones(4), torch.ones(4), [1, True + 0, 1.0, np.float16(1)]):
        assert HSAConfig(share=shares).share == (1.0,) * 4


def test_a_config_of_another_kind_is_one_line():
    with pytest.raises(HeterostepError, match="must be an HSAConfig, not dict"):
        HSAConfig.of({"share": 0.5}, {})


def test_every_option_says_its_effect_its_default_and_when_to_change_it():
    arguments = re.search(r"^Args:\n(.*?)^Raises:", inspect.getdoc(HSAConfig), re.DOTALL | re.MULTILINE)[1]
    said = {
        name: " ".join(text.split())
        for name, text in re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", arguments, re.DOTALL | re.MULTILINE)
    }
    fields = dataclasses.fields(HSAConfig)
    assert list(said) == [field.name for field in fields]
    for field in fields:
        effect, default, change = re.fullmatch(
            r"(.+) Default: (.+?)\. ((?:Change|Raise|Set|Switch|Try) .+)", said[field.name]
        ).groups()
        assert effect and change
        if field.default is not None:
            expected = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert default.split(",")[0].strip('"') == expected
