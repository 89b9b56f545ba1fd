"""Several processes of one machine, each on a GPU, that make one video together: to others they are one `Maker`.

Each rank has a pipe to this process. All are given the same orders in the same order; rank 0 tells how far they are,
and its video is what is returned. Where one fails or ends, the others wait for it in the middle of a step: all are
ended, and begun anew for the next order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

from heterostep import launch
from heterostep.errors import HeterostepError
from heterostep.order import Order
from heterostep.workers.crew import WorkerLost
from heterostep.workers.maker import About, Outcome, Progress

PROGRAM = ("-m", "heterostep.workers.rank")
# What is told of a failure, where ranks say different things: first what knows the reason.
ORDER = ("refused", "full", "unforeseen")
Answers: TypeAlias = dict[int, Any]


class Group:
    """Makes one video at a time on several GPUs. `progress` and `cancel` may be asked by other threads.

    Args:
        model, device, dtype: as `Maker` takes them; no GPU by its number, for rank N has the N-th that is seen.
        size: how many ranks.
        threads: of each rank on the CPU; None for what the environment says.
        program: what Python runs as a rank.
    """

    def __init__(
        self,
        model: str | None,
        device: str,
        dtype: str,
        size: int,
        threads: int | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.model, self.device, self.dtype, self.size = model, device, dtype, size
        self._program = [sys.executable, *program]
        self._surroundings = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self._ranks: launch.Started | None = None
        self._connections: list[Connection] = []
        self._job: str | None = None
        self._progress: Progress | None = None
        self._cancelled: set[str] = set()
        # Over what is sent to the ranks, and the job that they have.
        self._lock = threading.Lock()

    def start(self, with_image: bool = False) -> About:
        """Begin the ranks, anew where they run, and load the model on each.

        Raises:
            HeterostepError: it cannot be loaded, or not be shared by so many.
            WorkerLost: a rank ended, or failed otherwise.
        """
        self.end()
        pipes = [Pipe() for _ in range(self.size)]
        self._connections = [ours for ours, _ in pipes]
        try:
            given = [theirs.fileno() for _, theirs in pipes]
            self._ranks = launch.Started(self._program, self.size, self._surroundings, given)
        finally:
            # A rank that ends closes its pipe, if nobody else has it.
            for _, theirs in pipes:
                theirs.close()
        self._send((self.model, self.device, self.dtype, with_image))
        answers = self._answers()
        if not all(isinstance(answers.get(rank), About) for rank in range(self.size)):
            try:
                outcome = self._failure(answers)
            finally:
                self.end()
            if outcome.why == "unforeseen":
                raise WorkerLost(outcome.message)
            raise HeterostepError(outcome.message)
        pids = tuple(child.pid for child in self._ranks.children)
        return replace(answers[0], process=os.getpid(), ranks=pids)

    def attempt(self, job: str, order: Order) -> Outcome:
        """Make a video; what goes wrong with it is told in the outcome.

        Raises:
            WorkerLost: a rank ended, which is no fault of the order as far as is known.
        """
        if self._ranks is None:
            try:
                self.start(order.picture is not None)
            except HeterostepError as error:
                raise WorkerLost(str(error)) from error
        with self._lock:
            if job in self._cancelled:
                self._cancelled.discard(job)
                return Outcome(message="cancelled", cancelled=True)
            self._job = job
            self._send(("attempt", job, order))
        try:
            answers = self._answers()
        finally:
            with self._lock:
                self._job = self._progress = None
                self._cancelled.discard(job)
        outcomes = [answers.get(rank) for rank in range(self.size)]
        if _can_go_on(outcomes):
            return answers[0]
        try:
            # What rank 0 has made is whole, whatever befell another one then.
            first = outcomes[0]
            return first if first is not None and first.made is not None else self._failure(answers)
        finally:
            self.end()

    def progress(self) -> Progress | None:
        """Where the present job is."""
        return self._progress

    def cancel(self, job: str) -> None:
        """End a job after its present step; one that has not come yet is not begun."""
        with self._lock:
            self._cancelled.add(job)
            if job == self._job:
                # Rank 0 takes the others along.
                with contextlib.suppress(OSError):
                    self._connections[0].send(("cancel", job))

    def end(self) -> None:
        """End all ranks; `attempt` begins them anew."""
        if self._ranks is not None:
            self._ranks.end()
            self._ranks = None
        for connection in self._connections:
            connection.close()
        self._connections = []

    def _send(self, message: object) -> None:
        for connection in self._connections:
            # One that has ended is noticed when it does not answer.
            with contextlib.suppress(OSError):
                connection.send(message)

    def _answers(self) -> Answers:
        """What each rank says, None of one that has ended; where one fails, of the others what they say soon after."""
        answers: Answers = {}
        ends = None
        while len(answers) < self.size and (ends is None or time.monotonic() < ends):
            left = [each for rank, each in enumerate(self._connections) if rank not in answers]
            for connection in wait(left, None if ends is None else max(ends - time.monotonic(), 0)):
                assert isinstance(connection, Connection)
                try:
                    said = connection.recv()
                except (EOFError, OSError):
                    said = None
                if isinstance(said, Progress):
                    self._progress = said
                    continue
                answers[self._connections.index(connection)] = said
                if said is None or (isinstance(said, Outcome) and said.made is None):
                    # Others may know better why, or be about to say the same.
                    ends = ends or time.monotonic() + launch.GRACE
        return answers

    def _failure(self, answers: Answers) -> Outcome:
        """The failure that tells most of why.

        Raises:
            WorkerLost: a rank has ended, and that is all that is known.
        """
        said = [
            (ORDER.index(each.why), rank) for rank, each in answers.items() if isinstance(each, Outcome) and each.why
        ]
        if said and min(said)[0] < ORDER.index("unforeseen"):
            return answers[min(said)[1]]
        # Where one is killed, what the others say is that they miss it.
        for rank, answer in answers.items():
            if answer is None and self._ranks is not None:
                raise WorkerLost(f"the process of GPU {rank} {_how(self._ranks.children[rank])}")
        if not said:
            raise WorkerLost("its processes do not answer")
        rank = min(said)[1]
        return replace(answers[rank], message=f"GPU {rank}: {answers[rank].message}")


def _how(child: subprocess.Popen) -> str:
    """How a process that closed its pipe has ended."""
    try:
        code = child.wait(launch.PATIENCE)
    except subprocess.TimeoutExpired:
        return "does not answer"
    if code < 0:
        return f"was ended from outside ({signal.Signals(-code).name}), perhaps for its memory"
    return f"ended with {code}"


def _can_go_on(outcomes: Sequence[Outcome | None]) -> bool:
    """Whether all ranks have ended a run in the same way, at the same place: none waits for another one."""
    first = outcomes[0]
    if first is None or any(outcome is None for outcome in outcomes):
        return False
    if first.made is not None:
        return all(outcome is not None and outcome.made is not None for outcome in outcomes)
    return (first.cancelled or first.why == "refused") and all(outcome == first for outcome in outcomes)
