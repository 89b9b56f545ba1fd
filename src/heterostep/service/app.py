"""The service's HTTP side: routes like OpenAI's `/v1/videos` around `Videos`, on Starlette."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from rich import filesize
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from heterostep.addresses import asks_loopback
from heterostep.errors import HeterostepError
from heterostep.order import Picture, read_picture
from heterostep.service.limits import Refused
from heterostep.service.videos import Video, Videos

MOST_LISTED = 100

Find = Callable[[], Videos]


def digest(token: str) -> str:
    """A token as the service keeps it."""
    return hashlib.sha256(token.encode()).hexdigest()


def application(find: Find, upload: int, token: str | None = None) -> Starlette:
    """The routes.

    Args:
        find: gives the service's videos; called for each request.
        upload: bytes that a request may have.
        token: digest of the one that requests must bring; None asks for none, and then only names of this machine
            reach it, and no other site's page.
    """
    routes = [
        Route("/v1/videos", _told(find, _create), methods=["POST"]),
        Route("/v1/videos", _told(find, _list), methods=["GET"]),
        Route("/v1/videos/{video}", _told(find, _status), methods=["GET"]),
        Route("/v1/videos/{video}", _told(find, _delete), methods=["DELETE"]),
        Route("/v1/videos/{video}/content", _told(find, _content), methods=["GET"]),
    ]
    middleware = [Middleware(_Guard, upload=upload, token=token)]
    faults: Any = {HTTPException: _http_fault, Exception: _unexpected}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=faults)


def _refusal(refused: Refused) -> JSONResponse:
    headers = {} if refused.wait is None else {"retry-after": str(refused.wait)}
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(refused.content(), refused.status, headers)


async def _http_fault(request: Request, error: HTTPException) -> Response:
    """A path or a method that there is not."""
    there = "there is no such route: see /v1/videos"
    message = {404: there, 405: f"{request.method} is not for this route"}.get(error.status_code, str(error.detail))
    return _refusal(Refused(error.status_code, message))


async def _unexpected(request: Request, error: Exception) -> Response:
    return _refusal(Refused(500, "the service failed; Ray Serve's log says how"))


class _Guard:
    """Refuses requests without the token, those of other sites' pages, and what is too large."""

    def __init__(self, app: ASGIApp, upload: int, token: str | None) -> None:
        self.app, self.upload, self.token = app, upload, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self.app
        if scope["type"] == "http":
            try:
                self._check(Request(scope))
            except Refused as refused:
                answer = _refusal(refused)
        await answer(scope, receive, send)

    def _check(self, request: Request) -> None:
        if self.token is not None:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(digest(given.strip()), self.token):
                raise Refused(401, "give the service's token: Authorization: Bearer TOKEN", "invalid_api_key")
        else:
            host = request.headers.get("host", "")
            if not asks_loopback(host):
                raise Refused(403, "without a token the service is for this machine: ask for 127.0.0.1 or localhost")
            if request.headers.get("origin", host).split("://")[-1] != host:
                raise Refused(403, "another site may not use this service")
        if request.method == "POST":
            length = request.headers.get("content-length", "")
            if not length.isdigit():
                raise Refused(411, "the request does not say how long it is (Content-Length)")
            if int(length) > self.upload:
                raise Refused(413, f"the request is larger than {filesize.decimal(self.upload)}", "too_large")


def _told(
    find: Find, handler: Callable[[Request, Videos], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    async def wrapped(request: Request) -> Response:
        try:
            return await handler(request, find())
        except Refused as refused:
            return _refusal(refused)
        except HeterostepError as error:
            return _refusal(Refused(400, str(error), "invalid_value", error.field))

    return wrapped


async def _create(request: Request, videos: Videos) -> Response:
    data, picture = await _read(request)
    return JSONResponse(_shown(await videos.create(data, picture), videos))


async def _read(request: Request) -> tuple[dict[str, Any], Picture | None]:
    """A request's fields and its first frame."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            data = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the body is not valid JSON") from error
        if not isinstance(data, dict):
            raise Refused(400, "the body is not a JSON object")
        if data.pop("input_reference", None) is not None:
            message = "a first frame comes as a file: send the request as multipart/form-data"
            raise Refused(400, message, "invalid_value", "input_reference")
        return data, None
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise Refused(415, "send application/json, or multipart/form-data with a first frame")
    async with request.form(max_files=1, max_fields=40, max_part_size=100_000) as form:
        data, picture = {}, None
        for name, value in form.multi_items():
            if name in data:
                raise HeterostepError(f"{name} is given twice", name)
            if name == "input_reference":
                if not isinstance(value, UploadFile):
                    raise HeterostepError("input_reference should be a file", name)
                picture = await run_in_threadpool(read_picture, await value.read(), value.filename or "image")
            elif isinstance(value, UploadFile):
                raise HeterostepError(f"{name} should not be a file; the first frame is input_reference", name)
            else:
                data[name] = value
        return data, picture


def _shown(video: Video, videos: Videos) -> dict[str, Any]:
    return video.told() | {"queue_position": videos.ahead(video)}


async def _status(request: Request, videos: Videos) -> Response:
    return JSONResponse(_shown(videos.find(request.path_params["video"]), videos))


async def _list(request: Request, videos: Videos) -> Response:
    """A page of the list: limit, order (asc, desc) and after, an id."""
    asked = request.query_params
    limit, order, after = asked.get("limit", "20"), asked.get("order", "desc"), asked.get("after")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MOST_LISTED):
        raise HeterostepError(f"limit should be from 1 to {MOST_LISTED}, not {limit[:20]!r}", "limit")
    if order not in ("asc", "desc"):
        raise HeterostepError(f"order should be asc or desc, not {order[:20]!r}", "order")
    found = videos.all()
    if order == "desc":
        found.reverse()
    ids = [video.id for video in found]
    if after is not None:
        if after not in ids:
            raise HeterostepError("after should be the id of a video that is kept", "after")
        found = found[ids.index(after) + 1 :]
    page = found[: int(limit)]
    return JSONResponse(
        {
            "object": "list",
            "data": [_shown(video, videos) for video in page],
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": len(found) > len(page),
        }
    )


async def _content(request: Request, videos: Videos) -> Response:
    video = videos.find(request.path_params["video"])
    if video.status != "completed":
        raise Refused(409, f"there is no file: the video is {video.status.replace('_', ' ')}", "not_ready")
    variant = request.query_params.get("variant", "video")
    if variant == "report":
        content = await run_in_threadpool(videos.store.content, video.id)
        return JSONResponse({"settings": content["settings"], "report": content["report"]})
    if variant != "video":
        raise HeterostepError(f"variant should be video or report, not {variant[:20]!r}", "variant")
    return FileResponse(videos.store.video(video.id), media_type="video/mp4", filename=f"{video.id}.mp4")


async def _delete(request: Request, videos: Videos) -> Response:
    """Cancel a video that is not finished; remove one that is."""
    video = videos.find(request.path_params["video"])
    if await videos.end(video):
        return JSONResponse({"id": video.id, "object": "video.deleted", "deleted": True})
    return JSONResponse(_shown(video, videos) | {"deleted": False})
