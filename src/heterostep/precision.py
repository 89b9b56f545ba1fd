"""float32 in which every product has TF32's ten bits of mantissa, attention's too."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as functional

# On our attention, and on what others put around it by `functools.wraps`; not on what they put around PyTorch's.
_MARK = "_heterostep_tf32"


def use_tf32() -> None:
    """For the rest of the process. Attention of float32 tensors on a GPU runs in float16, which has as many bits.

    `torch.nn.functional.scaled_dot_product_attention` is replaced by one that does so, for everybody in the process:
    PyTorch's float32 attention is several times slower than either, and takes half of a small model's time. float16
    has fewer exponents than TF32: queries, keys and values above 65504 overflow to infinity, and the result is not a
    number.
    """
    torch.set_float32_matmul_precision("high")
    attend = functional.scaled_dot_product_attention
    if _is_on():
        return

    @functools.wraps(attend)
    def in_half(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not query.is_cuda or query.dtype != torch.float32:
            return attend(query, key, value, *args, **kwargs)
        args = tuple(_halved(each) for each in args)
        kwargs = {name: _halved(each) for name, each in kwargs.items()}
        return attend(query.half(), key.half(), value.half(), *args, **kwargs).float()

    setattr(in_half, _MARK, True)
    functional.scaled_dot_product_attention = in_half


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, such as bfloat16; that of float32 is tf32 after `use_tf32`, for its seconds are others."""
    return "tf32" if dtype == torch.float32 and _is_on() else str(dtype).removeprefix("torch.")


def _is_on() -> bool:
    return hasattr(functional.scaled_dot_product_attention, _MARK)


def _halved(argument: Any) -> Any:
    """A mask of float32 must be of the queries' precision."""
    is_mask = isinstance(argument, torch.Tensor) and argument.dtype == torch.float32
    return argument.half() if is_mask else argument
