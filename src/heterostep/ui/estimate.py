"""How long a run will take: from runs of this session, or from calls timed on this machine earlier."""

from __future__ import annotations

import functools
import logging
import threading
from dataclasses import dataclass
from typing import Any

import torch

from heterostep import configs, tiny
from heterostep.errors import HeterostepError
from heterostep.models import FAMILIES
from heterostep.planning import timings
from heterostep.planning.dry_run import dry_run
from heterostep.precision import name_of

_log = logging.getLogger("heterostep")
# Seconds that differ by less than this part are not worth another line in the file.
NEWS = 0.1


@dataclass(frozen=True)
class Size:
    """All that a step's seconds depend on, of one device and precision."""

    model: str | None
    with_image: bool
    height: int
    width: int
    num_frames: int
    guidance_scale: float


@dataclass(frozen=True)
class _Call:
    """The transformer's calls at a size: which model, tokens, samples of a call, calls of a step."""

    model: str
    config: dict[str, Any]
    tokens: int
    batch: int
    calls: int


class Estimates:
    """Seconds by size. What is learnt is kept where `heterostep plan` finds it, too.

    Args:
        device, precision: of the runs.
    """

    def __init__(self, device: torch.device, precision: torch.dtype) -> None:
        self.device, self.precision = device, precision
        self._steps: dict[Size, float] = {}
        self._around: dict[Size, float] = {}
        self._lock = threading.Lock()

    def dense_step(self, size: Size) -> float | None:
        """Seconds of a dense step; None where nothing like it was timed."""
        with self._lock:
            if size in self._steps:
                return self._steps[size]
        try:
            timed = self._find(size)
        except (HeterostepError, OSError):
            # A checkpoint whose configuration is not at hand.
            return None
        return None if timed is None else timed[0].seconds(1.0) * timed[1]

    def around(self, size: Size) -> float | None:
        """Seconds of encoding and decoding, which are learnt anew in each session."""
        with self._lock:
            return self._around.get(size)

    def learn(self, size: Size, step_seconds: float, around: float) -> None:
        """A run of this size has been timed: seconds of a dense step, and of encoding and decoding."""
        with self._lock:
            self._steps[size] = step_seconds
            self._around[size] = around
        try:
            known = self._find(size)
            if known is not None and abs(known[0].seconds(1.0) * known[1] / step_seconds - 1) < NEWS:
                return
            call = _calls(size, self.precision)
            how = self._how(call) | {"sync": "hold", "store": "none"}
            points = ((1.0, step_seconds / call.calls),)
            name = timings.device_name(self.device)
            timings.keep(timings.Timed(name, timings.identity(call.model, call.config), call.tokens, points, how))
        except (HeterostepError, OSError) as error:
            # The next session can do without.
            _log.debug("seconds were not kept: %s", error)

    def _find(self, size: Size) -> tuple[timings.Timed, int] | None:
        """Timings, and calls of a step."""
        call = _calls(size, self.precision)
        found = timings.find(call.model, call.config, call.tokens, **self._how(call))
        if found is None or found.device != timings.device_name(self.device):
            return None
        return found, call.calls

    def _how(self, call: _Call) -> dict[str, Any]:
        how = {"dtype": name_of(self.precision), "batch": call.batch}
        return how | {"attention_backend": None, "compiled": False}


@functools.lru_cache(maxsize=64)
def _calls(size: Size, precision: torch.dtype) -> _Call:
    """From the configuration alone.

    Raises:
        HeterostepError: it is not at hand, or the size is refused.
    """
    found = configs.load(tiny.WEIGHTS if size.model is None else size.model)
    seen = dry_run(
        found,
        height=size.height,
        width=size.width,
        num_frames=size.num_frames,
        num_inference_steps=2,
        guidance_scale=size.guidance_scale,
        image_to_video=size.with_image,
        dtype=precision,
    )
    model: Any = seen.model
    name = type(model).__name__
    grid = FAMILIES[name].adapter.token_grid(model, seen.calls[0])
    batch = seen.calls[0]["hidden_states"].shape[0]
    return _Call(name, dict(model.config), grid.num_tokens, batch, len(seen.calls))
