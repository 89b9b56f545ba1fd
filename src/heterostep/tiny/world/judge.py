"""Reads a clip back into words, by classical vision alone, and says which parts of a caption it meets.

No model is involved, so a score cannot flatter the clips it judges. Shape suffixes: F frames, H height, W width.
Lengths are pixels of the clip as given; thresholds scale with its side, from those of a 192 x 192 frame.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field

import numpy as np

from heterostep.tiny.world.caption import parse
from heterostep.tiny.world.scene import BACKGROUND_COLOURS, DIRECTIONS, NUM_FRAMES, SHAPE_COLOURS, SIZE

_MIN_FRAMES = 5
_COLOURS = tuple(SHAPE_COLOURS)
_GROUND = len(_COLOURS)
# Grey levels: a colour farther than this from every shape's colour belongs to no shape.
_REACH = 115.0
# Pixels of a 192 x 192 frame: the smallest shape is a triangle of 290.
_MIN_AREA = 130.0
_MIN_DISPLACEMENT = 5.0
# Shapes bounce late, so the heading is that of the first part of the clip.
_HEADING_SHARE = 0.6
_MIN_PAN = 0.25


@dataclass(frozen=True)
class SeenShape:
    """One shape as read from a clip.

    Attributes:
        colour: the nearest of the world's shape colours.
        kind: the nearest of the world's kinds.
        direction: where it heads in the first part of the clip; `""` if it stands still.
        displacement: (dx, dy) in pixels from where it is first seen to where it is last seen; y points down.
        speed: mean speed, pixels a frame.
        area: pixels covered when seen whole.
        track: centres [F, 2] (x, y) in pixels, NaN where not seen.
    """

    colour: str
    kind: str
    direction: str
    displacement: tuple[float, float]
    speed: float
    area: float
    track: np.ndarray = field(compare=False, repr=False)


@dataclass(frozen=True)
class Reading:
    """What a clip shows.

    Attributes:
        shapes: at most one of each colour, largest first; two shapes of one colour are read as one.
        background_colour: the nearest of the world's background colours; `""` if none is near or none is visible.
        pattern: the background's pattern; `""` if it has none.
        pan: where the camera pans (the picture moves the other way); `""` if it stands still.
        pans: every pan that would look like this, `pan` first: stripes hide motion along them.
        background_flicker: mean absolute change, frame to frame, of the pixels that no shape covers; grey levels.
    """

    shapes: tuple[SeenShape, ...]
    background_colour: str
    pattern: str
    pan: str
    pans: tuple[str, ...]
    background_flicker: float


@dataclass(frozen=True)
class ShapeVerdict:
    """Which words of one of the caption's shapes are met; `direction` is None where the caption names none."""

    words: str
    colour: bool
    kind: bool
    direction: bool | None


def _share(met: list[bool]) -> float | None:
    return sum(met) / len(met) if met else None


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption a clip meets.

    Attributes:
        shapes: one entry for each shape of the caption, in its order.
        background_colour, pattern: None where the caption does not say.
        pan: a caption that names no pan asks for a camera that stands still.
        extra_shapes: shapes seen whose colours the caption does not name.
    """

    shapes: tuple[ShapeVerdict, ...]
    background_colour: bool | None
    pattern: bool | None
    pan: bool
    extra_shapes: int

    @property
    def colour(self) -> float:
        """Share (0..1) of the caption's shapes whose colour is seen."""
        return _share([s.colour for s in self.shapes]) or 0.0

    @property
    def kind(self) -> float:
        """Share (0..1) of the caption's shapes that are seen in their colour and of their kind."""
        return _share([s.kind for s in self.shapes]) or 0.0

    @property
    def direction(self) -> float | None:
        """Share (0..1) of the directions named that are seen, in the shape's colour; None if none is named."""
        return _share([s.direction for s in self.shapes if s.direction is not None])

    @property
    def background(self) -> float:
        """Share (0..1) met of what the caption says of the background: its colour, pattern and pan."""
        return _share([m for m in (self.background_colour, self.pattern, self.pan) if m is not None]) or 0.0

    def to_dict(self) -> dict:
        """The four summaries and every part, ready for JSON."""
        summary = {name: getattr(self, name) for name in ("colour", "direction", "kind", "background")}
        return {"summary": summary, **dataclasses.asdict(self)}


@functools.cache
def _colour_table() -> np.ndarray:
    """The class of each colour, uint8 [32, 32, 32] over the top five bits of r, g, b: a shape's colour or ground."""
    level = np.arange(32, dtype=np.float32) * 8 + 4
    rgb = np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1)
    to_shapes = np.stack([np.linalg.norm(rgb - np.asarray(c, np.float32), axis=-1) for c in SHAPE_COLOURS.values()])
    tones = [
        np.asarray(tone, np.float32) for pair in BACKGROUND_COLOURS.values() for tone in (*pair, np.mean(pair, axis=0))
    ]
    to_ground = np.min([np.linalg.norm(rgb - tone, axis=-1) for tone in tones], axis=0)
    nearest = to_shapes.argmin(0)
    distance = to_shapes.min(0)
    return np.where((distance < to_ground) & (distance < _REACH), nearest, _GROUND).astype(np.uint8)


def _box_sum(stack: np.ndarray) -> np.ndarray:
    """Sums over 3 x 3 pixels of a stack [F, H, W, ...], edges repeated: uint16 of uint8, else of the same type."""
    for axis in (1, 2):
        width = [(0, 0)] * stack.ndim
        width[axis] = (1, 1)
        padded = np.pad(stack, width, mode="edge")
        if padded.dtype == np.uint8:
            padded = padded.astype(np.uint16)
        low, mid, high = ((slice(None),) * axis + (part,) for part in (slice(None, -2), slice(1, -1), slice(2, None)))
        stack = padded[low] + padded[mid]
        stack += padded[high]
    return stack


def _spread(mask: np.ndarray, radius: int) -> np.ndarray:
    """The pixels within a (2 radius + 1)-pixel square around those of a mask, bool [F, H, W]."""
    for axis in (1, 2):
        grown = mask.copy()
        for shift in range(1, radius + 1):
            ahead = (slice(None),) * axis + (slice(shift, None),)
            behind = (slice(None),) * axis + (slice(None, -shift),)
            grown[ahead] |= mask[behind]
            grown[behind] |= mask[ahead]
        mask = grown
    return mask


def _label(mask: np.ndarray) -> np.ndarray:
    """Connected regions within each frame of a mask [F, H, W]: int64 [F, H, W], -1 outside, else a region's number.

    Works on runs of pixels along rows; runs that touch, up and down, share the lowest number among them.
    """
    frames, height, width = mask.shape
    edges = np.diff(np.pad(mask, ((0, 0), (0, 0), (1, 1))).astype(np.int8), axis=2)
    row_of, begin = np.nonzero((edges == 1).reshape(frames * height, width + 1))
    end = np.nonzero((edges == -1).reshape(frames * height, width + 1))[1]
    # In one number line per clip, a run one row below overlaps [begin, end) shifted by one row's stride.
    stride = width + 1
    first, last = row_of * stride + begin, row_of * stride + end
    low = np.searchsorted(last, first - stride, side="right")
    high = np.searchsorted(first, last - stride, side="left")
    count = np.where(row_of % height == 0, 0, np.maximum(high - low, 0))
    below = np.repeat(np.arange(len(first)), count)
    above = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
    region = np.arange(len(first))
    while True:
        lowest = np.minimum(region[below], region[above])
        merged = region.copy()
        np.minimum.at(merged, region[below], lowest)
        np.minimum.at(merged, region[above], lowest)
        merged = merged[merged]
        if np.array_equal(merged, region):
            break
        region = merged
    labels = np.full(mask.shape, -1, np.int64)
    labels[mask] = np.repeat(region, end - begin)
    return labels


def _pieces(mask: np.ndarray, min_area: float, unit: float) -> np.ndarray:
    """The mask [F, H, W] less what is too small or too thin for a shape, or far from the frame's largest region."""
    # Where two shapes' blurred edges meet, their mix can pass for a third colour: such rims are thin.
    radius = max(round(2 * unit), 1)
    core = ~_spread(~mask, radius)
    labels = _label(mask)
    frame, y, x = np.nonzero(mask)
    region = labels[mask]
    number, region = np.unique(region, return_inverse=True)
    area = np.bincount(region, minlength=len(number))
    thick = np.bincount(region, weights=core[mask], minlength=len(number)) > 0.04 * area
    cx = np.bincount(region, weights=x, minlength=len(number)) / area
    cy = np.bincount(region, weights=y, minlength=len(number)) / area
    at = np.zeros(len(number), np.int64)
    at[region] = frame
    keep = np.zeros(len(number), bool)
    solid = np.flatnonzero(thick & (area >= min_area / 4))
    for f in np.unique(at[solid]):
        here = solid[at[solid] == f]
        main = here[area[here].argmax()]
        if area[main] < min_area:
            continue
        near = np.hypot(cx[here] - cx[main], cy[here] - cy[main]) < 1.5 * math.sqrt(area[main])
        keep[here[near & (area[here] >= 0.15 * area[main])]] = True
    kept = np.zeros_like(mask)
    kept[frame, y, x] = keep[region]
    return kept


# What _outline gives for each kind drawn ideally.
_OUTLINES = {
    "circle": (1.0, 0.0, 0.0),
    "square": (0.955, 0.0, -0.43),
    "triangle": (0.827, 0.66, 0.0),
    "diamond": (0.955, 0.0, 0.43),
    "ring": (0.575, 0.0, 0.0),
}


def _outline(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """How compact, how much an upright triangle, and how much a diamond (a square: negative) some pixels look.

    Second, third and fourth moments about the centre, free of position and scale.
    """
    x, y = x - x.mean(), y - y.mean()
    square = x * x + y * y
    compact = len(x) / (2 * math.pi * square.mean())
    three = (3 * x * x * y - y**3).mean() / (square**1.5).mean()
    four = (x**4 - 6 * x * x * y * y + y**4).mean() / (square**2).mean()
    return compact, float(three), float(four)


def _kind(outlines: np.ndarray) -> str:
    seen = np.median(outlines, axis=0)
    return min(_OUTLINES, key=lambda kind: float(np.linalg.norm(seen - _OUTLINES[kind])))


def _heading(track: np.ndarray, whole: np.ndarray, unit: float) -> str:
    """Where a track [F, 2] heads over the first part of its clip; the frames `whole` bool [F] count, if enough do."""
    frames = len(track)
    seen = ~np.isnan(track[:, 0])
    until = max(math.ceil(_HEADING_SHARE * frames), _MIN_FRAMES)
    for usable in (seen & whole, seen):
        at = np.flatnonzero(usable[:until])
        if len(at) >= max(3, until // 3):
            break
    else:
        at = np.flatnonzero(seen)
    # The median slope over all pairs (Theil and Sen) ignores frames in which the shape is half hidden or doubled.
    i, j = np.triu_indices(len(at), k=1)
    slopes = (track[at[j]] - track[at[i]]) / (at[j] - at[i])[:, None]
    dx, dy = np.median(slopes, axis=0) * until
    least = _MIN_DISPLACEMENT * unit * min(frames / NUM_FRAMES, 1)
    return _toward(dx, dy, least)


def _toward(dx: float, dy: float, least: float) -> str:
    if max(abs(dx), abs(dy)) < least:
        return ""
    return max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * dx + DIRECTIONS[name][1] * dy)


def _see(colour: str, mask: np.ndarray, unit: float) -> SeenShape | None:
    """The shape that the pixels [F, H, W] of its colour make, or None if they make none."""
    frames = len(mask)
    needed = max(3, math.ceil(0.25 * frames))
    min_area = _MIN_AREA * unit**2
    if (mask.sum((1, 2)) >= min_area).sum() < needed:
        return None
    mask = _pieces(mask, min_area, unit)
    area = mask.sum((1, 2))
    seen = np.flatnonzero(area)
    if len(seen) < needed:
        return None
    track = np.full((frames, 2), np.nan)
    outlines = np.full((frames, 3), np.nan)
    for f in seen:
        y, x = np.nonzero(mask[f])
        track[f] = x.mean() + 0.5, y.mean() + 0.5
        outlines[f] = _outline(x.astype(np.float32), y.astype(np.float32))
    steps = np.hypot(*np.diff(track, axis=0).T)
    steps = steps[~np.isnan(steps)]
    # Patches that appear here and there are noise, not a shape.
    if len(steps) == 0 or np.median(steps) > 0.08 * SIZE * unit:
        return None
    full = float(np.percentile(area[seen], 85))
    whole = (area > 0.9 * full) & (area < 1.15 * full)
    dx, dy = track[seen[-1]] - track[seen[0]]
    return SeenShape(
        colour=colour,
        kind=_kind(outlines[whole] if whole.any() else outlines[seen]),
        direction=_heading(track, whole, unit),
        displacement=(float(dx), float(dy)),
        speed=float(steps.mean()),
        area=full,
        track=track,
    )


def _halved(stack: np.ndarray) -> np.ndarray:
    """Means over 2 x 2 pixels of a stack [F, H, W]."""
    height, width = (n // 2 * 2 for n in stack.shape[1:])
    stack = stack[:, :height, :width]
    return (stack[:, ::2, ::2] + stack[:, 1::2, ::2] + stack[:, ::2, 1::2] + stack[:, 1::2, 1::2]) / 4


def _flow(grey: np.ndarray, clear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares motion of the clear pixels (Lucas and Kanade, 1981).

    Args:
        grey: brightness, float32 [F, H, W].
        clear: pixels that no shape is near, bool [F, H, W].

    Returns:
        The summed outer products of the gradients [2, 2], and the motion (x, y) in pixels a frame, zero in the
        direction, if any, along which the picture does not change.
    """
    lag = 2
    before, after = grey[:-lag], grey[lag:]
    both = (before + after) / 2
    inside = (slice(None), slice(1, -1), slice(1, -1))
    gx = ((both[:, 1:-1, 2:] - both[:, 1:-1, :-2]) / 2)[clear[:-lag][inside] & clear[lag:][inside]]
    gy = ((both[:, 2:, 1:-1] - both[:, :-2, 1:-1]) / 2)[clear[:-lag][inside] & clear[lag:][inside]]
    gt = ((after - before) / lag)[inside][clear[:-lag][inside] & clear[lag:][inside]]
    tensor = np.array([[gx @ gx, gx @ gy], [gx @ gy, gy @ gy]], np.float64)
    right = -np.array([gx @ gt, gy @ gt], np.float64)
    strength, axes = np.linalg.eigh(tensor)
    usable = strength > 0.08 * strength[-1]
    if strength[-1] <= 0:
        return tensor, np.zeros(2)
    axes, strength = axes[:, usable], strength[usable]
    return tensor, axes @ ((axes.T @ right) / strength)


def _pans(tensor: np.ndarray, flow: np.ndarray, unit: float) -> tuple[str, ...]:
    """The camera pans that would look like this motion (x, y) of the background, the likeliest first."""
    strength, axes = np.linalg.eigh(tensor)
    least = _MIN_PAN * unit
    speed = float(np.hypot(*flow))
    if strength[0] > 0.08 * strength[-1]:
        return (_toward(-float(flow[0]), -float(flow[1]), least),)
    # Stripes: only motion across them shows.
    across = axes[:, -1]
    shown = {name: -float(across @ np.asarray(step)) for name, step in DIRECTIONS.items()}
    if speed < least:
        return ("", *(name for name, s in shown.items() if abs(s) < 0.3))
    sign = math.copysign(1.0, float(across @ flow))
    fitting = [name for name, s in shown.items() if s * sign >= 0.3]
    return tuple(sorted(fitting, key=lambda name: -shown[name] * sign))


def _pattern(grey: np.ndarray, clear: np.ndarray) -> str:
    """The pattern of one frame's clear pixels; `grey` float32 and `clear` bool, both [H, W]; `""` if it has none."""
    low, high = np.percentile(grey[clear], [5, 95])
    if high - low < 10:
        return ""
    weight = (grey - low) / (high - low)
    between = float(((weight > 0.25) & (weight < 0.75))[clear].mean())
    inside = clear[1:-1, 1:-1]
    gradient = (weight[1:-1, 2:] - weight[1:-1, :-2] + 1j * (weight[2:, 1:-1] - weight[:-2, 1:-1]))[inside]
    energy = np.abs(gradient) ** 2
    # Edges all one way; edges along the axes. Clouds alone have few pixels of either tone and soft edges.
    one_way = abs((gradient**2).sum()) / energy.sum()
    upright = float((gradient**4 / np.maximum(energy, 1e-9)).real.sum() / energy.sum())
    if one_way > 0.7 and between < 0.43:
        return "stripes"
    if one_way < 0.4 and upright > 0.3 and between < 0.45:
        return "checks"
    return "clouds" if between > 0.38 else "dots"


def _background_colour(mean: np.ndarray) -> str:
    """The background whose hue is nearest to a mean colour [3] in grey levels; `""` if none is near."""

    def distance(name: str) -> float:
        off = mean - np.mean(BACKGROUND_COLOURS[name], axis=0)
        # Brightness tells backgrounds apart less than hue does, and drifts more.
        return float(np.hypot(np.linalg.norm(off - off.mean()), 0.3 * off.mean()))

    best = min(BACKGROUND_COLOURS, key=distance)
    return best if distance(best) < 40 else ""


def read(video: np.ndarray) -> Reading:
    """What a clip shows, from its pixels alone.

    Args:
        video: uint8 [F, H, W, 3], at least 5 frames.

    Raises:
        ValueError: the clip is not of that form.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or len(video) < _MIN_FRAMES:
        raise ValueError(f"expected a uint8 clip [F >= {_MIN_FRAMES}, H, W, 3], got {video.dtype} {video.shape}")
    unit = math.sqrt(video.shape[1] * video.shape[2]) / SIZE
    red, green, blue = (_box_sum(np.ascontiguousarray(video[..., c])) for c in range(3))
    classes = _colour_table()[red // 72, green // 72, blue // 72]
    drawn = classes != _GROUND
    shapes = [_see(name, classes == index, unit) for index, name in enumerate(_COLOURS)]
    found = tuple(sorted((s for s in shapes if s), key=lambda s: -s.area))

    clear = ~_spread(drawn, max(round(4 * unit), 1))
    # No shape covers most of a frame: if little is clear, the colours are off, and all of it is looked at.
    if clear.mean() < 0.1:
        clear = np.ones_like(clear)
    still = clear[1:] & clear[:-1]
    channels = [video[..., c].astype(np.int16) for c in range(3)]
    flicker = np.mean([np.abs(np.diff(c, axis=0))[still].mean() for c in channels]) if still.any() else 0.0
    grey = _box_sum(_halved((red + green + blue).astype(np.float32) / 27)) / 9
    clear_halved = _halved(clear.astype(np.float32)) == 1
    pans = _pans(*_flow(grey, clear_halved), unit / 2)
    frames = np.linspace(0, len(video) - 1, 7).round().astype(int)
    patterns = [_pattern(grey[f], clear_halved[f]) for f in frames if clear_halved[f].mean() > 0.05]
    return Reading(
        shapes=found,
        background_colour=_background_colour(np.array([c[clear].mean() for c in channels])),
        pattern=max(patterns, key=patterns.count) if patterns else "",
        pan=pans[0],
        pans=pans,
        background_flicker=float(flicker),
    )


def judge(video: np.ndarray, caption: str) -> Verdict:
    """Which parts of a caption a clip meets; the clip, uint8 [F, H, W, 3], is read without knowing the caption.

    Raises:
        ValueError: the clip is not of that form.
        HeterostepError: the caption names no shape of the bundled world.
    """
    words = parse(caption)
    reading = read(video)
    seen = {shape.colour: shape for shape in reading.shapes}
    shapes = []
    for said in words.shapes:
        shape = seen.get(said.colour)
        shapes.append(
            ShapeVerdict(
                words=f"{said.colour} {said.kind}",
                colour=shape is not None,
                kind=shape is not None and shape.kind == said.kind,
                direction=(shape is not None and shape.direction == said.direction) if said.direction else None,
            )
        )
    return Verdict(
        shapes=tuple(shapes),
        background_colour=reading.background_colour == words.background_colour if words.background_colour else None,
        pattern=reading.pattern == words.pattern if words.pattern else None,
        pan=words.pan in reading.pans,
        extra_shapes=len(set(seen) - {s.colour for s in words.shapes}),
    )
