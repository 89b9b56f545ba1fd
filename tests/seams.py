"""A model with its family's hooks and processors set, called without a runner: dense, then with some tokens alone."""

from __future__ import annotations

from typing import Any

import torch

from heterostep.adapters import FAMILIES, Call


class Seamed:
    """Args: model, and the inputs of one of its forwards by name."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, {**inputs, "return_dict": False}
        self.adapter = FAMILIES[type(model).__name__].adapter
        self.plain = self.model(**self.inputs)
        self.num_tokens = self.adapter.token_grid(model, inputs).num_tokens
        self.call, self.rows, self.held = Call(num_tokens=self.num_tokens), None, None
        self.seams = self.adapter.install(model, self.call, self._velocity)
        self.stores = [processor.store() for _, processor in self.seams.attentions]

    def _velocity(self, rows: torch.Tensor) -> torch.Tensor:
        self.rows = rows
        if self.call.index is None:
            self.held = rows
            return rows
        return self.held.scatter(1, self.call.index[..., None].expand_as(rows), rows)

    def dense(self) -> tuple[torch.Tensor, ...]:
        """All tokens, K/V kept."""
        return self._run(None)

    def sparse(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tokens of `index` [B, n] alone."""
        return self._run(index)

    def _run(self, index: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        self.call.index = index
        for (_, processor), store in zip(self.seams.attentions, self.stores):
            processor.kv = store
        inputs = self.inputs if index is None else self.adapter.select(self.model, self.inputs, index)
        out = self.model(**inputs)
        for _, processor in self.seams.attentions:
            processor.kv = None
        return out

    def random_index(self, count: int, seed: int = 4) -> torch.Tensor:
        """Other tokens for each row of the batch, ascending, [B, count]."""
        g = torch.Generator().manual_seed(seed)
        batch = self.inputs["hidden_states"].shape[0]
        return torch.stack([torch.randperm(self.num_tokens, generator=g)[:count].sort().values for _ in range(batch)])

    def restore(self) -> None:
        for undo in self.seams.undo:
            undo()
