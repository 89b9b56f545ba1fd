"""Where K and V are kept: every store against the one on the device, the choice among them, a store that fails."""

import logging
from types import SimpleNamespace

import pytest
import torch

import heterostep
from heterostep.engine import forecast
from heterostep.engine.generation import Generation
from heterostep.errors import HeterostepError
from heterostep.kv import cache as kv_cache
from heterostep.kv.cache import STORES, KVCache, KVShape, Workspace
from heterostep.pipeline import inspect
from rows import ROWS, equal
from small import run, small_pipeline

SPARSE = {"share": 0.5, "sparse_share": 0.5, "dense_start": 1}
LAYERS = [KVShape(vectors=1000, dim=64, dtype=torch.bfloat16)] * 10


def psnr(a, b):
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return float(10 * torch.log10((b.max() - b.min()) ** 2 / (a - b).square().mean()))


@pytest.fixture
def room(monkeypatch):
    """Let "auto" find so many bytes for K and V, as on a GPU; what the call itself holds comes on top."""

    def set_to(size, host=10**12):
        monkeypatch.setattr(forecast, "room_on", lambda device, vram, activations=0: size)
        monkeypatch.setattr(forecast, "host_room", lambda: host)
        nothing = {"plain": 0, "dense": 0, "sparse": 0, "static": 0, "held": 0}
        measured = forecast.call_memory
        monkeypatch.setattr(
            forecast, "call_memory", lambda *args: forecast.CallMemory(**nothing, layers=measured(*args).layers)
        )

    return set_to


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("layers", [1, 3])
def test_each_store_reads_what_was_written(store, layers):
    workspace = Workspace()
    generator = torch.Generator().manual_seed(0)
    caches = [KVCache(store, workspace) for _ in range(layers)]
    expected = {}
    for cache in caches:
        pair = [torch.randn(2, 6, 3, 8, generator=generator) for _ in range(2)]
        expected[cache] = [x.clone() for x in pair]
        for got, x in zip(cache.update(*pair, None), pair):
            assert torch.equal(got, x), "a dense step sees its own K and V"
    index = torch.tensor([[0, 4], [2, 3]])
    for write_back in (True, False, False):
        workspace.begin()
        workspace.write_back = write_back
        for cache in caches:
            rows = [torch.randn(2, 2, 3, 8, generator=generator) for _ in range(2)]
            seen = [x.clone() for x in expected[cache]]
            for sample in range(2):
                for whole, new in zip(seen, rows):
                    whole[sample, index[sample]] = new[sample]
            if write_back or "offload" not in store:
                expected[cache] = seen
            tolerance = 0.07 if "fp8" in store else 0
            for got, x in zip(cache.update(*rows, index), seen):
                torch.testing.assert_close(got, x, rtol=tolerance, atol=tolerance / 4)
    assert all(bool(cache.nbytes) == ("offload" not in store) for cache in caches)
    assert all(bool(cache.host_nbytes) == ("offload" in store) for cache in caches)
    kept = KVShape(2 * 6 * 3, 8, torch.float32).nbytes(store)
    assert {cache.nbytes + cache.host_nbytes for cache in caches} == {kept}


@pytest.mark.parametrize("name", ["wan2.1-t2v", "ltx2.3-t2v", "hunyuan1.5-t2v", "ltx0.9-t2v", "wan2.2-t2v"])
def test_pipelines_in_every_store(name):
    row = ROWS[name]
    pipe, made = row.build(), {}
    for store in STORES:
        with heterostep.enabled(pipe, kv_store=store, **SPARSE):
            made[store] = row.run(pipe, steps=12)
        told = heterostep.report(pipe).memory
        assert told.kv_store == store and not told.fell_back
        assert bool(told.kv_host_bytes) == ("offload" in store)
        assert all(torch.isfinite(torch.as_tensor(x)).all() for x in made[store])
    assert equal(made["offload"], made["device"]), "the same numbers, wherever they are kept"
    assert equal(made["fp8-offload"], made["fp8"])
    assert not equal(made["fp8"], made["device"])


def test_stores_are_chosen_by_room():
    whole, coded = LAYERS[0].nbytes("device"), LAYERS[0].nbytes("fp8")
    assert coded == 2 * 1000 * 66
    all_device = forecast.choose(LAYERS, 10 * whole, 10 * whole, 0)
    assert set(all_device.names) == {"device"} and all_device.device_bytes == 10 * whole
    mixed = forecast.choose(LAYERS, 10 * whole - 1, 10 * whole - 1, 0)
    assert set(mixed.names) == {"device", "fp8"} and mixed.device_bytes < 10 * whole
    # One layer more in the model's precision would not fit.
    assert mixed.device_bytes + whole - coded > 10 * whole - 1
    offloaded = forecast.choose(LAYERS, 6 * coded, 6 * coded, 10**9)
    assert set(offloaded.names) == {"fp8", "fp8-offload"} and offloaded.host_bytes > 0
    assert offloaded.device_bytes <= 6 * coded
    assert forecast.choose(LAYERS, 6 * coded, 6 * coded, 1) is None
    assert forecast.choose(LAYERS, 10 * whole, whole, 10**9) is None
    assert forecast.choose(LAYERS, -1, 9**9, 10**9) is None
    # Decoding is beside a sparse call alone: a dense one leaves the room to what is kept.
    assert set(forecast.choose(LAYERS, 10 * coded, 10 * coded + whole, 0).names) == {"fp8"}
    assert "of 10 layers" in str(offloaded)


def test_smaller_stores_end_somewhere():
    stores, seen = forecast.uniform("device", LAYERS), []
    while stores is not None:
        seen.append(str(stores))
        stores = forecast.smaller(stores)
    assert seen == ["device", "fp8", "fp8-offload"]
    assert str(forecast.smaller(forecast.uniform("offload", LAYERS))) == "fp8-offload"
    assert str(forecast.smaller(forecast.choose(LAYERS, *[10 * LAYERS[0].nbytes("device") - 1] * 2, 0))) == "fp8"


def test_auto_mixes_stores_and_reports_it(room):
    pipe = small_pipeline()
    with heterostep.enabled(pipe, **SPARSE):
        device = run(pipe)
    room(10**12)
    with heterostep.enabled(pipe, **SPARSE):
        run(pipe)
        needed = inspect(pipe).generation.stores.device_bytes
    room(needed - 1)
    with heterostep.enabled(pipe, **SPARSE):
        mixed = run(pipe)
    told = heterostep.report(pipe).memory
    assert told.kv_store.startswith("device for ") and "fp8 for " in told.kv_store
    assert psnr(mixed, device) > 40


@pytest.mark.parametrize("name", ["wan2.1-vace", "wan2.2-ti2v-i2v", "wan2.2-t2v", "ltx2.3-t2v", "ltx0.9-i2v"])
def test_auto_knows_what_each_family_keeps(room, monkeypatch, name):
    row = ROWS[name]
    pipe = row.build()
    room(10**12)
    kept, note = [], Generation.note_kv

    def tokens_kept(generation):
        stores = [store for branch in generation.branches for store in branch.stores if isinstance(store, KVCache)]
        kept.append((generation.stores, sum(store.nbytes for store in stores)))
        note(generation)

    monkeypatch.setattr(Generation, "note_kv", tokens_kept)
    with heterostep.enabled(pipe, **SPARSE):
        row.run(pipe, steps=12)
    assert heterostep.report(pipe).memory.kv_store == "device"
    chosen, most = max(((stores, size) for stores, size in kept if stores), key=lambda pair: pair[1])
    # LTX-2's guidance without the other modality leaves out an attention that the other calls have.
    assert most <= chosen.kept_bytes <= most * (1.2 if name.startswith("ltx2") else 1)


def test_a_model_that_cannot_be_forecast_keeps_k_v_on_the_device(room, caplog):
    row = ROWS["hunyuan1.5-t2v"]
    pipe = row.build()
    room(1)
    with heterostep.enabled(pipe, **SPARSE), caplog.at_level(logging.WARNING, "heterostep"):
        row.run(pipe, steps=12)
    assert "cannot be forecast" in caplog.text
    assert heterostep.report(pipe).memory.kv_store == "device"


def test_too_little_room_is_said_and_whole_steps_need_none(room):
    pipe = small_pipeline()
    room(1)
    for options in (SPARSE, {"share": 0.55, "policy": "hsa"}):
        with (
            heterostep.enabled(pipe, **options),
            pytest.raises(
                HeterostepError, match=r"K and V do not fit: .* host memory \(.* free\): make a .*evaluate whole steps"
            ),
        ):
            run(pipe)
    for options in ({"share": 0.55}, {"runtime": 0.6}):
        with heterostep.enabled(pipe, **options):
            run(pipe, steps=30)
        report = heterostep.report(pipe)
        assert set(report.active_share) == {0.0, 1.0} and report.memory.kv_store == "none"


@pytest.mark.parametrize("name", ["wan2.1-t2v", "wan2.2-i2v", "wan2.2-ti2v-i2v"])
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "nothing"])
def test_what_whole_steps_leave_is_spent_where_there_is_room(name, fp8, room, caplog):
    """And left elsewhere, as where K and V would have to be in fp8: nobody asked for single tokens."""
    row = ROWS[name]
    pipe = row.build()
    with heterostep.enabled(pipe, share=0.56), caplog.at_level(logging.INFO, "heterostep"):
        row.run(pipe, steps=12)
        spent = heterostep.report(pipe)
        assert "is not spent" not in caplog.text
        # Nearly all of these bytes are the text's, for which there is always room.
        room(spent.memory.kv_cache_bytes // 16 if fp8 else 1)
        row.run(pipe, steps=12)
    left = heterostep.report(pipe)
    assert spent.share.unspent < 0.002 and spent.memory.kv_store == "device" and len(set(spent.active_share)) == 3
    assert caplog.text.count("is not spent") == 1
    assert set(left.active_share) == {0.0, 1.0} and left.memory.kv_cache_bytes == 0
    assert left.share.unspent == pytest.approx(0.06)


def test_memory_is_forecast_before_the_step_that_needs_it(room, monkeypatch):
    """In the second step, when all guidance branches are known, and once a run."""
    pipe, asked = small_pipeline(), []
    room(10**12)
    measured = forecast.call_memory

    def counted(*args):
        asked.append(inspect(pipe).generation.step)
        return measured(*args)

    monkeypatch.setattr(forecast, "call_memory", counted)
    with heterostep.enabled(pipe, share=[1, 1, 1, 1, 1, 0.5]):
        run(pipe, steps=6)
    assert asked == [1]


def test_memory_that_cannot_be_pinned_is_said_once(monkeypatch, caplog):
    def unpinned(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("the limit is reached")
        return torch.zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", unpinned)
    kv_cache._warn_of_unpinned.cache_clear()
    part = SimpleNamespace(device=torch.device("cuda"), shape=(2, 3), dtype=torch.float32)
    with caplog.at_level(logging.WARNING, "heterostep"):
        assert [kv_cache._pinned(part).shape for _ in range(2)] == [(2, 3)] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "host memory cannot be pinned; offloaded K/V will be copied more slowly"
    ]
    kv_cache._warn_of_unpinned.cache_clear()


@pytest.mark.parametrize("at", ["dense", "sparse"])
@pytest.mark.parametrize(("first", "then"), [("device", "fp8"), ("fp8", "fp8-offload"), ("offload", "fp8-offload")])
def test_out_of_memory_falls_back_once_and_the_run_is_right(monkeypatch, caplog, at, first, then):
    pipe = small_pipeline()
    with heterostep.enabled(pipe, kv_store=then, **SPARSE):
        expected = run(pipe)
    update, failed = KVCache.update, []

    def failing(cache, key, value, index):
        if cache.store == first and (index is not None) == (at == "sparse"):
            failed.append(cache)
            # In the middle of the call, with other layers' rows already written.
            if len(failed) == 2:
                raise torch.OutOfMemoryError("no memory left")
        return update(cache, key, value, index)

    monkeypatch.setattr(KVCache, "update", failing)
    with heterostep.enabled(pipe, kv_store=first, **SPARSE), caplog.at_level(logging.WARNING, "heterostep"):
        made = run(pipe)
    told = heterostep.report(pipe).memory
    assert told.fell_back and told.kv_store == then and len(failed) == 2
    assert f"out of memory with K and V in the store {first}: going on with {then}" in caplog.text
    assert psnr(made, expected) > 30


def test_out_of_memory_for_the_second_time_is_an_error(monkeypatch):
    pipe = small_pipeline()

    def failing(cache, key, value, index):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(KVCache, "update", failing)
    with heterostep.enabled(pipe, **SPARSE), pytest.raises(torch.OutOfMemoryError):
        run(pipe)
    monkeypatch.undo()
    with heterostep.enabled(pipe, **SPARSE):
        run(pipe)


def test_nothing_is_kept_after_a_run_or_outside_the_window():
    pipe = small_pipeline()
    with heterostep.enabled(pipe, kv_store="fp8-offload", **SPARSE) as enabled:
        run(enabled)
        generation = inspect(pipe).generation
        assert generation.workspace.nbytes == 0
        assert all(store.nbytes + store.host_nbytes == 0 for branch in generation.branches for store in branch.stores)
