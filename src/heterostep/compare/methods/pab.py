"""Pyramid Attention Broadcast, diffusers' hooks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from heterostep.compare.methods.calls import Calls, refuses_unknown
from heterostep.compare.methods.diffusers_hooks import diffusers_cache, hooks_of
from heterostep.compare.methods.method import Method
from heterostep.pipeline import transformers

# How many steps longer cross-attention is kept than self-attention, as in the settings of PAB's paper.
PAB_CROSS = 4


def _pab(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    """Pyramid Attention Broadcast (arXiv 2408.12588): self-attention by the dial, cross-attention longer.

    diffusers' hooks keep one state, made for guidance in one batch. Here each guidance branch gets its own: else the
    unconditional call would be given the conditional one's attention. LTX-2's attentions do not say which of them are
    cross-attention, so diffusers takes them all for self-attention.
    """
    from diffusers import PyramidAttentionBroadcastConfig
    from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastState

    timestep = 0.0
    states: dict[tuple[int, int], list[Any]] = {}

    def config(position: int) -> Any:
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=int(value),
            cross_attention_block_skip_range=int(value) + PAB_CROSS if value > 1 else 1,
            current_timestep_callback=lambda: timestep,
        )

    def prepare(position: int, calls: Calls, begins: bool) -> None:
        nonlocal timestep
        timestep = float(pipe.scheduler.timesteps[calls.index])
        if begins:
            states.clear()
        hooks = [hook for hook in hooks_of(transformers(pipe)[position]) if hasattr(hook, "block_skip_range")]
        key = position, calls.branch
        if key not in states:
            states[key] = [PyramidAttentionBroadcastState() for _ in hooks]
        for hook, state in zip(hooks, states[key]):
            hook.state = state

    return diffusers_cache(pipe, config, prepare)


PAB = Method(
    name="pab",
    label="Pyramid Attention Broadcast (diffusers)",
    dial="steps from one evaluation of self-attention to the next",
    values=(2, 3, 4, 5, 8),
    apply=_pab,
    refuses=refuses_unknown,
)
