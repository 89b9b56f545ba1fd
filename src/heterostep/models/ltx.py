"""LTX-Video 0.9: `LTXVideoTransformer3DModel`.

Its inputs are tokens already: they are reduced before the forward, and rotary tables where the model has made them.
Text is read through a mask that is the same for all queries, so it needs no reducing.

Shapes: B batch, N tokens, n active ones, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from heterostep.kernels import gather_rows
from heterostep.kv.cache import StaticKV
from heterostep.models.attention import CachedAttention
from heterostep.models.base import Adapter, Call, Family, ModelPatches, TokenGrid


def _rotate(x: torch.Tensor, rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The model's own rotary embedding of [B, n, H * D]: its tables span all heads."""
    from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

    return apply_rotary_emb(x, rotary_emb)


class SelfAttention(CachedAttention):
    """Active tokens' fresh K and V overwrite their rows of the cache; active queries attend to all rows."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if self.kv is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        query = _rotate(attn.norm_q(attn.to_q(hidden_states)), image_rotary_emb)
        key = _rotate(attn.norm_k(attn.to_k(hidden_states)), image_rotary_emb)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        key, value = self.kv.update(key, value, self.call.index)
        return attn.to_out[1](attn.to_out[0](self.attend(query, key, value)))


class TextAttention(CachedAttention):
    """Text K/V are the same at every step: computed once, or when the text has changed, and kept."""

    store = StaticKV

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if self.kv is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if self.kv.tensors is None:
            pair = attn.norm_k(attn.to_k(encoder_hidden_states)), attn.to_v(encoder_hidden_states)
            self.kv.tensors = tuple(x.unflatten(2, (attn.heads, -1)) for x in pair)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        if attention_mask is not None:
            # One row for all queries, [B, 1, text states].
            attention_mask = attention_mask[:, None].expand(-1, attn.heads, -1, -1)
        return attn.to_out[1](attn.to_out[0](self.attend(query, *self.kv.tensors, attention_mask)))


class GuidanceInBatch(Adapter):
    """Of pipelines whose calls have [without prompt, with prompt] in their batch, as LTX-Video's and LTX-2's."""

    def cfg_batch_factor(self, pipe: Any) -> int:
        # Modular pipelines make a call of each.
        return 2 if getattr(pipe, "do_classifier_free_guidance", False) else 1


class LTXAdapter(GuidanceInBatch):
    """See `heterostep.models.base.Adapter`."""

    def token_grid(self, model: Any, inputs: dict[str, Any]) -> TokenGrid:
        return TokenGrid(inputs["num_frames"], inputs["height"], inputs["width"])

    def select_tokens(self, model: Any, inputs: dict[str, Any], index: torch.Tensor) -> dict[str, Any]:
        rows = gather_rows(inputs["hidden_states"], index)
        return super().select_tokens(model, {**inputs, "hidden_states": rows}, index)

    def install(self, model: Any, call: Call, on_velocity: Callable[[torch.Tensor], Any]) -> ModelPatches:
        def select_rotary(output):
            return None if call.index is None else tuple(gather_rows(table, call.index) for table in output)

        patches = ModelPatches()
        patches.hook_output(model.rope, select_rotary)
        patches.hook_output(model.proj_out, on_velocity)
        for block in model.transformer_blocks:
            for attn, processor in ((block.attn1, SelfAttention), (block.attn2, TextAttention)):
                patches.replace_processor(attn, processor(attn.processor, call))
        return patches

    def prompt_shapes(self, pipe: Any, model: Any, arguments: Mapping[str, Any]) -> dict[str, tuple]:
        length = arguments["max_sequence_length"]
        return {
            "prompt_embeds": (length, model.config.caption_channels, model.dtype),
            "prompt_attention_mask": (length, torch.bool),
        }


FAMILIES = {
    "LTXVideoTransformer3DModel": Family(
        LTXAdapter(), ("LTXPipeline", "LTXImageToVideoPipeline", "LTXModularPipeline")
    ),
}
