"""`heterostep plan`: what a size will need."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich import filesize

from heterostep import making
from heterostep.cli.options import DTYPE_HELP, MOST_STEPS, POLICY_HELP, silence
from heterostep.config import HSAConfig
from heterostep.devices import Dtype, device_of, precision_of
from heterostep.errors import HeterostepError

if TYPE_CHECKING:
    from heterostep.planning.plan import Plan


def plan(
    model: Annotated[str, typer.Option(help="Short name, hub id or diffusers folder; --list names those known.")] = "",
    list_models: Annotated[bool, typer.Option("--list", help="Print the short names and exit.")] = False,
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
    no_kv: Annotated[bool, typer.Option("--no-kv", hidden=True, help="As --sparse-share 0.")] = False,
    vram: Annotated[
        float | None, typer.Option(help="Gigabytes of the device's memory to plan for.  [default: what is free]")
    ] = None,
    kv_store: Annotated[
        str, typer.Option(help="Where K and V are kept: auto, device, fp8, offload or fp8-offload.")
    ] = "auto",
    offload: Annotated[str, typer.Option(help="none, or model: one model on the device at a time.")] = "none",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that make the video together; the figures are of each.")] = 1,
    image_to_video: Annotated[
        bool, typer.Option("--image-to-video", help="From a first frame, where the model makes videos from text too.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps.  [default: the model's]")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.  [default: the model's]")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the video.  [default: the model's]")] = None,
    attention_backend: Annotated[str | None, typer.Option(help="Attention backend, such as _native_cudnn.")] = None,
    dtype: Annotated[Dtype, typer.Option(help=DTYPE_HELP)] = Dtype.bfloat16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Tokens, memory by K/V store and evaluations of a run, from the configuration alone.

    Ends with exit code 1 if the run does not fit.
    """
    from heterostep import configs

    if list_models:
        typer.echo(json.dumps(configs.names(), indent=1) if as_json else "\n".join(configs.names()))
        return
    if not model:
        raise HeterostepError(f"give --model: a hub id, a folder, or one of {', '.join(configs.names())}")
    if runtime is not None and share is not None:
        raise HeterostepError("give --runtime or --share, not both of them")
    if no_kv and sparse_share:
        raise HeterostepError("give --sparse-share or --no-kv, not both of them")
    sparse_share = 0.0 if no_kv else sparse_share
    runtime = 0.5 if runtime is None and share is None else runtime
    making.check_policy(policy)
    config = HSAConfig(
        runtime=runtime, share=share, policy=policy, sparse_share=sparse_share, kv_store=kv_store, vram=vram
    )  # fmt: skip
    making.check_known_sizes(model, height, width, frames)
    from heterostep.planning.plan import plan as make_plan

    with silence():
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
            gpus=gpus,
            dtype=precision_of(dtype, device_of("auto")),
            config=config,
        )
    if as_json:
        typer.echo(made.to_json())
    else:
        _show_plan(made, config, offload)
    if made.chosen is None or made.chosen.fits is False:
        raise typer.Exit(1)


def _show_plan(made: Plan, config: HSAConfig, offload: str) -> None:
    from rich.console import Console
    from rich.table import Table

    dial = f"runtime {config.runtime:g}" if config.runtime is not None else f"share {config.target:g}"
    grid = " x ".join(map(str, made.grid))
    lines = {
        "model": f"{made.model} ({made.pipeline}{', from a first frame' if made.from_frames else ''})",
        "video": f"{made.height} x {made.width}, {made.num_frames} frames: {made.tokens:,} tokens "
        f"({grid}), {made.calls} transformer calls a step",
        "steps": f"{len(made.active_share)}; {dial}: {made.share:.3f} of the dense token evaluations",
        "at first": made.evaluated,
        **({"advice": made.advice} if made.advice else {}),
        **({"on each of": f"{made.gpus} GPUs, what follows"} if made.gpus > 1 else {}),
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
        if made.limit_bytes is None:
            typer.echo("fits         unknown without a GPU: give the gigabytes of one as --vram")
    else:
        unused = "" if config.kv_store == "auto" else "; --kv-store has no effect"
        if made.roomy_share is not None:
            unknown = ": give the gigabytes of a GPU as --vram" if made.limit_bytes is None else ""
            unused += f"; {made.roomy_share:.2f} with single tokens, where their K and V fit{unknown}"
        typer.echo(f"K and V      none are kept: a step evaluates all tokens or none{unused}")
    if made.limit_bytes is not None:
        typer.echo(f"may use      {filesize.decimal(made.limit_bytes)} of the device, a margin left")
    smaller = ["make a smaller or shorter video"]
    # `generate` takes --offload for one GPU only.
    if made.gpus == 1:
        more = "give plan and generate --offload model" if offload == "none" else "generate with --offload sequential"
        smaller.append(more)
    if made.chosen is None:
        least = min(made.stores, key=lambda store: store.peak_bytes)
        typer.echo(
            f"chosen       nothing fits: {least.store} needs {filesize.decimal(least.peak_bytes)}; "
            f"{', '.join(smaller)}, or leave out --sparse-share and --policy"
        )
        return
    host = f", {filesize.decimal(made.chosen.host_bytes)} in host memory" if made.chosen.host_bytes else ""
    fits = f"; this does not fit: {', or '.join(smaller)}" if made.chosen.fits is False else ""
    peak = f"{filesize.decimal(made.chosen.peak_bytes)}{host}{fits}"
    typer.echo(f"chosen       {made.chosen.store}: peak {peak}" if keeps else f"run's peak   {peak}")
