"""`heterostep batch`: the lines of a file as videos, on Ray's workers."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heterostep import interrupts, making
from heterostep.cli.options import DEVICE_HELP, DTYPE_HELP, check_folder, silence
from heterostep.devices import Dtype
from heterostep.errors import HeterostepError, first_line

if TYPE_CHECKING:
    from heterostep.batch.run import Counts
    from heterostep.workers.crew import Job, Worker

MODEL_HELP = "Diffusers folder or hub id.  [default: the bundled model]"
WORKERS_HELP = "Videos at the same time.  [default: one for each GPU, or for each --gpus-per-video of them]"
PER_VIDEO_HELP = "GPUs of one machine that make one video together."


def batch(
    prompts: Annotated[Path, typer.Argument(help="JSONL file, a request a line: prompt, image, seed, size, ...")],
    out: Annotated[Path, typer.Option(help="Folder of the videos. What is there already is not made again.")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    runtime: Annotated[
        float | None, typer.Option(help="Runtime target for lines that set none.  [default: 0.5]")
    ] = None,
    share: Annotated[float | None, typer.Option(help="Share target, in place of --runtime. Reproducible.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps for lines that set none.  [default: the model's, or 40]")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size for lines that set none, such as 832x480.  [default: the model's]")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames for lines that set none.  [default: the model's]")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help=WORKERS_HELP)] = None,
    gpus_per_video: Annotated[int, typer.Option(min=1, help=PER_VIDEO_HELP)] = 1,
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster's head node, host:port.  [default: a Ray on this machine, for this batch]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP.replace(", cuda or cuda:N", " or cuda"))] = "auto",
    dtype: Annotated[Dtype, typer.Option(help=DTYPE_HELP)] = Dtype.auto,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Make a video of each line of a file, on one machine or a cluster. Interrupted, the same command goes on."""
    check_ray("ray", "a batch")
    check_folder(out)
    with silence():
        from heterostep.batch import lines, manifest
        from heterostep.batch.run import run
        from heterostep.order import Order, check_model

        check_model(model)
        given = {"runtime": runtime, "share": share, "steps": steps, "size": size, "frames": frames}
        defaults: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        # A fault of the options is told once, not for each line.
        order = Order.of_data({"prompt": "a line", "model": model, **defaults})
        try:
            making.check_known_sizes(model, order.height, order.width, order.frames)
        except HeterostepError as error:
            raise HeterostepError(str(error), "frames" if error.field == "frames" else "size") from error
        found = lines.read(prompts, defaults, model)
        from heterostep.workers import cluster

        cluster.check_options(device, gpus_per_video)

        terminating = contextlib.ExitStack()

        async def hire() -> Sequence[Worker]:
            cluster.connect(address)
            # Ray has a handler of its own.
            terminating.enter_context(interrupts.also_terminated())
            return cluster.hire(model, device, dtype.value, workers, gpus_per_video)

        with manifest.opened(out) as made, _Watcher(quiet) as watcher, terminating:
            try:
                counts = asyncio.run(run(found, made, hire, watcher))
            except KeyboardInterrupt:
                watcher.stopped()
                raise
            except OSError as error:
                why = error.strerror or first_line(error)
                raise HeterostepError(
                    f"cannot write to {out} ({why}): the same command goes on once that works"
                ) from error
            finally:
                cluster.disconnect()
    if not quiet:
        repeated = f", {found.repeated} said twice" * bool(found.repeated)
        typer.echo(f"{counts.before + counts.made} of {counts.all} videos are in {out}{repeated}")
    if counts.failed:
        raise HeterostepError(f"{counts.failed} of {counts.all} lines failed ({out / manifest.NAME} says why)")


def check_ray(module: str, what: str) -> None:
    """Check that Ray is there.

    Raises:
        HeterostepError: it is not; says how to get it.
    """
    try:
        there = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise HeterostepError(f"{what} needs Ray: pip install '.[ray]' in heterostep's checkout")


class _Watcher:
    """A bar of all lines on a terminal, above it what happens; elsewhere the latter alone. Faults come in any case."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, highlight=False)
        self.quiet = quiet
        self.counts: Counts | None = None
        self.bar = Progress(
            BarColumn(20),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=None, text="")

    def __enter__(self) -> _Watcher:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def stopped(self) -> None:
        """Somebody pressed Ctrl-C."""
        if self.counts is not None:
            made = self.counts.before + self.counts.made
            self.say(f"{made} of {self.counts.all} videos are made: the same command goes on")

    def say(self, text: str, fault: bool = False) -> None:
        if fault or not self.quiet:
            self.console.print(text, soft_wrap=True, markup=False)

    def show(self, counts: Counts, running: Sequence[Job]) -> None:
        self.counts = counts
        parts = sum(job.done / job.steps for job in running if job.steps)
        at = ", ".join(f"line {job.id} {job.done}/{job.steps}" for job in running if job.steps)
        failed = f", {counts.failed} failed" * bool(counts.failed)
        text = f"{counts.ended} of {counts.all}{failed}{'  ' + at if at else ''}"
        self.bar.update(self.task, completed=counts.ended + parts, total=counts.all, text=text)
