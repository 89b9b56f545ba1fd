# SPDX-License-Identifier: GPL-3.0-or-later
"""One sampling in ComfyUI, as a run of heterostep's engine.

A *step* goes from one noise level of the schedule to the next. Its first prediction is the one that the plan is about:
it is evaluated or extrapolated. Samplers that ask more than once in a step (heun, dpmpp_sde, res_2s) get the same at
each: evaluated in a dense step, extrapolated in another, each at its own noise level.

ComfyUI may put several conditionings (positive, negative) into one call of the transformer, or not, as memory allows;
each has its own id, and velocities are kept by that id.

Where whole steps run alone, all tokens are alike: one stands for them, and its "velocity" is the transformer's whole
output. So nothing of a model's layout needs to be known. Single tokens are another matter: `tokens.py`.

Shapes: B samples, k conditionings in a call, b = B k, E values of a sample's output, N tokens, C values a token.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from heterostep.config import HSAConfig
from heterostep.engine import steps
from heterostep.engine.generation import Branch, Generation
from heterostep.engine.schedule import Schedule
from heterostep.engine.trajectory import Correction
from heterostep.engine.velocity import held, record
from heterostep.errors import HeterostepError
from heterostep.grid import TokenGrid
from heterostep.kernels import gather_rows
from heterostep.policy import Run as Known
from heterostep.policy import Tokens
from heterostep.sigmas import log_alpha

from .account import Account
from .tokens import WanTokens

# Noise levels are the schedule's up to rounding.
EXACT = 1e-6
WHOLE = TokenGrid(1, 1, 1)

_log = logging.getLogger("heterostep")


class Layout(Protocol):
    """How a transformer's output [b, ...] is cut into conditionings and tokens."""

    def rows(self, output: Any, parts: int) -> list[torch.Tensor]:
        """The velocities of each conditioning, [B, N, C]."""

    def output(self, rows: Sequence[torch.Tensor], like: Any) -> Any:
        """The output that has these velocities, in the shapes of `like`: those of one conditioning."""


class WholeOutput:
    """All values of a sample are one row. LTX-2's output is a list: video, sound."""

    def rows(self, output: Any, parts: int) -> list[torch.Tensor]:
        pieces = zip(*(tensor.chunk(parts) for tensor in _listed(output)))
        return [torch.cat([piece.flatten(1) for piece in each], 1)[:, None] for each in pieces]

    def output(self, rows: Sequence[torch.Tensor], like: Any) -> Any:
        shapes = _listed(like)
        cut = [each[:, 0].split([shape[1:].numel() for shape in shapes], 1) for each in rows]
        tensors = [torch.cat(pieces).unflatten(1, shape[1:]) for pieces, shape in zip(zip(*cut), shapes)]
        return tensors if isinstance(like, list) else tensors[0]


def _listed(output: Any) -> list[Any]:
    return list(output) if isinstance(output, list | tuple) and not isinstance(output, torch.Size) else [output]


def _shapes(output: Any) -> Any:
    """The shapes of an output, in a list where that is one."""
    shapes = [tensor.shape for tensor in _listed(output)]
    return shapes if isinstance(output, list | tuple) else shapes[0]


class Run:
    """The state of one sampling.

    Args:
        config: the options.
        sigmas: the sampler's noise levels, falling; one more than there are steps.
        model: ComfyUI's BaseModel.
        sampler: ComfyUI's sampler.
        latents: shapes of the latents, video first.
        mask: of the latents; where it is 0 they are given. None where all are made.
        from_frames: whether the video continues given frames.
        tell: called with a short line of text at each step.

    Raises:
        HeterostepError: the options do not go with the model or the noise levels.
    """

    def __init__(
        self,
        config: HSAConfig,
        *,
        sigmas: list[float],
        model: Any,
        sampler: Any,
        latents: Sequence[Sequence[int]],
        mask: torch.Tensor | None = None,
        from_frames: bool = False,
        tell: Callable[[str], Any] = lambda line: None,
    ) -> None:
        if any(later >= earlier for earlier, later in zip(sigmas, sigmas[1:])):
            raise HeterostepError("the noise levels must fall from step to step: take another scheduler or fewer steps")
        self.sampler, self._tell = _name_of(sampler), tell
        self.model_name = type(model).__name__
        self._layout: Layout = WholeOutput()
        self._tokens: WanTokens | None = None
        grid = WHOLE
        self._schedule = Schedule(config, Known(tuple(sigmas), Tokens(1), from_frames=from_frames))
        if self._schedule.sparse:
            self._layout = self._tokens = WanTokens(model, latents[0])
            grid = self._tokens.grid
            self._schedule = Schedule(config, Known(tuple(sigmas), Tokens(grid.num_tokens), from_frames=from_frames))
        self._schedule.check()
        self._grid, self._mask = grid, mask
        memoryless = self.sampler == "euler" and not getattr(sampler, "extra_options", {}).get("s_churn")
        self._correction = Correction.VELOCITY if memoryless else Correction.NONE
        self.generation: Generation | None = None
        self._branches: dict[tuple, Branch] = {}
        # Of the prediction under way.
        self._inside = self._first = False
        self._log_alpha = 0.0
        self._seen: Counter[tuple] = Counter()
        self._shown: torch.Tensor | None = None
        self.evaluated = self.extrapolated = 0  # calls of the transformer
        self.gave_up: str | None = None

    def predict(self, evaluate: Callable[[], torch.Tensor], x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """One guided prediction of the clean latents.

        Args:
            evaluate: makes it.
            x: the noisy latents, [B, ...].
            timestep: their noise level, [B].
        """
        sigma = float(timestep.flatten()[0])
        self._arrive(sigma, x)
        generation = self.generation
        if self.gave_up is not None or generation is None:
            return evaluate()
        self._log_alpha = float(log_alpha(torch.tensor(sigma, dtype=torch.float32, device="cpu")))
        self._inside, calls = True, self.evaluated + self.extrapolated
        self._seen.clear()
        try:
            denoised = evaluate()
        finally:
            self._inside = False
        if self.evaluated + self.extrapolated == calls:
            return self._give_up("the model does not pass ComfyUI's DIFFUSION_MODEL hook", denoised)
        if not self._first or generation.all_dense:
            return denoised
        velocity = (x - denoised) / sigma
        given = steps.end_step(generation, velocity, self._ignored(x)).velocity
        if given is velocity:
            return denoised
        # A preview is of what was predicted, before the gap's correction that the sampler is given with it.
        self._shown = denoised
        return x - sigma * given

    def _arrive(self, sigma: float, x: torch.Tensor) -> None:
        """Which step a prediction at this noise level belongs to, and whether it is its first."""
        if self.gave_up is not None:
            return
        sigmas = self._schedule.run.sigmas
        if self.generation is None:
            self.generation = steps.begin(
                self._schedule,
                timesteps=torch.tensor(sigmas),
                grid=self._grid,
                samples=x.shape[0],
                device=x.device,
                correction=self._correction,
                clean=None if self._tokens is None else self._tokens.clean(self._mask, x),
            )
        generation = self.generation
        before = generation.step
        step = sum(sigma <= each * (1 + EXACT) for each in sigmas[:-1]) - 1
        self._first, self._shown = step != before, None
        if not max(before, 0) <= step <= before + 1:
            self._give_up(f"the sampler {self.sampler} does not keep to the schedule's noise levels")
            return
        if not self._first:
            return
        if before >= 0:
            steps.stepped(generation)
        steps.start_step(generation, step)
        if self._tokens is None:
            # Of windows that have moved on, and of conditionings whose time is over, nothing is of use.
            self._branches = {key: each for key, each in self._branches.items() if each.last_step >= step - 1}
            generation.branches[:] = self._branches.values()
        count, total = generation.counts[step], generation.total
        what = "evaluated" if count == total else f"{count / total:.0%} of the tokens" if count else "extrapolated"
        self._tell(f"step {step + 1} of {len(sigmas) - 1}: {what}")

    def _give_up(self, why: str, result: Any = None) -> Any:
        """From here on all is evaluated."""
        self.gave_up = why
        _log.warning("%s, so every step is evaluated from here on", why)
        self._free()
        return result

    def call(self, executor: Any, args: tuple, kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
        """One call of the transformer.

        Args:
            executor: calls it.
            args, kwargs: what it is called with.
            options: its `transformer_options`, one of these.
        """
        generation = self.generation
        if not self._inside or generation is None:
            self.evaluated += 1
            return executor(*args, **kwargs)
        step = generation.step
        group = self._group(options, args[0])
        branches = [self._branch(key) for key in group]
        stale = [each.velocity is None or each.last_step < step - 1 for each in branches]
        for each in branches:
            each.last_step, each.batch = step, generation.samples
        try:
            if not any(stale) and not generation.is_dense and (generation.counts[step] == 0 or not self._first):
                self.extrapolated += 1
                return self._layout.output(
                    [held(generation, each, self._log_alpha) for each in branches], branches[0].output
                )
            output = self._evaluate(executor, args, kwargs, options, group, branches, stale)
            self.evaluated += 1
            if any(stale) and self._first:
                generation.note_begun_anew(generation.samples * len(branches))
            return output
        except BaseException:
            self._free()
            raise

    def _evaluate(
        self,
        executor: Any,
        args: tuple,
        kwargs: dict[str, Any],
        options: dict[str, Any],
        group: tuple,
        branches: list[Branch],
        stale: list[bool],
    ) -> Any:
        generation, tokens = self.generation, self._tokens
        assert generation is not None
        # Of a step's later predictions nothing is kept, and with a plan that skips nothing neither of the first.
        kept = self._first and not generation.all_dense
        active = None if any(stale) or not kept else generation.index
        if tokens is None or not kept:
            output = executor(*args, **kwargs)
        else:
            output = tokens.call(executor, args, kwargs, options, generation, group, branches, active)
        if not kept:
            return output
        rows = self._layout.rows(output, len(branches))
        for each, own, was_stale in zip(branches, rows, stale):
            own = own if active is None else gather_rows(own, active)
            record(generation, each, own, active, was_stale, generation.sparse_follows)
            each.output = _shapes(output)
        if active is None:
            return output
        return self._layout.output([held(generation, each) for each in branches], branches[0].output)

    def _group(self, options: dict[str, Any], x: Any) -> tuple:
        """The conditionings of a call, each by what tells it from all others of this step."""
        ids = options.get("uuids") or options.get("cond_or_uncond") or [0]
        window = options.get("context_window")
        # Where a window of the frames is evaluated at a time, and where the windows move from step to step.
        where = tuple(getattr(window, "index_list", None) or ())
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in _listed(x))
        keys = []
        for each in ids:
            # Guiders may call for the same conditioning again, with parts of the model switched off.
            keys.append((each, where, shapes, self._seen[each, where, shapes]))
            self._seen[each, where, shapes] += 1
        return tuple(keys)

    def _branch(self, key: tuple) -> Branch:
        if key not in self._branches:
            assert self.generation is not None
            self._branches[key] = branch = Branch()
            self.generation.branches.append(branch)
        return self._branches[key]

    def _ignored(self, x: torch.Tensor) -> torch.Tensor | None:
        """Which values are given, bool of the latents' shape; None where none are, or that cannot be told."""
        if self._mask is None:
            return None
        try:
            return (self._mask.to(x.device) == 0).expand(x.shape)
        except RuntimeError:
            return None

    def shows(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """ComfyUI's callback after each step, with what was predicted in place of what the sampler was given."""

        def shown(step: int, denoised: torch.Tensor, *more: Any, **named: Any) -> Any:
            with contextlib.nullcontext() if self.generation is None else self.generation.clock.paused():
                return callback(step, denoised if self._shown is None else self._shown, *more, **named)

        return shown

    def finish(self) -> None:
        """The sampler has made its last step."""
        generation = self.generation
        if generation is not None and self.gave_up is None and not generation.finished:
            steps.stepped(generation)

    def close(self) -> Account | None:
        """The sampling is over, as it should or not: nothing but the account is left. None where nothing was done."""
        self._free()
        self._shown = self._mask = None
        return None if self.generation is None else Account.of(self, self.generation)

    def _free(self) -> None:
        self._branches.clear()
        if self._tokens is not None:
            self._tokens.free()
        if self.generation is not None:
            self.generation.release()


def _name_of(sampler: Any) -> str:
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    return name.removeprefix("sample_").removesuffix("_function")
