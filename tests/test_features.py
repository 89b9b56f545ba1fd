"""What users switch on in diffusers beside us: each combination works, or is refused in one line."""

import pytest
import torch

import heterostep
from heterostep.errors import HeterostepError
from rows import ROWS, equal, transformers

# One of each family, and the two with more than one transformer or kind of block.
FAMILIES = ("wan2.1-t2v", "wan2.2-i2v", "wan2.1-vace", "ltx2.3-i2v", "ltx0.9-t2v", "hunyuan1.5-t2v", "hunyuan1.0-t2v")
STEPS = 12


# Two models, and two kinds of blocks: what is done to a model is done to those alike.
SLOW = ("wan2.2-i2v", "wan2.1-vace", "ltx2.3-i2v", "hunyuan1.0-t2v")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES])
def row(request):
    return ROWS[request.param]


def shown_to_work(row, pipe, plain, **options):
    """Bit-identical at all tokens active; at half of them a run that is right and can be repeated."""
    with heterostep.enabled(pipe, share=1.0):
        assert equal(row.run(pipe, steps=4, **options), plain)
    with heterostep.enabled(pipe, share=0.5, sparse_share=0.3):
        half = row.run(pipe, steps=STEPS, **options)
        assert heterostep.report(pipe).share.achieved == pytest.approx(0.5, abs=0.001)
        assert equal(row.run(pipe, steps=STEPS, **options), half)
    assert equal(row.run(pipe, steps=4, **options), plain)
    return half


def test_bfloat16(row):
    pipe = row.build().to(torch.bfloat16)
    shown_to_work(row, pipe, row.run(pipe, steps=4))


def test_attention_backend(row):
    pipe = row.build()
    default = row.run(pipe, steps=4)
    for model in transformers(pipe):
        model.set_attention_backend("_native_math")
    plain = row.run(pipe, steps=4)
    shown_to_work(row, pipe, plain)
    # And chosen while enabled: it reaches the processors that are set then, and stays.
    for model in transformers(pipe):
        model.reset_attention_backend()
    with heterostep.enabled(pipe, share=1.0):
        for model in transformers(pipe):
            model.set_attention_backend("_native_math")
        assert equal(row.run(pipe, steps=4), plain)
    assert equal(row.run(pipe, steps=4), plain)
    for a, b in zip(default, plain):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_layerwise_casting(row):
    pipe = row.build()
    full = row.run(pipe, steps=4)
    for model in transformers(pipe):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = row.run(pipe, steps=4)
    assert not torch.equal(plain[0], full[0])
    shown_to_work(row, pipe, plain)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("enable_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_group_offload(row, level, enable_first):
    pipe = row.build()
    plain = row.run(pipe, steps=4)
    with heterostep.enabled(pipe, share=0.5, sparse_share=0.3):
        half = row.run(pipe, steps=STEPS)
    if enable_first:
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    for model in transformers(pipe):
        model.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=level,
            **({"num_blocks_per_group": 1} if level == "block_level" else {}),
        )
    if enable_first:
        assert equal(row.run(pipe, steps=STEPS), half)
        heterostep.disable(pipe)
    assert equal(shown_to_work(row, pipe, plain), half)


@pytest.mark.parametrize("enable_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sequential_offload(row, enable_first):
    from accelerate import cpu_offload

    pipe = row.build()
    plain = row.run(pipe, steps=4)
    with heterostep.enabled(pipe, share=0.5, sparse_share=0.3):
        half = row.run(pipe, steps=STEPS)
    if enable_first:
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    # What enable_sequential_cpu_offload does to a model: its weights are away until a layer is called.
    for model in transformers(pipe):
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        assert next(model.parameters()).device.type == "meta"
    if enable_first:
        assert equal(row.run(pipe, steps=STEPS), half)
        heterostep.disable(pipe)
    assert equal(shown_to_work(row, pipe, plain), half)


def test_model_offload(row):
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module

    pipe = row.build()
    with heterostep.enabled(pipe, share=0.5, sparse_share=0.3):
        half = row.run(pipe, steps=STEPS)
    # What enable_model_cpu_offload does to each model, and again after each generation.
    hook = CpuOffload(execution_device="cpu")
    for enable_first in (True, False):
        if enable_first:
            heterostep.enable(pipe, share=0.5, sparse_share=0.3)
        for model in transformers(pipe):
            add_hook_to_module(model, hook)
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
        for _ in range(2):
            assert equal(row.run(pipe, steps=STEPS), half)
            for model in transformers(pipe):
                remove_hook_from_module(model)
                add_hook_to_module(model, hook)
        heterostep.disable(pipe)
        for model in transformers(pipe):
            remove_hook_from_module(model)


def test_lora_loaded_and_scaled(row, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = row.build()
    bare = row.run(pipe, steps=4)
    donor = row.build()
    torch.manual_seed(7)
    donor.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    if hasattr(pipe, "load_lora_weights"):
        donor.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(donor.transformer))
        pipe.load_lora_weights(tmp_path, adapter_name="style")
        pipe.set_adapters("style", 0.7)
    else:
        donor.transformer.save_lora_adapter(tmp_path, "default")
        pipe.transformer.load_lora_adapter(
            tmp_path, prefix=None, adapter_name="style", weight_name="pytorch_lora_weights.safetensors"
        )
        pipe.transformer.set_adapters("style", 0.7)
    plain = row.run(pipe, steps=4)
    assert not torch.equal(plain[0], bare[0])
    shown_to_work(row, pipe, plain)
    scaled = row.run(pipe, steps=4, attention_kwargs={"scale": 0.3})
    assert not torch.equal(scaled[0], plain[0])
    shown_to_work(row, pipe, scaled, attention_kwargs={"scale": 0.3})


# Graphs of a run with heterostep beyond those of the plain pipeline: each kind of block and each guidance call has its
# plain, dense and sparse graph; a second number of active tokens makes the sparse one fit for any.
GRAPHS = {
    "wan2.1-t2v": 6,
    "wan2.1-vace": 14,
    "ltx2.0-t2v": 10,
    "ltx0.9-t2v": 6,
    "hunyuan1.5-t2v": 8,
    "hunyuan1.0-t2v": 10,
}
ONE_CALL = dict(stg_scale=0.0, audio_stg_scale=0.0, modality_scale=1.0, audio_modality_scale=1.0)


COMPILED_QUICKLY = ("wan2.1-t2v",)


@pytest.mark.parametrize(
    "name", [name if name in COMPILED_QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in GRAPHS]
)
def test_compiled_blocks(name):
    from torch._dynamo.utils import counters

    row = ROWS[name]
    pipe = row.build()
    options = {"steps": 20} | (ONE_CALL if name.startswith("ltx2") else {})
    with heterostep.enabled(pipe, share=0.5, sparse_share=0.3):
        expected = row.run(pipe, **options)
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    for model in transformers(pipe):
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    row.run(pipe, **{**options, "steps": 2})
    counters.clear()
    for share in (0.5, 0.37):
        heterostep.enable(pipe, share=share, sparse_share=0.3)
        compiled = row.run(pipe, **options)
        if share == 0.5:
            for a, b in zip(compiled, expected):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert 0 < counters["stats"]["unique_graphs"] <= GRAPHS[name]
    # Other counts of active tokens and other generations need no other graphs (but one token alone: torch's own case).
    before = counters["stats"]["unique_graphs"]
    for share in (0.63, 0.7):
        heterostep.enable(pipe, share=share, sparse_share=0.3)
        row.run(pipe, **options)
    assert counters["stats"]["unique_graphs"] == before
    heterostep.disable(pipe)
    assert torch._dynamo.config.recompile_limit == limit
    torch._dynamo.reset()


def test_what_does_not_go_together_is_refused(row):
    from diffusers import ContextParallelConfig, FirstBlockCacheConfig, ParallelConfig

    pipe = row.build()
    model = transformers(pipe)[-1]
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    if type(pipe).__name__.startswith("Wan"):  # it raises on the others by itself
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(HeterostepError, match="another cache"):
            row.run(pipe, steps=STEPS)
        heterostep.disable(pipe)
        with pytest.raises(HeterostepError, match="another cache"):
            heterostep.enable(pipe, share=0.5, sparse_share=0.3)
        model.disable_cache()
    model.compile(backend="eager")
    with pytest.raises(HeterostepError, match="compile_repeated_blocks"):
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    model._compiled_call_impl = None
    model._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    with pytest.raises(HeterostepError, match="ring attention is not supported"):
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    model._parallel_config = None
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(HeterostepError, match="compile_repeated_blocks"):
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
