"""Row moves between all tokens and the active ones, and what is computed for each row of attention's Q, K and V.

Plain PyTorch is right everywhere; on NVIDIA GPUs Triton's kernels take its place. Which of the two runs, and why, is
logged once for each kernel and reason, at INFO, to the logger "heterostep".

Shapes: B batch, N tokens, n active tokens, H heads, D head dim.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from heterostep.kernels import reference, shapes
from heterostep.kernels.reference import gather_rows, rotate

__all__ = ["advance", "dequantise", "gather_rows", "norm_rotate", "quantise", "rotate", "write_kv"]

_logger = logging.getLogger("heterostep")
# Compute capability: bfloat16's, and float8's.
_NEEDED = {"norm_rotate": (8, 0), "write_kv": (8, 0), "quantise": (8, 9), "dequantise": (8, 9), "advance": (8, 9)}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    """RMS norm over all heads, then the rotary embedding: [B, n, H * D] -> [B, n, H, D].

    For the arguments see `heterostep.kernels.reference.norm_rotate`.
    """
    return _chosen("norm_rotate", x, weight).norm_rotate(x, weight, eps, cos, sin, heads, split, by_head)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Write rows of K and V [B, n, H, D] into their stores [B, H, N, D] at int64 [B, n], in place.

    See `heterostep.kernels.reference.write_kv`.
    """
    _chosen("write_kv", key, value).write_kv(key, value, index, keys, values)


def quantise(
    x: torch.Tensor,
    index: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes with a scale for each token and head: [B, n, H, D] -> [B, H, N, D] and [B, H, N].

    With int64 `index` [B, n], rows of `codes` and `scales` are written over; without, N = n. See
    `heterostep.kernels.reference.quantise`.

    Raises:
        ValueError: only some of `index`, `codes` and `scales` are given.
    """
    if not (index is None) == (codes is None) == (scales is None):
        raise ValueError("index, codes and scales are given together or not at all")
    return _chosen("quantise", x).quantise(x, index, codes, scales)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What `quantise` encoded, [B, H, N, D] and [B, H, N], into `out` [B, H, N, D], which it returns.

    See `heterostep.kernels.reference.dequantise`.
    """
    return _chosen("dequantise", out).dequantise(codes, scales, out)


def advance(
    values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, ahead: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """K or V [B, H, N, D] moved along their change as far as `ahead` [B, N] says, into `out`, which it returns.

    See `heterostep.kernels.reference.advance`.
    """
    return _chosen("advance", out).advance(values, codes, scales, ahead, out)


def _chosen(kernel: str, x: torch.Tensor, other: torch.Tensor | None = None) -> Any:
    """The module whose `kernel` runs on x, and on what else may record gradients."""
    # The compiler fuses the reference by itself, and would stop at the log.
    if torch.compiler.is_compiling():
        return reference
    if x.is_meta:
        return shapes
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, other))
    return _chosen_for(kernel, x.device, x.dtype, recorded)


@functools.lru_cache(maxsize=256)
def _chosen_for(kernel: str, device: torch.device, dtype: torch.dtype, recorded: bool) -> Any:
    # Asked twice in each block of each step, on the host's time.
    reason = _why_reference(kernel, device, dtype, recorded)
    _log(kernel, reason)
    return reference if reason else _fused()[0]


def _why_reference(kernel: str, device: torch.device, dtype: torch.dtype, recorded: bool) -> str:
    """Why Triton's kernel can't run; empty where it can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.version.cuda is None:
        return "the GPU is not NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < _NEEDED[kernel]:
        return f"compute capability {capability} is below {_NEEDED[kernel]}"
    if dtype not in _DTYPES:
        return f"the dtype is {dtype}"
    if recorded:
        return "gradients are recorded"
    return _fused()[1]


@functools.cache
def _fused() -> tuple[Any, str]:
    """The module of Triton kernels, or why there is none."""
    # Imported where it is first needed: many machines have no Triton, and none needs it on the CPU.
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return None, f"Triton cannot be imported: {error}"
    from heterostep.kernels import fused

    return fused, ""


@functools.cache
def _log(kernel: str, reason: str) -> None:
    _logger.info("%s: %s", kernel, f"plain PyTorch, as {reason}" if reason else "Triton")
