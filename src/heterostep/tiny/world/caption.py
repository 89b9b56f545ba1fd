"""Captions of scenes, with varied wording, and scenes read back from captions."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from heterostep.errors import HeterostepError
from heterostep.tiny.world.scene import (
    BACKGROUND_COLOURS,
    DIRECTIONS,
    KINDS,
    PATTERNS,
    SHAPE_COLOURS,
    Background,
    Scene,
    Shape,
    make_background,
    make_shape,
)

_VERBS = ("moving", "gliding", "drifting", "travelling")
_JOINS = (" and ", ", and ", " with ")
_SURFACES = ("over {0}", "on {0}", "in front of {0}", "over a background of {0}")
_PANS = (", the camera pans {0}", ", camera slowly panning {0}", ", with the camera panning {0}")
_SIZE_WORDS = {"small": ("small", "little"), "": ("",), "large": ("large", "big")}
_SPEED_WORDS = {"slowly": ("slowly",), "": ("",), "quickly": ("quickly", "fast")}


def _words(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _phrase(shape: Shape, rng: np.random.Generator) -> str:
    size = str(rng.choice(_SIZE_WORDS[shape.size]))
    speed = str(rng.choice(_SPEED_WORDS[shape.speed]))
    verb = str(rng.choice(_VERBS))
    noun = _words("a", size, shape.colour, shape.kind)
    if rng.random() < 0.3:
        return _words(noun, {"moving": "moves", "gliding": "glides", "drifting": "drifts"}.get(verb, "travels"),
                      speed, shape.direction)  # fmt: skip
    if speed == "slowly" and rng.random() < 0.3:
        return _words(noun, "slowly", verb, shape.direction)
    return _words(noun, verb, shape.direction, speed)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One English caption of the scene; the wording is drawn from `rng`, the facts are the scene's."""
    order = rng.permutation(len(scene.shapes))
    shapes = [_phrase(scene.shapes[i], rng) for i in order]
    subject = shapes[0]
    for extra in shapes[1:]:
        subject += str(rng.choice(_JOINS)) + extra
    ground = str(rng.choice(_SURFACES)).format(_words(scene.background.colour, scene.background.pattern))
    pan = str(rng.choice(_PANS)).format(scene.background.pan) if scene.background.pan else ""
    return f"{subject} {ground}{pan}"


@dataclass(frozen=True)
class ShapeWords:
    """What a caption says of one shape; `""` where it says nothing."""

    colour: str
    kind: str
    direction: str
    size: str
    speed: str


@dataclass(frozen=True)
class CaptionWords:
    """What a caption says: its shapes in order, the background's colour and pattern, the camera's pan."""

    shapes: tuple[ShapeWords, ...]
    background_colour: str
    pattern: str
    pan: str


def _either(words) -> str:
    return "|".join(words)


_SHAPE = re.compile(rf"\b(?:(small|little|large|big) )?({_either(SHAPE_COLOURS)}) ({_either(KINDS)})\b")
_GROUND = re.compile(rf"\b({_either(BACKGROUND_COLOURS)}) ({_either(PATTERNS)})\b")
# A few words may stand between ("is slowly panning to the right"), but no clause of its own.
_PAN = re.compile(
    rf"\bcamera(?: \w+){{0,2}}? pan(?:s|ning)?(?: \w+){{0,3}}? ({_either(DIRECTIONS)})\b(?: (?:slowly|quickly|fast)\b)?"
)
_DIRECTION = re.compile(rf"\b({_either(DIRECTIONS)})\b")
_SPEED = re.compile(r"\b(slowly|quickly|fast)\b")


def parse(text: str) -> CaptionWords:
    """The facts a caption states, whichever way it words them.

    Raises:
        HeterostepError: the caption names no shape that this world has.
    """
    text = " ".join(text.lower().split())
    pan = _PAN.search(text)
    scene_text = text[: pan.start()] + text[pan.end() :] if pan else text
    ground = _GROUND.search(scene_text)
    if ground:
        scene_text = scene_text[: ground.start()] + scene_text[ground.end() :]
    found = list(_SHAPE.finditer(scene_text))
    if not found:
        raise HeterostepError(
            "the caption names no shape of the bundled world: say a colour "
            f"({', '.join(SHAPE_COLOURS)}) and a kind ({', '.join(KINDS)}), "
            "as in 'a red circle moving right over blue stripes'"
        )
    ends = [m.start() for m in found[1:]] + [len(scene_text)]
    shapes = []
    for match, end in zip(found, ends, strict=True):
        rest = scene_text[match.end() : end]
        direction, speed = _DIRECTION.search(rest), _SPEED.search(rest)
        shapes.append(
            ShapeWords(
                colour=match[2],
                kind=match[3],
                direction=direction[1] if direction else "",
                size={"little": "small", "big": "large"}.get(match[1] or "", match[1] or ""),
                speed={"fast": "quickly"}.get(speed[1], speed[1]) if speed else "",
            )
        )
    return CaptionWords(tuple(shapes), ground[1] if ground else "", ground[2] if ground else "", pan[1] if pan else "")


def scene_from_caption(text: str, seed: int = 0) -> Scene:
    """A scene that the caption describes; what it leaves open is drawn from `seed`.

    Raises:
        HeterostepError: the caption names no shape that this world has.
    """
    words = parse(text)
    rng = np.random.default_rng(seed)
    background: Background = make_background(
        rng,
        words.background_colour or str(rng.choice(list(BACKGROUND_COLOURS))),
        words.pattern or str(rng.choice(PATTERNS)),
        words.pan,
    )
    shapes = tuple(
        make_shape(rng, s.colour, s.kind, s.direction or str(rng.choice(list(DIRECTIONS))), s.size, s.speed)
        for s in words.shapes
    )
    return Scene(background, shapes)
