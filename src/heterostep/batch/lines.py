"""A file of JSON lines as requests: each is checked, and a fault is told with its line's number."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heterostep.errors import HeterostepError
from heterostep.order import DIALS, Order, read_picture

# A line's fields beside those of an order.
OWN = ("image", "name")
EXAMPLE = '{"prompt": "a red circle", "seed": 1}'
# Characters of a prompt in its video's name, and of the key after it.
SLUG, SHORT_KEY = 40, 10


@dataclasses.dataclass(frozen=True)
class Line:
    """A request that was found good.

    key: a digest of everything that its video depends on, and of its name: equal lines have one.
    stem: its files' name without the suffix.
    data: the order's fields; content: a digest of them and of the first frame; image: where that is.
    """

    number: int
    key: str
    stem: str
    data: dict[str, Any] = dataclasses.field(repr=False)
    content: str
    image: Path | None = None

    def order(self) -> Order:
        """The order with its first frame, read again: a long file's pictures are not held all at once.

        Raises:
            HeterostepError: the picture is not to be had any more, or is another one.
        """
        order = _order(self.data, self.image)
        if _digest(order.data()) != self.content:
            raise HeterostepError(f"{self.image} was changed since the batch began: give the batch again")
        return order


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line that cannot be made, and why."""

    number: int
    message: str


@dataclasses.dataclass(frozen=True)
class Lines:
    """A file's requests, each once; the lines that are none; how many lines say what another one has said."""

    good: list[Line]
    bad: list[BadLine]
    repeated: int = 0


def read(path: Path, defaults: Mapping[str, Any], model: str | None) -> Lines:
    """The lines of a file. Empty ones are passed over.

    Args:
        defaults: fields of those lines that do not have them.
        model: the batch's; a line may name no other.

    Raises:
        HeterostepError: there is no such file, it is no text, or it has no lines.
    """
    if not path.is_file():
        raise HeterostepError(f"{path} does not exist")
    content = path.read_bytes()
    if b"\0" in content:
        raise HeterostepError(f"{path} is not a text file; expected lines such as {EXAMPLE}")
    good: dict[str, Line] = {}
    bad: list[BadLine] = []
    stems: dict[str, int] = {}
    repeated = 0
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not raw.strip():
            continue
        try:
            line = _line(number, raw, path.parent, defaults, model)
            if line.key in good:
                repeated += 1
                continue
            # File systems need not tell upper case from lower.
            if (other := stems.setdefault(line.stem.lower(), number)) != number:
                raise HeterostepError(f"name {line.stem!r} is line {other}'s")
            good[line.key] = line
        except HeterostepError as error:
            bad.append(BadLine(number, str(error)))
    if not good and not bad:
        raise HeterostepError(f"{path} has no lines")
    return Lines(list(good.values()), bad, repeated)


def _line(number: int, raw: bytes, folder: Path, defaults: Mapping[str, Any], model: str | None) -> Line:
    try:
        data = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise HeterostepError("not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise HeterostepError(f"not valid JSON; expected a line such as {EXAMPLE}") from error
    if not isinstance(data, dict):
        raise HeterostepError(f"not a JSON object, such as {EXAMPLE}")
    image, name = (data.pop(each, None) for each in OWN)
    if data.get("model") not in (None, model):
        raise HeterostepError("a batch has one model: name it for the whole batch, not in a line", "model")
    data = {**_missing(defaults, data), **data, "model": model}
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w-][\w. -]{0,99}", name)):
        raise HeterostepError(
            "name should be a file's name of letters, digits, spaces and .-_ without a suffix", "name"
        )
    if image is not None and not isinstance(image, str):
        raise HeterostepError("image should be the path of a picture", "image")
    where = None if image is None else folder / image
    order = _order(data, where)
    key = _digest([order.data(), name])
    slug = re.sub(r"[^a-z0-9]+", "-", order.prompt.lower())[:SLUG].strip("-") or "video"
    return Line(number, key, name or f"{slug}-{key[:SHORT_KEY]}", data, _digest(order.data()), where)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _missing(defaults: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that a line leaves open; a size is given by one name or two, a target by either of two."""
    groups = (("size", "height", "width"), DIALS, ("frames", "num_frames"), ("steps", "num_inference_steps"))
    closed = {name for group in groups if any(data.get(each) is not None for each in group) for name in group}
    return {name: value for name, value in defaults.items() if name not in closed and data.get(name) is None}


def _order(data: Mapping[str, Any], image: Path | None) -> Order:
    picture = None
    if image is not None:
        try:
            content = image.read_bytes()
        except OSError as error:
            raise HeterostepError(
                f"cannot read the image {image}: {error.strerror or 'no such file'}", "image"
            ) from error
        picture = read_picture(content, image.name)
    return Order.of_data(data, picture, OWN)
