"""`heterostep serve`: the service."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from heterostep import interrupts
from heterostep.cli.batch import MODEL_HELP, PER_VIDEO_HELP, WORKERS_HELP, check_ray
from heterostep.cli.options import DEVICE_HELP, DTYPE_HELP, check_folder, silence
from heterostep.devices import Dtype
from heterostep.errors import HeterostepError
from heterostep.files import locked

LEAST_TOKEN = 16


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any but a loopback address requires --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="HETEROSTEP_TOKEN", help="Bearer token that requests must send; prefer the environment variable."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    workers: Annotated[int | None, typer.Option(min=1, help=WORKERS_HELP)] = None,
    gpus_per_video: Annotated[int, typer.Option(min=1, help=PER_VIDEO_HELP)] = 1,
    queue: Annotated[int, typer.Option(min=1, help="Videos that may wait; further requests get 429.")] = 32,
    max_size: Annotated[str, typer.Option(help="Largest frame, as width x height in pixels.")] = "1280x720",
    max_frames: Annotated[int, typer.Option(min=1, help="Frames that a video may have.")] = 161,
    max_steps: Annotated[int, typer.Option(min=1, help="Steps that a video may take.")] = 100,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for finished videos.  [default: a temporary one, removed at the end]")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="Number of finished videos that are kept.")] = 200,
    keep_hours: Annotated[float, typer.Option(min=0.01, max=87600, help="Hours that a finished video is kept.")] = 24.0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP.replace(", cuda or cuda:N", " or cuda"))] = "auto",
    dtype: Annotated[Dtype, typer.Option(help=DTYPE_HELP)] = Dtype.auto,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not print the address.")] = False,
) -> None:
    """Make videos over HTTP, by an API like OpenAI's."""
    check_ray("ray.serve", "the service")
    if folder is not None:
        check_folder(folder)
    token = token.strip() if token is not None else None
    if token is not None and not (len(token) >= LEAST_TOKEN and token.isascii() and token.isprintable()):
        raise HeterostepError(f"the token should have {LEAST_TOKEN} letters and digits or more")
    with silence():
        from heterostep.addresses import is_loopback, listen
        from heterostep.order import check_model
        from heterostep.service import app, serving
        from heterostep.service.limits import Limits
        from heterostep.workers import cluster

        check_model(model)
        cluster.check_options(device, gpus_per_video)
        if token is None and not is_loopback(host):
            raise HeterostepError(
                f"whoever reaches {host} could use the service: set HETEROSTEP_TOKEN, a token that requests must bring"
            )
        # Before Ray is begun and a model loaded.
        listen(host, port).close()
        limits = Limits(queue, _pixels(max_size), max_frames, max_steps, keep=keep, keep_seconds=3600 * keep_hours)
        digest = None if token is None else app.digest(token)
        with _folder(folder) as place:
            settings = serving.Settings(host, port, model, limits, place, digest)
            try:
                cluster.connect(None)
                team = cluster.hire(model, device, dtype.value, workers, gpus_per_video)
                about = asyncio.run(serving.start_workers(team))
                serving.begin(settings, team, about)
                if not quiet:
                    shown = f"[{host}]" if ":" in host else host
                    typer.echo(f"The service is http://{shown}:{port}/v1/videos (Ctrl-C ends it)")
                with interrupts.also_terminated():
                    threading.Event().wait()
            finally:
                # Serve ends with the Ray that it runs on.
                cluster.disconnect()


def _pixels(size: str) -> int:
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", size.strip())
    if match is None or not int(match[1]) * int(match[2]):
        raise HeterostepError(f"--max-size should be a width and a height, such as 1280x720, not {size}")
    return int(match[1]) * int(match[2])


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """The videos' folder, as an absolute path: the service's process has another working folder. It is this service's
    alone.

    Raises:
        HeterostepError: it is another service's.
    """
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        try:
            lock = locked(given)
        except BlockingIOError as error:
            raise HeterostepError(f"another service keeps its videos in {given}: give another --folder") from error
        with lock:
            yield given.resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="heterostep-serve-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
