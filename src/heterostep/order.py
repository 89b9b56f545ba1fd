"""What a person asks for, in a form of the page, a line of a batch or a request to the service.

Each fault is one line, and its `field` is the one of the form or the request that it is about.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from heterostep import making, tiny
from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError

if TYPE_CHECKING:
    from PIL import Image

LONGEST_PROMPT = 2000
# What to ask for, in fields, where memory ran out: a smaller run, or one that keeps no K and V.
SMALLER = "take a smaller or shorter video"
WHOLE_STEPS = "take the policy auto without single tokens"
# Of a first frame, the least part that cropping to the video's shape may leave.
LEAST_LEFT = 1 / 3
LEAST_PIXELS = 16
DEFAULT_STEPS = 40
LEAST_TARGET = 0.001
# The fields of a request as data, beside its image and its size as height and width; diffusers' names are taken too.
FIELDS = ("prompt", "model", "size", "frames", "steps", "guidance", "negative", "seed")
DIALS = ("runtime", "share")
MORE_FIELDS = ("policy", "sparse_share", "height", "width")
ALIASES = {
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative",
}

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Picture:
    """A first frame: its pixels, its file's name, and a digest that tells pictures apart."""

    image: Image.Image = field(compare=False, repr=False)
    name: str = field(compare=False)
    digest: str


@dataclass(frozen=True)
class Order:
    """One video, or two where a dense one is wanted beside it.

    model: a diffusers folder or hub id; None is the bundled model.
    dial: "runtime" or "share", what `target` (0..1) is a ratio of.
    sparse_share: None leaves it to the policy.
    height, width (pixels), frames, guidance: None is the model's.
    dense: make the dense video of the same noise, too.
    """

    prompt: str
    model: str | None = None
    picture: Picture | None = None
    dial: str = "runtime"
    target: float = 0.5
    policy: str = "auto"
    sparse_share: float | None = None
    steps: int = DEFAULT_STEPS
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    negative: str | None = None
    seed: int = 0
    dense: bool = True

    @classmethod
    def of(cls, form: Mapping[str, str], picture: Picture | None = None, need_prompt: bool = True) -> Order:
        """The order in a form's texts; what is missing or empty has its default.

        Raises:
            HeterostepError: a value is not what it should be, or the target cannot be reached.
        """
        prompt = form.get("prompt", "").strip()
        if need_prompt:
            check_prompt(prompt)
        if len(prompt) > LONGEST_PROMPT:
            raise HeterostepError(f"the prompt has {len(prompt)} characters, of at most {LONGEST_PROMPT}", "prompt")
        dial = form.get("dial") or "runtime"
        if dial not in ("runtime", "share"):
            raise HeterostepError(f"a target is a runtime or a share, not {dial[:20]!r}", "target")
        model = form.get("model", "").strip() or None
        order = cls(
            prompt=prompt,
            model=model,
            picture=picture,
            dial=dial,
            target=_number(form, "target", float, 0.5, LEAST_TARGET, 1),
            policy=form.get("policy") or "auto",
            sparse_share=_optional(form, "sparse_share", float, 0, 1),
            steps=_number(form, "steps", int, default_steps(model), 1, 1000),
            guidance=_optional(form, "guidance", float, 0, 100),
            height=_optional(form, "height", int, 16, 8192),
            width=_optional(form, "width", int, 16, 8192),
            frames=_optional(form, "frames", int, 1, 10000),
            negative=form.get("negative", "").strip()[:LONGEST_PROMPT] or None,
            seed=_number(form, "seed", int, 0, 0, 2**63 - 1),
            dense=form.get("dense", "") in ("on", "true", "1"),
        )
        order.planned_share()
        check_model(order.model)
        if picture is not None and order.model is None:
            sizes = order.sizes(tiny.DEFAULTS)
            check_shape(picture.image, sizes["width"], sizes["height"])
        return order

    @classmethod
    def of_data(cls, data: Mapping[str, Any], picture: Picture | None = None, others: Sequence[str] = ()) -> Order:
        """The order in a request's data: FIELDS, one of DIALS, MORE_FIELDS; the faster video alone.

        Args:
            data: texts or numbers by name, as JSON or a form has them; None is as good as left out.
            others: fields that the caller has taken out of the data; they are told where one is unknown.

        Raises:
            HeterostepError: a field is unknown or given twice, or a value is not what it should be.
        """
        form: dict[str, str] = {}
        for given, value in data.items():
            name = ALIASES.get(given, given)
            if name not in (*FIELDS, *DIALS, *MORE_FIELDS):
                known = ", ".join((*FIELDS, *DIALS, *MORE_FIELDS, *others))
                raise HeterostepError(f"no field is called {given[:40]!r}; the fields are {known}", given)
            if value is None:
                continue
            if name in form:
                raise HeterostepError(f"give {name} or {given}, not both of them", given)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise HeterostepError(f"{given} should be a text or a number, not {_shown(value)}", given)
            if name in ("prompt", "negative", "model", "policy", "size") and not isinstance(value, str):
                raise HeterostepError(f"{given} should be a text, not {_shown(value)}", given)
            form[name] = str(value)
        if size := form.pop("size", None):
            match = re.fullmatch(r"\s*(\d{1,5})\s*[xX]\s*(\d{1,5})\s*", size)
            if match is None:
                message = f"size should be a width and a height, such as 832x480, not {size[:20]!r}"
                raise HeterostepError(message, "size")
            if "width" in form or "height" in form:
                raise HeterostepError("give size or width and height, not both of them", "size")
            form["width"], form["height"] = match.groups()
        dials = [name for name in DIALS if form.get(name, "").strip()]
        if len(dials) > 1:
            raise HeterostepError("give runtime or share, not both of them", "share")
        for dial in dials:
            # What is told of it is told by the name that it was given by.
            _number(form, dial, float, 0.5, LEAST_TARGET, 1)
            form |= {"dial": dial, "target": form[dial]}
        try:
            return cls.of(form, picture)
        except HeterostepError as error:
            if error.field == "target":
                raise HeterostepError(str(error), dials[0] if dials else "runtime") from error
            raise

    def data(self) -> dict[str, Any]:
        """Everything that the faster video depends on, as plain types; the picture by its digest."""
        content = {name: value for name, value in vars(self).items() if name not in ("picture", "dense")}
        return content | {"image": None if self.picture is None else self.picture.digest}

    def config(self) -> HSAConfig:
        """The options of the faster run.

        Raises:
            HeterostepError: they do not go together, or there is no such policy.
        """
        making.check_policy(self.policy)
        dial: dict[str, Any] = {self.dial: self.target}
        return HSAConfig(policy=self.policy, sparse_share=self.sparse_share, **dial)

    def planned_share(self) -> float:
        """The share of the evaluations that is planned before anything is measured.

        Raises:
            HeterostepError: the target cannot be reached, or the options do not go together.
        """
        try:
            return making.check_target(self.config(), self.steps)
        except HeterostepError as error:
            # A form has one field for both dials.
            field = error.field if error.field in ("policy", "sparse_share") else "target"
            raise HeterostepError(str(error), field) from error

    def sizes(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """height, width, num_frames and guidance_scale; those that were not given are the model's."""
        asked = {"height": self.height, "width": self.width, "num_frames": self.frames, "guidance_scale": self.guidance}
        return {name: defaults[name] if value is None else value for name, value in asked.items()}

    def call(self) -> dict[str, Any]:
        """What `making.call_options` takes."""
        none: dict[str, None] = dict.fromkeys(("height", "width", "num_frames", "guidance_scale"))
        texts = {"prompt": self.prompt, "negative_prompt": self.negative, "num_inference_steps": self.steps}
        return self.sizes(none) | texts | {"fps": None}

    def dense_key(self) -> tuple[Any, ...]:
        """What the dense video depends on."""
        sizes = (self.height, self.width, self.frames, self.guidance, self.steps)
        return (self.model, self.prompt, self.negative, self.picture, self.seed, *sizes)

    def code(self) -> str:
        """The line of Python that asks for this target."""
        options = {self.dial: f"{self.target:g}"}
        if self.policy != "auto":
            options["policy"] = f'"{self.policy}"'
        if self.sparse_share is not None:
            options["sparse_share"] = f"{self.sparse_share:g}"
        return f"heterostep.enable(pipe, {', '.join(f'{name}={value}' for name, value in options.items())})"

    def command(self) -> str:
        """The command line that makes the same."""
        plain = Order(self.prompt)
        parts = ["heterostep", "generate", self.prompt]
        if self.picture is not None:
            parts += ["--image", self.picture.name]
        parts += [f"--{self.dial}", f"{self.target:g}"]
        for name in ("model", "policy", "sparse_share", "steps", "guidance", "height", "width", "frames", "negative"):
            value = getattr(self, name)
            # By default the command takes a model's own number of steps.
            if value != getattr(plain, name) or (name == "steps" and self.model is not None):
                parts += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
        parts += ["--seed", str(self.seed)] * bool(self.seed) + ["--both"] * self.dense
        return shlex.join(parts)


def read_picture(data: bytes, name: str) -> Picture:
    """An uploaded first frame.

    Raises:
        HeterostepError: it cannot be read, or is too small.
    """
    name = Path(name.replace("\\", "/")).name[-80:] or "image"
    try:
        image = making.open_image(io.BytesIO(data), name)
    except HeterostepError as error:
        # Pillow names the object that it was given.
        raise HeterostepError(f"{name} cannot be read as an image: give a PNG, JPEG or WebP file", "image") from error
    if min(image.size) < LEAST_PIXELS:
        message = f"{name} is {image.width} x {image.height}: it should have {LEAST_PIXELS} pixels a side"
        raise HeterostepError(message, "image")
    return Picture(image, name, hashlib.sha256(data).hexdigest())


def check_shape(image: Image.Image, width: int, height: int) -> str | None:
    """What cropping does to a first frame; None where it does nothing.

    Raises:
        HeterostepError: little of it would be left.
    """
    ratio = (image.width / image.height) / (width / height)
    left = min(ratio, 1 / ratio)
    if left < LEAST_LEFT:
        raise HeterostepError(
            f"the image is {image.width} x {image.height}: cropped to the video's shape ({width} x {height}), "
            f"{left:.0%} of it would be left",
            "image",
        )
    # A row or two of pixels nobody misses.
    return None if left > 0.98 else f"{image.width} x {image.height}: its middle is cropped to {width} x {height}"


def check_prompt(prompt: str) -> None:
    """Check that a prompt says something.

    Raises:
        HeterostepError: it does not.
    """
    if not prompt.strip():
        raise HeterostepError("the prompt is empty: say what the video should show", "prompt")


def default_steps(model: str | None) -> int:
    """The denoising steps of a video that names none: the model's own where they are known."""
    return making.usual_steps(model) or DEFAULT_STEPS


def check_model(model: str | None) -> None:
    """Check that a model that can only be a folder is there; hub ids are known when they are loaded.

    Raises:
        HeterostepError: it is not.
    """
    if model == "":
        raise HeterostepError("the name of the model is empty: leave it out for the bundled one", "model")
    if model is None or Path(model).is_dir():
        return
    if model.startswith(("/", ".", "~")) or model.count("/") != 1 or "\\" in model:
        from heterostep import configs

        if model in configs.names():
            hub_id = configs.load(model).repository
            message = f"{model} is a name for plan and bench: give {hub_id} or the checkpoint's folder"
            raise HeterostepError(message, "model")
        raise HeterostepError(f"the folder {model} does not exist", "model")


def _shown(value: Any) -> str:
    names = {bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), repr(value)[:20])


def _number(
    form: Mapping[str, str],
    name: str,
    kind: Callable[[str], Number],
    default: Number,
    least: float,
    most: float,
) -> Number:
    text = form.get(name, "").strip()
    if not text:
        return default
    label = name.replace("_", " ")
    try:
        value = kind(text)
    except ValueError:
        whole = "whole " if kind is int else ""
        raise HeterostepError(f"{label} should be a {whole}number, not {text[:20]!r}", name) from None
    if not (least <= value <= most and math.isfinite(value)):
        raise HeterostepError(f"{label} should be from {least:g} to {most:g}, not {text[:20]}", name)
    return value


def _optional(
    form: Mapping[str, str], name: str, kind: Callable[[str], Number], least: float, most: float
) -> Number | None:
    return _number(form, name, kind, kind("0"), least, most) if form.get(name, "").strip() else None
