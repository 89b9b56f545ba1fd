"""Where a run's K and V go: the stores that fit beside its calls, by a forecast of their memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from heterostep.config import HSAConfig
from heterostep.engine import forecast
from heterostep.engine.expert import Expert
from heterostep.engine.generation import Branch, Generation
from heterostep.errors import HeterostepError, first_line
from heterostep.kv.cache import KVCache, StaticKV
from heterostep.parallel import ALONE, Ranks

_log = logging.getLogger("heterostep")


class DoesNotFit(HeterostepError):
    """No store fits."""


def place(
    config: HSAConfig,
    model: Any,
    inputs: dict[str, Any],
    batches: Sequence[int],
    share: float,
    attentions: int,
    ranks: Ranks = ALONE,
) -> forecast.Stores:
    """A store for each attention of each guidance branch.

    Args:
        config: its `kv_store` and `vram`.
        model: the transformer.
        inputs: of one of its calls, by name.
        batches: samples in the calls of each guidance branch.
        share: active tokens of the sparse calls, at the most.
        attentions: of the model, that keep the tokens' K and V.
        ranks: the processes that share the tokens; each of them gets the same stores.

    Raises:
        DoesNotFit: not even the smallest; the message says what is lacking.
    """
    device, name = inputs["hidden_states"].device, config.kv_store
    if isinstance(name, tuple):
        forecast.check_names(name, attentions * len(batches))
        return forecast.Stores(name, ())
    if name != "auto" or forecast.room_on(device, config.vram) is None:
        name = "device" if name == "auto" else name
        return forecast.Stores((name,) * attentions * len(batches), ())
    try:
        call = forecast.of_a_rank(forecast.call_memory(model, inputs, share), ranks.size)
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
    present -= (call.static + call.held) * sum(batches) // batch
    room, host_room = ranks.all_reduce_min([present, forecast.host_room() // ranks.size])
    stores = forecast.choose(layers, room - call.dense, room - call.sparse, host_room)
    if stores is not None:
        return stores
    least = forecast.uniform("fp8-offload", layers)
    free, needed = max(room - call.dense, 0) / 1e9, least.device_bytes / 1e9
    raise DoesNotFit(
        f"K and V do not fit: even the smallest store needs {needed:.1f} GB on the device ({free:.1f} GB free) and "
        f"{least.host_bytes / 1e9:.1f} GB of host memory ({host_room / 1e9:.1f} GB free)"
    )


def make_stores(
    expert: Expert, generation: Generation, branch: Branch, inputs: dict[str, Any]
) -> list[KVCache | StaticKV]:
    """Empty stores for one branch, of the kinds that fit."""
    processors = [processor for _, processor in expert.patches.attentions]
    if generation.stores is None:
        place_for(expert, generation, inputs)
    assert generation.stores is not None
    generation.kv_store, generation.store_names = str(generation.stores), generation.stores.names
    names, size = generation.stores.names, sum(processor.keeps_tokens for processor in processors)
    first = min(generation.branches.index(branch) * size, len(names) - size)
    mine = iter(names[first : first + size])
    stores = [p.make_store(next(mine) if p.keeps_tokens else "", generation.workspace) for p in processors]
    for store, shape in zip((s for s in stores if isinstance(s, KVCache)), generation.stores.layers[first:]):
        store.expected = shape
    return stores


def place_for(expert: Expert, generation: Generation, inputs: dict[str, Any]) -> None:
    """Choose the stores. Single tokens that nobody asked for are left out where K and V have no room on the device.

    Raises:
        HeterostepError: none fits.
    """
    total = generation.total
    # Where the plan is made anew, counts may yet come near to all.
    largest = max((count for count in generation.counts if count < total), default=total)
    share = 1 if generation.schedule.replans else largest / total
    attentions = sum(processor.keeps_tokens for _, processor in expert.patches.attentions)
    batches = [branch.batch for branch in generation.branches]
    try:
        chosen = place(generation.config, expert.model, inputs, batches, share, attentions, generation.ranks)
        exact = chosen.all_on_device or generation.config.kv_store != "auto"
        if exact or not generation.leave_out_single_tokens():
            generation.stores = chosen
        else:
            _log.info("what whole steps leave of the share is not spent: K and V do not fit on the device")
    except DoesNotFit as error:
        if generation.leave_out_single_tokens():
            _log.info("what whole steps leave of the share is not spent: %s", error)
            return
        advice = "make a smaller or shorter video or offload other models"
        if not generation.schedule.run.tokens.least:
            advice += ", or evaluate whole steps alone (policy='auto', sparse_share=0)"
        raise HeterostepError(f"{error}: {advice}") from error


def reserve(branch: Branch, device: torch.device) -> None:
    """Allocate K and V in one go, in segments of their own: the forecast is of bytes, not of what lies between."""
    empty = [store for store in branch.stores if isinstance(store, KVCache) and store.reserves]
    if empty and device.type == "cuda":
        torch.cuda.empty_cache()
    for store in empty:
        store.reserve(device)


def can_fall_back(generation: Generation) -> bool:
    """Whether there are smaller stores to try when memory runs out."""
    # Where it ran out on one rank alone, the others are in the middle of the same call and cannot begin it anew.
    if generation.fell_back or generation.stores is None or generation.ranks.size > 1:
        return False
    return forecast.smaller(generation.stores) is not None


def fall_back(generation: Generation) -> None:
    """Memory ran out: smaller stores from now on, for all branches. What was kept is gone."""
    assert generation.stores is not None
    before, after = generation.stores, forecast.smaller(generation.stores)
    generation.drop_stores()
    generation.stores, generation.kv_store, generation.fell_back = after, str(after), True
    generation.store_names = after.names if after is not None else ()
    _log.warning("out of memory with K and V in the store %s: going on with %s", before, after)
    if generation.evaluated_at.is_cuda:
        torch.cuda.empty_cache()
