"""diffusers' modular pipelines from the parts of the usual small ones."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from rows import ROWS
from small_wan import moving_square

# Each by its class, the row that its parts are of, the package of diffusers that it is in, and what its calls take.
MODULAR: dict[str, tuple[str, str, dict[str, Any]]] = {
    "WanModularPipeline": ("wan2.1-t2v", "wan", {}),
    "WanImage2VideoModularPipeline": ("wan2.1-i2v", "wan", {"image": True}),
    "Wan22ModularPipeline": ("wan2.2-t2v", "wan", {}),
    "Wan22Image2VideoModularPipeline": ("wan2.2-i2v", "wan", {"image": True}),
    "Wan22VaceModularPipeline": ("wan2.2-vace", "wan", {"video": True}),
    "LTXModularPipeline": ("ltx0.9-t2v", "ltx", {"num_frames": 17}),
    "LTX2ModularPipeline": ("ltx2.3-t2v", "ltx2", {"num_frames": 17}),
    "HunyuanVideo15ModularPipeline": ("hunyuan1.5-t2v", "hunyuan_video1_5", {}),
}


def small_modular(name: str, **components: Any) -> Any:
    """The modular pipeline of that class, fp32 on the CPU; `components` beside or in place of its row's."""
    row, package, _ = MODULAR[name]
    cls = getattr(importlib.import_module(f"diffusers.modular_pipelines.{package}.modular_pipeline"), name)
    pipe, usual = cls(), ROWS[row].build()
    known = {key: part for key, part in usual.components.items() if key in pipe._component_specs and part is not None}
    pipe.update_components(**{**known, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_modular(pipe: Any, steps: int = 12, seed: int = 0, **options: Any) -> tuple[torch.Tensor, ...]:
    """A generation's latents."""
    own = dict(MODULAR[type(pipe).__name__][2])
    if own.pop("image", False):
        own["image"] = moving_square()[0]
    if own.pop("video", False):
        own["video"] = moving_square()
    options = {"height": 64, "width": 64, "num_frames": 9, "output_type": "pt", **own, **options}
    generator = torch.Generator().manual_seed(seed)
    state = pipe(prompt="a red circle moving right", num_inference_steps=steps, generator=generator, **options)
    return (state.get("latents"),)
