"""Any subset of tokens through hooks and processors gives the rows of the whole forward."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from heterostep.adapters import ADAPTERS, Call
from heterostep.state import Branch
from small import small_pipeline

SIZE = (2, 16, 3, 8, 8)
TOKENS = 3 * 4 * 4


def image_model():
    torch.manual_seed(1)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=40,
        added_kv_proj_dim=48,
    ).eval()


def inputs(model, per_token_time):
    g = torch.Generator().manual_seed(3)
    out = {
        "hidden_states": torch.randn(SIZE, generator=g),
        "timestep": torch.tensor([700.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 512, 32, generator=g),
        "return_dict": False,
    }
    if per_token_time:
        out["timestep"] = torch.randint(0, 999, (2, TOKENS), generator=g).float()
    if model.config.image_dim:
        out["encoder_hidden_states_image"] = torch.randn(2, 257, 40, generator=g)
    return out


def random_index(count):
    g = torch.Generator().manual_seed(4)
    return torch.stack([torch.randperm(TOKENS, generator=g)[:count].sort().values for _ in range(2)])


@pytest.mark.parametrize("count", [1, 7, 24, TOKENS])
@pytest.mark.parametrize("kind", ["text", "per-token time", "image", "fused"])
@torch.no_grad()
def test_rows_of_a_subset_equal_the_dense_rows(kind, count):
    model = image_model() if kind == "image" else small_pipeline().transformer
    if kind == "fused":
        for block in model.blocks:
            block.attn1.fuse_projections()
            block.attn2.fuse_projections()
    adapter, call, branch = ADAPTERS["WanTransformer3DModel"], Call(), Branch()
    arguments, seen = inputs(model, kind == "per-token time"), []
    plain = model(**arguments)[0]

    def full(rows):
        seen.append(rows)
        return rows if call.index is None else held.scatter(1, call.index[..., None].expand_as(rows), rows)

    undo = adapter.install(model, call, full)
    call.branch = branch
    assert torch.equal(model(**arguments)[0], plain), "a dense call that keeps K/V is the plain call"
    held = seen[-1]
    call.index = index = random_index(count)
    sparse = model(**adapter.select(arguments, index))[0]
    expected = held.gather(1, index[..., None].expand(-1, -1, held.shape[2]))
    assert seen[-1].shape == (2, count, held.shape[2])
    torch.testing.assert_close(seen[-1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(sparse, plain, atol=1e-5, rtol=0)
    for step in undo:
        step()
    assert torch.equal(model(**arguments)[0], plain)


@torch.no_grad()
def test_queries_see_everyones_keys():
    model = small_pipeline().transformer
    adapter, call = ADAPTERS["WanTransformer3DModel"], Call()
    seen = []
    adapter.install(model, call, lambda rows: seen.append(rows) or rows)
    arguments, index = inputs(model, False), random_index(8)
    call.branch = Branch()
    model(**arguments)
    call.index = index

    def rows():
        model.proj_out.register_forward_hook(lambda m, a, out: seen.append(out))
        with pytest.raises(RuntimeError):
            model(**adapter.select(arguments, index))
        return seen[-1]

    with_cache = rows()
    for cache in call.branch.kv.values():
        key, value = torch.zeros(2, TOKENS, 2, 24), torch.zeros(2, TOKENS, 2, 24)
        cache.update(key, value, None)
    assert (rows() - with_cache).abs().max() > 1e-3


def test_clean_tokens_are_those_at_time_zero():
    adapter = ADAPTERS["WanTransformer3DModel"]
    assert adapter.clean_tokens({"timestep": torch.tensor([5.0])}) is None
    assert adapter.clean_tokens({"timestep": torch.tensor([[0.0, 5.0]])}).tolist() == [[True, False]]
