"""MagCache, diffusers' hooks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from heterostep.compare.methods.calibration import calibrated, dense_run
from heterostep.compare.methods.calls import blocks_of
from heterostep.compare.methods.diffusers_hooks import diffusers_cache, hooks_of, refuses_unregistered
from heterostep.compare.methods.method import Method
from heterostep.pipeline import transformers


def _magcache_calibration(pipe: Any, num_steps: int) -> list[list[float]]:
    """Of each transformer: how much longer its blocks' residual is than a step before, of the conditional branch."""
    from diffusers import MagCacheConfig

    models = transformers(pipe)
    ratios: list[list[float]] = [[] for _ in models]
    # One step more than there are, for at the last one the hook prints the ratios and forgets them.
    config = MagCacheConfig(calibrate=True, num_inference_steps=num_steps + 1)

    def read() -> None:
        for position, model in enumerate(models):
            (states,) = (hook.state_manager._state_cache for hook in hooks_of(blocks_of(model)[1][0]))
            if states:
                ratios[position] = list(next(iter(states.values())).calibration_ratios)

    with diffusers_cache(pipe, lambda position: config):
        dense_run(pipe, num_steps, read)
    return ratios


# The threshold from which on MagCache skips any number of steps in a row, and may begin after a tenth of them: with
# diffusers' three in a row after a fifth it takes two evaluations of five.
MAGCACHE_FAST = 0.5


def _magcache(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    from diffusers import MagCacheConfig

    ratios = calibrated(pipe, ("magcache", num_steps), lambda: _magcache_calibration(pipe, num_steps))

    def config(position: int) -> Any:
        if not ratios[position]:
            return None
        # It skips at errors up to and with the threshold: at 0 a ratio of exactly 1 would do.
        threshold = value if value > 0 else -1.0
        steps = len(ratios[position])
        limits = {"max_skip_steps": num_steps, "retention_ratio": 0.1} if value >= MAGCACHE_FAST else {}
        return MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=ratios[position], **limits)

    return diffusers_cache(pipe, config)


MAGCACHE = Method(
    name="magcache",
    label="MagCache (diffusers)",
    dial="threshold on the summed error of the residual's length",
    # diffusers' default is .06; the authors' .12 for Wan 2.1.
    values=(0.01, 0.03, 0.06, 0.12, 0.24, 0.5, 1.0),
    apply=_magcache,
    refuses=lambda pipe: refuses_unregistered(pipe, "MagCache"),
)
