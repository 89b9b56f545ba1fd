"""TaylorSeer, diffusers' hooks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from heterostep.compare.methods.calls import refuses_unknown, refuses_unnamed
from heterostep.compare.methods.diffusers_hooks import diffusers_cache
from heterostep.compare.methods.method import Method
from heterostep.pipeline import transformers


def _taylorseer(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    from diffusers import TaylorSeerCacheConfig

    def config(position: int) -> Any:
        model = transformers(pipe)[position]
        # Lite mode skips the blocks and predicts `proj_out` alone. LTX-2's sound has a projection of its own, so the
        # same is said with patterns there.
        patterns: dict[str, Any] = {"use_lite_mode": True}
        if hasattr(model, "audio_proj_out"):
            skipped, predicted = r"^transformer_blocks\.[^.]+$", r"^(audio_)?proj_out$"
            patterns = {"skip_predict_identifiers": [skipped], "cache_identifiers": [predicted]}
        return TaylorSeerCacheConfig(cache_interval=int(value), taylor_factors_dtype=model.dtype, **patterns)

    return diffusers_cache(pipe, config)


TAYLORSEER = Method(
    name="taylorseer",
    label="TaylorSeer, lite (diffusers)",
    dial="steps from one evaluation to the next",
    # diffusers' default is 5.
    values=(2, 3, 4, 5, 6, 8),
    apply=_taylorseer,
    refuses=lambda pipe: refuses_unknown(pipe) or refuses_unnamed(pipe, "TaylorSeer"),
)
