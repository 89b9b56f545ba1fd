"""The references against formulas in float64; Triton's kernels against the references, on CUDA or interpreted."""

import logging
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_ltx2 import apply_interleaved_rotary_emb, apply_split_rotary_emb
from torch.nn.functional import rms_norm

from heterostep import kernels
from heterostep.kernels import reference

# Triton looks at it when it is imported: in a process of its own, for compiled code elsewhere wants the real Triton.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
on_triton = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs Triton on a CUDA device; test_triton_kernels_interpreted runs it without one",
)

# Heads and head dim: Wan 1.3B's and 14B's, and one where neither is a power of two.
SIZES = [(12, 128), (40, 128), (3, 12)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# More than one block of rows, and not a multiple.
N = 37


def random(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def tables(samples, n, dim, device="cpu", heads=1, split=False):
    angles = 3 * random(samples, n, heads, dim // 2, seed=9)
    angles = angles if split else angles.repeat_interleave(2, -1)
    return angles.cos().to(device), angles.sin().to(device)


def chunk(samples, n, width, **options):
    """The middle third of a fused projection's output."""
    return random(samples, n, 3 * width, **options).chunk(3, dim=-1)[1]


def some_rows(samples, n, total, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(total, generator=generator)[:n] for _ in range(samples)]).to(device)


def is_transposed(x):
    return x.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("tables_of", [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("by_head", [False, True])
def test_norm_and_rotation(weighted, tables_of, split, by_head):
    x, weight = chunk(2, 5, 24), random(24, seed=2) if weighted else None
    samples, heads = tables_of
    cos, sin = tables(samples, 5, 8, heads=heads, split=split)
    got = kernels.norm_rotate(x, weight, 1e-6, cos, sin, 3, split, by_head)

    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 if weight is None else weight.double())
    # Pairs last, of neighbours or of values half a head apart.
    pairs = normed.view(2, 5, 3, 2, 4).transpose(-1, -2) if split else normed.view(2, 5, 3, 4, 2)
    turns = torch.complex(cos.double(), sin.double())[..., :: 1 if split else 2]
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    turned = (turned.transpose(-1, -2) if split else turned).flatten(-2)
    torch.testing.assert_close(got.double(), turned, atol=1e-6, rtol=1e-6)
    assert is_transposed(got) if by_head else got.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_head", [False, True])
def test_norm_and_rotation_are_those_of_the_plain_model(dtype, by_head):
    x, weight, (cos, sin) = chunk(2, 5, 24, dtype=dtype), random(24, dtype=dtype, seed=2), tables(1, 5, 8)
    normed = rms_norm(x, (24,), weight, 1e-6).unflatten(2, (3, -1))
    got = kernels.norm_rotate(x, weight, 1e-6, cos, sin, 3, by_head=by_head)
    assert got.dtype == dtype and torch.equal(got, reference.rotate(normed, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_is_that_of_ltx2(dtype):
    x = random(2, 5, 24, dtype=dtype)
    cos_sin = tables(2, 5, 8, heads=3)
    got = reference.rotate(x.unflatten(2, (3, -1)), *cos_sin)
    assert torch.equal(got.flatten(2), apply_interleaved_rotary_emb(x, tuple(t.flatten(2) for t in cos_sin)))
    cos_sin = tables(2, 5, 8, heads=3, split=True)
    got = reference.rotate(x.unflatten(2, (3, -1)), *cos_sin, split=True)
    assert torch.equal(got.flatten(2), apply_split_rotary_emb(x, tuple(t.transpose(1, 2) for t in cos_sin)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [True, False])
def test_round_trip_through_float8(dtype, transposed):
    # Rows of very different size; what a float16 holds.
    x = chunk(2, 64, 24, dtype=dtype).unflatten(-1, (3, 8)) * torch.logspace(-3, 3, 64)[:, None, None].to(dtype)
    x[0, 1, 2] = x[1, 5] = 0
    x[1, 7, 0] = 1e-40
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    codes, scales = kernels.quantise(x)
    assert codes.shape == (2, 3, 64, 8) and codes.dtype == torch.float8_e4m3fn and codes.is_contiguous()
    assert scales.shape == (2, 3, 64) and scales.dtype == torch.bfloat16 and scales.is_contiguous()
    largest = x.transpose(1, 2).double().abs().amax(-1)
    usual = largest > 1e-6
    torch.testing.assert_close(scales.double()[usual], (largest / 448)[usual], rtol=2**-8, atol=0)

    out = torch.full((2, 3, 64, 8), torch.nan, dtype=dtype)
    assert kernels.dequantise(codes, scales, out) is out
    exact = codes.double() * scales.double()[..., None]
    assert torch.equal(out, exact.to(dtype))
    values = x.transpose(1, 2).double()
    allowed = 1.0001 * torch.maximum(values.abs() * 2**-4, scales.double()[..., None] * 2**-10)
    assert ((exact - values).abs() <= allowed).all()
    assert (out[0, 2, 1] == 0).all() and (out[1, :, 5] == 0).all()


def test_a_scale_rounded_down_clamps():
    # The scale 1 + 2^-9 rounds to 1, which makes 448.875 of the values.
    codes, scales = kernels.quantise(torch.full((1, 1, 1, 4), 448 * (1 + 2**-9)))
    assert scales.item() == 1 and codes.float().unique().item() == 448


def test_rows_are_quantised_in_place():
    x, new, index = random(2, 9, 3, 8), random(2, 4, 3, 8, seed=3), some_rows(2, 4, 9)
    codes, scales = kernels.quantise(x)
    before = codes.clone(), scales.clone()
    stores = kernels.quantise(new, index, codes, scales)
    assert stores[0] is codes and stores[1] is scales
    for got, old, written in zip(stores, before, kernels.quantise(new)):
        for sample in range(2):
            expected = old[sample].float()
            expected[:, index[sample]] = written[sample].float()
            assert torch.equal(got[sample].float(), expected)


def test_index_and_store_go_together():
    x, index = random(1, 2, 3, 8), torch.tensor([[0, 1]])
    codes, scales = kernels.quantise(x)
    for wrong in ({"index": index}, {"codes": codes, "scales": scales}, {"index": index, "scales": scales}):
        with pytest.raises(ValueError, match="together"):
            kernels.quantise(x, **wrong)


def run_all(x, cos, sin, index):
    """Every kernel once."""
    rows, stores = x.unflatten(-1, (3, -1)), torch.zeros(2, 1, 3, 2, 8)
    kernels.write_kv(rows, 2 * rows, index, *stores)
    codes, scales = kernels.quantise(kernels.norm_rotate(x, None, 1e-6, cos, sin, 3))
    kernels.quantise(rows, index, codes, scales)
    return kernels.dequantise(codes, scales, torch.empty(codes.shape)), stores


def inputs():
    return random(1, 2, 24), *tables(1, 2, 8), torch.tensor([[1, 0]])


def test_the_choice_is_logged_once(caplog):
    kernels._log.cache_clear()
    kernels._chosen_for.cache_clear()
    with caplog.at_level(logging.INFO, "heterostep"):
        run_all(*inputs())
        run_all(*inputs())
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", f"{name}: plain PyTorch, as the device is cpu")
        for name in ("write_kv", "norm_rotate", "quantise", "dequantise")
    ]


def test_compiled_code_takes_the_reference_without_a_break(caplog):
    kernels._log.cache_clear()
    kernels._chosen_for.cache_clear()
    with caplog.at_level(logging.INFO, "heterostep"):
        compiled = torch.compile(run_all, backend="aot_eager", fullgraph=True)(*inputs())
    assert not [r for r in caplog.records if r.name == "heterostep"]
    assert all(torch.equal(a, b) for a, b in zip(compiled, run_all(*inputs()), strict=True))


def test_triton_is_not_imported_before_it_is_used():
    code = (
        "import sys, torch; from heterostep import kernels\n"
        "kernels.quantise(torch.ones(1, 1, 1, 8))\n"
        "print('triton' in sys.modules, 'heterostep.kernels.fused' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"device": torch.device("mps")}, "the device is mps"),
        ({"cuda": None}, "the GPU is not NVIDIA's"),
        ({"capability": (8, 6)}, "compute capability (8, 6) is below (8, 9)"),
        ({"dtype": torch.float64}, "the dtype is torch.float64"),
        ({"requires_grad": True}, "gradients are recorded"),
        ({"triton": False}, "Triton cannot be imported: none here"),
    ],
)
def test_reasons_for_plain_pytorch(monkeypatch, change, reason):
    usual = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "requires_grad": False}
    usual |= {"cuda": "13.0", "capability": (9, 0), "triton": True} | change
    monkeypatch.setattr(torch.version, "cuda", usual["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: usual["capability"])
    found = (object(), "") if usual["triton"] else (None, "Triton cannot be imported: none here")
    monkeypatch.setattr(kernels, "_fused", lambda: found)
    where = usual["device"], usual["dtype"], usual["requires_grad"]
    assert kernels._why_reference("quantise", *where) == reason


def test_without_triton(monkeypatch):
    # Uncached, so that other tests' find is kept.
    monkeypatch.setitem(sys.modules, "triton", None)
    module, reason = kernels._fused.__wrapped__()
    assert module is None and reason.startswith("Triton cannot be imported")


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="this process runs Triton's kernels itself")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(
    "which",
    # Their ids must not have the word.
    [pytest.param("fused and not dtype1", id="most"), pytest.param("fused", id="all", marks=pytest.mark.slow)],
)
def test_triton_kernels_interpreted(which):
    """Where time is short without float16, the second of `DTYPES`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", which, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


def convert(values, source, target, rounding):
    """As devices and PyTorch round: Triton's interpreter drops the digits that do not fit, or a rounding's carry."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8e4nv": torch.float8_e4m3fn}
    bits = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
    values = torch.from_numpy(np.array(values)).view(dtypes[source.name]).to(dtypes[target.name])
    as_integers, unsigned = bits[values.element_size()]
    return values.view(as_integers).numpy().view(unsigned)


@pytest.fixture
def fused(monkeypatch):
    if INTERPRETED:
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter, "_convert_float", convert)
    from heterostep.kernels import fused

    return fused


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables_of", ["all", "samples", "heads"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("heads", "dim"), SIZES)
def test_fused_norm_and_rotation(fused, heads, dim, split, tables_of, dtype):
    options = {"dtype": dtype, "device": DEVICE}
    # One program takes one row, and the interpreter is slow.
    n = 3 if INTERPRETED else N
    x = chunk(2, n, heads * dim, **options)
    cos_sin = tables(1 if tables_of == "all" else 2, n, dim, DEVICE, heads if tables_of == "heads" else 1, split)
    for weight, by_head in ((random(heads * dim, seed=2, **options), True), (None, False)):
        got = fused.norm_rotate(x, weight, 1e-6, *cos_sin, heads, split, by_head)
        expected = reference.norm_rotate(x, weight, 1e-6, *cos_sin, heads, split, by_head)
        assert got.dtype == dtype and got.stride() == expected.stride()
        # Where the norm rounds to a neighbour, the rotation carries that into both values of the pair.
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=4 * ulp, atol=4 * ulp)
        assert dtype == torch.float32 or (got == expected).float().mean() > 0.98


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(("heads", "dim"), SIZES)
def test_fused_writes_are_the_references(fused, heads, dim, samples, dtype):
    n = 3 if INTERPRETED else N
    options = {"dtype": dtype, "device": DEVICE}
    key = random(samples, heads, n, dim, **options).transpose(1, 2)
    value = chunk(samples, n, heads * dim, seed=1, **options).unflatten(-1, (heads, dim))
    index = some_rows(samples, n, 2 * n, DEVICE)
    got, expected = random(2, samples, heads, 2 * n, dim, seed=2, **options).repeat(2, 1, 1, 1, 1, 1)
    fused.write_kv(key, value, index, *got)
    reference.write_kv(key, value, index, *expected)
    assert torch.equal(got, expected)


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("heads", "dim"), [(5, 128), (3, 12)])
def test_fused_float8_is_the_references(fused, heads, dim, transposed, dtype):
    x = chunk(2, N, heads * dim, dtype=dtype, device=DEVICE).unflatten(-1, (heads, dim))
    x = x * torch.logspace(-3, 3, N, device=DEVICE)[:, None, None].to(dtype)
    x[0, 1, 2] = x[1, 5] = 0
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    got, expected = fused.quantise(x), reference.quantise(x)
    same_float8(got, expected)

    index = some_rows(2, N, 2 * N, DEVICE)
    old = random(2, 2 * N, heads, dim, dtype=dtype, seed=4, device=DEVICE)
    stores = [reference.quantise(old) for _ in range(2)]
    got = fused.quantise(x, index, *stores[0])
    assert got[0] is stores[0][0] and got[1] is stores[0][1]
    same_float8(got, reference.quantise(x, index, *stores[1]))

    outs = [torch.full((2, heads, 2 * N, dim), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    assert fused.dequantise(*stores[0], outs[0]) is outs[0]
    assert torch.equal(outs[0], reference.dequantise(*stores[0], outs[1]))


def same_float8(got, expected):
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        assert torch.equal(a.float(), b.float())


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(5, 128), (3, 12)])
def test_fused_advance_is_the_references(fused, heads, dim, dtype):
    options = {"dtype": dtype, "device": DEVICE}
    values = random(2, heads, N, dim, **options)
    change = reference.quantise(random(2, N, heads, dim, seed=1, **options) / 8)
    ahead = 5 * random(2, N, seed=2, device=DEVICE).abs()
    ahead[:, ::3] = 0
    outs = [torch.full((2, heads, N, dim), torch.nan, **options) for _ in range(2)]
    assert fused.advance(values, *change, ahead, outs[0]) is outs[0]
    reference.advance(values, *change, ahead, outs[1])
    assert torch.equal(outs[0], outs[1])
    # Active tokens stay what they are.
    assert torch.equal(outs[0][:, :, ::3], values[:, :, ::3])


@on_triton
def test_fused_float8_keeps_nan(fused):
    x = random(1, 2, 3, 8, device=DEVICE)
    x[0, 0, 1, 5] = torch.nan
    out = fused.dequantise(*fused.quantise(x), torch.empty(1, 3, 2, 8, device=DEVICE))
    assert out[0, 1, 0, 5].isnan() and out[0, 0].isfinite().all() and out[0, 2].isfinite().all()


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs Triton's compiler")
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_codes_are_decoded_by_products_in_float32(dtype):
    # Compiled for a GPU that need not be there: LLVM narrows products where it finds that it may.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from heterostep.kernels import fused

    kernel = fused._dequantise
    sizes = {"HEADS": 3, "DIM": 128, "BLOCK_ROWS": 32, "BLOCK_DIM": 128}
    signature = {name: "constexpr" if name in sizes else "i32" for name in kernel.arg_names}
    signature |= {"codes": "*fp8e4nv", "scales": "*bf16", "out": f"*{dtype}"}
    constants = {(kernel.arg_names.index(name),): value for name, value in sizes.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": fused.WARPS, "enable_fp_fusion": fused.FUSE_MULTIPLY_ADD},
    )
    assert set(re.findall(r"mul(?:\.rn)?\.(b?f\d+)", compiled.asm["ptx"])) == {"f32"}


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_choice_on_cuda(caplog):
    pytest.importorskip("triton")
    kernels._log.cache_clear()
    kernels._chosen_for.cache_clear()
    x, cos_sin = random(1, N, 1536, dtype=torch.bfloat16, device=DEVICE), tables(1, N, 128, DEVICE)
    weight = random(1536, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    with caplog.at_level(logging.INFO, "heterostep"):
        kernels.norm_rotate(x, weight, 1e-6, *cos_sin, 12)
        with torch.no_grad():
            kernels.norm_rotate(x, weight, 1e-6, *cos_sin, 12)
    assert [r.getMessage() for r in caplog.records if r.name == "heterostep"] == [
        "norm_rotate: plain PyTorch, as gradients are recorded",
        "norm_rotate: Triton",
    ]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_kernels_reach_beyond_two_to_the_31(fused):
    total = 2**24 + 5
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    codes = torch.zeros(1, 1, total, 128, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    scales = torch.zeros(1, 1, total, dtype=torch.bfloat16, device=DEVICE)
    x, index = random(1, 2, 1, 128, device=DEVICE), torch.tensor([[total - 1, 0]], device=DEVICE)
    fused.quantise(x, index, codes, scales)
    out = fused.dequantise(codes, scales, torch.empty(codes.shape, dtype=torch.bfloat16, device=DEVICE))
    rows, row_scales = reference.quantise(x)
    expected = reference.dequantise(rows, row_scales, torch.empty_like(rows, dtype=torch.bfloat16))
    assert torch.equal(out[:, :, index[0]], expected) and (out[0, 0, 1:-1].count_nonzero() == 0)
