"""The service on Ray Serve: its proxy listens, one replica holds the queue, a batch's workers make the videos."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from heterostep.errors import HeterostepError
from heterostep.service.app import application
from heterostep.service.limits import Limits
from heterostep.service.store import Store
from heterostep.service.videos import Videos
from heterostep.workers.cluster import RayWorker
from heterostep.workers.crew import WorkerLost
from heterostep.workers.maker import About

NAME = "heterostep"
# Short requests that the replica answers at once: creating and asking take milliseconds.
MOST_AT_ONCE = 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """host, port: where to listen; model, limits: of the service; folder: of its videos; token: its digest."""

    host: str
    port: int
    model: str | None
    limits: Limits
    folder: Path
    token: str | None = None


async def start_workers(workers: Sequence[RayWorker]) -> About:
    """Load the model on every worker.

    Raises:
        HeterostepError: one cannot.
    """
    try:
        return (await asyncio.gather(*(worker.start(False) for worker in workers)))[0]
    except WorkerLost as error:
        raise HeterostepError(f"a worker could not be started: {error}") from error


def begin(settings: Settings, workers: Sequence[RayWorker], about: About) -> None:
    """Listen, and answer requests for as long as Ray is connected. The workers are started."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=settings.host, port=settings.port),
        logging_config=LoggingConfig(log_level=logging.ERROR, enable_access_log=False),
    )
    serve.run(_deployment(settings).bind(settings, list(workers), about), name=NAME, route_prefix="/")


def _deployment(settings: Settings) -> Any:
    upload, token = settings.limits.upload, settings.token

    def build() -> Any:
        return application(lambda: serve.get_replica_context().servable_object.videos, upload, token)

    @serve.deployment(
        name=NAME,
        num_replicas=1,
        max_ongoing_requests=MOST_AT_ONCE,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        logging_config=LoggingConfig(log_level=logging.WARNING, enable_access_log=False),
    )
    @serve.ingress(build)
    class Service:
        """The queue and what is kept, in one place: that is why there is one replica."""

        async def __init__(self, settings: Settings, workers: Sequence[RayWorker], about: About) -> None:  # type: ignore[misc]
            store = Store(settings.folder)
            self.videos = Videos(workers, about, settings.model, settings.limits, store)
            await self.videos.__aenter__()

    return Service
