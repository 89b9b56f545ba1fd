"""diffusers' modular pipelines and their guiders."""

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LayerSkipConfig,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
)

import heterostep
from heterostep.errors import HeterostepError
from heterostep.pipeline import inspect
from rows import equal
from small_modular import MODULAR, run_modular, small_modular

STEPS = 12
SINGLE = {"share": 0.5, "sparse_share": 0.3}
QUICK = ("WanModularPipeline", "LTXModularPipeline")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODULAR]
)
def test_modular_pipelines(name):
    pipe = small_modular(name)
    cls, plain = type(pipe), run_modular(pipe, steps=4)
    with heterostep.enabled(pipe, share=1.0):
        assert equal(run_modular(pipe, steps=4), plain)
    for options in (SINGLE, {"share": 0.5}):
        with heterostep.enabled(pipe, **options):
            half = run_modular(pipe, steps=STEPS)
            assert heterostep.report(pipe).share.achieved == pytest.approx(0.5, abs=0.001)
            assert equal(run_modular(pipe, steps=STEPS), half)
    assert type(pipe) is cls and equal(run_modular(pipe, steps=4), plain)


SKIP = LayerSkipConfig([1], fqn="auto")
GUIDERS = {
    "zero*": lambda: ClassifierFreeZeroStarGuidance(3.0),
    "projected": lambda: AdaptiveProjectedGuidance(3.0),
    "tangential": lambda: TangentialClassifierFreeGuidance(3.0),
    "late": lambda: ClassifierFreeGuidance(3.0, start=0.5),
    "auto": lambda: AutoGuidance(3.0, auto_guidance_config=SKIP),
    "skip-layer": lambda: SkipLayerGuidance(3.0, skip_layer_config=SKIP, skip_layer_guidance_stop=0.5),
}


@pytest.mark.parametrize(
    "guider",
    [name if name in ("late", "skip-layer") else pytest.param(name, marks=pytest.mark.slow) for name in GUIDERS],
)
def test_guiders(guider):
    """Whose branches come and go, are combined in other ways than a sum, or leave layers out."""
    pipe = small_modular("WanModularPipeline", guider=GUIDERS[guider]())
    rows = []
    pipe.transformer.proj_out.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:2].numel()))
    plain = run_modular(pipe, steps=STEPS)
    dense = sum(rows)
    with heterostep.enabled(pipe, share=1.0):
        assert equal(run_modular(pipe, steps=STEPS), plain)
    for options in (SINGLE, {"share": 0.5}):
        with heterostep.enabled(pipe, **options):
            rows.clear()
            half = run_modular(pipe, steps=STEPS)
            report, made = heterostep.report(pipe), sum(rows) / dense
            assert report.finished and report.share.achieved == pytest.approx(made, abs=0.001)
            # Half of the steps; those with more branches count for more.
            changes = guider in ("late", "skip-layer")
            assert 0.4 < made < 0.6 if changes else made == pytest.approx(0.5, abs=0.001)
            assert sum(report.active_share) / STEPS == pytest.approx(0.5, abs=0.001) and report.share.unspent == 0
            assert equal(run_modular(pipe, steps=STEPS), half)
    assert equal(run_modular(pipe, steps=STEPS), plain)


class Handover(ClassifierFreeGuidance):
    """The second call of a step is made with the prompt at first, then without."""

    def prepare_inputs_from_block_state(self, data, input_fields):
        batches = super().prepare_inputs_from_block_state(data, input_fields)
        if self._step < 6:
            batches[1] = self._prepare_batch_from_block_state(input_fields, data, 0, "pred_uncond")
        return batches


def test_a_call_that_becomes_another_starts_anew():
    """Nothing is held of the prompt's velocity for the call without one."""
    pipe = small_modular("WanModularPipeline", guider=Handover(3.0))
    calls = []
    with heterostep.enabled(pipe, share=[1.0] * 4 + [0.0] * 6 + [1.0] * 2):
        wrapped = inspect(pipe).experts[0].wrapped
        inner = wrapped.inner
        wrapped.inner = lambda **inputs: calls.append(inputs["encoder_hidden_states"]) or inner(**inputs)
        run_modular(pipe, steps=STEPS)
        wrapped.inner = inner
    # Eight calls of four dense steps, the new call's first, four of the last two.
    assert len(calls) == 8 + 1 + 4
    assert not torch.equal(calls[8], calls[7])


def test_what_is_no_supported_modular_pipeline_is_one_line():
    from diffusers import ModularPipeline
    from diffusers.modular_pipelines import FluxModularPipeline

    assert issubclass(FluxModularPipeline, ModularPipeline)
    with pytest.raises(HeterostepError, match="FluxModularPipeline with no transformer is not supported") as error:
        heterostep.enable(FluxModularPipeline(), share=0.5)
    assert "\n" not in str(error.value)
    pipe = small_modular("WanModularPipeline")
    with pytest.raises(HeterostepError, match="needs the usual pipeline in place of WanModularPipeline") as error:
        heterostep.plan(pipe, height=64, width=64, num_frames=9, num_inference_steps=8, share=0.5)
    assert "\n" not in str(error.value)
