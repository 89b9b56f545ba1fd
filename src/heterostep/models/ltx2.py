"""LTX-2: `LTX2VideoTransformer3DModel`, which makes video and audio together.

Its inputs are tokens already, with a position each: they are reduced before the forward, and rotary tables and
modulation follow from them. Video tokens are read by two attentions in each block, their own and the audio's, so both
keep K and V. Audio tokens are few and stay active at every step.

Shapes: B batch, N video tokens, n active ones, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch

from heterostep.kernels import gather_rows
from heterostep.kv.cache import StaticKV
from heterostep.models.attention import CachedAttention, is_plain, normed_and_rotated
from heterostep.models.base import Call, Checkpoint, Family, ModelPatches, TokenGrid
from heterostep.models.ltx import GuidanceInBatch


def _normed_and_rotated(attn: Any, norm: Any, x: torch.Tensor, rotary_emb: Any, by_head: bool = False) -> torch.Tensor:
    """[B, n, H * D] -> [B, n, H, D]. Tables are the model's: split [B, H, n, D / 2], else [B, n, H * D]."""
    if rotary_emb is None:
        return norm(x).unflatten(2, (attn.heads, -1))
    split = attn.rope_type == "split"
    cos, sin = (table.transpose(1, 2) if split else table.unflatten(2, (attn.heads, -1)) for table in rotary_emb)
    return normed_and_rotated(norm, x, (cos, sin), attn.heads, split=split, by_head=by_head)


class VideoAttention(CachedAttention):
    """Attention whose K and V are of the video: active tokens' rows are overwritten, all rows are read."""

    # Its signature tells LTX2Attention to hand on STG's arguments.
    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        query_rotary_emb=None,
        key_rotary_emb=None,
        perturbation_mask=None,
        all_perturbed=None,
    ):
        perturbed = all_perturbed
        if perturbed is None and perturbation_mask is not None:
            perturbed = torch.all(perturbation_mask == 0)
        # STG's perturbed blocks pass on each token's own value: nothing is attended to.
        if self.kv is None or perturbed:
            # Processors of models without perturbed attention do not know these arguments.
            stg = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
            stg = {} if perturbation_mask is None and all_perturbed is None else stg
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb, **stg
            )
        query = _normed_and_rotated(attn, attn.norm_q, attn.to_q(hidden_states), query_rotary_emb)
        own_value, key, value = self.key_value(
            attn,
            hidden_states if encoder_hidden_states is None else encoder_hidden_states,
            query_rotary_emb if key_rotary_emb is None else key_rotary_emb,
        )
        if attention_mask is not None:
            # Rows are those of the queries, or one for all; columns are those of all keys.
            attention_mask = attention_mask[:, None].expand(-1, attn.heads, -1, -1)
        out = self.attend_to(query, key, value, attention_mask, own=encoder_hidden_states is None)
        if perturbation_mask is not None:
            out = torch.lerp(own_value, out, perturbation_mask)
        if attn.to_gate_logits is not None:
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))

    def prepare(self, attn: Any, hidden_states: torch.Tensor) -> None:
        """See `CachedAttention.prepare`."""
        if not hidden_states.is_cuda or not is_plain(attn.norm_k, hidden_states.dtype):
            return
        # Strides, too, are as they will be: multiples of 16.
        rows = hidden_states.new_zeros(1, 16, attn.inner_dim)
        pairs = attn.inner_dim // attn.heads // 2
        split = attn.rope_type == "split"
        table = torch.zeros((1, attn.heads, 16, pairs) if split else (1, 16, attn.inner_dim), device=rows.device)
        for by_head in (True, False):
            _normed_and_rotated(attn, attn.norm_k, rows, (table, table), by_head)

    def key_value(self, attn: Any, states: torch.Tensor, rotary_emb: Any) -> tuple[torch.Tensor, ...]:
        """The states' own V [B, n, H * D]; their K and V by head, [B, n, H, D]."""
        own_value = attn.to_v(states)
        key = _normed_and_rotated(attn, attn.norm_k, attn.to_k(states), rotary_emb, by_head=True)
        return own_value, key, own_value.unflatten(2, (attn.heads, -1))

    def attend_to(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, own: bool
    ) -> torch.Tensor:
        """Attend with these K and V [B, n, H, D] and those that are kept: [B, n, H * D].

        Args:
            own: whether the queries are the video's too. The audio's are whole on each rank.
        """
        split = self.split(key)
        if own:
            query, key, value = self.ranks.tokens_to_heads(split, query, key, value)
        else:
            (query,), (key, value) = self.ranks.shard_heads(query), self.ranks.tokens_to_heads(split, key, value)
        key, value = self.kv.update(key, value, self.call.index)
        out = self.attend(query, key, value, mask)
        return self.ranks.heads_to_tokens(split, out) if own else self.ranks.gather_heads(out)


class AudioAttention(VideoAttention):
    """Attention whose K and V are of the audio: fresh at every step, so nothing is kept; normed and rotated alike.

    Every rank has them whole.
    """

    # Stays empty. Its presence alone says that the call is not the plain model's.
    store = StaticKV

    def key_value(self, attn: Any, states: torch.Tensor, rotary_emb: Any) -> tuple[torch.Tensor, ...]:
        """As in `VideoAttention`; the states are everyone's."""
        value = attn.to_v(states)
        key = _normed_and_rotated(attn, attn.norm_k, attn.to_k(states), rotary_emb)
        return value, key, value.unflatten(2, (attn.heads, -1))

    def attend_to(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, own: bool
    ) -> torch.Tensor:
        """As in `VideoAttention`; nothing is exchanged."""
        return self.attend(query, key, value, mask)


class TextAttention(AudioAttention):
    """Attention to text that no step modulates: K and V are computed once and kept, in one place for recorded calls."""

    store = StaticKV

    def prepare(self, attn: Any, hidden_states: torch.Tensor) -> None:
        """See `CachedAttention.prepare`: text is normed by PyTorch alone."""

    def key_value(self, attn: Any, states: torch.Tensor, rotary_emb: Any) -> tuple[torch.Tensor, ...]:
        """As in `VideoAttention`; text states have no rotary embedding."""
        if self.kv.tensors is None:
            key, value = attn.norm_k(attn.to_k(states)), attn.to_v(states)
            self.kv.tensors = tuple(x.unflatten(2, (attn.heads, -1)) for x in (key, value))
        key, value = self.kv.tensors
        return value.flatten(2, 3), key, value


class LTX2Adapter(GuidanceInBatch):
    """See `heterostep.models.base.Adapter`. The calls for STG and modality guidance have one branch in their batch."""

    # The audio's velocity is wanted at every step; a video token more or less costs nothing beside it.
    min_active = 1
    parallel = True

    def token_grid(self, model: Any, inputs: dict[str, Any]) -> TokenGrid:
        num_tokens = inputs["hidden_states"].shape[1]
        sizes = [inputs.get(name) for name in ("num_frames", "height", "width")]
        if None in sizes:
            return TokenGrid(1, 1, num_tokens)
        patches = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
        frames, height, width = (size // patch for size, patch in zip(sizes, patches, strict=True))
        return TokenGrid(frames, height, width, extra=num_tokens - frames * height * width)

    def call_kind(self, inputs: dict[str, Any]) -> Hashable:
        # STG's and modality guidance's calls have the text of the first one's.
        return bool(inputs.get("spatio_temporal_guidance_blocks")), bool(inputs.get("isolate_modalities"))

    def select_tokens(self, model: Any, inputs: dict[str, Any], index: torch.Tensor) -> dict[str, Any]:
        hidden_states, coords = inputs["hidden_states"], inputs.get("video_coords")
        if coords is None:
            sizes = (inputs["num_frames"], inputs["height"], inputs["width"])
            coords = model.rope.prepare_video_coords(
                hidden_states.shape[0], *sizes, hidden_states.device, fps=inputs.get("fps", 24.0)
            )
        selected = {
            "hidden_states": gather_rows(hidden_states, index),
            "video_coords": gather_rows(coords.transpose(1, 2), index).transpose(1, 2),
        }
        for name in ("video_self_attention_mask", "video_keyframes_mask"):
            if inputs.get(name) is not None:
                selected[name] = gather_rows(inputs[name], index)
        return super().select_tokens(model, {**inputs, **selected}, index)

    def install(self, model: Any, call: Call, on_velocity: Callable[[torch.Tensor], Any]) -> ModelPatches:
        patches = ModelPatches()
        patches.hook_output(model.proj_out, on_velocity)
        text_is_static = not (model.prompt_modulation and model.config.use_prompt_adaln_single)
        for block in model.transformer_blocks:
            for attn in (block.attn1, block.video_to_audio_attn):
                patches.replace_processor(attn, VideoAttention(attn.processor, call))
            for attn in (block.audio_attn1, block.audio_to_video_attn):
                patches.replace_processor(attn, AudioAttention(attn.processor, call))
            if text_is_static:
                patches.replace_processor(block.attn2, TextAttention(block.attn2.processor, call))
        return patches

    def cp_plan(self, model: Any) -> dict[str, Any]:
        # diffusers' own splits the text, whose mask it then has no use for, and not all of the rotary tables.
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

        # Split tables are [B, H, N, D / 2], the others [B, N, H * D].
        dim, dims = (2, 4) if model.config.rope_type == "split" else (1, 3)
        tables = {which: ContextParallelInput(dim, expected_dims=dims, split_output=True) for which in (0, 1)}
        return {
            # One for all is [B] and stays.
            "": {"timestep": ContextParallelInput(1, expected_dims=2)},
            "rope": tables,
            "cross_attn_rope": tables,
            "transformer_blocks.0": {"hidden_states": ContextParallelInput(1, expected_dims=3)},
            "proj_out": ContextParallelOutput(1, expected_dims=3),
        }

    def local_attentions(self, model: Any) -> Iterable[Any]:
        for block in model.transformer_blocks:
            yield from (block.attn2, block.audio_attn1, block.audio_attn2, block.audio_to_video_attn)

    def prompt_shapes(self, pipe: Any, model: Any, arguments: Mapping[str, Any]) -> dict[str, tuple]:
        # The states of all of the encoder's layers; the connectors make the transformer's of them.
        length, config = arguments["max_sequence_length"], pipe.connectors.config
        return {
            "prompt_embeds": (length, config.caption_channels * config.text_proj_in_factor, model.dtype),
            "prompt_attention_mask": (length, torch.int64),
        }


FAMILIES = {
    "LTX2VideoTransformer3DModel": Family(
        LTX2Adapter(),
        ("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline", "LTX2ModularPipeline"),
        {
            "LTX2Pipeline": Checkpoint("LTX2Pipeline", "LTX2ImageToVideoPipeline", 24),
            "LTX2ImageToVideoPipeline": Checkpoint("LTX2Pipeline", "LTX2ImageToVideoPipeline", 24),
        },
    ),
}
