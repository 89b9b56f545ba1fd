"""Captions of clips: a closed grammar over the clips' labels, and the way back.

Of a room: "turning left slowly in a dim brown stone hall, a worm walks right, a gun in hand".
Of a photograph: "panning left over a photograph of a cat".
"""

from __future__ import annotations

import re

CAMERA = {
    "still": "still camera",
    "forward": "walking forward",
    "backward": "walking backward",
    "strafe left": "stepping left",
    "strafe right": "stepping right",
    "turn left": "turning left",
    "turn right": "turning right",
    "forward left": "walking forward and turning left",
    "forward right": "walking forward and turning right",
    "pan left": "panning left",
    "pan right": "panning right",
    "pan up": "panning up",
    "pan down": "panning down",
    "zoom in": "zooming in",
    "zoom out": "zooming out",
    "slide left": "sliding left past",
    "slide right": "sliding right past",
}
MOVERS = ("none", "soldier", "serpent", "worm", "knight", "ghoul", "orb", "door", "picture")
MOTIONS = {
    "none": "",
    "left": "moves left",
    "right": "moves right",
    "toward": "comes closer",
    "away": "goes away",
    "stands": "stands there",
    "opens": "opens",
    "closes": "closes",
}
SPEEDS = ("none", "slowly", "quickly")
COLOURS = ("gray", "brown", "red", "green", "blue", "tan")
MATERIALS = ("stone", "brick", "wooden", "marble", "rocky", "metal")
SPACES = ("corridor", "room", "hall", "yard")
LIGHTS = ("none", "dim", "bright")
PHOTOGRAPHS = ("none", "astronaut", "cat", "coffee", "rocket", "grass", "gravel", "bricks", "galaxies")
LABELS: dict[str, tuple[str, ...]] = {
    "camera": tuple(CAMERA),
    "speed": SPEEDS,
    "mover": MOVERS,
    "motion": tuple(MOTIONS),
    "colour": ("none", *COLOURS),
    "material": ("none", *MATERIALS),
    "space": ("none", *SPACES),
    "light": LIGHTS,
    "gun": ("none", "gun"),
    "photograph": PHOTOGRAPHS,
}


def an(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(labels: dict[str, str]) -> str:
    """The sentence of these labels; keys that are missing count as "none"."""
    said = {key: labels.get(key, "none") for key in LABELS}
    camera = CAMERA[said["camera"]]
    if said["speed"] != "none":
        camera += f" {said['speed']}"
    if said["photograph"] != "none":
        join = "" if said["camera"].startswith("slide") else " on" if said["camera"] == "still" else " over"
        text = f"{camera}{join} a photograph of {said['photograph']}"
        if said["mover"] == "picture":
            text += f", a picture {MOTIONS[said['motion']]}"
        return text
    look = [said[key] for key in ("light", "colour", "material", "space") if said[key] != "none"]
    text = f"{camera} in {an(' '.join(look))}"
    if said["mover"] != "none":
        text += f", {an(said['mover'])} {MOTIONS[said['motion']]}"
    if said["gun"] != "none":
        text += ", a gun in hand"
    return text


def parse(text: str) -> dict[str, str]:
    """The labels that a caption says; the inverse of `caption`.

    Raises:
        ValueError: the grammar does not know it.
    """
    labels = dict.fromkeys(LABELS, "none")
    # The longest phrase that fits: "walking forward and turning left" begins as "walking forward" does.
    fitting = [key for key, phrase in CAMERA.items() if text.startswith(phrase)]
    if not fitting:
        raise ValueError(f"no camera is named in: {text}")
    labels["camera"] = max(fitting, key=lambda key: len(CAMERA[key]))
    words = re.findall(r"\w+", text)
    for key in ("speed", "light", "colour", "material", "space", "photograph"):
        labels[key] = next((word for word in words if word in LABELS[key] and word != "none"), "none")
    for part in text.split(", ")[1:]:
        if part == "a gun in hand":
            labels["gun"] = "gun"
            continue
        labels["mover"] = part.split()[1]
        labels["motion"] = next(key for key, phrase in MOTIONS.items() if phrase and part.endswith(phrase))
    if caption(labels) != text:
        raise ValueError(f"the grammar does not know: {text}")
    return labels


def vocabulary() -> list[str]:
    """Every word and mark of the grammar."""
    phrases = [
        *CAMERA.values(),
        *MOTIONS.values(),
        *MOVERS,
        *SPEEDS,
        *COLOURS,
        *MATERIALS,
        *SPACES,
        *LIGHTS,
        *PHOTOGRAPHS,
    ]
    words = " ".join(phrases).split() + [
        "a",
        "an",
        "in",
        "on",
        "over",
        "of",
        "photograph",
        "picture",
        "gun",
        "hand",
        ",",
    ]
    return sorted(set(words) - {"none"})
