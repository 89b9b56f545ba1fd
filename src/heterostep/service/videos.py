"""The videos of a service from their order to their end. Nothing here knows of HTTP or of Ray."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heterostep.errors import HeterostepError, first_line
from heterostep.order import Order, Picture
from heterostep.service.limits import Limits, Refused, model_name
from heterostep.service.store import Store
from heterostep.workers.crew import FINAL, Crew, Job, Worker
from heterostep.workers.maker import About

_log = logging.getLogger("heterostep")
STATUS = {
    "waiting": "queued",
    "running": "in_progress",
    "done": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}
# What a request settles, by its type, and what is read of a video that an earlier service has kept.
FIXED = {"model": str, "created_at": int, "prompt": str, "size": str, "seconds": str, "heterostep": dict}
KEPT = {**FIXED, "completed_at": int, "expires_at": int}
# Seconds between two looks at the running videos; those that a video takes, before the first one is made.
LOOK_EVERY = 0.5
FIRST_GUESS = 10.0
# Of the seconds that the latest video took, the part in the mean.
LATEST = 0.3


@dataclass(eq=False)
class Video:
    """One request and what became of it; times are Unix's seconds."""

    id: str
    fixed: dict[str, Any]
    job: Job
    began: float | None = None
    ended: float | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    summary: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        return STATUS[self.job.state]

    def told(self) -> dict[str, Any]:
        """The video as OpenAI's API has it; `heterostep` holds what is this service's own."""
        job = self.job
        part = job.done / job.steps if job.steps else 0.0
        progress = {"completed": 100, "queued": 0}.get(self.status, min(int(100 * part), 99))
        error = None
        if self.status == "failed":
            error = {"code": "generation_failed", "message": job.message}
        return {
            "id": self.id,
            "object": "video",
            **self.fixed,
            "status": self.status,
            "progress": progress,
            "completed_at": self.completed_at,
            "expires_at": self.expires_at,
            "error": error,
            "heterostep": {**self.fixed["heterostep"], "summary": self.summary},
        }


class Videos:
    """Takes requests and keeps what was made of them. Use it in an `async with` block.

    Args:
        workers: started ones; about: of one of them.
        model: the workers'.
    """

    def __init__(
        self, workers: Sequence[Worker], about: About, model: str | None, limits: Limits, store: Store
    ) -> None:
        self.about, self.model, self.limits, self.store = about, model, limits, store
        self._workers = len(workers)
        self._crew = Crew(workers, self._ended, self._lost)
        self._seconds = FIRST_GUESS
        self._looking: asyncio.Task[None] | None = None
        kept = [video for video_id, content in store.all() if (video := _taken_up(video_id, content)) is not None]
        self._videos = {video.id: video for video in sorted(kept, key=lambda video: video.fixed["created_at"])}

    async def __aenter__(self) -> Videos:
        await self._crew.__aenter__()
        self._looking = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._looking is not None:
            self._looking.cancel()
        await self._crew.__aexit__(*exception)

    async def create(self, data: Mapping[str, Any], picture: Picture | None) -> Video:
        """Put a video at the end of the queue.

        Raises:
            Refused: it cannot be made, or the queue is full.
        """
        order = self.limits.order(data, picture, self.about, self.model)
        # Those that are on their way into the queue count, too.
        waiting = sum(video.job.state == "waiting" for video in self._videos.values())
        if waiting >= self.limits.queue:
            wait = min(max(round(self._seconds / max(len(self._crew.workers), 1)), 1), 600)
            raise Refused(429, f"{waiting} videos wait already: try again in {wait} s", "queue_full", wait=wait)
        video_id = f"video_{secrets.token_hex(16)}"
        job = Job(video_id, lambda: self._begun(video_id, order), picture is not None, steps=order.steps)
        video = self._videos[video_id] = Video(video_id, self._fixed(order), job)
        try:
            await self._crew.submit(job)
        except HeterostepError as error:
            del self._videos[video_id]
            raise Refused(503, str(error), "no_worker") from error
        self._forget()
        return video

    def find(self, video_id: str) -> Video:
        """A video that is kept.

        Raises:
            Refused: there is none.
        """
        self._forget()
        if video_id not in self._videos:
            raise Refused(404, "there is no such video, or it is not kept any more", "not_found", "video_id")
        return self._videos[video_id]

    def all(self) -> list[Video]:
        """Every video that is kept, the oldest first."""
        self._forget()
        return list(self._videos.values())

    async def end(self, video: Video) -> bool:
        """Cancel a video that is not finished; forget one that is.

        Returns:
            whether it is forgotten.
        """
        if video.job.state in FINAL:
            self._remove(video)
            return True
        await self._crew.cancel(video.job)
        self._finished(video)
        return False

    def ahead(self, video: Video) -> int:
        """How many videos are before this one in the queue."""
        return self._crew.waiting.index(video.job) if video.job in self._crew.waiting else 0

    def _fixed(self, order: Order) -> dict[str, Any]:
        """What a request settles."""
        sizes = order.sizes(self.about.defaults)
        seconds = sizes["num_frames"] / self.about.defaults["fps"]
        own = {order.dial: order.target, "num_frames": sizes["num_frames"], "steps": order.steps, "seed": order.seed}
        return {
            "model": model_name(self.model),
            "created_at": int(time.time()),
            "prompt": order.prompt,
            "size": f"{sizes['width']}x{sizes['height']}",
            "seconds": f"{seconds:.3g}",
            "heterostep": own,
        }

    def _begun(self, video_id: str, order: Order) -> Order:
        self._videos[video_id].began = time.perf_counter()
        return order

    async def _ended(self, job: Job) -> None:
        video = self._videos.get(job.id)
        if video is None:
            return
        if job.outcome is not None and job.outcome.made is not None:
            made = job.outcome.made
            video.summary = made.summary
            self._finished(video)
            told = video.told() | {"status": "completed", "progress": 100}
            content = {"object": told, "settings": made.settings, "report": made.report}
            try:
                await asyncio.to_thread(self.store.add, job.id, made.video, content)
            except Exception as error:
                # Whatever it is, the next video may go well.
                _log.error("a video cannot be kept", exc_info=error)
                why = getattr(error, "strerror", None) or first_line(error)
                raise HeterostepError(f"it cannot be kept: {why}") from error
            if job.state in FINAL:
                # It was cancelled meanwhile.
                self.store.remove(job.id)
            if video.began is not None:
                self._seconds += LATEST * (time.perf_counter() - video.began - self._seconds)
        else:
            self._finished(video)

    def _lost(self, job: Job, what: str) -> None:
        _log.warning("%s: its worker was lost; %s", job.id, what)

    def _finished(self, video: Video) -> None:
        video.ended = time.time()
        video.completed_at = int(video.ended)
        video.expires_at = int(video.completed_at + self.limits.keep_seconds)

    def _forget(self) -> None:
        """Keep the videos that were finished last, and are not too old; as many requests that came to nothing."""
        finished = [video for video in self._videos.values() if video.job.state in FINAL]
        for video in finished:
            if video.completed_at is None:
                # The last worker was lost, and its request with it.
                self._finished(video)
        finished.sort(key=lambda video: video.ended or 0)
        now = time.time()
        gone = {video for video in finished if video.expires_at is not None and video.expires_at <= now}
        for made in (True, False):
            alike = [video for video in finished if (video.job.state == "done") is made]
            gone.update(alike[: max(0, len(alike) - self.limits.keep)])
        for video in gone:
            self._remove(video)

    def _remove(self, video: Video) -> None:
        self._videos.pop(video.id, None)
        self.store.remove(video.id)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await self._crew.look()


def _taken_up(video_id: str, content: dict[str, Any]) -> Video | None:
    """A video that an earlier service has made; None where its content is not what one writes."""
    told: Any = content.get("object")
    if not all(isinstance(content.get(name), dict) for name in ("object", "settings", "report")):
        return None
    if not all(isinstance(told.get(name), kind) for name, kind in KEPT.items()):
        return None
    fixed = {name: told[name] for name in FIXED}
    summary = fixed["heterostep"].pop("summary", {})
    job = Job(video_id, lambda: Order(told["prompt"]), state="done")
    completed, expires = told["completed_at"], told["expires_at"]
    return Video(video_id, fixed, job, ended=completed, completed_at=completed, expires_at=expires, summary=summary)
