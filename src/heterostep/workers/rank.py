"""One of the processes of a group, as a program: a `Maker` that makes each video together with the others."""

from __future__ import annotations

import logging
import os
import queue
import threading
from multiprocessing.connection import Connection
from typing import Any

from heterostep import checkpoints, launch, making, parallel, tiny
from heterostep.errors import HeterostepError, first_line
from heterostep.order import Order
from heterostep.pipeline import check_pipeline, enable_context_parallel, transformers
from heterostep.workers.maker import About, Maker, Outcome, Progress

_log = logging.getLogger("heterostep")


class Rank(Maker):
    """A `Maker` of a part of each video. Every rank is asked for the same; what rank 0 makes and tells is the group's.

    Args:
        model, device, dtype: as `Maker` takes them; the device is this rank's own.
        connection: to the group.
    """

    def __init__(self, model: str | None, device: str, dtype: str, connection: Connection) -> None:
        import torch.distributed as dist

        super().__init__(model, device, dtype)
        self.gpus = launch.size()
        self._ranks, self._connection = parallel.Ulysses(dist.group.WORLD), connection

    def start(self, with_image: bool = False) -> About:
        """See `Maker`; what cannot be shared is refused before any weights are loaded."""
        checkpoints.check_gpus(str(tiny.WEIGHTS) if self.model is None else self.model, self.gpus)
        return super().start(with_image)

    def _prepare(self, pipe: Any) -> None:
        for model in transformers(pipe):
            parallel.check_heads(model, self.gpus)
        enable_context_parallel(pipe, self.gpus)
        check_pipeline(pipe)

    def _check(self, job: str) -> None:
        # Rank 0 alone is told. All go on or none does, or those that go on would wait for ever.
        if self._ranks.broadcast_floats([float(job in self._cancelled)])[0]:
            raise making.Cancelled

    def _tell(self, progress: Progress) -> None:
        if self._ranks.rank == 0:
            self._connection.send(progress)

    def _file(self, result: making.Result, fps: float) -> bytes:
        return super()._file(result, fps) if self._ranks.rank == 0 else b""


def main() -> None:
    """Load the model with the others, tell how that went, and then of each order what became of it."""
    launch.follow()
    logging.basicConfig(level=logging.WARNING)
    connection = Connection(launch.pipe())
    model, kind, dtype, with_image = connection.recv()
    try:
        with launch.joined(kind) as place:
            maker = Rank(model, str(place), dtype, connection)
            connection.send(maker.start(with_image))
            _serve(maker, connection)
    except HeterostepError as error:
        connection.send(Outcome(message=str(error), why="refused"))
    except Exception as error:
        _log.exception("a rank could not be started")
        connection.send(Outcome(message=f"{type(error).__name__}: {first_line(error)}", why="unforeseen"))
    # Others may be waiting for this rank: it does not wait for them.
    os._exit(1)


def _serve(maker: Rank, connection: Connection) -> None:
    orders: queue.SimpleQueue[tuple[str, Order]] = queue.SimpleQueue()

    def listen() -> None:
        while True:
            try:
                what, *rest = connection.recv()
            except (EOFError, OSError):
                # Nobody is there any more to make it for.
                os._exit(1)
            if what == "cancel":
                maker.cancel(*rest)
            else:
                orders.put((rest[0], rest[1]))

    threading.Thread(target=listen, daemon=True).start()
    while True:
        connection.send(maker.attempt(*orders.get()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        # Nor here does it wait.
        os._exit(130)
