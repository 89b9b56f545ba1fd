"""The training-free accelerators that a user would pick instead: diffusers' caches, cache-dit, EasyCache, TeaCache.

Those of a package run as the package has them; where no diffusers hook exists the published rule stands here. All skip
work for every token at once. Their skipped blocks may still be *called* (diffusers' hooks and cache-dit stand inside or
around a block's forward), so evaluations are counted on the layers in a block, not on the block.

A method is applied around calls of one pipeline, in the thread that makes them (`heterostep.compare.measure.generate`):
meanwhile the transformers' calls of that thread are that pipeline's, and those of other threads are not.

Shapes: B samples, b batch of a call (B times the guidance branches in one call), N tokens, C values a token.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from heterostep.compare.method import Method
from heterostep.engine.wrapping import WrappedForward
from heterostep.errors import HeterostepError
from heterostep.models import FAMILIES
from heterostep.pipeline import check_pipeline, transformers

NEUTRAL_PROMPT = "a video"


@dataclass
class _Calls:
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
        step = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index
        if step is None:
            # Not every pipeline tells where it begins; video-to-video does so later than at the first step.
            step = int((scheduler.timesteps - self.pipe.current_timestep).abs().argmin())
        self.index = step
        begins = self._timesteps is not scheduler.timesteps or step - self._first < self.step
        if begins:
            self._timesteps, self._first, self.step = scheduler.timesteps, step, -1
            self.num_steps = len(scheduler.timesteps) - step
        self.branch = self.branch + 1 if step - self._first == self.step else 0
        self.step = step - self._first
        return begins


@contextlib.contextmanager
def _around(pipe: Any, instead: Callable[[int, Any, Callable[..., Any], tuple, dict[str, Any]], Any]) -> Iterator[None]:
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
def _before(pipe: Any, on_call: Callable[[int, Any, tuple, dict[str, Any]], None]) -> Iterator[None]:
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


def _blocks(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """The transformer's blocks, and the attribute that has them."""
    name = "blocks" if hasattr(model, "blocks") else "transformer_blocks"
    return name, getattr(model, name)


# Rules that decide from data decide for each sample by itself: in a batch as it would be decided for the sample alone.


def _samples(pipe: Any, model: Any, inputs: dict[str, Any]) -> int:
    """How many videos are being made, seen from the first call of a step."""
    return inputs["hidden_states"].shape[0] // FAMILIES[type(model).__name__].adapter.guidance_copies(pipe)


def _ratios(above: torch.Tensor, below: torch.Tensor, samples: int) -> np.ndarray:
    """|above|_1 / |below|_1 of each sample, float64 [B].

    Args:
        above, below: [b, ...], the guidance branches of a call one after another.
        samples: B.
    """
    # Sample by sample, not along a dimension: so the sums are those of the sample alone, bit for bit.
    pairs = zip(*(x.float().unflatten(0, (-1, samples)).unbind(1) for x in (above, below)))
    return torch.stack([a.abs().mean() / b.abs().mean() for a, b in pairs]).double().cpu().numpy()


def _relative_change(new: torch.Tensor, old: torch.Tensor, samples: int) -> np.ndarray:
    """|new - old|_1 / |old|_1 of each sample, float64 [B]."""
    return _ratios(new.float() - old.float(), old, samples)


def _rows(chosen: np.ndarray, batch: int, device: Any) -> torch.Tensor:
    """The chosen samples' rows, int64 [n], in a call's batch of b; `chosen` is bool [B]."""
    return torch.from_numpy(np.tile(chosen, batch // len(chosen)).nonzero()[0]).to(device)


def _take(value: Any, batch: int, rows: torch.Tensor) -> Any:
    """An argument's rows, where it has one for each of the batch."""
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch else value


def _forward_rows(
    forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], batch: int, rows: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The transformer's outputs, each [n, ...], for the given rows of a call's batch of b."""
    if len(rows) == batch:
        return tuple(forward(*args, **kwargs))
    taken = {name: _take(value, batch, rows) for name, value in kwargs.items()}
    return tuple(forward(*(_take(value, batch, rows) for value in args), **taken))


def _put(
    old: Sequence[torch.Tensor], rows: torch.Tensor, new: Sequence[torch.Tensor], batch: int
) -> tuple[torch.Tensor, ...]:
    """What is kept of each row, [b, ...], with the rows [n, ...] that are new."""
    return tuple(new) if len(rows) == batch else tuple(x.index_copy(0, rows, y.to(x.dtype)) for x, y in zip(old, new))


def _refuses_unknown(pipe: Any) -> str | None:
    """Why heterostep does not know the pipeline: what steps and branches are is known of its own pipelines alone."""
    try:
        check_pipeline(pipe)
    except HeterostepError as error:
        return str(error)
    return None


def _refuses_unnamed(pipe: Any, name: str) -> str | None:
    """Why a cache of diffusers that keeps a state for each guidance branch does not run."""
    if "cache_context" not in inspect.getsource(inspect.unwrap(type(pipe).__call__)):
        return f"{type(pipe).__name__} does not name its guidance branches (cache_context), which {name} tells apart"
    return None


def _refuses_control(pipe: Any, name: str) -> str | None:
    if any(type(model).__name__ == "WanVACETransformer3DModel" for model in transformers(pipe)):
        return f"{name} skips blocks, but VACE adds its control hints between them: they would count twice"
    return None


# EasyCache: the rule of its paper.

# Share of the steps that are evaluated before any is skipped: the authors' 10 of 50.
EASYCACHE_WARMUP = 0.2


def easycache_error(
    k: float | np.ndarray, x: torch.Tensor, previous_x: torch.Tensor, v: torch.Tensor, samples: int = 1
) -> np.ndarray:
    """EasyCache (arXiv 2507.02860): the output's relative change that is expected of the input's change.

    Args:
        k: |v_i - v_j| / |x_i - x_j| of the last two evaluated steps i and j, the paper's transformation rate; [B].
        x: the step's latents, [b, ...].
        previous_x: those of the step before.
        v: the last evaluated output.
        samples: B.

    Returns:
        k |x - previous_x| / |v| of each sample, in mean absolute values, float64 [B]. A step is skipped while the sum
        of these since the last evaluated step is below the threshold; its output is then x + (v_i - x_i).
    """
    return k * _ratios(x.float() - previous_x.float(), v, samples)


@dataclass
class _EasyState:
    """What EasyCache keeps in one generation, of each sample; its residuals by branch, each [b, ...] per output.

    Attributes:
        position: of the transformer.
        samples: B.
        x: the latents of the step before, [b, ...].
        v: the first branch's last evaluated output, [b, ...].
        evaluated_x: the latents that `v` came of.
        k: transformation rates, [B].
        error: sums of the expected changes, [B].
        skip: who skips the step under way, bool [B].
    """

    position: int
    samples: int
    x: torch.Tensor | None = None
    v: torch.Tensor | None = None
    evaluated_x: torch.Tensor | None = None
    k: np.ndarray | None = None
    error: np.ndarray = field(init=False)
    skip: np.ndarray = field(init=False)
    residuals: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.error, self.skip = np.zeros(self.samples), np.zeros(self.samples, bool)

    def decide(self, x: torch.Tensor, value: float, able: bool) -> None:
        """Who skips the step that begins with the latents x [b, ...]; nobody where it is not `able`."""
        self.skip = np.zeros(self.samples, bool)
        if self.k is not None and self.x is not None and self.v is not None:
            self.error += easycache_error(self.k, _like(x, self.v), _like(self.x, self.v), self.v, self.samples)
            if able:
                self.skip = self.error < value
        self.x = x.clone()

    def evaluated(self, x: torch.Tensor, new: torch.Tensor, rows: torch.Tensor, chosen: np.ndarray) -> None:
        """Take up the first branch's output [n, ...] of the chosen samples' rows; `x` is that of all rows."""
        batch, count = x.shape[0], int(chosen.sum())
        self.error[chosen] = 0.0
        if self.v is not None and self.evaluated_x is not None:
            changed = new.float() - self.v[rows].float()
            moved = _like(x[rows], new).float() - _like(self.evaluated_x[rows], new).float()
            # Until the rates are known everybody evaluates, so all are known at the same step.
            rates = np.zeros(self.samples) if self.k is None else self.k
            rates[chosen] = _ratios(changed, moved, count)
            self.k = rates
        held = () if self.v is None or self.evaluated_x is None else (self.v, self.evaluated_x)
        self.v, self.evaluated_x = _put(held, rows, (new.clone(), x[rows]), batch)


def _latents(inputs: dict[str, Any], outputs: int) -> tuple[torch.Tensor, ...]:
    """The noisy latents that the transformer's outputs belong to, with whatever conditions come with them."""
    names = ("hidden_states", "audio_hidden_states")
    return tuple(inputs[name] for name in names[:outputs])


def _like(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The latents alone: image-to-video models get further channels, behind them."""
    return x if x.shape == output.shape else x[:, : output.shape[1]]


@contextlib.contextmanager
def _easycache(pipe: Any, value: float, num_steps: int) -> Iterator[dict[str, Any]]:
    """EasyCache (arXiv 2507.02860), decided at a step's first call for all its branches, as its authors do."""
    calls, state = _Calls(pipe), _EasyState(-1, 1)

    def instead(position: int, model: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        nonlocal state
        begins = calls.enter()
        inputs = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        if begins or position != state.position:
            # Another expert's outputs tell nothing of this one's.
            state = _EasyState(position, _samples(pipe, model, inputs))
        branch, x = calls.branch, inputs["hidden_states"]
        batch = x.shape[0]
        if branch == 0:
            warm = round(EASYCACHE_WARMUP * calls.num_steps) <= calls.step
            state.decide(x, value, warm and 0 < calls.step < calls.num_steps - 1)
        residuals = state.residuals.get(branch, ())
        chosen = ~state.skip if residuals else np.ones(state.samples, bool)
        held: tuple[torch.Tensor, ...] = ()
        if not chosen.all():
            pairs = zip(_latents(inputs, len(residuals)), residuals)
            held = tuple((_like(each, added) + added).to(each.dtype) for each, added in pairs)
            if not chosen.any():
                return held
        rows = _rows(chosen, batch, x.device)
        new = _forward_rows(forward, args, kwargs, batch, rows)
        pairs = zip(_latents(inputs, len(new)), new)
        # In float32: between 16-bit latents and outputs the difference would lose the little that changes.
        added = tuple(each.float() - _like(latents[rows], each) for latents, each in pairs)
        state.residuals[branch] = _put(residuals, rows, added, batch)
        if branch == 0:
            state.evaluated(x, new[0], rows, chosen)
        return _put(held, rows, new, batch)

    with _around(pipe, instead):
        yield {}


# A dense run for those that need one.

_calibration_options: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
_calibrations: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def calibrate_with(pipe: Any, **options: Any) -> None:
    """Tell what the pipeline's call will be given: best the comparison's own size and guidance.

    Calibration runs are given the same. Without it they are 256 x 256 x 33 at the pipeline's own guidance, which is not
    what a larger video would give; and cache-dit is not told of calls without guidance.
    """
    if _calibration_options.get(pipe) != options:
        _calibration_options[pipe] = options
        _calibrations.pop(pipe, None)


def _dense_run(pipe: Any, num_steps: int, on_step: Callable[[], None] = lambda: None) -> None:
    """One dense generation of the neutral prompt, from a neutral image or video where the pipeline takes one."""

    def after_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return {}

    parameters = inspect.signature(type(pipe).__call__).parameters
    options = {"height": 256, "width": 256, "num_frames": 33, **_calibration_options.get(pipe, {})}
    ramp = np.linspace(64, 192, options["width"]).astype(np.uint8)
    image = Image.fromarray(np.repeat(ramp[None, :, None], options["height"], 0).repeat(3, 2))
    if "Image" in type(pipe).__name__ and "image" in parameters:
        options.setdefault("image", image)
        if getattr(pipe.transformer or pipe.transformer_2, "config", {}).get("pos_embed_seq_len") is not None:
            options.setdefault("last_image", image)
    if "VideoToVideo" in type(pipe).__name__:
        options.setdefault("video", [image] * options["num_frames"])
    if "callback_on_step_end" in parameters:
        options["callback_on_step_end"] = after_step
    pipe(
        **{name: value for name, value in options.items() if name in parameters},
        prompt=NEUTRAL_PROMPT,
        num_inference_steps=num_steps,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )


def _calibrated(pipe: Any, key: tuple, calibrate: Callable[[], Any]) -> Any:
    """What calibrate() gives, once per pipeline, key, scheduler and number of experts."""
    known = _calibrations.setdefault(pipe, {})
    shown = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    key = (*key, repr(sorted(shown.items())), pipe.config.get("boundary_ratio"))
    if key not in known:
        known[key] = calibrate()
    return known[key]


# TeaCache: the rule of its paper.


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
        blocks = _blocks(model)[1]
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
    calls = _Calls(pipe)
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
                values.append(float(_relative_change(now, before, 1)[0]))
        last[key] = new
        return output

    with _around(pipe, instead):
        _dense_run(pipe, num_steps)
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
    name, blocks = _blocks(model)
    signature = inspect.signature(type(blocks[0]).forward)
    model._modules[name] = torch.nn.ModuleList([_AddResiduals(signature, residuals)])
    try:
        yield
    finally:
        model._modules[name] = blocks


def _teacache(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    # Before the context is entered, so that nobody takes the calibration's seconds for the generation's.
    polynomials = _calibrated(pipe, ("teacache", num_steps), lambda: _teacache_calibration(pipe, num_steps))
    return _teacache_run(pipe, value, polynomials)


@contextlib.contextmanager
def _teacache_run(pipe: Any, value: float, polynomials: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    """TeaCache (arXiv 2411.19108): the blocks are skipped while their input's rescaled change sums up to less.

    What they added at the last evaluated step is added again, as the authors do; the embeddings and the output
    projection run at every step.
    """
    calls, states = _Calls(pipe), dict[int, _TeaState]()
    samples = 1

    def instead(position: int, model: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        nonlocal samples
        inputs = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        if calls.enter():
            states.clear()
            samples = _samples(pipe, model, inputs)
        if calls.branch not in states or states[calls.branch].position != position:
            states[calls.branch] = _TeaState(position, np.zeros(samples), np.zeros(samples, bool))
        state, x = states[calls.branch], inputs["hidden_states"]
        batch = x.shape[0]

        def decide(modulated: torch.Tensor) -> bool:
            if state.modulated is not None:
                rescaled = np.polyval(polynomials[position], _relative_change(modulated, state.modulated, samples))
                # A polynomial may fall below 0 beside the points that it was fitted to; a change cannot.
                state.change += np.maximum(rescaled, 0.0)
            state.modulated = modulated.clone()
            able = bool(state.residuals) and 0 < calls.step < calls.num_steps - 1
            state.skip = (state.change < value) & able
            return bool(state.skip.any())

        def evaluate(chosen: np.ndarray, decide: Callable[[torch.Tensor], bool]) -> tuple[torch.Tensor, ...]:
            probe, rows = _Probe(decide), _rows(chosen, batch, x.device)
            with probe.on(model):
                output = _forward_rows(forward, args, kwargs, batch, rows)
            state.change[chosen] = 0.0
            state.residuals = _put(state.residuals, rows, probe.residuals, batch)
            return output

        with contextlib.suppress(_Stop):
            return evaluate(np.ones(samples, bool), decide)
        rows = _rows(state.skip, batch, x.device)
        with _without_blocks(model, tuple(each[rows] for each in state.residuals)):
            held = _forward_rows(forward, args, kwargs, batch, rows)
        if state.skip.all():
            return held
        new = evaluate(~state.skip, lambda modulated: False)
        order = torch.cat([rows, _rows(~state.skip, batch, x.device)]).argsort()
        return tuple(torch.cat(pair)[order] for pair in zip(held, new))

    with _around(pipe, instead):
        yield {}


def _refuses_teacache(pipe: Any) -> str | None:
    if reason := _refuses_unknown(pipe) or _refuses_control(pipe, "TeaCache"):
        return reason
    if any(module._compiled_call_impl is not None for model in transformers(pipe) for module in model.modules()):
        return "TeaCache's probe stands inside the first block, which must not be compiled"
    return None


# diffusers' own caches.


@contextlib.contextmanager
def _as_found(models: Sequence[Any]) -> Iterator[None]:
    """Take away the empty registries and bound forwards that diffusers' hooks and cache-dit leave on modules."""
    names = ("forward", "_diffusers_hook")
    modules = [module for model in models for module in model.modules()]
    found = [{name for name in names if name in module.__dict__} for module in modules]
    try:
        yield
    finally:
        for module, before in zip(modules, found):
            registry = module.__dict__.get("_diffusers_hook")
            if registry is None or not registry.hooks:
                for name in set(names) - before:
                    module.__dict__.pop(name, None)


def _hooks(model: Any) -> list[Any]:
    """All of diffusers' hooks in a model."""
    registries = (module.__dict__.get("_diffusers_hook") for module in model.modules())
    return [hook for registry in registries if registry is not None for hook in registry.hooks.values()]


def _managers(model: Any) -> list[Any]:
    """What keeps the states of diffusers' hooks in a model, and knows the call under way (`_context`)."""
    return [hook.state_manager for hook in _hooks(model) if hasattr(hook, "state_manager")]


def _forget(model: Any) -> None:
    """Drop what a cache keeps, as the end of a generation does, but not the guidance branch of the call under way."""
    managers = _managers(model)
    contexts = [manager._context for manager in managers]
    model._reset_stateful_cache()
    for manager, context in zip(managers, contexts):
        manager.set_context(context)


@contextlib.contextmanager
def _diffusers_cache(
    pipe: Any, config: Callable[[int], Any], prepare: Callable[[int, _Calls, bool], None] = lambda *_: None
) -> Iterator[dict[str, Any]]:
    """A cache of diffusers on the transformers.

    Args:
        pipe: the pipeline.
        config: position of a transformer -> its cache config, None to leave it alone.
        prepare: prepare(position, calls, whether a generation begins) before each call of a transformer.
    """
    models, calls = transformers(pipe), _Calls(pipe)

    def on_call(position: int, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        begins = calls.enter()
        if begins:
            # An interrupted generation leaves its state behind.
            for each in models:
                _forget(each)
        prepare(position, calls, begins)

    with _as_found(models):
        try:
            for position, model in enumerate(models):
                if (wanted := config(position)) is not None:
                    model.enable_cache(wanted)
            with _before(pipe, on_call):
                yield {}
        finally:
            for model in models:
                if model.is_cache_enabled:
                    model.disable_cache()


def _refuses_unregistered(pipe: Any, name: str) -> str | None:
    """Why a cache that must know what a block takes and returns does not run."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    if reason := _refuses_unknown(pipe) or _refuses_control(pipe, name) or _refuses_unnamed(pipe, name):
        return reason
    for model in transformers(pipe):
        block = type(_blocks(model)[1][0])
        try:
            TransformerBlockRegistry.get(block)
        except ValueError:
            return f"diffusers has not registered {block.__name__}, which its {name} needs"
    return None


def _first_block_cache(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    from diffusers import FirstBlockCacheConfig

    return _diffusers_cache(pipe, lambda position: FirstBlockCacheConfig(threshold=value))


def _magcache_calibration(pipe: Any, num_steps: int) -> list[list[float]]:
    """Of each transformer: how much longer its blocks' residual is than a step before, of the conditional branch."""
    from diffusers import MagCacheConfig

    models = transformers(pipe)
    ratios: list[list[float]] = [[] for _ in models]
    # One step more than there are, for at the last one the hook prints the ratios and forgets them.
    config = MagCacheConfig(calibrate=True, num_inference_steps=num_steps + 1)

    def read() -> None:
        for position, model in enumerate(models):
            (states,) = (hook.state_manager._state_cache for hook in _hooks(_blocks(model)[1][0]))
            if states:
                ratios[position] = list(next(iter(states.values())).calibration_ratios)

    with _diffusers_cache(pipe, lambda position: config):
        _dense_run(pipe, num_steps, read)
    return ratios


# The threshold from which on MagCache skips any number of steps in a row, and may begin after a tenth of them: with
# diffusers' three in a row after a fifth it takes two evaluations of five.
MAGCACHE_FAST = 0.5


def _magcache(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    from diffusers import MagCacheConfig

    ratios = _calibrated(pipe, ("magcache", num_steps), lambda: _magcache_calibration(pipe, num_steps))

    def config(position: int) -> Any:
        if not ratios[position]:
            return None
        # It skips at errors up to and with the threshold: at 0 a ratio of exactly 1 would do.
        threshold = value if value > 0 else -1.0
        steps = len(ratios[position])
        limits = {"max_skip_steps": num_steps, "retention_ratio": 0.1} if value >= MAGCACHE_FAST else {}
        return MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=ratios[position], **limits)

    return _diffusers_cache(pipe, config)


# The threshold from which on SeaCache may skip more steps in a row than diffusers' two, and how many; 0 is any number.
# With two no threshold reaches a quarter of the evaluations.
SEACACHE_ROWS = ((0.0, 2), (0.5, 4), (1.0, 0))


def _seacache(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    """SeaCache (arXiv 2602.18993) as diffusers has it: residuals of the blocks follow their last change."""
    row = max((start, row) for start, row in SEACACHE_ROWS if start <= value)[1]
    return _seacache_run(pipe, threshold=value, max_consecutive_cached=row)


def _seacache_hold(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    """SeaCache as its authors have it: residuals are held, for any number of steps."""
    return _seacache_run(pipe, threshold=value, max_consecutive_cached=0, residual_order=0)


def _seacache_run(pipe: Any, **options: Any) -> AbstractContextManager[dict[str, Any]]:
    from diffusers import SeaCacheConfig

    def latents(model: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Of each sample [C, f, h, w]: image-to-video models get further channels, behind them."""
        x = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments["hidden_states"]
        return list(x[:, : model.config.out_channels].unbind())

    def config(position: int) -> Any:
        return SeaCacheConfig(raw_vision_callback=latents, **options)

    def prepare(position: int, calls: _Calls, begins: bool) -> None:
        at = {"step_index": calls.step, "num_inference_steps": calls.num_steps}
        sigma = float(pipe.scheduler.sigmas[calls.index])
        for manager in _managers(transformers(pipe)[position]):
            # Only text-to-video with Wan tells its hooks where it is.
            manager.set_context(replace(manager._context, sigma=sigma, **at))

    return _diffusers_cache(pipe, config, prepare)


def _refuses_seacache(pipe: Any) -> str | None:
    if reason := _refuses_unregistered(pipe, "SeaCache"):
        return reason
    if "LTX" in type(pipe).__name__:
        return "SeaCache filters latents over frames, height and width, and LTX's transformer gets them packed"
    return None


def _taylorseer(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    from diffusers import TaylorSeerCacheConfig

    def config(position: int) -> Any:
        model = transformers(pipe)[position]
        # Lite mode skips the blocks and predicts `proj_out` alone. LTX-2's sound has a projection of its own, so the
        # same is said with patterns there.
        patterns: dict[str, Any] = {"use_lite_mode": True}
        if hasattr(model, "audio_proj_out"):
            skipped, predicted = r"^transformer_blocks\.[^.]+$", r"^(audio_)?proj_out$"
            patterns = {"skip_predict_identifiers": [skipped], "cache_identifiers": [predicted]}
        return TaylorSeerCacheConfig(cache_interval=int(value), taylor_factors_dtype=model.dtype, **patterns)

    return _diffusers_cache(pipe, config)


# How many steps longer cross-attention is kept than self-attention, as in the settings of PAB's paper.
PAB_CROSS = 4


def _pab(pipe: Any, value: float, num_steps: int) -> AbstractContextManager[dict[str, Any]]:
    """Pyramid Attention Broadcast (arXiv 2408.12588): self-attention by the dial, cross-attention longer.

    diffusers' hooks keep one state, made for guidance in one batch. Here each guidance branch gets its own: else the
    unconditional call would be given the conditional one's attention. LTX-2's attentions do not say which of them are
    cross-attention, so diffusers takes them all for self-attention.
    """
    from diffusers import PyramidAttentionBroadcastConfig
    from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastState

    timestep = 0.0
    states: dict[tuple[int, int], list[Any]] = {}

    def config(position: int) -> Any:
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=int(value),
            cross_attention_block_skip_range=int(value) + PAB_CROSS if value > 1 else 1,
            current_timestep_callback=lambda: timestep,
        )

    def prepare(position: int, calls: _Calls, begins: bool) -> None:
        nonlocal timestep
        timestep = float(pipe.scheduler.timesteps[calls.index])
        if begins:
            states.clear()
        hooks = [hook for hook in _hooks(transformers(pipe)[position]) if hasattr(hook, "block_skip_range")]
        key = position, calls.branch
        if key not in states:
            states[key] = [PyramidAttentionBroadcastState() for _ in hooks]
        for hook, state in zip(hooks, states[key]):
            hook.state = state

    return _diffusers_cache(pipe, config, prepare)


# cache-dit, where it is installed.


def _refuses_cache_dit(pipe: Any) -> str | None:
    if importlib.util.find_spec("cache_dit") is None:
        return "the package is not there: pip install cache-dit"
    if reason := _refuses_unknown(pipe):
        return reason
    if type(pipe.transformer).__name__ == "LTX2VideoTransformer3DModel":
        return (
            "cache-dit replaces LTX-2's forward by its own, which does not take what diffusers' pipeline gives (sigma)"
        )
    return None


@contextlib.contextmanager
def _quiet_cache_dit() -> Iterator[None]:
    """Only errors on the terminal: its loggers, some of them made late, share the handlers of this one."""
    handlers = logging.getLogger("CACHE_DIT").handlers
    # A log file is there because the user asked for it.
    levels = {handler: handler.level for handler in handlers if not isinstance(handler, logging.FileHandler)}
    for handler in levels:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)


# The threshold from which on DBCache computes one block instead of the first eight, and half of the warm-up: as the
# package has them these alone take more than a third of the evaluations.
CACHE_DIT_FAST = 0.4


@contextlib.contextmanager
def _cache_dit(pipe: Any, value: float, num_steps: int) -> Iterator[dict[str, Any]]:
    """DBCache with the package's defaults, scaled down for few steps and few blocks, and its fastest settings beyond.

    It takes every second call of Wan and HunyuanVideo 1.5 for the unconditional one, unless it is told that there is no
    guidance (`calibrate_with`).
    """
    import cache_dit

    models = transformers(pipe)
    guidance = _calibration_options.get(pipe, {}).get("guidance_scale")
    # 8 of the published models' 30 and more; and 8 of 40, which experts share.
    blocks, warmup = min(8, len(_blocks(models[0])[1]) // 3), min(8, round(0.2 * num_steps) // len(models))
    if value >= CACHE_DIT_FAST:
        blocks, warmup = 1, warmup // 2
    config = cache_dit.DBCacheConfig(
        residual_diff_threshold=value,
        Fn_compute_blocks=max(1, blocks),
        max_warmup_steps=max(1, warmup),
        # None leaves it to the package.
        enable_separate_cfg=None if guidance is None or guidance > 1 else False,
    )
    with _quiet_cache_dit(), _as_found(models):
        try:
            cache_dit.enable_cache(pipe, cache_config=config)
            yield {}
        finally:
            cache_dit.disable_cache(pipe)


PEERS: tuple[Method, ...] = (
    Method(
        name="easycache",
        label="EasyCache",
        dial="threshold on the summed relative change of the output",
        # The authors' .05 for Wan 2.1 1.3B. The last skips all that its warm-up leaves.
        values=(0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 1.6),
        apply=_easycache,
        refuses=_refuses_unknown,
    ),
    Method(
        name="teacache",
        label="TeaCache",
        dial="threshold on the summed and rescaled change of the first block's input",
        # The authors' .05 and .08 for Wan 2.1 1.3B, .14 and .2 for 14B.
        values=(0.02, 0.03, 0.04, 0.05, 0.08, 0.14, 0.2),
        apply=_teacache,
        refuses=_refuses_teacache,
    ),
    Method(
        name="first-block-cache",
        label="First Block Cache (diffusers)",
        dial="threshold on the relative change of the first block's residual",
        # .08 and .1 are its authors' and diffusers' examples.
        values=(0.04, 0.08, 0.1, 0.2, 0.4, 1.2),
        apply=_first_block_cache,
        refuses=lambda pipe: _refuses_unregistered(pipe, "First Block Cache"),
        whole_batch=True,
    ),
    Method(
        name="magcache",
        label="MagCache (diffusers)",
        dial="threshold on the summed error of the residual's length",
        # diffusers' default is .06; the authors' .12 for Wan 2.1.
        values=(0.01, 0.03, 0.06, 0.12, 0.24, 0.5, 1.0),
        apply=_magcache,
        refuses=lambda pipe: _refuses_unregistered(pipe, "MagCache"),
    ),
    Method(
        name="seacache",
        label="SeaCache (diffusers)",
        dial="threshold on the summed relative change of the filtered latents",
        # diffusers' default is .25.
        values=(0.05, 0.1, 0.2, 0.25, 0.35, 0.6, 1.0, 2.0),
        apply=_seacache,
        refuses=_refuses_seacache,
        whole_batch=True,
    ),
    Method(
        name="seacache-hold",
        label="SeaCache as published (diffusers, residuals held)",
        dial="threshold on the summed relative change of the filtered latents",
        # The authors' .2 and .35 for Wan 2.1 1.3B, .4 for 14B.
        values=(0.05, 0.1, 0.2, 0.35, 0.4, 0.6, 2.0),
        apply=_seacache_hold,
        refuses=_refuses_seacache,
        whole_batch=True,
    ),
    Method(
        name="taylorseer",
        label="TaylorSeer, lite (diffusers)",
        dial="steps from one evaluation to the next",
        # diffusers' default is 5.
        values=(2, 3, 4, 5, 6, 8),
        apply=_taylorseer,
        refuses=lambda pipe: _refuses_unknown(pipe) or _refuses_unnamed(pipe, "TaylorSeer"),
    ),
    Method(
        name="pab",
        label="Pyramid Attention Broadcast (diffusers)",
        dial="steps from one evaluation of self-attention to the next",
        values=(2, 3, 4, 5, 8),
        apply=_pab,
        refuses=_refuses_unknown,
    ),
    Method(
        name="cache-dit",
        label="DBCache (cache-dit)",
        dial="threshold on the relative change of the first blocks' residual",
        # The package's default is .08; its examples for video go to .12.
        values=(0.04, 0.08, 0.12, 0.2, 0.4, 0.8),
        apply=_cache_dit,
        refuses=_refuses_cache_dit,
        whole_batch=True,
    ),
)
