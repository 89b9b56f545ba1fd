"""What a request may ask for: its fields, and how large a video. Each fault is a status and one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from heterostep.errors import HeterostepError
from heterostep.order import Order, Picture, check_shape
from heterostep.workers.maker import About

# Fields of a request beside those of an order; the picture comes as a file.
OWN = ("input_reference", "seconds")
MOST_SECONDS = 3600


class Refused(HeterostepError):
    """A request that is not met.

    status: HTTP's; kind, code: as OpenAI's errors have them; param: the field that it is about; wait: seconds after
    which to ask again.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, wait: int | None = None
    ) -> None:
        super().__init__(message)
        # A picture has its own name in OpenAI's API.
        param = "input_reference" if param == "image" else param
        self.status, self.code, self.param, self.wait = status, code, param, wait

    @property
    def kind(self) -> str:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        fault = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": fault}


@dataclass(frozen=True)
class Limits:
    """Bounds of a service.

    queue: videos that may wait; pixels: of a frame, height times width; frames, steps: of a video; upload: bytes of a
    request; keep: finished videos that are kept, for `keep_seconds` each.
    """

    queue: int = 32
    pixels: int = 1280 * 720
    frames: int = 161
    steps: int = 100
    upload: int = 20_000_000
    keep: int = 200
    keep_seconds: float = 24 * 3600.0

    def order(self, data: Mapping[str, Any], picture: Picture | None, about: About, model: str | None) -> Order:
        """The order that a request's fields make, of a size that the model makes and that is within the bounds.

        Args:
            data: the fields as JSON or a form has them, without the picture.
            about: of a worker that has loaded the model.
            model: the service's; a request may name no other.

        Raises:
            Refused: it is none.
        """
        fields = dict(data)
        named = fields.pop("model", None)
        if named is not None and named != model_name(model):
            raise Refused(400, f"this service only runs {model_name(model)}", "model_not_found", "model")
        fps = about.defaults["fps"]
        try:
            if (seconds := fields.pop("seconds", None)) not in (None, ""):
                if any(fields.get(name) not in (None, "") for name in ("frames", "num_frames")):
                    raise HeterostepError("give seconds or num_frames, not both of them", "seconds")
                fields["frames"] = about.rules.frames(_seconds(seconds) * fps)
            order = Order.of_data({**fields, "model": model}, picture, OWN)
            width, height = self._checked_size(order, about)
            if order.picture is not None:
                order = replace(order, picture=_cropped(order.picture, width, height))
        except HeterostepError as error:
            raise Refused(400, str(error), "invalid_value", error.field) from error
        return order

    def _checked_size(self, order: Order, about: About) -> tuple[int, int]:
        """Width and height of the video."""
        sizes = order.sizes(about.defaults)
        height, width, frames = (sizes[name] for name in ("height", "width", "num_frames"))
        if height * width > self.pixels:
            message = f"a frame of {width}x{height} has more than the {self.pixels} pixels allowed here"
            raise HeterostepError(message, "size")
        if frames > self.frames:
            raise HeterostepError(f"{frames} frames are more than the {self.frames} allowed here", "num_frames")
        if order.steps > self.steps:
            raise HeterostepError(f"{order.steps} steps are more than the {self.steps} allowed here", "steps")
        try:
            about.rules.check(height, width, frames)
        except HeterostepError as error:
            field = "size" if error.field in ("height", "width") else "num_frames"
            raise HeterostepError(str(error), field) from error
        return width, height


def model_name(model: str | None) -> str:
    """What a service's model is called in its answers."""
    return "heterostep-tiny" if model is None else model


def _cropped(picture: Picture, width: int, height: int) -> Picture:
    """A first frame as the video begins with it: a photograph that waits would take a hundred times the memory."""
    from PIL import ImageOps

    check_shape(picture.image, width, height)
    return replace(picture, image=ImageOps.fit(picture.image, (width, height)))


def _seconds(text: Any) -> float:
    try:
        value = math.nan if isinstance(text, bool) else float(text)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 < value <= MOST_SECONDS:
        message = f"seconds should be a number above 0 and at most {MOST_SECONDS}, not {text!r:.20}"
        raise HeterostepError(message, "seconds")
    return value
