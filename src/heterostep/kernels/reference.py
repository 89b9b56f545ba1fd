"""Plain PyTorch kernels, right on every device; `heterostep.kernels.fused` has faster ones of some, alike in signature.

Shapes: B batch, N tokens, n active tokens, H heads, D head dim, ... whatever a row holds.
"""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm

# The largest value of float8_e4m3fn.
E4M3_MAX = 448.0
# The smallest normal number of float32 and bfloat16: a scale that decodes zeros to zeros and has a finite inverse.
SMALLEST_SCALE = 2.0**-126


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of the active tokens: [B or 1, N, ...] at int64 [B, n] -> [B, n, ...]."""
    if x.shape[0] == 1:
        return x[0][index]
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def write_rows(store: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows [B, H, n, ...] into `store` [B, H, N, ...] at int64 [B, n], in place."""
    if store.shape[0] == 1:
        # One operation: between two kernels the host's time counts.
        store.index_copy_(2, index[0], rows)
        return
    store[torch.arange(store.shape[0], device=store.device)[:, None], :, index] = rows.transpose(1, 2)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Write rows of K and V [B, n, H, D] into `keys` and `values` [B, H, N, D] at int64 [B, n], in place."""
    write_rows(keys, index, key.transpose(1, 2))
    write_rows(values, index, value.transpose(1, 2))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, split: bool = False) -> torch.Tensor:
    """Rotary embedding of [B, n, H, D], of neighbouring pairs or (`split`) of each head's halves.

    cos and sin are [B or 1, n, 1 or H, D] with each value twice; split, [B or 1, n, 1 or H, D / 2]. Computed in the
    wider of the two dtypes (diffusers' tables are float32), rounded to that of x.
    Source: `WanAttnProcessor` of diffusers, and `apply_split_rotary_emb` of its LTX-2.
    """
    if split:
        first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
        # As there: some devices round the product and the sum once.
        turned = torch.addcmul(first * cos, sin, second, value=-1), torch.addcmul(second * cos, sin, first)
        return torch.cat(turned, dim=-1).type_as(x)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


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
    """RMS norm over all heads together, then the rotary embedding.

    Args:
        x: [B, n, H * D].
        weight: [H * D], or None for 1.
        eps: added to the mean square; None for PyTorch's own.
        cos, sin, split: as `rotate` takes them; float32.
        heads: H.
        by_head: how the result lies in memory, see there.

    Returns:
        [B, n, H, D] in the dtype of x. `by_head` a transposed view of contiguous [B, H, n, D], as `KVCache` keeps it;
        else contiguous: attention's result lies as its queries do, and the heads of a token are wanted together.
    """
    normed = rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (heads, -1))
    if not by_head:
        return rotate(normed, cos, sin, split).contiguous()
    # Transposed first: what the rotation makes of it is contiguous as it is.
    rotated = rotate(normed.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2), split)
    return rotated.contiguous().transpose(1, 2)


def quantise(
    x: torch.Tensor,
    index: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes with a scale for each token and head: the largest magnitude of its D values becomes 448.

    Args:
        x: [B, n, H, D] of any strides.
        index, codes, scales: together or not at all: int64 [B, n], and what the rows are written into, in place.

    Returns:
        codes float8_e4m3fn [B, H, N, D] and scales bfloat16 [B, H, N]; N = n without an index. A value is code * scale
        to within 2^-4 of itself or 2^-10 scales, whichever is more.
    """
    values = x.detach().transpose(1, 2).float()
    # Products with inverses, for devices differ in how they divide.
    new_scales = (values.abs().amax(-1) * (1 / E4M3_MAX)).clamp(min=SMALLEST_SCALE).bfloat16().contiguous()
    # By the rounded scale, so that its rounding costs nothing. Rounded down, it makes a little over 448.
    scaled = (values * new_scales.float().reciprocal()[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    new_codes = scaled.to(torch.float8_e4m3fn).contiguous()
    if index is None or codes is None or scales is None:
        return new_codes, new_scales
    # PyTorch moves bytes where it does not move float8.
    write_rows(codes.view(torch.uint8), index, new_codes.view(torch.uint8))
    write_rows(scales, index, new_scales)
    return codes, scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Codes [B, H, N, D] * scales [B, H, N] of `quantise`, rounded once, into `out` [B, H, N, D]; returns that."""
    return out.copy_(codes.float() * scales.float()[..., None])


def advance(
    values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, ahead: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """values + ahead * change, rounded once, into `out`; returns that.

    Args:
        values, out: [B, H, N, D].
        codes, scales: the change as `quantise` made it, [B, H, N, D] and [B, H, N].
        ahead: float32 [B, N], how many of these changes to go; 0 leaves a token where it is.
    """
    weights = scales.float() * ahead[:, None]
    return out.copy_(values.float() + codes.float() * weights[..., None])
