"""DBCache of the package cache-dit."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

from heterostep.compare.methods.calibration import calibration_options
from heterostep.compare.methods.calls import blocks_of, refuses_unknown
from heterostep.compare.methods.diffusers_hooks import as_found
from heterostep.compare.methods.method import Method
from heterostep.pipeline import transformers


def _refuses_cache_dit(pipe: Any) -> str | None:
    if importlib.util.find_spec("cache_dit") is None:
        return "the package is not there: pip install cache-dit"
    if reason := refuses_unknown(pipe):
        return reason
    if type(pipe.transformer).__name__ == "LTX2VideoTransformer3DModel":
        return (
            "cache-dit replaces LTX-2's forward by its own, which does not take what diffusers' pipeline gives (sigma)"
        )
    return None


@contextlib.contextmanager
def _quiet_cache_dit() -> Iterator[None]:
    """Only errors on the terminal: its loggers, some of them made late, share the handlers of this one."""
    handlers = logging.getLogger("CACHE_DIT").handlers
    # A log file is there because the user asked for it.
    levels = {handler: handler.level for handler in handlers if not isinstance(handler, logging.FileHandler)}
    for handler in levels:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)


# The threshold from which on DBCache computes one block instead of the first eight, and half of the warm-up: as the
# package has them these alone take more than a third of the evaluations.
CACHE_DIT_FAST = 0.4


@contextlib.contextmanager
def _cache_dit(pipe: Any, value: float, num_steps: int) -> Iterator[dict[str, Any]]:
    """DBCache with the package's defaults, scaled down for few steps and few blocks, and its fastest settings beyond.

    It takes every second call of Wan and HunyuanVideo 1.5 for the unconditional one, unless it is told that there is no
    guidance (`calibrate_with`).
    """
    import cache_dit

    models = transformers(pipe)
    guidance = calibration_options.get(pipe, {}).get("guidance_scale")
    # 8 of the published models' 30 and more; and 8 of 40, which experts share.
    blocks, warmup = min(8, len(blocks_of(models[0])[1]) // 3), min(8, round(0.2 * num_steps) // len(models))
    if value >= CACHE_DIT_FAST:
        blocks, warmup = 1, warmup // 2
    config = cache_dit.DBCacheConfig(
        residual_diff_threshold=value,
        Fn_compute_blocks=max(1, blocks),
        max_warmup_steps=max(1, warmup),
        # None leaves it to the package.
        enable_separate_cfg=None if guidance is None or guidance > 1 else False,
    )
    with _quiet_cache_dit(), as_found(models):
        try:
            cache_dit.enable_cache(pipe, cache_config=config)
            yield {}
        finally:
            cache_dit.disable_cache(pipe)


CACHE_DIT = Method(
    name="cache-dit",
    label="DBCache (cache-dit)",
    dial="threshold on the relative change of the first blocks' residual",
    # The package's default is .08; its examples for video go to .12.
    values=(0.04, 0.08, 0.12, 0.2, 0.4, 0.8),
    apply=_cache_dit,
    refuses=_refuses_cache_dit,
    whole_batch=True,
)
