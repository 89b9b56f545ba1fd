"""Jobs spread over workers: in turn, with retries where a worker is lost. Nothing here knows of Ray or of models."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from heterostep.errors import HeterostepError, first_line

if TYPE_CHECKING:
    from heterostep.order import Order
    from heterostep.workers.maker import About, Outcome, Progress

_log = logging.getLogger("heterostep")
# Workers that a job may lose before it is given up, and starts that a worker may fail in a row.
MOST_LOSSES = 3
MOST_STARTS = 3
FINAL = ("done", "failed", "cancelled")


class WorkerLost(Exception):
    """A worker's process ended, or its machine went away."""


class Worker(Protocol):
    """One process that makes a video at a time. Every method but `end` raises `WorkerLost` where it is gone."""

    name: str

    async def start(self, with_image: bool) -> About:
        """Begin, anew where it was lost, and load the model. Raises HeterostepError where that cannot be done."""

    async def attempt(self, job: str, order: Order) -> Outcome:
        """Make a video."""

    async def progress(self) -> Progress | None:
        """Where the present job is."""

    async def cancel(self, job: str) -> None:
        """End a job after its present step."""

    def end(self) -> None:
        """End the process."""


@dataclass(eq=False)
class Job:
    """A video to be made.

    order: gives what is asked for, when its turn comes; raises HeterostepError where that is not to be had any more.
    with_image: whether it is of a first frame: what a worker that is started anew loads first.
    state: "waiting", "running", "done", "failed" or "cancelled".
    message, fault: why it failed, and the field that it is about.
    losses: workers that were lost while they made it.
    done, steps: where it is.
    """

    id: str
    order: Callable[[], Order]
    with_image: bool = False
    state: str = "waiting"
    message: str = ""
    fault: str = ""
    losses: int = 0
    done: int = 0
    steps: int = 0
    worker: Worker | None = None
    outcome: Outcome | None = field(default=None, repr=False)


class Crew:
    """Workers and the jobs that wait for them. Use it in an `async with` block: the jobs left at its end are dropped.

    Args:
        workers: started ones.
        ended: awaited with each job that has come to an end, before its state says so; may change the outcome to a
            failure by raising HeterostepError. Any other exception ends the crew, as does the loss of the last worker:
            `idle` raises it, and the jobs that wait fail without being told of.
        lost: told of each job whose worker was lost, and what is done about it.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        ended: Callable[[Job], Awaitable[None]],
        lost: Callable[[Job, str], None] = lambda job, what: None,
    ) -> None:
        self.workers = list(workers)
        self.waiting: list[Job] = []
        self.running: dict[Worker, Job] = {}
        self._ended, self._lost = ended, lost
        self._changed = asyncio.Condition()
        self._fault: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Crew:
        self._tasks = [asyncio.create_task(self._guarded(worker)) for worker in self.workers]
        return self

    async def __aexit__(self, *exception: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def submit(self, job: Job) -> None:
        """Put a job at the end of the queue.

        Raises:
            HeterostepError: there is no worker any more.
        """
        if self._fault is not None:
            raise self._fault
        async with self._changed:
            self.waiting.append(job)
            self._changed.notify_all()

    async def cancel(self, job: Job) -> None:
        """End a job: where it runs, its worker is free after its present step."""
        if job.state in FINAL:
            return
        worker = job.worker if job.state == "running" else None
        job.state = "cancelled"
        async with self._changed:
            if job in self.waiting:
                self.waiting.remove(job)
            self._changed.notify_all()
        if worker is not None:
            with contextlib.suppress(WorkerLost):
                await worker.cancel(job.id)

    async def idle(self) -> None:
        """Until all jobs have ended.

        Raises:
            HeterostepError: no worker is left.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._fault or not (self.waiting or self.running))
        if self._fault is not None:
            raise self._fault

    async def look(self) -> None:
        """Ask the workers how far their jobs are."""

        async def ask(worker: Worker, job: Job) -> None:
            # One that is lost, or loads a model, is silent.
            with contextlib.suppress(WorkerLost, asyncio.TimeoutError):
                known = await asyncio.wait_for(worker.progress(), 2)
                if known is not None and known.job == job.id:
                    job.done, job.steps = known.done, known.steps

        await asyncio.gather(*(ask(*pair) for pair in list(self.running.items())))

    async def _guarded(self, worker: Worker) -> None:
        try:
            await self._work(worker)
        except Exception as error:
            await self._give_up(worker, error)

    async def _give_up(self, worker: Worker, error: Exception) -> None:
        async with self._changed:
            self.running.pop(worker, None)
            self.workers.remove(worker)
            known = isinstance(error, HeterostepError | WorkerLost)
            if not known:
                _log.error("a worker is given up", exc_info=error)
                self._fault = error
            elif not self.workers:
                self._fault = HeterostepError(f"no worker is left: {first_line(error)}")
            if self._fault is not None:
                for job in self.waiting:
                    job.state, job.message = "failed", first_line(self._fault)
                self.waiting.clear()
            self._changed.notify_all()

    async def _work(self, worker: Worker) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self.waiting)
                job = self.waiting.pop(0)
            job.state, job.worker, job.done = "running", worker, 0
            self.running[worker] = job
            try:
                await self._attempt(worker, job)
            except WorkerLost as error:
                await self._again(worker, job, error)
            async with self._changed:
                self.running.pop(worker, None)
                self._changed.notify_all()

    async def _attempt(self, worker: Worker, job: Job) -> None:
        from heterostep.workers.maker import Outcome

        try:
            order = job.order()
        except HeterostepError as error:
            job.outcome = Outcome(message=str(error), fault=getattr(error, "field", ""))
        else:
            job.outcome = await worker.attempt(job.id, order)
        await self._end(job)

    async def _end(self, job: Job) -> None:
        if job.state in FINAL:
            # Cancelled meanwhile: what was made of it is dropped.
            return
        outcome = job.outcome
        state = "failed"
        if outcome is not None:
            state = "cancelled" if outcome.cancelled else "failed" if outcome.made is None else "done"
            job.message, job.fault = outcome.message, outcome.fault
        try:
            await self._ended(job)
        except HeterostepError as error:
            state, job.message = "failed", str(error)
        if job.state not in FINAL:
            job.state = state
        # A video need not be kept twice.
        job.outcome = None

    async def _again(self, worker: Worker, job: Job, error: WorkerLost) -> None:
        job.worker = None
        if job.state not in FINAL:
            job.losses += 1
            if job.losses < MOST_LOSSES:
                self._lost(job, "it is made again")
                job.state = "waiting"
                async with self._changed:
                    self.running.pop(worker, None)
                    self.waiting.insert(0, job)
                    self._changed.notify_all()
            else:
                self._lost(job, "it is given up")
                job.message = f"{job.losses} workers were lost while they made it ({first_line(error)})"
                await self._end(job)
        for started in range(MOST_STARTS):
            try:
                await worker.start(job.with_image)
                return
            except WorkerLost:
                if started + 1 == MOST_STARTS:
                    raise
