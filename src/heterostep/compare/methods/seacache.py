"""SeaCache, diffusers' hooks: with residuals extrapolated as diffusers does, and held as published."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from heterostep.compare.methods.calls import Calls
from heterostep.compare.methods.diffusers_hooks import diffusers_cache, managers_of, refuses_unregistered
from heterostep.compare.methods.method import Method
from heterostep.pipeline import transformers

# The threshold from which on SeaCache may skip more steps in a row than diffusers' two, and how many; 0 is any number.
# With two no threshold reaches a quarter of the evaluations.
SEACACHE_ROWS = ((0.0, 2), (0.5, 4), (1.0, 0))


def _seacache(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    """SeaCache (arXiv 2602.18993) as diffusers has it: residuals of the blocks follow their last change."""
    row = max((start, row) for start, row in SEACACHE_ROWS if start <= value)[1]
    return _seacache_run(pipe, threshold=value, max_consecutive_cached=row)


def _seacache_hold(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    """SeaCache as its authors have it: residuals are held, for any number of steps."""
    return _seacache_run(pipe, threshold=value, max_consecutive_cached=0, residual_order=0)


def _seacache_run(pipe: Any, **options: Any) -> AbstractContextManager[dict[str, Any]]:
    from diffusers import SeaCacheConfig

    def latents(model: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Of each sample [C, f, h, w]: image-to-video models get further channels, behind them."""
        x = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments["hidden_states"]
        return list(x[:, : model.config.out_channels].unbind())

    def config(position: int) -> Any:
        return SeaCacheConfig(raw_vision_callback=latents, **options)

    def prepare(position: int, calls: Calls, begins: bool) -> None:
        at = {"step_index": calls.step, "num_inference_steps": calls.num_steps}
        sigma = float(pipe.scheduler.sigmas[calls.index])
        for manager in managers_of(transformers(pipe)[position]):
            # Only text-to-video with Wan tells its hooks where it is.
            manager.set_context(replace(manager._context, sigma=sigma, **at))

    return diffusers_cache(pipe, config, prepare)


def _refuses_seacache(pipe: Any) -> str | None:
    if reason := refuses_unregistered(pipe, "SeaCache"):
        return reason
    if "LTX" in type(pipe).__name__:
        return "SeaCache filters latents over frames, height and width, and LTX's transformer gets them packed"
    return None


SEACACHE = Method(
    name="seacache",
    label="SeaCache (diffusers)",
    dial="threshold on the summed relative change of the filtered latents",
    # diffusers' default is .25.
    values=(0.05, 0.1, 0.2, 0.25, 0.35, 0.6, 1.0, 2.0),
    apply=_seacache,
    refuses=_refuses_seacache,
    whole_batch=True,
)

SEACACHE_HOLD = Method(
    name="seacache-hold",
    label="SeaCache as published (diffusers, residuals held)",
    dial="threshold on the summed relative change of the filtered latents",
    # The authors' .2 and .35 for Wan 2.1 1.3B, .4 for 14B.
    values=(0.05, 0.1, 0.2, 0.35, 0.4, 0.6, 2.0),
    apply=_seacache_hold,
    refuses=_refuses_seacache,
    whole_batch=True,
)
