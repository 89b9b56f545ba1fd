"""Where a run's K and V go: the stores that fit beside its calls, by a forecast of their memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from heterostep.config import HSAConfig
from heterostep.engine import forecast
from heterostep.errors import HeterostepError, first_line

_log = logging.getLogger("heterostep")


class DoesNotFit(HeterostepError):
    """No store fits."""


def place(
    config: HSAConfig, model: Any, inputs: dict[str, Any], batches: Sequence[int], share: float, attentions: int
) -> forecast.Stores:
    """A store for each attention of each guidance branch.

    Args:
        config: its `kv_store` and `vram`.
        model: the transformer.
        inputs: of one of its calls, by name.
        batches: samples in the calls of each guidance branch.
        share: active tokens of the sparse calls, at the most.
        attentions: of the model, that keep the tokens' K and V.

    Raises:
        DoesNotFit: not even the smallest; the message says what is lacking.
    """
    device, name = inputs["hidden_states"].device, config.kv_store
    if isinstance(name, tuple):
        if len(name) != attentions * len(batches):
            raise HeterostepError(
                f"kv_store names {len(name)} stores, but the run has {attentions * len(batches)} (layers and guidance)"
            )
        return forecast.Stores(name, ())
    if name != "auto" or forecast.room_on(device, config.vram) is None:
        name = "device" if name == "auto" else name
        return forecast.Stores((name,) * attentions * len(batches), ())
    try:
        call = forecast.call_memory(model, inputs, share)
    except Exception as error:
        # A forecast runs the model without its weights, which backends and quantised layers may not bear.
        reason = error if isinstance(error, HeterostepError) else f"memory cannot be forecast ({first_line(error)})"
        _log.warning("%s; K and V are kept on the device, give kv_store= for another place", reason)
        return forecast.Stores(("device",) * attentions * len(batches), ())
    # The other branches' calls may be of more or fewer samples.
    batch = inputs["hidden_states"].shape[0]
    drifts = config.sync == "drift"
    layers = [replace(each, vectors=each.vectors * b // batch, drifts=drifts) for b in batches for each in call.layers]
    present = forecast.room_on(device, config.vram, call.dense)
    assert present is not None
    room = present - (call.static + call.held) * sum(batches) // batch
    host_room = forecast.host_room()
    stores = forecast.choose(layers, room - call.dense, room - call.sparse, host_room)
    if stores is not None:
        return stores
    least = forecast.uniform("fp8-offload", layers)
    free, needed = max(room - call.dense, 0) / 1e9, least.device_bytes / 1e9
    raise DoesNotFit(
        f"K and V do not fit: at the least they take {needed:.1f} GB of the device, where {free:.1f} are free, "
        f"and {least.host_bytes / 1e9:.1f} GB of host memory, where {host_room / 1e9:.1f} are"
    )
