"""What HunyuanVideo 1.0 has alone, and the page that it was added by."""

import re
from pathlib import Path

import pytest
import torch

import heterostep
from heterostep.engine.calls import check_adapter
from heterostep.engine.forecast import call_memory
from heterostep.errors import HeterostepError
from heterostep.models import FAMILIES, ModelPatches
from heterostep.models.hunyuan import HunyuanVideoAdapter, JointAttention
from heterostep.planning.dry_run import dry_run_pipeline
from patched import Patched
from small_hunyuan1 import KINDS, LATENT_CHANNELS, TEXT_DIM, run_hunyuan1, small_hunyuan1

NAME = "HunyuanVideoTransformer3DModel"
PAGE = Path(__file__).parents[2] / "docs" / "guide" / "adding-a-model.md"
TOKENS, GIVEN, TEXT = 48, 16, 6


def inputs_of(model, seed=0, batch=2, time=700.0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(batch, *shape, generator=generator)

    return {
        "hidden_states": random(model.config.in_channels, 3, 8, 8),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": random(TEXT, TEXT_DIM),
        # The second prompt is shorter.
        "encoder_attention_mask": torch.tensor([[1.0] * TEXT, [1.0] * 3 + [0.0] * (TEXT - 3)])[:batch],
        "pooled_projections": random(TEXT_DIM),
        "guidance": torch.full((batch,), 6000.0),
    }


@pytest.fixture
def family():
    yield
    FAMILIES[NAME] = before


before = FAMILIES[NAME]


def test_the_page_on_adding_a_model_is_right(family):
    """Its blocks, one after the other, are a family from outside that passes the page's own check."""
    del FAMILIES[NAME]
    pipe = small_hunyuan1()
    with pytest.raises(HeterostepError, match=f"HunyuanVideoPipeline with {NAME} is not supported"):
        heterostep.enable(pipe, share=0.5)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    page = {}
    exec(compile(code, str(PAGE), "exec"), page)
    assert type(FAMILIES[NAME].adapter).__name__ == "HunyuanAdapter"
    page["check"](pipe, run_hunyuan1)
    with pytest.raises(HeterostepError, match="cannot be planned: give HunyuanAdapter a prompt_shapes"):
        dry_run_pipeline(pipe, height=64, width=64, num_frames=9, num_inference_steps=4)


def test_the_check_tells_what_is_wrong(family):
    model = small_hunyuan1().transformer
    inputs = inputs_of(model, batch=1)

    class Adapter(HunyuanVideoAdapter):
        def unpatchify(self, model, grid, velocities):
            return super().unpatchify(model, grid, velocities).flip(2)

    class Attention(JointAttention):
        def attend(self, query, key, value, mask=None):
            if self.call.index is None:
                return super().attend(query, key, value, mask)
            # As if those that are left out were no longer there.
            seen = torch.cat([self.call.index, torch.arange(TOKENS, TOKENS + TEXT)[None]], dim=1)[0]
            return super().attend(query, key[:, seen], value[:, seen], mask[..., seen])

    class Other(HunyuanVideoAdapter):
        def install(self, model, call, on_velocity):
            patches = super().install(model, call, on_velocity)
            patches.replace_processor(
                model.transformer_blocks[0].attn, Attention(patches.attentions[0][1].original, call)
            )
            return ModelPatches(patches.attentions[1:], patches.hooked, patches.undo)

    check_adapter(model, inputs)
    for adapter, said in ((Adapter(), "unpatchify does not make"), (Other(), "attention misses the inactive ones")):
        heterostep.register_family(NAME, adapter, ("HunyuanVideoPipeline",))
        with pytest.raises(HeterostepError, match=said):
            check_adapter(model, inputs)
        assert not model.proj_out._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "image", "channels"])
def test_subsets_of_a_batch_give_their_rows(kind):
    """Each sample has tokens of its own active, of a given first frame too, and text of its own length."""
    model = small_hunyuan1(kind, blocks=2).transformer
    patched = Patched(model, inputs_of(model))
    (plain,) = patched.plain_output
    assert torch.equal(patched.dense()[0], plain)
    of_the_frame = torch.arange(GIVEN).expand(2, -1)
    uneven = torch.stack([torch.arange(9), torch.arange(TOKENS - 9, TOKENS)])
    for index in (patched.random_index(7), of_the_frame, of_the_frame + GIVEN, uneven):
        torch.testing.assert_close(patched.sparse(index)[0], plain, atol=1e-5 * plain.std().item(), rtol=0)


@torch.no_grad()
def test_a_shorter_prompts_padding_is_not_seen():
    model = small_hunyuan1().transformer
    inputs = inputs_of(model)
    patched = Patched(model, inputs)
    patched.dense()
    index = patched.random_index(7)
    (expected,) = patched.sparse(index)
    text = inputs["encoder_hidden_states"].clone()
    text[1, 3:] += 5
    patched.inputs["encoder_hidden_states"] = text
    torch.testing.assert_close(patched.sparse(index)[0], expected)
    text[1, :3] += 5
    assert not torch.allclose(patched.sparse(index)[0], expected)


@torch.no_grad()
def test_a_given_frame_is_of_this_step_also_where_others_drift():
    """After one dense call no change is known yet, so drifting is holding: but for what this call made itself."""
    model = small_hunyuan1("image").transformer
    patched = Patched(model, inputs_of(model))
    index = torch.arange(20, 27).expand(2, -1)
    rows = {}
    for drift in (False, True):
        patched.use("device", drift)
        patched.inputs.update(inputs_of(model))
        patched.dense()
        patched.inputs.update(inputs_of(model, seed=1, time=400.0))
        patched.sparse(index)
        rows[drift] = patched.rows
    torch.testing.assert_close(rows[True], rows[False])


def test_tokens_of_a_given_frame_need_no_velocity():
    adapter = HunyuanVideoAdapter()
    for kind in ("text", "channels"):
        model = small_hunyuan1(kind).transformer
        assert adapter.clean_tokens(model, inputs_of(model)) is None
    model = small_hunyuan1("image").transformer
    clean = adapter.clean_tokens(model, inputs_of(model))
    assert clean.shape == (2, TOKENS) and clean[:, :GIVEN].all() and not clean[:, GIVEN:].any()


def test_a_given_frames_tokens_come_last():
    pipe = small_hunyuan1("image")
    with heterostep.enabled(pipe, share=0.5, sparse_share=0.5, dense_start=1):
        run_hunyuan1(pipe, steps=12)
    given, *others = heterostep.report(pipe).steps_map
    assert given.max() < min(frame.mean() for frame in others)


@pytest.mark.parametrize("kind", ["text", pytest.param("image", marks=pytest.mark.slow)])
def test_memory_is_forecast_of_blocks_of_both_kinds(kind):
    model = small_hunyuan1(kind, blocks=3).transformer
    memory = call_memory(model, inputs_of(model))
    assert len(memory.layers) == 6
    assert {layer.vectors for layer in memory.layers} == {2 * 2 * (TOKENS + TEXT)}


@pytest.mark.parametrize(("kind", "states"), [("text", [256, 256]), ("image", [396, 540]), ("channels", [540, 540])])
def test_plans_know_how_long_a_prompt_is(kind, states):
    """At the pipelines' own templates; of an image's 576 states every second or fourth goes before the prompt's."""
    pipe = small_hunyuan1(kind)
    sizes = dict(height=720, width=1280, num_frames=129, num_inference_steps=50)
    calls = dry_run_pipeline(pipe, **sizes, true_cfg_scale=2.0).calls
    assert [call["encoder_hidden_states"].shape[1] for call in calls] == states
    channels = 2 * LATENT_CHANNELS + 1 if kind == "channels" else LATENT_CHANNELS
    assert calls[0]["hidden_states"].shape == (1, channels, 33, 90, 160)


def test_checkpoints_that_are_given_a_frame_are_known_as_such():
    for kind in KINDS:
        model = small_hunyuan1(kind).transformer
        assert HunyuanVideoAdapter().is_image_conditioned(model, {}) is (kind != "text")
