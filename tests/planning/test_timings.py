"""Timings that are kept for plans, and found again."""

import json

import pytest
import torch

from heterostep.planning import timings
from heterostep.planning.timings import Timed

MODEL = {"class": "WanTransformer3DModel", "num_layers": 3, "patch_size": [1, 2, 2]}
CONFIG = {"num_layers": 3, "patch_size": (1, 2, 2), "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.1"}
POINTS = ((0.25, 0.4), (0.5, 0.6), (1.0, 1.0))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache, and no GPU."""
    monkeypatch.setenv("HETEROSTEP_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "deep" / "cache" / "timings.jsonl"


def made(device="card", tokens=48, points=POINTS, **config):
    return Timed(device, {**MODEL, **config}, tokens, points)


def find(tokens=48, kind="WanTransformer3DModel", dtype=None, batch=None, **config):
    how = {name: value for name, value in (("dtype", dtype), ("batch", batch)) if value is not None}
    return timings.find(kind, {**CONFIG, **config}, tokens, **how)


def test_what_is_kept_is_found(cache):
    assert find() is None and not cache.parent.exists()
    assert timings.keep(made()) == cache
    assert find() == made()
    (line,) = cache.read_text().splitlines()
    kept = {"device": "card", "model": MODEL, "tokens": 48, "points": [list(p) for p in POINTS], "how": {}}
    assert json.loads(line) == kept


def test_the_newest_is_found(cache):
    for seconds in (1.0, 2.0, 3.0):
        timings.keep(made(points=((1.0, seconds),)))
    timings.keep(made(tokens=64, points=((1.0, 9.0),)))
    assert find().points == ((1.0, 3.0),) and find(64).points == ((1.0, 9.0),)
    assert len(cache.read_text().splitlines()) == 4


def test_others_are_not_found():
    timings.keep(made())
    assert find(49) is None
    assert find(num_layers=4) is None
    assert find(more=True) is None
    assert find(kind="WanVACETransformer3DModel") is None


def test_seconds_of_another_dtype_batch_store_or_backend_are_not_taken():
    how = {"dtype": "bfloat16", "batch": 1, "store": "device", "attention_backend": None, "compiled": False}
    timings.keep(Timed("card", MODEL, 48, POINTS, how))
    assert find(dtype="bfloat16", batch=1).points == POINTS
    others = ({"dtype": "float16"}, {"batch": 2}, {"store": "fp8"}, {"attention_backend": "flash"}, {"compiled": True})
    for other in others:
        assert timings.find("WanTransformer3DModel", CONFIG, 48, **{**how, **other}) is None


def test_a_files_bookkeeping_does_not_tell_models_apart():
    timings.keep(made())
    assert find(_name_or_path="somewhere", _diffusers_version="9") == made()
    assert timings.identity("WanTransformer3DModel", CONFIG) == MODEL


@pytest.mark.parametrize(
    "line",
    ['{"device": "card", "mod', "", "null", "5", "[]", "{}", b"\xff\xfe", json.dumps({"model": MODEL, "tokens": 48})],
)
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_damaged_line_is_skipped(cache, line, where):
    line = line if isinstance(line, bytes) else line.encode()
    timings.keep(made())
    good = cache.read_bytes()
    cache.write_bytes(line + b"\n" + good if where == "before" else good + line + b"\n")
    assert find() == made()


def test_what_follows_half_a_line_is_found(cache):
    timings.keep(made())
    # The machine went down as the second one was written.
    cache.write_bytes(cache.read_bytes() + b'{"device": "ca')
    timings.keep(made(points=((1.0, 7.0),)))
    assert find().points == ((1.0, 7.0),)


def test_without_a_gpu_any_device_will_do():
    timings.keep(made(device="old card"))
    timings.keep(made(device="new card"))
    assert find().device == "new card"


def test_with_a_gpu_only_its_own_are_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "old card")
    timings.keep(made(device="new card"))
    assert find() is None
    timings.keep(made(device="old card", points=((1.0, 2.0),)))
    timings.keep(made(device="new card"))
    assert find() == made(device="old card", points=((1.0, 2.0),))


def test_the_users_cache_folder_where_none_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("HETEROSTEP_CACHE")
    monkeypatch.setattr(timings.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert timings.keep(made()) == tmp_path / "heterostep" / "timings.jsonl"
    assert find() == made()


def test_a_folder_that_cannot_be_written_is_an_os_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HETEROSTEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError):
        timings.keep(made())
    assert find() is None


@pytest.mark.parametrize(
    ("share", "seconds"),
    [(0, 0), (0.125, 0.2), (0.25, 0.4), (0.3, 0.44), (0.375, 0.5), (0.5, 0.6), (0.75, 0.8), (1.0, 1.0), (1.01, 1.0)],
)
def test_seconds_between_the_timed_shares(share, seconds):
    assert made().seconds(share) == pytest.approx(seconds)


def test_seconds_of_one_share_alone():
    assert made(points=((1.0, 4.0),)).seconds(0.25) == pytest.approx(1.0)


def test_names_of_devices(monkeypatch):
    assert timings.device_name(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert timings.device_name(torch.device("cuda:1")) == "card 1"
