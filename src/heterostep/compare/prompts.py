"""What is to be generated: the bundled model's held-out captions, or a file of prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from heterostep.compare.measure import Prompt
from heterostep.errors import HeterostepError, first_line

# The seeds of the clips that `recipes/tiny` keeps out of training begin here.
HELD_OUT = 10_005_000
# From one noise of a prompt to its next: a prime, so that no two prompts of a comparison share one.
NEXT_SEED = 1_000_003


def held_out(count: int, first: int = 0, with_image: bool = False) -> list[Prompt]:
    """Captions of clips that the bundled model has not seen, and their first frames where asked."""
    from heterostep.tiny import world

    prompts = []
    for number in range(first, first + count):
        rng = np.random.default_rng(HELD_OUT + number)
        scene = world.sample_scene(rng)
        image = world.render(scene, num_frames=1)[0] if with_image else None
        prompts.append(Prompt(world.caption(scene, rng), number, image))
    return prompts


def held_out_of(model: str, count: int, first: int = 0, with_image: bool = False) -> list[Prompt]:
    """The prompts that a model's folder says it was not trained on (`heterostep.checkpoints.about`), with first frames.

    Raises:
        HeterostepError: it names none, or fewer; or a first frame cannot be read.
    """
    from PIL import Image

    from heterostep.checkpoints import about

    known = about(model).get("held_out", [])
    if not known:
        raise HeterostepError(f"{model} comes without prompts of its own: give a file of them", "prompts")
    if first + count > len(known):
        asked = f"count {count}" + (f" from seed {first} on" if first else "")
        raise HeterostepError(
            f"{asked} is more than {model}'s own prompts ({len(known)}): lower it, or give a file of prompts", "count"
        )
    prompts = []
    for number, entry in enumerate(known[first : first + count], first):
        image = None
        if with_image:
            if "image" not in entry:
                message = f"{model}'s own prompts come without first frames: give a file of prompts"
                raise HeterostepError(message, "prompts")
            path = Path(model) / entry["image"]
            try:
                with Image.open(path) as opened:
                    image = np.asarray(opened.convert("RGB"))
            except Exception as error:
                # Pillow's decoders raise more than OSError for broken files.
                raise HeterostepError(f"cannot read the image {path}: {first_line(error)}") from error
        prompts.append(Prompt(entry["prompt"], number, image))
    return prompts


def with_seeds(prompts: list[Prompt], count: int) -> list[Prompt]:
    """Every prompt from `count` noises: all with their own seed, then all with the next, which is NEXT_SEED further."""
    return [replace(prompt, seed=prompt.seed + k * NEXT_SEED) for k in range(count) for prompt in prompts]


def read_prompts(path: Path, seed: int, size: tuple[int, int] | None) -> list[Prompt]:
    """One prompt a line; with a `size` (width, height) each is followed by a tab and the path of its first frame.

    Raises:
        HeterostepError: the file or an image is missing, empty or cannot be read; says which line.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        raise HeterostepError(f"{path} does not exist")
    try:
        # Some editors begin a file with a byte order mark.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise HeterostepError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if any(line.lstrip().startswith(("{", "[{")) for line in lines):
        raise HeterostepError(f"{path} holds JSON, as for `heterostep batch`: compare reads a prompt a line")
    prompts = []
    for number, line in enumerate(lines, 1):
        text, _, name = (part.strip() for part in line.partition("\t"))
        if not text:
            continue
        image = None
        if size is not None:
            if not name:
                raise HeterostepError(f"{path}, line {number}: image-to-video needs a tab and a first frame's path")
            try:
                with Image.open(path.parent / name) as opened:
                    image = np.asarray(ImageOps.fit(opened.convert("RGB"), size))
            except Exception as error:
                # Pillow's decoders raise more than OSError for broken files.
                raise HeterostepError(f"{path}, line {number}: cannot read the image {name}") from error
        prompts.append(Prompt(text, seed + number - 1, image))
    if not prompts:
        raise HeterostepError(f"{path} has no prompts")
    return prompts
