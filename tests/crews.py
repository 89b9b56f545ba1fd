"""Workers that make nothing and answer at once, with faults on demand: for tests without Ray and without a model."""

from __future__ import annotations

import asyncio

from heterostep.checkpoints import SizeRules
from heterostep.errors import HeterostepError
from heterostep.tiny import DEFAULTS
from heterostep.workers.crew import WorkerLost
from heterostep.workers.maker import About, Made, Outcome, Progress

ABOUT = About(1, "cpu", {**DEFAULTS, "height": 64, "width": 64, "num_frames": 9}, SizeRules(16, 4, (1, 16, 16), 64))


class FakeWorker:
    """Makes b"video of PROMPT SEED".

    Prompts tell it what to do: "wait" goes on until `gate` is set or it is cancelled; "die" loses the worker, "die
    once" for the first time alone; "fail" is a failure.
    """

    def __init__(self, name="worker 1", gate=None):
        self.name, self.gate = name, gate or asyncio.Event()
        self.starts, self.jobs, self.broken, self.fault = 0, [], False, None
        self.cancelled = asyncio.Event()
        self._at = None
        self._died = set()
        self.ended = False

    async def start(self, with_image):
        self.starts += 1
        if self.fault:
            raise HeterostepError(self.fault)
        if self.broken:
            raise WorkerLost(f"{self.name} does not start")
        return ABOUT

    async def attempt(self, job, order):
        self.jobs.append(job)
        self.cancelled.clear()
        await asyncio.sleep(0)
        if self.broken or order.prompt == "die" or (order.prompt == "die once" and order.prompt not in self._died):
            self._died.add(order.prompt)
            raise WorkerLost(f"{self.name} has died")
        if order.prompt == "fail":
            return Outcome(message="it failed: on purpose")
        if order.prompt == "wait":
            self._at = Progress(job, 3, 12)
            waits = [asyncio.ensure_future(event.wait()) for event in (self.gate, self.cancelled)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            self._at = None
            if self.cancelled.is_set():
                return Outcome(message="cancelled", cancelled=True)
        text = f"video of {order.prompt} {order.seed}"
        return Outcome(Made(text.encode(), {"schema": 3}, order.data(), {"seconds": "0.1"}))

    async def progress(self):
        return self._at

    async def cancel(self, job):
        if self._at is not None and self._at.job == job:
            self.cancelled.set()

    def end(self):
        self.ended = True
