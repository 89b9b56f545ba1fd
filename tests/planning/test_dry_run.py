"""Rehearsals against real generations' first step, at the size of every bundled configuration, and without memory."""

import inspect
import math

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heterostep import compat, configs
from heterostep.errors import HeterostepError
from heterostep.models import FAMILIES
from heterostep.planning.dry_run import dry_run, dry_run_pipeline
from rows import ROWS, quickly, transformers
from small_ltx2 import small_ltx2
from small_wan import FRAMES, SIZE, run_wan, small_wan

STEPS = 4
SIZES = dict(height=SIZE, width=SIZE, num_frames=FRAMES, num_inference_steps=STEPS)
# What a dry run fills in for itself.
STAND_INS = ("prompt", "image", "last_image", "generator", "output_type", "return_dict")

# At its default size: the pipeline, calls with guidance, hidden_states of the first.
BUNDLED = {
    ("ltx-2", False): ("LTX2Pipeline", 3, (2, 6144, 128)),
    ("ltx-2", True): ("LTX2ImageToVideoPipeline", 3, (2, 6144, 128)),
    ("ltx-2.3", False): ("LTX2Pipeline", 3, (2, 6144, 128)),
    ("ltx-2.3", True): ("LTX2ImageToVideoPipeline", 3, (2, 6144, 128)),
    ("wan2.1-flf2v-14b-720p", False): ("WanImageToVideoPipeline", 2, (1, 36, 21, 90, 160)),
    ("wan2.1-i2v-14b-480p", False): ("WanImageToVideoPipeline", 2, (1, 36, 21, 60, 104)),
    ("wan2.1-i2v-14b-720p", True): ("WanImageToVideoPipeline", 2, (1, 36, 21, 90, 160)),
    ("wan2.1-t2v-1.3b", False): ("WanPipeline", 2, (1, 16, 21, 60, 104)),
    ("wan2.1-t2v-14b", False): ("WanPipeline", 2, (1, 16, 21, 90, 160)),
    ("wan2.1-vace-1.3b", False): ("WanVACEPipeline", 2, (1, 16, 21, 60, 104)),
    ("wan2.1-vace-14b", False): ("WanVACEPipeline", 2, (1, 16, 21, 90, 160)),
    ("wan2.2-i2v-a14b", False): ("WanImageToVideoPipeline", 2, (1, 36, 21, 90, 160)),
    ("wan2.2-t2v-a14b", False): ("WanPipeline", 2, (1, 16, 21, 90, 160)),
    ("wan2.2-ti2v-5b", False): ("WanPipeline", 2, (1, 48, 31, 44, 80)),
    ("wan2.2-ti2v-5b", True): ("WanImageToVideoPipeline", 2, (1, 48, 31, 44, 80)),
}
LARGEST = 64 * 1024


class Stop(Exception):
    pass


class NothingLarge(TorchDispatchMode):
    """Fails on a tensor of more than LARGEST bytes that is not on the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                assert x.nbytes <= LARGEST, f"{func} makes {tuple(x.shape)} on {x.device}"
        return result


def first_step(row, pipe, monkeypatch, **options):
    """What a real run of a row calls its pipeline with, and its transformers up to the scheduler's first step."""
    arguments, calls, outputs = {}, [], []

    def called(self, **kwargs):
        arguments.update(kwargs)
        return original(self, **kwargs)

    def stop(*args, **kwargs):
        raise Stop

    original = type(pipe).__call__
    hooks = []
    for model in transformers(pipe):
        hooks += [
            model.register_forward_pre_hook(lambda model, args, kwargs: calls.append((args, kwargs)), with_kwargs=True),
            model.register_forward_hook(lambda model, args, output: outputs.append(output)),
        ]
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "__call__", called)
        patch.setattr(pipe.scheduler, "step", stop, raising=False)
        with pytest.raises(Stop):
            row.run(pipe, steps=STEPS, **options)
    for hook in hooks:
        hook.remove()
    assert calls and not any(args for args, _ in calls)
    return arguments, [kwargs for _, kwargs in calls], outputs


def described(value):
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


def rehearse_as(pipe, arguments, **options):
    """Rehearse with the arguments of a real call but for what a dry run fills in."""
    kept = {name: value for name, value in arguments.items() if name not in STAND_INS}
    return dry_run_pipeline(pipe, **{**SIZES, **kept, **options})


def assert_like(rehearsal, calls, outputs):
    assert len(rehearsal.calls) == len(calls)
    for rehearsed, real in zip(rehearsal.calls, calls, strict=True):
        assert {k: described(v) for k, v in rehearsed.items()} == {k: described(v) for k, v in real.items()}
        assert {x.device.type for x in rehearsed.values() if isinstance(x, torch.Tensor)} == {"meta"}
    if type(rehearsal.model).__name__ == "HunyuanVideo15Transformer3DModel":
        # Its forward asks for its inputs' values, which meta tensors do not have.
        return
    # The model is left able to run what it was called with.
    with torch.no_grad():
        again = rehearsal.model(**rehearsal.calls[-1])
    assert [described(x) for x in again] == [described(x) for x in outputs[-1]]


@pytest.mark.parametrize("name", quickly(ROWS))
def test_calls_are_those_of_a_real_first_step(name, monkeypatch):
    row = ROWS[name]
    pipe = row.build()
    arguments, calls, outputs = first_step(row, pipe, monkeypatch)
    before, config = dict(vars(pipe)), dict(pipe.config)
    devices = {part: next(model.parameters()).device for part, model in pipe.components.items() if is_model(model)}
    state = {part: set(vars(pipe.components[part])) for part in ("scheduler", "vae", "transformer")}
    rehearsal = rehearse_as(pipe, arguments)
    assert_like(rehearsal, calls, outputs)
    assert type(rehearsal.pipe) is type(pipe)
    # What a run's plan is made of.
    adapter = FAMILIES[type(rehearsal.model).__name__].adapter
    assert rehearsal.from_frames is adapter.is_image_conditioned(transformers(pipe)[0], calls[0])
    assert rehearsal.first == compat.scheduler_step(pipe) == (1 if name == "wan2.1-v2v" else 0)
    assert torch.equal(rehearsal.pipe.scheduler.sigmas, pipe.scheduler.sigmas)
    assert all(parameter.is_meta for parameter in rehearsal.model.parameters())
    # Nothing stands in for a method any more, and what the two pipelines share was never changed.
    own = rehearsal.pipe
    for part, method in (
        (rehearsal.model, "forward"),
        (own.scheduler, "step"),
        (own.vae, "encode"),
        (own.video_processor, "preprocess"),
        (own, "encode_image"),
    ):
        assert method not in vars(part)
    assert own.video_processor is not pipe.video_processor and own.scheduler is not pipe.scheduler
    # And the pipeline is what it was.
    assert dict(vars(pipe)) == before and dict(pipe.config) == config
    assert {part: next(pipe.components[part].parameters()).device for part in devices} == devices
    assert {part: set(vars(pipe.components[part])) for part in state} == state


def is_model(part):
    return isinstance(part, torch.nn.Module)


def test_every_supported_pipeline_is_covered():
    # Modular pipelines are refused (`test_modular.py`).
    supported = {name for family in FAMILIES.values() for name in family.pipelines if "Modular" not in name}
    assert {type(row.build()).__name__ for row in ROWS.values()} == supported


@pytest.mark.parametrize("name", ["wan2.1-t2v", "wan2.2-i2v", "wan2.2-ti2v-i2v", "ltx0.9-t2v", "ltx2.3-i2v"])
def test_guidance_off_and_another_size(name, monkeypatch):
    row = ROWS[name]
    pipe = row.build()
    off = dict(guidance_scale=1.0, **row.larger)
    if name.startswith("ltx2"):
        off |= dict(audio_guidance_scale=1.0, stg_scale=0.0, audio_stg_scale=0.0)
        off |= dict(modality_scale=1.0, audio_modality_scale=1.0)
    arguments, calls, outputs = first_step(row, pipe, monkeypatch, **off)
    rehearsal = rehearse_as(pipe, arguments)
    assert_like(rehearsal, calls, outputs)
    assert len(calls) == 1 and len(calls[0]["hidden_states"]) == 1


@pytest.mark.parametrize(("scale", "count"), [(3.0, 2), (1.0, 1)])
def test_a_guider_decides_where_there_is_one(scale, count):
    pipe = ROWS["hunyuan1.5-t2v"].build()
    pipe.guider.guidance_scale = scale
    assert len(dry_run_pipeline(pipe, **SIZES).calls) == count
    # A given scale goes before the pipeline's own, which stays.
    assert len(dry_run_pipeline(pipe, **SIZES, guidance_scale=4.0 - scale).calls) == 3 - count
    assert pipe.guider.guidance_scale == scale


def test_precision_and_batch(monkeypatch):
    row, pipe = ROWS["wan2.1-i2v"], small_wan("wan2.1-i2v").to(torch.bfloat16)
    arguments, calls, outputs = first_step(row, pipe, monkeypatch, prompt=["a red circle", "a green square"])
    assert_like(rehearse_as(pipe, arguments, batch=2), calls, outputs)
    single = rehearse_as(pipe, arguments, dtype=torch.float32).calls[0]
    assert single["hidden_states"].shape == (1, *calls[0]["hidden_states"].shape[1:])
    assert single["hidden_states"].dtype == torch.float32 != calls[0]["hidden_states"].dtype


def test_a_schedule_that_starts_with_the_second_transformer():
    pipe = small_wan("wan2.2-t2v")
    pipe.register_to_config(boundary_ratio=1.0)
    # The first timestep is just below the last of all.
    second = dry_run_pipeline(pipe, **SIZES, guidance_scale=3.0)
    assert second.model is second.pipe.transformer_2
    pipe.register_to_config(boundary_ratio=0.9)
    first = dry_run_pipeline(pipe, **SIZES, guidance_scale=3.0)
    assert first.model is first.pipe.transformer


def test_every_bundled_configuration_is_here():
    assert {name for name, _ in BUNDLED} == set(configs.names())


@pytest.mark.parametrize(
    ("name", "image"),
    quickly(
        BUNDLED,
        [
            ("ltx-2", True),
            ("wan2.1-i2v-14b-480p", False),
            ("wan2.1-t2v-1.3b", False),
            ("wan2.1-vace-1.3b", False),
            ("wan2.2-t2v-a14b", False),
            ("wan2.2-ti2v-5b", True),
        ],
    ),
)
def test_bundled_configurations_at_their_default_size(name, image):
    pipeline, count, shape = BUNDLED[name, image]
    configuration = configs.load(name)
    with NothingLarge():
        rehearsal = dry_run(configuration, **configuration.defaults, image_to_video=image)
    assert type(rehearsal.pipe).__name__ == pipeline
    assert type(rehearsal.model).__name__ == configuration.transformer["class"]
    assert rehearsal.model is rehearsal.pipe.transformer
    assert len(rehearsal.calls) == count
    first = rehearsal.calls[0]
    assert first["hidden_states"].shape == shape and first["hidden_states"].dtype == torch.bfloat16
    assert set(first) <= set(inspect.signature(type(rehearsal.model).forward).parameters)
    if name == "wan2.2-ti2v-5b":
        # A timestep per token.
        assert first["timestep"].shape == (1, 31 * 22 * 40)
    else:
        assert first["timestep"].shape == ((2, 6144) if name.startswith("ltx") and image else shape[:1])
    # CLIP's states of each image that is given; Wan 2.2 does without.
    images = {"wan2.1-i2v": 1, "wan2.1-flf2v": 2}.get("-".join(name.split("-")[:2]))
    image_states = first.get("encoder_hidden_states_image")
    assert (None if image_states is None else image_states.shape) == (images and (images, 257, 1280))
    grid = FAMILIES[type(rehearsal.model).__name__].adapter.token_grid(rehearsal.model, first)
    tokens = first["hidden_states"].shape[1] if first["hidden_states"].ndim == 3 else math.prod(shape[2:]) // 4
    assert grid.num_tokens == tokens


def test_one_call_without_guidance():
    configuration = configs.load("wan2.1-t2v-1.3b")
    assert len(dry_run(configuration, **{**configuration.defaults, "guidance_scale": 1.0}).calls) == 1


def test_a_folder_rehearses_as_its_pipeline_does(tmp_path, monkeypatch):
    row = ROWS["wan2.1-flf2v"]
    pipe = row.build()
    pipe.save_pretrained(tmp_path)
    arguments, calls, outputs = first_step(row, pipe, monkeypatch)
    sizes = {**SIZES, "guidance_scale": arguments["guidance_scale"]}
    assert_like(dry_run(configs.load(tmp_path), **sizes, dtype=torch.float32), calls, outputs)


def refusal(attempt):
    """What it is refused with, in one line."""
    with pytest.raises(HeterostepError) as error:
        attempt()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("wan2.1-i2v-14b-480p", dict(height=487), "divisible by 16 but are 487"),
        ("ltx-2", dict(width=750), "divisible by 32"),
        ("wan2.1-vace-1.3b", dict(batch=2), "more than one video is not yet supported"),
        ("wan2.1-t2v-1.3b", dict(num_inference_steps=0), "num_inference_steps must be at least 1, not 0"),
        ("wan2.1-t2v-1.3b", dict(batch=0), "batch must be at least 1, not 0"),
        ("wan2.1-t2v-1.3b", dict(image_to_video=True), "plan text-to-video, or another model"),
        ("wan2.1-vace-1.3b", dict(image_to_video=True), "plan text-to-video, or another model"),
        ("wan2.1-t2v-1.3b", dict(strenght=0.5), "strenght"),
    ],
)
def test_what_a_pipeline_refuses_is_said_in_one_line(name, options, said):
    configuration = configs.load(name)
    assert said in refusal(lambda: dry_run(configuration, **{**configuration.defaults, **options}))


def test_nothing_left_to_make_is_refused():
    pipe = small_wan("wan2.1-v2v")
    assert "more steps or strength" in refusal(lambda: dry_run_pipeline(pipe, **SIZES, strength=0.1))


def test_an_unsupported_pipeline_is_refused():
    pipe = small_wan("wan2.1-t2v")
    other = diffusers.WanAnimatePipeline
    pipe.__class__ = other
    assert "WanAnimatePipeline with WanTransformer3DModel is not supported" in refusal(
        lambda: dry_run_pipeline(pipe, **SIZES)
    )


def test_a_refusal_leaves_the_pipeline_usable():
    pipe = small_wan("wan2.1-vace")
    assert "divisible" in refusal(lambda: dry_run_pipeline(pipe, **{**SIZES, "height": SIZE + 1}))
    assert run_wan("wan2.1-vace", pipe, steps=1).isfinite().all()


def test_no_progress_bar_and_nothing_said(capfd):
    pipe = small_ltx2()
    pipe.set_progress_bar_config(disable=False)
    dry_run_pipeline(pipe, **{**SIZES, "num_frames": 17}, max_sequence_length=16)
    assert capfd.readouterr() == ("", "")
    assert pipe._progress_bar_config == {"disable": False}
