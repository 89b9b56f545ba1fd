"""diffusers' cache hooks: put on, reset for each generation, and taken off as if they had not been there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from heterostep.compare.methods.calls import Calls, before, blocks_of, refuses_control, refuses_unknown, refuses_unnamed
from heterostep.pipeline import transformers


@contextlib.contextmanager
def as_found(models: Sequence[Any]) -> Iterator[None]:
    """Take away empty registries, bound forwards and settings that diffusers' hooks and cache-dit leave on modules."""
    names = ("forward", "_diffusers_hook", "_cache_config")
    modules = [module for model in models for module in model.modules()]
    found = [{name for name in names if name in module.__dict__} for module in modules]
    try:
        yield
    finally:
        for module, before in zip(modules, found):
            registry = module.__dict__.get("_diffusers_hook")
            if registry is None or not registry.hooks:
                for name in set(names) - before:
                    module.__dict__.pop(name, None)


def hooks_of(model: Any) -> list[Any]:
    """All of diffusers' hooks in a model."""
    registries = (module.__dict__.get("_diffusers_hook") for module in model.modules())
    return [hook for registry in registries if registry is not None for hook in registry.hooks.values()]


def managers_of(model: Any) -> list[Any]:
    """What keeps the states of diffusers' hooks in a model, and knows the call under way (`_context`)."""
    return [hook.state_manager for hook in hooks_of(model) if hasattr(hook, "state_manager")]


def _forget(model: Any) -> None:
    """Drop what a cache keeps, as the end of a generation does, but not the guidance branch of the call under way."""
    managers = managers_of(model)
    contexts = [manager._context for manager in managers]
    model._reset_stateful_cache()
    for manager, context in zip(managers, contexts):
        manager.set_context(context)


@contextlib.contextmanager
def diffusers_cache(
    pipe: Any, config: Callable[[int], Any], prepare: Callable[[int, Calls, bool], None] = lambda *_: None
) -> Iterator[dict[str, Any]]:
    """A cache of diffusers on the transformers.

    Args:
        pipe: the pipeline.
        config: position of a transformer -> its cache config, None to leave it alone.
        prepare: prepare(position, calls, whether a generation begins) before each call of a transformer.
    """
    models, calls = transformers(pipe), Calls(pipe)

    def on_call(position: int, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        begins = calls.enter()
        if begins:
            # An interrupted generation leaves its state behind.
            for each in models:
                _forget(each)
        prepare(position, calls, begins)

    with as_found(models):
        try:
            for position, model in enumerate(models):
                if (wanted := config(position)) is not None:
                    model.enable_cache(wanted)
            with before(pipe, on_call):
                yield {}
        finally:
            for model in models:
                if model.is_cache_enabled:
                    model.disable_cache()


def refuses_unregistered(pipe: Any, name: str) -> str | None:
    """Why a cache that must know what a block takes and returns does not run."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    if reason := refuses_unknown(pipe) or refuses_control(pipe, name) or refuses_unnamed(pipe, name):
        return reason
    for model in transformers(pipe):
        block = type(blocks_of(model)[1][0])
        try:
            TransformerBlockRegistry.get(block)
        except ValueError:
            return f"diffusers has not registered {block.__name__}, which its {name} needs"
    return None
