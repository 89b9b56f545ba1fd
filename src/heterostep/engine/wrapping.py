"""Wraps a model's forward beneath any offloading hooks, and a scheduler's step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from heterostep.engine.trajectory import SchedulerInput
from heterostep.errors import HeterostepError
from heterostep.models.base import NOT_COPIED


def _places(model: Any) -> list[tuple[Any, str]]:
    """Where a model's forward may be kept, as (object, attribute): the model, accelerate's hook, diffusers' hooks."""
    references = getattr(model.__dict__.get("_diffusers_hook"), "_fn_refs", [])
    places = [(reference, name) for reference in references for name in ("original_forward", "forward")]
    return places + [(model, name) for name in ("_old_forward", "forward") if name in model.__dict__]


class WrappedForward:
    """Called in place of a model's forward until it is taken back.

    Hooks of accelerate and diffusers come and go with every generation, and restore what they found when they came. So
    this stands where the model's own forward is kept, beneath them, whichever came first.

    Args:
        model: the module.
        instead: called with the forward's arguments.

    Attributes:
        inner: the forward as it was.
    """

    def __init__(self, model: Any, instead: Callable[..., Any]) -> None:
        self._model, self._instead, self._active = model, instead, True
        places = _places(model)
        own = (place for place in places if getattr(getattr(*place), "__func__", None) is type(model).forward)
        holder, name = next(own, places[-2] if "_old_forward" in model.__dict__ else (model, "forward"))
        self._was_in_class = holder is model and name not in model.__dict__
        self.inner: Callable[..., Any] = getattr(holder, name)
        # Without its attributes: those of another wrapper would take the place of ours.
        functools.update_wrapper(self, self.inner, updated=())
        setattr(holder, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._instead(*args, **kwargs) if self._active else self.inner(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> WrappedForward:
        # Others take a forward off a model and bind it again.
        return self

    def restore(self) -> None:
        """Put the forward back; where another wrapper hides this one, it passes everything on from now."""
        self._active = False
        for holder, name in _places(self._model):
            if getattr(holder, name) is self:
                if self._was_in_class and (holder, name) == (self._model, "forward"):
                    delattr(holder, name)
                else:
                    setattr(holder, name, self.inner)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy would answer for the model that it was taken from.

        Raises:
            HeterostepError: always.
        """
        raise HeterostepError(NOT_COPIED)


def is_wrapped(model: Any) -> bool:
    """Whether a forward is being wrapped now."""
    values = (getattr(*place) for place in _places(model))
    return any(isinstance(value, WrappedForward) and value._active for value in values)


class WrappedStep:
    """Called in place of a scheduler's `step` until it is taken back. Copies of the scheduler step as they did.

    Args:
        scheduler: a diffusers scheduler.
        before: before(velocity) -> what the scheduler is to be given.
        after: called when it has made the step.
    """

    def __init__(
        self, scheduler: Any, before: Callable[[torch.Tensor], SchedulerInput], after: Callable[[], None]
    ) -> None:
        self._scheduler, self._before, self._after, self._active = scheduler, before, after, True
        self._inner = scheduler.step
        self._was_in_class = "step" not in scheduler.__dict__
        functools.update_wrapper(self, self._inner, updated=())
        scheduler.step = self

    def __call__(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if not self._active:
            return self._inner(model_output, timestep, sample, *args, **kwargs)
        given = self._before(model_output)
        if given.sample_shift is not None:
            shift = given.sample_shift.to(sample.dtype)
            sample = sample + shift
            # UniPC's corrector goes once more from where the step before began, and drops the sample.
            if getattr(self._scheduler, "last_sample", None) is not None:
                self._scheduler.last_sample = self._scheduler.last_sample + shift
        stepped = self._inner(given.velocity, timestep, sample, *args, **kwargs)
        self._after()
        return stepped

    def restore(self) -> None:
        """Put the scheduler's own step back; where another wrapper hides this one, it passes everything on from now."""
        self._active = False
        if self._scheduler.__dict__.get("step") is not self:
            return
        if self._was_in_class:
            del self._scheduler.step
        else:
            self._scheduler.step = self._inner

    def __deepcopy__(self, memo: dict) -> Any:
        # LTX-2's pipelines copy the scheduler for the sound: that one gets the step that ours had.
        return copy.deepcopy(self._inner, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise HeterostepError("a scheduler cannot be pickled in the middle of a run: do it between two calls")
