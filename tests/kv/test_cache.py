import pytest
import torch

from heterostep.kernels import gather_rows
from heterostep.kernels.reference import write_rows
from heterostep.kv.cache import STORES, KVCache, KVShape, Workspace


def rows(n, seed=0):
    return torch.randn(2, n, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_active_rows_are_overwritten_and_the_others_kept():
    cache, index = KVCache(), torch.tensor([[0, 4], [2, 3]])
    key, value, new_key, new_value = rows(5), rows(5, 1), rows(2, 2), rows(2, 3)
    first = cache.update(key, value, None)
    assert torch.equal(first[0], key) and torch.equal(first[1], value)
    assert first[0].transpose(1, 2).is_contiguous()
    got_key, got_value = cache.update(new_key, new_value, index)
    for sample in range(2):
        for got, new, old in ((got_key, new_key, key), (got_value, new_value, value)):
            expected = old[sample].clone()
            expected[index[sample]] = new[sample]
            assert torch.equal(got[sample], expected)


def test_bytes_and_reset():
    cache = KVCache()
    assert cache.nbytes == 0
    cache.update(rows(5), rows(5), None)
    assert cache.nbytes == 2 * 2 * 5 * 3 * 4 * 4
    cache.reset()
    assert cache.nbytes == 0
    with pytest.raises(RuntimeError, match="empty"):
        cache.update(rows(1), rows(1), torch.tensor([[0], [0]]))


def test_another_shape_or_dtype_starts_anew():
    cache = KVCache()
    cache.update(rows(5), rows(5), None)
    cache.update(rows(7).bfloat16(), rows(7).bfloat16(), None)
    assert cache.nbytes == 2 * 2 * 7 * 3 * 4 * 2


@pytest.mark.parametrize("batch", [1, 2])
def test_gather_is_the_inverse_of_write_and_broadcasts_over_the_batch(batch):
    store, index = torch.zeros(batch, 3, 5, 4), torch.tensor([[1, 3], [0, 4]])[:batch]
    new = rows(2)[:batch]
    write_rows(store, index, new.transpose(1, 2))
    assert torch.equal(gather_rows(store.transpose(1, 2), index), new)
    table = torch.arange(5.0)[None, :, None]
    assert torch.equal(gather_rows(table, index)[..., 0], index.float())


@pytest.mark.parametrize("store", STORES)
def test_reserved_memory_is_what_is_then_used(store):
    plain, cache, index = KVCache(store), KVCache(store), torch.tensor([[0, 4], [2, 3]])
    assert not cache.reserves
    cache.expected = KVShape(2 * 3 * 5, 4, torch.float32)
    assert cache.reserves == ("offload" not in store)
    cache.reserve(torch.device("cpu"))
    assert not cache.reserves
    reserved = [part.data_ptr() for part in cache._parts]
    assert cache.nbytes == (0 if "offload" in store else cache.expected.nbytes(store))
    # Twice: what is there is written over.
    for seed in (0, 5):
        for each in (plain, cache):
            each.update(rows(5, seed), rows(5, seed + 1), None)
        pairs = zip(cache.update(rows(2, 2), rows(2, 3), index), plain.update(rows(2, 2), rows(2, 3), index))
        assert all(torch.equal(a, b) for a, b in pairs)
        assert [part.data_ptr() for part in cache._parts] == reserved


def linear(time, total=5):
    """K and V on straight lines over time, as steep as codes can tell exactly."""
    start, slope = rows(total), torch.sign(rows(total, 1)) * 448 / 1024
    return start + time * slope, 2 * start - time * slope


@pytest.mark.parametrize("store", ["device", "offload"])
def test_drift_reproduces_a_linear_change(store):
    """Of tokens evaluated at different times."""
    workspace = Workspace()
    cache, workspace.extrapolation = KVCache(store, workspace), torch.zeros(2, 5)

    def update(key, value, index):
        workspace.begin()
        return cache.update(key, value, index)

    update(*linear(0.0), None)
    update(*linear(1.0), None)
    # At 3.0 two tokens of each sample are evaluated: their change is that over 2.0, the others' that over 1.0.
    index = torch.tensor([[0, 4], [2, 3]])
    workspace.extrapolation = torch.full((2, 5), 2.0).scatter(1, index, 0.0)
    workspace.write_back = True
    active = [gather_rows(x, index) for x in linear(3.0)]
    for got, expected in zip(update(*active, index), linear(3.0)):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    workspace.extrapolation = torch.full((2, 5), 3.0).scatter(1, index, 0.5)
    # At 4.0 one other is.
    index = torch.tensor([[1], [1]])
    workspace.extrapolation = workspace.extrapolation.scatter(1, index, 0.0)
    for got, expected in zip(update(*(gather_rows(x, index) for x in linear(4.0)), index), linear(4.0)):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("store", STORES)
def test_without_a_second_evaluation_nothing_drifts(store):
    held, workspace, index = KVCache(store), Workspace(), torch.tensor([[0], [4]])
    drifting, workspace.extrapolation = KVCache(store, workspace), torch.full((2, 5), 7.0).scatter(1, index, 0.0)
    for cache in (held, drifting):
        cache.update(rows(5), rows(5, 1), None)
    pairs = zip(*(cache.update(rows(1, 2), rows(1, 3), index) for cache in (held, drifting)))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert drifting.nbytes + drifting.host_nbytes == KVShape(2 * 3 * 5, 4, torch.float32, drifts=True).nbytes(store)


@pytest.mark.parametrize("store", ["fp8", "fp8-offload"])
def test_coded_kv_are_held(store):
    workspace, index = Workspace(), torch.tensor([[0], [4]])
    held, drifting = KVCache(store), KVCache(store, workspace)
    workspace.extrapolation = torch.full((2, 5), 7.0)
    for seed in (0, 4):
        for cache in (held, drifting):
            cache._workspace.begin()
            cache.update(rows(5, seed), rows(5, seed + 1), None)
    pairs = zip(*(cache.update(rows(1, 2), rows(1, 3), index) for cache in (held, drifting)))
    assert all(torch.equal(a, b) for a, b in pairs)
