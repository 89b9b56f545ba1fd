"""A transformer's calls outside of a pipeline: for forecasts, benchmarks and tests.

Shapes: B batch of a call, N tokens, n active tokens, C values a token.
"""

from __future__ import annotations

from typing import Any

import torch

from heterostep.engine.cuda_graphs import ReplayedCalls, pays
from heterostep.errors import HeterostepError
from heterostep.kv.cache import KVCache, StaticKV, Workspace
from heterostep.models import FAMILIES, Call
from heterostep.parallel import ranks_of


class DirectCalls:
    """A model with its family's hooks and processors set, called without a runner.

    Args:
        model: a transformer of one of `FAMILIES`.
        inputs: of one of its forwards, by name.
        store: how K and V are kept, one of `heterostep.kv.cache.STORES`.

    Attributes:
        num_tokens: N.
        rows: what the output projection returned last, [B, n, C].
        held: all tokens' velocities of the last dense call, [B, N, C].
        stores: of each attention that keeps K and V.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], store: str = "device") -> None:
        self.model, self.inputs = model, {**inputs, "return_dict": False}
        self.adapter = FAMILIES[type(model).__name__].adapter
        grid = self.adapter.token_grid(model, inputs)
        self.num_tokens = grid.num_tokens
        self.call = Call(num_tokens=self.num_tokens, grid=grid)
        self.rows: torch.Tensor | None = None
        self.held: torch.Tensor | None = None
        self._patches = self.adapter.install(model, self.call, self._velocity)
        self._replays: dict[int, ReplayedCalls] = {}
        self._ranks = ranks_of(getattr(model, "_parallel_config", None))
        self.use(store)

    def use(self, store: str, drift: bool = False) -> None:
        """Keep K and V in another store from the next dense call on; with `drift` a sparse call moves the others'."""
        self._replays.clear()
        self.workspace = Workspace()
        self.drift = drift
        self.stores: list[KVCache | StaticKV] = [
            processor.make_store(store, self.workspace) for _, processor in self._patches.attentions
        ]

    def plain(self) -> tuple[torch.Tensor, ...]:
        """All tokens, nothing kept: the model as it is."""
        return self._run(None, keep=False)

    def dense(self) -> tuple[torch.Tensor, ...]:
        """All tokens, K and V kept."""
        return self._run(None)

    def sparse(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tokens of `index`, int64 [B, n], alone; after a dense call."""
        return self._run(index)

    def replayed(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `sparse`, but a call of as many tokens as the one before is replayed, where that can be done."""
        count = index.shape[1]
        if count not in self._replays:
            self._replays[count] = ReplayedCalls(
                self.model, self._patches.hooked, index.device, torch.cuda.graph_pool_handle, self._ranks
            )
        reads = [t for kept in (*self.stores, self.workspace) for t in kept.tensors or ()]
        return self._replays[count](self._run, index, reads if self.held is None else [*reads, self.held])

    def may_be_replayed(self, index: torch.Tensor) -> bool:
        """Whether so small a call is recorded in a run that keeps all K and V on the device."""
        return pays(index, self._ranks)

    def is_recorded(self, count: int) -> bool:
        """Whether `replayed` replays calls of as many tokens."""
        return count in self._replays and self._replays[count].recorded

    def random_index(self, count: int, seed: int = 4) -> torch.Tensor:
        """Other tokens for each row of the batch, ascending, int64 [B, count] where the inputs are."""
        states = self.inputs["hidden_states"]
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(self.num_tokens, generator=generator)[:count].sort().values for _ in states]
        return torch.stack(rows).to(states.device)

    def restore(self) -> None:
        """Give the model back as it was, and the memory."""
        for undo in reversed(self._patches.undo):
            undo()
        self.stores, self.rows, self.held = [], None, None
        self._replays.clear()
        self.workspace.reset()

    def _velocity(self, rows: torch.Tensor) -> torch.Tensor:
        self.rows = rows = self.call.active_rows(rows)
        if self.call.index is None:
            self.held = rows
            return rows
        assert self.held is not None
        return self.held.scatter(1, self.call.index[..., None].expand_as(rows), rows)

    def _run(self, index: torch.Tensor | None, keep: bool = True) -> tuple[torch.Tensor, ...]:
        self.call.index = index
        self.workspace.begin()
        if self.drift:
            states = self.inputs["hidden_states"]
            far = torch.ones(states.shape[0], self.num_tokens, device=states.device)
            self.workspace.extrapolation = far if index is None else far.scatter(1, index, 0.0)
        for (_, processor), store in zip(self._patches.attentions, self.stores, strict=True):
            processor.kv = store if keep else None
        inputs = self.inputs
        if index is not None:
            inputs = self.adapter.select_tokens(self.model, inputs, self._ranks.pad_to_ranks(index))
        try:
            return self.model(**inputs)
        finally:
            self.call.index = None
            for _, processor in self._patches.attentions:
                processor.kv = None


@torch.no_grad()
def check_adapter(model: Any, inputs: dict[str, Any]) -> None:
    """Compare the calls that a family's adapter makes of a model with the model's own: for whoever writes one.

    Args:
        model: a transformer of one of `FAMILIES`, best a small one in float32; it is left as it is.
        inputs: of one of its forwards, by name.

    Raises:
        HeterostepError: they differ; says in which call.
    """
    plain = model(**{**inputs, "return_dict": False})[0]
    calls = DirectCalls(model, inputs)
    try:
        if not torch.equal(calls.dense()[0], plain):
            raise HeterostepError(
                "the dense call differs from the model's: processors must compute as the originals do"
            )
        if calls.held is None or calls.held.shape[1] != calls.num_tokens:
            raise HeterostepError("on_velocity was not given one row for each token of token_grid")
        grid = calls.adapter.token_grid(model, inputs)
        if not torch.equal(calls.adapter.unpatchify(model, grid, calls.held), plain):
            raise HeterostepError("unpatchify does not make the model's output of its tokens' velocities")
        for count in sorted({1, calls.num_tokens // 7, calls.num_tokens // 2} - {0}):
            error = (calls.sparse(calls.random_index(count))[0] - plain).abs().max()
            if not error <= 1e-4 * plain.std():
                raise HeterostepError(
                    f"with {count} of {calls.num_tokens} tokens active their velocities differ from a dense call's by "
                    f"up to {error:.2g}: something is selected for other tokens, or attention misses the inactive ones"
                )
    finally:
        calls.restore()
