"""The model families that heterostep runs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heterostep.errors import HeterostepError
from heterostep.models import hunyuan, hunyuan15, ltx, ltx2, wan
from heterostep.models.attention import CachedAttention
from heterostep.models.base import Adapter, Call, Checkpoint, Family, ModelPatches, TokenGrid

__all__ = [
    "FAMILIES",
    "Adapter",
    "CachedAttention",
    "Call",
    "Checkpoint",
    "Family",
    "ModelPatches",
    "TokenGrid",
    "cp_plan",
    "register_family",
]

# By the class name of the transformer; each file has its own.
FAMILIES: dict[str, Family] = {
    **wan.FAMILIES,
    **hunyuan.FAMILIES,
    **hunyuan15.FAMILIES,
    **ltx2.FAMILIES,
    **ltx.FAMILIES,
}


def register_family(
    transformer: str, adapter: Adapter, pipelines: tuple[str, ...], checkpoints: Mapping[str, Checkpoint] | None = None
) -> None:
    """Let heterostep run on another model family, or replace a known one.

    Args:
        transformer: the class name of its transformer.
        adapter: what is special about it.
        pipelines: the class names of the diffusers pipelines that it works in.
        checkpoints: what the command and forecasts make of its checkpoints; see `Family`.

    Raises:
        HeterostepError: the adapter is no `Adapter`, or no pipeline is named.
    """
    if not isinstance(adapter, Adapter) or not pipelines or isinstance(pipelines, str):
        raise HeterostepError("register_family wants a class name, an Adapter and the class names of its pipelines")
    FAMILIES[transformer] = Family(adapter, tuple(pipelines), dict(checkpoints or {}))


def cp_plan(model: Any) -> dict[str, Any] | None:
    """The plan by which a transformer's tokens are shared, for `model.enable_parallelism(config=, cp_plan=)`.

    Raises:
        HeterostepError: its family does not work over several GPUs.
    """
    return check_family(type(model).__name__).adapter.cp_plan(model)


def check_family(transformer: str) -> Family:
    """The family of a transformer, by its class name, that works over several GPUs.

    Raises:
        HeterostepError: it does not, or is not known.
    """
    family = FAMILIES.get(transformer)
    if family is None or not family.adapter.parallel:
        raise HeterostepError(f"{transformer} on several GPUs is not supported: run it on one device")
    return family


def known_checkpoints() -> dict[str, Checkpoint]:
    """What the command makes of a checkpoint, by the pipeline that it was saved as."""
    return {name: checkpoint for family in FAMILIES.values() for name, checkpoint in family.checkpoints.items()}
