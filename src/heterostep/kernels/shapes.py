"""The kernels on the meta device: results and nothing beside them, as `heterostep.kernels.fused` makes them on a GPU.

A forecast of memory counts what is made; the plain PyTorch kernels make more.
"""

from __future__ import annotations

from typing import Any

import torch


def norm_rotate(
    x: torch.Tensor,
    weight: Any,
    eps: float | None,
    cos: Any,
    sin: Any,
    heads: int,
    split: bool = False,
    by_head: bool = True,
) -> torch.Tensor:
    """See `heterostep.kernels.reference.norm_rotate`."""
    samples, n, width = x.shape
    if by_head:
        return x.new_empty(samples, heads, n, width // heads).transpose(1, 2)
    return x.new_empty(samples, n, heads, width // heads)


def write_kv(key: Any, value: Any, index: Any, keys: Any, values: Any) -> None:
    """See `heterostep.kernels.reference.write_kv`."""


def quantise(
    x: torch.Tensor,
    index: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `heterostep.kernels.reference.quantise`."""
    if codes is not None and scales is not None:
        return codes, scales
    samples, n, heads, dim = x.shape
    codes = torch.empty(samples, heads, n, dim, dtype=torch.float8_e4m3fn, device=x.device)
    return codes, torch.empty(samples, heads, n, dtype=torch.bfloat16, device=x.device)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See `heterostep.kernels.reference.dequantise`."""
    return out


def advance(values: Any, codes: Any, scales: Any, ahead: Any, out: torch.Tensor) -> torch.Tensor:
    """See `heterostep.kernels.reference.advance`."""
    return out
