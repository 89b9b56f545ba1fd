"""`heterostep bench`: what a transformer call takes on this device."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import filesize

from heterostep import making
from heterostep.cli.options import (
    DEVICE_HELP,
    DTYPE_HELP,
    check_outputs,
    is_seen,
    on_device,
    out_of_memory,
    silence,
    start_ranks,
)
from heterostep.devices import Dtype, precision_of
from heterostep.errors import HeterostepError, first_line
from heterostep.files import replacing, writing

if TYPE_CHECKING:
    import torch


def bench(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="Short name, hub id or diffusers folder; weights are random.")],
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the video.  [default: the model's]")] = None,
    shares: Annotated[
        str, typer.Option(help="Active-token shares to time, comma-separated.")
    ] = "0.5,0.25,0.125,0.0625",
    stores: Annotated[
        str, typer.Option(help="K/V stores to time, comma-separated: device, fp8, offload, fp8-offload.")
    ] = "device",
    sync: Annotated[str, typer.Option(help="K/V of skipped tokens: hold or drift.")] = "hold",
    layers: Annotated[int | None, typer.Option(min=1, help="Transformer blocks.  [default: all]")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks, by compile_repeated_blocks.")
    ] = False,
    no_graphs: Annotated[bool, typer.Option("--no-graphs", help="Do not replay calls as CUDA graphs.")] = False,
    attention_backend: Annotated[str | None, typer.Option(help="Attention backend, such as _native_cudnn.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timing rounds.")] = 5,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of this machine that share one call.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help=DTYPE_HELP)] = Dtype.auto,
    out: Annotated[Path | None, typer.Option("--json", help="JSON file for the result.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the JSON line alone.")] = False,
) -> None:
    """Seconds of a transformer call, dense and with a share of the tokens; a table, and one line of JSON."""
    check_outputs((out, (".json",)))
    try:
        wanted = tuple(float(part) for part in shares.split(","))
    except ValueError as error:
        raise HeterostepError(f"--shares expects numbers, as in 0.5,0.25, not {shares!r}") from error
    making.check_known_sizes(config, height, width, frames)
    start_ranks(gpus, device, context.obj)
    quiet = quiet or not is_seen(gpus)
    from heterostep.bench import Size
    from heterostep.bench import bench as run_bench

    advice = "lower the size, or take fewer --layers, --stores or a smaller --dtype"
    with silence(), out_of_memory(advice), on_device(gpus, device) as place, _backend_runs(attention_backend, place):
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
            gpus=gpus,
            dtype=precision_of(dtype, place),
            tell=(lambda line: None) if quiet else (lambda line: typer.echo(line, err=True)),
        )
    if not is_seen(gpus):
        return
    if not quiet:
        _show_bench(result)
    typer.echo(json.dumps(result))
    if out is not None:
        with writing(out), replacing(out) as part:
            part.write_text(json.dumps(result, indent=1) + "\n")


def _show_bench(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    device = result["device"] if result["gpus"] == 1 else f"{result['gpus']} x {result['device']}"
    how = ("compiled blocks" if result["compiled"] else "eager") + ", in drift" * (result["sync"] == "drift")
    table = Table(
        "store", "active share", "ms", "over plain", "K/V on the device", "in host memory",
        title=f"{result['name']}, {result['layers']} layers, {result['tokens']:,} tokens, {result['dtype']}, {how}, "
        f"{device}: a plain dense call takes {result['plain_seconds'] * 1000:.1f} ms",
    )  # fmt: skip
    for row in result["rows"]:
        what = "all, K/V kept" if row["share"] == 1 else f"{row['share']:g}" + ", replayed" * row["replayed"]
        sizes = (filesize.decimal(row[name]) for name in ("device_bytes", "host_bytes"))
        table.add_row(row["store"], what, f"{row['seconds'] * 1000:.1f}", f"{row['ratio']:.4f}", *sizes)
    Console().print(table)
    calls = result["breakdown"]
    # On a CPU or one GPU, nothing is between GPUs.
    kinds = [kind for kind in calls["plain"] if any(parts[kind] for parts in calls.values())]
    table = Table("ms by kind of work", *kinds)
    for name, parts in calls.items():
        table.add_row(name, *(f"{parts[kind] * 1000:.2f}" for kind in kinds))
    Console().print(table)


@contextlib.contextmanager
def _backend_runs(name: str | None, device: torch.device) -> Iterator[None]:
    """A call that fails where an attention backend was asked for that is made for GPUs, as one line."""
    try:
        yield
    except RuntimeError as error:
        if name is None or device.type == "cuda" or making.is_out_of_memory(error):
            raise
        raise HeterostepError(
            f"a call with the attention backend {name} failed on {device.type}: leave out --attention-backend, or use "
            f"a GPU ({first_line(error)})"
        ) from error
