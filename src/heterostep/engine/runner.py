"""The transformer's forward, step by step: which tokens run, what is kept, what is returned for the tokens that sleep.

The runner stands around the forward of the pipeline's transformer, or of both where it has two experts, and around the
scheduler's step, which is given the guided velocity; what happens inside the model is the adapter's. Only calls from
inside the pipeline's own `__call__`, in its thread, are the runner's: others pass through. Each is one of four:

    plain    every token, nothing kept: exactly the model as it was
    dense    every token, K/V kept for a sparse step that follows
    sparse   the active tokens only; the others' velocities are extrapolated
    empty    no token: all velocities are extrapolated

How many tokens a step evaluates, which, and how far the others' velocities follow their last change over log(1 - sigma)
is the policy's (`heterostep.policy`). Holding a velocity over k steps is one Euler step over all of them.

Shapes: B samples, b batch of a call, N tokens, n active tokens, C values a token.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import psutil
import torch

from heterostep import compat
from heterostep.config import HSAConfig
from heterostep.engine import forecast
from heterostep.engine.clock import StepClock, StepCost
from heterostep.engine.cuda_graphs import MOST_ROWS, ReplayedCalls
from heterostep.engine.generation import Branch, Generation
from heterostep.engine.report import MemoryReport, Report, RuntimeReport, ShareReport, StepInfo, StepsReport
from heterostep.engine.schedule import TOLERANCE, Schedule
from heterostep.engine.stores import DoesNotFit, place
from heterostep.engine.trajectory import Trajectory
from heterostep.engine.velocity import drift_time, velocity_change, velocity_slope
from heterostep.engine.wrapping import WrappedForward
from heterostep.errors import HeterostepError
from heterostep.kernels import gather_rows
from heterostep.kv.cache import KVCache, StaticKV
from heterostep.models.base import Adapter, Call, Seams
from heterostep.policy import Change, Run, Tokens, allocation

_log = logging.getLogger("heterostep")

# Each guidance branch's plain, dense and sparse calls are graphs of their own; torch gives up after 8 of a function.
RECOMPILE_LIMIT = 64


class _Expert:
    """One transformer of the pipeline, and what was changed on it.

    Args:
        model: the transformer.
        answer: called in place of its forward.
        install: sets hooks and processors on it.
    """

    def __init__(self, model: torch.nn.Module, answer: Callable[..., Any], install: Callable[[Any], Seams]) -> None:
        self.model, self._install = model, install
        self.seams = install(model)
        self.wrapped = WrappedForward(model, answer)
        self.signature = inspect.signature(type(model).forward)
        self._note_places()

    def _note_places(self) -> None:
        self._names = {name: module for name, module in self.model.named_modules() if module in self.seams.touched}
        self.adapters = compat.adapter_layers(self.model)

    def follow(self) -> None:
        """Set hooks and processors anew where modules were replaced since: by a LoRA, by quantisation.

        Raises:
            HeterostepError: somebody has set other attention processors, so active tokens would attend to each other
                alone.
        """
        modules = dict(self.model.named_modules())
        if any(modules.get(name) is not module for name, module in self._names.items()):
            self.undo()
            self.seams = self._install(self.model)
        elif any(attn.processor is not processor for attn, processor in self.seams.attentions):
            raise HeterostepError("the attention processors were replaced: call heterostep.enable again")
        self._note_places()

    @property
    def foreign(self) -> str | None:
        """The name of an attention processor that is not diffusers' own; None where there is none."""
        names = (type(p.original).__name__ for _, p in self.seams.attentions if not compat.is_own_processor(p.original))
        return next(names, None)

    def undo(self) -> None:
        """Take hooks and processors back."""
        for undo in reversed(self.seams.undo):
            undo()


class Runner:
    """Heterogeneous step allocation on a pipeline's transformer, or on its two experts.

    Args:
        pipeline: returns the pipeline; asked at every call, for a user may replace its scheduler.
        models: its transformers, in the order in which they take over.
        adapter: their family.
        config: the dial and options.
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
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> None:
        self.pipeline, self.adapter, self.config = pipeline, adapter, config
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
        # Pipelines in other threads may share the transformer: one call at a time, for hooks see the call under way.
        self._lock = threading.RLock()
        self._thread: int | None = None  # whose pipeline call is under way
        self._memoryless = False
        self._compiling: threading.Thread | None = None
        self._experts = [self._wrap(position, model) for position, model in enumerate(models)]

    def begin(self, memoryless: bool) -> None:
        """The pipeline is being called: what the transformers are asked for in this thread is its generation.

        Args:
            memoryless: whether its scheduler's step depends on nothing but what it is given.

        Raises:
            HeterostepError: it is under way already.
        """
        if self._thread is not None:
            raise HeterostepError("the pipeline is running already: give each thread, or nested call, one of its own")
        self._thread, self._memoryless = threading.get_ident(), memoryless
        if self.generation is not None:
            self.generation.over = True

    def end(self) -> None:
        """The pipeline's call has ended, as it should or by an exception: nothing but the report is kept."""
        self._thread = None
        if self.generation is not None:
            self.generation.over = True
            self.generation.release()

    def _wrap(self, position: int, model: torch.nn.Module) -> _Expert:
        return _Expert(
            model,
            lambda *args, **kwargs: self._forward(position, args, kwargs),
            lambda model: self.adapter.install(model, self._call, self._on_velocity),
        )

    def uninstall(self) -> None:
        """Give the models back as they were, and the memory. The report stays."""
        for expert in self._experts:
            expert.undo()
            expert.wrapped.restore()
        self._experts = []
        if id(self) in self._compiled:
            self._compiled.remove(id(self))
            if not self._compiled:
                torch._dynamo.config.recompile_limit = self._recompile_limit
        if self.generation is not None:
            self.generation.release()

    def _forward(self, position: int, args: tuple, kwargs: dict[str, Any]):
        expert = self._experts[position]
        with self._lock:
            if self._thread != threading.get_ident():
                return expert.wrapped.inner(*args, **kwargs)
            inputs = dict(expert.signature.bind(expert.model, *args, **kwargs).arguments)
            inputs.pop("self")
            device = inputs["hidden_states"].device
            # Kernels, events, streams and graphs are made on the device that is current.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                return self._answer(position, expert, inputs)

    def _answer(self, position: int, expert: _Expert, inputs: dict[str, Any]) -> Any:
        pipe = self.pipeline()
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
            generation.trajectory.restart()
        guided = getattr(pipe, "guider", None) is not None
        if branch.expert != position or (guided and branch.is_of_another(inputs.get("encoder_hidden_states"))):
            # Guiders that come and go change the order of their calls.
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
        step, total, count = generation.step, generation.total, generation.counts[generation.step]
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
            branch.follow_text(inputs.get("encoder_hidden_states"), compat.adapter_state(expert.adapters))
            self._branch, self._active = branch, active
            self._keep_scores = generation.sparse_follows
            try:
                output = self._call_model(expert, generation, branch, inputs, index, keep)
            except torch.OutOfMemoryError:
                if generation.fell_back or generation.stores is None or forecast.smaller(generation.stores) is None:
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
        return output

    def _prepare(self, expert: _Expert, generation: Generation, inputs: dict[str, Any]) -> None:
        """Do what the first step that keeps K and V would wait for while the GPU has other calls to make."""
        if self.config.sync == "fresh" or not generation.sparse_follows:
            return
        if generation.step == 0:
            # Layers are alike.
            kinds = {
                (type(processor), getattr(attn, "inner_dim", 0)): (attn, processor)
                for attn, processor in expert.seams.attentions
            }
            self._compiling = _in_background(lambda: _compile_kernels(kinds.values(), inputs["hidden_states"]))
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
        self._call.index, self._call.num_tokens = index, generation.total
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

        if self._compiling is not None:
            # What another thread launches meanwhile would end a recording.
            self._compiling.join()
            self._compiling = None
        few = index.shape[1]
        if few not in branch.replays:
            branch.replays[few] = ReplayedCalls(
                expert.model, expert.seams.hooked, index.device, lambda: generation.graph_pool
            )
        rows, output = branch.replays[few](
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
        """Empty stores for one branch, of the kinds that fit."""
        processors = [processor for _, processor in expert.seams.attentions]
        kinds = [processor.store is KVCache for processor in processors]
        if generation.stores is None:
            self._place(expert, generation, inputs)
        assert generation.stores is not None
        generation.kv_store, generation.store_names = str(generation.stores), generation.stores.names
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
        """Choose the stores.

        Raises:
            HeterostepError: none fits.
        """
        total = generation.total
        # Where the plan is made anew, counts may yet come near to all.
        largest = max((count for count in generation.counts if count < total), default=total)
        share = 1 if generation.schedule.online else largest / total
        attentions = sum(processor.store is KVCache for _, processor in expert.seams.attentions)
        batches = [branch.batch for branch in generation.branches]
        try:
            generation.stores = place(self.config, expert.model, inputs, batches, share, attentions)
        except DoesNotFit as error:
            advice = "make a smaller or shorter video or offload other models"
            if not self.adapter.least_active:
                advice += ", or evaluate whole steps alone (policy='auto', between=0)"
            raise HeterostepError(f"{error}: {advice}") from error

    def _fall_back(self, generation: Generation) -> None:
        """Memory ran out: smaller stores from now on, for all branches. What was kept is gone."""
        assert generation.stores is not None
        before, after = generation.stores, forecast.smaller(generation.stores)
        generation.drop_stores()
        generation.stores, generation.kv_store, generation.fell_back = after, str(after), True
        generation.store_names = after.names if after is not None else ()
        _log.warning("out of memory with K and V in the store %s: going on with %s", before, after)
        if generation.evaluated_at.is_cuda:
            torch.cuda.empty_cache()

    def _held_output(self, expert: _Expert, generation: Generation, branch: Branch) -> Any:
        """The transformer's last output, with the velocities that the tokens are held at."""
        if branch.slope is None:
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
        if branch.slope is None:
            return velocity
        ahead = generation.weight[:, None] * self._asleep(generation)
        ahead = ahead.repeat(velocity.shape[0] // generation.samples, 1)[..., None]
        return (velocity.float() + ahead * branch.slope).to(velocity.dtype)

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
            if self.config.extrapolate != 0 and generation.skips_follow:
                branch.slope = velocity_slope(rows, old, stride)
            return rows
        where = active[..., None].expand_as(rows)
        branch.velocity, before = old.scatter(1, where, rows), old.gather(1, where)
        if self.config.extrapolate != 0:
            slope = torch.zeros_like(old, dtype=torch.float32) if branch.slope is None else branch.slope
            branch.slope = slope.scatter(1, where, velocity_slope(rows, before, stride.gather(1, active)))
        if self._keep_scores and branch.scores is not None:
            change = velocity_change(rows, before, elapsed.gather(1, active))
            branch.scores = branch.scores.scatter(1, active, change)
        return self._held(generation, branch)

    def _current(self, expert: _Expert, pipe: Any, inputs: dict[str, Any]) -> Generation:
        """The generation under way, or a new one: schedulers make new timesteps for each."""
        grid = self.adapter.token_grid(expert.model, inputs)
        batch, device = inputs["hidden_states"].shape[0], inputs["hidden_states"].device
        old, scheduler = self.generation, pipe.scheduler
        if old is not None:
            same = old.timesteps is scheduler.timesteps and old.grid == grid and batch % old.samples == 0
            if same and not old.over:
                return old
            old.release()
        for each in self._experts:
            each.follow()
            self._allow_recompiles(each.model)
        samples = batch // self.adapter.guidance_copies(pipe)
        first = self._scheduler_step(pipe)
        num_steps = len(scheduler.timesteps) - first
        switch = self.adapter.expert_switch(pipe)
        restarts = () if switch is None or not first < switch < first + num_steps else (switch - first,)
        clean = self.adapter.clean_tokens(inputs)
        if clean is not None:
            clean = clean[:samples]
        sigmas = scheduler.sigmas[first : first + num_steps + 1].float().cpu()
        self._sigmas, self._times = sigmas.tolist(), drift_time(sigmas).tolist()
        tokens = Tokens(grid.num_tokens, self.adapter.least_active)
        schedule = Schedule(self.config, Run(tuple(self._sigmas), tokens, restarts))
        schedule.check()
        foreign = next((each.foreign for each in self._experts if each.foreign), None)
        if schedule.sparse and foreign is not None:
            raise HeterostepError(
                f"the attention processor {foreign} is not diffusers' own, so single tokens cannot run through it: "
                "evaluate whole steps (policy='auto', between=0), or take it off"
            )
        self._clock = StepClock(device)
        self.generation = Generation(
            timesteps=scheduler.timesteps,
            first=first,
            grid=grid,
            samples=samples,
            schedule=schedule,
            counts=schedule.plan(),
            clean=clean,
            trajectory=Trajectory(self._sigmas, self._times, schedule.policy.corrects and self._memoryless),
            evaluations=torch.zeros(samples, tokens.total, dtype=torch.int32, device=device),
            evaluated_at=torch.full((samples, tokens.total), self._sigmas[0], device=device),
            elapsed=torch.zeros(samples, tokens.total, device=device),
            stride=torch.ones(samples, tokens.total, device=device),
            weight=torch.full((samples,), float(self.config.extrapolate or 0.0), device=device),
        )
        self._clock.mark()
        return self.generation

    def _ignored(self, generation: Generation, velocity: torch.Tensor) -> torch.Tensor | None:
        """Which values of a guided velocity are given tokens', bool of its shape; None where none are."""
        if generation.clean is None:
            return None
        if generation.ignored is None:
            rows = generation.branches[0].velocity
            assert rows is not None
            everyone = generation.clean[..., None].expand(-1, -1, rows.shape[2])
            model = self._experts[generation.expert].model
            generation.ignored = self.adapter.arrange(model, generation.grid, everyone)
        # Some pipelines leave given frames out of what they step.
        return generation.ignored if generation.ignored.shape == velocity.shape else None

    def _allow_recompiles(self, model: torch.nn.Module) -> None:
        if compat.blocks_compiled(model):
            dynamo = torch._dynamo.config
            if not self._compiled:
                Runner._recompile_limit = dynamo.recompile_limit
                dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
            self._compiled.add(id(self))

    @staticmethod
    def _scheduler_step(pipe: Any) -> int:
        """The scheduler's step of this call. Schedulers count it themselves, but only from their first step on."""
        scheduler, now = pipe.scheduler, getattr(pipe, "_current_timestep", None)
        if scheduler.step_index is not None:
            return scheduler.step_index
        if now is None:
            # A modular pipeline, whose runs begin where they tell the scheduler to.
            return scheduler.begin_index or 0
        return int((scheduler.timesteps - now).abs().argmin())

    def _start_step(self, generation: Generation, step: int) -> None:
        generation.step, generation.calls = step, 0
        count, sigma = generation.counts[step], self._sigmas[step]
        generation.elapsed = generation.evaluated_at - sigma
        generation.index = None
        if generation.is_dense:
            generation.evaluations += 1
            if step:
                generation.stride = self._asleep(generation)
            generation.evaluated_at = torch.full_like(generation.evaluated_at, sigma)
            # Between two experts a velocity's change tells them apart rather than the tokens.
            generation.unranked = generation.ranking is None or step not in generation.schedule.run.restarts
        elif count and self.config.score != "oracle":
            self._rank(generation)
            self._activate(generation)

    def end_step(self, velocity: torch.Tensor) -> torch.Tensor:
        """The scheduler is given a step's guided velocity [B, ...], in the layout of the latents.

        Returns:
            what it is to be given instead; the same object where nothing is changed.
        """
        generation = self.generation
        if self._thread != threading.get_ident() or generation is None or generation.over or generation.step < 0:
            return velocity
        step, count = generation.step, generation.counts[generation.step]
        if not generation.is_dense:
            generation.trajectory.skipped(step, velocity, sparse=count > generation.schedule.run.tokens.least)
            return velocity
        before = generation.trajectory.step
        change, given = generation.trajectory.evaluated(step, velocity, self._ignored(generation, velocity))
        if change is not None and not generation.all_dense:
            policy = generation.schedule.policy
            if len(change) == generation.samples:
                generation.weight = policy.weight(change)
            if generation.schedule.online and policy.online:
                # To read it is to wait for the GPU.
                generation.changes.append(Change(before, step, float(change.mean())))
        return given

    def stepped(self) -> None:
        """The scheduler has made a step: what lies ahead is planned anew, and the user is told."""
        generation = self.generation
        if self._thread != threading.get_ident() or generation is None or generation.over or generation.step < 0:
            return
        assert self._clock is not None
        self._clock.mark()
        generation.steps_done = generation.step + 1
        if generation.steps_done == generation.schedule.run.num_steps:
            generation.finished = True
            generation.release()
            self._log_end(generation)
        else:
            self._plan_anew(generation)
        self._notify(generation)

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
        """Rank the tokens for a sparse step, the same for all branches."""
        policy = generation.schedule.policy
        if generation.unranked or policy.ranks_each_step:
            again = generation.ranking is None or generation.rankings % self.config.regroup_every == 0
            generation.rankings += generation.unranked
            generation.unranked = False
            if again or policy.ranks_each_step:
                scores = self._scores(generation)
                self._set_ranking(generation, policy.rank(scores, generation.elapsed, generation.step))

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
        error = error.view(-1, *generation.elapsed.shape).mean(0)
        unscaled = torch.ones_like(generation.elapsed)
        self._set_ranking(generation, generation.schedule.policy.rank(error, unscaled, generation.step))
        self._activate(generation)

    def _set_ranking(self, generation: Generation, scores: torch.Tensor) -> None:
        if generation.clean is not None:
            # What is given needs no velocity, so it comes last; it runs at dense steps and where its turn has come, for
            # its K/V change with the other tokens'.
            scores = torch.where(generation.clean & scores.isfinite(), -1.0, scores)
        generation.ranking = allocation.rank(scores)

    def _cost(self, generation: Generation) -> tuple[StepCost, list[float]] | None:
        """Step costs fitted to what has been timed, and those seconds; None before the first dense step has ended."""
        assert self._clock is not None
        durations = self._clock.durations()
        shares = [count / generation.total for count in generation.counts[: len(durations)]]
        if not any(share == 1 for share in shares):
            return None
        return StepCost(durations, shares), durations

    def _plan_anew(self, generation: Generation) -> None:
        """After a step: the rest of the run within what is left of the share, or of the seconds."""
        schedule, step = generation.schedule, generation.step
        begin = schedule.anew_from(generation.counts, step)
        late = begin is None and schedule.has_no_dense_ahead(generation.counts, step)
        if late:
            begin = step + 1
        elif begin is None:
            return
        if self.config.runtime is None:
            generation.counts = schedule.within_share(generation.counts, begin, generation.changes)
            return
        fitted = self._cost(generation)
        if fitted is None:
            return
        cost, durations = fitted
        planned = [cost.seconds(count / generation.total) for count in generation.counts[:begin]]
        # What has been made counts as it was timed, what comes before the new plan as it is expected.
        made = min(len(durations), begin)
        promised = self.config.runtime * cost.dense_run(schedule.run.num_steps)
        left = promised - sum(cost.steady[:made]) - sum(planned[made:])
        if not schedule.sparse:
            left += min(cost.dense / 2, TOLERANCE * promised)

        def seconds(count: int) -> float:
            return cost.seconds(count / generation.total)

        replan = schedule.with_seconds_left if late else schedule.within_seconds
        generation.counts = replan(generation.counts, begin, generation.changes, left, seconds)

    def _log_end(self, generation: Generation) -> None:
        """One line for a service's log."""
        if not _log.isEnabledFor(logging.INFO):
            return
        fitted = self._cost(generation)
        config, total = self.config, generation.total
        dense = [step for step, count in enumerate(generation.counts) if count == total]
        asked = f"runtime {config.runtime:g}" if config.runtime is not None else f"share {config.target:.3g}"
        spent = sum(generation.counts) / total / len(generation.counts)
        seconds = ""
        if fitted is not None:
            cost, durations = fitted
            seconds = f", {sum(durations):.2f} s (dense about {cost.dense_run(len(generation.counts)):.2f})"
        _log.info(
            "%s: %s asked, share %.3f spent%s; dense steps %s of %d; K/V: %s",
            config.policy, asked, spent, seconds, dense, len(generation.counts), generation.kv_store,
        )  # fmt: skip

    def _notify(self, generation: Generation) -> None:
        if self.on_step is None:
            return
        fitted = self._cost(generation)
        total, num_steps = generation.total, generation.schedule.run.num_steps
        elapsed, runtime = 0.0, None
        if fitted is not None:
            cost, durations = fitted
            elapsed = sum(durations)
            ahead = generation.counts[generation.steps_done :]
            seconds = elapsed - cost.warmup + sum(cost.seconds(count / total) for count in ahead)
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
        num_steps, total = generation.schedule.run.num_steps, generation.total
        fitted = self._cost(generation)
        seconds, dense_seconds, warmup = 0.0, None, 0.0
        if fitted is not None:
            cost, durations = fitted
            seconds, warmup = sum(durations), cost.warmup
            dense_seconds = cost.dense_run(num_steps)
        steps = generation.evaluations.cpu()
        done = generation.counts[: generation.steps_done]
        config, grid = self.config, generation.grid.shape
        achieved = float(steps.double().mean()) / num_steps
        target = None if config.share is None else config.target
        left = 0.0 if target is None or not generation.finished else target - achieved
        return Report(
            pipeline=pipeline,
            num_inference_steps=num_steps,
            runtime=RuntimeReport(
                target=config.runtime,
                achieved=(seconds - warmup) / dense_seconds if dense_seconds and generation.finished else None,
                seconds=seconds,
                dense_seconds=dense_seconds,
                warmup_seconds=warmup,
            ),
            share=ShareReport(target=target, achieved=achieved, unspent=left if left > 1e-4 else 0.0),
            steps=StepsReport(mean=float(steps.float().mean()), min=int(steps.min()), max=int(steps.max())),
            active_share=[count / total for count in done],
            memory=MemoryReport(
                kv_cache_bytes=generation.kv_bytes_peak,
                peak_bytes=_peak_bytes(generation),
                kv_host_bytes=generation.kv_host_bytes_peak,
                kv_store=generation.kv_store,
                fell_back=generation.fell_back,
            ),
            replay=self._replay_options(generation, [count / total for count in done]),
            policy=config.policy,
            steps_maps=steps[:, : math.prod(grid)].view(-1, *grid).numpy().astype(np.int64),
            solver=config.solver,
            finished=generation.finished,
            advice=generation.schedule.advice,
        )

    def _replay_options(self, generation: Generation, shares: list[float]) -> dict[str, Any]:
        """What repeats a run beside the seed: its shares, its stores, and options that are not the default."""
        fields = HSAConfig.__dataclass_fields__
        changed = {name: getattr(self.config, name) for name in fields}
        options = {
            name: value
            for name, value in changed.items()
            if value != fields[name].default and name not in ("runtime", "share", "kv_store", "vram", "rotation")
        }
        names = generation.store_names
        if names:
            options["kv_store"] = names[0] if len(set(names)) == 1 else names
        return {"share": shares, **options}


def _compile_kernels(attentions: Iterable[tuple[Any, Any]], hidden_states: torch.Tensor) -> None:
    for attn, processor in attentions:
        processor.prepare(attn, hidden_states)


def _in_background(work: Callable[[], Any]) -> threading.Thread:
    """Run `work` beside the caller; where it fails, whoever needs it tries again and gets the error."""

    def run() -> None:
        # Each thread records gradients unless told otherwise.
        with contextlib.suppress(Exception), torch.no_grad():
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _peak_bytes(generation: Generation) -> int:
    device = generation.evaluated_at.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory_info = psutil.Process().memory_info()
    # Windows and Linux (by the field that it has there) tell the peak; elsewhere what is held now is the best there is.
    return getattr(memory_info, "peak_wset", 0) or _linux_peak() or memory_info.rss


def _linux_peak() -> int:
    try:
        with open("/proc/self/status") as status:
            lines = [line for line in status if line.startswith("VmHWM:")]
    except OSError:
        return 0
    return int(lines[0].split()[1]) * 1024 if lines else 0
