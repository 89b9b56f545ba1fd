"""The transformer's forward, step by step: which tokens run, what is kept, what is returned for the others.

The runner stands around the forward of the pipeline's transformer, or of both where it has two experts, and around the
scheduler's step, which is given the guided velocity; what happens inside the model is the adapter's. Only calls from
inside the pipeline's own `__call__`, in its thread, are the runner's: others pass through. Each is one of four:

    plain    every token, nothing kept: exactly the model as it was
    dense    every token, K/V kept for a sparse step that follows
    sparse   the active tokens only; the others' velocities are extrapolated
    skipped  no token: all velocities are extrapolated

A dense *step*, which evaluates all tokens, makes dense calls where a later step reads its K/V, and plain ones
elsewhere: by default nearly all are plain.

How many tokens a step evaluates, which, and how far the others' velocities follow their last change over log(1 - sigma)
is the policy's (`heterostep.policy`). Holding a velocity over k steps is one Euler step over all of them.

Shapes: B samples, b batch of a call, N tokens, n active tokens, C values a token.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heterostep import compat
from heterostep.config import HSAConfig
from heterostep.engine import ranking, steps, stores
from heterostep.engine.cuda_graphs import ReplayedCalls, pays
from heterostep.engine.expert import Expert, compile_kernels, in_background
from heterostep.engine.generation import Branch, Generation
from heterostep.engine.report import Report, StepInfo, build_report, step_info
from heterostep.engine.schedule import Schedule
from heterostep.engine.trajectory import Correction, SchedulerInput
from heterostep.engine.velocity import held, record
from heterostep.errors import HeterostepError
from heterostep.kernels import gather_rows
from heterostep.models.base import Adapter, Call
from heterostep.policy import Run, Tokens


@dataclass(eq=False)
class _TransformerCall:
    """One call of a transformer, from its arguments to its answer.

    Attributes:
        expert: the transformer.
        generation: the run that asks.
        branch: the guidance branch that the call is of.
        inputs: the forward's arguments by name.
        stale: whether what the branch has kept is too old to be read: the call is dense then.
        active: tokens whose velocities are to be kept, int64 [b, n]; None where all are.
        collected: where the output projection's rows go in place of the branch, if anywhere.
    """

    expert: Expert
    generation: Generation
    branch: Branch
    inputs: dict[str, Any]
    stale: bool
    active: torch.Tensor | None = None
    collected: list[torch.Tensor] | None = None

    def for_batch(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """What is one row a sample [B, ...], for a call [b, ...] that has several guidance branches in its batch."""
        copies = self.inputs["hidden_states"].shape[0] // self.generation.samples
        return x if x is None or copies == 1 else x.repeat(copies, 1)


class Runner:
    """Runs one pipeline call: decides for each transformer call what is evaluated.

    Args:
        pipeline: returns the pipeline; asked at every call, for a user may replace its scheduler.
        models: its transformers, in the order in which they take over.
        adapter: their family.
        config: the dial and options.
        on_step: called with a `StepInfo` after each denoising step.
    """

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
        self._call: _TransformerCall | None = None  # the one under way
        self._hooks_call = Call()  # the same, as the adapter's hooks and processors see it
        # Pipelines in other threads may share the transformer: one call at a time, for hooks see the call under way.
        self._lock = threading.RLock()
        self._claiming = threading.Lock()  # a lock of its own: who is refused does not wait for a forward
        self._thread: int | None = None  # whose pipeline call is under way
        self._in_users_code = False  # a callback is running
        self._scheduler: Any = None  # of the pipeline's call under way
        self._correction = Correction.NONE
        self._kind: Hashable = None  # of the generation's run, see `Expert.kind_of_run`
        self._compiling: threading.Thread | None = None
        self._has_compiled_blocks = False
        self._more_graphs = contextlib.ExitStack()  # what torch allows for those
        self.experts: list[Expert] = []
        try:
            for position, model in enumerate(models):
                self.experts.append(self._wrap(position, model))
        except BaseException:
            self.uninstall()
            raise

    def claim(self) -> None:
        """Let a call begin in this thread, if none is under way: its generation is what is asked of the transformers.

        Raises:
            HeterostepError: one is under way already.
        """
        with self._claiming:
            if self._thread is not None:
                raise HeterostepError(
                    "the pipeline is already running: use a separate pipeline for each thread or nested call"
                )
            self._thread, self._in_users_code, self.generation = threading.get_ident(), False, None

    def step_by(self, scheduler: Any, correction: Correction) -> None:
        """The scheduler of the pipeline's call, and how it can be told what a gap has missed."""
        self._scheduler, self._correction = scheduler, correction

    def end(self) -> None:
        """The pipeline's call has ended, as it should or by an exception: nothing but the report is kept."""
        self._thread = self._scheduler = None
        if self.generation is not None:
            self.generation.over = True
            self.generation.release()

    @property
    def _is_ours(self) -> bool:
        """Whether what is called now belongs to the run: in its thread, and not by a callback."""
        return self._thread == threading.get_ident() and not self._in_users_code

    def _wrap(self, position: int, model: torch.nn.Module) -> Expert:
        expert = Expert(
            model,
            lambda *args, **kwargs: self._forward(position, expert, args, kwargs),
            lambda model: self.adapter.install(model, self._hooks_call, self._on_velocity),
        )
        return expert

    def uninstall(self) -> None:
        """Give the models back as they were, and the memory. The report stays."""
        for expert in self.experts:
            expert.undo()
            expert.wrapped.restore()
        self.experts = []
        self._more_graphs.close()
        if self.generation is not None:
            self.generation.over = True
            self.generation.release()

    def _forward(self, position: int, expert: Expert, args: tuple, kwargs: dict[str, Any]):
        with self._lock:
            if not self._is_ours:
                return expert.wrapped.inner(*args, **kwargs)
            inputs = expert.inputs(args, kwargs)
            device = inputs["hidden_states"].device
            # Kernels, events, streams and graphs are made on the device that is current.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                return self._answer(position, expert, inputs)

    def _answer(self, position: int, expert: Expert, inputs: dict[str, Any]) -> Any:
        pipe = self.pipeline()
        if pipe.scheduler is not self._scheduler:
            raise HeterostepError(
                "the scheduler was replaced in the middle of a run: set another one between two calls of the pipeline"
            )
        generation = self._current(expert, pipe, inputs)
        step = compat.scheduler_step(pipe) - generation.first
        if step != generation.step:
            if expert.was_changed:
                # A callback has loaded a LoRA.
                expert.follow()
            steps.start_step(generation, step)
        branch = generation.branch(generation.calls)
        generation.calls += 1
        if generation.expert != position:
            # Another model's K/V are of no use to this one.
            generation.drop_stores()
            generation.expert = position
            generation.trajectory.restart()
        guided = getattr(pipe, "guider", None) is not None
        kind = self.adapter.call_kind(inputs)
        changed = branch.expert != position or branch.kind != kind
        if changed or (guided and branch.is_of_another(inputs.get("encoder_hidden_states"))):
            # Guidance that comes and goes changes the order of the calls.
            branch.expert, branch.kind, branch.last_step = position, kind, -1
        # A branch that missed a step (guidance switched off for a while) has stale K/V: it starts again, dense.
        stale = branch.last_step < 0 or branch.last_step < step - 1
        branch.last_step, branch.batch = step, inputs["hidden_states"].shape[0]
        call = self._call = _TransformerCall(expert, generation, branch, inputs, stale)
        try:
            if generation.counts[step] == 0 and not stale:
                return self._skip(call)
            output = self._evaluate(call)
            if stale:
                generation.note_begun_anew(branch.batch)
            return output
        except BaseException:
            generation.free_kv()
            raise
        finally:
            self._call = self._hooks_call.index = None
            for _, processor in expert.patches.attentions:
                processor.kv = None

    def _skip(self, call: _TransformerCall) -> Any:
        """The transformer's last output, with the velocities that the tokens are held at."""
        return self._with_velocities(call, call.branch.output, held(call.generation, call.branch))

    def _evaluate(self, call: _TransformerCall) -> Any:
        """The transformer's output, of the active tokens or of all, with the others' velocities in it."""
        generation, branch, sync = call.generation, call.branch, self.config.sync
        sparse = 0 < generation.counts[generation.step] < generation.total
        if self.config.score == "oracle" and generation.calls == 1 and sparse and not call.stale:
            self._rank_by_truth(call)
        call.active = None if call.stale else call.for_batch(generation.index)
        # Without K/V (they went with a store that failed) everyone runs, and the active tokens count.
        index = call.active if sync != "fresh" and branch.stores else None
        if index is not None and call.expert.lost_processors:
            raise HeterostepError(
                "the attention processors were replaced in the middle of a run: set them between two calls of the "
                "pipeline"
            )
        keep = sync != "fresh" and generation.wants_kv(sync == "drift")
        if keep and generation.stores is None:
            stores.place_for(call.expert, generation, call.inputs)
            keep = generation.stores is not None
        if call.stale:
            branch.free_kv()
        # diffusers applies the scale of `attention_kwargs` within the forward.
        scale = (call.inputs.get("attention_kwargs") or {}).get("scale")
        layers = call.expert.loras
        loras = compat.lora_state(layers), compat.lora_versions(layers), scale
        branch.follow_text(call.inputs.get("encoder_hidden_states"), loras)
        try:
            output = self._call_model(call, index, keep)
        except torch.OutOfMemoryError:
            if not stores.can_fall_back(generation):
                raise
            output = None
        if output is None:
            # Out of the handler, so that nothing of the failed call is kept alive by its error.
            stores.fall_back(generation)
            output = self._call_model(call, None, keep)
        branch.output = output
        if generation.step < 2 and generation.calls == 1:
            self._prepare(call)
        generation.note_kv()
        if not keep:
            branch.free_kv()
            if not any(each.kv_bytes or each.kv_host_bytes for each in generation.branches):
                generation.workspace.reset()
        return output

    def _prepare(self, call: _TransformerCall) -> None:
        """Do what the first step that keeps K and V would wait for while the GPU has other calls to make."""
        expert, generation, inputs = call.expert, call.generation, call.inputs
        if self.config.sync == "fresh" or not generation.sparse_follows:
            return
        if generation.step == 0:
            # Layers are alike.
            kinds = {
                (type(processor), getattr(attn, "inner_dim", 0)): (attn, processor)
                for attn, processor in expert.patches.attentions
            }
            self._compiling = in_background(lambda: compile_kernels(kinds.values(), inputs["hidden_states"]))
        elif generation.stores is None:
            # By now all guidance branches are known.
            stores.place_for(expert, generation, inputs)

    def _call_model(self, call: _TransformerCall, index: torch.Tensor | None, keep: bool) -> Any:
        """The model's forward, of the tokens of `index` or of all; with K/V kept or read, or neither."""
        expert, generation, branch, inputs = call.expert, call.generation, call.branch, call.inputs
        if keep:
            generation.kept.add(generation.step)
        if keep and not branch.stores:
            branch.stores = stores.make_stores(expert, generation, branch, inputs)
        hooks = self._hooks_call
        hooks.index, hooks.num_tokens, hooks.grid = index, generation.total, generation.grid
        if index is not None or keep:
            if index is None:
                # A dense call decodes nothing, or little, and needs the room.
                generation.workspace.reset()
                stores.reserve(branch, inputs["hidden_states"].device)
            generation.workspace.begin()
            generation.workspace.write_back = keep
            if self.config.sync == "drift":
                far = generation.elapsed_log_alpha / generation.interval.clamp_min(1e-6)
                generation.workspace.extrapolation = call.for_batch(far)
            for (_, processor), store in zip(expert.patches.attentions, branch.stores, strict=True):
                processor.kv = store
        else:
            branch.free_kv()
        if index is None:
            return expert.call(inputs)
        inputs = self.adapter.select_tokens(expert.model, inputs, expert.ranks.pad_to_ranks(index))
        few = pays(index, expert.ranks)
        if few and self.config.cuda_graphs and generation.stores is not None and generation.stores.all_on_device:
            return self._replayed(call, inputs, index)
        return expert.call(inputs)

    def _replayed(self, call: _TransformerCall, inputs: dict[str, Any], index: torch.Tensor) -> Any:
        """A sparse call, recorded where it can be. What is made of its velocities is not part of the recording.

        Args:
            call: the call under way.
            inputs: of the forward, for the tokens of `index` alone.
            index: int64 [b, n].
        """
        expert, generation, branch = call.expert, call.generation, call.branch
        workspace = generation.workspace

        def forward(given: dict[str, Any]) -> tuple[torch.Tensor, Any]:
            self._hooks_call.index, workspace.extrapolation = given["index"], given["extrapolation"]
            return self._collected(given["inputs"])

        if self._compiling is not None:
            # What another thread launches meanwhile would end a recording.
            self._compiling.join()
            self._compiling = None
        count = index.shape[1]
        recording = (self._kind, tuple(index.shape))
        if count not in branch.replays:
            branch.replays[count] = ReplayedCalls(
                expert.model,
                expert.patches.hooked,
                index.device,
                lambda: generation.graph_pool,
                expert.ranks,
                at_once=expert.has_made(recording),
            )
        rows, output = branch.replays[count](
            forward,
            {"inputs": inputs, "index": index, "extrapolation": workspace.extrapolation},
            [t for kept in (*branch.stores, workspace) for t in kept.tensors or ()],
        )
        if branch.replays[count].recorded:
            expert.note_made(recording)
        velocities = self._on_velocity(rows)
        assert velocities is not None
        return self._with_velocities(call, output, velocities)

    def _collected(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """The output projection's rows of the active tokens [b, n, C], which are not kept, and the model's output."""
        call = self._call
        assert call is not None
        call.collected = []
        try:
            output = call.expert.call(inputs)
            (rows,) = call.collected
        finally:
            call.collected = None
        return rows, output

    def _with_velocities(self, call: _TransformerCall, output: Any, velocities: torch.Tensor) -> Any:
        """The transformer's output with the velocities of all tokens [b, N, C] in place of its own."""
        sample = self.adapter.unpatchify(call.expert.model, call.generation.grid, velocities)
        return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(**{**output, "sample": sample})

    def _on_velocity(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The output projection's rows of the active tokens [b, n, C] -> everyone's velocities [b, N, C].

        None, so that the rows stay as they are, in calls that are not the runner's.
        """
        call, index = self._call, self._hooks_call.index
        if call is None:
            return None
        rows = self._hooks_call.active_rows(rows)
        if call.collected is not None:
            call.collected.append(rows)
            # What the model does with all tokens' values, it may do with these.
            everyone = (rows.shape[0], self._hooks_call.num_tokens, rows.shape[2])
            return None if index is None else rows.new_zeros(everyone)
        if call.active is not None and index is None:
            rows = gather_rows(rows, call.active)
        return record(call.generation, call.branch, rows, call.active, call.stale, call.generation.sparse_follows)

    def _current(self, expert: Expert, pipe: Any, inputs: dict[str, Any]) -> Generation:
        """The generation under way, or a new one: schedulers make new timesteps for each."""
        grid = self.adapter.token_grid(expert.model, inputs)
        batch, device = inputs["hidden_states"].shape[0], inputs["hidden_states"].device
        old, scheduler = self.generation, pipe.scheduler
        if old is not None:
            same = old.timesteps is scheduler.timesteps and old.grid == grid and batch % old.samples == 0
            if same and not old.over:
                return old
            old.release()
        for each in self.experts:
            each.follow()
            if not self._has_compiled_blocks and compat.blocks_compiled(each.model):
                self._has_compiled_blocks = True
                self._more_graphs.enter_context(compat.more_graphs())
        samples = batch // self.adapter.cfg_batch_factor(pipe)
        first = compat.scheduler_step(pipe)
        num_steps = len(scheduler.timesteps) - first
        switch = self.adapter.expert_switch(pipe)
        restarts = () if switch is None or not first < switch < first + num_steps else (switch - first,)
        clean = self.adapter.clean_tokens(expert.model, inputs)
        if clean is not None:
            clean = clean[:samples]
        sigmas = scheduler.sigmas[first : first + num_steps + 1].float().cpu()
        tokens = Tokens(grid.num_tokens, self.adapter.min_active)
        from_frames = self.adapter.is_image_conditioned(expert.model, inputs)
        schedule = Schedule(self.config, Run(tuple(sigmas.tolist()), tokens, restarts, from_frames))
        schedule.check()
        foreign = next((each.foreign for each in self.experts if each.foreign), None)
        if schedule.sparse and foreign is not None and not schedule.leave_out_single_tokens():
            raise HeterostepError(
                f"the attention processor {foreign} is not diffusers' own, so single tokens cannot run through it: "
                "evaluate whole steps (policy='auto', sparse_share=0), or take it off"
            )
        self.generation = generation = steps.begin(
            schedule,
            timesteps=scheduler.timesteps,
            grid=grid,
            samples=samples,
            device=device,
            correction=self._correction,
            first=first,
            clean=clean,
            ranks=expert.ranks,
        )
        expert.ranks.check_same(inputs["hidden_states"])
        sparse = schedule.sparse and generation.skips_follow
        how = (sparse, self.config.sync, self.config.kv_store, self.config.cuda_graphs)
        self._kind = expert.kind_of_run(inputs, how)
        generation.warm = expert.ranks.true_on_all(expert.has_made(self._kind))
        return generation

    def end_step(self, velocity: torch.Tensor) -> SchedulerInput:
        """The scheduler is given a step's guided velocity [B, ...], in the layout of the latents.

        Returns:
            what it is to be given instead; the same velocity where nothing is changed.
        """
        generation = self.generation
        if not self._is_ours:
            return SchedulerInput(velocity)
        if generation is None:
            raise HeterostepError(
                "the transformer's forward was replaced while heterostep is enabled: call heterostep.enable again"
            )
        if generation.over or generation.step < 0:
            return SchedulerInput(velocity)
        return steps.end_step(generation, velocity)

    def stepped(self) -> None:
        """The scheduler has made a step: what lies ahead is planned anew, and the user is told."""
        generation = self.generation
        if not self._is_ours or generation is None or generation.over or generation.step < 0:
            return
        steps.stepped(generation)
        if generation.finished:
            for expert in self.experts:
                expert.note_made(self._kind)
        if self.on_step is not None:
            self.of_user(self.on_step)(step_info(generation))

    def of_user(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a user's callback: what it asks of transformer and scheduler is answered outside the run, whose time
        stands still meanwhile."""

        @functools.wraps(callback)
        def called(*args: Any, **kwargs: Any) -> Any:
            before, self._in_users_code = self._in_users_code, True
            clock = None if before or self.generation is None else self.generation.clock
            try:
                with contextlib.nullcontext() if clock is None else clock.paused():
                    return callback(*args, **kwargs)
            finally:
                self._in_users_code = before

        return called

    def _rank_by_truth(self, call: _TransformerCall) -> None:
        """Rank the tokens by how wrong their held velocities are, which costs a dense call. Decided by one branch."""
        generation = call.generation
        rows, _ = self._collected(call.inputs)
        error = (rows.float() - held(generation, call.branch).float()).abs().sum(-1)
        error = error.view(-1, *generation.elapsed_sigma.shape).mean(0)
        unscaled = torch.ones_like(generation.elapsed_sigma)
        ranked = generation.schedule.policy.rank(error, unscaled, generation.step)
        ranking.check_shape("rank", ranked, error.shape, generation)
        ranking.set_ranking(generation, ranked)
        ranking.activate(generation)

    def report(self, pipeline: str) -> Report:
        """The last generation's report.

        Raises:
            HeterostepError: nothing has been generated yet.
        """
        if self.generation is None:
            raise HeterostepError("nothing to report yet: call the pipeline first")
        return build_report(self.generation, pipeline)
