"""`enable` and `disable` on a diffusers pipeline: find the family, check the scheduler, install, restore."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any, TypeAlias

from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModularPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from heterostep import compat, interrupts, parallel, policy
from heterostep.config import HSAConfig
from heterostep.engine.report import Report, StepInfo
from heterostep.engine.runner import Runner
from heterostep.engine.trajectory import Correction
from heterostep.engine.wrapping import WrappedStep, is_wrapped
from heterostep.errors import HeterostepError
from heterostep.models import FAMILIES, cp_plan


def supported() -> list[str]:
    """The class names of the pipelines that heterostep runs on."""
    return sorted(name for family in FAMILIES.values() for name in family.pipelines)


class _Session:
    """What `enable` changed on one pipeline. Refers to the pipeline weakly, so that neither keeps the other alive."""

    def __init__(self, pipe: Pipeline, config: HSAConfig, on_step: Callable[[StepInfo], None] | None) -> None:
        models, here = transformers(pipe), weakref.ref(pipe)
        self.config = config
        self.name = type(pipe).__name__
        self._class = plain_class(pipe)
        enabled_class = _enabled_class(self._class)
        tell = None if on_step is None else functools.partial(_tell, here)
        self.runner = Runner(here, models, FAMILIES[type(models[0]).__name__].adapter, config, tell)
        # Whoever drops the pipeline may go on with its transformer.
        self._abandoned = weakref.finalize(pipe, self.runner.uninstall)
        # What the user gave may refer to the pipeline, so it is kept there.
        pipe.__dict__[_ON_STEP] = on_step
        pipe.__class__ = enabled_class
        _open[pipe] = self

    @contextlib.contextmanager
    def call(self, pipe: Any) -> Iterator[None]:
        """What is around one call of the pipeline: inside of it, in this thread, transformer and scheduler are ours."""
        self.runner.claim()
        try:
            with self._claimed(pipe):
                yield
        finally:
            self.runner.end()

    @contextlib.contextmanager
    def _claimed(self, pipe: Any) -> Iterator[None]:
        check_pipeline(pipe)
        models, known = transformers(pipe), [expert.model for expert in self.runner.experts]
        if len(models) != len(known) or any(a is not b for a, b in zip(models, known)):
            raise HeterostepError(
                "a transformer was replaced while heterostep is enabled: call heterostep.enable again"
            )
        original = pipe.scheduler
        # Nothing of earlier steps is in Euler's next.
        euler = self.config.solver == "euler" or isinstance(original, FlowMatchEulerDiscreteScheduler)
        scheduler = first_order(original) if self.config.solver == "euler" else original
        local = [attn for model in models for attn in self.runner.adapter.local_attentions(model)]
        step = None
        try:
            self.runner.step_by(scheduler, Correction.VELOCITY if euler else Correction.SAMPLE)
            _last[pipe] = self
            step = WrappedStep(scheduler, self.runner.end_step, self.runner.stepped)
            pipe.scheduler = scheduler
            with parallel.without_context_parallel(local):
                yield
        finally:
            if step is not None:
                step.restore()
            # A scheduler that the user has set meanwhile is theirs to keep.
            if pipe.scheduler is scheduler:
                pipe.scheduler = original

    def close(self, pipe: Pipeline) -> None:
        self._abandoned.detach()
        self.runner.uninstall()
        pipe.__dict__.pop(_ON_STEP, None)
        pipe.__class__ = self._class


# Where an enabled pipeline has its `on_step`.
_ON_STEP = "_heterostep_on_step"


def _tell(pipe: weakref.ref[Pipeline], info: StepInfo) -> None:
    on_step = getattr(pipe(), _ON_STEP, None)
    if on_step is not None:
        on_step(info)


class _OfUser(MultiPipelineCallbacks):
    """diffusers' own callbacks, whose calls are the user's; diffusers asks for their type and `tensor_inputs`."""

    def __init__(self, callback: PipelineCallback | MultiPipelineCallbacks, runner: Runner) -> None:
        super().__init__([callback])
        self._call = runner.of_user(lambda *args: callback(*args))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def _with_callback_of_user(cls: Any, runner: Runner, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """A pipeline call's arguments, whose callback's calls are the user's."""
    name, position = "callback_on_step_end", None
    if name not in kwargs:
        # Given by position; the pipeline itself is the first parameter.
        parameters = list(signature(cls.__call__).parameters)[1:]
        position = parameters.index(name) if name in parameters[: len(args)] else None
    callback = kwargs.get(name) if position is None else args[position]
    # diffusers asks its own callbacks for their type.
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        callback = _OfUser(callback, runner)
    elif callable(callback):
        callback = runner.of_user(callback)
    if position is not None:
        return (*args[:position], callback, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: callback} if name in kwargs else kwargs


class _Enabled:
    """Mixed into the class of an enabled pipeline, so that its calls can be told from all others."""


def _enabled_class(cls: Any) -> Any:
    """A pipeline class whose calls are accelerated; in all else it is, and looks, the same.

    Made anew for each pipeline: others may patch the class that they find on it.
    """

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = _open.get(self)
        if session is None and not isinstance(self, _Enabled):
            # Somebody kept the bound call from before `disable`.
            return cls.__call__(self, *args, **kwargs)
        if session is None:
            raise HeterostepError(
                "this is a copy of a pipeline that heterostep was enabled on: make it with from_pipe() instead"
            )
        args, kwargs = _with_callback_of_user(cls, session.runner, args, kwargs)
        with session.call(self), parallel.readable_errors():
            return cls.__call__(self, *args, **kwargs)

    def reduce(self: Any, protocol: int) -> Any:
        raise HeterostepError("a pipeline cannot be pickled or copied while heterostep is enabled: call disable first")

    def new(_: Any, *args: Any, **kwargs: Any) -> Any:
        # What is made by its class (`type(pipe)(**pipe.components)`, `from_pipe`) is a plain pipeline.
        return cls(*args, **kwargs)

    own = {"__new__": new, "__call__": call, "__reduce_ex__": reduce}
    own |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (_Enabled, cls), own | {"__doc__": cls.__doc__})


_PIPELINES = (DiffusionPipeline, ModularPipeline)
Pipeline: TypeAlias = DiffusionPipeline | ModularPipeline

_open: weakref.WeakKeyDictionary[Pipeline, _Session] = weakref.WeakKeyDictionary()
_last: weakref.WeakKeyDictionary[Pipeline, _Session] = weakref.WeakKeyDictionary()


def _check_scheduler(scheduler: Any) -> None:
    flow = (
        scheduler.config.get("use_flow_sigmas", False) and scheduler.config.get("prediction_type") == "flow_prediction"
    )
    stochastic = "sde" in scheduler.config.get("algorithm_type", "")
    if isinstance(scheduler, UniPCMultistepScheduler | DPMSolverMultistepScheduler) and flow and not stochastic:
        return
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config.get(
        "stochastic_sampling", False
    ):
        return
    raise HeterostepError(
        f"the scheduler {type(scheduler).__name__} is not supported as it is configured: use UniPCMultistepScheduler "
        "or DPMSolverMultistepScheduler with use_flow_sigmas=True and prediction_type='flow_prediction' (no sde), or "
        "FlowMatchEulerDiscreteScheduler without stochastic_sampling"
    )


def plain_class(pipe: Any) -> Any:
    """A pipeline's class, as it is without `enable`."""
    cls = type(pipe)
    return cls.__bases__[1] if issubclass(cls, _Enabled) else cls


def first_order(scheduler: Any) -> Any:
    """First-order steps on the scheduler's own sigma grid."""
    if isinstance(scheduler, UniPCMultistepScheduler):
        steps = list(range(scheduler.config.num_train_timesteps))
        return UniPCMultistepScheduler.from_config(scheduler.config, solver_order=1, disable_corrector=steps)
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        return DPMSolverMultistepScheduler.from_config(scheduler.config, solver_order=1)
    return scheduler


def transformers(pipe: Any) -> list[Any]:
    """The pipeline's transformers; Wan 2.2 A14B has two, and may be loaded with one of them."""
    names = ("transformer", "transformer_2")
    found = [model for model in (getattr(pipe, name, None) for name in names) if model is not None]
    return found[:1] if len(found) == 2 and found[0] is found[1] else found


def enable_context_parallel(pipe: Any, ranks: int) -> None:
    """Split the tokens of a pipeline's transformers over so many processes, by the plans that work.

    It may be called before `enable` or after it.

    Raises:
        HeterostepError: they cannot be.
    """
    for model in transformers(pipe):
        parallel.enable_context_parallel(model, ranks, cp_plan(model))


def check_pipeline(pipe: Any) -> None:
    """Check that heterostep runs on this pipeline as it is.

    Raises:
        HeterostepError: it does not; one line says why and what to do.
    """
    name, models = type(pipe).__name__, transformers(pipe)
    kinds = {type(model).__name__ for model in models}
    if not kinds or any(kind not in FAMILIES or name not in FAMILIES[kind].pipelines for kind in kinds):
        if not kinds and not hasattr(pipe, "components"):
            if name in FAMILIES:
                raise HeterostepError(f"heterostep needs the pipeline, not its transformer ({name})")
            raise HeterostepError(
                f"heterostep needs a diffusers pipeline, not {name}; supported are {', '.join(supported())}"
            )
        hint = " (compile its blocks with compile_repeated_blocks() instead)" if "OptimizedModule" in kinds else ""
        inner = " and ".join(sorted(kinds)) or "no transformer"
        raise HeterostepError(f"{name} with {inner} is not supported{hint}; supported are {', '.join(supported())}")
    for model in models:
        _check_model(model)
    if len({parallel.ranks_of(getattr(model, "_parallel_config", None)).size for model in models}) > 1:
        raise HeterostepError("one of the two transformers is on several GPUs: call enable_parallelism on both, alike")
    _check_scheduler(pipe.scheduler)


def _check_model(model: Any) -> None:
    compiled = getattr(model, "_compiled_call_impl", None) is not None
    if compiled or hasattr(model.__dict__.get("forward"), "_torchdynamo_orig_callable"):
        raise HeterostepError("the transformer is compiled as a whole: use compile_repeated_blocks() instead")
    if (name := compat.other_cache(model)) is not None:
        raise HeterostepError(
            f"another cache ({name}) skips steps on the transformer: switch it off first, for both would skip at once"
        )
    adapter = FAMILIES[type(model).__name__].adapter
    parallel.check(model, adapter.parallel, adapter.cp_plan(model) if adapter.parallel else None)


def enable(
    pipe: Pipeline,
    *,
    config: HSAConfig | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    **options: Any,
) -> None:
    """Make the pipeline's next generations faster: from now on its calls evaluate the transformer at some steps only.

    Enabling again replaces the earlier options; where that fails, the earlier ones stay. Works before and after offload
    is enabled, and LoRA may be put on and taken off in between. Of pipelines that share a transformer only this one's
    calls are changed, also in other threads; enable and disable while none is in the middle of one. K/V are given back
    when a call ends, as it should or by an exception.

    Args:
        pipe: a diffusers pipeline of one of the supported families (`heterostep.pipeline.supported()`).
        config: an `HSAConfig`; or give its fields as keywords: `enable(pipe, runtime=0.5)`.
        on_step: called after each denoising step with a `StepInfo`.
        options: fields of `HSAConfig`.

    Raises:
        HeterostepError: an option is out of range, or the pipeline or its scheduler is not supported.
    """
    config = HSAConfig.of(config, options, beside=("on_step",))
    if on_step is not None and not callable(on_step):
        raise HeterostepError(f"on_step must be a function that takes a StepInfo, not {on_step!r}")
    policy.find(config.policy)
    check_pipeline(pipe)
    restore = _restoring(pipe)
    with interrupts.delayed():
        disable(pipe)
        try:
            if any(is_wrapped(model) for model in transformers(pipe)):
                raise HeterostepError(
                    "the transformer is enabled through another pipeline: call heterostep.disable on that"
                )
            _Session(pipe, config, on_step)
        except BaseException:
            restore()
            raise


def _session_of(pipe: Any) -> _Session | None:
    return _open.get(pipe) if isinstance(pipe, _PIPELINES) else None


def _restoring(pipe: Pipeline) -> Callable[[], None]:
    """What makes a disabled pipeline what it is now: off, or enabled with the options that it has.

    A pipeline that cannot be enabled any more, for its transformer was taken off or is another one's now, stays off.
    """
    session, on_step = _session_of(pipe), getattr(pipe, _ON_STEP, None)

    def restore() -> None:
        models = transformers(pipe)
        free = all(type(model).__name__ in FAMILIES and not is_wrapped(model) for model in models)
        if session is not None and models and free:
            with interrupts.delayed():
                _Session(pipe, session.config, on_step)

    return restore


def disable(pipe: Pipeline) -> None:
    """Give the pipeline back as it was. On a pipeline that is not enabled this does nothing.

    Args:
        pipe: the pipeline that was enabled.

    Raises:
        HeterostepError: it is no pipeline.
    """
    if not isinstance(pipe, _PIPELINES):
        raise HeterostepError(f"disable needs a diffusers pipeline, not {type(pipe).__name__}")
    session = _open.get(pipe)
    if session is not None:
        with interrupts.delayed():
            session.close(pipe)
            # Another thread may have been as quick.
            _open.pop(pipe, None)


@contextlib.contextmanager
def enabled(
    pipe: Pipeline,
    *,
    config: HSAConfig | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    **options: Any,
) -> Iterator[Pipeline]:
    """`enable` for the length of a with block.

    Afterwards, also after an exception, the pipeline is as before: off, or on with the options that it had.

    Args:
        pipe, config, on_step, options: as in `enable`.

    Yields:
        The pipeline.

    Raises:
        HeterostepError: as in `enable`.
    """
    restore, before, left = _restoring(pipe), _session_of(pipe), False

    def leave() -> None:
        nonlocal left
        # An `enable` that failed has left what was.
        if not left and _session_of(pipe) is not before:
            with interrupts.delayed():
                disable(pipe)
                restore()
                left = True

    try:
        try:
            enable(pipe, config=config, on_step=on_step, **options)
            yield pipe
        finally:
            leave()
    finally:
        # Where Ctrl-C came before the first could begin.
        leave()


def report(pipe: Pipeline) -> Report:
    """What the pipeline's last generation was asked for and what it did; also after `disable`.

    Args:
        pipe: a pipeline that has generated while it was enabled.

    Raises:
        HeterostepError: the pipeline was never enabled, or has generated nothing since.
    """
    session = _last.get(pipe) if isinstance(pipe, _PIPELINES) else None
    if session is None:
        known = isinstance(pipe, _PIPELINES) and pipe in _open
        first = "" if known else "heterostep.enable(pipe, ...) first, then "
        raise HeterostepError(f"nothing to report yet: call {first}the pipeline")
    return session.runner.report(session.name)


def inspect(pipe: Pipeline) -> Runner:
    """What an enabled pipeline runs on: `.generation` is the run under way or the last, `.experts` its transformers.

    For tests, and to look at a run from `on_step` or a callback. What is in them may change from version to version.

    Raises:
        HeterostepError: the pipeline is not enabled.
    """
    session = _session_of(pipe)
    if session is None:
        raise HeterostepError("nothing to inspect: call heterostep.enable(pipe, ...) first")
    return session.runner
