"""TeaCache, by its published rule: skip the blocks while the first one's input changes little."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from heterostep.compare.methods.calibration import calibrated, dense_run
from heterostep.compare.methods.calls import (
    Calls,
    around,
    blocks_of,
    forward_rows,
    put,
    refuses_control,
    refuses_unknown,
    relative_change_to_previous,
    rows_of,
    samples_of,
)
from heterostep.compare.methods.method import Method
from heterostep.pipeline import transformers


class _Stop(Exception):
    """Raised in the first block once the modulated input is known: the rest of the call is not needed."""


class _AddResiduals(torch.nn.Module):
    """In place of all blocks: adds what they added at the last evaluated step, each [B, N, C]."""

    def __init__(self, signature: inspect.Signature, residuals: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self._signature, self._residuals = signature, residuals

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        streams = _streams(self._signature.bind(None, *args, **kwargs).arguments, len(self._residuals))
        sums = tuple(x + residual for x, residual in zip(streams, self._residuals))
        return sums if len(sums) > 1 else sums[0]


def _streams(inputs: dict[str, Any], outputs: int) -> tuple[torch.Tensor, ...]:
    """What of a block's inputs comes back changed: the video, and the sound or (HunyuanVideo 1.5) the text."""
    second = "audio_hidden_states" if "audio_hidden_states" in inputs else "encoder_hidden_states"
    return tuple(inputs[name] for name in ("hidden_states", second)[:outputs])


@dataclass
class _Probe:
    """Listens to one call: the first block's modulated input, and what the blocks add.

    Attributes:
        decide: decide(modulated [B, N, C]) -> whether to stop the call there.
        residuals: of the blocks together, per stream [B, N, C].
    """

    decide: Callable[[torch.Tensor], bool]
    residuals: tuple[torch.Tensor, ...] = ()

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[None]:
        blocks = blocks_of(model)[1]
        signature = inspect.signature(type(blocks[0]).forward)
        came: dict[str, Any] = {}

        def first_block(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            came.update(signature.bind(module, *args, **kwargs).arguments)

        def attention(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.decide(args[0] if args else kwargs["hidden_states"]):
                raise _Stop

        def last_block(module: Any, args: tuple, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            self.residuals = tuple(y - x for y, x in zip(outputs, _streams(came, len(outputs))))

        attn: Any = blocks[0].attn1 if hasattr(blocks[0], "attn1") else blocks[0].attn
        hooks = [
            blocks[0].register_forward_pre_hook(first_block, with_kwargs=True),
            attn.register_forward_pre_hook(attention, with_kwargs=True),
            blocks[-1].register_forward_hook(last_block),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def teacache_polynomial(inputs: Sequence[float], outputs: Sequence[float]) -> np.ndarray:
    """TeaCache (arXiv 2411.19108): coefficients, highest power first, of the output's change over the input's.

    Args:
        inputs: relative L1 changes of the first block's modulated input from step to step, of a dense run.
        outputs: those of the transformer's output.

    Returns:
        Degree 4 as in the paper, less where a run has too few steps to fit it; the identity without any.
    """
    if not inputs:
        return np.array([1.0, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.RankWarning)
        return np.polyfit(inputs, outputs, min(4, len(inputs) - 1))


def _teacache_calibration(pipe: Any, num_steps: int) -> list[np.ndarray]:
    """A polynomial for each of the pipeline's transformers, fitted to one dense run of all its guidance branches."""
    calls = Calls(pipe)
    last: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    changes: list[tuple[list[float], list[float]]] = [([], []) for _ in transformers(pipe)]

    def instead(position: int, model: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        calls.enter()
        seen: list[torch.Tensor] = []

        def decide(modulated: torch.Tensor) -> bool:
            seen.append(modulated.clone())
            return False

        with _Probe(decide).on(model):
            output = forward(*args, **kwargs)
        new, key = (seen[0], output[0].clone()), (position, calls.branch)
        if key in last:
            for values, now, before in zip(changes[position], new, last[key]):
                values.append(float(relative_change_to_previous(now, before, 1)[0]))
        last[key] = new
        return output

    with around(pipe, instead):
        dense_run(pipe, num_steps)
    return [teacache_polynomial(*each) for each in changes]


@dataclass
class _TeaState:
    """What TeaCache keeps of one guidance branch: modulated input and blocks' residuals, each [b, N, C].

    `change` are the sums of the rescaled changes, [B]; `skip` is who skips the call under way, bool [B].
    """

    position: int
    change: np.ndarray
    skip: np.ndarray
    modulated: torch.Tensor | None = None
    residuals: tuple[torch.Tensor, ...] = ()


@contextlib.contextmanager
def _without_blocks(model: Any, residuals: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """The transformer with the blocks' residuals, each [n, N, C], in place of its blocks."""
    name, blocks = blocks_of(model)
    signature = inspect.signature(type(blocks[0]).forward)
    model._modules[name] = torch.nn.ModuleList([_AddResiduals(signature, residuals)])
    try:
        yield
    finally:
        model._modules[name] = blocks


def _teacache(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    # Before the context is entered, so that nobody takes the calibration's seconds for the generation's.
    polynomials = calibrated(pipe, ("teacache", num_steps), lambda: _teacache_calibration(pipe, num_steps))
    return _teacache_run(pipe, value, polynomials)


@contextlib.contextmanager
def _teacache_run(pipe: Any, value: float, polynomials: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    """TeaCache (arXiv 2411.19108): the blocks are skipped while their input's rescaled change sums up to less.

    What they added at the last evaluated step is added again, as the authors do; the embeddings and the output
    projection run at every step.
    """
    calls, states = Calls(pipe), dict[int, _TeaState]()
    samples = 1

    def instead(position: int, model: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        nonlocal samples
        inputs = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        if calls.enter():
            states.clear()
            samples = samples_of(pipe, model, inputs)
        if calls.branch not in states or states[calls.branch].position != position:
            states[calls.branch] = _TeaState(position, np.zeros(samples), np.zeros(samples, bool))
        state, x = states[calls.branch], inputs["hidden_states"]
        batch = x.shape[0]

        def decide(modulated: torch.Tensor) -> bool:
            if state.modulated is not None:
                rescaled = np.polyval(
                    polynomials[position], relative_change_to_previous(modulated, state.modulated, samples)
                )
                # A polynomial may fall below 0 beside the points that it was fitted to; a change cannot.
                state.change += np.maximum(rescaled, 0.0)
            state.modulated = modulated.clone()
            able = bool(state.residuals) and 0 < calls.step < calls.num_steps - 1
            state.skip = (state.change < value) & able
            return bool(state.skip.any())

        def evaluate(chosen: np.ndarray, decide: Callable[[torch.Tensor], bool]) -> tuple[torch.Tensor, ...]:
            probe, rows = _Probe(decide), rows_of(chosen, batch, x.device)
            with probe.on(model):
                output = forward_rows(forward, args, kwargs, batch, rows)
            state.change[chosen] = 0.0
            state.residuals = put(state.residuals, rows, probe.residuals, batch)
            return output

        with contextlib.suppress(_Stop):
            return evaluate(np.ones(samples, bool), decide)
        rows = rows_of(state.skip, batch, x.device)
        with _without_blocks(model, tuple(each[rows] for each in state.residuals)):
            held = forward_rows(forward, args, kwargs, batch, rows)
        if state.skip.all():
            return held
        new = evaluate(~state.skip, lambda modulated: False)
        order = torch.cat([rows, rows_of(~state.skip, batch, x.device)]).argsort()
        return tuple(torch.cat(pair)[order] for pair in zip(held, new))

    with around(pipe, instead):
        yield {}


def _refuses_teacache(pipe: Any) -> str | None:
    if reason := refuses_unknown(pipe) or refuses_control(pipe, "TeaCache"):
        return reason
    if any(module._compiled_call_impl is not None for model in transformers(pipe) for module in model.modules()):
        return "TeaCache's probe stands inside the first block, which must not be compiled"
    return None


TEACACHE = Method(
    name="teacache",
    label="TeaCache",
    dial="threshold on the summed and rescaled change of the first block's input",
    # The authors' .05 and .08 for Wan 2.1 1.3B, .14 and .2 for 14B.
    values=(0.02, 0.03, 0.04, 0.05, 0.08, 0.14, 0.2),
    apply=_teacache,
    refuses=_refuses_teacache,
)
