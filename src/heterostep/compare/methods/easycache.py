"""EasyCache, by its published rule: skip the model while its output is expected to change little."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from heterostep.compare.methods.calls import (
    Calls,
    around,
    forward_rows,
    like,
    put,
    ratios,
    refuses_unknown,
    rows_of,
    samples_of,
)
from heterostep.compare.methods.method import Method

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
    return k * ratios(x.float() - previous_x.float(), v, samples)


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
            self.error += easycache_error(self.k, like(x, self.v), like(self.x, self.v), self.v, self.samples)
            if able:
                self.skip = self.error < value
        self.x = x.clone()

    def evaluated(self, x: torch.Tensor, new: torch.Tensor, rows: torch.Tensor, chosen: np.ndarray) -> None:
        """Take up the first branch's output [n, ...] of the chosen samples' rows; `x` is that of all rows."""
        batch, count = x.shape[0], int(chosen.sum())
        self.error[chosen] = 0.0
        if self.v is not None and self.evaluated_x is not None:
            changed = new.float() - self.v[rows].float()
            moved = like(x[rows], new).float() - like(self.evaluated_x[rows], new).float()
            # Until the rates are known everybody evaluates, so all are known at the same step.
            rates = np.zeros(self.samples) if self.k is None else self.k
            rates[chosen] = ratios(changed, moved, count)
            self.k = rates
        held = () if self.v is None or self.evaluated_x is None else (self.v, self.evaluated_x)
        self.v, self.evaluated_x = put(held, rows, (new.clone(), x[rows]), batch)


def _latents(inputs: dict[str, Any], outputs: int) -> tuple[torch.Tensor, ...]:
    """The noisy latents that the transformer's outputs belong to, with whatever conditions come with them."""
    names = ("hidden_states", "audio_hidden_states")
    return tuple(inputs[name] for name in names[:outputs])


@contextlib.contextmanager
def _easycache(pipe: Any, value: float, num_steps: int) -> Iterator[dict[str, Any]]:
    """EasyCache (arXiv 2507.02860), decided at a step's first call for all its branches, as its authors do."""
    calls, state = Calls(pipe), _EasyState(-1, 1)

    def instead(position: int, model: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        nonlocal state
        begins = calls.enter()
        inputs = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        if begins or position != state.position:
            # Another expert's outputs tell nothing of this one's.
            state = _EasyState(position, samples_of(pipe, model, inputs))
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
            held = tuple((like(each, added) + added).to(each.dtype) for each, added in pairs)
            if not chosen.any():
                return held
        rows = rows_of(chosen, batch, x.device)
        new = forward_rows(forward, args, kwargs, batch, rows)
        pairs = zip(_latents(inputs, len(new)), new)
        # In float32: between 16-bit latents and outputs the difference would lose the little that changes.
        added = tuple(each.float() - like(latents[rows], each) for latents, each in pairs)
        state.residuals[branch] = put(residuals, rows, added, batch)
        if branch == 0:
            state.evaluated(x, new[0], rows, chosen)
        return put(held, rows, new, batch)

    with around(pipe, instead):
        yield {}


EASYCACHE = Method(
    name="easycache",
    label="EasyCache",
    dial="threshold on the summed relative change of the output",
    # The authors' .05 for Wan 2.1 1.3B. The last skips all that its warm-up leaves.
    values=(0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 1.6),
    apply=_easycache,
    refuses=refuses_unknown,
)
