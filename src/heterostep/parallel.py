"""Several processes, one on each GPU, at one video: Ulysses context parallelism, as diffusers' models have it.

Outside of attention each rank has a part of the tokens and all heads; inside, all tokens and a part of the heads. In a
sparse step the *active* tokens are split, and K and V are kept as attention reads them: of all tokens, a part of the
heads. So the memory of K and V, and what each rank sends, fall by the number of ranks.

Ranks make the same plan from the same numbers: what is measured on one of them is told to all.

Shapes: P ranks, B batch, N tokens, n active tokens, H heads, D head dim; b = ceil(n / P) or a rank's part of N.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from heterostep import compat
from heterostep.errors import HeterostepError

# Values of the noise that ranks compare, and how far they may differ over their standard deviation: what encodes a
# given image may round otherwise on each.
SAMPLED, DIFFERENT = 64, 0.1


class Split(NamedTuple):
    """How a call's tokens are split over ranks.

    Attributes:
        rows: that this rank has, with those that only fill up.
        counts: of each rank, without them.
    """

    rows: int
    counts: tuple[int, ...]


class Ranks:
    """One process alone, for which everything is whole. It stands where `Ulysses` would, so that nobody has to ask.

    Attributes:
        size: P.
        rank: which of them this is, from 0.
        uneven: whether tokens may be split unevenly.
    """

    size, rank, uneven = 1, 0, False

    def pad_to_ranks(self, index: torch.Tensor) -> torch.Tensor:
        """Repeats the last token until the count is divisible by P: int64 [B, n] -> [B, P * b]."""
        return index

    def shard(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part, along `dim`, of what every rank has."""
        return x

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """What the ranks have parts of, joined along `dim`."""
        return x

    def split(self, rows: int, index: torch.Tensor | None, num_tokens: int) -> Split:
        """How a call's tokens are split.

        Args:
            rows: that this rank has.
            index: the active tokens, [B, n]; None where all N are.
            num_tokens: N.
        """
        return Split(rows, (rows,))

    def tokens_to_heads(self, split: Split, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A part of the tokens, all heads [B, b, H, D] -> all that count, a part of the heads [B, n, H / P, D]."""
        return xs

    def heads_to_tokens(self, split: Split, x: torch.Tensor) -> torch.Tensor:
        """The way back, heads flattened: [B, n, H / P * D] -> [B, b, H * D]."""
        return x

    def shard_heads(self, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of what every rank has, [B, T, H, D], this rank's heads [B, T, H / P, D]."""
        return xs

    def gather_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's heads, flattened: [B, T, H / P * D] -> [B, T, H * D]."""
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor, on all; it may be written over."""
        return x

    def broadcast_floats(self, values: Sequence[float]) -> list[float]:
        """The first rank's numbers, on all."""
        return list(values)

    def all_reduce_min(self, values: Sequence[int]) -> list[int]:
        """The least of each number over all ranks."""
        return list(values)

    def true_on_all(self, value: bool) -> bool:
        """Whether a value is True on every rank."""
        return bool(self.all_reduce_min([int(value)])[0])

    def check_same(self, noise: torch.Tensor) -> None:
        """Check that all ranks were given the same noise.

        Raises:
            HeterostepError: they were not.
        """


ALONE = Ranks()


class Ulysses(Ranks):
    """The ranks of a process group.

    Args:
        group: of torch.distributed.
        uneven: whether tokens may be split unevenly (`ulysses_anything`).
    """

    def __init__(self, group: Any, uneven: bool = False) -> None:
        import torch.distributed as dist

        self.group, self.uneven = group, uneven
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def pad_to_ranks(self, index: torch.Tensor) -> torch.Tensor:
        """See `Ranks`."""
        lacking = -index.shape[1] % self.size
        return torch.cat([index, index[:, -1:].expand(-1, lacking)], dim=1) if lacking else index

    def shard(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """See `Ranks`."""
        return x.tensor_split(self.size, dim=dim)[self.rank]

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """See `Ranks`."""
        if not self.uneven:
            return self._all_gather_even(x, dim)
        sizes = self._all_gather_even(torch.tensor([x.shape[dim]], device=x.device), 0).tolist()
        x = x.movedim(dim, 0)
        parts = self._all_gather_even(_filled(x, max(sizes), 0), 0).chunk(self.size)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)]).movedim(0, dim)

    def split(self, rows: int, index: torch.Tensor | None, num_tokens: int) -> Split:
        """See `Ranks`."""
        if index is not None:
            count = index.shape[1]
            return Split(rows, tuple(min(max(count - rank * rows, 0), rows) for rank in range(self.size)))
        if not self.uneven:
            return Split(rows, (rows,) * self.size)
        each, more = divmod(num_tokens, self.size)
        return Split(rows, tuple(each + (rank < more) for rank in range(self.size)))

    def tokens_to_heads(self, split: Split, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Ranks`. What comes back is laid out as [B, H / P, n, D], as stores and attention read it."""
        most, dtype = max(split.counts), functools.reduce(torch.promote_types, (x.dtype for x in xs))
        # P, x, b, B, H / P, D
        sent = torch.stack(
            [_filled(x, most, 1).unflatten(2, (self.size, -1)).permute(2, 1, 0, 3, 4) for x in _in_words(*xs)], 1
        )
        received = self._all_to_all(sent).permute(1, 3, 4, 0, 2, 5)
        return tuple(_joined(x, split.counts).view(dtype).transpose(1, 2) for x in received)

    def heads_to_tokens(self, split: Split, x: torch.Tensor) -> torch.Tensor:
        """See `Ranks`."""
        most = max(split.counts)
        (words,) = _in_words(x)
        parts = [_filled(part, most, 1) for part in words.split(split.counts, dim=1)]
        # P, B, b, H / P * D
        received = self._all_to_all(torch.stack(parts))
        return received.permute(1, 2, 0, 3).flatten(2)[:, : split.rows].view(x.dtype)

    def shard_heads(self, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Ranks`."""
        return tuple(x.chunk(self.size, dim=2)[self.rank] for x in xs)

    def gather_heads(self, x: torch.Tensor) -> torch.Tensor:
        """See `Ranks`."""
        return self._all_gather_even(x, 2)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """See `Ranks`."""
        import torch.distributed as dist

        x = x.contiguous()
        dist.broadcast(x, group=self.group, group_src=0)
        return x

    def broadcast_floats(self, values: Sequence[float]) -> list[float]:
        """See `Ranks`."""
        return self.broadcast(torch.tensor(values, dtype=torch.float64, device=self._device)).tolist() if values else []

    def all_reduce_min(self, values: Sequence[int]) -> list[int]:
        """See `Ranks`."""
        import torch.distributed as dist

        known = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.all_reduce(known, dist.ReduceOp.MIN, group=self.group)
        return known.tolist()

    def check_same(self, noise: torch.Tensor) -> None:
        """See `Ranks`."""
        flat = noise.flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].float()
        first = self.broadcast(some.clone())
        # All ranks must say so, or those that do not would wait for the others for ever.
        different = ((some - first).abs().max() > DIFFERENT * first.std()).float()
        if self._all_gather_even(different[None], 0).any():
            raise HeterostepError(
                "the processes were given different noise: give each a generator of the same seed, and the same prompt"
            )

    @functools.cached_property
    def _device(self) -> torch.device:
        import torch.distributed as dist

        cuda = "nccl" in str(dist.get_backend(self.group))
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def _all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """[P, ...] -> [P, ...]: the r-th part is sent to rank r, and there it comes from this rank's place."""
        import torch.distributed as dist

        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.group)
        return received

    def _all_gather_even(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        x = x.contiguous()
        received = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        compat.all_gather(received, x, self.group)
        return received if dim == 0 else torch.cat(received.chunk(self.size), dim=dim)


def _in_words(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same values in words of eight bytes along the last dimension, where sizes and strides divide: a copy of rows
    then has a quarter of bfloat16's elements to place. Compiled code makes copies of its own."""

    def divides(x: torch.Tensor) -> bool:
        steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
        same = x.dtype == xs[0].dtype and x.stride(-1) == 1
        return same and all(step * x.itemsize % torch.int64.itemsize == 0 for step in steps)

    return tuple(x.view(torch.int64) for x in xs) if not torch.compiler.is_compiling() and all(map(divides, xs)) else xs


def _filled(x: torch.Tensor, rows: int, dim: int) -> torch.Tensor:
    """With zeros to so many rows."""
    lacking = rows - x.shape[dim]
    return pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, lacking)) if lacking else x


def _joined(x: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """[B, H, P, b, D] -> [B, H, n, D], contiguous: of each rank's rows those that count."""
    most = x.shape[3]
    full = sum(count == most for count in counts)
    if counts[:full] == (most,) * full and not any(counts[full + 1 :]):
        # All that only fills up is at the end.
        return x.reshape(*x.shape[:2], -1, x.shape[4])[:, :, : sum(counts)].contiguous()
    return torch.cat([x[:, :, rank, :count] for rank, count in enumerate(counts)], dim=2)


def ranks_of(config: Any) -> Ranks:
    """The ranks of a diffusers `ParallelConfig`; of None, one process alone."""
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return ALONE
    return Ulysses(context._ulysses_mesh.get_group(), context.ulysses_anything)


def check(model: Any, supported: bool, plan: dict[str, Any] | None) -> None:
    """Check that tokens can be skipped in a model as it is spread over processes.

    Args:
        supported: whether its family is known to work.
        plan: by which its tokens are to be split; None for diffusers' own.

    Raises:
        HeterostepError: they cannot; says what can.
    """
    config = getattr(model, "_parallel_config", None)
    if config is None:
        return
    name, context = type(model).__name__, config.context_parallel_config
    if context is None:
        raise HeterostepError(
            "tensor parallelism is not supported: use ContextParallelConfig(ulysses_degree=...) with enable_parallelism"
        )
    if context.ring_degree > 1:
        raise HeterostepError(
            "ring attention is not supported, for each rank would need the K and V of skipped tokens in turn: use "
            "ContextParallelConfig(ulysses_degree=...) without ring_degree"
        )
    if not supported:
        raise HeterostepError(f"{name} on several GPUs is not supported: run it on one device")
    check_heads(model, context.ulysses_degree)
    if compat.split_plan(model) != (model._cp_plan if plan is None else plan):
        raise HeterostepError(
            f"the plan by which the tokens of {name} are split is not one that works: give enable_parallelism "
            "cp_plan=heterostep.models.cp_plan(transformer)"
        )


def check_heads(model: Any, ranks: int) -> None:
    """Check that so many ranks can share a model's heads.

    Raises:
        HeterostepError: they cannot.
    """
    check_head_counts(type(model).__name__, model.config, ranks)


def check_head_counts(name: str, config: Mapping[str, Any], ranks: int) -> None:
    """`check_heads` of a model that is known by its class's name and its configuration alone."""
    keys = ("num_attention_heads", "audio_num_attention_heads")
    heads = [config[key] for key in keys if key in config]
    if odd := next((count for count in heads if count % ranks), None):
        raise HeterostepError(
            f"the {odd} heads of {name} cannot be split over {ranks} GPUs: take a number that divides them"
        )


@contextlib.contextmanager
def without_context_parallel(attentions: Iterable[Any]) -> Iterator[None]:
    """Let these attention modules compute by themselves, whose K and V every rank has whole.

    diffusers would send them all to all, where each rank's copy makes the same K and V count once more.
    """
    processors = [
        attn.processor for attn in attentions if getattr(attn.processor, "_parallel_config", None) is not None
    ]
    configs = [processor._parallel_config for processor in processors]
    for processor in processors:
        processor._parallel_config = None
    try:
        yield
    finally:
        for processor, config in zip(processors, configs):
            processor._parallel_config = config


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """What diffusers' context parallelism asserts, as one line that says what to do."""
    try:
        yield
    except AssertionError as error:
        if "divisible by mesh size" not in str(error):
            raise
        raise HeterostepError(
            "the video's tokens cannot be split evenly over the GPUs: take another size or number of frames, or give "
            "ContextParallelConfig ulysses_anything=True"
        ) from error


def enable_context_parallel(model: Any, size: int, plan: dict[str, Any] | None) -> None:
    """Split a transformer's tokens over the processes that are there, `size` of them at one video.

    Args:
        plan: where its tokens are split and gathered; None for diffusers' own.

    Raises:
        HeterostepError: it cannot be.
    """
    from diffusers import ContextParallelConfig

    with compat.cpu_as_accelerator():
        try:
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size), cp_plan=plan)
        except ValueError as error:
            raise HeterostepError(f"{type(model).__name__} on several GPUs is not supported: {error}") from error
