"""Life with a pipeline: whatever was done with heterostep, the plain result is there again, bit for bit."""

import contextlib
import copy
import gc
import pickle
import signal
import threading
import time
import types
import weakref
from inspect import signature

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import MagCacheConfig, PyramidAttentionBroadcastConfig, apply_mag_cache
from peft import LoraConfig

import heterostep
from heterostep import compat, pipeline
from heterostep.engine.clock import StepClock
from heterostep.engine.expert import Expert
from heterostep.engine.runner import Runner
from heterostep.engine.trajectory import Trajectory
from heterostep.errors import HeterostepError
from heterostep.grid import TokenGrid
from heterostep.models.wan import WanAdapter
from heterostep.pipeline import inspect
from rows import REPRESENTATIVE, ROWS, equal, quickly, transformers
from small import run, small_pipeline

STEPS = 8
WHOLE, SINGLE = {"share": 0.5}, {"share": 0.6, "sparse_share": 0.4}


class Cancelled(Exception):
    pass


def cancel_after(step):
    """A callback that ends the run."""

    def callback(pipe, at, timestep, tensors):
        if at == step:
            raise Cancelled
        return {}

    return callback


def cancelled(row, pipe):
    """Cancel a run in its middle, from within the transformer: not every pipeline has a callback."""
    calls = []

    def fail(model, args):
        calls.append(model)
        if len(calls) == 8:
            raise Cancelled

    hooks = [model.register_forward_pre_hook(fail) for model in transformers(pipe)]
    with pytest.raises(Cancelled):
        row.run(pipe, steps=STEPS)
    for hook in hooks:
        hook.remove()


@pytest.fixture(params=quickly(ROWS))
def row(request):
    return ROWS[request.param]


# Single tokens touch more than whole steps do, so most kinds show those alone when there is little time.
BOTH = ("wan2.1-t2v",)
# Its text and video in one sequence take longest, and nothing of a pipeline's life is special to it.
SHOWN = set(REPRESENTATIVE) - {"hunyuan1.5-t2v"}
TABLE = [
    pytest.param(
        name,
        options,
        id=f"{name}-{kind}",
        marks=[] if name in BOTH or (name in SHOWN and options is SINGLE) else pytest.mark.slow,
    )
    for name in ROWS
    for kind, options in (("whole", WHOLE), ("single", SINGLE))
]
both_ways = pytest.mark.parametrize(("row", "options"), TABLE, indirect=["row"])


def sister(pipe):
    """Another pipeline on the same transformer, with a scheduler of its own."""
    other = type(pipe).from_pipe(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    return other


@both_ways
def test_a_cancelled_run_is_nobody_elses(row, options):
    """Another pipeline on the transformer and a direct call of it are plain, then and while this one stays enabled."""
    pipe = row.build()
    other = sister(pipe)
    plain, calls = row.run(pipe, steps=STEPS), []
    hook = transformers(pipe)[-1].register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    others = row.run(other, steps=STEPS)
    hook.remove()
    model, inputs = transformers(pipe)[-1], calls[-1]
    direct = model(**inputs)
    heterostep.enable(pipe, **options)
    sparse = row.run(pipe, steps=STEPS)
    cancelled(row, pipe)
    assert not heterostep.report(pipe).finished
    assert equal(row.run(other, steps=STEPS), others)
    assert equal([model(**inputs)[0]], [direct[0]])
    assert equal(row.run(pipe, steps=STEPS), sparse)
    assert equal(row.run(other, steps=STEPS), others)
    heterostep.disable(pipe)
    assert equal(row.run(pipe, steps=STEPS), plain)


def test_a_refused_target_is_not_told_to_another_pipeline(row):
    pipe = row.build()
    other = sister(pipe)
    plain = row.run(other, steps=STEPS)
    heterostep.enable(pipe, share=0.05)
    with pytest.raises(HeterostepError, match="lowest possible"):
        row.run(pipe, steps=STEPS)
    assert equal(row.run(other, steps=STEPS), plain)
    heterostep.disable(pipe)


@both_ways
def test_nested_and_failing_blocks_restore_what_was(row, options):
    pipe = row.build()
    plain = row.run(pipe, steps=STEPS)
    with heterostep.enabled(pipe, **options):
        first = row.run(pipe, steps=STEPS)
        with pytest.raises(ZeroDivisionError), heterostep.enabled(pipe, share=0.9):
            row.run(pipe, steps=STEPS)
            raise ZeroDivisionError
        assert heterostep.report(pipe).share.target == 0.9
        assert equal(row.run(pipe, steps=STEPS), first)
        with pytest.raises(HeterostepError):
            heterostep.enable(pipe, share=7)
        with heterostep.enabled(pipe, share=1.0):
            assert equal(row.run(pipe, steps=STEPS), plain)
        assert equal(row.run(pipe, steps=STEPS), first)
    assert equal(row.run(pipe, steps=STEPS), plain)


LORA_ON = {"Wan": "proj_out|patch_embedding|to_q|to_k|to_v", "LTX": "proj_out|to_q|to_k", "Hun": "proj_out|to_q|to_k"}


@pytest.mark.parametrize("left", [None, torch.nn.Linear(1, 1)], ids=["nothing", "another"])
def test_a_block_that_takes_the_transformer_off_ends_with_its_own_error(left):
    """Its memory may be wanted for decoding."""
    pipe = small_pipeline()
    heterostep.enable(pipe, share=0.7)
    with pytest.raises(Cancelled), heterostep.enabled(pipe, share=0.5):
        pipe.transformer = left
        raise Cancelled
    with pytest.raises(HeterostepError, match="nothing to inspect"):
        inspect(pipe)


@both_ways
def test_a_lora_put_on_and_taken_off_while_enabled(row, options):
    """Also one that replaces the modules that carry hooks."""
    pipe = row.build()
    model = transformers(pipe)[0]
    plain = row.run(pipe, steps=STEPS)
    targets = rf"(.*\.)?({LORA_ON[type(pipe).__name__[:3]]})"
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)

    def put_on():
        torch.manual_seed(5)
        model.add_adapter(config, "style")

    with heterostep.enabled(pipe, **options):
        bare = row.run(pipe, steps=STEPS)
        put_on()
        styled = row.run(pipe, steps=STEPS)
        assert not equal(styled, bare)
        model.delete_adapters("style")
        assert all(torch.allclose(x, y) for x, y in zip(row.run(pipe, steps=STEPS), bare))
    put_on()
    with heterostep.enabled(pipe, **options):
        assert equal(row.run(pipe, steps=STEPS), styled)
    with heterostep.enabled(pipe, share=1.0):
        dense = row.run(pipe, steps=STEPS)
    assert equal(row.run(pipe, steps=STEPS), dense) and not equal(dense, plain)


@pytest.mark.parametrize("how", ["its weight", "attention_kwargs", "written to in place"])
def test_a_lora_turned_down_in_mid_run_is_noticed_by_what_is_kept_of_the_text(how):
    row = ROWS["wan2.1-t2v"]
    pipe = row.build()
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=24, target_modules=r".*attn2\.(to_k|to_v)", init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    scale = {"scale": 1.0}
    ups = [layer.lora_B["default"].weight for layer in compat.lora_layers(pipe.transformer)]
    full = [weight.detach().clone() for weight in ups]

    def turn(to):
        if how == "attention_kwargs":
            scale["scale"] = to
        elif how == "written to in place":
            with torch.no_grad():
                for weight, at_first in zip(ups, full):
                    weight.copy_(to * at_first)
        else:
            pipe.transformer.set_adapters("default", to)

    def switch(pipe, step, timestep, tensors):
        turn(float(step < 4))
        return {}

    def go(**options):
        turn(1.0)
        kwargs = {"attention_kwargs": scale} if how == "attention_kwargs" else {}
        (video,) = row.run(pipe, steps=12, **kwargs, **options)
        return video

    def off(a, b):
        return ((a - b).pow(2).mean().sqrt() / b.std()).item()

    right = off(go(callback_on_step_end=switch), go())
    heterostep.enable(pipe, share=[1] * 5 + [0.98] * 7)
    assert off(go(callback_on_step_end=switch), go()) == pytest.approx(right, rel=0.1)


def test_two_threads_share_a_transformer():
    pipe = small_pipeline()
    other = sister(pipe)
    plain = run(other, seed=3)
    heterostep.enable(pipe, **SINGLE)
    expected, results = run(pipe, seed=2), {}

    def work(name, which, seed):
        results[name] = [run(which, seed=seed) for _ in range(3)]

    threads = [threading.Thread(target=work, args=args) for args in (("ours", pipe, 2), ("plain", other, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, expected) for x in results["ours"])
    assert all(torch.equal(x, plain) for x in results["plain"])


def test_a_pipeline_is_called_once_at_a_time():
    pipe = small_pipeline()
    heterostep.enable(pipe, **WHOLE)

    def again(pipe, step, timestep, tensors):
        run(pipe)
        return {}

    with pytest.raises(HeterostepError, match="already running"):
        run(pipe, callback_on_step_end=again)
    run(pipe)


def test_nothing_is_left_of_what_was_disabled():
    pipe = small_pipeline()

    def alive():
        gc.collect()
        runners = sum(type(each) is Runner for each in gc.get_objects())
        return runners, sum(each.nbytes for each in gc.get_objects() if type(each) is torch.Tensor)

    counts = []
    for _ in range(4):
        with heterostep.enabled(pipe, **SINGLE):
            run(pipe, guidance_scale=1.0)
            with pytest.raises(Cancelled):
                run(pipe, guidance_scale=1.0, callback_on_step_end=cancel_after(5))
        counts.append(alive())
    assert counts[1] == counts[3]


@pytest.mark.parametrize("cause", ["on_step", "callback"])
def test_a_run_that_was_cancelled_keeps_no_memory(cause):
    pipe, runner = small_pipeline(), None

    def fail(info):
        if info.step == 5:
            raise Cancelled

    heterostep.enable(pipe, **SINGLE, on_step=fail if cause == "on_step" else None)
    runner = inspect(pipe)
    with pytest.raises(Cancelled):
        run(pipe, callback_on_step_end=cancel_after(5))
    assert not runner.generation.branches and runner.generation.workspace.nbytes == 0


@pytest.mark.parametrize(("step", "share"), [(0, 1), (1, 1), (4, 0.5)])
def test_a_step_that_failed_is_not_counted(step, share):
    pipe, shares = small_pipeline(), [1, 1, 0.5, 0, 0.5, *[1] * 7]

    def fail(*args):
        if inspect(pipe).generation.step == step:
            raise Cancelled

    assert shares[step] == share
    pipe.transformer.blocks[0].register_forward_pre_hook(fail)
    heterostep.enable(pipe, share=shares)
    with pytest.raises(Cancelled):
        run(pipe)
    report = heterostep.report(pipe)
    assert not report.finished and report.active_share == shares[:step] and report.replay["share"] == shares
    assert report.steps.mean == sum(shares[:step]) == report.steps_maps.mean()
    assert report.share.achieved == pytest.approx(sum(shares[:step]) / 12)


class Scaled:
    """Stands for a processor of somebody else's, such as NAG's."""

    _attention_backend = _parallel_config = None

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return 3 * self.inner(*args, **kwargs)


def test_foreign_attention_processors_go_with_whole_steps_alone():
    pipe = small_pipeline()
    for block in pipe.transformer.blocks:
        block.attn2.set_processor(Scaled(block.attn2.processor))
    plain = run(pipe)
    for options in (SINGLE, {"share": 0.6, "policy": "hsa"}):
        heterostep.enable(pipe, **options)
        with pytest.raises(HeterostepError, match="Scaled is not diffusers' own.*whole steps"):
            run(pipe)
    with heterostep.enabled(pipe, share=1.0):
        assert torch.equal(run(pipe), plain)
    # Also where single tokens would get what whole steps leave: here that is not spent.
    for share in (WHOLE["share"], 0.56):
        with heterostep.enabled(pipe, share=share):
            run(pipe)
        assert set(heterostep.report(pipe).active_share) == {0.0, 1.0}
    heterostep.disable(pipe)
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cache", ["mag", "pab"])
def test_other_caches_are_refused_also_when_set_behind_the_models_back(cache, when):
    pipe = small_pipeline()

    def set_cache():
        if cache == "mag":
            apply_mag_cache(pipe.transformer, MagCacheConfig(mag_ratios=[1.0] * 12, num_inference_steps=12))
        else:
            pipe.transformer.enable_cache(
                PyramidAttentionBroadcastConfig(
                    spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
                )
            )

    if when == "before":
        set_cache()
        with pytest.raises(HeterostepError, match="another cache"):
            heterostep.enable(pipe, **WHOLE)
    else:
        heterostep.enable(pipe, **WHOLE)
        set_cache()
        with pytest.raises(HeterostepError, match="another cache"):
            run(pipe)


def test_offloading_and_casting_hooks_are_no_cache():
    pipe = small_pipeline()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert compat.other_cache(pipe.transformer) is None
    with heterostep.enabled(pipe, **WHOLE):
        run(pipe)


def test_a_scheduler_of_rising_sigmas_is_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = small_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with heterostep.enabled(pipe, **WHOLE), pytest.raises(HeterostepError, match="sigmas must fall"):
        run(pipe)


@pytest.mark.parametrize("compile_", ["module", "forward"])
def test_a_model_compiled_as_a_whole_after_enable_is_one_line(compile_):
    pipe = small_pipeline()
    heterostep.enable(pipe, **WHOLE)
    if compile_ == "module":
        pipe.transformer.compile()
    else:
        pipe.transformer.forward = torch.compile(pipe.transformer.forward)
    with pytest.raises(HeterostepError, match="compile_repeated_blocks") as error:
        run(pipe)
    assert "\n" not in str(error.value)


def test_the_euler_solver_is_there_in_the_pipelines_calls_alone(tmp_path):
    pipe = small_pipeline()
    scheduler = pipe.scheduler
    heterostep.enable(pipe, share=0.5, solver="euler")
    run(pipe)
    assert pipe.scheduler is scheduler and scheduler.config.solver_order == 2
    pipe.save_pretrained(tmp_path)
    assert type(pipe).from_pipe(pipe).scheduler.config.solver_order == 2
    assert UniPCMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.solver_order == 2


def test_a_scheduler_is_not_replaced_in_the_middle_of_a_run():
    """Its noise levels are what the run was planned by. Between two calls, or once the last step is made, it may be."""
    pipe = small_pipeline()

    def replace(at):
        def callback(pipe, step, timestep, tensors):
            if step == at:
                pipe.scheduler = copy.deepcopy(pipe.scheduler)
            return {}

        return callback

    heterostep.enable(pipe, **WHOLE)
    expected = run(pipe, steps=STEPS)
    with pytest.raises(HeterostepError, match="the scheduler was replaced in the middle of a run: set another one"):
        run(pipe, callback_on_step_end=replace(3))
    before = pipe.scheduler
    assert torch.equal(run(pipe, steps=STEPS, callback_on_step_end=replace(STEPS - 1)), expected)
    assert pipe.scheduler is not before and torch.equal(run(pipe, steps=STEPS), expected)


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_video_to_video_begins_where_the_scheduler_does(cls):
    """Also at high shifts, where the timesteps of neighbouring steps round to the same number."""
    row = ROWS["wan2.1-v2v"]
    pipe = row.build()
    options = {"flow_shift": 16.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
    # The first step that is made is the second of two alike.
    pipe.scheduler.set_timesteps(80)
    times = pipe.scheduler.timesteps.tolist()
    alike = next(at for at in range(1, 80) if times[at] == times[at - 1])
    strength, seen = (80 - alike + 0.5) / 80, []
    plain = row.run(pipe, steps=80, strength=strength)
    with heterostep.enabled(pipe, share=1.0, on_step=lambda info: seen.append(info.step)):
        assert equal(row.run(pipe, steps=80, strength=strength), plain)
    assert seen == list(range(80 - alike)) and len(heterostep.report(pipe).active_share) == 80 - alike


def test_copies_of_an_enabled_pipeline_say_what_to_do():
    pipe = small_pipeline()
    heterostep.enable(pipe, **WHOLE)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(HeterostepError, match="disable first"):
            attempt(pipe)
    assert type(pipe).__name__ == "WanPipeline" and isinstance(pipe, type(small_pipeline()))
    heterostep.disable(pipe)
    assert type(pipe) is type(small_pipeline())


def test_what_is_made_of_an_enabled_pipeline_is_plain_and_can_be_enabled():
    pipe = small_pipeline()
    plain, cls = run(pipe), type(pipe)
    heterostep.enable(pipe, **WHOLE)
    sparse = run(pipe)
    made = [
        type(pipe)(**pipe.components, expand_timesteps=pipe.config.expand_timesteps),
        pipe.from_pipe(pipe),
        type(pipe).from_pipe(pipe),
    ]
    for other in made:
        assert type(other) is cls
        other.scheduler = copy.deepcopy(pipe.scheduler)
        assert torch.equal(run(other), plain)
        with pytest.raises(HeterostepError, match="enabled through another pipeline"):
            heterostep.enable(other, **WHOLE)
    heterostep.disable(pipe)
    for other in made:
        with heterostep.enabled(other, **WHOLE):
            assert torch.equal(run(other), sparse)


@pytest.mark.parametrize("disabled", [False, True])
def test_an_on_step_that_refers_to_the_pipeline_does_not_keep_it_alive(disabled):
    pipe = small_pipeline()
    told, alive, model = [], weakref.ref(pipe), pipe.transformer
    heterostep.enable(pipe, **WHOLE, on_step=lambda info, pipe=pipe: told.append((type(pipe), info.step)))
    run(pipe)
    assert [step for _, step in told] == list(range(12))
    with heterostep.enabled(pipe, share=0.75):
        run(pipe)
    run(pipe)
    assert len(told) == 24, "the block has none, and gives the first back"
    if disabled:
        heterostep.disable(pipe)
    del pipe
    gc.collect()
    assert alive() is None
    other = small_pipeline()
    other.transformer = model
    with heterostep.enabled(other, **WHOLE):
        run(other)


def test_enabling_in_mid_run_ends_the_account_of_that_run():
    pipe, told = small_pipeline(), []

    def again(pipe, step, timestep, tensors):
        if step == 4:
            heterostep.enable(pipe, **WHOLE, on_step=told.append)
        return {}

    heterostep.enable(pipe, **WHOLE, on_step=told.append)
    run(pipe, callback_on_step_end=again)
    assert [info.step for info in told] == list(range(5)) and not heterostep.report(pipe).finished
    run(pipe)
    assert [info.step for info in told[5:]] == list(range(12)) and heterostep.report(pipe).finished


def test_a_call_that_is_interrupted_as_it_begins_can_be_made_again(monkeypatch):
    """Ctrl-C may come at any time."""
    pipe = small_pipeline()
    heterostep.enable(pipe, **WHOLE)
    sparse = run(pipe)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("heterostep.pipeline.WrappedStep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(pipe)
    assert torch.equal(run(pipe), sparse)


@pytest.mark.parametrize("name", ["wan2.2-t2v", "ltx2.3-t2v"])
def test_a_runtime_of_one_skips_nothing_and_keeps_nothing(name, monkeypatch):
    """However long a step takes."""
    row = ROWS[name]
    pipe = row.build()
    plain = row.run(pipe, steps=STEPS)
    monkeypatch.setattr(StepClock, "durations", lambda clock: [1.0 + (at == 2) for at in range(len(clock._marks) - 1)])
    for options in ({"runtime": 1.0}, {"share": 1.0}):
        with heterostep.enabled(pipe, **options):
            assert equal(row.run(pipe, steps=STEPS), plain)
        report = heterostep.report(pipe)
        assert report.active_share == [1.0] * len(report.active_share) and report.memory.kv_store == "none"


def test_a_timed_run_is_its_replay_also_where_a_late_step_makes_it_skip(monkeypatch):
    """All was planned dense, until one step took long."""
    pipe = small_pipeline()
    monkeypatch.setattr(StepClock, "durations", lambda clock: [1.0 + (at >= 6) for at in range(len(clock._marks) - 1)])
    with heterostep.enabled(pipe, runtime=0.98):
        timed = run(pipe)
    report = heterostep.report(pipe)
    assert 0.0 in report.active_share
    with heterostep.enabled(pipe, **report.replay):
        assert torch.equal(run(pipe), timed)


def test_one_module_as_both_experts_is_one_expert():
    pipe = small_pipeline()
    pipe.transformer_2 = pipe.transformer
    pipe.register_to_config(boundary_ratio=0.9)
    plain = run(pipe)
    for _ in range(2):
        with heterostep.enabled(pipe, share=1.0):
            assert torch.equal(run(pipe), plain)
    with heterostep.enabled(pipe, **WHOLE):
        run(pipe)


def test_guidance_that_ends_early_is_told_step_by_step():
    """The last step has fewer calls than those before it."""
    pipe, seen = small_pipeline(), []

    def stop_guidance(pipe, step, timestep, tensors):
        if step == 10:
            pipe._guidance_scale = 1.0
        return {}

    heterostep.enable(pipe, **WHOLE, on_step=seen.append)
    run(pipe, callback_on_step_end=stop_guidance)
    assert [info.step for info in seen] == list(range(12)) and heterostep.report(pipe).finished


@pytest.mark.parametrize("last", [3, 4, 8])
@pytest.mark.parametrize("ends", [True, False])
def test_no_line_is_drawn_from_a_guided_velocity_to_one_that_is_not(last, ends, monkeypatch):
    """No change is measured, and no sample moved, over a gap within which guidance ends, or begins."""
    pipe, moved = small_pipeline(), []

    def switch(pipe, step, timestep, tensors):
        if step == last or (step == 0 and not ends):
            # The pipeline takes the negative prompt's states along, whether it uses them or not.
            pipe._guidance_scale = 1.0 if ends or step == 0 else 5.0
        return {}

    on_dense_step = Trajectory.on_dense_step

    def watched(trajectory, step, *rest):
        before, known = trajectory.last_step, trajectory._last_velocity is not None
        change, given = on_dense_step(trajectory, step, *rest)
        moved.extend([(before, step)] if given.sample_shift is not None and known else [])
        return change, given

    monkeypatch.setattr(Trajectory, "on_dense_step", watched)
    heterostep.enable(pipe, share=0.5)
    run(pipe, steps=20, callback_on_step_end=switch)
    assert moved and not [gap for gap in moved if gap[0] <= last < gap[1]]
    changes = inspect(pipe).generation.changes
    assert changes and {change.guided for change in changes} == {True, False}
    assert not [change for change in changes if change.start <= last < change.stop]


@pytest.mark.parametrize("last", [3, 8])
def test_guidance_that_ends_early_is_in_the_target_of_seconds(last, monkeypatch):
    """A dense loop of 20 steps, with two calls each until guidance ends and one after that."""
    pipe = small_pipeline()

    def stop_guidance(pipe, step, timestep, tensors):
        if step == last:
            pipe._guidance_scale = 1.0
        return {}

    def durations(clock):
        made = inspect(pipe).generation
        return [made.samples_by_step[at] * (made.counts[at] > 0) for at in range(len(clock._marks) - 1)]

    monkeypatch.setattr(StepClock, "durations", durations)
    heterostep.enable(pipe, runtime=0.5)
    run(pipe, steps=20, callback_on_step_end=stop_guidance)
    report, dense = heterostep.report(pipe).runtime, 20 + last + 1
    assert report.dense_seconds == dense and report.seconds == pytest.approx(dense / 2, abs=1.5)


@pytest.mark.parametrize("wrong", [None, 3, "pipe"])
def test_what_is_no_pipeline_is_one_line(wrong):
    with pytest.raises(HeterostepError, match="needs a diffusers pipeline"):
        heterostep.disable(wrong)
    with pytest.raises(HeterostepError):
        heterostep.enable(wrong, share=0.5)
    with pytest.raises(HeterostepError):
        heterostep.report(wrong)
    with pytest.raises(HeterostepError, match="on_step must be a function"):
        heterostep.enable(small_pipeline(), share=0.5, on_step=3)


@pytest.mark.parametrize("store", ["device", "fp8", "fp8-offload"])
def test_a_replay_names_its_store(store):
    pipe = small_pipeline()
    with heterostep.enabled(pipe, runtime=0.6, sparse_share=0.3, kv_store=store):
        first = run(pipe)
    options = heterostep.report(pipe).replay
    assert options["kv_store"] == store and "runtime" not in options
    with heterostep.enabled(pipe, **options):
        assert torch.equal(run(pipe), first)
    stores = ("device", "fp8") * 2
    with heterostep.enabled(pipe, **{**options, "kv_store": stores}):
        mixed = run(pipe)
    again = heterostep.report(pipe).replay
    assert again["kv_store"] == stores
    with heterostep.enabled(pipe, **again):
        assert torch.equal(run(pipe), mixed)
    with heterostep.enabled(pipe, **{**options, "kv_store": ("fp8",)}), pytest.raises(HeterostepError, match="names 1"):
        run(pipe)


def test_a_forecast_that_fails_does_not_end_the_run(monkeypatch, caplog):
    def fail(*args):
        raise TypeError("meta tensors have no data")

    monkeypatch.setattr("heterostep.engine.forecast.room_on", lambda *args: 10**9)
    monkeypatch.setattr("heterostep.engine.forecast.call_memory", fail)
    pipe = small_pipeline()
    with heterostep.enabled(pipe, **SINGLE), caplog.at_level("WARNING", "heterostep"):
        run(pipe)
    assert "memory cannot be forecast (meta tensors have no data)" in caplog.text
    assert heterostep.report(pipe).memory.kv_store == "device"


@pytest.fixture
def slow_at_first(monkeypatch):
    """Lets a pipeline's first call of its transformer take so many seconds, and each other half a second."""
    from heterostep.engine import clock as timing

    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def slow(pipe, seconds):
        def take(model, args):
            calls.append(0)
            now[0] += seconds if len(calls) == 1 else 0.5

        pipe.transformer.blocks[0].register_forward_pre_hook(take)
        return calls

    return slow


def test_a_slow_first_step_is_warm_up(slow_at_first):
    """As compilation would have it: the steady seconds are what a runtime is kept in."""
    pipe = small_pipeline()
    slow_at_first(pipe, 30.0)
    with heterostep.enabled(pipe, runtime=0.5):
        run(pipe, steps=20, guidance_scale=1.0)
    report = heterostep.report(pipe).runtime
    assert report.warmup_seconds == pytest.approx(29.5, abs=0.6)
    assert report.dense_seconds == pytest.approx(10.0) and report.achieved == pytest.approx(0.5)
    assert heterostep.report(pipe).share.achieved == 0.5


def test_what_every_run_takes_at_first_counts_from_the_second_on(slow_at_first):
    """As CUDA graphs that each run records anew: fewer dense steps make up for them."""
    pipe = small_pipeline()
    calls = slow_at_first(pipe, 2.5)
    reports = []
    for _ in range(2):
        calls.clear()
        with heterostep.enabled(pipe, runtime=0.5):
            run(pipe, steps=20, guidance_scale=1.0)
        reports.append(heterostep.report(pipe))
    first, second = reports
    assert first.runtime.warmup_seconds == pytest.approx(2.0) and first.share.achieved == 0.5
    assert second.runtime.warmup_seconds == 0 and second.share.achieved == pytest.approx(0.3)
    assert [each.runtime.achieved for each in reports] == pytest.approx([0.5, 0.5])
    with heterostep.enabled(pipe, runtime=0.5):
        calls.clear()
        run(pipe, steps=20, guidance_scale=1.0, size=32)
    # Another size is another kind of run.
    assert heterostep.report(pipe).runtime.warmup_seconds == pytest.approx(2.0)


@pytest.mark.parametrize("where", ["callback_on_step_end", "on_step"])
def test_what_a_callback_asks_the_transformer_is_none_of_the_runs(where):
    pipe = small_pipeline()
    heterostep.enable(pipe, share=0.5)
    right = run(pipe)
    inputs, got = [], []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: inputs.append(k), with_kwargs=True)
    run(pipe)
    hook.remove()

    def look(*args):
        got.append(pipe.transformer(**inputs[0])[0])
        return {}

    if where == "on_step":
        heterostep.enable(pipe, share=0.5, on_step=look)
        made = run(pipe)
    else:
        made = run(pipe, callback_on_step_end=look)
    heterostep.disable(pipe)
    with torch.no_grad():
        assert torch.equal(got[5], pipe.transformer(**inputs[0])[0]) and torch.equal(made, right)


@pytest.mark.parametrize(
    ("where", "options"), [(["proj_out"], WHOLE), (["proj_out"], SINGLE), (r".*attn2\.(to_k|to_v)", SINGLE)]
)
def test_a_lora_that_is_loaded_in_mid_run_counts_at_once(where, options):
    def made(late):
        pipe = small_pipeline()

        def put():
            torch.manual_seed(0)
            lora = LoraConfig(r=4, lora_alpha=4, target_modules=where, init_lora_weights=False)
            pipe.transformer.add_adapter(lora, "s")

        def turn(pipe, step, timestep, tensors):
            if step == 3:
                put() if late else pipe.transformer.set_adapters("s", 1.0)
            return {}

        if not late:
            put()
            pipe.transformer.set_adapters("s", 0.0)
        with heterostep.enabled(pipe, **options):
            return run(pipe, callback_on_step_end=turn)

    assert torch.equal(made(True), made(False))


def test_a_run_goes_through_the_models_modules_once(monkeypatch):
    pipe, followed = small_pipeline(), []
    follow = Expert.follow
    monkeypatch.setattr(Expert, "follow", lambda self: followed.append(self) or follow(self))
    with heterostep.enabled(pipe, **SINGLE):
        run(pipe, callback_on_step_end=lambda *args: {})
    assert len(followed) == 1


def test_a_forward_that_was_replaced_is_one_line():
    pipe = small_pipeline()
    heterostep.enable(pipe, share=0.5)
    pipe.transformer.forward = lambda *args, **kwargs: type(pipe.transformer).forward(pipe.transformer, *args, **kwargs)
    with pytest.raises(HeterostepError, match="forward was replaced .*: call heterostep.enable again"):
        run(pipe)


def test_a_call_that_failed_has_no_report_of_the_one_before():
    pipe = small_pipeline()
    heterostep.enable(pipe, share=0.25)
    run(pipe)
    assert heterostep.report(pipe) == heterostep.report(pipe)
    with pytest.raises(HeterostepError, match="below the lowest possible"):
        run(pipe, steps=3)
    with pytest.raises(HeterostepError, match="nothing to report yet"):
        heterostep.report(pipe)


@pytest.fixture
def moves(monkeypatch):
    """The gaps at whose end a sample is moved: the dense steps before and after, and by what."""
    seen, on_dense_step = [], Trajectory.on_dense_step

    def watched(trajectory, step, *rest):
        before = trajectory.last_step
        change, given = on_dense_step(trajectory, step, *rest)
        if given.sample_shift is not None:
            seen.append((before, step, given.sample_shift))
        return change, given

    monkeypatch.setattr(Trajectory, "on_dense_step", watched)
    return seen


def with_single_tokens(pipe, moves):
    """Those of gaps in which single tokens ran."""
    shares = heterostep.report(pipe).active_share
    return [shift for before, step, shift in moves if any(0 < share < 1 for share in shares[before + 1 : step])]


def test_the_default_dtype_changes_nothing(moves):
    pipe = small_pipeline()
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def made(dtype):
        moves.clear()
        torch.set_default_dtype(dtype)
        try:
            with heterostep.enabled(pipe, **SINGLE):
                latest = run(pipe, steps=24, latents=latents)
                shifts = with_single_tokens(pipe, moves)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {shift.dtype for shift in shifts} == {torch.float32} and any(shift.abs().max() > 0 for shift in shifts)
        return latest

    assert torch.equal(made(torch.bfloat16), made(torch.float32))


def test_what_is_not_known_of_a_gap_is_not_corrected(moves, monkeypatch):
    """Where a pipeline's latents have a layout in which tokens cannot be told apart."""
    pipe = small_pipeline()
    heterostep.enable(pipe, **SINGLE)
    run(pipe, steps=24)
    assert with_single_tokens(pipe, moves)
    moves.clear()
    monkeypatch.setattr(TokenGrid, "values_of", lambda *args: None)
    assert run(pipe, steps=24).isfinite().all() and not with_single_tokens(pipe, moves)


def test_a_round_robin_is_its_replay():
    pipe = small_pipeline()
    heterostep.enable(pipe, share=0.5, round_robin=4)
    made = run(pipe)
    heterostep.enable(pipe, **heterostep.report(pipe).replay)
    assert torch.equal(run(pipe), made)


def test_a_scheduler_whose_step_was_set_on_it_is_copied_with_its_own():
    row = ROWS["ltx2.0-t2v"]
    pipe = row.build()
    step = type(pipe.scheduler).step
    pipe.scheduler.step = types.MethodType(lambda self, *args, **kwargs: step(self, *args, **kwargs), pipe.scheduler)
    plain = row.run(pipe, steps=STEPS)
    with heterostep.enabled(pipe, share=1.0):
        assert equal(row.run(pipe, steps=STEPS), plain)


def test_guidance_of_another_kind_that_ends_in_a_callback_takes_no_state_of_others():
    row = ROWS["ltx2.3-t2v"]
    pipe = row.build()

    def made(end):
        def turn(pipe, step, timestep, tensors):
            if step == 5:
                pipe._stg_scale = pipe._audio_stg_scale = end
            return {}

        share = [1.0] * 6 + [0.02] * 3 + [1.0] + [0.02] * 2
        with heterostep.enabled(pipe, share=share):
            return row.run(
                pipe, steps=12, callback_on_step_end=turn, stg_scale=1.0, audio_stg_scale=1.0, modality_scale=3.0
            )

    # To end it, or to go on with next to no weight: the modality's branch begins anew in the one, no more.
    ended, faded = made(0.0), made(1e-30)
    error = (ended[0] - faded[0]).pow(2).mean().sqrt() / faded[0].std()
    assert error < 0.2


def test_whole_steps_with_foreign_processors_are_replayed():
    pipe = small_pipeline()
    for block in pipe.transformer.blocks:
        block.attn2.set_processor(Scaled(block.attn2.processor))
    with heterostep.enabled(pipe, share=0.5):
        first, replay = run(pipe), heterostep.report(pipe).replay
    with heterostep.enabled(pipe, **replay):
        assert torch.equal(run(pipe), first)


class Asks(PipelineCallback):
    """diffusers' kind of callback, which asks the transformer for something of its own."""

    tensor_inputs = ["latents"]

    def __init__(self, ask):
        super().__init__()
        self.ask, self.got = ask, []

    def callback_fn(self, pipe, step, timestep, callback_kwargs):
        if step in (3, 5):
            self.got.append(self.ask())
        return callback_kwargs


@pytest.mark.parametrize("several", [False, True])
def test_what_diffusers_callbacks_ask_for_is_none_of_the_run(several):
    pipe, inputs = small_pipeline(), []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: inputs.append(k), with_kwargs=True)
    run(pipe, steps=2)
    hook.remove()
    expected = pipe.transformer(**inputs[0])[0]
    callback = Asks(lambda: pipe.transformer(**inputs[0])[0])
    with heterostep.enabled(pipe, **WHOLE):
        right = run(pipe)
        given = MultiPipelineCallbacks([callback]) if several else callback
        assert torch.equal(run(pipe, callback_on_step_end=given), right)
    assert len(callback.got) == 2 and all(torch.equal(each, expected) for each in callback.got)


def test_a_pipeline_called_in_another_ones_callback_may_share_its_scheduler():
    first, second = small_pipeline(), small_pipeline(seed=1)
    second.scheduler = first.scheduler
    with heterostep.enabled(first, **WHOLE), heterostep.enabled(second, **WHOLE):
        alone, made = (run(first), run(second)), []

        def callback(pipe, step, timestep, callback_kwargs):
            if step == 11:
                made.append(run(second))
            return {}

        assert torch.equal(run(first, callback_on_step_end=callback), alone[0])
        assert torch.equal(made[0], alone[1])
        assert heterostep.report(second).finished and heterostep.report(second).active_share
    assert "step" not in first.scheduler.__dict__


@pytest.mark.parametrize("way", ["enable", "leave"])
def test_what_cannot_be_enabled_again_leaves_another_ones_transformer_alone(way):
    first, second = small_pipeline(), small_pipeline(seed=1)
    plain = run(first)
    heterostep.enable(first, **WHOLE)
    right = run(first)
    with contextlib.suppress(HeterostepError):
        if way == "enable":
            heterostep.enable(second, share=0.5)
            second.transformer = first.transformer
            heterostep.enable(second, share=0.75)
        else:
            heterostep.enable(second, share=0.5)
            with heterostep.enabled(second, share=0.75):
                second.transformer = first.transformer
    assert torch.equal(run(first), right)
    for pipe in (first, second):
        heterostep.disable(pipe)
    assert torch.equal(run(first), plain)


def test_an_enable_that_is_interrupted_leaves_both_experts_as_they_were(monkeypatch):
    row = ROWS["wan2.2-t2v"]
    pipe, install, models = row.build(), WanAdapter.install, []
    plain = row.run(pipe, steps=4)[0]

    def interrupted(self, model, *rest):
        models.append(model)
        if len(models) == 2:
            raise KeyboardInterrupt
        return install(self, model, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(WanAdapter, "install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            heterostep.enable(pipe, share=0.5)
    assert torch.equal(row.run(pipe, steps=4)[0], plain)
    with heterostep.enabled(pipe, share=1.0):
        assert torch.equal(row.run(pipe, steps=4)[0], plain)


def test_a_call_that_comes_too_early_does_not_keep_the_temporary_scheduler(monkeypatch):
    """solver="euler" sets one of its own for the time of a call: another thread's call must not take it for the
    user's, however long it takes until it begins."""
    pipe, over, threads, outcomes = small_pipeline(), threading.Event(), [], []
    scheduler, first_order = pipe.scheduler, pipeline.first_order

    def slowly(original):
        if threading.current_thread() in threads:
            assert over.wait(60)
        return first_order(original)

    def other(pipe, step, timestep, callback_kwargs):
        if step == 0:
            threads.append(threading.Thread(target=lambda: outcomes.append(_outcome(pipe))))
            threads[0].start()
            # As far as it comes by itself: it is refused, or waits for the end of this run.
            threads[0].join(1)
        return {}

    monkeypatch.setattr(pipeline, "first_order", slowly)
    with heterostep.enabled(pipe, share=0.5, solver="euler"):
        run(pipe, callback_on_step_end=other)
        over.set()
        threads[0].join(60)
        assert pipe.scheduler is scheduler
        assert isinstance(outcomes[0], HeterostepError) and "already running" in str(outcomes[0])


def _outcome(pipe):
    try:
        return run(pipe)
    except Exception as error:
        return error


def run_by_position(pipe, callback):
    """As `run`, all of it given by position up to the callback."""
    given = {
        "prompt": "a red circle moving right", "guidance_scale": 3.0, "output_type": "latent", "height": 64,
        "width": 64, "num_frames": 9, "num_inference_steps": 12, "generator": torch.Generator().manual_seed(0),
        "callback_on_step_end": callback,
    }  # fmt: skip
    parameters = list(signature(type(pipe).__call__).parameters.values())[1:]
    last = [each.name for each in parameters].index("callback_on_step_end")
    with torch.no_grad():
        return pipe(*[given.get(each.name, each.default) for each in parameters[: last + 1]]).frames


@pytest.mark.parametrize("way", ["callback", "by position", "on_step"])
def test_the_time_of_a_slow_callback_is_not_the_runs(way):
    """A preview that is decoded after each step, say: no step is skipped for it."""
    pipe, waits = small_pipeline(), []

    def slow(*_):
        waits.append(0.2)
        time.sleep(0.2)
        return {}

    heterostep.enable(pipe, runtime=0.9, on_step=slow if way == "on_step" else None)
    if way == "by position":
        run_by_position(pipe, slow)
    else:
        run(pipe, **({"callback_on_step_end": slow} if way == "callback" else {}))
    seconds = heterostep.report(pipe).runtime
    assert len(waits) == 12 and max(seconds.seconds, seconds.dense_seconds) < sum(waits)


def test_a_callback_by_position_may_call_the_transformer():
    pipe, made = small_pipeline(), []

    def ask(pipe, step, timestep, tensors):
        asked = torch.zeros(1, 16, 3, 8, 8), torch.tensor([500.0]), torch.zeros(1, 4, 32)
        made.append(pipe.transformer(*asked)[0])
        return {}

    heterostep.enable(pipe, **WHOLE)
    right = run(pipe)
    assert torch.equal(run_by_position(pipe, ask), right) and len(made) == 12


@pytest.mark.parametrize("leave", ["disable", "with", "enable"])
def test_an_interrupted_disable_can_be_made_again(leave, monkeypatch):
    """A second Ctrl-C often comes as the first one is on its way out."""
    pipe = small_pipeline()
    plain = run(pipe)

    def interrupt(expert):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if leave == "with":
            with heterostep.enabled(pipe, **WHOLE):
                patch.setattr(Expert, "undo", interrupt)
        else:
            heterostep.enable(pipe, **WHOLE)
            patch.setattr(Expert, "undo", interrupt)
            heterostep.disable(pipe) if leave == "disable" else heterostep.enable(pipe, share=0.75)
    heterostep.disable(pipe)
    assert torch.equal(run(pipe), plain) and type(pipe) is WanPipeline
    with heterostep.enabled(pipe, share=1.0):
        assert torch.equal(run(pipe), plain)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers of POSIX")
def test_ctrl_c_finds_a_pipeline_enabled_or_not():
    """Whenever it comes: never half of it."""
    pipe = small_pipeline()
    plain, before, interrupted = run(pipe), signal.signal(signal.SIGALRM, signal.default_int_handler), 0
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        for number in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 * (number % 12 + 1))
                for _ in range(200):
                    if number % 2:
                        with heterostep.enabled(pipe, **WHOLE):
                            pass
                    else:
                        heterostep.enable(pipe, **WHOLE)
                        heterostep.disable(pipe)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            if number % 2 == 0:
                heterostep.disable(pipe)
            assert type(pipe) is WanPipeline and "forward" not in pipe.transformer.__dict__
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGINT, usual)
    assert interrupted > 30 and torch.equal(run(pipe), plain)


def test_evaluations_of_guidance_that_comes_back_are_in_the_report():
    """Guidance at every other step: a branch that missed a step is evaluated anew, also where the plan skips."""
    pipe, rows = small_pipeline(), []

    def switch(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0 if step % 2 else 1.0
        return {}

    pipe.transformer.blocks[0].register_forward_pre_hook(lambda block, args: rows.append(args[0].shape[0]))
    run(pipe, callback_on_step_end=switch)
    dense = len(rows)
    rows.clear()
    with heterostep.enabled(pipe, share=0.5):
        run(pipe, callback_on_step_end=switch)
    achieved = heterostep.report(pipe).share.achieved
    assert achieved == pytest.approx(len(rows) / dense) and achieved > 0.55


def test_the_replay_of_an_interrupted_run_is_whole():
    pipe = small_pipeline()
    heterostep.enable(pipe, **WHOLE)
    with pytest.raises(Cancelled):
        run(pipe, callback_on_step_end=cancel_after(4))
    report = heterostep.report(pipe)
    assert len(report.active_share) < len(report.replay["share"]) == 12
    heterostep.enable(pipe, **report.replay)
    run(pipe)
    assert heterostep.report(pipe).active_share == report.replay["share"]


@pytest.mark.parametrize("name", ["wan2.1-t2v", "ltx0.9-t2v"])
@pytest.mark.parametrize("options", [WHOLE, {**WHOLE, "extrapolate": 0}, SINGLE])
def test_a_hook_may_write_to_what_the_transformer_returns(name, options):
    row = ROWS[name]

    def video(hook):
        pipe = row.build()
        pipe.transformer.register_forward_hook(hook)
        with heterostep.enabled(pipe, **options):
            return row.run(pipe, steps=STEPS)

    def in_place(model, args, output):
        output[0].mul_(0.9)

    assert equal(video(in_place), video(lambda model, args, output: (0.9 * output[0], *output[1:])))


def test_a_call_that_was_kept_from_before_disable_is_a_plain_one():
    pipe = small_pipeline()
    plain = run(pipe)
    heterostep.enable(pipe, **WHOLE)
    kept = pipe.__call__
    heterostep.disable(pipe)
    video = kept(
        "a red circle moving right",
        guidance_scale=3.0,
        output_type="latent",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=12,
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert torch.equal(video, plain)


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps])
def test_an_enabled_transformer_is_not_copied(take):
    pipe = small_pipeline()
    heterostep.enable(pipe, **WHOLE)
    with pytest.raises(HeterostepError, match="cannot be copied or pickled while heterostep is enabled"):
        take(pipe.transformer)
    heterostep.disable(pipe)
    take(pipe.transformer)
