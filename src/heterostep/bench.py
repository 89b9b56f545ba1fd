"""Seconds of one transformer call: plain, with K and V kept, and with a share of the tokens, at real sizes.

Weights are random: a call's time does not depend on them. The configuration is the checkpoint's own, as are the inputs'
shapes, which come from its pipeline (`heterostep.planning.dry_run`). All variants take turns, and medians are compared.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from heterostep import configs, launch, parallel
from heterostep.compat import use_backend
from heterostep.engine.calls import DirectCalls
from heterostep.errors import HeterostepError
from heterostep.kv.cache import STORES
from heterostep.models import FAMILIES, cp_plan
from heterostep.planning import timings
from heterostep.planning.dry_run import dry_run
from heterostep.precision import name_of

SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
# What a kernel or operator is, by what its name has in it; the first that matches.
KINDS = (
    ("between GPUs", ("nccl", "gloo", "c10d", "all_to_all", "alltoall", "allgather")),
    ("attention", ("sdpa", "flash", "fmha", "attention")),
    ("linear", ("gemm", "nvjet", "cutlass", "addmm", "aten::mm", "aten::bmm", "xmma", "splitk")),
    # Before what gathers, for PyTorch's kernels of both are one template.
    ("scatter", ("scatter", "index_copy", "index_put")),
    ("gather", ("gather", "index_select", "aten::index", "index_elementwise", "indexing")),
    ("K/V codes", ("quantise", "dequantise", "advance")),
)


@dataclass(frozen=True)
class Size:
    """Of the video, in pixels and frames; None for the checkpoint's own."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None


def bench(
    name: str,
    size: Size = Size(),
    *,
    shares: Sequence[float] = SHARES,
    stores: Sequence[str] = ("device",),
    sync: str = "hold",
    layers: int | None = None,
    compiled: bool = False,
    cuda_graphs: bool = True,
    attention_backend: str | None = None,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    gpus: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    breakdown: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time a checkpoint's transformer at a size.

    Args:
        name: a short name or hub id of `heterostep.configs`, or a diffusers folder (its weights are not read).
        size: of the video.
        shares: of active tokens, each above 0 and below 1.
        stores: of K and V, each timed dense and at every share.
        sync: "hold", or "drift": K and V of the skipped tokens follow their last change.
        layers: transformer blocks, in place of all.
        compiled: with `compile_repeated_blocks`, the plain call too.
        cuda_graphs: replay calls of few tokens, as a run does.
        attention_backend: as `set_attention_backend` takes it.
        repeats: of everything, in turns.
        gpus: that share the call; each has a process that calls this (`heterostep.launch`). K/V bytes are one's.
        breakdown: profile where the time goes, too.
        tell: called with a line of progress.

    Returns:
        plain types: `plain_seconds`; `rows`, each with store, share (1 for the dense call that keeps K and V), seconds,
        ratio to plain, K/V bytes on the device and in host memory, and whether it was replayed; `breakdown`, seconds
        by kind of each call.

    Raises:
        HeterostepError: a name, a share or a store is not known, or the size is refused.
    """
    _check(shares, stores, sync, repeats)
    device = torch.device(device)
    found = configs.load(name)
    component = dict(found.transformer)
    if layers is not None:
        if not 0 < layers <= component["num_layers"]:
            raise HeterostepError(f"{name} has {component['num_layers']} layers, not {layers}")
        component["num_layers"] = layers
    asked: dict[str, Any] = {"height": size.height, "width": size.width, "num_frames": size.num_frames}
    sizes: dict[str, Any] = {key: found.defaults[key] if value is None else value for key, value in asked.items()}
    seen = dry_run(
        found,
        dtype=dtype,
        guidance_scale=found.defaults["guidance_scale"],
        num_inference_steps=found.defaults["num_inference_steps"],
        **sizes,
    )
    torch.manual_seed(0)
    tell(f"building {name} with {component['num_layers']} layers on {timings.device_name(device)}")
    model = _build(component, dtype, device, attention_backend, gpus, compiled)
    inputs = {key: _random(key, value, device) for key, value in seen.calls[0].items()}
    local = FAMILIES[type(model).__name__].adapter.local_attentions(model)
    with torch.no_grad(), parallel.readable_errors(), parallel.without_context_parallel(local):
        calls = DirectCalls(model, inputs)
        drift = sync == "drift"
        replayed: set[tuple[str, float]] = set()
        variants = _variants(calls, shares, stores, drift, replayed if cuda_graphs and device.type == "cuda" else None)
        seconds = _time(variants, repeats, device, tell)
        kinds = _breakdown(calls, shares, device, drift) if breakdown else {}
        memory = _memory(calls, stores, drift)
        calls.restore()
    plain = statistics.median(seconds["plain"])
    result = {
        "name": name,
        "device": timings.device_name(device),
        "gpus": gpus,
        "torch": torch.__version__,
        "compiled": compiled,
        "sync": sync,
        "attention_backend": attention_backend,
        "dtype": name_of(dtype),
        "layers": component["num_layers"],
        **sizes,
        "tokens": calls.num_tokens,
        "batch": inputs["hidden_states"].shape[0],
        "calls": len(seen.calls),
        "repeats": repeats,
        "plain_seconds": plain,
        "rows": [
            {
                "store": store,
                "share": share,
                "seconds": statistics.median(seconds[store, share]),
                "ratio": statistics.median(seconds[store, share]) / plain,
                "replayed": (store, share) in replayed,
                **memory[store],
            }
            for store in stores
            for share in (1.0, *shares)
        ],
        "breakdown": kinds,
    }
    if gpus == 1 or launch.rank() in (None, 0):
        _keep(result, timings.identity(type(model).__name__, dict(model.config)), stores)
    return result


def _check(shares: Sequence[float], stores: Sequence[str], sync: str, repeats: int) -> None:
    if unknown := [store for store in stores if store not in STORES]:
        raise HeterostepError(f"no such store: {', '.join(unknown)}; the stores are {', '.join(STORES)}")
    if not stores:
        raise HeterostepError(f"name a store; the stores are {', '.join(STORES)}")
    if sync not in ("hold", "drift"):
        raise HeterostepError(f"sync must be hold or drift, not {sync!r}", "sync")
    if repeats < 1:
        raise HeterostepError(f"repeats must be at least 1, not {repeats}", "repeats")
    if not all(0 < share < 1 for share in shares):
        raise HeterostepError("shares must be above 0 and below 1", "shares")


def _build(
    component: configs.Component,
    dtype: torch.dtype,
    device: torch.device,
    attention_backend: str | None,
    gpus: int,
    compiled: bool,
) -> Any:
    """The transformer with random weights, as it is to be called."""
    model: Any = configs.build(component, dtype, device)
    if attention_backend is not None:
        use_backend(model, attention_backend)
    if gpus > 1:
        parallel.enable_context_parallel(model, gpus, cp_plan(model))
        parallel.check_heads(model, gpus)
    if compiled:
        model.compile_repeated_blocks(dynamic=False)
    return model


def _keep(result: dict[str, Any], identity: dict[str, Any], stores: Sequence[str]) -> None:
    """Note the seconds for plans on this device; a plan can do without, should they not be to be written."""
    how = {name: result[name] for name in ("dtype", "batch", "attention_backend", "compiled", "sync", "gpus")}
    for store in stores:
        points = [
            (row["share"], row["seconds"]) for row in result["rows"] if row["store"] == store and row["share"] < 1
        ]
        points = [*sorted(points), (1.0, result["plain_seconds"])]
        with contextlib.suppress(OSError):
            timings.keep(
                timings.Timed(result["device"], identity, result["tokens"], tuple(points), {**how, "store": store})
            )


def _random(name: str, value: Any, device: torch.device) -> Any:
    """A tensor of the shape and dtype on the device: noise, a middle timestep, an open mask."""

    def made(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if "timestep" in name or "sigma" in name:
            return torch.full(x.shape, 500, dtype=x.dtype, device=device)
        if "mask" in name or not x.is_floating_point():
            return torch.ones(x.shape, dtype=x.dtype, device=device)
        return torch.randn(x.shape, device=device).to(x.dtype)

    return tree_map(made, value)


@dataclass(frozen=True)
class _Variant:
    """A call that takes its turn, and what comes before it untimed."""

    call: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


def _variants(
    calls: DirectCalls,
    shares: Sequence[float],
    stores: Sequence[str],
    drift: bool,
    replayed: set[tuple[str, float]] | None,
) -> dict[Any, _Variant]:
    """What takes turns, in order: plain, then each store's dense call with its sparse ones.

    Args:
        replayed: filled with what is replayed as CUDA graphs; None where nothing shall be.
    """
    variants: dict[Any, _Variant] = {"plain": _Variant(calls.plain)}
    indices = {share: calls.random_index(max(1, round(share * calls.num_tokens))) for share in shares}
    for store in stores:

        def prepare(store: str = store) -> None:
            calls.use(store, drift)
            if drift:
                # A change needs two evaluations.
                calls.dense()

        variants[store, 1.0] = _Variant(calls.dense, prepare)
        for share, index in indices.items():
            if replayed is None or store != "device" or not calls.may_be_replayed(index):
                variants[store, share] = _Variant(functools.partial(calls.sparse, index))
                continue

            def record(name: tuple[str, float] = (store, share), index: torch.Tensor = index) -> None:
                # In a run, the first of many calls are not replayed.
                for _ in range(3):
                    calls.replayed(index)
                if calls.is_recorded(index.shape[1]):
                    replayed.add(name)

            variants[store, share] = _Variant(functools.partial(calls.replayed, index), record)
    return variants


def _time(
    variants: dict[Any, _Variant], repeats: int, device: torch.device, tell: Callable[[str], None]
) -> dict[Any, list[float]]:
    seconds: dict[Any, list[float]] = {name: [] for name in variants}
    # The first rounds compile, tune and warm the allocator.
    for number in range(-2, repeats):
        started = time.perf_counter()
        for name, variant in variants.items():
            variant.prepare()
            seconds[name].append(_seconds(variant.call, device))
        tell(
            f"{'warming up' if number < 0 else f'round {number + 1}/{repeats}'}: {time.perf_counter() - started:.1f} s"
        )
    return {name: each[2:] for name, each in seconds.items()}


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    # Of the GPU's own clock, with the queue empty before: as in a loop, except that the host's lead is not used.
    torch.cuda.synchronize(device)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def _memory(calls: DirectCalls, stores: Sequence[str], drift: bool) -> dict[str, dict[str, int]]:
    """K/V bytes by store, measured."""
    out = {}
    for store in stores:
        calls.use(store, drift)
        calls.dense()
        calls.sparse(calls.random_index(1))
        out[store] = {
            "device_bytes": sum(each.nbytes for each in calls.stores) + calls.workspace.nbytes,
            "host_bytes": sum(each.host_nbytes for each in calls.stores),
        }
    calls.use("device")
    gc.collect()
    return out


def _breakdown(
    calls: DirectCalls, shares: Sequence[float], device: torch.device, drift: bool
) -> dict[str, dict[str, float]]:
    """Seconds by kind of work, of the plain call, the dense one and each share's, with K and V on the device."""
    calls.use("device", drift)
    calls.dense()
    out = {"plain": _profile(calls.plain, device), "dense": _profile(calls.dense, device)}
    for share in shares:
        index = calls.random_index(max(1, round(share * calls.num_tokens)))
        out[f"{share:g}"] = _profile(functools.partial(calls.sparse, index), device)
    return out


def _profile(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with _quietly(), torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as profile:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    out = {kind: 0.0 for kind, _ in KINDS} | {"other": 0.0}
    for event in profile.key_averages():
        # On a GPU its kernels alone; on the CPU each operator without those that it calls.
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other")
        out[kind] += micros / 1e6
    return out


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    # Its tracer reports its starts and stops on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with warnings.catch_warnings():
        # The profiler warns of its own defaults.
        warnings.simplefilter("ignore")
        yield
