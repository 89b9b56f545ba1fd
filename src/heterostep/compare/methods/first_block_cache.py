"""First Block Cache, diffusers' hooks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from heterostep.compare.methods.diffusers_hooks import diffusers_cache, refuses_unregistered
from heterostep.compare.methods.method import Method


def _first_block_cache(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    from diffusers import FirstBlockCacheConfig

    return diffusers_cache(pipe, lambda position: FirstBlockCacheConfig(threshold=value))


FIRST_BLOCK_CACHE = Method(
    name="first-block-cache",
    label="First Block Cache (diffusers)",
    dial="threshold on the relative change of the first block's residual",
    # .08 and .1 are its authors' and diffusers' examples.
    values=(0.04, 0.08, 0.1, 0.2, 0.4, 1.2),
    apply=_first_block_cache,
    refuses=lambda pipe: refuses_unregistered(pipe, "First Block Cache"),
    whole_batch=True,
)
