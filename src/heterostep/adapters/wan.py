"""Wan 2.1 and 2.2 (`WanTransformer3DModel`).

The model's forward is left as it is. Reduced are what enters the blocks (after the patch embedding), the rotary tables
and per-token timesteps; the output projection's rows are put back among the held ones. Two attention processors keep K
and V.

Shapes: B batch, N tokens, n active tokens, H heads, D head dim, C values a token.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn

from heterostep.adapters.base import Call
from heterostep.kernels import gather_rows
from heterostep.kv_cache import KVCache

# WanAttention gives the text this many states; what comes before them is the image's.
TEXT_STATES = 512


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of neighbouring pairs: x [B, n, H, D], cos and sin [B or 1, n, 1, D] with each value twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class _Processor:
    """Delegates to the processor it replaces while the call is plain; subclasses do the rest."""

    def __init__(self, original: Any, call: Call, layer: int) -> None:
        self.original, self.call, self.layer = original, call, layer

    # diffusers sets these on the processor that it finds (`set_attention_backend`, context parallelism).
    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[B, n, H, D] on [B, N, H, D] -> [B, n, H * D]."""
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend).flatten(2, 3).type_as(query)


class SelfAttention(_Processor):
    """Active tokens' fresh K and V overwrite their rows of the cache; active queries attend to all rows."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        branch = self.call.branch
        if branch is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(query), attn.norm_k(key), value)
        )  # fmt: skip
        query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        key, value = branch.kv.setdefault(self.layer, KVCache()).update(key, value, self.call.index)
        return attn.to_out[1](attn.to_out[0](self.attend(query, key, value)))


class CrossAttention(_Processor):
    """Text and image K/V are the same at every step: computed in the last dense step, kept for the sparse ones."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        branch = self.call.branch
        if branch is None or (self.call.index is None and self.layer in branch.cross_kv):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if self.layer not in branch.cross_kv:
            branch.cross_kv[self.layer] = self._project(attn, encoder_hidden_states)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key, value, *image = branch.cross_kv[self.layer]
        out = self.attend(query, key, value)
        if image:
            out = out + self.attend(query, *image)
        return attn.to_out[1](attn.to_out[0](out))

    @staticmethod
    def _project(attn, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """K and V of the text, then of the image where the model has one, each [B, states, H, D]."""
        image_states = None
        if attn.add_k_proj is not None:
            split = states.shape[1] - TEXT_STATES
            image_states, states = states[:, :split], states[:, split:]
        if attn.fused_projections:
            key, value = attn.to_kv(states).chunk(2, dim=-1)
        else:
            key, value = attn.to_k(states), attn.to_v(states)
        kv = [attn.norm_k(key), value]
        if image_states is not None:
            if attn.fused_projections:
                key, value = attn.to_added_kv(image_states).chunk(2, dim=-1)
            else:
                key, value = attn.add_k_proj(image_states), attn.add_v_proj(image_states)
            kv += [attn.norm_added_k(key), value]
        return tuple(x.unflatten(2, (attn.heads, -1)) for x in kv)


class WanAdapter:
    """See `heterostep.adapters.base.Adapter`."""

    _signature = inspect.signature(WanTransformer3DModel.forward)

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = dict(self._signature.bind(None, *args, **kwargs).arguments)
        bound.pop("self")
        return bound

    def token_grid(self, model: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
        sizes, patch = inputs["hidden_states"].shape[2:], model.config.patch_size
        frames, height, width = (size // p for size, p in zip(sizes, patch, strict=True))
        return frames, height, width

    def clean_tokens(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        timestep = inputs["timestep"]
        return timestep == 0 if timestep.ndim == 2 else None

    def select(self, inputs: dict[str, Any], index: torch.Tensor) -> dict[str, Any]:
        timestep = inputs["timestep"]
        if timestep.ndim == 2:
            inputs = {**inputs, "timestep": timestep.gather(1, index)}
        return inputs

    def install(
        self, model: Any, call: Call, on_velocity: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[Callable[[], Any]]:
        def select_patches(module, args, output):
            if call.index is None:
                return None
            rows = gather_rows(output.flatten(2).transpose(1, 2), call.index)
            return rows.transpose(1, 2)[..., None, None]

        def select_rotary(module, args, output):
            if call.index is None:
                return None
            return tuple(gather_rows(table, call.index) for table in output)

        def merge(module, args, output):
            return on_velocity(output)

        undo: list[Callable[[], Any]] = [
            model.patch_embedding.register_forward_hook(select_patches).remove,
            model.rope.register_forward_hook(select_rotary).remove,
            model.proj_out.register_forward_hook(merge).remove,
        ]
        for layer, block in enumerate(model.blocks):
            for attn, processor in ((block.attn1, SelfAttention), (block.attn2, CrossAttention)):
                original = attn.processor
                attn.set_processor(processor(original, call, layer))
                undo.append(functools.partial(attn.set_processor, original))
        return undo
