"""Whole generations on a small random pipeline: what is identical, what is spent, what is forgotten."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

import heterostep
from heterostep.engine.clock import StepClock
from heterostep.errors import HeterostepError
from heterostep.kernels import reference
from heterostep.models.wan import SelfAttention
from heterostep.pipeline import inspect
from heterostep.sigmas import log_alpha
from rows import ROWS
from small import run, small_pipeline

TOKENS = 3 * 4 * 4


@pytest.fixture
def pipe():
    return small_pipeline()


def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("image_to_video", [False, True])
def test_all_tokens_active_is_bit_identical(guidance, image_to_video):
    pipe = small_pipeline(image_to_video)
    options = {"guidance_scale": guidance} | ({"image": picture()} if image_to_video else {})
    plain = run(pipe, **options)
    with heterostep.enabled(pipe, share=1.0):
        assert torch.equal(run(pipe, **options), plain)


def test_dense_steps_that_keep_kv_are_bit_identical_too(pipe):
    velocities = {True: [], False: []}
    for enabled in (False, True):
        if enabled:
            heterostep.enable(pipe, share=[1, 1, 1, 0.5, 1, 1])
        hook = pipe.transformer.register_forward_hook(lambda m, a, out, e=enabled: velocities[e].append(out[0]))
        run(pipe, steps=6)
        hook.remove()
    for step in range(3):
        for call in (0, 1):
            assert torch.equal(velocities[True][2 * step + call], velocities[False][2 * step + call])
    assert not torch.equal(velocities[True][6], velocities[False][6])


def test_a_held_velocity_is_one_euler_step_over_the_gap(pipe):
    """With no token active, k steps move the latents by velocity times the sigmas' difference."""
    latents, outputs, sigmas = [], [], []

    def keep(pipe, step, timestep, tensors):
        latents.append(tensors["latents"].clone())
        sigmas[:] = pipe.scheduler.sigmas.tolist()
        return {}

    heterostep.enable(pipe, share=[1, 1, 1, 0, 0, 0, 1, 1], solver="euler", extrapolate=0)
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: outputs.append(out[0].clone()))
    run(pipe, steps=8, guidance_scale=1.0, callback_on_step_end=keep)
    hook.remove()
    expected = latents[1] + (sigmas[6] - sigmas[2]) * outputs[2]
    torch.testing.assert_close(latents[5], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("extrapolate", [0.5, 1.0])
def test_held_velocities_go_along_their_last_slope(pipe, extrapolate):
    """With no token active and with some, what a skipped token gets lies on the line through its last two."""
    outputs = []
    heterostep.enable(pipe, share=[1, 1, 1, 0, 0.5, 0, 1, 1], extrapolate=extrapolate)
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: outputs.append(out[0].clone()))
    run(pipe, steps=8, guidance_scale=1.0)
    hook.remove()
    times = log_alpha(pipe.scheduler.sigmas)
    slope = (outputs[2] - outputs[1]) / (times[2] - times[1])
    expected = outputs[2] + extrapolate * (times[3] - times[2]) * slope
    torch.testing.assert_close(outputs[3], expected, atol=1e-5, rtol=1e-5)
    # At step 4 half of the tokens were evaluated: the others are still on their line, and at step 5 too.
    slept = torch.from_numpy(heterostep.report(pipe).steps_map == 5)[None, None]
    slept = slept.repeat_interleave(2, 3).repeat_interleave(2, 4).expand_as(expected)
    assert slept.float().mean() == 0.5
    for step in (4, 5):
        expected = outputs[2] + extrapolate * (times[step] - times[2]) * slope
        torch.testing.assert_close(outputs[step][slept], expected[slept], atol=1e-5, rtol=1e-5)
    fresh = outputs[4] + extrapolate * (times[5] - times[4]) * (outputs[4] - outputs[2]) / (times[4] - times[2])
    torch.testing.assert_close(outputs[5][~slept], fresh[~slept], atol=1e-5, rtol=1e-5)


def test_whole_steps_keep_no_kv(pipe):
    """K and V are kept where a step between two dense steps reads them, and nowhere else."""
    for share, sparse_share, achieved in ((0.56, 0.0, 0.5), (0.52, None, 0.5), (0.56, 0.2, 0.56), (0.56, None, 0.56)):
        heterostep.enable(pipe, share=share, sparse_share=sparse_share)
        run(pipe, steps=12)
        report = heterostep.report(pipe)
        assert (report.memory.kv_cache_bytes > 0) == (achieved == share)
        # What is left of the budget is not spent, and the report says so.
        assert report.share.achieved == pytest.approx(achieved, abs=0.002)
        assert report.share.unspent == pytest.approx(share - achieved, abs=0.002)
    heterostep.enable(pipe, share=[1, 1, 0, 0, 1, 0])
    run(pipe, steps=6)
    assert heterostep.report(pipe).memory.kv_cache_bytes == 0
    kept = []
    heterostep.enable(pipe, share=[1, 1, 0, 0.5, 0, 1, 0, 1])
    runner = inspect(pipe)

    def look(model, args, output):
        kept.append(sum(branch.kv_bytes for branch in runner.generation.branches) > 0)

    hook = pipe.transformer.register_forward_hook(look)
    run(pipe, steps=8, guidance_scale=1.0)
    hook.remove()
    # The hook sees a step's end before its K and V are freed.
    assert kept == [False, True, True, False, False, False, False, False]


def test_the_oracle_evaluates_the_most_wrong_tokens(pipe):
    outputs = []
    heterostep.enable(pipe, share=[1, 1, 1, 0.5, 1, 1], score="oracle", sync="fresh", extrapolate=0)
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: outputs.append(out[0].clone()))
    run(pipe, steps=6, guidance_scale=1.0)
    hook.remove()
    report = heterostep.report(pipe)
    assert report.share.achieved == pytest.approx(5.5 / 6)
    # Step 3's truth comes first, then its result, in which the held tokens are those of step 2.
    truth, result = outputs[3:5] if len(outputs) == 7 else (None, outputs[3])
    assert truth is None, "the oracle's own call is not the pipeline's"
    evaluated = torch.from_numpy(report.steps_map == 6)[None, None].repeat_interleave(2, 3).repeat_interleave(2, 4)
    evaluated = evaluated.expand_as(result)
    assert torch.equal(result[~evaluated], outputs[2][~evaluated])
    heterostep.enable(pipe, share=[1, 1, 1, 1, 1, 1])
    dense = []
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: dense.append(out[0].clone()))
    run(pipe, steps=6, guidance_scale=1.0)
    hook.remove()
    error = (dense[3] - outputs[2]).abs().unflatten(4, (4, 2)).unflatten(3, (4, 2)).sum((1, 4, 6))[0]
    picked = torch.from_numpy(report.steps_map == 6)
    assert error[picked].min() >= error[~picked].max()


@pytest.mark.parametrize("steps,share", list(itertools.product([10, 25, 40], [0.3, 0.5, 0.77])))
@pytest.mark.parametrize("options", [{"sparse_share": 0.3}, {"sparse_share": 0}, {"policy": "hsa", "dense_start": 1}])
def test_share_is_spent_exactly_and_everyone_gets_the_dense_steps(pipe, steps, share, options):
    heterostep.enable(pipe, share=share, **options)
    run(pipe, steps=steps)
    report = heterostep.report(pipe)
    unit = TOKENS if options.get("sparse_share") == 0 else 1
    assert int(report.steps_map.sum()) == int(share * steps * TOKENS + 1e-6) // unit * unit
    assert report.steps_map.shape == (3, 4, 4)
    dense = sum(s == 1 for s in report.active_share)
    assert report.steps.min >= dense
    assert report.steps.mean == pytest.approx(report.share.achieved * steps)
    assert len(report.active_share) == steps


def test_same_seed_and_share_repeat_bit_for_bit(pipe):
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    assert torch.equal(run(pipe, seed=5), run(pipe, seed=5))


def test_a_timed_round_robin_takes_the_same_turns_in_its_replay(pipe, monkeypatch):
    monkeypatch.setattr(StepClock, "durations", lambda clock: [1.0] * (len(clock._marks) - 1))
    with heterostep.enabled(pipe, runtime=0.97, round_robin=2):
        first, replay = run(pipe, steps=12), heterostep.report(pipe).replay
    with heterostep.enabled(pipe, **replay):
        assert torch.equal(run(pipe, steps=12), first)


def test_a_runtime_run_is_replayed_by_its_active_shares(pipe):
    heterostep.enable(pipe, runtime=0.5, sparse_share=0.3)
    first = run(pipe, steps=20)
    report = heterostep.report(pipe)
    assert report.runtime.target == 0.5 and report.runtime.achieved is not None
    heterostep.enable(pipe, share=report.active_share)
    assert torch.equal(run(pipe, steps=20), first)
    assert heterostep.report(pipe).active_share == report.active_share


@pytest.mark.parametrize("solver", ["pipeline", "euler"])
def test_disable_restores_everything(pipe, solver):
    plain = run(pipe)
    scheduler = pipe.scheduler
    processors = pipe.transformer.attn_processors
    hooks = {n: (len(m._forward_hooks), "forward" in m.__dict__) for n, m in pipe.transformer.named_modules()}
    heterostep.enable(pipe, share=0.5, sparse_share=0.3, solver=solver)
    run(pipe)
    heterostep.disable(pipe)
    after = pipe.transformer.attn_processors
    assert after.keys() == processors.keys() and all(after[k] is processors[k] for k in processors)
    assert pipe.scheduler is scheduler
    assert hooks == {n: (len(m._forward_hooks), "forward" in m.__dict__) for n, m in pipe.transformer.named_modules()}
    assert torch.equal(run(pipe), plain)


def test_enable_twice_takes_the_later_options(pipe):
    plain = run(pipe)
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    heterostep.enable(pipe, share=0.8, sparse_share=0.3, solver="euler")
    run(pipe)
    assert heterostep.report(pipe).share.target == 0.8
    heterostep.disable(pipe)
    heterostep.disable(pipe)
    assert torch.equal(run(pipe), plain)


def test_an_exception_in_mid_generation_leaves_nothing(pipe):
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    clean = run(pipe)

    def fail(pipe, step, timestep, tensors):
        if step == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(pipe, seed=9, callback_on_step_end=fail)
    assert not heterostep.report(pipe).finished
    assert heterostep.report(pipe).runtime.achieved is None
    assert torch.equal(run(pipe), clean)


def test_a_with_block_restores_after_an_exception(pipe):
    plain = run(pipe)
    with pytest.raises(ZeroDivisionError), heterostep.enabled(pipe, share=0.5, sparse_share=0.3, solver="euler"):
        run(pipe)
        raise ZeroDivisionError
    assert torch.equal(run(pipe), plain)
    assert heterostep.report(pipe).share.achieved == 0.5


def test_another_resolution_or_batch_starts_anew(pipe):
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    small = run(pipe)
    run(pipe, size=96)
    assert heterostep.report(pipe).steps_map.shape == (3, 6, 6)
    run(pipe, num_videos_per_prompt=2)
    assert heterostep.report(pipe).steps_maps.shape == (2, 3, 4, 4)
    assert torch.equal(run(pipe), small)


def test_each_sample_of_a_batch_is_as_if_alone(pipe):
    prompts = ["a red circle moving right", "green square over stripes"]
    noise = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    both = run(pipe, prompt=prompts, latents=noise)
    maps = heterostep.report(pipe).steps_maps
    assert not np.array_equal(maps[0], maps[1])
    for sample in range(2):
        alone = run(pipe, prompt=prompts[sample], latents=noise[sample : sample + 1])
        assert np.array_equal(heterostep.report(pipe).steps_map, maps[sample])
        torch.testing.assert_close(both[sample : sample + 1], alone, atol=1e-4, rtol=1e-4)


def test_memory_is_counted_and_given_back(pipe):
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    run(pipe)
    layers, width, branches = 2, 48, 2
    kv = 2 * layers * TOKENS * width * 4 * branches
    text = 2 * layers * 512 * width * 4 * branches
    assert heterostep.report(pipe).memory.kv_cache_bytes == kv + text
    assert not inspect(pipe).generation.branches


def test_given_first_frame_costs_only_the_meetings():
    pipe = small_pipeline(image_to_video=True)
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    run(pipe, image=picture())
    steps = heterostep.report(pipe).steps_map
    assert (steps[0] == steps.min()).all() and steps[1:].max() > steps.min()


def test_the_scores_decide_who_is_evaluated(pipe):
    maps = {}
    for score in ("velocity", "random"):
        heterostep.enable(pipe, share=0.5, sparse_share=0.3, score=score)
        run(pipe)
        maps[score] = heterostep.report(pipe).steps_map
    assert maps["velocity"].sum() == maps["random"].sum()
    assert not np.array_equal(maps["velocity"], maps["random"])


def test_on_step_tells_every_step(pipe):
    seen = []
    heterostep.enable(pipe, runtime=0.6, sparse_share=0.3, on_step=seen.append)
    run(pipe, steps=15)
    assert [info.step for info in seen] == list(range(15))
    assert [info.active_share for info in seen] == heterostep.report(pipe).active_share
    assert seen[-1].projected_runtime == pytest.approx(heterostep.report(pipe).runtime.achieved, rel=0.05)
    assert all(a.elapsed_seconds < b.elapsed_seconds for a, b in zip(seen, seen[1:]))


def test_flow_match_euler_scheduler(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = run(pipe)
    with heterostep.enabled(pipe, share=1.0):
        assert torch.equal(run(pipe), plain)
    with heterostep.enabled(pipe, share=0.5, sparse_share=0.3):
        run(pipe)
    assert heterostep.report(pipe).share.achieved == 0.5


def test_changed_prompt_states_are_not_served_from_the_cache(pipe):
    other = pipe.encode_prompt("green square", device="cpu")[0]

    def swap(pipe, step, timestep, tensors):
        return {"prompt_embeds": other} if step == 4 else {}

    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    plain = run(pipe)
    swapped = run(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert not torch.equal(plain, swapped)


@pytest.mark.parametrize("enable_first", [True, False])
def test_model_offload_in_either_order(pipe, enable_first, monkeypatch):
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module

    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    expected = run(pipe)
    heterostep.disable(pipe)
    if enable_first:
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    # What enable_model_cpu_offload does to each model, and again after each generation; with no accelerator here.
    hook = CpuOffload(execution_device="cpu")
    add_hook_to_module(pipe.transformer, hook)
    if not enable_first:
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    for _ in range(2):
        assert torch.equal(run(pipe), expected)
        remove_hook_from_module(pipe.transformer)
        add_hook_to_module(pipe.transformer, hook)
    heterostep.disable(pipe)
    remove_hook_from_module(pipe.transformer)
    with heterostep.enabled(pipe, share=1.0):
        dense = run(pipe)
    assert torch.equal(run(pipe), dense)


def test_refusals_say_what_is_supported(pipe):
    from diffusers import DDIMScheduler

    with pytest.raises(HeterostepError, match="no such option: speed; the options are runtime, share, .*, on_step$"):
        heterostep.enable(pipe, speed=2)
    with pytest.raises(HeterostepError, match="needs the pipeline, not its transformer"):
        heterostep.enable(pipe.transformer, share=0.5)
    with pytest.raises(HeterostepError, match="needs a diffusers pipeline, not NoneType"):
        heterostep.enable(None, share=0.5)
    with pytest.raises(HeterostepError, match="not both"):
        heterostep.enable(pipe, config=heterostep.HSAConfig(share=0.5), share=0.5)
    with pytest.raises(HeterostepError, match="nothing to report yet: call heterostep.enable"):
        heterostep.report(pipe)
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    with pytest.raises(HeterostepError, match="nothing to report"):
        heterostep.report(pipe)
    heterostep.disable(pipe)
    pipe.scheduler = UniPCMultistepScheduler()
    with pytest.raises(HeterostepError, match="use_flow_sigmas"):
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(HeterostepError, match="DDIMScheduler is not supported"):
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    with pytest.raises(HeterostepError, match="WanPipeline"):
        heterostep.enable(object(), share=0.5)


def test_an_impossible_share_stops_the_run_before_its_first_step(pipe):
    heterostep.enable(pipe, share=0.05)
    with pytest.raises(HeterostepError, match="lowest possible"):
        run(pipe)
    heterostep.disable(pipe)
    run(pipe)


def test_fresh_keys_are_those_of_a_dense_step(pipe):
    """What is taken at a step equals the dense step's rows; what is not taken is held."""
    outputs, plain = [], []
    heterostep.enable(pipe, share=[1, 1, 0.5, 1, 1, 1], sync="fresh", extrapolate=0)
    hook = pipe.transformer.register_forward_hook(lambda m, args, out: outputs.append(out[0]))
    inner = inspect(pipe).experts[0].wrapped.inner
    inputs = []
    look = pipe.transformer.register_forward_pre_hook(lambda m, a, kwargs: inputs.append(kwargs), with_kwargs=True)
    run(pipe, steps=6, guidance_scale=1.0)
    report = heterostep.report(pipe)
    assert report.memory.kv_cache_bytes == 0 and report.share.achieved == pytest.approx(5.5 / 6)
    hook.remove(), look.remove()
    heterostep.disable(pipe)
    with torch.no_grad():
        plain = inner(**inputs[2])[0]
    same = (outputs[2] == plain).flatten(0, 1).all(0)
    held = (outputs[2] == outputs[1]).flatten(0, 1).all(0)
    assert (same ^ held).all() and same.float().mean() == 0.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"share": 0.7, "sparse_share": 0.2}, 1),
        ({"runtime": 0.9, "sparse_share": 0.2}, 1),
        ({"share": 0.7}, 1),  # 5.6 of 8 steps
        ({"share": 0.75}, 0),
    ],
)
def test_kernels_are_prepared_once_where_single_tokens_may_come(pipe, monkeypatch, options, expected):
    """Before a store is in use, and for one layer: the layers are alike."""
    prepared = []
    monkeypatch.setattr(SelfAttention, "prepare", lambda self, attn, hidden_states: prepared.append(attn))
    with heterostep.enabled(pipe, **options):
        run(pipe, steps=8)
    assert len(prepared) == expected


@pytest.mark.parametrize("name", ["wan2.1-t2v", "ltx2.0-t2v", "ltx2.3-t2v"])
def test_kernels_are_prepared_as_they_will_be_called(name, monkeypatch):
    """What a kernel is compiled for: the values of a row, its heads, the tables' layout and precision, its kind."""
    row, called = ROWS[name], set()

    def norm_rotate(x, weight, eps, cos, sin, heads, split, by_head):
        called.add((x.shape[2], x.dtype, heads, cos.shape[2:], cos.dtype, split, by_head))
        return reference.norm_rotate(x, weight, eps, cos, sin, heads, split, by_head)

    monkeypatch.setattr("heterostep.models.attention.norm_rotate", norm_rotate)
    monkeypatch.setattr("heterostep.engine.runner.in_background", lambda work: None)
    pipe = row.build()
    with heterostep.enabled(pipe, share=0.5, sparse_share=0.5):
        row.run(pipe, steps=12)
        in_run = set(called)
        called.clear()
        states = SimpleNamespace(is_cuda=True, dtype=torch.float32, new_zeros=torch.zeros)
        (expert,) = inspect(pipe).experts
        for attn, processor in expert.patches.attentions:
            processor.prepare(attn, states)
    assert in_run and in_run <= called
