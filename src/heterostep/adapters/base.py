"""What the runner needs to know of a model family. A family is one file beside this one and a row in `ADAPTERS`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from heterostep.state import Branch


@dataclass
class Call:
    """The transformer call under way, as hooks and attention processors see it.

    Attributes:
        branch: where this call's K/V are kept; None while the call runs as the plain model would.
        index: the active tokens, int64 [B, n]; None where all are.
    """

    branch: Branch | None = None
    index: torch.Tensor | None = None


class Adapter(Protocol):
    """One model family. Hooks and processors read the `Call`; tokens are the rows of the output projection."""

    def token_grid(self, model: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """Frames, height and width of the token grid for these inputs."""
        ...

    def clean_tokens(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """bool [B, N]: tokens that carry no noise (a given first frame), or None where all do."""
        ...

    def select(self, inputs: dict[str, Any], index: torch.Tensor) -> dict[str, Any]:
        """The forward's inputs with everything that has one entry per token reduced to the active ones."""
        ...

    def install(self, model: Any, call: Call, on_velocity: Any) -> list[Any]:
        """Set hooks and processors; return what undoes each, in order, as callables.

        `on_velocity(rows)` takes the output projection's rows [B, n, C] and returns those of all tokens [B, N, C].
        """
        ...

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """All of the forward's arguments by name."""
        ...
