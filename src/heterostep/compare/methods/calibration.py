"""One dense run for what a method's authors measured on their checkpoints: polynomials, ratios."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

NEUTRAL_PROMPT = "a video"


calibration_options: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


_calibrations: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def calibrate_with(pipe: Any, **options: Any) -> None:
    """Tell what the pipeline's call will be given: best the comparison's own size and guidance.

    Calibration runs are given the same. Without it they are 256 x 256 x 33 at the pipeline's own guidance, which is not
    what a larger video would give; and cache-dit is not told of calls without guidance.
    """
    if calibration_options.get(pipe) != options:
        calibration_options[pipe] = options
        _calibrations.pop(pipe, None)


def dense_run(pipe: Any, num_steps: int, on_step: Callable[[], None] = lambda: None) -> None:
    """One dense generation of the neutral prompt, from a neutral image or video where the pipeline takes one."""

    def after_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return {}

    parameters = inspect.signature(type(pipe).__call__).parameters
    options = {"height": 256, "width": 256, "num_frames": 33, **calibration_options.get(pipe, {})}
    ramp = np.linspace(64, 192, options["width"]).astype(np.uint8)
    image = Image.fromarray(np.repeat(ramp[None, :, None], options["height"], 0).repeat(3, 2))
    if "Image" in type(pipe).__name__ and "image" in parameters:
        options.setdefault("image", image)
        if getattr(pipe.transformer or pipe.transformer_2, "config", {}).get("pos_embed_seq_len") is not None:
            options.setdefault("last_image", image)
    if "VideoToVideo" in type(pipe).__name__:
        options.setdefault("video", [image] * options["num_frames"])
    if "callback_on_step_end" in parameters:
        options["callback_on_step_end"] = after_step
    pipe(
        **{name: value for name, value in options.items() if name in parameters},
        prompt=NEUTRAL_PROMPT,
        num_inference_steps=num_steps,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )


def calibrated(pipe: Any, key: tuple, calibrate: Callable[[], Any]) -> Any:
    """What calibrate() gives, once per pipeline, key, scheduler and number of experts."""
    known = _calibrations.setdefault(pipe, {})
    shown = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    key = (*key, repr(sorted(shown.items())), pipe.config.get("boundary_ratio"))
    if key not in known:
        known[key] = calibrate()
    return known[key]
