"""Keys and values of all tokens, kept over steps; active tokens overwrite their rows.

Rows of skipped tokens may *drift*: when read, they are extrapolated along the change between the token's last two
evaluations, stored as e4m3 codes. This works on rotated keys too, because a token's rotation never changes. fp8 stores
do not drift: quantisation error is as large as the change between two steps.

How they are kept is a *store*:

    device        in the model's precision, where the model runs, as attention backends read it without a copy
    fp8           e4m3 codes with a scale for each token and head: half of the bytes; decoded as a layer is read
    offload       in the model's precision in pinned host memory, fetched a layer ahead beside the computation
    fp8-offload   the codes and scales in pinned host memory

Shapes: B batch, N tokens, n active tokens, H heads, D head dim.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from enum import Enum

import torch
from torch.nn.functional import pad

from heterostep.kernels import advance, dequantise, gather_rows, quantise, write_kv

_log = logging.getLogger("heterostep")


class KVStore(str, Enum):
    """A store, by the name that options give it."""

    DEVICE = "device"
    FP8 = "fp8"
    OFFLOAD = "offload"
    FP8_OFFLOAD = "fp8-offload"

    @property
    def coded(self) -> bool:
        """Whether it keeps e4m3 codes and scales."""
        return self in (KVStore.FP8, KVStore.FP8_OFFLOAD)

    @property
    def on_host(self) -> bool:
        """Whether it is in host memory."""
        return self in (KVStore.OFFLOAD, KVStore.FP8_OFFLOAD)


STORES = tuple(store.value for store in KVStore)


@dataclass(frozen=True)
class KVShape:
    """What one attention layer keeps for one guidance branch: `vectors` (B * H * N) of `dim` values, of K and of V.

    Attributes:
        drifts: whether their changes are kept too, where they are not coded.
    """

    vectors: int
    dim: int
    dtype: torch.dtype
    drifts: bool = False

    def nbytes(self, store: str) -> int:
        """Bytes of K and V in a store, wherever that is."""
        coded, plain = self.dim + torch.bfloat16.itemsize, self.dim * self.dtype.itemsize
        return 2 * self.vectors * (coded if KVStore(store).coded else plain + coded if self.drifts else plain)


class Workspace:
    """What the stores of one generation use in turn, layer after layer: decoded K/V, and transfers with the host.

    Attributes:
        write_back: whether rows that a sparse step writes are wanted by a later one, so that the host needs them too.
        extrapolation: float32 [B, N]: how far K and V are extrapolated at this call, in units of the change between the
            token's last two evaluations; 0 for active tokens. None where they are held.
    """

    def __init__(self) -> None:
        self.write_back = False
        self.extrapolation: torch.Tensor | None = None
        self._decoded: dict[tuple, torch.Tensor] = {}
        self._staged: list[torch.Tensor | None] = [None, None]
        self._slot = 0
        self._stream: torch.cuda.Stream | None = None
        self._last: KVCache | None = None
        self._fetched: dict[KVCache, tuple[list[torch.Tensor], torch.cuda.Event | None]] = {}

    def room(self, which: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Where K (`which` = 0) or V (1) of the layer at hand are decoded to, as large as `like`, until the next's."""
        # By shape, for a block may have attentions of several.
        kind = which, tuple(like.shape), dtype, like.device
        if kind not in self._decoded:
            self._decoded[kind] = torch.empty(like.shape, dtype=dtype, device=like.device)
        return self._decoded[kind]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it holds on the device."""
        return [t for t in (*self._decoded.values(), *self._staged) if t is not None]

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(t.nbytes for t in self.tensors)

    def reset(self) -> None:
        """Free the memory."""
        if self._stream is not None:
            # The allocator does not know of the copies that are under way.
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._fetched.clear()
        self._last = None
        self._decoded.clear()
        self._staged = [None, None]

    def begin(self) -> None:
        """A call of the transformer begins: its layers come in their order."""
        self._last = None
        self._fetched.clear()

    def save(self, cache: KVCache, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copy a layer's tensors to the host, beside what is computed meanwhile."""
        if self._last is not None:
            self._last.next = cache
        self._last = cache
        host = cache.host
        if [t.shape for t in host] != [t.shape for t in parts] or [t.dtype for t in host] != [t.dtype for t in parts]:
            host = [_pinned(part) for part in parts]
        self.copy(parts, host)
        return host

    def fetch(self, cache: KVCache) -> list[torch.Tensor]:
        """Tensors of a layer on the device; valid until the next fetch. Starts the next layer's transfer."""
        if cache not in self._fetched:
            self._start(cache)
        staged, ready = self._fetched.pop(cache)
        if ready is not None:
            torch.cuda.current_stream(ready.device).wait_event(ready)
        if cache.next is not None:
            self._start(cache.next)
        return staged

    def _start(self, cache: KVCache) -> None:
        # Into the place of the layer before, whose attention has been queued.
        self._slot = 1 - self._slot
        needed = sum(_aligned(t.nbytes) for t in cache.host)
        buffer = self._staged[self._slot]
        if buffer is None or buffer.numel() < needed or buffer.device != cache.device:
            buffer = self._staged[self._slot] = torch.empty(needed, dtype=torch.uint8, device=cache.device)
        staged, offset = [], 0
        for t in cache.host:
            staged.append(buffer[offset : offset + t.nbytes].view(t.dtype).view(t.shape))
            offset += _aligned(t.nbytes)
        self._fetched[cache] = staged, self.copy(cache.host, staged)

    def copy(self, sources: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.cuda.Event | None:
        """Copy between host and device after all that is queued so far; the event is when it is done (CPU: None)."""
        device = next((t.device for t in (*sources, *targets) if t.device.type == "cuda"), None)
        if device is None:
            for source, target in zip(sources, targets):
                target.copy_(source)
            return None
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        # What is read has been computed, and what is written over has been read, by all that is queued so far.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets):
                target.copy_(source, non_blocking=True)
                for t in (source, target):
                    if t.device == device:
                        t.record_stream(self._stream)
        return self._stream.record_event()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


def _pinned(like: torch.Tensor) -> torch.Tensor:
    if like.device.type == "cuda":
        try:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        except RuntimeError:
            # The system may limit what is pinned. Without, copies are slower and right.
            _warn_of_unpinned()
    return torch.empty(like.shape, dtype=like.dtype)


@functools.cache
def _warn_of_unpinned() -> None:
    _log.warning("host memory cannot be pinned; offloaded K/V will be copied more slowly")


class KVCache:
    """One attention layer's K/V for one guidance branch, each [B, H, N, D].

    Args:
        store: one of `STORES`.
        workspace: shared with the generation's other layers.

    Attributes:
        expected: what will be kept, where that is known.
        host: the tensors in host memory, where the store is there.
        next: the layer that is fetched after this one.
        device: where K and V are read.
    """

    def __init__(self, store: str = "device", workspace: Workspace | None = None) -> None:
        self.store, self._workspace = store, workspace or Workspace()
        self._coded, self._on_host = KVStore(store).coded, KVStore(store).on_host
        # K, V, and where they drift K's change in codes and scales, V's; in fp8 K's codes and scales, V's.
        self._parts: list[torch.Tensor] = []
        self._filled = False
        self.expected: KVShape | None = None
        self.host: list[torch.Tensor] = []
        self.next: KVCache | None = None
        self.device = torch.device("cpu")

    @property
    def reserves(self) -> bool:
        """Whether `reserve` would allocate."""
        return self.expected is not None and not self._on_host and not self._parts

    def reserve(self, device: torch.device) -> None:
        """Allocate what is expected, before the call that fills it: so none of it is cut out of what calls need."""
        if self.expected is None or not self.reserves:
            return
        vectors, dim, dtype = self.expected.vectors, self.expected.dim, self.expected.dtype
        coded = [((vectors, dim), torch.float8_e4m3fn), ((vectors,), torch.bfloat16)] * 2
        plain = [((vectors, dim), dtype)] * 2
        kinds = coded if self._coded else plain + coded if self.expected.drifts else plain
        self._parts = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows of the active tokens and return everyone's K and V.

        Args:
            key, value: [B, n, H, D]; n = N where `index` is None.
            index: the active tokens, int64 [B, n]; None where all are.

        Returns:
            K and V of all tokens, [B, N, H, D], valid until the next layer's update.

        Raises:
            RuntimeError: `index` is given, and no call has filled the cache with all tokens before.
        """
        if index is not None and not self._filled:
            raise RuntimeError("a sparse step needs a dense one before it: the K/V cache is empty")
        if self._on_host:
            return self._update_offloaded(key, value, index)
        if index is None:
            parts, old = self._renewed(self._parts, key, value), self._parts
            if [(t.numel(), t.dtype) for t in old] == [(t.numel(), t.dtype) for t in parts]:
                self._parts = [old.view(new.shape).copy_(new) for old, new in zip(old, parts)]
            else:
                self._parts = [part.contiguous() for part in parts]
            self._filled = True
            # As kept, attention backends need no copy of their own.
            return (key, value) if self._coded else (self._parts[0].transpose(1, 2), self._parts[1].transpose(1, 2))
        self._write(self._parts, key, value, index)
        return self._read(self._parts, key.dtype)

    @torch.compiler.disable
    def _update_offloaded(
        self, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Streams and events do not belong into compiled code.
        self.device = key.device
        if index is None:
            old = self._workspace.fetch(self) if self._drifts and self._filled else []
            parts = [part.contiguous() for part in self._renewed(old, key, value)]
            self.host, self._filled = self._workspace.save(self, parts), True
            return (key, value) if self._coded else (parts[0].transpose(1, 2), parts[1].transpose(1, 2))
        parts = self._workspace.fetch(self)
        self._write(parts, key, value, index)
        if self._workspace.write_back:
            self._workspace.copy(parts, self.host)
        return self._read(parts, key.dtype)

    @property
    def _drifts(self) -> bool:
        return self._workspace.extrapolation is not None and not self._coded

    def _renewed(self, old: list[torch.Tensor], key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """What is to be kept of all tokens' new K and V; not always contiguous."""
        if self._coded:
            return [*quantise(key), *quantise(value)]
        parts = [key.transpose(1, 2), value.transpose(1, 2)]
        if not self._drifts:
            return parts
        for which, new in enumerate((key, value)):
            if self._filled and len(old) > 2:
                parts += quantise(new - old[which].transpose(1, 2))
            else:
                # Nothing was known before: as held.
                parts.append(torch.zeros_like(parts[which], dtype=torch.float8_e4m3fn))
                parts.append(torch.zeros(parts[which].shape[:-1], dtype=torch.bfloat16, device=new.device))
        return parts

    def _write(self, parts: list[torch.Tensor], key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> None:
        if self._coded:
            for new, coded in zip((key, value), _coded_pairs(parts)):
                quantise(new, index, *coded)
            return
        if self._drifts:
            for new, held, change in zip((key, value), parts, _coded_pairs(parts)):
                quantise(new - gather_rows(held.transpose(1, 2), index), index, *change)
        write_kv(key, value, index, *parts[:2])

    def _read(self, parts: list[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Everyone's K and V at this call, [B, N, H, D]."""
        out, ahead = parts[:2], self._workspace.extrapolation
        if self._coded:
            room = [self._workspace.room(which, parts[0], dtype) for which in (0, 1)]
            out = [dequantise(*coded, to) for coded, to in zip(_coded_pairs(parts), room)]
        elif ahead is not None:
            # What some models put behind the tokens (the text) is active in each call.
            ahead = pad(ahead, (0, parts[0].shape[2] - ahead.shape[1]))
            room = [self._workspace.room(which, parts[0], dtype) for which in (0, 1)]
            out = [advance(held, *change, ahead, to) for held, change, to in zip(parts, _coded_pairs(parts), room)]
        return out[0].transpose(1, 2), out[1].transpose(1, 2)

    @property
    def shape(self) -> KVShape | None:
        """What is kept; None where nothing is. Of a store in the model's precision alone."""
        if not self._filled or not self._parts or self._coded:
            return None
        kept = self._parts[0]
        return KVShape(kept.shape[:-1].numel(), kept.shape[-1], kept.dtype, len(self._parts) > 2)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it holds on the device."""
        return self._parts

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(t.nbytes for t in self._parts)

    @property
    def host_nbytes(self) -> int:
        """Bytes held in host memory for the device."""
        return sum(t.nbytes for t in self.host)

    def reset(self) -> None:
        """Free the memory."""
        self._parts, self.host, self.next, self._filled = [], [], None, False


def _coded_pairs(parts: list[torch.Tensor]) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Of K and of V, the codes and scales among a layer's tensors: the last four, of themselves or of their changes."""
    *_, key_codes, key_scales, value_codes, value_scales = parts
    return (key_codes, key_scales), (value_codes, value_scales)


class StaticKV:
    """K/V that are the same at every step (of the text, of a given image): computed once, then kept.

    Attributes:
        tensors: whatever the attention made of them; None until it has.
    """

    host_nbytes = 0

    def __init__(self) -> None:
        self.tensors: tuple[torch.Tensor, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in self.tensors or ())

    def reset(self) -> None:
        """Free the memory."""
        self.tensors = None
