"""Every way to quantise a transformer's weights that runs on a CPU, each by the library's own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Linear


def _torchao(config: str) -> Callable[[Any], None]:
    def quantise(model: Any) -> None:
        library = pytest.importorskip("torchao.quantization")
        library.quantize_(model, getattr(library, config)())

    return quantise


def _quanto(model: Any) -> None:
    library = pytest.importorskip("optimum.quanto")
    # int8 is not for every model: its kernel on a CPU wants activations to be contiguous.
    library.quantize(model, weights=library.qfloat8)
    library.freeze(model)


def _replace(model: Any, block: int, make: Callable[[Linear], Any]) -> None:
    """Put make(layer) in place of the blocks' linear layers whose rows are whole blocks of weights.

    What time and text enter by is left out, as diffusers does it.
    """
    blocks = getattr(model, "blocks", None) or model.transformer_blocks
    for parent in list(blocks.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear and child.in_features % block == 0:
                setattr(parent, name, make(child))


def _bitsandbytes(bits: int) -> Callable[[Any], None]:
    def quantise(model: Any) -> None:
        layers = pytest.importorskip("bitsandbytes").nn

        def make(layer: Linear) -> Any:
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            if bits == 8:
                new = layers.Linear8bitLt(*sizes, has_fp16_weights=False)
            else:
                new = layers.Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4")
            new.load_state_dict(layer.state_dict())
            return new.to("cpu")

        _replace(model, 16, make)

    return quantise


def _gguf(model: Any) -> None:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    def make(layer: Linear) -> Any:
        kind = gguf.GGMLQuantizationType.Q8_0
        codes = gguf.quantize(layer.weight.detach().float().numpy(), kind)
        new = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16)
        new.weight = GGUFParameter(torch.from_numpy(codes), quant_type=kind)
        new.bias = layer.bias
        return new

    _replace(model, 32, make)


# What each wants to be installed.
LIBRARIES = {"torchao": "torchao", "quanto": "optimum.quanto", "bitsandbytes": "bitsandbytes", "gguf": "gguf"}

KINDS: dict[str, Callable[[Any], None]] = {
    "torchao-int8": _torchao("Int8WeightOnlyConfig"),
    "torchao-fp8": _torchao("Float8WeightOnlyConfig"),
    "torchao-int8-activations": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "quanto-fp8": _quanto,
    "bitsandbytes-8bit": _bitsandbytes(8),
    "bitsandbytes-4bit": _bitsandbytes(4),
    "gguf-q8": _gguf,
}
