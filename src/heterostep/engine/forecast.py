"""Bytes before they are allocated: what a transformer's call holds, and which stores for K and V fit beside it.

A call is forecast by making it: on the meta device, where tensors have shapes and no memory, with every storage counted
from its making to its end.

Shapes: B batch, N tokens, n active tokens.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from heterostep.compat import active_backend
from heterostep.engine.calls import DirectCalls
from heterostep.errors import HeterostepError, first_line
from heterostep.kv.cache import KVCache, KVShape, KVStore

# CUDA's allocator hands out multiples of this.
GRAIN = 512
# Blocks of the model that a call is forecast with.
SHALLOW = 2
# Where configurations say how many blocks a model has, of each kind that it has, in the order in which they run.
DEPTHS = ("num_layers", "num_single_layers")
# Of what is free, kept for what no forecast knows: libraries' workspaces and the allocator's fragments, which were
# a third of a dense call's activations (benchmarks/h200: 0.53 GB beside 1.6).
MARGIN = 0.04
FRAGMENTS = 0.36
# Of the host's free memory, what pinned K and V may take. The allocator of pinned memory rounds up to powers of two.
HOST_PART = 0.45


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made while it is on, from their making to their end.

    Attributes:
        now: bytes that are alive.
        peak: the most that were, since `restart`.
    """

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}
        # What was there before is not to be counted, nor kept alive by this.
        self._known = [t.untyped_storage() for t in known]
        self._known_ids = {storage._cdata for storage in self._known}

    def restart(self) -> None:
        """Count the peak from now on."""
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // GRAIN) * GRAIN
        if key in self._alive or key in self._known_ids:
            return

        def gone(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _FusedOnMeta(TorchFunctionMode):
    """Operations that are one kernel on a GPU, and would be spelled out on the meta device, with all that they hold."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Unwrapped: `use_tf32` puts a function around it.
        if func is inspect.unwrap(torch.nn.functional.scaled_dot_product_attention):
            query = args[0] if args else kwargs["query"]
            value = args[2] if len(args) > 2 else kwargs["value"]
            out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
            # It also returns a float32 figure for each query, which lives as long as the call.
            torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
            return out
        if func is torch.nn.functional.rms_norm or func is torch.rms_norm:
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


@dataclass(frozen=True)
class CallMemory:
    """What one call of a transformer holds at its peak, in bytes, besides weights, inputs and kept K and V.

    Attributes:
        plain: all tokens, nothing kept.
        dense: all tokens, K and V kept.
        sparse: some tokens.
        static: K and V of text and image, which are kept beside those of the tokens.
        held: velocities, their slopes and the output that are kept until the next call.
        layers: what each attention keeps of the tokens' K and V.
    """

    plain: int
    dense: int
    sparse: int
    static: int
    held: int
    layers: tuple[KVShape, ...]


def _depths(config: Any) -> list[int]:
    """How many blocks of each kind a configuration asks for, in the order in which they run."""
    return [config[name] for name in DEPTHS if name in config]


def _twin(model: Any) -> tuple[Any, list[int]]:
    """The model anew on the meta device, from its configuration and in its dtype, and how many blocks of a kind it has.

    Hooks and adapters stay behind. Blocks are alike and run one after the other: a few tell what all hold.
    """
    config = dict(model.config)
    if "vace_layers" not in config:
        config |= {name: min(SHALLOW, config[name]) for name in DEPTHS if name in config}
    with torch.device("meta"):
        made = type(model).from_config(config)
    torch.nn.Module.to(made, model.dtype)
    backend = _backend(model)
    for module in made.modules() if backend is not None else ():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = backend
    return made.eval(), _depths(config)


def _backend(model: Any) -> Any:
    """The attention backend that was set on a model's processors; None where none was."""
    # Text encoders inside of a model have processors that know of no backend.
    backends = (getattr(getattr(m, "processor", None), "_attention_backend", None) for m in model.modules())
    return next((each for each in backends if each is not None), None)


def of_a_rank(call: CallMemory, size: int) -> CallMemory:
    """What one of `size` ranks holds that share a call's tokens (`heterostep.parallel`)."""
    if size == 1:
        return call
    # Q, K and V of a layer under way to the other ranks, and those that come from them.
    exchanged = 2 * 3 * max((layer.vectors * layer.dim * layer.dtype.itemsize for layer in call.layers), default=0)
    plain, dense, sparse = ((peak + exchanged) // size for peak in (call.plain, call.dense, call.sparse))
    layers = tuple(replace(layer, vectors=layer.vectors // size) for layer in call.layers)
    return replace(call, plain=plain, dense=dense, sparse=sparse, layers=layers)


# Forecasts of this process, by all that they follow from: LTX-2's takes seconds on the host.
_known: dict[tuple[type, str], CallMemory] = {}
# So that a service's many sizes do not pile up.
MOST_KNOWN = 64


def call_memory(model: Any, inputs: dict[str, Any], share: float = 0.5) -> CallMemory:
    """The forecast of one call; nothing is allocated or computed. A call alike is forecast once in a process.

    Args:
        model: of one of `heterostep.models.FAMILIES`; it is left as it is.
        inputs: of one of its forwards, by name; where they are does not matter.
        share: active tokens of the sparse calls, at the most.

    Raises:
        HeterostepError: the model looks at its inputs' values, which are none on the meta device.
    """
    shapes = tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, torch.Tensor) else x, inputs)
    backend = _backend(model) or active_backend()
    alike = type(model), repr((share, shapes, dict(model.config), model.dtype, backend))
    found = _known.get(alike)
    if found is None:
        try:
            found = _call_memory(model, inputs, share)
        except (RuntimeError, NotImplementedError) as error:
            # PyTorch has several words for it.
            reason = first_line(error)
            raise HeterostepError(f"the memory of {type(model).__name__} cannot be forecast: {reason}") from error
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[alike] = found
    return found


@torch.no_grad()
def _call_memory(model: Any, inputs: dict[str, Any], share: float) -> CallMemory:
    inputs = tree_map(lambda x: torch.empty_like(x, device="meta") if isinstance(x, torch.Tensor) else x, inputs)
    blocks = _depths(model.config)
    model, few = _twin(model)
    known = [*model.parameters(), *model.buffers(), *(x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor))]
    calls = DirectCalls(model, inputs)
    with LiveBytes(known) as live, _FusedOnMeta():
        index = torch.zeros(
            inputs["hidden_states"].shape[0],
            max(1, round(share * calls.num_tokens)),
            dtype=torch.int64,
            device="meta",
        )
        calls.plain()
        calls.rows = calls.held = None
        plain, before = live.peak, live.now
        calls.dense()
        kept = sum(store.nbytes for store in calls.stores)
        live.restart()
        # Into memory that is there already, as a run has it.
        calls.dense()
        dense = live.peak - kept
        rows = calls.held
        assert rows is not None
        held = rows.numel() * (2 * rows.element_size() + torch.float32.itemsize)
        live.restart()
        calls.sparse(index)
        sparse = live.peak - kept - before - rows.nbytes
        layers = [shape for store in calls.stores if isinstance(store, KVCache) and (shape := store.shape) is not None]
        static = sum(store.nbytes for store in calls.stores if not isinstance(store, KVCache))
    calls.restore()
    # What blocks keep is as many times as much; beside it each holds the same.
    if few != blocks:
        each, first = len(layers) // sum(few), [sum(few[:kind]) for kind in range(len(few))]
        layers = [
            layer for start, count in zip(first, blocks) for layer in layers[start * each : (start + 1) * each] * count
        ]
    return CallMemory(plain, dense, sparse, static * sum(blocks) // sum(few), held, tuple(layers))


# What "auto" tries, as (for as many layers as fit, for the others).
PREFERENCE = (("device", "device"), ("device", "fp8"), ("fp8", "fp8-offload"))
# Where K and V drift: coded ones would be held.
PREFERENCE_IN_DRIFT = (("device", "device"), ("device", "offload"), *PREFERENCE[1:])


@dataclass(frozen=True)
class Stores:
    """A store for each attention of each guidance branch, one branch after the other.

    Attributes:
        names: of `heterostep.kv.cache.STORES`, one for each of the layers.
        layers: what they keep.
    """

    names: tuple[str, ...]
    layers: tuple[KVShape, ...] = field(repr=False)

    @property
    def all_on_device(self) -> bool:
        """Whether all are kept in the model's precision where it runs."""
        return set(self.names) == {"device"}

    @property
    def device_bytes(self) -> int:
        """K and V on the device, and what decoding and transfers use."""
        return self.kept_bytes + self.workspace_bytes

    @property
    def dense_bytes(self) -> int:
        """The same beside a dense call, which fetches what was kept only to see how that changes."""
        return self.device_bytes if any(layer.drifts for layer in self.layers) else self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """K and V on the device."""
        return sum(layer.nbytes(name) for name, layer in zip(self.names, self.layers) if not KVStore(name).on_host)

    @property
    def host_bytes(self) -> int:
        """K and V in host memory."""
        return sum(layer.nbytes(name) for name, layer in zip(self.names, self.layers) if KVStore(name).on_host)

    @property
    def workspace_bytes(self) -> int:
        """Decoded K and V of one layer (of each shape), and two layers that are under way from the host."""
        pairs = list(zip(self.names, self.layers))
        # Without their changes, which are not decoded by themselves.
        layers = {replace(layer, drifts=False) for name, layer in pairs if KVStore(name).coded or layer.drifts}
        decoded = sum(layer.nbytes("device") for layer in layers)
        staged = 2 * max((layer.nbytes(name) for name, layer in pairs if KVStore(name).on_host), default=0)
        return decoded + staged

    def __str__(self) -> str:
        kinds = {name: self.names.count(name) for name in dict.fromkeys(self.names)}
        if len(kinds) == 1:
            return next(iter(kinds))
        return ", ".join(f"{name} for {count} of {len(self.names)} layers" for name, count in kinds.items())


def check_names(names: Sequence[str], layers: int) -> None:
    """Check that `kv_store=` names a store for each attention of each guidance branch.

    Raises:
        HeterostepError: it names more or fewer.
    """
    if len(names) != layers:
        raise HeterostepError(f"kv_store names {len(names)} stores, but the run has {layers} (layers and guidance)")


def uniform(name: str, layers: Sequence[KVShape]) -> Stores:
    """One store for all layers."""
    return Stores((name,) * len(layers), tuple(layers))


def choose(layers: Sequence[KVShape], dense_room: int, sparse_room: int, host_room: int) -> Stores | None:
    """The fastest stores that fit, or None: all on the device, or some of them in fp8, or some of these with the host.

    Args:
        layers: of each attention of each guidance branch.
        dense_room: bytes beside a dense call, for K and V.
        sparse_room: bytes beside a sparse call, for K and V and what decoding and transfers use.
        host_room: bytes of host memory.
    """

    def fit(stores: Stores) -> bool:
        return stores.dense_bytes <= dense_room and stores.device_bytes <= sparse_room

    for fast, small in PREFERENCE_IN_DRIFT if any(layer.drifts for layer in layers) else PREFERENCE:
        low, high = 0, len(layers)
        # The fewest layers in the smaller store; evenly spread, so that transfers have time between them.
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fit(_mixed(layers, fast, small, middle)) else (middle + 1, high)
        stores = _mixed(layers, fast, small, low)
        if fit(stores) and stores.host_bytes <= host_room:
            return stores
    return None


def _mixed(layers: Sequence[KVShape], fast: str, small: str, count: int) -> Stores:
    total = max(len(layers), 1)
    spread = (small if (i + 1) * count // total > i * count // total else fast for i in range(len(layers)))
    return Stores(tuple(spread), tuple(layers))


def smaller(stores: Stores) -> Stores | None:
    """The next smaller stores, for when memory ran out; None after the smallest."""
    if set(stores.names) == {"fp8-offload"}:
        return None
    name = "fp8" if "device" in stores.names else "fp8-offload"
    return Stores((name,) * len(stores.names), stores.layers)


def less_margin(size: int, activations: int) -> int:
    """Of so many bytes of a device, those that a forecast may fill, beside calls that hold `activations`."""
    return max(size - max(int(size * MARGIN), int(activations * FRAGMENTS)), 0)


def room_on(device: torch.device, vram: float | None = None, activations: int = 0) -> int | None:
    """Bytes that the process may still allocate on a CUDA device, less a margin; None for other devices.

    Args:
        vram: gigabytes (1e9) that it may have in all; by default the device's, or what the allocator was capped at.
        activations: bytes that a call holds.
    """
    if device.type != "cuda":
        return None
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    most = total - others
    most = min(most, int(total * torch.cuda.get_per_process_memory_fraction(device)))
    if vram is not None:
        most = min(most, int(vram * 1e9))
    return less_margin(most, activations) - torch.cuda.memory_allocated(device)


def host_room() -> int:
    """Bytes of host memory that K and V may take."""
    return int(psutil.virtual_memory().available * HOST_PART)
