"""HunyuanVideo 1.0: `HunyuanVideoTransformer3DModel`, of blocks for video and text apart and then of blocks for both.

Video tokens are reduced after the patch embedding; text tokens stay active at every step, for they change with the
video. The K/V cache holds both, the video's rows first. A given first frame (`image_condition_type="token_replace"`) is
modulated as at time 0, and the blocks tell its tokens by their place, the first in the sequence: so all of them run at
every step, before the active ones. An active token of that frame is then there twice; the first one counts.

Shapes: B batch, N video tokens, n active ones, F tokens of the given frame, T text tokens, H heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from heterostep.kernels import gather_rows, rotate
from heterostep.models.attention import CachedAttention
from heterostep.models.base import Adapter, Call, Checkpoint, Family, ModelPatches, TokenGrid


class JointAttention(CachedAttention):
    """Queries of the video's tokens in the sequence and of the text attend to K and V of everything."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if self.kv is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        text, heads = encoder_hidden_states.shape[1], (attn.heads, -1)
        # Blocks for video and text apart have projections for each.
        apart = attn.add_q_proj is not None
        if not apart:
            hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        query, key, value = (
            project(hidden_states).unflatten(2, heads) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
        if apart:
            text_query, text_key, text_value = (
                project(encoder_hidden_states).unflatten(2, heads)
                for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            query = torch.cat([query, _normed(attn.norm_added_q, text_query)], dim=1)
            key = torch.cat([key, _normed(attn.norm_added_k, text_key)], dim=1)
            value = torch.cat([value, text_value], dim=1)
        # [N, D] of the model, or [B, n, D] where rows were picked.
        rotary = [table[:, :, None] if table.ndim == 3 else table[None, :, None] for table in image_rotary_emb]
        query, key = (torch.cat([rotate(x[:, :-text], *rotary), x[:, -text:]], dim=1) for x in (query, key))
        key, value = self._remembered(key, value, text)
        # One row for all queries, [B, 1, 1, F + n + T]: the tokens that are left out are seen as well.
        mask = pad(attention_mask, (key.shape[1] - attention_mask.shape[-1], 0), value=True)
        out = self.attend(query, key, value, mask)
        video, text_out = out[:, :-text], out[:, -text:]
        if not apart:
            return video, text_out
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text_out)

    def _remembered(self, key: torch.Tensor, value: torch.Tensor, text: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the sequence [B, F + n + T, H, D] -> of everything [B, N + T, H, D]."""
        index = self.call.index
        if index is None:
            return self.kv.update(key, value, None)
        given = key.shape[1] - text - index.shape[1]
        behind = torch.arange(text, device=index.device) + self.call.num_tokens
        place = torch.cat([with_given(index, given), behind.expand(len(index), -1)], dim=1)
        keys, values = self.kv.update(key, value, place)
        if given:
            # Of the first, where a token is there twice; of this step, also where others are moved on (`sync="drift"`).
            keys[:, :given], values[:, :given] = key[:, :given], value[:, :given]
        return keys, values


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)


def with_given(index: torch.Tensor, given: int) -> torch.Tensor:
    """int64 [B, n] -> [B, F + n]: the given frame's tokens, 0 to F - 1, before them."""
    if not given:
        return index
    return torch.cat([torch.arange(given, device=index.device).expand(len(index), -1), index], dim=1)


def where_active(index: torch.Tensor, given: int) -> torch.Tensor:
    """Where in the sequence each active token is, int64 [B, n]: those of the given frame in their places there."""
    return torch.where(index < given, index, torch.arange(index.shape[1], device=index.device) + given)


def _patch_sizes(model: Any) -> tuple[int, int, int]:
    """Of frames, rows and columns."""
    return model.config.patch_size_t, model.config.patch_size, model.config.patch_size


class PatchesAdapter(Adapter):
    """What the versions share: latents [B, C, F, H, W] are cut into patches, a token each."""

    def token_grid(self, model: Any, inputs: dict[str, Any]) -> TokenGrid:
        return TokenGrid(
            *(size // patch for size, patch in zip(inputs["hidden_states"].shape[2:], _patch_sizes(model)))
        )

    def unpatchify(self, model: Any, grid: TokenGrid, velocities: torch.Tensor) -> torch.Tensor:
        # Of a token's values the channels come first.
        patches = velocities.unflatten(2, (-1, *_patch_sizes(model))).unflatten(1, grid.shape)
        return patches.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class HunyuanVideoAdapter(PatchesAdapter):
    """See `heterostep.models.base.Adapter`."""

    def install(self, model: Any, call: Call, on_velocity: Callable[[torch.Tensor], Any]) -> ModelPatches:
        replaced = model.config.image_condition_type == "token_replace"

        def given() -> int:
            return call.grid.height * call.grid.width if replaced and call.grid is not None else 0

        def select_rows(output):
            return None if call.index is None else gather_rows(output, with_given(call.index, given()))

        def select_rotary(output):
            return None if call.index is None else tuple(table[with_given(call.index, given())] for table in output)

        def velocities(output):
            if call.index is not None and replaced:
                output = gather_rows(output, where_active(call.index, given()))
            return on_velocity(output)

        patches = ModelPatches()
        patches.hook_output(model.rope, select_rotary)
        patches.hook_output(model.x_embedder, select_rows)
        patches.hook_output(model.proj_out, velocities)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            patches.replace_processor(block.attn, JointAttention(block.attn.processor, call))
        return patches

    def clean_tokens(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        if model.config.image_condition_type != "token_replace":
            return None
        grid, latents = self.token_grid(model, inputs), inputs["hidden_states"]
        first = torch.arange(grid.num_tokens, device=latents.device) < grid.height * grid.width
        return first.expand(len(latents), -1)

    def is_image_conditioned(self, model: Any, inputs: dict[str, Any]) -> bool:
        return model.config.image_condition_type is not None

    def prompt_shapes(self, pipe: Any, model: Any, arguments: Mapping[str, Any]) -> dict[str, tuple]:
        length, condition = arguments["max_sequence_length"], model.config.image_condition_type
        lengths = {"": length, "negative_": length}
        if condition is not None:
            # The states of an image go before the text's, every second or fourth of them; four of the template do not.
            template, every = arguments["prompt_template"], arguments["image_embed_interleave"]
            if every is None:
                every = 4 if condition == "token_replace" else 2
            states = template.get("image_emb_len", 576)
            # The pipeline does not pass its choice on to the negative prompt.
            lengths = {name: length - 4 + math.ceil(states / step) for name, step in (("", every), ("negative_", 2))}
        return {
            f"{which}{name}": shape
            for which, states in lengths.items()
            for name, shape in {
                "prompt_embeds": (states, model.config.text_embed_dim, model.dtype),
                "prompt_attention_mask": (states, torch.int64),
                "pooled_prompt_embeds": (model.config.pooled_projection_dim, model.dtype),
            }.items()
        }


FAMILIES = {
    "HunyuanVideoTransformer3DModel": Family(
        HunyuanVideoAdapter(),
        ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
        {
            "HunyuanVideoPipeline": Checkpoint("HunyuanVideoPipeline", None, 24),
            "HunyuanVideoImageToVideoPipeline": Checkpoint(None, "HunyuanVideoImageToVideoPipeline", 24),
        },
    ),
}
