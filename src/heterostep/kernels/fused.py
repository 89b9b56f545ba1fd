"""Triton kernels for NVIDIA GPUs, one pass over memory each, alike in signature to `heterostep.kernels.reference`'s.

float32 inside. The norm's sum and root round differently from PyTorch's: its result may be the reference's neighbour.
Needs compute capability 8.0, and 8.9 for float8. Written for Triton 3.6 and later.

Shapes: B batch, N tokens, n active tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from heterostep.kernels import reference, shapes

# Values that one program of `quantise` or `dequantise` takes: 32 a thread, 16 bytes or more to each access.
BLOCK_VALUES = 4096
WARPS = 4
# Multiplications and additions round one by one, as PyTorch's do.
FUSE_MULTIPLY_ADD = False


@triton.jit
def _load_pairs(
    row, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """A row's pairs, float32 [heads, pairs] twice: each head's halves where SPLIT, else neighbours."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    if SPLIT:
        pair = tl.arange(0, BLOCK_DIM // 2)[None, :]
        inside = (head < HEADS) & (pair < DIM // 2)
        first = tl.load(row + head * DIM + pair, mask=inside, other=0.0)
        second = tl.load(row + head * DIM + DIM // 2 + pair, mask=inside, other=0.0)
    else:
        dim = tl.arange(0, BLOCK_DIM)[None, :]
        values = tl.load(row + head * DIM + dim, mask=(head < HEADS) & (dim < DIM), other=0.0)
        first, second = tl.split(tl.reshape(values, (BLOCK_HEADS, BLOCK_DIM // 2, 2)))
    return first.to(tl.float32), second.to(tl.float32)


# Not compiled anew for each number of rows.
@triton.jit(do_not_specialize=["n"])
def _norm_rotate(
    x, weight, cos, sin, out, eps, n, x_sample, x_row, cos_sample, cos_row, cos_head, sin_sample, sin_row, sin_head,
    out_sample, out_row, out_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, WEIGHTED: tl.constexpr,
    SPLIT: tl.constexpr, TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, row = program // n, program % n

    x += sample * x_sample + row * x_row
    first, second = _load_pairs(x, HEADS, DIM, BLOCK_HEADS, BLOCK_DIM, SPLIT)
    root = tl.rsqrt(tl.sum(tl.sum(first * first + second * second, 1), 0) / (HEADS * DIM) + eps)
    first, second = first * root, second * root
    if WEIGHTED:
        first_weight, second_weight = _load_pairs(weight, HEADS, DIM, BLOCK_HEADS, BLOCK_DIM, SPLIT)
        first, second = first * first_weight, second * second_weight
    # As the norm of PyTorch rounds it.
    first, second = first.to(out.dtype.element_ty).to(tl.float32), second.to(out.dtype.element_ty).to(tl.float32)

    # Tables of neighbouring pairs have each value twice.
    step: tl.constexpr = 1 if SPLIT else 2
    head, pair = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_DIM // 2)[None, :]
    table_head = tl.arange(0, BLOCK_HEADS if TABLE_HEADS > 1 else 1)[:, None]
    inside = (table_head < TABLE_HEADS) & (pair < DIM // 2)
    cos += sample * cos_sample + row * cos_row
    sin += sample * sin_sample + row * sin_row
    cosine = tl.load(cos + table_head * cos_head + pair * step, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + table_head * sin_head + pair * step + (step - 1), mask=inside, other=0.0).to(tl.float32)
    first, second = first * cosine - second * sine, first * sine + second * cosine

    first, second = first.to(out.dtype.element_ty), second.to(out.dtype.element_ty)
    out += sample * out_sample + row * out_row + head.to(tl.int64) * out_head
    if SPLIT:
        inside = (head < HEADS) & (pair < DIM // 2)
        tl.store(out + pair, first, mask=inside)
        tl.store(out + DIM // 2 + pair, second, mask=inside)
    else:
        dim = tl.arange(0, BLOCK_DIM)[None, :]
        tl.store(out + dim, tl.interleave(first, second), mask=(head < HEADS) & (dim < DIM))


def norm_rotate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    split: bool = False,
    by_head: bool = True,
) -> torch.Tensor:
    """See `heterostep.kernels.reference.norm_rotate`. One program reads and writes a row of H * D values."""
    samples, n, width = x.shape
    dim = width // heads
    x = _rows(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    cos, sin = (_rows(table.expand(samples, -1, -1, -1)) for table in (cos, sin))
    out = shapes.norm_rotate(x, weight, eps, cos, sin, heads, split, by_head)
    block_heads, block_dim = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    with torch.cuda.device_of(x):
        _norm_rotate[(samples * n,)](
            x, weight, cos, sin, out, eps, n, *x.stride()[:2], *cos.stride()[:3], *sin.stride()[:3], *out.stride()[:3],
            HEADS=heads, DIM=dim, BLOCK_HEADS=block_heads, BLOCK_DIM=block_dim, WEIGHTED=weight is not None,
            SPLIT=split, TABLE_HEADS=cos.shape[2],
            num_warps=8 if block_heads * block_dim >= BLOCK_VALUES else 4, enable_fp_fusion=FUSE_MULTIPLY_ADD,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n"])
def _write_kv(
    key, value, index, keys, values, n, total, key_sample, key_row, key_head, value_sample, value_row, value_head,
    index_sample,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, row = program // n, program % n
    head, dim = tl.arange(0, BLOCK_HEADS)[:, None].to(tl.int64), tl.arange(0, BLOCK_DIM)[None, :]
    inside = (head < HEADS) & (dim < DIM)

    target = ((sample * HEADS + head) * total + tl.load(index + sample * index_sample + row)) * DIM + dim
    key_values = tl.load(key + sample * key_sample + row * key_row + head * key_head + dim, mask=inside)
    value_values = tl.load(value + sample * value_sample + row * value_row + head * value_head + dim, mask=inside)
    tl.store(keys + target, key_values, mask=inside)
    tl.store(values + target, value_values, mask=inside)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """See `heterostep.kernels.reference.write_kv`; stores contiguous. One program moves a row of K and one of V."""
    samples, n, heads, dim = key.shape
    key, value, index = _rows(key), _rows(value), _rows(index)
    block_heads, block_dim = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    with torch.cuda.device_of(key):
        _write_kv[(samples * n,)](
            key, value, index, keys, values, n, keys.shape[2], *key.stride()[:3], *value.stride()[:3], index.stride(0),
            HEADS=heads, DIM=dim, BLOCK_HEADS=block_heads, BLOCK_DIM=block_dim,
            num_warps=8 if block_heads * block_dim >= BLOCK_VALUES else 4,
        )  # fmt: skip


@triton.jit
def _quantise(
    x, index, codes, scales, n, x_sample, x_row, x_head, index_sample, codes_sample, codes_head, codes_row,
    scales_sample, scales_head, scales_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, INDEXED: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest: programs that run together then read neighbouring memory of a linear layer's output.
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK_ROWS)
    head, block, sample = program % HEADS, program // HEADS % blocks, program // HEADS // blocks
    row, dim = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM)[None, :]
    inside = (row < n)[:, None] & (dim < DIM)

    rows = x + sample * x_sample + head * x_head + row[:, None] * x_row
    values = tl.load(rows + dim, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 1) * (1 / LARGEST), SMALLEST_SCALE).to(scales.dtype.element_ty)
    scaled = values * tl.div_rn(1.0, scale.to(tl.float32))[:, None]
    scaled = tl.clamp(scaled, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)

    target = tl.load(index + sample * index_sample + row, mask=row < n, other=0) if INDEXED else row
    tl.store(scales + sample * scales_sample + head * scales_head + target * scales_row, scale, mask=row < n)
    rows = codes + sample * codes_sample + head * codes_head + target[:, None] * codes_row
    tl.store(rows + dim, scaled.to(codes.dtype.element_ty), mask=inside)


def quantise(
    x: torch.Tensor,
    index: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `heterostep.kernels.reference.quantise`."""
    samples, n, heads, dim = x.shape
    x = _rows(x)
    if index is None or codes is None or scales is None:
        index = None
        codes = torch.empty(samples, heads, n, dim, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(samples, heads, n, dtype=torch.bfloat16, device=x.device)
    else:
        index = _rows(index)
    block_dim = triton.next_power_of_2(dim)
    block_rows = max(1, BLOCK_VALUES // block_dim)
    with torch.cuda.device_of(x):
        _quantise[(samples * heads * triton.cdiv(n, block_rows),)](
            x, index, codes, scales, n, *x.stride()[:3], index.stride(0) if index is not None else 0,
            *codes.stride()[:3], *scales.stride(),
            HEADS=heads, DIM=dim, BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim, INDEXED=index is not None,
            LARGEST=reference.E4M3_MAX, SMALLEST_SCALE=reference.SMALLEST_SCALE,
            num_warps=WARPS, enable_fp_fusion=FUSE_MULTIPLY_ADD,
        )  # fmt: skip
    return codes, scales


@triton.jit
def _dequantise(
    codes, scales, out, n, codes_sample, codes_head, codes_row, scales_sample, scales_head, scales_row,
    out_sample, out_head, out_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK_ROWS)
    block, head, sample = program % blocks, program // blocks % HEADS, program // blocks // HEADS
    row, dim = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM)[None, :]
    inside = (row < n)[:, None] & (dim < DIM)

    scale = tl.load(scales + sample * scales_sample + head * scales_head + row * scales_row, mask=row < n, other=0.0)
    # By its bits: a cast that it sees lets LLVM multiply in float16 where that is the output, beyond its range.
    scale = (scale.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    rows = codes + sample * codes_sample + head * codes_head + row[:, None] * codes_row
    values = tl.load(rows + dim, mask=inside).to(tl.float32) * scale[:, None]
    rows = out + sample * out_sample + head * out_head + row[:, None] * out_row
    tl.store(rows + dim, values.to(out.dtype.element_ty), mask=inside)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See `heterostep.kernels.reference.dequantise`; last dimensions contiguous."""
    samples, heads, n, dim = codes.shape
    block_dim = triton.next_power_of_2(dim)
    block_rows = max(1, BLOCK_VALUES // block_dim)
    with torch.cuda.device_of(out):
        _dequantise[(samples * heads * triton.cdiv(n, block_rows),)](
            codes, scales, out, n, *codes.stride()[:3], *scales.stride(), *out.stride()[:3],
            HEADS=heads, DIM=dim, BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim,
            num_warps=WARPS, enable_fp_fusion=FUSE_MULTIPLY_ADD,
        )  # fmt: skip
    return out


@triton.jit
def _advance(
    values, codes, scales, ahead, out, n, sample_stride, head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK_ROWS)
    block, head, sample = program % blocks, program // blocks % HEADS, program // blocks // HEADS
    row, dim = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM)[None, :]
    inside = (row < n)[:, None] & (dim < DIM)
    place = sample * sample_stride + head * head_stride + row[:, None] * DIM + dim

    weight = tl.load(scales + (sample * HEADS + head) * n + row, mask=row < n, other=0.0).to(tl.float32)
    weight *= tl.load(ahead + sample * n + row, mask=row < n, other=0.0)
    change = tl.load(codes + place, mask=inside).to(tl.float32) * weight[:, None]
    moved = tl.load(values + place, mask=inside, other=0.0).to(tl.float32) + change
    tl.store(out + place, moved.to(out.dtype.element_ty), mask=inside)


def advance(
    values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, ahead: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """See `heterostep.kernels.reference.advance`; everything contiguous."""
    samples, heads, n, dim = values.shape
    block_dim = triton.next_power_of_2(dim)
    block_rows = max(1, BLOCK_VALUES // block_dim)
    with torch.cuda.device_of(out):
        _advance[(samples * heads * triton.cdiv(n, block_rows),)](
            values, codes, scales, ahead, out, n, *out.stride()[:2],
            HEADS=heads, DIM=dim, BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim,
            num_warps=WARPS, enable_fp_fusion=FUSE_MULTIPLY_ADD,
        )  # fmt: skip
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
