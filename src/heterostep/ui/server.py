"""The page's HTTP side: a few routes around a `Studio`, on Starlette and uvicorn."""

from __future__ import annotations

import io
import logging
import math
import socket
import threading
import webbrowser
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from rich import filesize
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import heterostep
from heterostep import configs, tiny
from heterostep.addresses import asks_loopback
from heterostep.errors import HeterostepError
from heterostep.order import Order, Picture, check_shape, read_picture
from heterostep.planning import timings
from heterostep.planning.plan import plan
from heterostep.ui.jobs import Job, Studio

STATIC = Path(__file__).parent / "static"
# Bytes of a request: a photograph and its form.
LARGEST_REQUEST = 40_000_000
# Nothing is fetched from elsewhere, and no other page may use this one.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

Handler = Callable[[Request], Awaitable[Response]]


def application(studio: Studio, local: bool = True) -> Starlette:
    """The page and its routes.

    Args:
        studio: makes the videos; it stays the caller's to close.
        local: whether the page may be asked for by this machine's own addresses alone.
    """
    routes = [
        Route("/", _page),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/api/about", _told(_about)),
        Route("/api/estimate", _told(_estimate), methods=["POST"]),
        Route("/api/image", _told(_image), methods=["POST"]),
        Route("/api/scene", _told(_scene)),
        Route("/api/plan", _told(_plan), methods=["POST"]),
        Route("/api/jobs", _told(_jobs)),
        Route("/api/jobs", _told(_submit), methods=["POST"]),
        Route("/api/jobs/{job}", _told(_job)),
        Route("/api/jobs/{job}/cancel", _told(_cancel), methods=["POST"]),
        Route("/api/jobs/{job}/{file}", _told(_file)),
    ]
    app = Starlette(routes=routes, middleware=[Middleware(_Guard, local=local)])
    app.state.studio = studio
    return app


class _Guard:
    """Refuses what other sites' pages ask for or post, and what is too large; adds the headers."""

    def __init__(self, app: ASGIApp, local: bool) -> None:
        self.app, self.local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in given)]
            await send(message)

        refused = self._refuses(Request(scope))
        await (refused or self.app)(scope, receive, with_headers)

    def _refuses(self, request: Request) -> Response | None:
        # Names alone keep a foreign page from reaching this one under a name of its own.
        if self.local and not asks_loopback(request.headers.get("host", "")):
            return _fault("the page is for this machine: ask for 127.0.0.1 or localhost", status=400)
        if request.method in ("GET", "HEAD"):
            return None
        origin = request.headers.get("origin")
        if origin is not None and origin.split("://")[-1] != request.headers.get("host"):
            return _fault("another site may not use this page", status=403)
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > LARGEST_REQUEST:
            return _fault(f"the file is too large: at most {filesize.decimal(LARGEST_REQUEST)}", "image", 413)
        return None


def _fault(message: str, field: str = "", status: int = 422) -> JSONResponse:
    return JSONResponse({"message": message, "field": field}, status)


def _told(handler: Callable[[Request, Studio], Awaitable[Response]]) -> Handler:
    """Faults as one line and a field."""

    async def wrapped(request: Request) -> Response:
        try:
            return await handler(request, request.app.state.studio)
        except HeterostepError as error:
            return _fault(str(error), error.field or "")

    return wrapped


async def _page(request: Request) -> Response:
    return FileResponse(STATIC / "page.html")


async def _about(request: Request, studio: Studio) -> Response:
    import torch

    name = timings.device_name(studio.device)
    free = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    return JSONResponse(
        {
            "version": heterostep.__version__,
            "device": "the CPU" if name == "cpu" else name,
            "model": studio.model,
            "only": studio.only,
            "defaults": tiny.DEFAULTS if studio.model is None else None,
            "models": configs.names(),
            "vram": None if free is None else round(free / 1e9),
        }
    )


async def _form(request: Request) -> tuple[dict[str, str], Picture | None]:
    """A form's texts and its picture."""
    async with request.form(max_files=1, max_fields=40, max_part_size=100_000) as form:
        texts = {name: value for name, value in form.items() if isinstance(value, str)}
        upload = form.get("image")
        if not isinstance(upload, UploadFile) or not upload.filename:
            return texts, None
        data = await upload.read()
        return texts, await run_in_threadpool(read_picture, data, upload.filename)


async def _estimate(request: Request, studio: Studio) -> Response:
    texts, picture = await _form(request)
    order = Order.of(texts, picture, need_prompt=False)
    return JSONResponse(await run_in_threadpool(studio.estimate, order))


async def _image(request: Request, studio: Studio) -> Response:
    """What is made of a first frame, before it is used."""
    texts, picture = await _form(request)
    if picture is None:
        raise HeterostepError("choose an image", "image")
    order = studio.complete(Order.of(texts | {"prompt": "", "target": ""}, picture, need_prompt=False))
    note = None
    if order.model is None:
        sizes = order.sizes(tiny.DEFAULTS)
        note = check_shape(picture.image, sizes["width"], sizes["height"])
    return JSONResponse({"note": note, "width": picture.image.width, "height": picture.image.height})


async def _scene(request: Request, studio: Studio) -> Response:
    """A first frame from the bundled model's world."""
    from PIL import Image

    try:
        seed = int(request.query_params.get("seed") or 0)
        frame = tiny.world.first_frame(request.query_params.get("prompt", ""), max(seed, 0))
    except HeterostepError as error:
        raise HeterostepError(str(error), "prompt") from error
    except ValueError as error:
        raise HeterostepError("seed should be a whole number", "seed") from error
    out = io.BytesIO()
    Image.fromarray(frame).save(out, format="PNG")
    return Response(out.getvalue(), media_type="image/png")


async def _submit(request: Request, studio: Studio) -> Response:
    texts, picture = await _form(request)
    job = studio.submit(Order.of(texts, picture), _client(texts))
    return JSONResponse(studio.told(job), 201)


def _client(texts: Mapping[str, str]) -> str:
    return texts.get("client", "")[:64]


async def _jobs(request: Request, studio: Studio) -> Response:
    client = _client(request.query_params)
    return JSONResponse([studio.told(job) for job in studio.of_client(client)])


def _found(request: Request, studio: Studio) -> Job:
    job = studio.find(request.path_params["job"])
    if job is None:
        raise HeterostepError("this video is not kept any more")
    return job


async def _job(request: Request, studio: Studio) -> Response:
    return JSONResponse(studio.told(_found(request, studio)))


async def _cancel(request: Request, studio: Studio) -> Response:
    job = _found(request, studio)
    studio.cancel(job)
    return JSONResponse(studio.told(job))


async def _file(request: Request, studio: Studio) -> Response:
    job, name = _found(request, studio), request.path_params["file"]
    path = job.folder / name
    if job.result is None or name not in job.result["files"].values() or not path.is_file():
        return _fault("there is no such file", status=404)
    headers = {"content-disposition": f'attachment; filename="{name}"'} if "download" in request.query_params else {}
    return FileResponse(path, headers=headers)


async def _plan(request: Request, studio: Studio) -> Response:
    texts, _ = await _form(request)
    return JSONResponse(await run_in_threadpool(_planned, texts))


def _planned(texts: Mapping[str, str]) -> dict[str, Any]:
    """What a published model will need on a GPU, for people."""

    def number(name: str, least: float, most: float, whole: bool = True) -> Any:
        text = texts.get(name, "").strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or (whole and value != int(value)):
            label = name.removeprefix("plan_").replace("vram", "memory")
            raise HeterostepError(f"{label} should be a number from {least:g} to {most:g}, not {text[:20]!r}", name)
        return int(value) if whole else value

    size = {"height": "plan_height", "width": "plan_width", "num_frames": "plan_frames"}
    asked = {argument: number(name, 1, 10000) for argument, name in size.items()}
    target = number("plan_target", 0.001, 1, whole=False) or 0.5
    vram = number("plan_vram", 0.1, 100_000, whole=False)
    offload = "model" if texts.get("plan_offload") else "none"
    try:
        made = plan(
            texts.get("plan_model", ""),
            **asked,
            image_to_video=bool(texts.get("plan_image")),
            offload=offload,
            runtime=target,
            vram=vram,
        )
    except HeterostepError as error:
        fields = {"runtime": "plan_target"} | {name: f"plan_{name}" for name in ("height", "width", "frames")}
        raise HeterostepError(str(error), fields.get(error.field or "", "plan_model")) from error
    peak = made.dense_peak_bytes if made.peak_bytes is None else made.peak_bytes
    room = "" if made.limit_bytes is None else f" of the {filesize.decimal(made.limit_bytes)} that it may use"
    fits = None if made.chosen is None else made.chosen.fits
    verdict = {
        True: f"It fits: {filesize.decimal(peak)} at its peak{room}.",
        False: f"It does not fit: {filesize.decimal(peak)} at its peak{room}.",
        None: f"It needs {filesize.decimal(peak)} at its peak; name the GPU's memory to learn whether it fits.",
    }[fits]
    if fits is False and offload == "none":
        verdict += " Try one model on the GPU at a time, or a smaller video."
    elif fits is False:
        verdict += " Try a smaller or shorter video."
    frames, height, width = made.grid
    lines = {
        "video": f"{made.width} x {made.height}, {made.num_frames} frames",
        "tokens": f"{made.tokens:,} ({frames} x {height} x {width})",
        "steps": f"{made.num_inference_steps}, of which {made.share * made.num_inference_steps:.0f} are evaluated",
        "evaluated at first": made.evaluated,
        **({"advice": made.advice} if made.advice else {}),
        "weights": ", ".join(f"{name.replace('_', ' ')} {filesize.decimal(n)}" for name, n in made.weights.items()),
        "activations": filesize.decimal(made.activation_bytes),
        "peak without heterostep": filesize.decimal(made.dense_peak_bytes),
    }
    if made.seconds is not None and made.dense_seconds is not None:
        lines["seconds"] = f"about {made.seconds:.0f}, dense {made.dense_seconds:.0f} ({made.device})"
    else:
        lines["seconds"] = f"unknown: heterostep bench --config {made.model} times it on your GPU"
    return {"fits": fits, "verdict": verdict, "lines": lines}


def address(sock: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}/"


class Server(uvicorn.Server):
    """Serves a studio's page on a socket until it is told to stop, or by Ctrl-C."""

    def __init__(self, studio: Studio, sock: socket.socket, local: bool = True) -> None:
        app = application(studio, local)
        super().__init__(uvicorn.Config(app, log_level=logging.WARNING, access_log=False, lifespan="off"))
        self.sock = sock

    def serve_until_told(self) -> None:
        """Blocks."""
        self.run(sockets=[self.sock])


def open_browser(url: str) -> None:
    """Show the page, without waiting for the browser."""
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
