"""The model families that heterostep runs on."""

from __future__ import annotations

from dataclasses import dataclass

from heterostep.errors import HeterostepError
from heterostep.models.attention import CachedAttention
from heterostep.models.base import Adapter, Call, Seams, TokenGrid
from heterostep.models.hunyuan15 import HunyuanVideo15Adapter
from heterostep.models.ltx import LTXAdapter
from heterostep.models.ltx2 import LTX2Adapter
from heterostep.models.wan import WanAdapter

__all__ = ["FAMILIES", "Adapter", "CachedAttention", "Call", "Family", "Seams", "TokenGrid", "register_family"]


@dataclass(frozen=True)
class Family:
    """A transformer's adapter and the pipelines, by class name, that it is known to work in."""

    adapter: Adapter
    pipelines: tuple[str, ...]


# By the class name of the transformer: nothing of diffusers is imported for a family that is not used.
FAMILIES: dict[str, Family] = {
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
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        HunyuanVideo15Adapter(),
        ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline", "HunyuanVideo15ModularPipeline"),
    ),
    "LTX2VideoTransformer3DModel": Family(
        LTX2Adapter(), ("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline", "LTX2ModularPipeline")
    ),
    "LTXVideoTransformer3DModel": Family(
        LTXAdapter(), ("LTXPipeline", "LTXImageToVideoPipeline", "LTXModularPipeline")
    ),
    "WanVACETransformer3DModel": Family(WanAdapter(), ("WanVACEPipeline", "Wan22VaceModularPipeline")),
}


def register_family(transformer: str, adapter: Adapter, pipelines: tuple[str, ...]) -> None:
    """Let heterostep run on another model family, or replace a known one.

    Args:
        transformer: the class name of its transformer.
        adapter: what is special about it.
        pipelines: the class names of the diffusers pipelines that it works in.

    Raises:
        HeterostepError: the adapter is no `Adapter`, or no pipeline is named.
    """
    if not isinstance(adapter, Adapter) or not pipelines or isinstance(pipelines, str):
        raise HeterostepError("register_family wants a class name, an Adapter and the class names of its pipelines")
    FAMILIES[transformer] = Family(adapter, tuple(pipelines))
