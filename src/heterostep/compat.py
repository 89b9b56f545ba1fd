"""What diffusers, PEFT and PyTorch keep private and heterostep has to know, in one place.

Checked with diffusers 0.42.0 and 0.42.1 (`make test-diffusers`) and PyTorch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from heterostep.errors import HeterostepError, first_line

# diffusers' hooks (by their module) that leave a model's values alone: where weights are, and in which precision.
HARMLESS_HOOKS = ("context_parallel", "group_offloading", "hooks", "layerwise_casting", "tensor_parallel")


def diffusers_hooks(module: torch.nn.Module) -> list[Any]:
    """diffusers' hooks on one module."""
    registry = module.__dict__.get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks.values())


def other_cache(model: torch.nn.Module) -> str | None:
    """The name of another cache that skips work in the model, or None: diffusers' own, cache-dit."""
    if getattr(model, "is_cache_enabled", False):
        return type(getattr(model, "_cache_config", None)).__name__
    forward = model.__dict__.get("forward")
    if (getattr(model, "_is_cached", False) is True) or _is_of(forward, "cache_dit"):
        return "cache-dit"
    for module in model.modules():
        if _is_of(type(module), "cache_dit"):
            return "cache-dit"
        for hook in diffusers_hooks(module):
            home = type(hook).__module__.split(".")
            if home[:2] == ["diffusers", "hooks"] and home[-1] not in HARMLESS_HOOKS:
                return home[-1]
    return None


def _is_of(thing: Any, package: str) -> bool:
    return str(getattr(thing, "__module__", "")).split(".")[0] == package


def is_own_processor(processor: Any) -> bool:
    """Whether an attention processor is diffusers' own, whose arithmetic heterostep's repeats."""
    return _is_of(type(processor), "diffusers")


def adapter_layers(model: torch.nn.Module) -> list[Any]:
    """PEFT's layers in a model (LoRA and its kin)."""
    return [each for each in model.modules() if hasattr(each, "scaling") and hasattr(each, "active_adapters")]


def adapter_state(layers: Iterable[Any]) -> list[Any]:
    """What tells whether adapters were turned up, down, on, off or fused since."""
    return [(dict(x.scaling), list(x.active_adapters), x.disable_adapters, x.merged) for x in layers]


def blocks_compiled(model: torch.nn.Module) -> bool:
    """Whether parts of the model are compiled (`compile_repeated_blocks`)."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def use_backend(model: Any, name: str) -> None:
    """Set a model's attention backend, and leave other models theirs; diffusers makes it that of all without one.

    Raises:
        HeterostepError: there is no such backend, or it is not installed.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before, _ = registry.get_active_backend()
    try:
        model.set_attention_backend(name)
    except ValueError as error:
        raise HeterostepError(f"no such attention backend: {name}") from error
    except (RuntimeError, ImportError) as error:
        raise HeterostepError(f"the attention backend {name} cannot be used here: {first_line(error)}") from error
    finally:
        registry.set_active_backend(before)
