"""What caches need of a pipeline: which call of which step this is, its blocks, and rows of its samples.

A method is applied around calls of one pipeline, in the thread that makes them (`heterostep.compare.measure.generate`):
meanwhile the transformers' calls of that thread are that pipeline's, and those of other threads are not.

Shapes: B samples, b batch of a call (B times the guidance branches in one call), N tokens, C values a token.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from heterostep.compat import scheduler_step
from heterostep.engine.wrapping import WrappedForward
from heterostep.errors import HeterostepError
from heterostep.models import FAMILIES
from heterostep.pipeline import check_pipeline, transformers


@dataclass
class Calls:
    """Which call of which step of which generation a transformer's call is.

    Attributes:
        pipe: the pipeline.
        num_steps: steps of the generation under way.
        step: its step, from 0.
        branch: the call's place in its step: a guidance branch is called at the same place in each.
        index: of the step's timestep and sigma in the scheduler.
    """

    pipe: Any
    num_steps: int = 0
    step: int = -1
    branch: int = -1
    index: int = 0
    _timesteps: Any = None
    _first: int = 0

    def enter(self) -> bool:
        """Take note of a call; whether it is a generation's first. Schedulers make new timesteps for each."""
        scheduler = self.pipe.scheduler
        self.index = step = scheduler_step(self.pipe)
        begins = self._timesteps is not scheduler.timesteps or step - self._first < self.step
        if begins:
            self._timesteps, self._first, self.step = scheduler.timesteps, step, -1
            self.num_steps = len(scheduler.timesteps) - step
        self.branch = self.branch + 1 if step - self._first == self.step else 0
        self.step = step - self._first
        return begins


@contextlib.contextmanager
def around(pipe: Any, instead: Callable[[int, Any, Callable[..., Any], tuple, dict[str, Any]], Any]) -> Iterator[None]:
    """Let instead(position, model, forward, args, kwargs) answer this thread's calls of the pipeline's transformers."""
    wrapped: list[WrappedForward] = []
    thread = threading.get_ident()

    def answer(position: int, model: Any, *args: Any, **kwargs: Any) -> Any:
        forward = wrapped[position].inner
        # In another thread this is another's call, of a pipeline that shares the model.
        if threading.get_ident() != thread:
            return forward(*args, **kwargs)
        return instead(position, model, forward, args, kwargs)

    try:
        for position, model in enumerate(transformers(pipe)):
            wrapped.append(WrappedForward(model, functools.partial(answer, position, model)))
        yield
    finally:
        for each in wrapped:
            each.restore()


@contextlib.contextmanager
def before(pipe: Any, on_call: Callable[[int, Any, tuple, dict[str, Any]], None]) -> Iterator[None]:
    """Call on_call(position, model, args, kwargs) before this thread's calls of the pipeline's transformers.

    Before diffusers' hooks on the transformer, too, which stand in its forward.
    """
    thread, hooks = threading.get_ident(), []

    def listen(position: int, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            on_call(position, model, args, kwargs)

    try:
        for position, model in enumerate(transformers(pipe)):
            listener = functools.partial(listen, position)
            hooks.append(model.register_forward_pre_hook(listener, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """The transformer's blocks, and the attribute that has them."""
    name = "blocks" if hasattr(model, "blocks") else "transformer_blocks"
    return name, getattr(model, name)


def samples_of(pipe: Any, model: Any, inputs: dict[str, Any]) -> int:
    """How many videos are being made, seen from the first call of a step."""
    return inputs["hidden_states"].shape[0] // FAMILIES[type(model).__name__].adapter.cfg_batch_factor(pipe)


def ratios(above: torch.Tensor, below: torch.Tensor, samples: int) -> np.ndarray:
    """|above|_1 / |below|_1 of each sample, float64 [B].

    Args:
        above, below: [b, ...], the guidance branches of a call one after another.
        samples: B.
    """
    # Sample by sample, not along a dimension: so the sums are those of the sample alone, bit for bit.
    pairs = zip(*(x.float().unflatten(0, (-1, samples)).unbind(1) for x in (above, below)))
    return torch.stack([a.abs().mean() / b.abs().mean() for a, b in pairs]).double().cpu().numpy()


def relative_change_to_previous(new: torch.Tensor, old: torch.Tensor, samples: int) -> np.ndarray:
    """|new - old|_1 / |old|_1 of each sample, float64 [B]: the relative L1 distance of TeaCache (arXiv 2411.19108).

    The engine's `relative_change` is over |new|_1.
    """
    return ratios(new.float() - old.float(), old, samples)


def rows_of(chosen: np.ndarray, batch: int, device: Any) -> torch.Tensor:
    """The chosen samples' rows, int64 [n], in a call's batch of b; `chosen` is bool [B]."""
    return torch.from_numpy(np.tile(chosen, batch // len(chosen)).nonzero()[0]).to(device)


def _take(value: Any, batch: int, rows: torch.Tensor) -> Any:
    """An argument's rows, where it has one for each of the batch."""
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch else value


def forward_rows(
    forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], batch: int, rows: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The transformer's outputs, each [n, ...], for the given rows of a call's batch of b."""
    if len(rows) == batch:
        return tuple(forward(*args, **kwargs))
    taken = {name: _take(value, batch, rows) for name, value in kwargs.items()}
    return tuple(forward(*(_take(value, batch, rows) for value in args), **taken))


def put(
    old: Sequence[torch.Tensor], rows: torch.Tensor, new: Sequence[torch.Tensor], batch: int
) -> tuple[torch.Tensor, ...]:
    """What is kept of each row, [b, ...], with the rows [n, ...] that are new."""
    return tuple(new) if len(rows) == batch else tuple(x.index_copy(0, rows, y.to(x.dtype)) for x, y in zip(old, new))


def refuses_unknown(pipe: Any) -> str | None:
    """Why heterostep does not know the pipeline: what steps and branches are is known of its own pipelines alone."""
    try:
        check_pipeline(pipe)
    except HeterostepError as error:
        return str(error)
    return None


def refuses_unnamed(pipe: Any, name: str) -> str | None:
    """Why a cache of diffusers that keeps a state for each guidance branch does not run."""
    if "cache_context" not in inspect.getsource(inspect.unwrap(type(pipe).__call__)):
        return f"{type(pipe).__name__} does not name its guidance branches (cache_context), which {name} tells apart"
    return None


def refuses_control(pipe: Any, name: str) -> str | None:
    if any(type(model).__name__ == "WanVACETransformer3DModel" for model in transformers(pipe)):
        return f"{name} skips blocks, but VACE adds its control hints between them: they would count twice"
    return None


def like(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The latents alone: image-to-video models get further channels, behind them."""
    return x if x.shape == output.shape else x[:, : output.shape[1]]
