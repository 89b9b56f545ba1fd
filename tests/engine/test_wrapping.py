"""Who shares, copies, drops or bypasses an enabled pipeline gets right results or one clear line."""

import copy
import gc
import weakref

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanVideoToVideoPipeline,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

import heterostep
from heterostep.engine.trajectory import SchedulerInput
from heterostep.engine.wrapping import WrappedStep
from heterostep.errors import HeterostepError
from heterostep.pipeline import inspect
from rows import ROWS, equal
from small_ltx2 import run_ltx2, small_ltx2
from small_wan import moving_square, run_wan, small_wan

TEXT = ROWS["wan2.1-t2v"]


@pytest.fixture
def pipe():
    return TEXT.build()


def sharing(pipe):
    """A video-to-video pipeline of the same parts."""
    parts = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "transformer", "vae")}
    scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    other = WanVideoToVideoPipeline(**parts, scheduler=scheduler)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("run_first", [False, True])
def test_a_pipeline_that_shares_the_transformer_runs_plainly(pipe, run_first):
    other = sharing(pipe)
    plain = run_wan("wan2.1-v2v", other)
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    if run_first:
        TEXT.run(pipe)
    assert torch.equal(run_wan("wan2.1-v2v", other), plain)
    with pytest.raises(HeterostepError, match="another pipeline"):
        heterostep.enable(other, share=0.5, sparse_share=0.3)
    heterostep.disable(pipe)
    with heterostep.enabled(other, share=0.5, sparse_share=0.3):
        assert not torch.equal(run_wan("wan2.1-v2v", other), plain)
    assert "forward" not in vars(pipe.transformer)
    assert isinstance(pipe.transformer.blocks[0].attn1.processor, WanAttnProcessor)


def test_the_transformer_by_itself_is_plain(pipe):
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    TEXT.run(pipe, steps=2)
    hook.remove()
    with torch.no_grad():
        expected = pipe.transformer(**seen[0])[0]
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
        assert torch.equal(pipe.transformer(**seen[0])[0], expected)
        TEXT.run(pipe)
        assert torch.equal(pipe.transformer(**seen[0])[0], expected)


def test_disable_gives_memory_back_and_a_dropped_pipeline_its_model(pipe):
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    TEXT.run(pipe)
    heterostep.disable(pipe)
    model = weakref.ref(pipe.transformer)
    pipe.transformer = None
    gc.collect()
    assert model() is None
    assert heterostep.report(pipe).share.achieved == 0.5

    dropped = TEXT.build()
    model = dropped.transformer
    heterostep.enable(dropped, share=0.5, sparse_share=0.3)
    del dropped
    gc.collect()
    assert "forward" not in vars(model) and isinstance(model.blocks[0].attn1.processor, WanAttnProcessor)


@pytest.mark.parametrize("off_after", [1, 6, 10])
def test_guidance_switched_off_on_the_way(pipe, off_after):
    def switch_off(pipe, step, timestep, tensors):
        if step == off_after:
            pipe._guidance_scale = 1.0
        return {}

    seen = []
    heterostep.enable(pipe, share=0.5, sparse_share=0.3, on_step=seen.append)
    TEXT.run(pipe, steps=12, callback_on_step_end=switch_off)
    report = heterostep.report(pipe)
    assert report.finished and report.runtime.achieved is not None
    assert [info.step for info in seen] == list(range(12))
    runner = inspect(pipe)
    assert all(branch.kv_bytes == 0 for branch in runner.generation.branches)


@pytest.mark.parametrize("guidance_scale_2", [1.0, 3.0])
def test_experts_with_guidance_of_their_own(guidance_scale_2):
    row = ROWS["wan2.2-t2v"]
    pipe = row.build()
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    row.run(pipe, steps=12, guidance_scale_2=guidance_scale_2)
    report = heterostep.report(pipe)
    # The second expert takes over at the fifth step (a test of small_wan's grid), dense.
    assert report.finished and report.active_share[4] == 1
    assert report.share.achieved == pytest.approx(0.5, abs=0.001)


def test_the_first_experts_keys_are_freed_when_the_second_takes_over():
    row = ROWS["wan2.2-t2v"]
    pipe = row.build()
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    runner, held = inspect(pipe), []

    def look(model, args):
        # Before the second expert's first block computes anything, no K/V of the first are left in this branch.
        branch = runner.generation.branches[runner.generation.calls - 1]
        held.append((branch.expert, branch.kv_bytes))

    hook = pipe.transformer_2.patch_embedding.register_forward_pre_hook(look)
    row.run(pipe, steps=12)
    hook.remove()
    assert held[0] == (1, 0) and held[1] == (1, 0)


@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
def test_ltx2_with_every_token_conditioned_begins_at_its_first_step(strength):
    pipe = small_ltx2("condition", "2.0")
    conditions = [LTX2VideoCondition(moving_square() + moving_square()[:8], index=0, strength=strength)]
    plain = run_ltx2(pipe, steps=12, conditions=conditions)
    with heterostep.enabled(pipe, share=1.0):
        assert equal(run_ltx2(pipe, steps=12, conditions=conditions), plain)
    assert heterostep.report(pipe).num_inference_steps == 12


def test_a_copy_of_an_enabled_transformer_is_refused(pipe):
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    with pytest.raises(HeterostepError, match="disable first"):
        copy.deepcopy(pipe.transformer)
    heterostep.disable(pipe)
    assert copy.deepcopy(pipe.transformer) is not pipe.transformer


def test_what_is_replaced_while_enabled_is_noticed(pipe):
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    pipe.transformer.set_attn_processor(WanAttnProcessor())
    with pytest.raises(HeterostepError, match="processors were replaced"):
        TEXT.run(pipe)

    def replace(pipe, step, timestep, tensors):
        if step == 2:
            pipe.transformer.set_attn_processor(WanAttnProcessor())
        return {}

    heterostep.disable(pipe)
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    with pytest.raises(HeterostepError, match="replaced in the middle of a run: set them between two calls"):
        TEXT.run(pipe, callback_on_step_end=replace)
    heterostep.disable(pipe)
    original = pipe.scheduler
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    with pytest.raises(HeterostepError, match="stochastic"):
        TEXT.run(pipe)
    # One that is supported is followed.
    pipe.scheduler = original
    heterostep.enable(pipe, share=0.5, sparse_share=0.3, solver="euler")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    TEXT.run(pipe)
    assert pipe.scheduler.config.shift == 5.0
    pipe.scheduler = original
    TEXT.run(pipe)
    assert pipe.scheduler is original
    heterostep.disable(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    with pytest.raises(HeterostepError, match="no sde"):
        heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    small = small_wan("wan2.1-t2v")
    heterostep.enable(small, share=0.5, sparse_share=0.3)
    small.transformer = pipe.transformer
    with pytest.raises(HeterostepError, match="a transformer was replaced"):
        run_wan("wan2.1-t2v", small, steps=2)


def test_prompt_states_written_to_in_place_are_noticed(pipe):
    other = pipe.encode_prompt("green square", max_sequence_length=512, device="cpu")[0]

    def write(pipe, step, timestep, tensors):
        if step == 4:
            tensors["prompt_embeds"].copy_(other)
        return {}

    def replace(pipe, step, timestep, tensors):
        return {"prompt_embeds": other} if step == 4 else {}

    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    written, replaced = (
        TEXT.run(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
        for change in (write, replace)
    )
    assert equal(written, replaced)


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_moved_sample_arrives_where_the_clean_sample_is_kept(kind, by_name):
    """x - sigma v stays, so what is left of a move at the next step is as much as noise is left."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}

    def sample_after(move):
        scheduler = kind(**flow)
        scheduler.set_timesteps(20)
        sigmas, x = scheduler.sigmas.double(), torch.ones(1, 4, dtype=torch.float64)
        given = iter(
            SchedulerInput(v + move / sigmas[12], move * v) if at == 12 else SchedulerInput(v)
            for at, v in enumerate(torch.ones(13, 1, 4, dtype=torch.float64))
        )
        step = WrappedStep(scheduler, lambda velocity: next(given), lambda: None)
        for t in scheduler.timesteps[:13]:
            x = scheduler.step(x, timestep=t, sample=x)[0] if by_name else scheduler.step(x, t, x, return_dict=False)[0]
        step.restore()
        return x, sigmas

    (plain, sigmas), (moved, _) = sample_after(0.0), sample_after(1.0)
    # UniPC's corrector goes once more from the sample before.
    start = 11 if kind is UniPCMultistepScheduler else 12
    torch.testing.assert_close(
        moved - plain, torch.full_like(plain, float(sigmas[13] / sigmas[start])), rtol=1e-4, atol=0
    )
