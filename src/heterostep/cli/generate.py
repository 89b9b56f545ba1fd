"""`heterostep generate` and `heterostep scene`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

import heterostep
from heterostep import making
from heterostep.cli.options import (
    DEVICE_HELP,
    DTYPE_HELP,
    GPUS_HELP,
    MOST_STEPS,
    OFFLOAD_HELP,
    POLICY_HELP,
    SYNC_HELP,
    check_guidance,
    check_offload,
    check_outputs,
    is_seen,
    on_device,
    silence,
    start_ranks,
    those_given,
    why_foreign,
)
from heterostep.config import HSAConfig
from heterostep.devices import Dtype, precision_of
from heterostep.errors import HeterostepError
from heterostep.files import replacing
from heterostep.order import check_model, check_prompt, default_steps

# Of the ways to keep the weights, what takes less of the GPU's memory than each.
OFFLOAD_MORE = {"none": "model", "model": "sequential"}
STEPS_HELP = "Denoising steps.  [default: the model's, as in plan, or 40 where they are not known]"


class Solver(str, Enum):
    """Updates that `HSAConfig` knows."""

    pipeline = "pipeline"
    euler = "euler"


def scene(
    caption: Annotated[str, typer.Argument(help="What to show, as in: a red circle moving right over blue stripes.")],
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("first.png"),
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the initial noise.")] = 0,
) -> None:
    """Write a first frame from the bundled model's world, for `generate --image`."""
    check_outputs((out, (".png",)))
    from PIL import Image

    with replacing(out) as part:
        Image.fromarray(heterostep.tiny.world.first_frame(caption, seed)).save(part, format="PNG")
    typer.echo(f"{out}")


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    image: Annotated[
        Path | None, typer.Option(help="First frame: image-to-video. Cropped to the video's shape.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers folder or hub id.  [default: the bundled model]")] = None,
    runtime: Annotated[
        float | None, typer.Option(help="Target: fraction of the dense seconds.  [default: 0.5]")
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Target: fraction of the dense evaluations. Reproducible.")
    ] = None,
    sparse_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Fraction of evaluations for single tokens.  [default: the policy decides]"),
    ] = None,
    policy: Annotated[str, typer.Option(help=POLICY_HELP)] = "auto",
    sync: Annotated[str, typer.Option(help=SYNC_HELP)] = "hold",
    no_kv: Annotated[bool, typer.Option("--no-kv", hidden=True, help="As --sparse-share 0.")] = False,
    kv_store: Annotated[
        str, typer.Option(help="Where K and V are kept: auto, device, fp8, offload or fp8-offload.")
    ] = "auto",
    vram: Annotated[
        float | None, typer.Option(help="Gigabytes that --kv-store auto may plan with.  [default: what is free]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=MOST_STEPS, help=STEPS_HELP)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.  [default: the model's]")] = None,
    guidance_2: Annotated[
        float | None,
        typer.Option("--guidance-2", help="The second expert's (Wan 2.2 A14B).  [default: as --guidance]"),
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the video.  [default: the model's]")] = None,
    fps: Annotated[
        float | None, typer.Option(min=1, max=1000, help="Frames per second.  [default: the model's]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the initial noise.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    gpus: Annotated[int, typer.Option(min=1, help=GPUS_HELP)] = 1,
    offload: Annotated[str, typer.Option(help=OFFLOAD_HELP)] = "none",
    dtype: Annotated[Dtype, typer.Option(help=DTYPE_HELP)] = Dtype.auto,
    solver: Annotated[
        Solver, typer.Option(help="How steps are made: pipeline (the scheduler's own) or euler (first order).")
    ] = Solver.pipeline,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="MP4 file; one of that name is replaced.  [default: video.mp4, or video-2.mp4 and so on]"),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="JSON file: what was asked, what was done.")] = None,
    heatmap: Annotated[Path | None, typer.Option(help="PNG or MP4 file: evaluations per token.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Evaluate every step (no speed-up).")] = False,
    both: Annotated[bool, typer.Option("--both", help="Dense, then faster from the same noise, side by side.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print neither progress nor summary.")] = False,
) -> None:
    """Generate a video."""
    if no_kv and sparse_share:
        raise HeterostepError("give --sparse-share or --no-kv, not both of them")
    sparse_share = 0.0 if no_kv else sparse_share
    check_prompt(prompt)
    check_guidance("--guidance", guidance)
    check_guidance("--guidance-2", guidance_2)
    given = those_given(
        {
            "--runtime": runtime is not None,
            "--share": share is not None,
            "--sparse-share": bool(sparse_share),
            "--policy": policy != "auto",
            "--sync": sync != "hold",
            "--both": both,
        }
    )
    if dense and given:
        raise HeterostepError(f"--dense skips nothing: leave out {given}")
    if runtime is not None and share is not None:
        raise HeterostepError("give --runtime or --share, not both of them")
    if dense:
        share = 1.0
    elif runtime is None and share is None:
        runtime = 0.5
    making.check_policy(policy)
    config = HSAConfig(
        runtime=runtime,
        share=share,
        policy=policy,
        sparse_share=sparse_share,
        sync=sync,
        kv_store=kv_store,
        vram=vram,
        solver=solver.value,
    )
    check_model(model)
    steps = steps or default_steps(model)
    making.check_target(config, steps)
    out = out or _free(Path("video.mp4"))
    check_outputs((out, (".mp4",)), (report, (".json",)), (heatmap, (".png", ".mp4")))
    picture = making.open_image(image) if image is not None else None
    making.check_known_sizes(model, height, width, frames)
    if guidance_2 is not None:
        making.check_second_guidance(model)
    check_offload(offload, device, gpus)
    start_ranks(gpus, device, context.obj)
    quiet = quiet or not is_seen(gpus)
    with silence(), on_device(gpus, device) as place:
        if model is None and not quiet and (reason := why_foreign(prompt)):
            typer.echo(
                f"note: the bundled model knows drawn shapes only, and {reason}; for any other prompt give --model",
                err=True,
            )
        precision = precision_of(dtype, place)
        pipe, defaults = making.load(model, picture is not None, precision)
        asked: dict[str, Any] = {"height": height, "width": width, "num_frames": frames, "guidance_scale": guidance}
        asked |= {"fps": fps, "prompt": prompt, "negative_prompt": negative, "num_inference_steps": steps}
        options, fps = making.call_options(pipe, defaults, asked, picture)
        if guidance_2 is not None:
            options["guidance_scale_2"] = guidance_2
            if not quiet and options["guidance_scale"] <= 1:
                typer.echo("note: --guidance-2 has no effect, for --guidance is not above 1", err=True)
        if not quiet and making.ignores_negative(pipe, options):
            typer.echo("note: --negative has no effect, for this run has no guidance by a negative prompt", err=True)
        with making.memory_advice(
            pipe,
            config,
            options,
            _smaller(OFFLOAD_MORE.get(offload) if place.type != "cpu" and gpus == 1 else None),
            "leave out --sparse-share and --policy",
        ):
            making.place(pipe, place, offload)
            if gpus > 1:
                from heterostep.pipeline import enable_context_parallel

                enable_context_parallel(pipe, gpus)
            reference = _make(pipe, HSAConfig(share=1.0), options, seed, "dense", quiet) if both else None
            result = _make(pipe, config, options, seed, "dense" if dense else "heterostep", quiet)
    if is_seen(gpus):
        _write(result, reference, out, report, heatmap, fps)
    if not quiet:
        if heatmap is not None and result.report.steps.min == result.report.steps.max:
            typer.echo("note: every token was evaluated equally often, so the heat map is of one colour", err=True)
        written = [path for path in (out, report, heatmap) if path is not None]
        stores = {"--sync": sync != "hold", "--kv-store": kv_store != "auto", "--vram": vram is not None}
        typer.echo(_summary(result, reference, written, [name for name, given in stores.items() if given]))


def _free(path: Path) -> Path:
    """The path, or with a number the first after it that nothing is at."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(each for each in numbered if not each.exists())


def _smaller(offload: str | None) -> str:
    """How to ask for a run that needs less memory, with another --offload where that is one."""
    less = "lower --height, --width or --frames"
    if offload is None:
        return f"{less}, or take a smaller --dtype"
    return f"{less}, take a smaller --dtype, or give --offload {offload}"


def _make(pipe: Any, config: HSAConfig, options: dict[str, Any], seed: int, name: str, quiet: bool) -> making.Result:
    from heterostep.progress import RunProgress

    with RunProgress(name, config, quiet) as progress:
        return making.make(pipe, config, options, seed, progress)


def _write(
    result: making.Result,
    reference: making.Result | None,
    out: Path,
    report: Path | None,
    heatmap: Path | None,
    fps: float,
) -> None:
    from heterostep import video

    shown = result.clip if reference is None else making.beside(reference, result)
    video.write_video(out, shown, fps, result.audio)
    # Right after the video that it is of.
    if report is not None:
        with replacing(report) as part:
            part.write_text(json.dumps(making.report_content(result, reference)) + "\n", encoding="utf-8")
    if heatmap is not None:
        from heterostep.viz import write_heatmap

        write_heatmap(heatmap, result.clip, result.report.steps_map, fps)


def _summary(
    result: making.Result, reference: making.Result | None, files: Sequence[Path], stores: Sequence[str]
) -> str:
    """`stores`: options that were given for K and V, as the command has them."""
    lines = making.summary(result, reference) | {"files": ", ".join(map(str, files))}
    if stores and result.report.memory.kv_store == "none":
        lines["memory"] += f"; {' and '.join(stores)} had no effect"
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())
