# SPDX-License-Identifier: GPL-3.0-or-later
"""Single tokens in ComfyUI's Wan: at a sparse step the active tokens alone pass through the blocks.

Two of ComfyUI's hooks do it, and the model's forward stays as it is:

    patches_replace["dit"]         each block is given the active rows alone; the last one gives all rows again
    optimized_attention_override   K and V of the active tokens go into the store, and all tokens' are attended to

Shapes: b batch of a call, N tokens, n active tokens, H heads, D head dim, C values a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from heterostep.engine.generation import Branch, Generation
from heterostep.errors import HeterostepError
from heterostep.grid import TokenGrid
from heterostep.kernels import gather_rows
from heterostep.kv.cache import KVCache, KVShape

# Others of the family have tokens of their own between the blocks: control, sound, a reference.
MODELS = ("WanModel",)
WHOLE_STEPS = "evaluate whole steps (policy auto, sparse_share 0)"


class WanTokens:
    """The tokens of a Wan model's latents, and its calls with some of them.

    Args:
        model: ComfyUI's BaseModel.
        latents: the shape of the latents, [B, C, frames, height, width].

    Raises:
        HeterostepError: single tokens cannot run through this model.
    """

    def __init__(self, model: Any, latents: Sequence[int]) -> None:
        self._base, transformer = model, model.diffusion_model
        kind = type(transformer).__name__
        if kind not in MODELS:
            raise HeterostepError(
                f"single tokens run through Wan's plain models alone, not through {kind}: {WHOLE_STEPS}"
            )
        self._patch = tuple(transformer.patch_size)
        self._layers, self._heads = len(transformer.blocks), transformer.num_heads
        self._dim = transformer.dim // transformer.num_heads
        self.grid = TokenGrid(*(math.ceil(size / patch) for size, patch in zip(latents[2:], self._patch)))
        self._stores: dict[tuple, list[KVCache]] = {}
        self._pending: int | None = None  # the block whose self-attention comes next

    def rows(self, output: torch.Tensor, parts: int) -> list[torch.Tensor]:
        """The velocities of each conditioning's tokens, [B, N, C]."""
        return list(self._tokens(output).chunk(parts))

    def output(self, rows: Sequence[torch.Tensor], like: torch.Size) -> torch.Tensor:
        """The transformer's output [b, C, frames, height, width] with these velocities."""
        patches = torch.cat(list(rows)).unflatten(2, (*self._patch, -1)).unflatten(1, self.grid.shape)
        video = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        frames, height, width = like[2:]
        return video[:, :, :frames, :height, :width]

    def _tokens(self, video: torch.Tensor) -> torch.Tensor:
        sizes = [grid * patch for grid, patch in zip(self.grid.shape, self._patch)]
        if any(size - have not in range(patch) for size, have, patch in zip(sizes, video.shape[2:], self._patch)):
            raise HeterostepError(f"single tokens do not go with windows of frames or areas: {WHOLE_STEPS}")
        missing = [size - have for size, have in zip(sizes, video.shape[2:])]
        video = pad(video, (0, missing[2], 0, missing[1], 0, missing[0]))
        (f, h, w), (pf, ph, pw) = self.grid.shape, self._patch
        patches = video.unflatten(4, (w, pw)).unflatten(3, (h, ph)).unflatten(2, (f, pf))
        return patches.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)

    def clean(self, mask: torch.Tensor | None, latents: torch.Tensor) -> torch.Tensor | None:
        """bool [B, N]: tokens that are given; None where none are, or that cannot be told."""
        if mask is None:
            return None
        try:
            given = (mask.to(latents.device) == 0).expand(latents.shape)
        except RuntimeError:
            return None
        clean = self._tokens(given.float()).amin(-1) > 0
        return clean if clean.any() else None

    def call(
        self,
        executor: Any,
        args: tuple,
        kwargs: dict[str, Any],
        options: dict[str, Any],
        generation: Generation,
        group: tuple,
        branches: list[Branch],
        active: torch.Tensor | None,
    ) -> torch.Tensor:
        """The transformer's call with the active tokens, or with all of them, whose K and V are kept if a later step
        reads them.

        Args:
            executor, args, kwargs, options: see `run.Run.call`.
            group: the conditionings in the call; its K and V are kept together.
            branches: of each.
            active: int64 [B, n]; None where all are.
        """
        keep, parts = generation.wants_kv(False), len(branches)
        # A call of other conditionings than before has no K and V to read: all tokens are evaluated.
        index = None if active is None or group not in self._stores else active.repeat(parts, 1)
        if index is None and not keep:
            self.free(group)
            return executor(*args, **kwargs)
        if group not in self._stores:
            self._keep(generation, group, branches, args[0])
        workspace, stores = generation.workspace, self._stores[group]
        if index is None:
            workspace.reset()
            for store in stores:
                store.reserve(args[0].device)
        workspace.begin()
        workspace.write_back = keep
        own = {
            **options,
            "patches_replace": self._replacing(options, generation.total, index),
            "optimized_attention_override": self._attending(options, stores, index),
        }
        args = tuple(own if each is options else each for each in args)
        kwargs = {name: own if each is options else each for name, each in kwargs.items()}
        try:
            output = executor(*args, **kwargs)
        finally:
            self._pending = None
        generation.note_kv()
        if not keep:
            self.free(group)
        return output

    def _replacing(self, options: dict[str, Any], total: int, index: torch.Tensor | None) -> dict[str, Any]:
        """`patches_replace` with each block's, and in it what others have put there."""
        before = options.get("patches_replace", {})
        blocks, reduced = dict(before.get("dit", {})), {}

        def replace(layer: int) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
            others = blocks.get(("double_block", layer))

            def block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
                self._pending = layer
                if index is not None:
                    if layer == 0:
                        if args["img"].shape[1] != total:
                            raise HeterostepError(
                                f"single tokens do not go with reference frames beside the video: {WHOLE_STEPS}"
                            )
                        # These are the same for all blocks.
                        reduced["pe"] = gather_rows(args["pe"], index)
                        reduced["vec"] = _rows_of_modulation(args["vec"], total, index)
                        args = {**args, "img": gather_rows(args["img"], index)}
                    args = {**args, **reduced}
                out = extra["original_block"](args) if others is None else others(args, extra)
                if index is not None and layer == self._layers - 1:
                    rows = out["img"]
                    everyone = rows.new_zeros(rows.shape[0], total, rows.shape[2])
                    out = {**out, "img": everyone.scatter(1, index[..., None].expand_as(rows), rows)}
                return out

            return block

        return {**before, "dit": blocks | {("double_block", layer): replace(layer) for layer in range(self._layers)}}

    def _attending(
        self, options: dict[str, Any], stores: list[KVCache], index: torch.Tensor | None
    ) -> Callable[..., torch.Tensor]:
        """`optimized_attention_override`: a block's first attention is among its tokens, those that follow to the text.

        An override of others is called in place of ComfyUI's own attention.
        """
        others = options.get("optimized_attention_override")

        def attention(
            function: Callable[..., torch.Tensor],
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            heads: int,
            *more: Any,
            **named: Any,
        ) -> torch.Tensor:
            def attend(*args: Any, **named: Any) -> torch.Tensor:
                return function(*args, **named) if others is None else others(function, *args, **named)

            layer, self._pending = self._pending, None
            if layer is None:
                return attend(q, k, v, heads, *more, **named)
            key, value = stores[layer].update(k.unflatten(2, (heads, -1)), v.unflatten(2, (heads, -1)), index)
            if index is None:
                return attend(q, k, v, heads, *more, **named)
            query = q.unflatten(2, (heads, -1)).transpose(1, 2)
            named = {**named, "skip_reshape": True}
            return attend(query, key.transpose(1, 2), value.transpose(1, 2), heads, *more, **named)

        return attention

    def _keep(self, generation: Generation, group: tuple, branches: list[Branch], x: torch.Tensor) -> None:
        """Empty stores for a call's K and V, where they fit."""
        # Imported here: it brings diffusers, which whole steps do without.
        from heterostep.engine import forecast

        for other in [other for other in self._stores if set(other) & set(group)]:
            self.free(other)
        shape = KVShape(x.shape[0] * self._heads * generation.total, self._dim, x.dtype)
        if generation.stores is None:
            calls = max(1, round(len(generation.branches) / len(branches)))
            layers = [shape] * self._layers * calls
            name = generation.config.kv_store
            activations = 0
            if x.device.type == "cuda":
                activations = int(self._base.memory_required(list(x.shape)))
            room = forecast.room_on(x.device, None, activations)
            if name == "auto" and room is not None:
                room -= activations
                stores = forecast.choose(layers, room, room, forecast.host_room())
                if stores is None:
                    raise HeterostepError(
                        "K and V of all tokens fit neither in the GPU's memory nor in the host's: make a smaller or "
                        f"shorter video, or {WHOLE_STEPS}"
                    )
            else:
                stores = forecast.uniform("device" if name == "auto" else str(name), layers)
            generation.stores = stores
            generation.kv_store, generation.store_names = str(stores), stores.names
        first = len(self._stores) * self._layers
        names = generation.stores.names
        first = first if first + self._layers <= len(names) else 0
        made = [KVCache(name, generation.workspace) for name in names[first : first + self._layers]]
        for store in made:
            store.expected = shape
        self._stores[group] = made
        # For the account, and so that the run's end finds them.
        branches[0].stores = made

    def free(self, group: tuple | None = None) -> None:
        """Give K and V back, of one call's conditionings or of all."""
        for each in [group] if group is not None else list(self._stores):
            for store in self._stores.pop(each, ()):
                store.reset()


def _rows_of_modulation(vec: torch.Tensor, total: int, index: torch.Tensor) -> torch.Tensor:
    """The active tokens' modulation: [b, 6, C] or [b, 1, 6, C] as it is, [b, frames or N, 6, C] by token."""
    if vec.ndim < 4 or vec.shape[1] == 1:
        return vec
    # As the blocks repeat it over a frame's tokens.
    each = math.ceil(total / vec.shape[1])
    everyone = vec if each == 1 else vec.repeat_interleave(each, 1)[:, :total]
    return gather_rows(everyone, index)
