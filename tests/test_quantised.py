"""Quantised weights, before and after `enable`. Skipped where the library is not installed:

pip install torchao optimum-quanto bitsandbytes gguf
"""

import pytest
import torch

import heterostep
from heterostep.engine.calls import DirectCalls
from quantised import KINDS, LIBRARIES
from rows import ROWS, equal, transformers

STEPS = 12
SINGLE = {"share": 0.5, "sparse_share": 0.3}
FAMILIES = ("wan2.1-t2v", "wan2.1-vace", "wan2.2-i2v", "ltx2.3-i2v", "ltx0.9-t2v", "hunyuan1.5-t2v")

# These libraries warn while they are imported, and of what a CPU lacks.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=FAMILIES)
def row(request):
    return ROWS[request.param]


@pytest.fixture(params=KINDS)
def kind(request):
    pytest.importorskip(LIBRARIES[request.param.split("-")[0]])
    return request.param


def inputs_of_a_call(row, pipe):
    seen = []
    hook = transformers(pipe)[0].register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    plain = row.run(pipe, steps=4)
    hook.remove()
    return plain, seen[0]


def test_quantised_before_and_after_enable(kind, row, monkeypatch):
    pipe = row.build().to(torch.bfloat16)
    bare = row.run(pipe, steps=4)
    heterostep.enable(pipe, **SINGLE)
    before = row.run(pipe, steps=STEPS)
    for model in transformers(pipe):
        KINDS[kind](model)
    after = row.run(pipe, steps=STEPS)
    assert not equal(after, before) and equal(row.run(pipe, steps=STEPS), after)
    heterostep.disable(pipe)
    plain, inputs = inputs_of_a_call(row, pipe)
    assert not equal(plain, bare)
    with heterostep.enabled(pipe, share=1.0):
        assert equal(row.run(pipe, steps=4), plain)
    with heterostep.enabled(pipe, **SINGLE):
        assert equal(row.run(pipe, steps=STEPS), after)
    with heterostep.enabled(pipe, share=0.5):
        half = row.run(pipe, steps=STEPS)
        assert equal(row.run(pipe, steps=STEPS), half)
    assert equal(row.run(pipe, steps=4), plain)
    rows_are_the_dense_ones(transformers(pipe)[0], inputs)
    # As where memory decides between stores: layers that cannot be forecast do not end the run.
    monkeypatch.setattr("heterostep.engine.forecast.room_on", lambda *args: 10**9)
    with heterostep.enabled(pipe, **SINGLE):
        assert equal(row.run(pipe, steps=STEPS), after)


def rows_are_the_dense_ones(model, inputs):
    """A call of some tokens gives the quantised model's own rows of them, as closely as bfloat16 has them."""
    with torch.no_grad():
        calls = DirectCalls(model, inputs)
        calls.dense()
        index = calls.random_index(calls.num_tokens // 3)
        calls.sparse(index)
        held, rows = calls.held.float(), calls.rows.float()
        calls.restore()
    off = (rows - held.gather(1, index[..., None].expand_as(rows))).pow(2).mean().sqrt() / held.std()
    assert off < 0.03


def test_a_gguf_file_as_diffusers_loads_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    row = ROWS["wan2.1-t2v"]
    pipe = row.build()
    sizes = {**pipe.transformer.config, "attention_head_dim": 32}
    model, q8 = WanTransformer3DModel.from_config(sizes), gguf.GGMLQuantizationType.Q8_0
    model.save_config(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "wan")
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, values)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    pipe.transformer = WanTransformer3DModel.from_single_file(
        str(tmp_path / "model.gguf"),
        config=str(tmp_path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        torch_dtype=torch.bfloat16,
    )
    assert type(pipe.transformer.blocks[0].attn1.to_q).__name__ == "GGUFLinear"
    plain, inputs = inputs_of_a_call(row, pipe)
    with heterostep.enabled(pipe, share=1.0):
        assert equal(row.run(pipe, steps=4), plain)
    with heterostep.enabled(pipe, **SINGLE):
        half = row.run(pipe, steps=STEPS)
        assert equal(row.run(pipe, steps=STEPS), half)
    assert equal(row.run(pipe, steps=4), plain)
    rows_are_the_dense_ones(pipe.transformer, inputs)
