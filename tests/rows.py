"""Every supported kind of checkpoint by name: how its small pipeline is built and run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import small_wan


@dataclass(frozen=True)
class Row:
    """build() -> pipeline; run(pipe, steps=, seed=, **options) -> latents, video first, audio where there is any.

    `larger` are options that make more tokens.
    """

    build: Callable[[], Any]
    run: Callable[..., tuple[torch.Tensor, ...]]
    larger: dict[str, Any]


def _wan(name: str) -> Row:
    def run(pipe: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        return (small_wan.run_wan(name, pipe, **options),)

    return Row(lambda: small_wan.small_wan(name), run, larger=dict(height=96, width=96))


ROWS = {name: _wan(name) for name in small_wan.ROWS}


def transformers(pipe: Any) -> list[Any]:
    """The pipeline's one or two transformers."""
    return [model for model in (pipe.transformer, getattr(pipe, "transformer_2", None)) if model is not None]


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    """Bit for bit, and finite."""
    return all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(a, b, strict=True))
