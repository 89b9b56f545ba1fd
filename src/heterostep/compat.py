"""What diffusers, PEFT and PyTorch keep private and heterostep has to know, in one place.

Checked with diffusers 0.42.0 and 0.42.1 (`make test-diffusers`) and PyTorch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
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


def lora_layers(model: torch.nn.Module) -> list[Any]:
    """PEFT's layers in a model (LoRA and its kin)."""
    return [each for each in model.modules() if hasattr(each, "scaling") and hasattr(each, "active_adapters")]


def loaded_loras(model: torch.nn.Module) -> dict[str, Any]:
    """The names of the PEFT adapters that a model has, with their configurations."""
    return dict(getattr(model, "peft_config", {}))


def lora_state(layers: Iterable[Any]) -> list[Any]:
    """What tells whether adapters were turned up, down, on, off or fused since."""
    return [(dict(x.scaling), list(x.active_adapters), x.disable_adapters, x.merged) for x in layers]


def lora_versions(layers: Iterable[Any]) -> list[int | None]:
    """What tells whether adapters' weights were written to since."""
    parts = (getattr(x, name) for x in layers for name in getattr(x, "adapter_layer_names", ()))
    return [None if weight.is_inference() else weight._version for part in parts for weight in part.parameters()]


def scheduler_step(pipe: Any) -> int:
    """The scheduler's step of a transformer's call. Schedulers count it themselves, but only from their first step on.

    0 where timesteps are on the meta device, which have no values.
    """
    scheduler, now = pipe.scheduler, getattr(pipe, "_current_timestep", None)
    if scheduler.step_index is not None:
        return scheduler.step_index
    if scheduler.begin_index is not None or now is None:
        return scheduler.begin_index or 0
    # Not every pipeline tells where it begins. Of timesteps that round to the same number the scheduler knows which.
    return 0 if scheduler.timesteps.is_meta else int(scheduler.index_for_timestep(now))


def execution_device(pipe: Any) -> torch.device:
    """Where a pipeline computes: its weights may wait elsewhere."""
    return pipe._execution_device


def blocks_compiled(model: torch.nn.Module) -> bool:
    """Whether parts of the model are compiled (`compile_repeated_blocks`)."""
    return any(module._compiled_call_impl is not None for module in model.modules())


# Each guidance branch's plain, dense and sparse calls are graphs of their own; torch gives up after 8 of a function.
RECOMPILE_LIMIT = 64
# For each context of `more_graphs` that is open now: what torch allowed before the first of them.
_limits_before: list[int] = []


@contextlib.contextmanager
def more_graphs() -> Iterator[None]:
    """Let torch compile up to `RECOMPILE_LIMIT` graphs of a function, until the last of such contexts has ended."""
    dynamo = torch._dynamo.config
    first = not _limits_before
    _limits_before.append(dynamo.recompile_limit if first else _limits_before[0])
    if first:
        dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    try:
        yield
    finally:
        before = _limits_before.pop()
        if not _limits_before:
            dynamo.recompile_limit = before


# diffusers' hooks that split a model's tokens over processes and gather them.
_SPLIT, _GATHER = "ContextParallelSplitHook", "ContextParallelGatherHook"


def exchanges_tokens(hook: Any) -> bool:
    """Whether a hook of diffusers' is one that splits a model's tokens over processes, or gathers them."""
    return type(hook).__name__ in (_SPLIT, _GATHER)


def waited_for(x: Any) -> Any:
    """The value, once the exchange between processes that it comes from has ended: torch lets it go on until then."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return x.wait() if isinstance(x, AsyncCollectiveTensor) else x


def split_inputs(model: torch.nn.Module) -> dict[str, Any]:
    """Which of a forward's inputs context parallelism splits before it is called, by name, and how
    (`ContextParallelInput`)."""
    splits = (hook.metadata for hook in diffusers_hooks(model) if type(hook).__name__ == _SPLIT)
    return {name: how for split in splits for name, how in split.items() if not how.split_output}


def split_plan(model: torch.nn.Module) -> dict[str, Any]:
    """Where context parallelism splits and gathers a model's tokens, as `enable_parallelism(cp_plan=)` takes it."""
    plan = {}
    for name, module in model.named_modules():
        for hook in diffusers_hooks(module):
            if type(hook).__name__ == _SPLIT:
                plan[name] = hook.metadata
            elif type(hook).__name__ == _GATHER:
                (plan[name],) = hook.metadata
    return plan


def all_gather(received: torch.Tensor, sent: torch.Tensor, group: Any) -> None:
    """Every rank's tensor, one after the other, under the name that PyTorch has for it."""
    import torch.distributed as dist

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, sent, group=group)


@contextlib.contextmanager
def cpu_as_accelerator() -> Iterator[None]:
    """Let `enable_parallelism` count the CPU as one device, where torch has no other: it divides by their number."""
    count = torch.accelerator.device_count
    if count() == 0:
        torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def active_backend() -> str:
    """The attention backend of all models without one of their own."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    return str(registry.get_active_backend()[0])


def use_backend(model: Any, name: str) -> None:
    """Set a model's attention backend, and leave other models theirs; diffusers makes it that of all without one.

    Raises:
        HeterostepError: there is no such backend, or it is not installed.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    if not isinstance(name, str):
        raise HeterostepError(f"attention_backend must be a name, such as native, not {name!r}")
    before, _ = registry.get_active_backend()
    try:
        model.set_attention_backend(name)
    except ValueError as error:
        raise HeterostepError(f"no such attention backend: {name}") from error
    except (RuntimeError, ImportError) as error:
        raise HeterostepError(f"the attention backend {name} cannot be used here: {first_line(error)}") from error
    finally:
        registry.set_active_backend(before)
