"""Benchmarks of real transformer calls, on the CPU and cut to a size that takes a moment."""

import json
import math

import pytest
import torch

from heterostep import configs
from heterostep.bench import KINDS, Size, bench
from heterostep.engine.forecast import call_memory
from heterostep.errors import HeterostepError
from heterostep.kv.cache import STORES, KVShape
from heterostep.planning import timings
from heterostep.planning.dry_run import dry_run
from small_ltx2 import small_ltx2
from small_wan import small_wan

TINY = dict(shares=(0.5,), repeats=1, dtype=torch.float32)
NAMES = [kind for kind, _ in KINDS] + ["other"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Timings go here."""
    monkeypatch.setenv("HETEROSTEP_CACHE", str(tmp_path / "cache"))
    # What was timed on the CPU is found on a machine with a GPU as well.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "cache" / "timings.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small pipeline, saved."""
    path = tmp_path_factory.mktemp("model")
    small_wan("wan2.1-t2v").save_pretrained(path)
    return str(path)


def check(result, tokens, kept, static, shares, stores):
    """What holds for every result. `kept`: shapes of each attention of the first call; `static`: bytes of the text."""
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["tokens"] == tokens and result["device"] == "cpu" and result["torch"] == torch.__version__
    assert result["plain_seconds"] > 0
    assert [(row["store"], row["share"]) for row in result["rows"]] == [
        (store, share) for store in stores for share in (1.0, *shares)
    ]
    for row in result["rows"]:
        assert set(row) == {"store", "share", "seconds", "ratio", "replayed", "device_bytes", "host_bytes"}
        assert row["seconds"] > 0 and row["ratio"] == row["seconds"] / result["plain_seconds"]
        store = row["store"]
        size = sum(shape.nbytes(store) for shape in kept)
        decoded = sum(shape.nbytes("device") for shape in set(kept)) if "fp8" in store else 0
        staged = 0
        if "offload" in store:
            # Each of the two places grows to the largest layer that came there; each part is aligned.
            largest = max(kept, key=lambda shape: shape.nbytes(store))
            parts = [largest.vectors * largest.dim * largest.dtype.itemsize]
            if "fp8" in store:
                parts = [largest.vectors * largest.dim, largest.vectors * 2]
            staged = min(2, len(kept)) * 2 * sum(-(-part // 256) * 256 for part in parts)
        assert row["device_bytes"] == (0 if "offload" in store else size) + decoded + staged + static
        assert row["host_bytes"] == (size if "offload" in store else 0)
    assert list(result["breakdown"]) == ["plain", "dense", *(f"{share:g}" for share in shares)]
    for parts in result["breakdown"].values():
        assert list(parts) == NAMES and all(seconds >= 0 for seconds in parts.values())
        assert parts["attention"] > 0 and parts["linear"] > 0 and sum(parts.values()) > parts["linear"]


def test_a_real_configuration(cache):
    lines = []
    result = bench("wan2.1-t2v-1.3b", Size(64, 64, 5), layers=1, stores=STORES, tell=lines.append, **TINY)
    tokens = 2 * 4 * 4
    check(result, tokens, [KVShape(12 * tokens, 128, torch.float32)], 2 * 512 * 1536 * 4, (0.5,), STORES)
    assert {key: result[key] for key in ("name", "layers", "height", "width", "num_frames", "batch", "calls")} == {
        "name": "wan2.1-t2v-1.3b", "layers": 1, "height": 64, "width": 64, "num_frames": 5, "batch": 1, "calls": 2,
    }  # fmt: skip
    assert (result["repeats"], result["dtype"], result["compiled"], result["attention_backend"]) == (
        1, "float32", False, None,
    )  # fmt: skip
    assert lines[0] == "building wan2.1-t2v-1.3b with 1 layers on cpu"
    assert [line.split(":")[0] for line in lines[1:]] == ["warming up"] * 2 + ["round 1/1"]
    kept = {line["how"]["store"]: line for line in map(json.loads, cache.read_text().splitlines())}
    assert list(kept) == list(STORES)
    assert kept[STORES[0]]["points"] == [[0.5, result["rows"][1]["seconds"]], [1.0, result["plain_seconds"]]]
    assert kept[STORES[0]]["how"]["dtype"] == "float32" and kept[STORES[0]]["how"]["batch"] == 1
    component = {**configs.load("wan2.1-t2v-1.3b").transformer, "num_layers": 1}
    config = dict(configs.build(component).config)
    found = timings.find("WanTransformer3DModel", config, tokens)
    assert found.device == "cpu" and found.seconds(1.0) == result["plain_seconds"]
    assert timings.find("WanTransformer3DModel", {**config, "num_layers": 30}, tokens) is None


def test_ltx2_of_one_layer(tmp_path, cache):
    # A layer of the real one has a billion weights.
    small_ltx2().save_pretrained(tmp_path / "model")
    result = bench(str(tmp_path / "model"), Size(64, 64, 9), layers=1, **TINY)
    tokens = 2 * 4 * 4
    # Its own attention of two guidance branches, and that of the sound to it.
    kept = [KVShape(2 * 2 * tokens, dim, torch.float32) for dim in (16, 8)]
    seen = dry_run(configs.load(tmp_path / "model"), height=64, width=64, num_frames=9, num_inference_steps=4,
                    guidance_scale=4.0, dtype=torch.float32)  # fmt: skip
    static = call_memory(seen.model, seen.calls[0]).static // 3
    check(result, tokens, kept, static, (0.5,), ("device",))
    assert (result["batch"], result["calls"], result["layers"]) == (2, 3, 1)
    assert len(cache.read_text().splitlines()) == 1


def test_all_layers_many_shares_and_several_rounds(folder, cache):
    result = bench(
        folder, Size(64, 64, 9), shares=(0.25, 0.5), stores=("fp8", "device"), repeats=3, dtype=torch.float32
    )
    check(result, 48, [KVShape(2 * 48, 24, torch.float32)] * 3, 3 * 2 * 512 * 48 * 4, (0.25, 0.5), ("fp8", "device"))
    assert result["layers"] == 3 and result["repeats"] == 3
    line, _ = cache.read_text().splitlines()
    points = json.loads(line)["points"]
    # Of each store, ascending.
    seconds = {(row["store"], row["share"]): row["seconds"] for row in result["rows"]}
    assert points == [[0.25, seconds["fp8", 0.25]], [0.5, seconds["fp8", 0.5]], [1.0, result["plain_seconds"]]]


def test_without_a_breakdown_and_in_bfloat16(folder):
    result = bench(folder, Size(64, 64, 9), shares=(0.5,), repeats=1, breakdown=False)
    assert result["breakdown"] == {} and result["dtype"] == "bfloat16"
    assert {row["device_bytes"] for row in result["rows"]} == {3 * 2 * (48 + 512) * 48 * 2}


def test_a_plan_knows_the_seconds(folder):
    from heterostep.planning.plan import plan

    size = dict(height=64, width=64, num_frames=9)
    assert plan(folder, share=0.5, **size).seconds is None
    result = bench(folder, Size(64, 64, 9), breakdown=False, **TINY)
    # The bench ran in float32, and seconds of another precision are no forecast.
    assert plan(folder, share=0.5, num_inference_steps=20, **size).seconds is None
    made = plan(folder, share=0.5, num_inference_steps=20, dtype=torch.float32, **size)
    assert made.dense_seconds == pytest.approx(2 * 20 * result["plain_seconds"])
    assert made.seconds == pytest.approx(made.dense_seconds / 2) and made.device == "cpu"


def test_timings_that_cannot_be_kept_do_not_matter(folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HETEROSTEP_CACHE", str(tmp_path / "file"))
    assert bench(folder, Size(64, 64, 9), breakdown=False, **TINY)["tokens"] == 48


def test_an_attention_backend(folder):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Backends

    before = Backends.get_active_backend()
    result = bench(folder, Size(64, 64, 9), attention_backend="_native_math", breakdown=False, **TINY)
    assert result["attention_backend"] == "_native_math"
    # Other models keep theirs.
    assert Backends.get_active_backend() == before


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "wan2.1-t2v-1.3b",
            dict(stores=("device", "tape")),
            "no such store: tape; the stores are device, fp8, offload",
        ),
        ("wan2.1-t2v-1.3b", dict(stores=("auto",)), "no such store: auto"),
        ("wan2.1-t2v-1.3b", dict(stores=()), "store"),
        ("wan2.1-t2v-1.3b", dict(shares=(0.5, 1.0)), "shares must be above 0 and below 1"),
        ("wan2.1-t2v-1.3b", dict(shares=(0.0,)), "shares must be above 0 and below 1"),
        ("wan2.1-t2v-1.3b", dict(shares=(math.nan,)), "shares must be above 0 and below 1"),
        ("wan2.1-t2v-1.3b", dict(layers=31), "wan2.1-t2v-1.3b has 30 layers, not 31"),
        ("wan2.1-t2v-1.3b", dict(layers=0), "wan2.1-t2v-1.3b has 30 layers, not 0"),
        ("wan2.1-t2v-1.3b", dict(repeats=0), "repeats must be at least 1, not 0"),
        ("wan2.1-t2v-1.3b", dict(size=Size(100, 64, 5)), "divisible by 16"),
        ("wan2.1-t2v-1.3b", dict(size=Size(num_frames=0)), "num_frames must be at least 1, not 0"),
        ("magic", dict(), "magic is neither a diffusers folder nor a bundled configuration"),
        (None, dict(attention_backend="nonsense"), "no such attention backend: nonsense"),
        (None, dict(attention_backend="sage"), "age"),
    ],
)
def test_faults_are_one_line_and_nothing_is_kept(folder, cache, name, options, message):
    with pytest.raises(HeterostepError) as caught:
        bench(name or folder, **{**TINY, "size": Size(64, 64, 5), "layers": 1, "breakdown": False, **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not cache.exists()


def test_vaces_layers_cannot_be_cut():
    with pytest.raises(HeterostepError, match="VACE layers") as caught:
        bench("wan2.1-vace-1.3b", Size(64, 64, 5), layers=1, **TINY)
    assert "\n" not in str(caught.value)
