"""A batch: those of its lines that are not made yet, over the workers, into its folder."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from heterostep.batch.lines import Line, Lines
from heterostep.batch.manifest import Manifest
from heterostep.errors import HeterostepError
from heterostep.workers.crew import Crew, Job, Worker, WorkerLost

if TYPE_CHECKING:
    from heterostep.order import Order
    from heterostep.workers.maker import About

# Seconds between two looks at the running videos.
LOOK_EVERY = 0.5
# Faulty lines that are told of one by one.
MOST_TOLD = 5


@dataclasses.dataclass
class Counts:
    """How many requests are: all, made before, made now, failed."""

    all: int
    before: int = 0
    made: int = 0
    failed: int = 0

    @property
    def ended(self) -> int:
        return self.before + self.made + self.failed


class Watcher(Protocol):
    """Is told of a batch as it goes on."""

    def say(self, text: str, fault: bool = False) -> None:
        """Something happened; a fault is told in any case."""

    def show(self, counts: Counts, running: Sequence[Job]) -> None:
        """How far it is; some times a second."""


async def run(
    lines: Lines, manifest: Manifest, hire: Callable[[], Awaitable[Sequence[Worker]]], watcher: Watcher
) -> Counts:
    """Make what is missing.

    Args:
        hire: gives workers that have not been started; not called where nothing is missing.

    Raises:
        HeterostepError: no worker can load the model, or all were lost.
        OSError: a video cannot be written.
    """
    counts = Counts(len(lines.good) + len(lines.bad))
    missing = _missing(lines, manifest, counts, watcher)
    if not missing:
        return counts
    workers = list(await hire())
    try:
        await _start(workers, missing[0].image is not None, watcher)
        await _make(workers, missing, manifest, counts, watcher)
    finally:
        for worker in workers:
            worker.end()
    return counts


def _missing(lines: Lines, manifest: Manifest, counts: Counts, watcher: Watcher) -> list[Line]:
    missing = []

    def fail(number: int, key: str | None, message: str) -> None:
        counts.failed += 1
        manifest.fail(number, key, message)
        if counts.failed <= MOST_TOLD:
            watcher.say(f"line {number} failed: {message}", fault=True)

    for bad in lines.bad:
        fail(bad.number, None, bad.message)
    for line in lines.good:
        try:
            if manifest.has(line):
                counts.before += 1
            else:
                missing.append(line)
        except HeterostepError as error:
            fail(line.number, line.key, str(error))
    if (more := counts.failed - MOST_TOLD) > 0:
        watcher.say(f"{more} more line{'s' * (more > 1)} failed: {manifest.path} says why", fault=True)
    if counts.before:
        watcher.say(f"{counts.before} of {counts.all} were made before")
    return missing


async def _start(workers: list[Worker], with_image: bool, watcher: Watcher) -> None:
    """Load the model on each worker. One that is lost at that is done without, unless it is the last."""
    watcher.say(f"loading the model ({len(workers)} worker{'s' * (len(workers) > 1)})")
    found: list[About | BaseException] = await asyncio.gather(
        *(worker.start(with_image) for worker in workers), return_exceptions=True
    )
    for worker, about in list(zip(workers, found)):
        if isinstance(about, WorkerLost):
            worker.end()
            workers.remove(worker)
            watcher.say(f"{about}; the others go on")
        elif isinstance(about, BaseException):
            raise about
    if not workers:
        raise HeterostepError("no worker could be started")


async def _make(
    workers: Sequence[Worker], missing: Sequence[Line], manifest: Manifest, counts: Counts, watcher: Watcher
) -> None:
    by_job = {str(line.number): line for line in missing}
    began: dict[str, float] = {}

    async def ended(job: Job) -> None:
        line = by_job[job.id]
        if job.outcome is None or job.outcome.made is None:
            counts.failed += 1
            manifest.fail(line.number, line.key, job.message)
            watcher.say(f"line {line.number} failed: {job.message}", fault=True)
            return
        seconds = time.perf_counter() - began[job.id]
        worker = job.worker.name if job.worker is not None else ""
        await asyncio.to_thread(manifest.add, line, job.outcome.made, seconds, worker)
        counts.made += 1
        watcher.say(f"line {line.number}: {line.stem}.mp4 in {seconds:.1f} s ({counts.ended} of {counts.all})")

    def lost(job: Job, what: str) -> None:
        watcher.say(f"line {job.id}: its worker was lost; {what}")

    def job_of(line: Line) -> Job:
        def order() -> Order:
            began[str(line.number)] = time.perf_counter()
            return line.order()

        return Job(str(line.number), order, line.image is not None)

    async def show(crew: Crew) -> None:
        while True:
            watcher.show(counts, list(crew.running.values()))
            await asyncio.sleep(LOOK_EVERY)
            await crew.look()

    async with Crew(workers, ended, lost) as crew:
        for line in missing:
            await crew.submit(job_of(line))
        watching = asyncio.create_task(show(crew))
        try:
            await crew.idle()
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
    watcher.show(counts, [])
