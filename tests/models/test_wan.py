"""Any subset of tokens through hooks and processors gives the rows of the whole forward."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from heterostep.models import FAMILIES
from patched import Patched
from small import small_pipeline
from small_wan import small_wan

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


@pytest.mark.parametrize("count", [1, 7, 24, TOKENS])
@pytest.mark.parametrize("kind", ["text", "per-token time", "image", "fused"])
@torch.no_grad()
def test_rows_of_a_subset_equal_the_dense_rows(kind, count):
    model = image_model() if kind == "image" else small_pipeline().transformer
    if kind == "fused":
        for block in model.blocks:
            block.attn1.fuse_projections()
            block.attn2.fuse_projections()
    patched = Patched(model, inputs(model, kind == "per-token time"))
    assert torch.equal(patched.dense()[0], patched.plain_output[0]), "a dense call that keeps K/V is the plain call"
    index = patched.random_index(count)
    sparse = patched.sparse(index)[0]
    expected = patched.held.gather(1, index[..., None].expand(-1, -1, patched.held.shape[2]))
    assert patched.rows.shape == (2, count, patched.held.shape[2])
    torch.testing.assert_close(patched.rows, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(sparse, patched.plain_output[0], atol=1e-5, rtol=0)
    patched.restore()
    assert torch.equal(model(**patched.inputs)[0], patched.plain_output[0])


def test_clean_tokens_are_those_at_time_zero():
    adapter = FAMILIES["WanTransformer3DModel"].adapter
    for one_for_all in ([5.0], [[5.0]]):
        assert adapter.clean_tokens(None, {"timestep": torch.tensor(one_for_all)}) is None
    assert adapter.clean_tokens(None, {"timestep": torch.tensor([[0.0, 5.0]])}).tolist() == [[True, False]]


@torch.no_grad()
def test_a_control_video_shorter_than_the_video():
    pipe = small_wan("wan2.1-vace")
    model, g = pipe.transformer, torch.Generator().manual_seed(3)
    arguments = inputs(model, False)
    channels = model.config.vace_in_channels
    arguments["control_hidden_states"] = torch.randn(2, channels, 2, 8, 8, generator=g)
    patched = Patched(model, arguments)
    assert torch.equal(patched.dense()[0], patched.plain_output[0])
    torch.testing.assert_close(patched.sparse(patched.random_index(20))[0], patched.plain_output[0], atol=1e-5, rtol=0)
