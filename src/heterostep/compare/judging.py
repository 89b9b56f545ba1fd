"""What a clip's figures say without a model: in processes beside the generations, where a GPU should not wait for them.

Imports neither torch nor diffusers, so that a process is there at once. Shapes: F frames, H height, W width.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from heterostep.metrics import psnr

# Judging takes a seventh of a second a clip: more processes than these would have nothing to do.
MOST_PROCESSES = 16


def world_scores(clip: np.ndarray, text: str) -> dict[str, Any]:
    """What the bundled model's world says of a clip by itself: the caption's parts met (0..1), motion, flicker."""
    from heterostep.tiny import world

    verdict, reading = world.judge(clip, text), world.read(clip)
    moves = [math.hypot(*shape.displacement) for shape in reading.shapes]
    return {
        "caption": {name: getattr(verdict, name) for name in ("colour", "direction", "kind", "background")},
        "displacement": statistics.mean(moves) if moves else None,
        "flicker": reading.background_flicker,
    }


def judge(clip: np.ndarray, dense: Path, text: str | None) -> dict[str, Any]:
    """Figures of a clip, uint8 [F, H, W, 3].

    Args:
        dense: the file of the dense video of the same noise (.npy).
        text: the caption that the bundled model's world is to look for; None where it cannot.

    Returns:
        `psnr` in dB, None where the clips are equal; `activity`; and the `world_scores`.
    """
    value = psnr(clip, np.load(dense))
    figures = {"psnr": value if math.isfinite(value) else None, "activity": activity(clip)}
    return figures | ({} if text is None else world_scores(clip, text))


def activity(clip: np.ndarray) -> float:
    """Mean absolute change of the values from frame to frame, in grey levels: a frozen video has none."""
    steps = (np.abs(later.astype(np.int16) - earlier).mean() for earlier, later in zip(clip, clip[1:]))
    return float(np.mean(list(steps))) if len(clip) > 1 else 0.0


class Judges:
    """`judge` in other processes; or here, at once, where there are none.

    Args:
        processes: 0 to judge here.
    """

    def __init__(self, processes: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if processes:
            # A forked process would have a copy of torch's threads and of the GPU's context, which do not work there.
            context = multiprocessing.get_context("spawn")
            # Ctrl-C reaches every process of the terminal; what is to be done then is decided here.
            self._pool = ProcessPoolExecutor(processes, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))

    def judge(self, clip: np.ndarray, dense: Path, text: str | None) -> Future[dict[str, Any]]:
        """The figures, now or later."""
        if self._pool is not None:
            return self._pool.submit(judge, clip, dense, text)
        done: Future[dict[str, Any]] = Future()
        done.set_result(judge(clip, dense, text))
        return done

    def close(self) -> None:
        """Judge nothing more: what is waiting is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def free_cores() -> int:
    """Cores that this process may use, but for one; at most as many as there is judging for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores - 1, MOST_PROCESSES)
