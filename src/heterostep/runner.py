"""The transformer's forward, step by step: which tokens run, what is kept, what is returned for the tokens that sleep.

The runner stands around the forward of the pipeline's transformer, or of both where it has two experts; what happens
inside is the adapter's. Each call is one of four:

    plain    every token, nothing kept: exactly the model as it was
    dense    every token, K/V kept for a sparse step that follows
    sparse   the active tokens only; the others' velocities are held
    empty    no token: all velocities are held

Holding a token's velocity over k steps is one Euler step over all of them: with one velocity, their sum telescopes. By
default held velocities go on along two thirds of their slope between the token's last two evaluations, over
log(1 - sigma), which measured best.

Shapes: B samples, b batch of a call, N tokens, n active tokens, C values a token.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from heterostep import allocation, memory
from heterostep.adapters.base import Adapter, Call, Seams
from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError
from heterostep.kernels import gather_rows
from heterostep.kv_cache import KVCache, StaticKV
from heterostep.placement import DoesNotFit, place
from heterostep.replay import MOST_ROWS, ReplayedCalls
from heterostep.reports import MemoryReport, Report, RuntimeReport, ShareReport, StepInfo, StepsReport
from heterostep.schedule import Schedule
from heterostep.scoring import drift_time, velocity_change, velocity_slope
from heterostep.state import Branch, Generation
from heterostep.timing import StepClock, StepCost
from heterostep.wrapping import WrappedForward

_log = logging.getLogger("heterostep")

# Each guidance branch's plain, dense and sparse calls are graphs of their own; torch gives up after 8 of a function.
RECOMPILE_LIMIT = 64


@dataclass
class _Expert:
    """One transformer of the pipeline, and what was changed on it."""

    model: torch.nn.Module
    wrapped: WrappedForward
    signature: inspect.Signature
    seams: Seams

    def check(self) -> None:
        """Whether the processors are those that were set.

        Raises:
            HeterostepError: somebody has set others since, so active tokens would attend to each other alone.
        """
        if any(attn.processor is not processor for attn, processor in self.seams.attentions):
            raise HeterostepError("the attention processors were replaced: call heterostep.enable again")


class Runner:
    """Heterogeneous step allocation on a pipeline's transformer, or on its two experts.

    Args:
        pipeline: returns the pipeline; asked at every call, for a user may replace its scheduler.
        models: its transformers, in the order in which they take over.
        adapter: their family.
        config: the dial and options.
        check: called before each generation; raises where the pipeline is not what it was.
        on_step: called with a `StepInfo` after each denoising step.
    """

    # The runners that need more graphs than torch allows, and what it allowed before the first of them.
    _compiled: ClassVar[set[int]] = set()
    _recompile_limit: ClassVar[int] = 0

    def __init__(
        self,
        pipeline: Callable[[], Any],
        models: Sequence[torch.nn.Module],
        adapter: Adapter,
        config: HSAConfig,
        check: Callable[[], None],
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> None:
        self.pipeline, self.adapter, self.config, self.check = pipeline, adapter, config, check
        self.on_step = on_step
        self.generation: Generation | None = None
        self._clock: StepClock | None = None
        self._sigmas: list[float] = []
        self._times: list[float] = []  # their `drift_time`
        self._call = Call()
        self._branch: Branch | None = None
        self._active: torch.Tensor | None = None  # tokens whose velocities are to be taken; None where all are
        self._keep_scores = False
        self._stale = False
        self._taken: list[torch.Tensor] | None = None  # where velocities go in place of the branch
        self._experts = [self._wrap(position, model) for position, model in enumerate(models)]

    def _wrap(self, position: int, model: torch.nn.Module) -> _Expert:
        seams = self.adapter.install(model, self._call, self._on_velocity)
        wrapped = WrappedForward(model, lambda *args, **kwargs: self._forward(position, args, kwargs))
        return _Expert(model, wrapped, inspect.signature(type(model).forward), seams)

    def uninstall(self) -> None:
        """Give the models back as they were, and the memory. The report stays."""
        for expert in self._experts:
            for undo in reversed(expert.seams.undo):
                undo()
            expert.wrapped.restore()
        self._experts = []
        if id(self) in self._compiled:
            self._compiled.remove(id(self))
            if not self._compiled:
                torch._dynamo.config.recompile_limit = self._recompile_limit
        if self.generation is not None:
            self.generation.branches.clear()

    def _forward(self, position: int, args: tuple, kwargs: dict[str, Any]):
        expert = self._experts[position]
        pipe = self.pipeline()
        # Pipelines tell their loop's timestep. Without one this is another's call, of a pipeline that shares the model.
        if getattr(pipe, "_current_timestep", None) is None:
            return expert.wrapped.inner(*args, **kwargs)
        inputs = dict(expert.signature.bind(expert.model, *args, **kwargs).arguments)
        inputs.pop("self")
        generation = self._current(expert, pipe, inputs)
        step = self._scheduler_step(pipe) - generation.first
        if step != generation.step:
            self._start_step(generation, step)
        branch = generation.branch(generation.calls)
        generation.calls += 1
        if generation.expert != position:
            # Another model's K/V are of no use to this one.
            generation.drop_stores()
            generation.expert = position
        if branch.expert != position:
            branch.expert, branch.last_step = position, -1
        try:
            return self._run(expert, generation, branch, inputs)
        except BaseException:
            generation.free_kv()
            raise
        finally:
            self._call.index = self._branch = self._active = self._taken = None
            for _, processor in expert.seams.attentions:
                processor.kv = None

    def _run(self, expert: _Expert, generation: Generation, branch: Branch, inputs: dict[str, Any]):
        step, total, count = generation.step, generation.schedule.tokens.total, generation.counts[generation.step]
        # A branch that missed a step (guidance switched off for a while) has stale K/V: it starts again, dense.
        self._stale = branch.last_step < 0 or branch.last_step < step - 1
        branch.last_step, branch.batch = step, inputs["hidden_states"].shape[0]
        if count == 0 and not self._stale:
            output = self._held_output(expert, generation, branch)
        else:
            if self.config.score == "oracle" and generation.calls == 1 and 0 < count < total and not self._stale:
                self._rank_by_truth(expert, generation, branch, inputs)
            active = None if self._stale else self._rows(generation.index, generation, inputs)
            # Without K/V (they went with a store that failed) everyone runs, and the active tokens count.
            index = active if self.config.sync != "fresh" and branch.stores else None
            keep = self.config.sync != "fresh" and generation.wants_kv(self.config.sync == "drift")
            if self._stale:
                branch.free_kv()
            branch.follow_text(inputs.get("encoder_hidden_states"))
            self._branch, self._active = branch, active
            # With a runtime the plan may yet come to have single tokens.
            some = self.config.runtime is not None or any(0 < n < total for n in generation.counts[step + 1 :])
            self._keep_scores = some and (generation.is_meeting or self.config.rotation is not None)
            try:
                output = self._call_model(expert, generation, branch, inputs, index, keep)
            except torch.OutOfMemoryError:
                if generation.fell_back or generation.stores is None or memory.smaller(generation.stores) is None:
                    raise
                output = None
            if output is None:
                # Out of the handler, so that nothing of the failed call is kept alive by its error.
                self._fall_back(generation)
                output = self._call_model(expert, generation, branch, inputs, None, keep)
            branch.output = output
            if step < 2 and generation.calls == 1:
                self._prepare(expert, generation, inputs)
            generation.note_kv()
            if not keep:
                branch.free_kv()
                if not any(each.kv_bytes or each.kv_host_bytes for each in generation.branches):
                    generation.workspace.reset()
        if step == generation.schedule.num_steps - 1:
            self._finish(generation)
        return output

    def _prepare(self, expert: _Expert, generation: Generation, inputs: dict[str, Any]) -> None:
        """Do what the first step that keeps K and V would wait for while the GPU has other calls to make."""
        total, ahead = generation.schedule.tokens.total, generation.counts[generation.step + 1 :]
        some = self.config.runtime is not None or any(0 < count < total for count in ahead)
        if self.config.sync == "fresh" or not some:
            return
        if generation.step == 0:
            # Layers are alike.
            kinds = {
                (type(processor), getattr(attn, "inner_dim", 0)): (attn, processor)
                for attn, processor in expert.seams.attentions
            }
            _in_background(lambda: _compile_kernels(kinds.values(), inputs["hidden_states"]))
        elif generation.stores is None:
            # By now all guidance branches are known.
            self._place(expert, generation, inputs)

    def _call_model(
        self,
        expert: _Expert,
        generation: Generation,
        branch: Branch,
        inputs: dict[str, Any],
        index: torch.Tensor | None,
        keep: bool,
    ) -> Any:
        """The model's forward, of the tokens of `index` or of all; with K/V kept or read, or neither."""
        if keep and not branch.stores:
            branch.stores = self._make_stores(expert, generation, branch, inputs)
            # The choice may be to keep nothing, and to let no token run alone.
            keep = bool(branch.stores)
        self._call.index, self._call.num_tokens = index, generation.schedule.tokens.total
        if index is not None or keep:
            if index is None:
                # A dense call decodes nothing, or little, and needs the room.
                generation.workspace.reset()
                self._reserve(branch, inputs["hidden_states"].device)
            generation.workspace.begin()
            generation.workspace.write_back = keep
            if self.config.sync == "drift":
                ahead = self._asleep(generation) / generation.stride.clamp_min(1e-6)
                generation.workspace.ahead = self._rows(ahead, generation, inputs)
            for (_, processor), store in zip(expert.seams.attentions, branch.stores, strict=True):
                processor.kv = store
        else:
            branch.free_kv()
        if index is None:
            return expert.wrapped.inner(**inputs)
        inputs = self.adapter.select(expert.model, inputs, index)
        few = index.numel() <= MOST_ROWS
        if few and self.config.cuda_graphs and generation.stores is not None and generation.stores.all_on_device:
            return self._replayed(expert, generation, branch, inputs, index)
        return expert.wrapped.inner(**inputs)

    def _replayed(
        self, expert: _Expert, generation: Generation, branch: Branch, inputs: dict[str, Any], index: torch.Tensor
    ) -> Any:
        """A sparse call, recorded where it can be. What is made of its velocities is not part of the recording."""
        workspace = generation.workspace

        def call(given: dict[str, Any]) -> tuple[torch.Tensor, Any]:
            self._call.index, workspace.ahead = given["index"], given["ahead"]
            rows: list[torch.Tensor] = []
            self._taken = rows
            try:
                output = expert.wrapped.inner(**given["inputs"])
            finally:
                self._taken = None
            return rows[0], output

        if branch.replays is None:
            branch.replays = ReplayedCalls(
                expert.model, expert.seams.hooked, index.device, lambda: generation.graph_pool
            )
        rows, output = branch.replays(
            call,
            {"inputs": inputs, "index": index, "ahead": workspace.ahead},
            [t for kept in (*branch.stores, workspace) for t in kept.tensors or ()],
        )
        velocities = self._on_velocity(rows)
        assert velocities is not None
        return self._with_velocities(expert, generation, output, velocities)

    @staticmethod
    def _reserve(branch: Branch, device: torch.device) -> None:
        """Allocate K and V in one go, in segments of their own: the forecast is of bytes, not of what lies between."""
        empty = [store for store in branch.stores if isinstance(store, KVCache) and store.reserves]
        if empty and device.type == "cuda":
            torch.cuda.empty_cache()
        for store in empty:
            store.reserve(device)

    def _make_stores(
        self, expert: _Expert, generation: Generation, branch: Branch, inputs: dict[str, Any]
    ) -> list[KVCache | StaticKV]:
        """Empty stores for one branch, of the kinds that fit; none where nothing does and nothing has to."""
        processors = [processor for _, processor in expert.seams.attentions]
        kinds = [processor.store is KVCache for processor in processors]
        if generation.stores is None:
            self._place(expert, generation, inputs)
            if generation.stores is None:
                return []
        generation.kv_store = str(generation.stores)
        names, size = generation.stores.names, sum(kinds)
        first = min(generation.branches.index(branch) * size, len(names) - size)
        mine = iter(names[first : first + size])
        stores = [
            p.make_store(next(mine) if tokens else "", generation.workspace) for p, tokens in zip(processors, kinds)
        ]
        for store, shape in zip((s for s in stores if isinstance(s, KVCache)), generation.stores.layers[first:]):
            store.expected = shape
        return stores

    def _place(self, expert: _Expert, generation: Generation, inputs: dict[str, Any]) -> None:
        """Choose the stores; where none fits, and whole steps are all that was asked for, let no token run alone."""
        total = generation.schedule.tokens.total
        # With a runtime, counts may yet come near to all.
        share = max(count for count in generation.counts if count < total) / total if self.config.runtime is None else 1
        attentions = sum(processor.store is KVCache for _, processor in expert.seams.attentions)
        batches = [branch.batch for branch in generation.branches]
        try:
            generation.stores = place(self.config, expert.model, inputs, batches, share, attentions)
        except DoesNotFit as error:
            config = self.config
            if config.between or config.divisors or config.rotation or self.adapter.least_active:
                advice = "make a smaller or shorter video, offload other models, or give between=None alone"
                raise HeterostepError(f"{error}: {advice}") from error
            # What whole steps leave of the budget is less than one of them, and can be left unspent.
            _log.warning("%s; whole steps alone are evaluated, as with between=None", error)
            generation.counts = [count if count == total else 0 for count in generation.counts]
            generation.schedule = replace(generation.schedule, config=replace(self.config, between=None))

    def _fall_back(self, generation: Generation) -> None:
        """Memory ran out: smaller stores from now on, for all branches. What was kept is gone."""
        assert generation.stores is not None
        before, after = generation.stores, memory.smaller(generation.stores)
        generation.drop_stores()
        generation.stores, generation.kv_store, generation.fell_back = after, str(after), True
        _log.warning("out of memory with K and V in the store %s: going on with %s", before, after)
        if generation.evaluated_at.is_cuda:
            torch.cuda.empty_cache()

    def _held_output(self, expert: _Expert, generation: Generation, branch: Branch) -> Any:
        """The transformer's last output, with the velocities that the tokens are held at."""
        if branch.slope is None or self.config.extrapolate == 0:
            return branch.output
        return self._with_velocities(expert, generation, branch.output, self._held(generation, branch))

    def _with_velocities(self, expert: _Expert, generation: Generation, output: Any, velocities: torch.Tensor) -> Any:
        """The transformer's output with the velocities of all tokens [b, N, C] in place of its own."""
        sample = self.adapter.arrange(expert.model, generation.grid, velocities)
        return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(**{**output, "sample": sample})

    def _held(self, generation: Generation, branch: Branch) -> torch.Tensor:
        """Everyone's velocities at this step [b, N, C]: of the tokens evaluated at it, and held ones."""
        velocity = branch.velocity
        assert velocity is not None
        if branch.slope is None or self.config.extrapolate == 0:
            return velocity
        asleep = self._asleep(generation).repeat(velocity.shape[0] // generation.samples, 1)[..., None]
        return (velocity.float() + self.config.extrapolate * asleep * branch.slope).to(velocity.dtype)

    @staticmethod
    def _rows(x: torch.Tensor | None, generation: Generation, inputs: dict[str, Any]) -> torch.Tensor | None:
        """What is one row a sample [B, ...], for a call [b, ...] that has several guidance branches in its batch."""
        copies = inputs["hidden_states"].shape[0] // generation.samples
        return x if x is None or copies == 1 else x.repeat(copies, 1)

    def _on_velocity(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The output projection's rows of the active tokens [b, n, C] -> everyone's velocities [b, N, C]."""
        if self._taken is not None:
            self._taken.append(rows)
            # What the model does with all tokens' values, it may do with these.
            everyone = (rows.shape[0], self._call.num_tokens, rows.shape[2])
            return None if self._call.index is None else rows.new_zeros(everyone)
        branch, generation = self._branch, self.generation
        if branch is None or generation is None:
            return None
        active, old = self._active, branch.velocity
        if active is not None and self._call.index is None:
            rows = gather_rows(rows, active)
        if old is None or self._stale:
            # Of a change over missed steps, or from another model's velocity, nothing follows.
            branch.velocity, branch.slope = rows, None
            return rows
        copies = rows.shape[0] // generation.samples
        elapsed, stride = generation.elapsed.repeat(copies, 1), generation.stride.repeat(copies, 1)
        if active is None:
            branch.velocity = rows
            if self._keep_scores:
                branch.scores = velocity_change(rows, old, elapsed)
            if self.config.extrapolate and generation.skips_follow:
                branch.slope = velocity_slope(rows, old, stride)
            return rows
        where = active[..., None].expand_as(rows)
        branch.velocity, before = old.scatter(1, where, rows), old.gather(1, where)
        if self.config.extrapolate:
            slope = torch.zeros_like(old, dtype=torch.float32) if branch.slope is None else branch.slope
            branch.slope = slope.scatter(1, where, velocity_slope(rows, before, stride.gather(1, active)))
        if self._keep_scores and branch.scores is not None:
            change = velocity_change(rows, before, elapsed.gather(1, active))
            branch.scores = branch.scores.scatter(1, active, change)
        return self._held(generation, branch)

    def _current(self, expert: _Expert, pipe: Any, inputs: dict[str, Any]) -> Generation:
        """The generation under way, or a new one: schedulers make new timesteps for each, also after an exception."""
        grid = self.adapter.token_grid(expert.model, inputs)
        batch, device = inputs["hidden_states"].shape[0], inputs["hidden_states"].device
        old, scheduler = self.generation, pipe.scheduler
        if old is not None:
            if old.timesteps is scheduler.timesteps and old.grid == grid and batch % old.samples == 0:
                return old
            old.free_kv()
        self.check()
        for each in self._experts:
            each.check()
            self._allow_recompiles(each.model)
        samples = batch // self.adapter.guidance_copies(pipe)
        first = self._scheduler_step(pipe)
        num_steps = len(scheduler.timesteps) - first
        switch = self.adapter.expert_switch(pipe)
        restarts = () if switch is None or not first < switch < first + num_steps else (switch - first,)
        clean = self.adapter.clean_tokens(inputs)
        if clean is not None:
            clean = clean[:samples]
        tokens = allocation.Tokens(grid.num_tokens, self.adapter.least_active)
        schedule = Schedule(self.config, num_steps, tokens, restarts)
        schedule.check()
        sigmas = scheduler.sigmas[first:]
        self._sigmas, self._times = sigmas.tolist(), drift_time(sigmas).tolist()
        self._clock = StepClock(device)
        self.generation = Generation(
            timesteps=scheduler.timesteps,
            first=first,
            grid=grid,
            samples=samples,
            schedule=schedule,
            counts=schedule.plan(),
            clean=clean,
            evaluations=torch.zeros(samples, tokens.total, dtype=torch.int32, device=device),
            evaluated_at=torch.full((samples, tokens.total), self._sigmas[0], device=device),
            elapsed=torch.zeros(samples, tokens.total, device=device),
            stride=torch.ones(samples, tokens.total, device=device),
        )
        return self.generation

    def _allow_recompiles(self, model: torch.nn.Module) -> None:
        if any(module._compiled_call_impl is not None for module in model.modules()):
            dynamo = torch._dynamo.config
            if not self._compiled:
                Runner._recompile_limit = dynamo.recompile_limit
                dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
            self._compiled.add(id(self))

    @staticmethod
    def _scheduler_step(pipe: Any) -> int:
        """The scheduler's step of this call. Schedulers count it themselves, but only from their first step on."""
        if pipe.scheduler.step_index is not None:
            return pipe.scheduler.step_index
        return int((pipe.scheduler.timesteps - pipe._current_timestep).abs().argmin())

    def _start_step(self, generation: Generation, step: int) -> None:
        assert self._clock is not None
        self._clock.mark()
        if generation.step >= 0:
            self._notify(generation)
        generation.step, generation.calls_before, generation.calls = step, generation.calls, 0
        start, stop = generation.schedule.window
        rotation = self.config.rotation
        turn = generation.is_meeting if rotation is None else (step - start) % rotation == 0
        if self.config.runtime is not None and start <= step < stop and turn:
            self._correct(generation)
        count, sigma = generation.counts[step], self._sigmas[step]
        generation.elapsed = generation.evaluated_at - sigma
        generation.index = None
        if generation.is_meeting:
            generation.evaluations += 1
            if step:
                generation.stride = self._asleep(generation)
            generation.evaluated_at = torch.full_like(generation.evaluated_at, sigma)
            # Between two experts a velocity's change tells them apart rather than the tokens.
            generation.unranked = generation.ranking is None or step not in generation.schedule.restarts
        elif count and self.config.score != "oracle":
            if rotation is not None:
                self._set_ranking(generation, self._scores(generation) * generation.elapsed)
            elif generation.unranked:
                self._rank(generation)
            self._activate(generation)

    def _activate(self, generation: Generation) -> None:
        """The tokens ranked first are this step's active ones."""
        assert generation.ranking is not None
        generation.index = index = allocation.active_tokens(generation.ranking, generation.counts[generation.step])
        sigma = self._sigmas[generation.step]
        generation.stride = generation.stride.scatter(1, index, self._asleep(generation).gather(1, index))
        generation.evaluated_at = generation.evaluated_at.scatter(1, index, sigma)
        generation.evaluations.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))

    def _asleep(self, generation: Generation) -> torch.Tensor:
        """`drift_time` since each token's last evaluation, [B, N]."""
        return self._times[generation.step] - drift_time(generation.evaluated_at)

    def _rank(self, generation: Generation) -> None:
        """Rank the tokens by the scores of the last meeting step, the same for all branches."""
        generation.unranked = False
        generation.meetings += 1
        if generation.ranking is not None and (generation.meetings - 1) % self.config.regroup_every:
            return
        self._set_ranking(generation, self._scores(generation))

    def _scores(self, generation: Generation) -> torch.Tensor:
        """How urgent each token is [B, N], from what all branches know of it."""
        scores = torch.zeros_like(generation.elapsed)
        known = [branch.scores for branch in generation.branches if branch.scores is not None]
        if self.config.score == "random":
            generator = torch.Generator().manual_seed(generation.step)
            scores = torch.rand(scores.shape, generator=generator).to(scores.device)
        elif known:
            scores = torch.cat([scores.view(-1, *generation.elapsed.shape) for scores in known]).mean(0)
        return scores

    def _rank_by_truth(self, expert: _Expert, generation: Generation, branch: Branch, inputs: dict[str, Any]) -> None:
        """Rank the tokens by how wrong their held velocities are, which costs a dense call. Decided by one branch."""
        self._taken = []
        expert.wrapped.inner(**inputs)
        (rows,), self._taken = self._taken, None
        error = (rows.float() - self._held(generation, branch).float()).abs().sum(-1)
        self._set_ranking(generation, error.view(-1, *generation.elapsed.shape).mean(0))
        self._activate(generation)

    def _set_ranking(self, generation: Generation, scores: torch.Tensor) -> None:
        if generation.clean is not None:
            # What is given needs no velocity, so it comes last; it runs at the meetings, for its K/V change with the
            # other tokens'.
            scores = scores.masked_fill(generation.clean, -1.0)
        if self.config.rotation is not None:
            turn = (generation.step - generation.schedule.window[0]) % self.config.rotation
            scores = allocation.with_probes(scores, turn, self.config.rotation)
        generation.ranking = allocation.rank(scores)

    def _cost(self, generation: Generation) -> tuple[StepCost, list[float]] | None:
        """Step costs fitted to what has been timed, and those seconds; None before the first dense step has ended."""
        assert self._clock is not None
        durations = self._clock.durations()
        shares = [count / generation.schedule.tokens.total for count in generation.counts[: len(durations)]]
        if not any(share == 1 for share in shares):
            return None
        return StepCost(durations, shares), durations

    def _correct(self, generation: Generation) -> None:
        """At a meeting step: what is left of the promised seconds, in token evaluations over the rest of the window."""
        fitted = self._cost(generation)
        if fitted is None:
            return
        cost, durations = fitted
        schedule = generation.schedule
        promised = self.config.target * cost.dense_run(schedule.num_steps)
        left = promised - sum(durations) - cost.dense * (schedule.num_steps - schedule.window[1])
        generation.counts = schedule.corrected(
            generation.counts, generation.step, left, lambda count: cost.seconds(count / schedule.tokens.total)
        )

    def _notify(self, generation: Generation) -> None:
        if self.on_step is None:
            return
        fitted = self._cost(generation)
        total, num_steps = generation.schedule.tokens.total, generation.schedule.num_steps
        elapsed, runtime = 0.0, None
        if fitted is not None:
            cost, durations = fitted
            elapsed = sum(durations)
            ahead = generation.counts[generation.step + 1 :]
            seconds = elapsed + sum(cost.seconds(count / total) for count in ahead)
            runtime = seconds / cost.dense_run(num_steps)
        self.on_step(
            StepInfo(
                step=generation.step,
                num_inference_steps=num_steps,
                active_share=generation.counts[generation.step] / total,
                elapsed_seconds=elapsed,
                projected_runtime=runtime,
                projected_share=sum(generation.counts) / total / num_steps,
            )
        )

    def _finish(self, generation: Generation) -> None:
        """After each call of the last step: nobody says which of them is the last."""
        assert self._clock is not None
        self._clock.mark(again=generation.finished)
        generation.finished = True
        if generation.calls >= generation.calls_before:
            self._close(generation)

    def _close(self, generation: Generation) -> None:
        generation.free_kv()
        if not generation.closed:
            generation.closed = True
            self._notify(generation)

    def report(self, pipeline: str) -> Report:
        """The last generation's account.

        Raises:
            HeterostepError: nothing has been generated yet.
        """
        generation = self.generation
        if generation is None or self._clock is None:
            raise HeterostepError(
                "nothing to report yet: call the pipeline first (after replacing its transformer, enable again)"
            )
        if generation.finished:
            self._close(generation)
        num_steps, total = generation.schedule.num_steps, generation.schedule.tokens.total
        fitted = self._cost(generation)
        seconds, dense_seconds = 0.0, None
        if fitted is not None:
            cost, durations = fitted
            seconds = sum(durations)
            dense_seconds = cost.dense_run(num_steps)
        steps = generation.evaluations.cpu()
        done = generation.counts[: generation.step + 1]
        config, grid = self.config, generation.grid.shape
        return Report(
            pipeline=pipeline,
            num_inference_steps=num_steps,
            runtime=RuntimeReport(
                target=config.runtime,
                achieved=seconds / dense_seconds if dense_seconds and generation.finished else None,
                seconds=seconds,
                dense_seconds=dense_seconds,
            ),
            share=ShareReport(
                target=None if config.share is None else config.target,
                achieved=float(steps.float().mean()) / num_steps,
            ),
            steps=StepsReport(mean=float(steps.float().mean()), min=int(steps.min()), max=int(steps.max())),
            active_share=[count / total for count in done],
            memory=MemoryReport(
                kv_cache_bytes=generation.kv_bytes_peak,
                peak_bytes=_peak_bytes(generation),
                kv_host_bytes=generation.kv_host_bytes_peak,
                kv_store=generation.kv_store,
                fell_back=generation.fell_back,
            ),
            steps_maps=steps[:, : math.prod(grid)].view(-1, *grid).numpy().astype(np.int64),
            solver=config.solver,
            finished=generation.finished,
        )


def _compile_kernels(attentions: Iterable[tuple[Any, Any]], hidden_states: torch.Tensor) -> None:
    for attn, processor in attentions:
        processor.prepare(attn, hidden_states)


def _in_background(work: Callable[[], Any]) -> None:
    """Run `work` beside the caller; where it fails, whoever needs it tries again and gets the error."""

    def run() -> None:
        # Each thread records gradients unless told otherwise.
        with contextlib.suppress(Exception), torch.no_grad():
            work()

    threading.Thread(target=run, daemon=True).start()


def _peak_bytes(generation: Generation) -> int:
    device = generation.evaluated_at.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kibibytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
