"""The model families that heterostep runs on, by the class name of their transformer."""

from heterostep.adapters.base import Adapter, Call
from heterostep.adapters.wan import WanAdapter

ADAPTERS: dict[str, Adapter] = {"WanTransformer3DModel": WanAdapter()}

__all__ = ["ADAPTERS", "Adapter", "Call"]
