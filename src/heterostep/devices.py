"""Where a model runs and in which precision, by the names that people give. torch is imported when one is looked up."""

from __future__ import annotations

from enum import Enum
from typing import Any

from heterostep.errors import HeterostepError


class Dtype(str, Enum):
    """Precisions of the transformer and the text encoder."""

    auto = "auto"
    float32 = "float32"
    tf32 = "tf32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def device_of(name: str) -> Any:
    """The torch device of a name: auto, cpu, cuda or cuda:N.

    Raises:
        HeterostepError: there is none of this name.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise HeterostepError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cpu" and device.index:
        raise HeterostepError(f"there is no device {name}: the CPU is one, called cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HeterostepError(f"there is no device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def precision_of(dtype: Dtype, device: Any) -> Any:
    """The torch dtype of a name on a device; tf32 is float32 with the process set to TF32's products."""
    import torch

    if dtype is Dtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype is Dtype.tf32:
        from heterostep.precision import use_tf32

        use_tf32()
        return torch.float32
    return getattr(torch, dtype.value)
