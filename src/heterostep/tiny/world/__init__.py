"""The procedural world that the bundled model was trained on: scenes, their pixels, their captions, and a judge."""

import numpy as np

from heterostep.tiny.world.caption import CaptionWords, ShapeWords, caption, parse, scene_from_caption
from heterostep.tiny.world.judge import Reading, SeenShape, ShapeVerdict, Verdict, judge, read
from heterostep.tiny.world.render import render
from heterostep.tiny.world.scene import NUM_FRAMES, SIZE, Background, Scene, Shape, moved, sample_scene

__all__ = [
    "NUM_FRAMES",
    "SIZE",
    "Background",
    "CaptionWords",
    "Reading",
    "Scene",
    "SeenShape",
    "Shape",
    "ShapeVerdict",
    "ShapeWords",
    "Verdict",
    "caption",
    "first_frame",
    "judge",
    "moved",
    "parse",
    "read",
    "render",
    "sample_scene",
    "scene_from_caption",
]


def first_frame(text: str, seed: int = 0) -> np.ndarray:
    """The first frame of a scene that the caption describes, uint8 [192, 192, 3].

    Raises:
        HeterostepError: the caption names no shape that this world has.
    """
    return render(scene_from_caption(text, seed), num_frames=1)[0]
