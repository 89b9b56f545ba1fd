"""What a generation calls its transformer with, found without weights, memory or network.

The real diffusers pipeline runs on the meta device, where tensors have shapes and no values, to the end of its first
denoising step. What encodes text, images and videos does not run: only the shape of its output is of interest. Neither
does the transformer: its velocities have its input's shape.

Shapes: B videos, F frames, H and W pixels; b images, L states of a text or an image, D values of a state.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from PIL import Image

from heterostep import compat, configs
from heterostep.configs import Configuration
from heterostep.errors import HeterostepError, first_line
from heterostep.models import FAMILIES, known_checkpoints
from heterostep.pipeline import plain_class, supported, transformers

# The parts that a dry run asks for anything; a pipeline takes None for the others.
NEEDED = ("transformer", "transformer_2", "vae", "audio_vae", "connectors")
# The arguments by which pipelines are given frames that the video continues.
GIVEN = ("image", "conditions")


@dataclass(frozen=True)
class DryRun:
    """One denoising step's transformer calls.

    Attributes:
        pipe: the pipeline on the meta device, as its call left it; encoders of text and images are None.
        model: the transformer that is called, on the meta device.
        calls: the arguments of each call, in order, by the names in the forward's signature; every tensor is on meta.
        from_frames: whether the video continues given frames, which a run reads from its calls' values.
        first: the scheduler's step that this is; above 0 where a pipeline begins with a video (video-to-video).
    """

    pipe: Any
    model: torch.nn.Module
    calls: list[dict[str, Any]]
    from_frames: bool = False
    first: int = 0


def dry_run(
    configuration: Configuration,
    *,
    height: int,
    width: int,
    num_frames: int,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    image_to_video: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    **options: Any,
) -> DryRun:
    """The first denoising step of a configuration's pipeline, or of its image-to-video sibling.

    Args:
        height, width: pixels.
        num_frames: frames, num_inference_steps: denoising steps.
        guidance_scale: None for the pipeline's default.
        image_to_video: from a first frame, for what makes videos from text as well.
        dtype: of all weights.
        batch: prompts, each for one video.
        options: more arguments of the pipeline's call. Images may be of any size; their pixels are not looked at.

    Raises:
        HeterostepError: the pipeline is not supported, has no such sibling, or refuses the arguments.
    """
    pipe = meta_pipeline(configuration, image_to_video, dtype)
    # A file holds only what differs from its class's defaults; built, the encoder has all of its configuration.
    image_encoder = None if configuration.image_encoder is None else configs.build(configuration.image_encoder).config
    return _dry_run(
        pipe,
        image_encoder,
        dict(height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps),
        guidance_scale,
        batch,
        options,
    )


def meta_pipeline(
    configuration: Configuration, image_to_video: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A configuration's pipeline on the meta device, or its image-to-video sibling; encoders are None.

    Raises:
        HeterostepError: the pipeline is not supported, or has no such sibling.
    """
    name = _pipeline_name(configuration, image_to_video)
    _check_support(name, configuration.transformer["class"])
    cls = getattr(diffusers, name)
    models = configuration.models()
    accepted = list(inspect.signature(cls.__init__).parameters)[1:]
    parts: dict[str, Any] = {part: None for part in accepted if part not in configuration.pipeline_config}
    parts |= {part: configs.build(models[part], dtype) for part in NEEDED if part in accepted and part in models}
    scheduler = {key: value for key, value in configuration.scheduler.items() if key != "class"}
    parts["scheduler"] = getattr(diffusers, configuration.scheduler["class"]).from_config(scheduler)
    if "guider" in parts:
        parts["guider"] = diffusers.ClassifierFreeGuidance()
    return cls(**parts, **{key: value for key, value in configuration.pipeline_config.items() if key in accepted})


def dry_run_pipeline(
    pipe: Any,
    *,
    height: int,
    width: int,
    num_frames: int,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    dtype: torch.dtype | None = None,
    batch: int = 1,
    **options: Any,
) -> DryRun:
    """As `dry_run`, of a pipeline as it is loaded; it is left as it was.

    Its models are rebuilt from their configurations: what was changed on them since (LoRA, quantisation, attention
    backends) is not in the dry run. None for `dtype` is each model's own, None for `guidance_scale` the pipeline's
    default or its guider's scale.

    Raises:
        HeterostepError: the pipeline is not supported, or refuses the arguments.
    """
    models = transformers(pipe)
    _check_support(type(pipe).__name__, " and ".join(sorted({type(model).__name__ for model in models})))
    image_encoder = getattr(pipe, "image_encoder", None)
    # A copy keeps what was set on the pipeline beside its parts, such as the lengths that prompts are padded to.
    # Also of an enabled one, which cannot be copied as it is.
    twin = object.__new__(plain_class(pipe))
    twin.__dict__.update(pipe.__dict__)
    for name, part in pipe.components.items():
        if name in NEEDED and part is not None:
            component = {**part.config, "class": type(part).__name__}
            setattr(twin, name, configs.build(component, dtype or part.dtype))
        elif isinstance(part, torch.nn.Module):
            # On another device it would decide where the pipeline makes its tensors.
            setattr(twin, name, None)
    twin.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    twin.video_processor = copy.copy(pipe.video_processor)
    if getattr(pipe, "guider", None) is not None:
        twin.guider = copy.deepcopy(pipe.guider)
    return _dry_run(
        twin,
        None if image_encoder is None else image_encoder.config,
        dict(height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps),
        guidance_scale,
        batch,
        options,
    )


def _pipeline_name(configuration: Configuration, image_to_video: bool) -> str:
    name = configuration.pipeline
    kind = known_checkpoints().get(name)
    if not image_to_video:
        return name if kind is None else kind.text or name
    if kind is not None and kind.image is not None:
        name = kind.image
    text_alone = configuration.pipeline == "WanPipeline" and not configuration.pipeline_config["expand_timesteps"]
    if text_alone or "ImageToVideo" not in name:
        raise HeterostepError(
            f"{configuration.repository} ({configuration.pipeline}) does not take a first frame: plan "
            "text-to-video, or another model"
        )
    return name


def _check_support(pipeline: str, transformer: str) -> None:
    if transformer not in FAMILIES or pipeline not in FAMILIES[transformer].pipelines:
        known, transformer = ", ".join(supported()), transformer or "no transformer"
        raise HeterostepError(f"{pipeline} with {transformer} is not supported; supported are {known}")


class _StepDone(Exception):
    """The denoising step has made all its calls."""


def _dry_run(
    pipe: Any,
    image_encoder: Any,
    sizes: dict[str, int],
    guidance_scale: float | None,
    batch: int,
    options: dict[str, Any],
) -> DryRun:
    """Call a meta pipeline. `image_encoder` is the configuration of the encoder that it goes without."""
    for name, value in {**sizes, "batch": batch}.items():
        if value < 1:
            # What pipelines say to these is about an index or a shape.
            raise HeterostepError(f"{name} must be at least 1, not {value}")
    arguments = _arguments(pipe, sizes, guidance_scale, batch, options)
    calls: list[tuple[torch.nn.Module, dict[str, Any]]] = []

    def end_step(*args: Any, **kwargs: Any) -> None:
        raise _StepDone

    pipe.set_progress_bar_config(disable=True)
    # Pipelines make some of their tensors where torch's default is: an image's mask has as many frames as the video.
    with torch.device("meta"), contextlib.ExitStack() as stack:
        for owner, name, value in (
            *((model, "forward", _recorder(model, calls)) for model in transformers(pipe)),
            (pipe.scheduler, "step", end_step),
            *_stand_ins(pipe, image_encoder),
        ):
            stack.enter_context(_replaced(owner, name, value))
        try:
            pipe(**arguments)
        except _StepDone:
            pass
        except Exception as error:
            # Pipelines check what they are given in many places and ways.
            raise HeterostepError(f"{type(pipe).__name__} refuses this: {first_line(error)}") from error
    if not calls:
        raise HeterostepError(f"{type(pipe).__name__} has no step to make: give it more steps or strength")
    from_frames = any(arguments.get(name) is not None for name in GIVEN)
    return DryRun(pipe, calls[0][0], [inputs for _, inputs in calls], from_frames, compat.scheduler_step(pipe))


def _arguments(
    pipe: Any, sizes: dict[str, int], guidance_scale: float | None, batch: int, options: dict[str, Any]
) -> dict[str, Any]:
    """What the pipeline is called with: what of this it takes, stand-ins for prompts and images, and the options."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    model = transformers(pipe)[0]
    asked: dict[str, Any] = dict(sizes)
    if guidance_scale is not None:
        asked["guidance_scale"] = guidance_scale
        if getattr(pipe, "guider", None) is not None:
            pipe.guider.guidance_scale = guidance_scale
    # A pixel is a byte, and all frames are this one.
    image = Image.new("L", (sizes["width"], sizes["height"]))
    # LTX-2 would compress the image as a video. Without a step to make, pipelines would go on to decode.
    asked |= dict(image=image, image_crf=0, output_type="latent")
    if model.config.get("pos_embed_seq_len") is not None:
        # Wan's first-and-last-frame transformer has a place for each state of two images.
        asked["last_image"] = image
    if "num_frames" not in accepted:
        # Video-to-video makes as many frames as it is given.
        asked["video"] = [image] * sizes["num_frames"]

    arguments = {name: parameter.default for name, parameter in accepted.items()}
    arguments |= {name: value for name, value in options.items() if value is not None}
    prompts = FAMILIES[type(model).__name__].adapter.prompt_shapes(pipe, model, arguments)
    for name, (*shape, dtype) in prompts.items():
        asked[name] = torch.empty((batch, *shape), dtype=dtype, device="meta")
        # Taken for no prompt as well; without guidance the pipeline does not look at it.
        asked.setdefault(f"negative_{name}", asked[name])
    return {name: value for name, value in asked.items() if name in accepted} | options


def _recorder(model: Any, calls: list[tuple[torch.nn.Module, dict[str, Any]]]) -> Callable[..., tuple]:
    """A forward that notes its arguments, and gives velocities in the shape of the model's input."""
    signature = inspect.signature(type(model).forward)

    def velocity(sample: torch.Tensor, channels: int) -> torch.Tensor:
        shape = list(sample.shape)
        # [B, C, F, H, W], or tokens [B, N, C].
        shape[1 if sample.ndim == 5 else 2] = channels
        return torch.empty(shape, dtype=sample.dtype, device="meta")

    def forward(*args: Any, **kwargs: Any) -> tuple:
        inputs = dict(signature.bind(model, *args, **kwargs).arguments)
        inputs.pop("self")
        on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        calls.append((model, on_meta))
        config = model.config
        video = velocity(inputs["hidden_states"], config.out_channels or config.in_channels)
        if inputs.get("audio_hidden_states") is None:
            return (video,)
        return video, velocity(inputs["audio_hidden_states"], config.audio_out_channels or config.audio_in_channels)

    return forward


def _stand_ins(pipe: Any, image_encoder: Any) -> list[tuple[Any, str, Any]]:
    """What the pipeline does on the way to its transformer that meta tensors cannot, or that takes long: (owner, name,
    what to do instead).
    """
    family = type(transformers(pipe)[0]).__name__
    processor, scheduler, vae = pipe.video_processor, pipe.scheduler, pipe.vae
    strides = (
        (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial)
        if hasattr(pipe, "vae_scale_factor_spatial")
        else (pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio)
    )

    def preprocess(image: Any, height: int | None = None, width: int | None = None, **kwargs: Any) -> torch.Tensor:
        """Images [b, 3, H, W]; the pipeline's own would make them in memory."""
        images = image if isinstance(image, list) else [image]
        size = processor.get_default_height_width(images[0], height, width)
        return torch.empty((len(images), 3, *size), device="meta")

    def encode(pixels: torch.Tensor, *args: Any, **kwargs: Any) -> SimpleNamespace:
        """Latents of [B, 3, F, H, W]; Wan's autoencoder would go through the frames four by four."""
        temporal, spatial = strides
        batch, _, frames, height, width = pixels.shape
        channels = vae.config.get("z_dim") or vae.config.latent_channels
        shape = batch, channels, (frames - 1) // temporal + 1, height // spatial, width // spatial
        return SimpleNamespace(latents=pixels.new_empty(shape))

    stand_ins: list[tuple[Any, str, Any]] = [(processor, "preprocess", preprocess), (vae, "encode", encode)]
    if hasattr(scheduler, "add_noise"):

        def add_noise(latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            """A video's latents with noise on them; the scheduler would look the timestep up by its value."""
            return latents

        stand_ins.append((scheduler, "add_noise", add_noise))

    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        # Plans are made of the sigmas' values, and some schedulers make floats of them.
        with torch.device("cpu"):
            type(scheduler).set_timesteps(scheduler, *args, **{**kwargs, "device": "cpu"})
        if not family.startswith("Wan"):
            # Wan 2.2 chooses one of its transformers by the timestep's value.
            scheduler.timesteps = scheduler.timesteps.to("meta")

    stand_ins.append((scheduler, "set_timesteps", set_timesteps))
    if family.startswith("Wan") and image_encoder is not None:

        def encode_clip_image(image: Any, device: Any = None) -> torch.Tensor:
            """States [b, L, D] of one image or several: one for each patch, and the class."""
            images = len(image) if isinstance(image, list) else 1
            states = (image_encoder.image_size // image_encoder.patch_size) ** 2 + 1
            return torch.empty((images, states, image_encoder.hidden_size), device="meta")

        stand_ins.append((pipe, "encode_image", encode_clip_image))
    if family.startswith("Hunyuan") and hasattr(pipe, "encode_image"):

        def encode_siglip_image(image: Any, batch_size: int, device: Any, dtype: torch.dtype) -> torch.Tensor:
            """States [B, L, D] of one image."""
            shape = batch_size, pipe.vision_num_semantic_tokens, pipe.vision_states_dim
            return torch.empty(shape, dtype=dtype, device="meta")

        stand_ins.append((pipe, "encode_image", encode_siglip_image))
    return stand_ins


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An object's method replaced by another; its class's comes back."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
