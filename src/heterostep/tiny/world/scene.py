"""Scenes of the bundled world: what is in a clip, drawn at random or read from a caption, and where it is when.

Units: pixels of a 192 x 192 frame, frames of a 33-frame clip, radians; the y axis points down.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

SIZE = 192
NUM_FRAMES = 33

# Shapes are bright and saturated, backgrounds muted, so that a reader can tell them apart by colour alone.
SHAPE_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 40, 40),
    "yellow": (245, 220, 40),
    "green": (40, 210, 70),
    "cyan": (40, 220, 230),
    "blue": (50, 80, 245),
    "pink": (250, 70, 210),
    "white": (248, 248, 248),
}
# Two tones each: the ground and the pattern drawn on it.
BACKGROUND_COLOURS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "blue": ((38, 52, 92), (72, 92, 140)),
    "green": ((36, 72, 48), (70, 112, 80)),
    "brown": ((84, 58, 40), (128, 98, 74)),
    "purple": ((66, 46, 86), (104, 82, 128)),
    "gray": ((62, 62, 64), (112, 112, 114)),
}
KINDS = ("circle", "square", "triangle", "diamond", "ring")
PATTERNS = ("stripes", "checks", "dots", "clouds")
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
SIZES: dict[str, tuple[float, float]] = {"small": (15.0, 18.0), "": (21.0, 24.0), "large": (28.0, 32.0)}
# Pixels a frame.
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (1.0, 1.4), "": (1.9, 2.4), "quickly": (3.0, 3.6)}


@dataclass(frozen=True)
class Shape:
    """One moving shape. `centre` and `velocity` are of frame 0 (pixels, pixels a frame); `radius` in pixels."""

    colour: str
    kind: str
    direction: str
    size: str
    speed: str
    radius: float
    centre: tuple[float, float]
    velocity: tuple[float, float]

    def centres(self, num_frames: int = NUM_FRAMES, size: int = SIZE) -> np.ndarray:
        """Centres [num_frames, 2] (x, y) in pixels; the shape bounces off the frame's edges."""
        low, span = self.radius, size - 2 * self.radius
        free = np.asarray(self.centre) + np.arange(num_frames)[:, None] * np.asarray(self.velocity) - low
        # A triangle wave folds the free path into the frame: that is what bouncing off two walls does.
        return low + span - np.abs(np.mod(free, 2 * span) - span)


@dataclass(frozen=True)
class Background:
    """A two-tone pattern. `period` in pixels, `angle` in radians, `pan` in pixels a frame, `seed` shapes the clouds."""

    colour: str
    pattern: str
    period: float
    angle: float
    phase: tuple[float, float]
    pan: str
    seed: int

    def velocity(self) -> tuple[float, float]:
        """Pixels a frame that the pattern moves in the picture: the opposite of where the camera pans."""
        if not self.pan:
            return (0.0, 0.0)
        x, y = DIRECTIONS[self.pan]
        return (-0.75 * x, -0.75 * y)


@dataclass(frozen=True)
class Scene:
    """A clip's content: the background and one to three shapes, the last drawn in front."""

    background: Background
    shapes: tuple[Shape, ...]


def _place(rng: np.random.Generator, direction: str, radius: float, speed: float) -> tuple[float, float]:
    """A start from which the shape keeps its direction for most of the clip: bounces come late."""
    dx, dy = DIRECTIONS[direction]
    low, high = radius + 2, SIZE - radius - 2
    run = min(speed * NUM_FRAMES * rng.uniform(0.75, 1.1), high - low)

    def along(sign: int) -> float:
        if sign == 0:
            return rng.uniform(low, high)
        return rng.uniform(low, max(low, high - run)) if sign > 0 else rng.uniform(min(high, low + run), high)

    return (along(dx), along(dy))


def make_shape(rng: np.random.Generator, colour: str, kind: str, direction: str, size: str, speed: str) -> Shape:
    """A shape of the named attributes, its exact size, speed, heading and start drawn at random."""
    radius = rng.uniform(*SIZES[size])
    pixels_a_frame = rng.uniform(*SPEEDS[speed])
    dx, dy = DIRECTIONS[direction]
    heading = math.atan2(dy, dx) + rng.uniform(-0.12, 0.12)
    velocity = (pixels_a_frame * math.cos(heading), pixels_a_frame * math.sin(heading))
    return Shape(colour, kind, direction, size, speed, radius, _place(rng, direction, radius, pixels_a_frame), velocity)


def make_background(rng: np.random.Generator, colour: str, pattern: str, pan: str) -> Background:
    """A background of the named attributes, its scale, angle and phase drawn at random."""
    period = rng.uniform(26, 44)
    angle = rng.choice([0.0, math.pi / 4, math.pi / 2, 3 * math.pi / 4]) if pattern == "stripes" else 0.0
    phase = (rng.uniform(0, period), rng.uniform(0, period))
    return Background(colour, pattern, period, float(angle), phase, pan, int(rng.integers(2**31)))


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene at random: three in four backgrounds stand still; the shapes of one scene differ in colour."""
    background = make_background(
        rng,
        str(rng.choice(list(BACKGROUND_COLOURS))),
        str(rng.choice(PATTERNS)),
        str(rng.choice(list(DIRECTIONS))) if rng.random() < 0.25 else "",
    )
    count = int(rng.choice([1, 2, 3], p=[0.55, 0.33, 0.12]))
    colours = rng.choice(list(SHAPE_COLOURS), size=count, replace=False)
    shapes = tuple(
        make_shape(
            rng,
            str(colour),
            str(rng.choice(KINDS)),
            str(rng.choice(list(DIRECTIONS))),
            str(rng.choice(list(SIZES))),
            str(rng.choice(list(SPEEDS))),
        )
        for colour in colours
    )
    return Scene(background, shapes)


def moved(scene: Scene, seed: int) -> Scene:
    """The same words with other numbers: a new draw of everything that the caption does not say."""
    rng = np.random.default_rng(seed)
    background = make_background(rng, scene.background.colour, scene.background.pattern, scene.background.pan)
    shapes = tuple(make_shape(rng, s.colour, s.kind, s.direction, s.size, s.speed) for s in scene.shapes)
    return dataclasses.replace(scene, background=background, shapes=shapes)
