"""Making one video: a model is loaded, a request checked, its run made and told. The command and the page share it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rich import filesize

from heterostep import interrupts
from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError, first_line

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from heterostep.engine.report import Report, StepInfo
    from heterostep.video import Audio

# Percent between the seconds that a run expects, or was to take, and those measured, from which on a word is due.
SPEED_DIFFERS = 5
SIZES = ("height", "width", "num_frames")
# Where a pipeline's weights wait: on its device, or in host memory until a model or a layer of it is called.
OFFLOADS = ("none", "model", "sequential")


class Cancelled(Exception):
    """Somebody asked a run to end: raised in `on_step`."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One generation: its frames, uint8 [F, H, W, 3], its account, and its sound where the model makes any."""

    clip: np.ndarray
    report: Report
    audio: Audio | None = None

    @property
    def seconds(self) -> float:
        """The denoising loop's measured seconds."""
        return self.report.runtime.seconds

    def psnr(self, other: Result) -> float:
        """dB between two clips; infinite where they are equal."""
        from heterostep.metrics import psnr

        return psnr(self.clip, other.clip)


def open_image(source: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Image.Image:
    """A picture in RGB, turned as its camera says.

    Args:
        source: a path, or an open file.
        name: what the file is called in an error; by default the path.

    Raises:
        HeterostepError: it cannot be read.
    """
    from PIL import Image, ImageOps

    if name is None:
        name = str(source)
        if Path(name).is_dir():
            raise HeterostepError(f"{name} is a folder, not an image")
        if not Path(name).is_file():
            raise HeterostepError(f"the image {name} does not exist")
    try:
        with Image.open(source) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError and more for broken files.
        raise HeterostepError(f"cannot read the image {name}: {first_line(error)}") from error


def load(model: str | None, with_image: bool, precision: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline, on the CPU, and its default sizes, guidance and frames per second; None is the bundled model.

    Raises:
        HeterostepError: it is no model, or one that cannot do this.
    """
    if model is None:
        from heterostep import tiny

        pipe, defaults = tiny.load(image_to_video=with_image), tiny.DEFAULTS
        pipe.transformer.to(precision)
        pipe.text_encoder.to(precision)
    else:
        from heterostep import checkpoints

        pipe, defaults = checkpoints.load(model, with_image, precision)
    # Most imports are behind us.
    interrupts.check()
    return pipe, defaults


def place(pipe: Any, device: Any, offload: str = "none") -> None:
    """Bring a loaded pipeline to its device, or let its weights wait in host memory (one of `OFFLOADS`)."""
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)


def sibling(pipe: Any, model: str | None, with_image: bool) -> tuple[Any, dict[str, Any]] | None:
    """What `load` would give, on the weights of a loaded pipeline of the model; None where it has weights of its own.

    Raises:
        HeterostepError: the model cannot do this.
    """
    from heterostep import checkpoints, tiny

    made = checkpoints.sibling(pipe, str(tiny.WEIGHTS) if model is None else model, with_image)
    return made if made is None or model is not None else (made[0], tiny.DEFAULTS)


class Models:
    """The model that a process holds, on its device: one at a time, for two large ones do not fit beside each other.

    The pipelines for text and for a first frame have the same weights where the checkpoint allows it.

    Args:
        device, precision: where it goes, and in what its transformer and text encoder are.
        prepare: done once with each pipeline that is loaded, on the device; those that share its weights have it, too.
    """

    def __init__(self, device: Any, precision: Any, prepare: Callable[[Any], None] = lambda pipe: None) -> None:
        self.device, self.precision, self._prepare = device, precision, prepare
        self._held: dict[str | None, dict[bool, tuple[Any, dict[str, Any]]]] = {}

    def get(self, model: str | None, with_image: bool) -> tuple[Any, dict[str, Any]]:
        """As `load` gives it; loaded where it is not held."""
        if model in self._held and with_image not in self._held[model]:
            pipe, _ = self._held[model][not with_image]
            if (made := sibling(pipe, model, with_image)) is not None:
                self._held[model][with_image] = made
                return made
        if with_image not in self._held.get(model, {}):
            if self._held:
                self._held.clear()
                self.tidy()
            pipe, defaults = load(model, with_image, self.precision)
            pipe.to(self.device)
            self._prepare(pipe)
            self._held[model] = {with_image: (pipe, defaults)}
        return self._held[model][with_image]

    def tidy(self) -> None:
        """Give back the memory of what is not held any more."""
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def usual_steps(model: str | None) -> int | None:
    """The denoising steps that a model is usually made with; None where they are not known before it is loaded.

    They are those that `heterostep.plan` takes, so that a plan and its run agree.
    """
    if model is None:
        return None
    from heterostep import configs

    try:
        return configs.load(model).defaults["num_inference_steps"]
    except HeterostepError:
        return None


def check_known_sizes(model: str | None, height: int | None, width: int | None, num_frames: int | None) -> None:
    """Check that a model makes videos of this size, as far as its configuration tells: no weights are loaded.

    Args:
        model: as `load` takes it, or a name of `heterostep.configs`; of hub ids those are known that it has.
        height, width, num_frames: pixels and frames; None is the model's.

    Raises:
        HeterostepError: it does not; says which sizes it makes.
    """
    if (height, width, num_frames) == (None, None, None):
        return
    from heterostep import checkpoints, configs, tiny
    from heterostep.planning.dry_run import meta_pipeline

    try:
        rules = checkpoints.size_rules(meta_pipeline(configs.load(tiny.WEIGHTS if model is None else model)))
    except Exception:
        # Loading it will tell what is wrong.
        return
    rules.check(height or rules.multiple, width or rules.multiple, num_frames or 1)


def ignores_negative(pipe: Any, options: dict[str, Any]) -> bool:
    """Whether a negative prompt was given that the call does not look at: it has no guidance between two prompts."""
    # HunyuanVideo 1.0 is told its guidance scale as a number; the one between two prompts has another name, and is off.
    embedded = "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters
    return bool(options.get("negative_prompt")) and (embedded or options["guidance_scale"] <= 1)


def check_second_guidance(model: str | None) -> None:
    """Check that a model has a second expert, as far as its configuration tells: no weights are loaded.

    Raises:
        HeterostepError: it has none, so a second guidance scale is of no use.
    """
    from heterostep import checkpoints

    if model is None or checkpoints.has_second_expert(model) is False:
        raise HeterostepError(f"{model or 'the bundled model'} has no second expert: leave out --guidance-2")


def check_policy(name: str) -> None:
    """Check that there is a policy that its name alone asks for.

    Raises:
        HeterostepError: there is none.
    """
    from heterostep.policy import find

    find(name, alone=True)


def check_target(config: HSAConfig, num_steps: int) -> float:
    """Check that a run of so many steps can meet its target.

    Returns:
        the share of the token evaluations that is planned before anything is measured.

    Raises:
        HeterostepError: it cannot; says what the lowest target is.
    """
    from heterostep.engine.schedule import Schedule
    from heterostep.policy import Run
    from heterostep.sigmas import nominal_sigmas

    schedule = Schedule(config, Run(nominal_sigmas(num_steps)))
    schedule.check()
    return sum(schedule.plan()) / num_steps / schedule.run.tokens.total


def call_options(
    pipe: Any, defaults: dict[str, Any], asked: dict[str, Any], picture: Image.Image | None
) -> tuple[dict[str, Any], float]:
    """The arguments of a pipeline's call, and frames per second.

    Args:
        pipe, defaults: as `load` gives them.
        asked: prompt, negative_prompt, num_inference_steps, height, width, num_frames, guidance_scale, fps; of the last
            five, None is the model's.
        picture: the first frame; it is cropped to the video's shape.

    Raises:
        HeterostepError: the model makes no videos of this size.
    """
    from heterostep import checkpoints

    options: dict[str, Any] = {name: defaults.get(name) if value is None else value for name, value in asked.items()}
    fps = options.pop("fps")
    checkpoints.check_sizes(pipe, **{name: options[name] for name in SIZES})
    if "frame_rate" in inspect.signature(type(pipe).__call__).parameters:
        options["frame_rate"] = fps
    if picture is not None:
        from PIL import ImageOps

        options["image"] = ImageOps.fit(picture, (options["width"], options["height"]))
    return options, fps


def make(
    pipe: Any,
    config: HSAConfig,
    options: dict[str, Any],
    seed: int,
    on_step: Callable[[StepInfo], None] | None = None,
) -> Result:
    """Run the pipeline once with heterostep enabled; afterwards it is as it was."""
    import torch

    from heterostep import compat
    from heterostep.pipeline import enabled, report
    from heterostep.video import Audio

    device = compat.execution_device(pipe)
    if device.type == "cuda":
        # Otherwise the peak of a dense run before this one would be reported again.
        torch.cuda.reset_peak_memory_stats(device)
    with enabled(pipe, config=config, on_step=on_step):
        generator = torch.Generator("cpu").manual_seed(seed)
        output = pipe(**options, generator=generator, output_type="np")
        account = report(pipe)
    audio = None
    if getattr(output, "audio", None) is not None:
        audio = Audio(output.audio[0].float().cpu().numpy(), pipe.vocoder.config.output_sampling_rate)
    clip = (output.frames[0] * 255).round().astype("uint8")
    return Result(clip, dataclasses.replace(account, seed=seed), audio)


def beside(reference: Result, result: Result) -> np.ndarray:
    """The dense clip and the faster one in one picture, each under its seconds, uint8 [F, H + strip, 2 W, 3]."""
    from heterostep.video import side_by_side

    labels = (f"dense {reference.seconds:.1f} s", f"heterostep {result.seconds:.1f} s")
    return side_by_side(reference.clip, result.clip, labels)


def report_content(result: Result, reference: Result | None) -> dict[str, Any]:
    """The report as plain types, with what a dense run of the same noise adds to it."""
    content = result.report.to_dict()
    if reference is not None:
        psnr = result.psnr(reference)
        content["dense_measured_seconds"] = reference.seconds
        # JSON has no infinity: equal videos have no PSNR.
        content["psnr"] = psnr if math.isfinite(psnr) else None
    return content


def summary(result: Result, reference: Result | None) -> dict[str, str]:
    """What a run was asked for and did, a line each, by its name."""
    report = result.report
    runtime, share, steps, memory = report.runtime, report.share, report.steps, report.memory
    lines = {}
    if runtime.target is not None and runtime.achieved is not None:
        lines["runtime"] = (
            f"asked {runtime.target:.2f} of dense, achieved {runtime.achieved:.2f} by its own dense steps"
        )
        if runtime.achieved > (1 + SPEED_DIFFERS / 100) * runtime.target and not report.advice:
            lines["runtime"] += ": steps took longer than expected, as on a busy machine"
        if runtime.warmup_seconds > 0.05 * runtime.seconds:
            lines["runtime"] += f", besides {runtime.warmup_seconds:.1f} s of warm-up"
    if share.target is not None:
        lines["share"] = f"asked {share.target:.2f} of the dense evaluations, spent {share.achieved:.2f}"
        if share.unspent:
            lines["share"] += f" ({share.unspent:.3f} are less than a whole step)"
    lines["seconds"] = f"{result.seconds:.1f} for the denoising loop"
    if reference is not None:
        lines["seconds"] += f", {result.seconds / reference.seconds:.2f} of the dense run's {reference.seconds:.1f}"
        if runtime.dense_seconds is not None:
            off = round(100 * (runtime.dense_seconds / reference.seconds - 1))
            lines["estimate"] = f"{runtime.dense_seconds:.1f} for the dense run ({off:+d} %), by this run's own steps"
            if abs(off) >= SPEED_DIFFERS:
                when = "the dense run" if off < 0 else "this one"
                lines["estimate"] += f": the machine was slower during {when}"
        lines["psnr"] = f"{result.psnr(reference):.1f} dB against dense"
    of = f"of {report.num_inference_steps} evaluated"
    if steps.min == steps.max:
        lines["steps"] = f"{steps.min} {of}, each for all tokens"
    else:
        lines["steps"] = f"mean {steps.mean:.1f} per token, min {steps.min}, max {steps.max}, {of}"
    where = "" if memory.kv_store in ("none", "device") else f" ({memory.kv_store})"
    where += f", {filesize.decimal(memory.kv_host_bytes)} of it in host memory" if memory.kv_host_bytes else ""
    where += "" if memory.kv_cache_bytes else " (none is kept)"
    where += ", after memory ran out with a larger store" if memory.fell_back else ""
    lines["memory"] = (
        f"K/V cache {filesize.decimal(memory.kv_cache_bytes)}{where}, peak {filesize.decimal(memory.peak_bytes)}"
    )
    if report.advice:
        lines["advice"] = report.advice
    return lines


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what a full device or machine says."""
    import torch

    # On the CPU, torch reports it as a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def memory_advice(
    pipe: Any, config: HSAConfig, options: dict[str, Any], smaller: str, whole_steps: str
) -> Iterator[None]:
    """Running out of memory as one line that says what to do.

    Args:
        options: as `call_options` gives them.
        smaller, whole_steps: how to ask for a smaller run, and for one that keeps no K and V.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if config.target == 1 or (not config.sparse_share and config.policy == "auto"):
            raise HeterostepError(f"out of memory: {smaller}") from error
        from heterostep.checkpoints import kv_cache_bytes

        needed = kv_cache_bytes(pipe, **{name: options[name] for name in (*SIZES, "guidance_scale")})
        cache = f"; the K/V cache alone needs {filesize.decimal(needed)}" if needed else ""
        raise HeterostepError(f"out of memory{cache}: {smaller}, or {whole_steps}") from error
