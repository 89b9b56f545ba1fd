"""`heterostep ui`: the page."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Annotated

import typer

from heterostep.cli.options import DEVICE_HELP, DTYPE_HELP, silence
from heterostep.devices import Dtype, device_of, precision_of
from heterostep.errors import HeterostepError


def ui(
    host: Annotated[str, typer.Option(help="Address to listen on. Whoever reaches it can use it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7860,
    model: Annotated[str | None, typer.Option(help="Diffusers folder or hub id.  [default: the bundled model]")] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: Annotated[Dtype, typer.Option(help=DTYPE_HELP)] = Dtype.auto,
    open_page: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Open it in the browser.  [default: where there is a desktop]"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not print the address.")] = False,
) -> None:
    """Make videos on a page in the browser, dense and faster side by side."""
    wanted = {"starlette": "starlette", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
    if missing := [name for module, name in wanted.items() if importlib.util.find_spec(module) is None]:
        raise HeterostepError(f"the page needs {' and '.join(missing)}: pip install '.[ui]' in heterostep's checkout")
    with silence():
        from heterostep.addresses import is_loopback, listen
        from heterostep.order import check_model
        from heterostep.ui import server
        from heterostep.ui.jobs import Studio

        check_model(model)
        place = device_of(device)
        precision = precision_of(dtype, place)
        sock = listen(host, port)
        url, local = server.address(sock), is_loopback(host)
        # From other machines, no folders of this one and no downloads.
        with sock, Studio(place, precision, model, only=not local) as studio:
            if not quiet:
                typer.echo(f"The page is {url} (Ctrl-C ends it)")
                if not local:
                    typer.echo(
                        "Whoever can reach this address can use it, and see no one's videos but their own", err=True
                    )
            if open_page if open_page is not None else _has_desktop():
                server.open_browser(url)
            server.Server(studio, sock, local).serve_until_told()


def _has_desktop() -> bool:
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
