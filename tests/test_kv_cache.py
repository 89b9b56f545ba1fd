import pytest
import torch

from heterostep.kernels import gather_rows, write_rows
from heterostep.kv_cache import STORES, KVCache, KVShape


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


def test_gather_is_the_inverse_of_write_and_broadcasts_over_the_batch():
    store, index = torch.zeros(2, 3, 5, 4), torch.tensor([[1, 3], [0, 4]])
    new = rows(2)
    write_rows(store, index, new.transpose(1, 2))
    assert torch.equal(gather_rows(store.transpose(1, 2), index), new)
    table = torch.arange(5.0)[None, :, None]
    assert gather_rows(table, index)[..., 0].tolist() == [[1, 3], [0, 4]]


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
