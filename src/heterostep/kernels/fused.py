"""Triton kernels for NVIDIA GPUs, one pass over memory each, alike in signature to `heterostep.kernels.reference`'s.

float32 inside. The norm's sum and root round differently from PyTorch's: its result may be the reference's neighbour.
Needs compute capability 8.0, and 8.9 for float8. Written for Triton 3.6 and later.

Shapes: B batch, N tokens, n active tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from heterostep.kernels import reference

# Values that one program of `quantise` or `dequantise` takes: 32 a thread, 16 bytes or more to each access.
BLOCK_VALUES = 4096
WARPS = 4
# Multiplications and additions round one by one, as PyTorch's do.
FUSE_MULTIPLY_ADD = False


# Not compiled anew for each number of rows.
@triton.jit(do_not_specialize=["n"])
def _norm_rotate(
    x, weight, cos, sin, out, eps, n, x_sample, x_row, cos_sample, cos_row, sin_sample, sin_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, row = program // n, program % n
    head, dim = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    inside = (head < HEADS) & (dim < DIM)

    values = tl.load(x + sample * x_sample + row * x_row + head * DIM + dim, mask=inside, other=0.0).to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(tl.sum(values * values, 1), 0) / (HEADS * DIM) + eps)
    if WEIGHTED:
        normed *= tl.load(weight + head * DIM + dim, mask=inside, other=0.0).to(tl.float32)
    # As the norm of PyTorch rounds it.
    normed = normed.to(out.dtype.element_ty).to(tl.float32)

    pair = 2 * tl.arange(0, BLOCK_DIM // 2)
    cosine = tl.load(cos + sample * cos_sample + row * cos_row + pair, mask=pair < DIM, other=0.0)
    sine = tl.load(sin + sample * sin_sample + row * sin_row + pair + 1, mask=pair < DIM, other=0.0)
    cosine, sine = cosine.to(tl.float32)[None, :], sine.to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(normed, (BLOCK_HEADS, BLOCK_DIM // 2, 2)))
    rotated = tl.interleave(even * cosine - odd * sine, even * sine + odd * cosine)

    first = (sample * HEADS * n + row) * DIM
    tl.store(out + first + head.to(tl.int64) * n * DIM + dim, rotated.to(out.dtype.element_ty), mask=inside)


def norm_rotate(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float | None, cos: torch.Tensor, sin: torch.Tensor, heads: int
) -> torch.Tensor:
    """See `heterostep.kernels.reference.norm_rotate`. One program reads and writes a row of H * D values."""
    samples, n, width = x.shape
    dim = width // heads
    x = _rows(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    cos, sin = (_rows(table.expand(samples, n, 1, dim)) for table in (cos, sin))
    out = torch.empty(samples, heads, n, dim, dtype=x.dtype, device=x.device)
    block_heads, block_dim = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    with torch.cuda.device_of(x):
        _norm_rotate[(samples * n,)](
            x, weight, cos, sin, out, eps, n, *x.stride()[:2], *cos.stride()[:2], *sin.stride()[:2],
            HEADS=heads, DIM=dim, BLOCK_HEADS=block_heads, BLOCK_DIM=block_dim, WEIGHTED=weight is not None,
            num_warps=8 if block_heads * block_dim >= BLOCK_VALUES else 4, enable_fp_fusion=FUSE_MULTIPLY_ADD,
        )  # fmt: skip
    return out.transpose(1, 2)


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
