"""Clips of photographs: pans, zooms, a picture that passes over another one, and two at different depths.

The photographs are scikit-image's (README.md names their licences); a folder with the same files does instead of it.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

FILES = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "bricks": "brick.png",
    "galaxies": "hubble_deep_field.jpg",
}


def folder() -> Path:
    """Where the photographs are: ROOMS_PHOTOGRAPHS, or scikit-image's data."""
    if "ROOMS_PHOTOGRAPHS" in os.environ:
        return Path(os.environ["ROOMS_PHOTOGRAPHS"])
    import skimage

    return Path(skimage.__file__).parent / "data"


@cache
def photograph(name: str) -> Image.Image:
    picture = Image.open(folder() / FILES[name]).convert("RGB")
    short = min(picture.size)
    # About the sharpness at which the clips show it.
    return picture.resize([round(side * 480 / short) for side in picture.size], Image.Resampling.LANCZOS)


def crop(picture: Image.Image, centre: np.ndarray, width: float, size: int) -> np.ndarray:
    """The square of this width around a point, to fractions of a pixel, in `size` x `size` pixels."""
    x, y = centre - width / 2
    return np.asarray(
        picture.resize(
            (size, size), Image.Resampling.BICUBIC, box=(float(x), float(y), float(x + width), float(y + width))
        )
    )


def clip(rng: np.random.Generator, frames: int, size: int) -> tuple[np.ndarray, dict[str, str]]:
    """A clip uint8 [frames, size, size, 3] and its labels."""
    kind = str(rng.choice(["pan", "zoom", "picture", "slide"], p=[0.45, 0.2, 0.2, 0.15]))
    name = str(rng.choice(list(FILES)))
    picture = photograph(name)
    room = np.array(picture.size, dtype=float)
    time = np.linspace(-0.5, 0.5, frames)
    labels = {"camera": "still", "photograph": name}
    if kind == "pan":
        width = float(rng.uniform(240, 330))
        axis = int(rng.integers(2))
        way = float(rng.choice([-1, 1]))
        travel = min(float(rng.uniform(70, 260)), room[axis] - width - 2)
        low, high = np.full(2, width / 2 + 1), room - width / 2 - 1
        low[axis] += travel / 2
        high[axis] -= travel / 2
        middle = rng.uniform(low, np.maximum(high, low + 1e-6))
        step = np.eye(2)[axis] * way * travel
        labels["camera"] = "pan " + [("left", "right"), ("up", "down")][axis][int(way > 0)]
        if travel < 110:
            labels["speed"] = "slowly"
        return np.stack([crop(picture, middle + t * step, width, size) for t in time]), labels
    if kind == "zoom":
        small, large = float(rng.uniform(150, 210)), float(rng.uniform(330, 460))
        middle = rng.uniform(np.full(2, large / 2 + 1), room - large / 2 - 1)
        inwards = bool(rng.integers(2))
        labels["camera"] = "zoom in" if inwards else "zoom out"
        first, last = (large, small) if inwards else (small, large)
        widths = first * (last / first) ** (time + 0.5)
        return np.stack([crop(picture, middle, float(w), size) for w in widths]), labels
    # Another picture before it: alone it moves; or the camera does, and the nearer one passes faster.
    slide = kind == "slide"
    ground_travel = float(rng.uniform(40, 70)) if slide else 0.0
    width = float(rng.uniform(280, 360))
    low = np.full(2, width / 2 + 1) + [ground_travel / 2, 0]
    middle = rng.uniform(low, np.maximum(room - low, low + 1e-6))
    other = photograph(str(rng.choice([n for n in FILES if n != name])))
    side = int(rng.uniform(0.25, 0.42) * size)
    inner_width = float(rng.uniform(200, 300))
    inner_low = np.full(2, inner_width / 2 + 1)
    inner = crop(other, rng.uniform(inner_low, np.array(other.size) - inner_low), inner_width, side)
    way = float(rng.choice([-1, 1]))
    travel = min(float(rng.uniform(0.4, 0.65)) * size, size - side - 2.0)
    if slide:
        labels["camera"] = "slide right" if way < 0 else "slide left"
    else:
        labels |= {"mover": "picture", "motion": "right" if way > 0 else "left"}
    y = int(rng.uniform(0.1, 0.9) * (size - side))
    out = []
    for t in time:
        frame = crop(picture, middle - np.array([way * t * ground_travel, 0]), width, size).copy()
        x = round((size - side) / 2 + way * t * travel)
        frame[y : y + side, x : x + side] = inner
        out.append(frame)
    return np.stack(out), labels
