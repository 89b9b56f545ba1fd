"""Scenes to pixels: analytic shapes with one-pixel soft edges over a two-tone pattern, in plain NumPy."""

from __future__ import annotations

import math

import numpy as np

from heterostep.tiny.world.scene import BACKGROUND_COLOURS, NUM_FRAMES, SHAPE_COLOURS, SIZE, Background, Scene


def _distance(kind: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to the outline (negative inside), up to a constant factor near the corners."""
    if kind == "circle":
        return np.hypot(x, y) - radius
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if kind == "diamond":
        return (np.abs(x) + np.abs(y) - 1.15 * radius) / math.sqrt(2)
    if kind == "ring":
        return np.abs(np.hypot(x, y) - 0.76 * radius) - 0.24 * radius
    if kind == "triangle":
        side = (math.sqrt(3) * np.abs(x) - y) / 2
        return np.maximum(side, y) - 0.5 * radius
    raise ValueError(f"no such kind of shape: {kind}")


def _pattern(background: Background, frame: int, size: int) -> np.ndarray:
    """How much of the second tone each pixel has, [size, size] in 0..1."""
    vx, vy = background.velocity()
    grid = np.arange(size, dtype=np.float32) + 0.5
    x = grid[None, :] - vx * frame + background.phase[0]
    y = grid[:, None] - vy * frame + background.phase[1]
    wave = 2 * math.pi / background.period
    sharp = background.period / 10
    if background.pattern == "stripes":
        u = x * math.cos(background.angle) + y * math.sin(background.angle)
        return np.clip(0.5 + sharp * np.sin(wave * u), 0, 1)
    if background.pattern == "checks":
        return np.clip(0.5 + sharp * np.sin(wave * x / 2 * 1.2) * np.sin(wave * y / 2 * 1.2), 0, 1)
    if background.pattern == "dots":
        u = np.mod(x, background.period) - background.period / 2
        v = np.mod(y, background.period) - background.period / 2
        return np.clip(0.5 + 0.3 * background.period - np.hypot(u, v), 0, 1)
    if background.pattern == "clouds":
        rng = np.random.default_rng(background.seed)
        total = np.zeros((size, size), np.float32)
        for _ in range(5):
            angle, phase = rng.uniform(0, 2 * math.pi, 2)
            scale = wave * rng.uniform(0.35, 0.9)
            total += np.sin(scale * (x * math.cos(angle) + y * math.sin(angle)) + phase)
        return np.clip(0.5 + 0.22 * total, 0, 1)
    raise ValueError(f"no such pattern: {background.pattern}")


def render(scene: Scene, num_frames: int = NUM_FRAMES, size: int = SIZE) -> np.ndarray:
    """The scene's clip, uint8 [num_frames, size, size, 3]."""
    ground, figure = (np.asarray(c, np.float32) for c in BACKGROUND_COLOURS[scene.background.colour])
    still = scene.background.pan == ""
    grid = np.arange(size, dtype=np.float32) + 0.5
    tracks = [shape.centres(num_frames, size) for shape in scene.shapes]
    clip = np.empty((num_frames, size, size, 3), np.uint8)
    backdrop = np.empty((size, size, 3), np.float32)
    for frame in range(num_frames):
        if frame == 0 or not still:
            weight = _pattern(scene.background, frame, size)[..., None]
            backdrop = ground + (figure - ground) * weight
        picture = backdrop.copy()
        for shape, track in zip(scene.shapes, tracks, strict=True):
            reach = math.ceil(shape.radius * 1.4) + 2
            cx, cy = track[frame]
            x0, x1 = max(int(cx) - reach, 0), min(int(cx) + reach, size)
            y0, y1 = max(int(cy) - reach, 0), min(int(cy) + reach, size)
            distance = _distance(shape.kind, grid[None, x0:x1] - cx, grid[y0:y1, None] - cy, shape.radius)
            cover = np.clip(0.5 - distance, 0, 1)[..., None]
            colour = np.asarray(SHAPE_COLOURS[shape.colour], np.float32)
            picture[y0:y1, x0:x1] += (colour - picture[y0:y1, x0:x1]) * cover
        clip[frame] = (picture + 0.5).astype(np.uint8)
    return clip
