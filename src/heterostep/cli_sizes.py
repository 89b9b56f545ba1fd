"""`heterostep plan` and `heterostep bench`: what a size will need, and what it takes on this device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import filesize

from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError
from heterostep.files import replacing, writing

if TYPE_CHECKING:
    from heterostep.planning.plan import Plan

DEVICE_HELP = "cpu, cuda or cuda:N; auto takes CUDA where there is one."


def plan(
    model: Annotated[str, typer.Option(help="Short name, hub id or diffusers folder; --list names those known.")] = "",
    list_models: Annotated[bool, typer.Option("--list", help="The short names, and exit.")] = False,
    runtime: Annotated[float | None, typer.Option(help="Seconds over dense seconds.  [default: 0.5]")] = None,
    share: Annotated[float | None, typer.Option(help="Token evaluations over dense ones.")] = None,
    between: Annotated[
        float, typer.Option(min=0, max=1, help="Share of it for single tokens between dense steps.")
    ] = 0.0,
    policy: Annotated[
        str, typer.Option(help="Where evaluations go: auto, or hsa for the paper's step divisors.")
    ] = "auto",
    no_kv: Annotated[bool, typer.Option("--no-kv", hidden=True, help="The default now.")] = False,
    vram: Annotated[float | None, typer.Option(help="Gigabytes of the device.  [default: what is free]")] = None,
    kv_store: Annotated[str, typer.Option(help="auto, device, fp8, offload or fp8-offload.")] = "auto",
    offload: Annotated[str, typer.Option(help="none, or model: one model on the device at a time.")] = "none",
    image_to_video: Annotated[bool, typer.Option("--image-to-video", help="From a first frame.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.  [default: the model's]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.  [default: the model's]")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the video.  [default: the model's]")] = None,
    attention_backend: Annotated[str | None, typer.Option(help="Such as _native_cudnn.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, float16 or bfloat16.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of the table.")] = False,
) -> None:
    """Tokens, memory by K/V store and evaluations of a run, from the configuration alone."""
    from heterostep import configs

    if list_models:
        typer.echo("\n".join(configs.names()))
        return
    if not model:
        raise HeterostepError(f"give --model: a hub id, a folder, or one of {', '.join(configs.names())}")
    if runtime is not None and share is not None:
        raise HeterostepError("give --runtime or --share, not both of them")
    if no_kv and between:
        raise HeterostepError("give --between or --no-kv, not both of them")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise HeterostepError(f"--dtype must be float32, float16 or bfloat16, not {dtype}")
    runtime = 0.5 if runtime is None and share is None else runtime
    config = HSAConfig(
        runtime=runtime, share=share, policy=policy, between=between, kv_store=kv_store, vram=vram
    )  # fmt: skip
    import torch

    from heterostep.cli import _silence
    from heterostep.planning.plan import plan as make_plan

    with _silence():
        made = make_plan(
            model,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            image_to_video=image_to_video,
            offload=offload,
            attention_backend=attention_backend,
            dtype=getattr(torch, dtype),
            config=config,
        )
    if as_json:
        typer.echo(made.to_json())
        return
    _show_plan(made, config)


def _show_plan(made: Plan, config: HSAConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    dial = f"runtime {config.runtime:g}" if config.runtime is not None else f"share {config.target:g}"
    frames, height, width = made.grid
    lines = {
        "model": f"{made.model} ({made.pipeline})",
        "video": f"{made.height} x {made.width}, {made.num_frames} frames: {made.tokens:,} tokens "
        f"({frames} x {height} x {width}), {made.calls} transformer calls a step",
        "steps": f"{made.num_inference_steps}; {dial}: {made.share:.3f} of the dense token evaluations",
        "weights": ", ".join(f"{name} {filesize.decimal(size)}" for name, size in made.weights.items()),
        "activations": filesize.decimal(made.activation_bytes),
        "dense peak": f"{filesize.decimal(made.dense_peak_bytes)} without heterostep",
    }
    if made.seconds is not None and made.dense_seconds is not None:
        lines["seconds"] = f"{made.seconds:.1f} for the denoising loop, dense {made.dense_seconds:.1f} ({made.device})"
    for name, line in lines.items():
        typer.echo(f"{name:12s} {line}")
    keeps = made.chosen is None or made.chosen.store != "none"
    table = Table("K/V store", "on the device", "in host memory", "run's peak", "fits")
    for store in made.stores:
        fits = {None: "?", True: "yes", False: "no"}[store.fits]
        sizes = (filesize.decimal(size) for size in (store.device_bytes, store.host_bytes, store.peak_bytes))
        table.add_row(store.store, *sizes, fits)
    if keeps:
        Console().print(table)
    else:
        typer.echo("K and V      none are kept: a step evaluates all tokens or none")
    if made.limit_bytes is not None:
        typer.echo(f"may use      {filesize.decimal(made.limit_bytes)} of the device, a margin left")
    if made.chosen is None:
        least = min(made.stores, key=lambda store: store.peak_bytes)
        typer.echo(
            f"chosen       nothing fits: {least.store} needs {filesize.decimal(least.peak_bytes)}; make a smaller or "
            "shorter video, give --offload model, or leave out --between and --policy"
        )
        return
    host = f", {filesize.decimal(made.chosen.host_bytes)} in host memory" if made.chosen.host_bytes else ""
    fits = "; this does not fit" if made.chosen.fits is False else ""
    typer.echo(f"chosen       {made.chosen.store}: peak {filesize.decimal(made.chosen.peak_bytes)}{host}{fits}")


def bench(
    config: Annotated[str, typer.Option(help="Short name, hub id or diffusers folder; weights are random.")],
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the video.  [default: the model's]")] = None,
    shares: Annotated[str, typer.Option(help="Of active tokens, comma-separated.")] = "0.5,0.25,0.125,0.0625",
    stores: Annotated[str, typer.Option(help="Of K/V, comma-separated: device, fp8, offload, fp8-offload.")] = "device",
    sync: Annotated[str, typer.Option(help="K/V of skipped tokens: hold or drift.")] = "hold",
    layers: Annotated[int | None, typer.Option(min=1, help="Transformer blocks.  [default: all]")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="With compile_repeated_blocks.")] = False,
    no_graphs: Annotated[bool, typer.Option("--no-graphs", help="Replay no call as a CUDA graph.")] = False,
    attention_backend: Annotated[str | None, typer.Option(help="Such as _native_cudnn.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which all take turns.")] = 5,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto: float32 on the CPU.")] = "auto",
    out: Annotated[Path | None, typer.Option("--json", help="JSON file for the result.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="The JSON line alone.")] = False,
) -> None:
    """Seconds of a transformer call, dense and with a share of the tokens; a table, and one line of JSON."""
    from heterostep.cli import _check_outputs, _device, _out_of_memory, _silence

    _check_outputs((out, (".json",)))
    try:
        wanted = tuple(float(part) for part in shares.split(","))
    except ValueError as error:
        raise HeterostepError(f"--shares wants numbers, as in 0.5,0.25, not {shares}") from error
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise HeterostepError(f"--dtype must be auto, float32, float16 or bfloat16, not {dtype}")
    import torch

    from heterostep.bench import Size
    from heterostep.bench import bench as run_bench

    place = _device(device)
    precision = getattr(torch, {"auto": "bfloat16" if place.type == "cuda" else "float32"}.get(dtype, dtype))
    with _silence(), _out_of_memory("lower the size, or take fewer --layers, --stores or a smaller --dtype"):
        result = run_bench(
            config,
            Size(height, width, frames),
            shares=wanted,
            stores=tuple(name.strip() for name in stores.split(",")),
            sync=sync,
            layers=layers,
            compiled=compiled,
            cuda_graphs=not no_graphs,
            attention_backend=attention_backend,
            repeats=repeats,
            device=place,
            dtype=precision,
            tell=(lambda line: None) if quiet else (lambda line: typer.echo(line, err=True)),
        )
    if not quiet:
        _show_bench(result)
    typer.echo(json.dumps(result))
    if out is not None:
        with writing(out), replacing(out) as part:
            part.write_text(json.dumps(result, indent=1) + "\n")


def _show_bench(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    how = ("compiled blocks" if result["compiled"] else "eager") + ", in drift" * (result["sync"] == "drift")
    table = Table(
        "store", "active share", "ms", "over plain", "K/V on the device", "in host memory",
        title=f"{result['name']}, {result['layers']} layers, {result['tokens']:,} tokens, {result['dtype']}, {how}, "
        f"{result['device']}: a plain dense call takes {result['plain_seconds'] * 1000:.1f} ms",
    )  # fmt: skip
    for row in result["rows"]:
        what = "all, K/V kept" if row["share"] == 1 else f"{row['share']:g}" + ", replayed" * row["replayed"]
        sizes = (filesize.decimal(row[name]) for name in ("device_bytes", "host_bytes"))
        table.add_row(row["store"], what, f"{row['seconds'] * 1000:.1f}", f"{row['ratio']:.4f}", *sizes)
    Console().print(table)
    kinds = list(result["breakdown"]["plain"])
    table = Table("ms by kind of work", *kinds)
    for name, parts in result["breakdown"].items():
        table.add_row(name, *(f"{parts[kind] * 1000:.2f}" for kind in kinds))
    Console().print(table)
