"""Every supported kind of checkpoint by name: how its small pipeline is built and run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

import small_hunyuan
import small_hunyuan1
import small_ltx
import small_ltx2
import small_wan

# One of each family, and those with two experts, two kinds of blocks, given tokens.
REPRESENTATIVE = (
    "wan2.1-t2v",
    "wan2.2-i2v",
    "wan2.1-vace",
    "wan2.2-ti2v-i2v",
    "ltx2.3-i2v",
    "ltx0.9-t2v",
    "hunyuan1.5-t2v",
    "hunyuan1.0-t2v",
)


def quickly(names: Iterable[Any], quick: Iterable[Any] = REPRESENTATIVE) -> list[Any]:
    """Parameters of a test, all but the `quick` ones marked as slow."""
    quick = tuple(quick)
    return [name if name in quick else _slow(name) for name in names]


def _slow(name: Any) -> Any:
    return pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=pytest.mark.slow)


@dataclass(frozen=True)
class Row:
    """build() -> pipeline; run(pipe, steps=, seed=, **options) -> latents, video first, audio where there is any.

    `larger` are options that make more tokens than the usual `grid`.
    """

    build: Callable[[], Any]
    run: Callable[..., tuple[torch.Tensor, ...]]
    larger: dict[str, Any]
    grid: tuple[int, int, int] = (3, 4, 4)


def _wan(name: str) -> Row:
    def run(pipe: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        return (small_wan.run_wan(name, pipe, **options),)

    # A reference image becomes a frame of its own.
    grid = (4, 4, 4) if name == "wan2.1-vace" else (3, 4, 4)
    return Row(lambda: small_wan.small_wan(name), run, dict(height=96, width=96), grid)


def _ltx(kind: str, options: Callable[[], dict[str, Any]]) -> Row:
    def run(pipe: Any, **more: Any) -> tuple[torch.Tensor, ...]:
        return (small_ltx.run_ltx(pipe, **{**options(), **more}),)

    return Row(lambda: small_ltx.small_ltx(kind), run, larger=dict(size=96))


def _ltx2(kind: str, version: str, options: Callable[[], dict[str, Any]]) -> Row:
    def run(pipe: Any, **more: Any) -> tuple[torch.Tensor, ...]:
        return small_ltx2.run_ltx2(pipe, **{**options(), **more})

    return Row(lambda: small_ltx2.small_ltx2(kind, version), run, larger=dict(size=96))


def _hunyuan(kind: str, larger: dict[str, Any]) -> Row:
    def run(pipe: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        return (small_hunyuan.run_hunyuan(pipe, **options),)

    return Row(lambda: small_hunyuan.small_hunyuan(kind), run, larger)


def _hunyuan1(kind: str) -> Row:
    def run(pipe: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        return (small_hunyuan1.run_hunyuan1(pipe, **options),)

    return Row(lambda: small_hunyuan1.small_hunyuan1(kind), run, dict(height=96, width=96))


def _conditions() -> dict[str, Any]:
    """A first frame, and a keyframe that becomes tokens behind the grid."""
    first, *_, last = small_wan.moving_square()
    return {"conditions": [LTX2VideoCondition(first, index=0), LTX2VideoCondition(last, index=2, strength=0.7)]}


ROWS = {name: _wan(name) for name in small_wan.ROWS}
for version in ("2.0", "2.3"):
    ROWS[f"ltx{version}-t2v"] = _ltx2("text", version, dict)
    ROWS[f"ltx{version}-i2v"] = _ltx2("image", version, lambda: {"image": small_wan.moving_square()[0]})
    ROWS[f"ltx{version}-condition"] = _ltx2("condition", version, _conditions)
ROWS["ltx0.9-t2v"] = _ltx("text", dict)
ROWS["ltx0.9-i2v"] = _ltx("image", lambda: {"image": small_wan.moving_square()[0]})
ROWS["hunyuan1.5-t2v"] = _hunyuan("text", dict(height=96, width=96))
ROWS["hunyuan1.5-i2v"] = _hunyuan("image", dict(num_frames=17))
ROWS["hunyuan1.0-t2v"] = _hunyuan1("text")
ROWS["hunyuan1.0-i2v"] = _hunyuan1("image")
ROWS["hunyuan1.0-i2v-33ch"] = _hunyuan1("channels")


def transformers(pipe: Any) -> list[Any]:
    """The pipeline's one or two transformers."""
    return [model for model in (pipe.transformer, getattr(pipe, "transformer_2", None)) if model is not None]


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    """Bit for bit, and finite."""
    return all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(a, b, strict=True))
