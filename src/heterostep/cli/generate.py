"""`heterostep generate` and `heterostep scene`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import filesize

import heterostep
from heterostep.cli.options import (
    DEVICE_HELP,
    DTYPE_HELP,
    Dtype,
    check_guidance,
    check_outputs,
    device_of,
    is_out_of_memory,
    load,
    open_image,
    precision_of,
    silence,
)
from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError
from heterostep.files import replacing

if TYPE_CHECKING:
    import numpy as np

    from heterostep.engine.report import Report
    from heterostep.video import Audio


class Solver(str, Enum):
    """Updates that `HSAConfig` knows."""

    pipeline = "pipeline"
    euler = "euler"


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


def scene(
    caption: Annotated[str, typer.Argument(help="As in: a red circle moving right over blue stripes.")],
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("first.png"),
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise.")] = 0,
) -> None:
    """Write a first frame from the bundled model's world, for `generate --image`."""
    check_outputs((out, (".png",)))
    from PIL import Image

    with replacing(out) as part:
        Image.fromarray(heterostep.tiny.world.first_frame(caption, seed)).save(part, format="PNG")
    typer.echo(f"{out}")


def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    image: Annotated[
        Path | None, typer.Option(help="First frame: image-to-video. Cropped to the video's shape.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers folder or hub id.  [default: the bundled model]")] = None,
    runtime: Annotated[float | None, typer.Option(help="Seconds over dense seconds.  [default: 0.5]")] = None,
    share: Annotated[float | None, typer.Option(help="Token evaluations over dense ones; repeatable.")] = None,
    sparse_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of it for single tokens, at sparse steps between the dense ones.")
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
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: Annotated[Dtype, typer.Option(help=DTYPE_HELP)] = Dtype.auto,
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
    from heterostep.engine.schedule import Schedule
    from heterostep.policy import Run
    from heterostep.sigmas import nominal_sigmas

    if no_kv and sparse_share:
        raise HeterostepError("give --sparse-share or --no-kv, not both of them")
    check_guidance(guidance)
    config = _config(runtime, share, sparse_share, dense, both, solver.value)
    config = dataclasses.replace(config, policy=policy, sync=sync, kv_store=kv_store, vram=vram)
    Schedule(config, Run(nominal_sigmas(steps))).check()
    check_outputs((out, (".mp4",)), (report, (".json",)), (heatmap, (".png", ".mp4")))
    picture = open_image(image) if image is not None else None
    with silence():
        from heterostep import checkpoints

        place = device_of(device)
        precision = precision_of(dtype, place)
        pipe, defaults = load(model, picture is not None, precision)
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


def _config(
    runtime: float | None, share: float | None, sparse_share: float, dense: bool, both: bool, solver: str
) -> HSAConfig:
    if dense and (runtime is not None or share is not None or sparse_share != 0 or both):
        raise HeterostepError("--dense skips nothing: leave out --runtime, --share, --sparse-share and --both")
    if runtime is not None and share is not None:
        raise HeterostepError("give --runtime or --share, not both of them")
    if dense:
        return HSAConfig(share=1.0, solver=solver)
    runtime = 0.5 if runtime is None and share is None else runtime
    return HSAConfig(runtime=runtime, share=share, sparse_share=sparse_share, solver=solver)


@contextlib.contextmanager
def _memory_advice(pipe: Any, config: HSAConfig, sizes: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "lower --height, --width or --frames, or take a smaller --dtype"
        if config.target == 1 or (not config.sparse_share and config.policy == "auto"):
            raise HeterostepError(f"out of memory: {advice}") from error
        from heterostep.checkpoints import kv_cache_bytes

        needed = kv_cache_bytes(pipe, **sizes)
        cache = f"; the K/V cache alone needs {filesize.decimal(needed)}" if needed else ""
        raise HeterostepError(f"out of memory{cache}: {advice}, or leave out --sparse-share and --policy") from error


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
