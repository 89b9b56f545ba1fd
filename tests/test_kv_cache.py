import pytest
import torch

from heterostep.kernels import gather_rows
from heterostep.kernels.reference import write_rows
from heterostep.kv_cache import KVCache


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
