"""What the command needs to know of a model: which pipeline to load it as, its defaults, the sizes that it can make."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from heterostep import parallel
from heterostep.errors import HeterostepError, first_line
from heterostep.models import check_family, known_checkpoints
from heterostep.models.base import Checkpoint
from heterostep.models.wan import TEXT_STATES

SIZES = ("height", "width", "num_frames", "guidance_scale")
# Beside a folder's model_index.json: what it makes by default, and prompts that it was not trained on.
ABOUT = "heterostep.json"


def load(model: str, with_image: bool, precision: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A diffusers folder or hub id as a pipeline on the CPU, and its default sizes, guidance and frames per second.

    Raises:
        HeterostepError: it is no model, one that this command does not know, or cannot do what is asked; says which.
    """
    _, kind, wanted = _wanted(model, with_image)
    pipeline = getattr(diffusers, wanted)
    # Half precision in Wan's VAE shows in the pixels, and the VAE is small.
    dtype: Any = {"default": precision, "vae": torch.float32} if wanted.startswith("Wan") else precision
    try:
        pipe = pipeline.from_pretrained(model, dtype=dtype)
    except Exception as error:
        raise HeterostepError(f"cannot load {model}: {first_line(error)}", "model") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, _defaults(pipeline, kind, model)


def sibling(pipe: Any, model: str, with_image: bool) -> tuple[Any, dict[str, Any]] | None:
    """What `load` would give, on the weights of a pipeline that was loaded from the same model.

    Returns:
        None where the other pipeline has parts of its own.

    Raises:
        HeterostepError: the model cannot do what is asked.
    """
    config, kind, wanted = _wanted(model, with_image)
    pipeline = getattr(diffusers, wanted)
    parts: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(pipeline.__init__).parameters.items())[1:]:
        if name in pipe.components:
            parts[name] = pipe.components[name]
        elif name in pipe.config:
            parts[name] = pipe.config[name]
        elif parameter.default is parameter.empty or config.get(name) not in (None, [None, None]):
            return None
    made = pipeline(**parts)
    made.set_progress_bar_config(disable=True)
    return made, _defaults(pipeline, kind, model)


def _wanted(model: str, with_image: bool) -> tuple[dict[str, Any], Checkpoint, str]:
    """A model's index, its kind, and the name of the pipeline that does what is asked."""
    try:
        config = diffusers.DiffusionPipeline.load_config(model)
        name = config["_class_name"]
    except Exception as error:
        # A folder, the hub and the network fail in many ways.
        if _is_unreachable(error):
            raise HeterostepError(
                f"{model} is not a folder here, the hub cannot be reached, and it is not in its cache: check the "
                "network, or give a folder",
                "model",
            ) from error
        raise HeterostepError(f"{model} is not a diffusers folder or hub id: {first_line(error)}", "model") from error
    known = known_checkpoints()
    if name not in known:
        raise HeterostepError(
            f"{model} is a {name}, which this command does not run; it runs {', '.join(known)}. More pipelines are "
            "supported in Python: see heterostep.enable",
            "model",
        )
    kind = known[name]
    wanted = kind.image if with_image else kind.text
    if wanted is None and not with_image:
        raise HeterostepError(f"{model} makes videos from a first frame: give one", "image")
    if wanted is None or (with_image and name == "WanPipeline" and not config.get("expand_timesteps")):
        raise HeterostepError(f"{model} makes videos from text alone: leave the first frame out", "image")
    return config, kind, wanted


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether the hub's library found neither the network nor a copy that it has kept."""
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


def about(model: str) -> dict[str, Any]:
    """What a model's folder says of it in `heterostep.json`; nothing where there is no such file.

    Returns:
        "defaults": height and width (pixels), num_frames, guidance_scale and fps, any of them; "held_out": a list of
        {"prompt": text, "image": path of a first frame, relative to the folder}, image or all of it may be missing.

    Raises:
        HeterostepError: the file cannot be read, or says something else.
    """
    path = Path(model) / ABOUT
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        defaults, held_out = said.get("defaults", {}), said.get("held_out", [])
        numbers = (isinstance(value, int | float) and value > 0 for value in defaults.values())
        sound = set(defaults) <= {*SIZES, "fps"} and all(numbers) and all("prompt" in each for each in held_out)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise HeterostepError(f"{path} cannot be read: {first_line(error)}") from error
    if not sound:
        raise HeterostepError(f"{path} may have defaults ({', '.join(SIZES)}, fps) and held_out prompts, nothing else")
    return {"defaults": defaults, "held_out": held_out}


def check_gpus(model: str, gpus: int) -> None:
    """Check that so many GPUs can share a model's videos, as far as its configuration tells: no weights are loaded.

    Raises:
        HeterostepError: they cannot.
    """
    try:
        config = diffusers.DiffusionPipeline.load_config(model)
        found = {name: config[name][1] for name in ("transformer", "transformer_2") if config.get(name)}
        parts = {
            kind: getattr(diffusers, kind).load_config(model, subfolder=name) for name, kind in found.items() if kind
        }
    except Exception:
        # Loading it will tell what is wrong.
        return
    for kind, part in parts.items():
        check_family(kind)
        parallel.check_head_counts(kind, part, gpus)


def has_second_expert(model: str) -> bool | None:
    """Whether a second transformer takes over in the middle of a run; None where the configuration cannot be read."""
    try:
        config = diffusers.DiffusionPipeline.load_config(model)
    except Exception:
        # Loading it will tell what is wrong.
        return None
    return config.get("boundary_ratio") is not None and bool((config.get("transformer_2") or [None])[0])


def _defaults(pipeline: type, kind: Checkpoint, model: str) -> dict[str, Any]:
    parameters = inspect.signature(pipeline.__call__).parameters
    defaults = {size: parameters[size].default for size in SIZES} | {"fps": kind.fps}
    if defaults["num_frames"] is None:
        # LTX-2 leaves it open, for later checkpoints predict it from the prompt.
        defaults["num_frames"] = 121
    return defaults | about(model).get("defaults", {})


@dataclasses.dataclass(frozen=True)
class SizeRules:
    """The sizes that a model makes, as plain numbers that another process may have.

    multiple: what height and width (pixels) must be a multiple of; stride: what a number of frames less one must be.
    token: frames of latents, pixels in height and in width of a token; longest: tokens that an axis may have, None for
    any; they are given for Wan models alone.
    """

    multiple: int
    stride: int
    token: tuple[int, int, int] | None = None
    longest: int | None = None

    def check(self, height: int, width: int, num_frames: int) -> None:
        """Check that the model makes videos of this size (pixels, frames).

        Raises:
            HeterostepError: it does not; says which sizes it makes.
        """
        for name, value in (("height", height), ("width", width)):
            if value % self.multiple:
                message = f"{name} must be a multiple of {self.multiple} for this model, not {value}"
                raise HeterostepError(message, name)
        for name, limit, value in zip(("frames", "height", "width"), self._most(), (num_frames, height, width)):
            if value > limit:
                raise HeterostepError(f"{name} can be {limit} at the most for this model, not {value}", name)
        if num_frames != self.frames(num_frames):
            raise HeterostepError(
                f"frames must be a multiple of {self.stride} plus 1 for this model, such as "
                f"{num_frames // self.stride * self.stride + 1}, not {num_frames}",
                "frames",
            )

    def _most(self) -> tuple[float, float, float]:
        """Frames, height and width (pixels) of the largest video; infinite where that is not known."""
        if self.token is None or self.longest is None:
            return (math.inf,) * 3
        frames, pixels_high, pixels_wide = self.token
        return self.stride * (self.longest * frames - 1) + 1, self.longest * pixels_high, self.longest * pixels_wide

    def token_grid(self, height: int, width: int, num_frames: int) -> tuple[int, int, int] | None:
        """Frames, height and width in tokens of a video of this size (pixels, frames); None where that is not known."""
        if self.token is None:
            return None
        frames, pixels_high, pixels_wide = self.token
        return ((num_frames - 1) // self.stride + 1) // frames, height // pixels_high, width // pixels_wide

    def frames(self, wanted: float) -> int:
        """The number of frames that the model makes which is nearest to a wanted one."""
        return max(round((wanted - 1) / self.stride), 0) * self.stride + 1


def size_rules(pipe: Any) -> SizeRules:
    """The sizes that a pipeline makes."""
    multiple, stride = _strides(pipe)
    longest = pipe.transformer.config.get("rope_max_seq_len")
    if longest is None:
        return SizeRules(multiple, stride)
    frames, height, width = pipe.transformer.config.patch_size
    spatial = pipe.vae_scale_factor_spatial
    return SizeRules(multiple, stride, (frames, spatial * height, spatial * width), longest)


def check_sizes(pipe: Any, height: int, width: int, num_frames: int) -> None:
    """Check that the pipeline makes videos of this size (pixels, frames).

    Raises:
        HeterostepError: it does not; says which sizes it makes.
    """
    size_rules(pipe).check(height, width, num_frames)


def _strides(pipe: Any) -> tuple[int, int]:
    """What height and width must be a multiple of, and a number of frames less one."""
    if hasattr(pipe, "vae_spatial_compression_ratio"):
        return pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio
    # A token's pixels, and the 16 that Wan pipelines insist on.
    patch = pipe.transformer.config.patch_size
    patches = [
        pipe.vae_scale_factor_spatial * size for size in (patch[1:] if isinstance(patch, list | tuple) else [patch])
    ]
    return math.lcm(16, *patches), pipe.vae_scale_factor_temporal


def kv_cache_bytes(pipe: Any, height: int, width: int, num_frames: int, guidance_scale: float) -> int | None:
    """Bytes of the K and V that a Wan run keeps: every token and text state, in every layer, for each guidance branch.

    None for other families.
    """
    config, grid = pipe.transformer.config, size_rules(pipe).token_grid(height, width, num_frames)
    if grid is None:
        return None
    states = math.prod(grid) + TEXT_STATES
    values = config.num_layers * config.num_attention_heads * config.attention_head_dim
    branches = 2 if guidance_scale > 1 else 1
    return 2 * branches * states * values * pipe.transformer.dtype.itemsize
