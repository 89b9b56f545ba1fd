"""HunyuanVideo 1.5: `HunyuanVideo15Transformer3DModel`, whose blocks attend to video and text as one sequence.

Video tokens are reduced after the patch embedding; text tokens stay active at every step, for they change with the
video. The K/V cache holds both, the video's rows first, so that nothing is joined in a sparse step.

Shapes: B batch, N video tokens, n active ones, T text tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from heterostep.kernels import gather_rows, rotate
from heterostep.models.attention import CachedAttention
from heterostep.models.base import Call, Family, ModelPatches
from heterostep.models.hunyuan import PatchesAdapter
from heterostep.parallel import ranks_of


class JointAttention(CachedAttention):
    """Queries of the active video tokens and of the text attend to K and V of everything."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        # diffusers' own cannot share a sequence that text is a part of.
        if self.kv is None and self.ranks.size == 1:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        heads = (attn.heads, -1)
        query, key, value = (
            project(hidden_states).unflatten(2, heads) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        rotary = [table[:, :, None] if table.ndim == 3 else table[None, :, None] for table in image_rotary_emb]
        query, key = rotate(attn.norm_q(query), *rotary), rotate(attn.norm_k(key), *rotary)
        text_query, text_key, text_value = (
            project(encoder_hidden_states).unflatten(2, heads)
            for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        if attn.norm_added_q is not None:
            text_query = attn.norm_added_q(text_query)
        if attn.norm_added_k is not None:
            text_key = attn.norm_added_k(text_key)
        # Of the video each rank has a part, the text it has whole.
        split = self.split(hidden_states)
        video = self.ranks.tokens_to_heads(split, query, key, value)
        texts = self.ranks.shard_heads(text_query, text_key, text_value)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(video, texts))
        text, index = text_query.shape[1], self.call.index
        if index is not None:
            behind = torch.arange(text, device=index.device) + self.call.num_tokens
            index = torch.cat([index, behind.expand(len(index), -1)], dim=1)
        if self.kv is not None:
            key, value = self.kv.update(key, value, index)
        queries, keys = (
            pad(attention_mask, (x.shape[1] - attention_mask.shape[1], 0), value=True).bool() for x in (query, key)
        )
        out = self.attend(query, key, value, queries[:, None, :, None] & keys[:, None, None, :])
        video_out = attn.to_out[1](attn.to_out[0](self.ranks.heads_to_tokens(split, out[:, :-text])))
        return video_out, attn.to_add_out(self.ranks.gather_heads(out[:, -text:]))


class HunyuanVideo15Adapter(PatchesAdapter):
    """See `heterostep.models.base.Adapter`."""

    parallel = True

    def is_image_conditioned(self, model: Any, inputs: dict[str, Any]) -> bool:
        # The last channel is the mask of given frames.
        return bool(inputs["hidden_states"][:, -1].any())

    def install(self, model: Any, call: Call, on_velocity: Callable[[torch.Tensor], Any]) -> ModelPatches:
        def select_rows(output):
            return None if call.index is None else gather_rows(output, ranks().pad_to_ranks(call.index))

        def select_rotary(output):
            if call.index is None:
                return None
            index = ranks().pad_to_ranks(call.index)
            # Context parallelism has split them, all tokens', before.
            return tuple(ranks().shard(ranks().all_gather(table, 0)[index], 1) for table in output)

        def ranks():
            return ranks_of(model._parallel_config)

        patches = ModelPatches()
        patches.hook_output(model.x_embedder, select_rows)
        patches.hook_output(model.rope, select_rotary)
        patches.hook_output(model.proj_out, on_velocity)
        for block in model.transformer_blocks:
            patches.replace_processor(block.attn, JointAttention(block.attn.processor, call))
        return patches

    def cp_plan(self, model: Any) -> dict[str, Any]:
        # diffusers has none. Text stays whole on each rank; `JointAttention` is what makes this right.
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

        tables = {which: ContextParallelInput(0, expected_dims=2, split_output=True) for which in (0, 1)}
        return {
            "rope": tables,
            "transformer_blocks.0": {"hidden_states": ContextParallelInput(1, expected_dims=3)},
            "proj_out": ContextParallelOutput(1, expected_dims=3),
        }

    def prompt_shapes(self, pipe: Any, model: Any, arguments: Mapping[str, Any]) -> dict[str, tuple]:
        first, second = pipe.tokenizer_max_length, pipe.tokenizer_2_max_length
        return {
            "prompt_embeds": (first, model.config.text_embed_dim, model.dtype),
            "prompt_embeds_mask": (first, model.dtype),
            "prompt_embeds_2": (second, model.config.text_embed_2_dim, model.dtype),
            "prompt_embeds_mask_2": (second, model.dtype),
        }


FAMILIES = {
    "HunyuanVideo15Transformer3DModel": Family(
        HunyuanVideo15Adapter(),
        ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline", "HunyuanVideo15ModularPipeline"),
    ),
}
