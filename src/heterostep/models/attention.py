"""What attention processors that keep K and V have in common.

Shapes: B batch, N tokens, n active tokens, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from heterostep.kernels import norm_rotate, rotate
from heterostep.kv.cache import KVCache, StaticKV, Workspace
from heterostep.parallel import Split, ranks_of


def normed_and_rotated(
    norm: Any,
    x: torch.Tensor,
    rotary_emb: tuple[torch.Tensor, torch.Tensor],
    heads: int,
    *,
    split: bool = False,
    by_head: bool = False,
) -> torch.Tensor:
    """[B, n, H * D] -> [B, n, H, D]: a norm module of all heads together, then the rotary embedding.

    For the tables, `split` and `by_head` (for keys, not for queries) see `heterostep.kernels.reference.norm_rotate`.
    """
    if is_plain(norm, x.dtype):
        return norm_rotate(x, norm.weight, norm.eps, *rotary_emb, heads, split, by_head)
    return rotate(norm(x).unflatten(2, (heads, -1)), *rotary_emb, split)


def is_plain(norm: Any, dtype: torch.dtype) -> bool:
    """Whether a norm module is its formula alone: offloading and casting hooks bring its weight to where x is."""
    hooked = norm._forward_pre_hooks or norm._forward_hooks or "forward" in norm.__dict__
    same_dtype = type(norm) is torch.nn.RMSNorm and (norm.weight is None or norm.weight.dtype == dtype)
    return same_dtype and not hooked


class CachedAttention:
    """A processor that is the one it replaces until it is given a store.

    Attributes:
        store: the kind of store that it wants, `KVCache` or `StaticKV`.
        kv: this call's store, set by the runner; None while the call runs as the plain model would.
        ranks: the processes that share the model's tokens.
    """

    store: type[KVCache] | type[StaticKV] = KVCache

    def __init__(self, original: Any, call: Any) -> None:
        self.original, self.call = original, call
        self.kv: Any = None
        self.ranks = ranks_of(getattr(original, "_parallel_config", None))

    @property
    def keeps_tokens(self) -> bool:
        """Whether it keeps K and V of the video's tokens, in one of the stores that `kv_store` names."""
        return self.store is KVCache

    @classmethod
    def make_store(cls, name: str, workspace: Workspace) -> KVCache | StaticKV:
        """An empty store for one guidance branch; `name` is one of `heterostep.kv.cache.STORES`."""
        return StaticKV() if cls.store is StaticKV else KVCache(name, workspace)

    def prepare(self, attn: Any, hidden_states: torch.Tensor) -> None:
        """Compile the kernels that calls with a store will use, before the first such call has to wait for them.

        Args:
            attn: the module that this processor is of.
            hidden_states: of the model's inputs: where it runs, and in which precision.
        """

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
        self.ranks = ranks_of(config)

    def split(self, hidden_states: torch.Tensor) -> Split:
        """How the tokens are split of which this rank has [B, n, ...]."""
        return self.ranks.split(hidden_states.shape[1], self.call.index, self.call.num_tokens)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, n, H, D] on [B, N, H, D] -> [B, n, H * D], by the backend that the user chose."""
        out = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
        return out.flatten(2, 3).type_as(query)
