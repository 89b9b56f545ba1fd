"""Configurations of published checkpoints: what a plan needs to know of them, without network and weights.

One JSON file for each, named after its short name. Architectures and schedulers are those of diffusers' conversion
scripts (`convert_wan_to_diffusers.py`, `convert_ltx2_to_diffusers.py`), the text encoders google/umt5-xxl and
google/gemma-3-12b-it, the image encoder laion/CLIP-ViT-H-14-laion2B-s32B-b79K; the defaults are those of the authors'
commands (Wan-Video/Wan2.1, Wan-Video/Wan2.2) and of diffusers' documentation. Wan's flow_shift is the one that the
scripts save; for 720p and Wan 2.2 the authors' commands set a larger one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heterostep.errors import HeterostepError, first_line

# A class's name, under "class", beside what that class is configured with.
Component = dict[str, Any]

DEFAULTS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
# diffusers' LTX-2 pipelines leave the number of frames open, and take this one where no part predicts it.
OPEN_NUM_FRAMES = 121
REQUIRED = ("transformer", "vae", "text_encoder")
OPTIONAL = ("transformer_2", "image_encoder")
# Wan pipelines saved by earlier versions of diffusers do not name these.
WAN_CONFIG = {"boundary_ratio": None, "expand_timesteps": False}
# Where classes are looked up; LTX-2's smaller parts live beside their pipeline.
HOMES = ("diffusers", "transformers", "diffusers.pipelines.ltx2")
# Written into transformers' files beside the architecture, and no part of it.
BOOKKEEPING = ("architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class Configuration:
    """A pipeline's parts and its usual settings.

    repository: the hub id, or the folder that it was read from.
    defaults: height and width in pixels, num_frames, num_inference_steps, guidance_scale; None where a folder's
        pipeline leaves one open.
    pipeline_config: the pipeline's own options; for Wan, boundary_ratio (share of the timesteps, 0..1, from which on
        transformer runs rather than transformer_2) and expand_timesteps (a timestep per token).
    """

    repository: str
    pipeline: str
    defaults: dict[str, Any]
    pipeline_config: dict[str, Any]
    scheduler: Component
    transformer: Component
    transformer_2: Component | None
    vae: Component
    text_encoder: Component
    image_encoder: Component | None
    others: dict[str, Component]

    def models(self) -> dict[str, Component]:
        """Every part that has weights, by its name in the pipeline."""
        parts = {name: getattr(self, name) for name in (*REQUIRED, *OPTIONAL)} | self.others
        return {name: part for name, part in parts.items() if part is not None}


def names() -> tuple[str, ...]:
    """The short names of the bundled configurations, sorted."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.json")))


def load(model: str | os.PathLike[str]) -> Configuration:
    """The configuration of a bundled short name, of a bundled checkpoint's hub id, or of a local diffusers folder.

    Names and ids are taken in upper and lower case alike, and go before folders. Of a folder, only its JSON files are
    read; its defaults are those of its pipeline's call.

    Raises:
        HeterostepError: it is none of these, or a folder whose files are missing or damaged.
    """
    wanted = os.fspath(model)
    for name in names():
        content = _read_json(Path(__file__).with_name(f"{name}.json"))
        if wanted.lower() in (name, content["repository"].lower()):
            return Configuration(**content)
    if os.path.isdir(wanted):
        return _read_folder(Path(wanted))
    raise HeterostepError(
        f"{wanted} is neither a diffusers folder nor a bundled configuration, and nothing is downloaded: give its "
        f"folder, or one of {', '.join(names())}"
    )


def build(
    component: Component, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "meta"
) -> torch.nn.Module:
    """The component with all weights in `dtype`: without memory on the meta device, or random ones on another.

    Loading real weights keeps a few in float32 whatever is asked: in Wan's transformers 0.2 % of them.

    Raises:
        HeterostepError: neither diffusers nor transformers has the class, or it does not take this configuration.
    """
    cls = _find_class(component["class"])
    config = {name: value for name, value in component.items() if name != "class"}
    default = torch.get_default_dtype()
    try:
        # Made in their dtype: a large model in float32 might not fit.
        torch.set_default_dtype(dtype)
        with torch.device(device):
            # A diffusers model takes a dict, one of transformers an object.
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class.from_dict(config))
    except Exception as error:
        # A configuration that does not fit fails anywhere in the model's making.
        raise HeterostepError(f"cannot build {component['class']} as configured: {first_line(error)}") from error
    finally:
        torch.set_default_dtype(default)
    # diffusers' own `to` logs that it casts what loading would keep in float32.
    return torch.nn.Module.to(model, dtype).eval()


def parameter_bytes(component: Component, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the component's parameters in `dtype`; those that are shared count once.

    Raises:
        HeterostepError: as `build` does.
    """
    return _parameter_bytes(json.dumps(component), dtype)


@functools.lru_cache(maxsize=64)
def _parameter_bytes(component: str, dtype: torch.dtype) -> int:
    # To build a model of all parts only to count them takes seconds, and a page or a service plans many times.
    return sum(parameter.nbytes for parameter in build(json.loads(component), dtype).parameters())


def _find_class(name: str) -> Any:
    for home in HOMES:
        found = getattr(importlib.import_module(home), name, None)
        if found is not None:
            return found
    raise HeterostepError(f"neither diffusers nor transformers has a {name}: a newer version may")


def _read_folder(folder: Path) -> Configuration:
    if not (folder / "model_index.json").exists():
        raise HeterostepError(f"{folder} has no model_index.json: give the folder of a diffusers pipeline")
    index = _read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise HeterostepError(f"{folder / 'model_index.json'} is damaged: it names no pipeline")
    classes: dict[str, str | None] = {}
    options: dict[str, Any] = dict(WAN_CONFIG) if pipeline.startswith("Wan") else {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str | None) for part in value):
            # The library and the class; [null, null] is a part that the pipeline does without.
            classes[name] = value[1]
        elif not name.startswith("_"):
            options[name] = value
    for name in ("scheduler", *REQUIRED):
        if classes.get(name) is None:
            raise HeterostepError(f"{folder / 'model_index.json'} names no {name}")

    parts: dict[str, Component | None] = dict.fromkeys(OPTIONAL)
    others: dict[str, Component] = {}
    for name, kind in classes.items():
        if kind is None:
            continue
        file = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        if name in ("scheduler", *REQUIRED, *OPTIONAL):
            parts[name] = _read_component(file, kind)
        elif file.exists():
            # Tokenizers and image processors have none.
            others[name] = _read_component(file, kind)
    return Configuration(
        repository=str(folder),
        pipeline=pipeline,
        defaults=call_defaults(pipeline),
        pipeline_config=options,
        others=others,
        **parts,  # type: ignore[arg-type]
    )


def _read_component(file: Path, kind: str) -> Component:
    config = _read_json(file)
    return {"class": kind} | {k: v for k, v in config.items() if not k.startswith("_") and k not in BOOKKEEPING}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HeterostepError(f"cannot read {path}: {error.strerror or first_line(error)}") from error
    except ValueError as error:
        raise HeterostepError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise HeterostepError(f"{path} is damaged: it holds no object")
    return content


def call_defaults(pipeline: str) -> dict[str, Any]:
    """The defaults of a diffusers pipeline's call, by the names in `DEFAULTS`; None where it leaves one open.

    Raises:
        HeterostepError: diffusers has no such pipeline.
    """
    import diffusers

    cls = getattr(diffusers, pipeline, None)
    if cls is None:
        raise HeterostepError(f"diffusers {diffusers.__version__} has no {pipeline}: a newer version may")
    parameters = inspect.signature(cls.__call__).parameters
    defaults = {name: parameters[name].default if name in parameters else None for name in DEFAULTS}
    if "num_frames" in parameters and defaults["num_frames"] is None:
        defaults["num_frames"] = OPEN_NUM_FRAMES
    return defaults
