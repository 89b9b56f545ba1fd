"""Wan 2.1 and 2.2: `WanTransformer3DModel`, `WanVACETransformer3DModel`.

The model's forward is left as it is. Reduced are what enters the blocks (after the patch embeddings), the rotary tables
and per-token timesteps; the output projection's rows are put back among the held ones. Two attention processors keep K
and V. VACE's own blocks read control tokens, one to each video token: they are reduced alike.

Shapes: B batch, N tokens, n active tokens, H heads, D head dim, C values a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from heterostep.kernels import gather_rows
from heterostep.kv.cache import StaticKV
from heterostep.models.attention import CachedAttention, is_plain, normed_and_rotated
from heterostep.models.base import Adapter, Call, Checkpoint, Family, ModelPatches, TokenGrid
from heterostep.parallel import ranks_of

# WanAttention gives the text this many states; what comes before them is the image's.
TEXT_STATES = 512


class SelfAttention(CachedAttention):
    """Active tokens' fresh K and V overwrite their rows of the cache; active queries attend to all rows."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if self.kv is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = normed_and_rotated(attn.norm_q, query, rotary_emb, attn.heads)
        key = normed_and_rotated(attn.norm_k, key, rotary_emb, attn.heads, by_head=True)
        split = self.split(hidden_states)
        query, key, value = self.ranks.tokens_to_heads(split, query, key, value.unflatten(2, (attn.heads, -1)))
        key, value = self.kv.update(key, value, self.call.index)
        out = self.ranks.heads_to_tokens(split, self.attend(query, key, value))
        return attn.to_out[1](attn.to_out[0](out))

    def prepare(self, attn: Any, hidden_states: torch.Tensor) -> None:
        """See `CachedAttention.prepare`."""
        if not hidden_states.is_cuda or not is_plain(attn.norm_k, hidden_states.dtype):
            return
        rows = hidden_states.new_zeros(1, 1, attn.inner_dim)
        tables = torch.zeros(1, 1, 1, attn.inner_dim // attn.heads, device=rows.device)
        for by_head in (True, False):
            normed_and_rotated(attn.norm_k, rows, (tables, tables), attn.heads, by_head=by_head)


class CrossAttention(CachedAttention):
    """Text and image K/V are the same at every step: computed in a dense step, kept for the sparse ones."""

    store = StaticKV

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if self.kv is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if self.call.index is None or self.kv.tensors is None:
            self.kv.tensors = self._project(attn, encoder_hidden_states)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key, value, *image = self.kv.tensors
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
        # Laid out as attention backends read it, so that no call copies it.
        return tuple(x.unflatten(2, (attn.heads, -1)).transpose(1, 2).contiguous().transpose(1, 2) for x in kv)


class WanAdapter(Adapter):
    """See `heterostep.models.base.Adapter`."""

    parallel = True

    def token_grid(self, model: Any, inputs: dict[str, Any]) -> TokenGrid:
        sizes, patch = inputs["hidden_states"].shape[2:], model.config.patch_size
        return TokenGrid(*(size // p for size, p in zip(sizes, patch, strict=True)))

    def is_image_conditioned(self, model: Any, inputs: dict[str, Any]) -> bool:
        # Image-to-video checkpoints are given the frames' latents in channels beside the noisy ones.
        channels = inputs["hidden_states"].shape[1]
        return channels > (model.config.out_channels or channels) or super().is_image_conditioned(model, inputs)

    def unpatchify(self, model: Any, grid: TokenGrid, velocities: torch.Tensor) -> torch.Tensor:
        # Of a token's values the channels come last.
        patches = velocities.unflatten(2, (*model.config.patch_size, -1)).unflatten(1, grid.shape)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def expert_switch(self, pipe: Any) -> int | None:
        # Wan 2.2 A14B: the first transformer takes the steps at and above the boundary.
        ratio = pipe.config.get("boundary_ratio")
        if ratio is None or pipe.transformer is None or pipe.transformer_2 is None:
            return None
        boundary = ratio * pipe.scheduler.config.num_train_timesteps
        low_noise = (pipe.scheduler.timesteps < boundary).nonzero()
        return int(low_noise[0]) if len(low_noise) else None

    def install(self, model: Any, call: Call, on_velocity: Callable[[torch.Tensor], Any]) -> ModelPatches:
        def select_rows(output):
            if call.index is None:
                return None
            rows = output.flatten(2).transpose(1, 2)
            # Control videos may be shorter than the video: the model fills them up, but after this hook.
            rows = pad(rows, (0, 0, 0, call.num_tokens - rows.shape[1]))
            index = ranks_of(model._parallel_config).pad_to_ranks(call.index)
            return gather_rows(rows, index).transpose(1, 2)[..., None, None]

        def select_rotary(output):
            if call.index is None:
                return None
            ranks = ranks_of(model._parallel_config)
            index = ranks.pad_to_ranks(call.index)
            # Context parallelism has split them, all tokens', before.
            return tuple(ranks.shard(gather_rows(ranks.all_gather(table, 1), index), 1) for table in output)

        patches = ModelPatches()
        patches.hook_output(model.patch_embedding, select_rows)
        patches.hook_output(model.rope, select_rotary)
        patches.hook_output(model.proj_out, on_velocity)
        blocks = [*model.blocks, *getattr(model, "vace_blocks", [])]
        if hasattr(model, "vace_patch_embedding"):
            patches.hook_output(model.vace_patch_embedding, select_rows)
        for block in blocks:
            for attn, processor in ((block.attn1, SelfAttention), (block.attn2, CrossAttention)):
                patches.replace_processor(attn, processor(attn.processor, call))
        return patches

    def prompt_shapes(self, pipe: Any, model: Any, arguments: Mapping[str, Any]) -> dict[str, tuple]:
        return {"prompt_embeds": (arguments["max_sequence_length"], model.config.text_dim, model.dtype)}


class VACEAdapter(WanAdapter):
    """See `heterostep.models.base.Adapter`."""

    # diffusers has no plan for its control blocks.
    parallel = False


# By class name, so that no transformer class has to be imported.
FAMILIES = {
    "WanTransformer3DModel": Family(
        WanAdapter(),
        (
            "WanPipeline",
            "WanImageToVideoPipeline",
            "WanVideoToVideoPipeline",
            "WanModularPipeline",
            "WanImage2VideoModularPipeline",
            "Wan22ModularPipeline",
            "Wan22Image2VideoModularPipeline",
        ),
        {
            "WanPipeline": Checkpoint("WanPipeline", "WanImageToVideoPipeline", 16),
            "WanImageToVideoPipeline": Checkpoint(None, "WanImageToVideoPipeline", 16),
        },
    ),
    "WanVACETransformer3DModel": Family(VACEAdapter(), ("WanVACEPipeline", "Wan22VaceModularPipeline")),
}
