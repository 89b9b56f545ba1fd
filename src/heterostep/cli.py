"""The `heterostep` command. torch and diffusers are imported when a model is needed: `--help` answers at once."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import filesize

import heterostep
from heterostep import cli_sizes, interrupts
from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError, first_line
from heterostep.files import name_is_too_long, replacing, writing

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from heterostep.engine.report import Report
    from heterostep.video import Audio

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(cli_sizes.plan)
app.command()(cli_sizes.bench)


class Dtype(str, Enum):
    """Precisions of the transformer and the text encoder."""

    auto = "auto"
    float32 = "float32"
    tf32 = "tf32"
    float16 = "float16"
    bfloat16 = "bfloat16"


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


class Solver(str, Enum):
    """Updates that `HSAConfig` knows."""

    pipeline = "pipeline"
    euler = "euler"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"heterostep {heterostep.__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """Video diffusion in a fraction of the time, without training."""


@app.command()
def scene(
    caption: Annotated[str, typer.Argument(help="As in: a red circle moving right over blue stripes.")],
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("first.png"),
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise.")] = 0,
) -> None:
    """Write a first frame from the bundled model's world, for `generate --image`."""
    _check_outputs((out, (".png",)))
    from PIL import Image

    with replacing(out) as part:
        Image.fromarray(heterostep.tiny.world.first_frame(caption, seed)).save(part, format="PNG")
    typer.echo(f"{out}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    image: Annotated[
        Path | None, typer.Option(help="First frame: image-to-video. Cropped to the video's shape.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers folder or hub id.  [default: the bundled model]")] = None,
    runtime: Annotated[float | None, typer.Option(help="Seconds over dense seconds.  [default: 0.5]")] = None,
    share: Annotated[float | None, typer.Option(help="Token evaluations over dense ones; repeatable.")] = None,
    between: Annotated[
        float, typer.Option(min=0, max=1, help="Share of it for single tokens between dense steps.")
    ] = 0.0,
    policy: Annotated[
        str, typer.Option(help="Where evaluations go: auto, or hsa for the paper's step divisors.")
    ] = "auto",
    sync: Annotated[str, typer.Option(help="K/V of skipped tokens: hold, or drift along their last change.")] = "hold",
    no_kv: Annotated[bool, typer.Option("--no-kv", hidden=True, help="The default now.")] = False,
    kv_store: Annotated[str, typer.Option(help="auto, device, fp8, offload or fp8-offload.")] = "auto",
    vram: Annotated[float | None, typer.Option(help="Gigabytes it may use, for auto.  [default: what is free]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 40,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.  [default: the model's]")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the video.  [default: the model's]")] = None,
    fps: Annotated[
        float | None, typer.Option(min=1, max=1000, help="Frames per second.  [default: the model's]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes CUDA where there is one.")] = "auto",
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="auto: float32 on the CPU, bfloat16 on CUDA. tf32: float32 whose products have TF32's ten bits."
        ),
    ] = Dtype.auto,
    solver: Annotated[Solver, typer.Option(help="The update of skipped tokens.")] = Solver.pipeline,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    out: Annotated[Path, typer.Option(help="MP4 file.")] = Path("video.mp4"),
    report: Annotated[Path | None, typer.Option(help="JSON file: what was asked, what was done.")] = None,
    heatmap: Annotated[Path | None, typer.Option(help="PNG or MP4 file: evaluations per token.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Skip nothing.")] = False,
    both: Annotated[bool, typer.Option("--both", help="Dense, then sparse from the same noise, side by side.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Neither progress nor summary.")] = False,
) -> None:
    """Generate a video."""
    from heterostep.engine.schedule import Schedule, nominal_sigmas
    from heterostep.policy import Run

    if no_kv and between:
        raise HeterostepError("give --between or --no-kv, not both of them")
    _check_guidance(guidance)
    config = _config(runtime, share, between, dense, both, solver.value)
    config = dataclasses.replace(config, policy=policy, sync=sync, kv_store=kv_store, vram=vram)
    Schedule(config, Run(nominal_sigmas(steps))).check()
    _check_outputs((out, (".mp4",)), (report, (".json",)), (heatmap, (".png", ".mp4")))
    picture = _open_image(image) if image is not None else None
    with _silence():
        from heterostep import checkpoints

        place = _device(device)
        precision = _precision(dtype, place)
        pipe, defaults = _load(model, picture is not None, precision)
        asked = {"height": height, "width": width, "num_frames": frames, "guidance_scale": guidance, "fps": fps}
        options: dict[str, Any] = {name: defaults[name] if value is None else value for name, value in asked.items()}
        fps = options.pop("fps")
        sizes = {name: options[name] for name in ("height", "width", "num_frames")}
        checkpoints.check_sizes(pipe, **sizes)
        options |= {"prompt": prompt, "negative_prompt": negative, "num_inference_steps": steps}
        if "frame_rate" in inspect.signature(type(pipe).__call__).parameters:
            options["frame_rate"] = fps
        if picture is not None:
            from PIL import ImageOps

            options["image"] = ImageOps.fit(picture, (options["width"], options["height"]))
        with _memory_advice(pipe, config, sizes | {"guidance_scale": options["guidance_scale"]}):
            pipe.to(place)
            reference = _run(pipe, HSAConfig(share=1.0), options, seed, "dense", quiet) if both else None
            result = _run(pipe, config, options, seed, "dense" if dense else "sparse", quiet)
    _write(result, reference, out, report, heatmap, fps)
    if not quiet:
        typer.echo(_summary(result, reference, [path for path in (out, report, heatmap) if path is not None]))


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="Folder; a comparison that was stopped goes on.")] = Path("report"),
    prompts: Annotated[
        Path | None, typer.Option(help="File, a prompt a line.  [default: held-out captions of the bundled model]")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out captions, without --prompts.")] = 2,
    image_to_video: Annotated[
        bool, typer.Option("--image-to-video", help="From first frames; in --prompts after a tab.")
    ] = False,
    runtimes: Annotated[str, typer.Option(help="Over the dense loop's, comma-separated.")] = "1,0.75,0.5,0.25",
    methods: Annotated[str, typer.Option(help="Comma-separated names, or all.")] = "all",
    points: Annotated[int, typer.Option(min=1, help="Dial values of methods that are not set by a budget.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is timed.")] = 1,
    batch: Annotated[
        int, typer.Option(min=1, help="Prompts made in one call; above 1 by token evaluations, nothing is timed.")
    ] = 1,
    seeds: Annotated[int, typer.Option(min=1, max=10**6, help="Noises that each prompt is made from.")] = 1,
    videos: Annotated[int, typer.Option(min=0, help="Prompts whose videos are shown.")] = 2,
    regime: Annotated[
        str | None,
        typer.Option(help="Settings of published checkpoints, comma-separated names or all: one comparison each."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers folder or hub id.  [default: the bundled model]")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of the dense run.  [default: 40]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.  [default: the model's]")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the video.  [default: the model's]")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of the first prompt's noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes CUDA where there is one.")] = "auto",
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="auto: float32 on the CPU, bfloat16 on CUDA. tf32: float32 whose products have TF32's ten bits."
        ),
    ] = Dtype.auto,
    vbench: Annotated[
        bool, typer.Option("--vbench", help="Scores by the vbench command; keeps the videos of all prompts.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Neither progress nor table.")] = False,
) -> None:
    """Draw the quality-runtime frontier of heterostep and its peers on one model."""
    wanted = _runtimes(runtimes)
    if batch > 1 and repeats > 1:
        raise HeterostepError("--repeats is for timings, and a batch is not timed: leave out --repeats or --batch")
    if regime is not None and (steps is not None or guidance is not None or vbench):
        raise HeterostepError("--regime sets steps and guidance: leave out --steps, --guidance and --vbench")
    _check_guidance(guidance)
    _check_folder(out)
    if prompts is not None and not prompts.is_file():
        raise HeterostepError(f"there is no file {prompts}")
    if prompts is None and model is not None:
        raise HeterostepError("give --prompts: the held-out captions are the bundled model's")
    if importlib.util.find_spec("torchmetrics") is None:
        raise HeterostepError("the comparison wants torchmetrics: pip install 'heterostep[compare]'")
    if vbench:
        from heterostep.compare import vbench as scores

        scores.command()
    from heterostep import checkpoints
    from heterostep.compare import matrix, page, peers, regimes, table
    from heterostep.compare import prompts as source
    from heterostep.compare.catalogue import METHODS
    from heterostep.compare.run import Comparison, Settings

    task = "image" if image_to_video else "text"
    todo_regimes = [] if regime is None else _regimes(regime, task)
    chosen = _methods(methods, METHODS)
    if prompts is not None:
        # Faults in it are found before the model is loaded, which knows the size that first frames are cropped to.
        source.read_prompts(prompts, seed, (1, 1) if image_to_video else None)
    tell = (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))
    command = "heterostep " + " ".join(map(shlex.quote, sys.argv[1:]))
    with _silence(), _out_of_memory("lower the size or --batch, or take a smaller --dtype"):
        place = _device(device)
        pipe, defaults = _load(model, image_to_video, _precision(dtype, place))
        asked = {"height": height, "width": width, "num_frames": frames, "guidance_scale": guidance}
        options: dict[str, Any] = {name: defaults[name] if value is None else value for name, value in asked.items()}
        checkpoints.check_sizes(pipe, **{name: options[name] for name in ("height", "width", "num_frames")})
        options["num_inference_steps"] = steps or 40
        if prompts is None:
            todo = source.held_out(count, seed, image_to_video)
        else:
            todo = source.read_prompts(prompts, seed, (options["width"], options["height"]) if image_to_video else None)
        todo = source.with_seeds(todo, seeds)
        pipe.to(place)

        settings = Settings(
            model="the bundled model" if model is None else model,
            mode=task,
            options=options,
            runtimes=wanted,
            fps=defaults["fps"],
            repeats=repeats,
            points=points,
            shown=max(videos, len(todo)) if vbench else videos,
            judged=model is None and prompts is None,
            batch=batch,
            seeds=seeds,
        )
        known = list(METHODS.values())
        if regime is not None:
            if regime.strip() == "all":
                todo_regimes = [each for each in todo_regimes if regimes.refuses(pipe, each) is None]
            written = matrix.compare_regimes(pipe, todo, chosen, todo_regimes, settings, out, command, tell, known)
        else:
            peers.calibrate_with(pipe, **{name: options[name] for name in asked})
            results = Comparison(pipe, todo, chosen, settings, out, command, tell, known).run()
            if vbench:
                import torch

                # VBench has networks of its own to put there.
                pipe.to("cpu")
                torch.cuda.empty_cache()
                results = scores.score(out, videos, tell)
            with writing(out / "index.html"):
                written = page.write_page(out)
    if not quiet:
        if todo_regimes:
            typer.echo(matrix.table(matrix.matrix(matrix.read(out), wanted)))
        else:
            table.show(results)
        typer.echo(f"{written}")


@contextlib.contextmanager
def _out_of_memory(advice: str) -> Iterator[None]:
    """Running out of memory as one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise HeterostepError(f"out of memory: {advice}") from error


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    # On the CPU, torch reports it as a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _runtimes(text: str) -> tuple[float, ...]:
    try:
        values = tuple(sorted({float(part) for part in text.split(",")}, reverse=True))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 1 for value in values):
        raise HeterostepError(f"--runtimes wants numbers above 0 and at most 1, as in 1,0.5,0.25, not {text}")
    return values


def _regimes(text: str, task: str) -> list[Any]:
    from heterostep.compare.regimes import REGIMES, suited

    if text.strip() == "all":
        return suited(task)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in REGIMES]
    if unknown or not names:
        raise HeterostepError(f"no such regime: {', '.join(unknown) or text!r}; the regimes are {', '.join(REGIMES)}")
    return [REGIMES[name] for name in dict.fromkeys(names)]


def _methods(text: str, known: dict[str, Any]) -> list[Any]:
    names = list(known) if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise HeterostepError(f"--methods names none; the methods are {', '.join(known)}")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise HeterostepError(f"no such method: {', '.join(unknown)}; the methods are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _config(
    runtime: float | None, share: float | None, between: float, dense: bool, both: bool, solver: str
) -> HSAConfig:
    if dense and (runtime is not None or share is not None or between != 0 or both):
        raise HeterostepError("--dense skips nothing: leave out --runtime, --share, --between and --both")
    if runtime is not None and share is not None:
        raise HeterostepError("give --runtime or --share, not both of them")
    if dense:
        return HSAConfig(share=1.0, solver=solver)
    runtime = 0.5 if runtime is None and share is None else runtime
    return HSAConfig(runtime=runtime, share=share, between=between, solver=solver)


def _check_guidance(guidance: float | None) -> None:
    if guidance is not None and not 0 <= guidance < math.inf:
        raise HeterostepError(f"--guidance must be a number of at least 0, not {guidance:g}")


def _check_folder(path: Path) -> None:
    """Whether the folder is there or can be made, before any work."""
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise HeterostepError(f"{there} is no folder")
    if not os.access(there, os.W_OK):
        raise HeterostepError(f"cannot write to the folder {there}")


def _check_outputs(*outputs: tuple[Path | None, tuple[str, ...]]) -> None:
    """Whether each (path, suffixes) can be written, before any work."""
    given = [(path, suffixes) for path, suffixes in outputs if path is not None]
    for path, suffixes in given:
        if path.suffix.lower() not in suffixes:
            raise HeterostepError(f"{path} should end in {' or '.join(suffixes)}")
        if path.is_dir():
            raise HeterostepError(f"{path} is a folder")
        if not path.parent.is_dir():
            raise HeterostepError(f"there is no folder {path.parent} to write {path.name} to")
        if not os.access(path.parent, os.W_OK):
            raise HeterostepError(f"cannot write to the folder {path.parent}")
        if name_is_too_long(path):
            raise HeterostepError(f"the file name {path.name[:20]}... is too long")
    if len({path.resolve() for path, _ in given}) < len(given):
        raise HeterostepError("two outputs have the same path")


def _open_image(path: Path) -> Image.Image:
    from PIL import Image, ImageOps

    if not path.is_file():
        raise HeterostepError(f"there is no image {path}")
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError and more for broken files.
        raise HeterostepError(f"cannot read the image {path}: {first_line(error)}") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No chatter of libraries between the progress lines."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    interrupts.check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise HeterostepError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HeterostepError(f"there is no device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _precision(dtype: Dtype, device: Any) -> Any:
    import torch

    if dtype is Dtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype is Dtype.tf32:
        from heterostep.precision import use_tf32

        use_tf32()
        return torch.float32
    return getattr(torch, dtype.value)


def _load(model: str | None, with_image: bool, precision: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline, on the CPU, and its default sizes and guidance."""
    if model is None:
        pipe, defaults = heterostep.tiny.load(image_to_video=with_image), heterostep.tiny.DEFAULTS
        pipe.transformer.to(precision)
        pipe.text_encoder.to(precision)
    else:
        from heterostep import checkpoints

        pipe, defaults = checkpoints.load(model, with_image, precision)
    # Most imports are behind us.
    interrupts.check()
    return pipe, defaults


@contextlib.contextmanager
def _memory_advice(pipe: Any, config: HSAConfig, sizes: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        advice = "lower --height, --width or --frames, or take a smaller --dtype"
        if config.target == 1 or (not config.between and config.policy == "auto"):
            raise HeterostepError(f"out of memory: {advice}") from error
        from heterostep.checkpoints import kv_cache_bytes

        needed = kv_cache_bytes(pipe, **sizes)
        cache = f"; the K/V cache alone needs {filesize.decimal(needed)}" if needed else ""
        raise HeterostepError(f"out of memory{cache}: {advice}, or leave out --between and --policy") from error


def _run(pipe: Any, config: HSAConfig, options: dict[str, Any], seed: int, name: str, quiet: bool) -> Result:
    import torch

    from heterostep.progress import RunProgress
    from heterostep.video import Audio

    if pipe.device.type == "cuda":
        # Otherwise the peak of a dense run before this one would be reported again.
        torch.cuda.reset_peak_memory_stats(pipe.device)
    with RunProgress(name, config, quiet) as progress, heterostep.enabled(pipe, config=config, on_step=progress):
        generator = torch.Generator("cpu").manual_seed(seed)
        output = pipe(**options, generator=generator, output_type="np")
        report = heterostep.report(pipe)
    audio = None
    if getattr(output, "audio", None) is not None:
        audio = Audio(output.audio[0].float().cpu().numpy(), pipe.vocoder.config.output_sampling_rate)
    clip = (output.frames[0] * 255).round().astype("uint8")
    return Result(clip, dataclasses.replace(report, seed=seed), audio)


def _write(
    result: Result, reference: Result | None, out: Path, report: Path | None, heatmap: Path | None, fps: float
) -> None:
    from heterostep import video

    shown = result.clip
    if reference is not None:
        labels = (f"dense {reference.seconds:.1f} s", f"heterostep {result.seconds:.1f} s")
        shown = video.side_by_side(reference.clip, result.clip, labels)
    video.write_video(out, shown, fps, result.audio)
    if heatmap is not None:
        from heterostep.viz import write_heatmap

        write_heatmap(heatmap, result.clip, result.report.steps_map, fps)
    if report is not None:
        content = result.report.to_dict()
        if reference is not None:
            psnr = result.psnr(reference)
            content["dense_measured_seconds"] = reference.seconds
            # JSON has no infinity: equal videos have no PSNR.
            content["psnr"] = psnr if math.isfinite(psnr) else None
        with replacing(report) as part:
            part.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _summary(result: Result, reference: Result | None, files: Sequence[Path]) -> str:
    report = result.report
    runtime, share, steps, memory = report.runtime, report.share, report.steps, report.memory
    lines = {}
    if runtime.target is not None and runtime.achieved is not None:
        lines["runtime"] = f"asked {runtime.target:.2f} of dense, achieved {runtime.achieved:.2f}"
        if runtime.warmup_seconds > 0.05 * runtime.seconds:
            lines["runtime"] += f", besides {runtime.warmup_seconds:.1f} s of warm-up"
    if share.target is not None:
        lines["share"] = f"asked {share.target:.2f} of the dense evaluations, spent {share.achieved:.2f}"
        if share.unspent:
            lines["share"] += f" ({share.unspent:.3f} are less than a whole step)"
    lines["seconds"] = f"{result.seconds:.1f} for the denoising loop"
    if reference is not None:
        lines["seconds"] += f", dense {reference.seconds:.1f}, ratio {result.seconds / reference.seconds:.2f}"
        if runtime.dense_seconds is not None:
            off = 100 * (runtime.dense_seconds / reference.seconds - 1)
            lines["estimate"] = f"dense was estimated online {runtime.dense_seconds:.1f} ({off:+.0f} %)"
        lines["psnr"] = f"{result.psnr(reference):.1f} dB against dense"
    lines["steps"] = (
        f"mean {steps.mean:.1f} per token, min {steps.min}, max {steps.max}, of {report.num_inference_steps}"
    )
    where = "" if memory.kv_store in ("none", "device") else f" ({memory.kv_store})"
    where += f", {filesize.decimal(memory.kv_host_bytes)} of it in host memory" if memory.kv_host_bytes else ""
    where += ", after memory ran out with a larger store" if memory.fell_back else ""
    lines["memory"] = (
        f"K/V cache {filesize.decimal(memory.kv_cache_bytes)}{where}, peak {filesize.decimal(memory.peak_bytes)}"
    )
    if report.advice:
        lines["advice"] = report.advice
    lines["files"] = ", ".join(map(str, files))
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; every fault is one line on stderr.

    Returns:
        0, 2 for a fault, or 130 after Ctrl-C.
    """
    try:
        with interrupts.watched():
            code = app(arguments, prog_name="heterostep", standalone_mode=False)
    except (HeterostepError, OSError) as error:
        return _fail(first_line(error), 2)
    except typer.TyperException as error:
        return _fail(first_line(Exception(error.format_message())), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        return _fail("interrupted", 130)
    return code or 0


def _fail(message: str, code: int) -> int:
    typer.echo(f"heterostep: {message}", err=True)
    return code
