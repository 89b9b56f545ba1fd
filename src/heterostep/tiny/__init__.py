"""The bundled model: a small Wan 2.2 TI2V-style pipeline, trained on a procedural world (`recipes/tiny`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heterostep.errors import HeterostepError

WEIGHTS = Path(__file__).parent / "weights"
DEFAULTS: dict[str, Any] = {"height": 192, "width": 192, "num_frames": 33, "fps": 16, "guidance_scale": 4.0}


def generation_options() -> dict[str, Any]:
    """What the bundled model wants in a pipeline call: sizes and guidance; arrays as output."""
    return {k: v for k, v in DEFAULTS.items() if k != "fps"} | {"output_type": "np"}


def load(image_to_video: bool = False, path: Path | None = None) -> Any:
    """The bundled pipeline in float32 on the CPU: a `WanPipeline`, or a `WanImageToVideoPipeline` of the same weights.

    Args:
        image_to_video: generate from a first frame and a caption instead of a caption alone.
        path: another pipeline folder of the same make, such as the recipe writes.

    Raises:
        HeterostepError: the weights are not there.
    """
    import torch
    from diffusers import WanImageToVideoPipeline, WanPipeline

    folder = path or WEIGHTS
    if not (folder / "model_index.json").is_file():
        raise HeterostepError(f"no pipeline in {folder}: reinstall heterostep, or train it with recipes/tiny")
    # Kept in half precision on disk; the CPU computes in single.
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    if image_to_video:
        parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")}
        pipe = WanImageToVideoPipeline(
            **parts, image_encoder=None, image_processor=None, transformer_2=None, expand_timesteps=True
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def __getattr__(name: str) -> Any:
    # The world needs NumPy alone; `heterostep.tiny.world` works without importing it first.
    if name == "world":
        import importlib

        return importlib.import_module("heterostep.tiny.world")
    raise AttributeError(f"module 'heterostep.tiny' has no attribute {name!r}")
