"""One transformer's forward, step by step: which tokens run, what is kept, what is returned for the tokens that sleep.

The runner stands around the model's forward; what happens inside is the adapter's. Each call is one of four:

    plain    every token, nothing kept: exactly the model as it was
    dense    every token, K/V kept for the sparse steps that follow
    sparse   the active tokens only; the others' velocities are held
    empty    no token: the last output again

Holding a token's velocity over k steps is one Euler step over all of them: with one velocity, their sum telescopes.

Shapes: B batch, N tokens, n active tokens, C values a token.
"""

from __future__ import annotations

import functools
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from heterostep import allocation
from heterostep.adapters.base import Adapter, Call
from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError
from heterostep.reports import MemoryReport, Report, RuntimeReport, ShareReport, StepInfo, StepsReport
from heterostep.scoring import velocity_change
from heterostep.state import Branch, Generation
from heterostep.timing import StepClock, StepCost


class Runner:
    """Heterogeneous step allocation on one transformer.

    Args:
        model: the transformer.
        adapter: its family.
        scheduler: returns the pipeline's scheduler; asked at every call, for a user may replace it.
        config: the dial and options.
        on_step: called with a `StepInfo` after each denoising step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        adapter: Adapter,
        scheduler: Callable[[], Any],
        config: HSAConfig,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> None:
        self.model, self.adapter, self.scheduler, self.config, self.on_step = model, adapter, scheduler, config, on_step
        self.generation: Generation | None = None
        self._clock: StepClock | None = None
        self._sigmas: list[float] = []
        self._call = Call()
        self._branch: Branch | None = None
        self._keep_scores = False
        self._undo: list[Callable[[], Any]] = []
        self._inner: Callable = model.forward
        self._active = False

    def install(self) -> None:
        """Put the runner around the model's forward, inside accelerate's offload hook where there is one."""
        # Offload hooks come and go with every generation and put `_old_forward` back: what is inside them stays.
        name = "_old_forward" if "_old_forward" in self.model.__dict__ else "forward"
        self._inner = getattr(self.model, name)
        own = name in self.model.__dict__

        @functools.wraps(self._inner)
        def forward(*args, **kwargs):
            return self._forward(*args, **kwargs) if self._active else self._inner(*args, **kwargs)

        def restore() -> None:
            for place in ("forward", "_old_forward"):
                if self.model.__dict__.get(place) is forward:
                    if own or place == "_old_forward":
                        setattr(self.model, place, self._inner)
                    else:
                        delattr(self.model, place)

        setattr(self.model, name, forward)
        self._undo = [restore, *self.adapter.install(self.model, self._call, self._on_velocity)]
        self._active = True

    def uninstall(self) -> None:
        """Give the model back as it was, and its memory."""
        self._active = False
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        if self.generation is not None:
            for branch in self.generation.branches:
                branch.free_kv()

    def _forward(self, *args, **kwargs):
        inputs = self.adapter.bind(args, kwargs)
        scheduler = self.scheduler()
        if getattr(scheduler, "timesteps", None) is None:
            return self._inner(*args, **kwargs)
        generation = self._current(scheduler, inputs)
        step = self._step(scheduler, inputs)
        if step != generation.step:
            self._start_step(generation, step, inputs)
        branch = generation.branch(generation.calls)
        generation.calls += 1
        try:
            return self._run(generation, branch, inputs)
        finally:
            self._call.branch = self._call.index = self._branch = None

    def _run(self, generation: Generation, branch: Branch, inputs: dict[str, Any]):
        step, tokens = generation.step, generation.num_tokens
        # A branch that missed a step (guidance switched off for a while) has stale K/V: it starts again, dense.
        stale = branch.velocity is None or branch.last_step < step - 1
        index = None if stale else generation.index
        branch.last_step = step
        if generation.counts[step] == 0 and not stale:
            output = branch.output
        else:
            keep = step + 1 < generation.num_steps and generation.counts[step + 1] < tokens
            if branch.text is not inputs.get("encoder_hidden_states"):
                branch.cross_kv.clear()
                branch.text = inputs.get("encoder_hidden_states")
            self._branch, self._keep_scores = branch, keep
            self._call.index = index
            if index is not None or keep:
                self._call.branch = branch
            else:
                branch.free_kv()
            if index is not None:
                inputs = self.adapter.select(inputs, index)
            output = branch.output = self._inner(**inputs)
            generation.kv_bytes_peak = max(generation.kv_bytes_peak, sum(b.kv_bytes for b in generation.branches))
        if step == generation.num_steps - 1:
            branch.free_kv()
            if generation.calls >= len(generation.branches):
                self._finish(generation)
        return output

    def _on_velocity(self, rows: torch.Tensor) -> torch.Tensor:
        """The output projection's rows of the active tokens [B, n, C] -> everyone's velocities [B, N, C]."""
        branch, generation = self._branch, self.generation
        if branch is None or generation is None:
            return rows
        index = self._call.index
        if index is None:
            if self._keep_scores and branch.velocity is not None:
                branch.scores = velocity_change(rows, branch.velocity, generation.elapsed)
            branch.velocity = rows
        else:
            assert branch.velocity is not None
            held = branch.velocity.clone()
            held.scatter_(1, index[..., None].expand_as(rows), rows)
            branch.velocity = held
        return branch.velocity

    def _current(self, scheduler: Any, inputs: dict[str, Any]) -> Generation:
        """The generation under way, or a new one: schedulers make new timesteps for each, also after an exception."""
        grid = self.adapter.token_grid(self.model, inputs)
        batch = inputs["hidden_states"].shape[0]
        old = self.generation
        if old is not None and old.schedule is scheduler.timesteps and (old.grid, old.batch) == (grid, batch):
            return old
        if old is not None:
            for branch in old.branches:
                branch.free_kv()
        num_steps = len(scheduler.timesteps)
        self.config.check_feasible(num_steps)
        device = inputs["hidden_states"].device
        frames, height, width = grid
        tokens = frames * height * width
        self._sigmas = scheduler.sigmas.tolist()
        self._clock = StepClock(device)
        self.generation = Generation(
            schedule=scheduler.timesteps,
            num_steps=num_steps,
            grid=grid,
            batch=batch,
            window=self.config.window(num_steps),
            counts=self._plan(num_steps, tokens),
            evaluations=torch.zeros(batch, tokens, dtype=torch.int32),
            evaluated_at=torch.full((batch, tokens), self._sigmas[0], device=device),
            elapsed=torch.zeros(batch, tokens, device=device),
        )
        return self.generation

    def _plan(self, num_steps: int, tokens: int) -> list[int]:
        """Active tokens at each step, before anything has been timed."""
        share = self.config.share
        if isinstance(share, tuple):
            return [round(s * tokens) for s in share]
        start, stop = self.config.window(num_steps)
        budget = int(self.config.target * num_steps * tokens + 1e-6) - (num_steps - stop + start) * tokens
        window = allocation.allocate(budget, tokens, stop - start, self.config.divisors)
        return [tokens] * start + window + [tokens] * (num_steps - stop)

    def _step(self, scheduler: Any, inputs: dict[str, Any]) -> int:
        """The denoising step of this call. Schedulers count it themselves, but only from their first step on."""
        if scheduler.step_index is not None:
            return scheduler.step_index
        timesteps = scheduler.timesteps
        return int((timesteps.float() - inputs["timestep"].max().float().to(timesteps.device)).abs().argmin())

    def _start_step(self, generation: Generation, step: int, inputs: dict[str, Any]) -> None:
        assert self._clock is not None
        self._clock.mark()
        if generation.step >= 0:
            self._notify(generation)
        previous_was_dense = generation.index is None
        generation.step, generation.calls = step, 0
        tokens, (start, stop) = generation.num_tokens, generation.window
        if self.config.runtime is not None and start <= step < stop and generation.counts[step] == tokens:
            self._correct(generation)
        count = generation.counts[step]
        sigma = self._sigmas[step]
        generation.elapsed = generation.evaluated_at - sigma
        if count == tokens:
            generation.index = None
            generation.evaluations += 1
            generation.evaluated_at = torch.full_like(generation.evaluated_at, sigma)
            return
        if previous_was_dense:
            self._rank(generation, inputs)
        assert generation.ranking is not None
        generation.index = index = allocation.active_tokens(generation.ranking, count)
        if count:
            generation.evaluated_at = generation.evaluated_at.scatter(1, index, sigma)
            generation.evaluations.scatter_add_(1, index.cpu(), torch.ones(index.shape, dtype=torch.int32))

    def _rank(self, generation: Generation, inputs: dict[str, Any]) -> None:
        """Rank the tokens by the scores of the meeting step that has just ended, the same for all branches."""
        generation.meetings += 1
        if generation.ranking is not None and (generation.meetings - 1) % self.config.regroup_every:
            return
        if self.config.score == "random":
            generator = torch.Generator().manual_seed(generation.step)
            scores = torch.rand(generation.batch, generation.num_tokens, generator=generator)
            scores = scores.to(generation.evaluated_at.device)
        else:
            known = [branch.scores for branch in generation.branches if branch.scores is not None]
            scores = torch.stack(known).mean(0)
        clean = self.adapter.clean_tokens(inputs)
        if clean is not None:
            # A given frame needs no velocity: it comes last.
            scores = scores.masked_fill(clean, -1.0)
        generation.ranking = allocation.rank(scores)

    def _cost(self, generation: Generation) -> tuple[StepCost, list[float]] | None:
        """Step costs fitted to what has been timed, and those seconds; None before the first dense step has ended."""
        assert self._clock is not None
        durations = self._clock.durations()
        shares = [count / generation.num_tokens for count in generation.counts[: len(durations)]]
        if not any(share == 1 for share in shares):
            return None
        return StepCost(durations, shares), durations

    def _correct(self, generation: Generation) -> None:
        """At a meeting step: what is left of the promised seconds, in token evaluations over the rest of the window."""
        fitted = self._cost(generation)
        if fitted is None:
            return
        cost, durations = fitted
        step, (_, stop), tokens = generation.step, generation.window, generation.num_tokens
        promised = self.config.target * cost.dense_run(generation.num_steps)
        left = promised - sum(durations) - cost.dense * (generation.num_steps - stop)
        evaluations = allocation.evaluations_within(
            left, lambda count: cost.seconds(count / tokens), tokens, stop - step, self.config.divisors
        )
        generation.counts[step:stop] = allocation.allocate(evaluations, tokens, stop - step, self.config.divisors)

    def _notify(self, generation: Generation) -> None:
        if self.on_step is None:
            return
        fitted = self._cost(generation)
        elapsed, runtime = 0.0, None
        if fitted is not None:
            cost, durations = fitted
            elapsed = sum(durations)
            ahead = generation.counts[generation.step + 1 :]
            total = elapsed + sum(cost.seconds(count / generation.num_tokens) for count in ahead)
            runtime = total / cost.dense_run(generation.num_steps)
        self.on_step(
            StepInfo(
                step=generation.step,
                num_inference_steps=generation.num_steps,
                active_share=generation.counts[generation.step] / generation.num_tokens,
                elapsed_seconds=elapsed,
                projected_runtime=runtime,
                projected_share=sum(generation.counts) / generation.num_tokens / generation.num_steps,
            )
        )

    def _finish(self, generation: Generation) -> None:
        assert self._clock is not None
        self._clock.mark()
        self._notify(generation)
        generation.finished = True

    def report(self, pipeline: str) -> Report:
        """The last generation's account.

        Raises:
            HeterostepError: nothing has been generated yet.
        """
        generation = self.generation
        if generation is None or self._clock is None:
            raise HeterostepError("nothing to report yet: call the pipeline first")
        fitted = self._cost(generation)
        seconds, dense_seconds = 0.0, None
        if fitted is not None:
            cost, durations = fitted
            seconds = sum(durations)
            dense_seconds = cost.dense_run(generation.num_steps)
        tokens, steps = generation.num_tokens, generation.evaluations
        done = generation.counts[: generation.step + 1]
        config = self.config
        return Report(
            pipeline=pipeline,
            num_inference_steps=generation.num_steps,
            runtime=RuntimeReport(
                target=config.runtime,
                achieved=seconds / dense_seconds if dense_seconds and generation.finished else None,
                seconds=seconds,
                dense_seconds=dense_seconds,
            ),
            share=ShareReport(
                target=None if config.share is None else config.target,
                achieved=float(steps.float().mean()) / generation.num_steps,
            ),
            steps=StepsReport(mean=float(steps.float().mean()), min=int(steps.min()), max=int(steps.max())),
            active_share=[count / tokens for count in done],
            memory=MemoryReport(kv_cache_bytes=generation.kv_bytes_peak, peak_bytes=_peak_bytes(generation)),
            steps_maps=steps.view(generation.batch, *generation.grid).numpy().astype(np.int64),
            solver=config.solver,
            finished=generation.finished,
        )


def _peak_bytes(generation: Generation) -> int:
    device = generation.evaluated_at.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kibibytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
