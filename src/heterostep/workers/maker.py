"""What one worker does: it holds a model and makes a video at a time. Nothing here knows of other processes."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import heterostep
from heterostep import making
from heterostep.checkpoints import SizeRules, size_rules
from heterostep.devices import Dtype, device_of, precision_of
from heterostep.errors import HeterostepError, first_line
from heterostep.order import SMALLER, WHOLE_STEPS, Order, check_shape

if TYPE_CHECKING:
    from heterostep.engine.report import StepInfo

_log = logging.getLogger("heterostep")


@dataclasses.dataclass(frozen=True)
class About:
    """A worker that has loaded its model.

    defaults: the model's height, width, num_frames, guidance_scale and fps; rules: the sizes that it makes.
    ranks: the processes that make a video together, where they are several.
    """

    process: int
    device: str
    defaults: dict[str, Any]
    rules: SizeRules
    ranks: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Made:
    """A video as its MP4 file's bytes, its report and the settings that it was made with as plain types."""

    video: bytes
    report: dict[str, Any]
    settings: dict[str, Any]
    summary: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one attempt: `made` where it went well, else a message; `fault` is the field that it is about.

    why: of a failure, "refused" for what cannot be made, "full" for memory that ran out, else "unforeseen".
    """

    made: Made | None = None
    message: str = ""
    fault: str = ""
    cancelled: bool = False
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Progress:
    """The step that a job is at, of so many."""

    job: str
    done: int
    steps: int


class Maker:
    """Holds one model and makes videos with it, one at a time. `progress` and `cancel` may be asked by other threads.

    Args:
        model: a diffusers folder or hub id; None is the bundled model.
        device, dtype: by name, as the command takes them.
    """

    # That make a video together.
    gpus = 1

    def __init__(self, model: str | None, device: str, dtype: str) -> None:
        self.model, self.device, self.dtype = model, device, Dtype(dtype)
        self._models: making.Models | None = None
        self._progress: Progress | None = None
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()

    def start(self, with_image: bool = False) -> About:
        """Load the model, for videos from text or from a first frame: the one that it cannot do gives way to the other.

        Raises:
            HeterostepError: it cannot be loaded.
        """
        try:
            pipe, defaults = self._load(with_image)
        except HeterostepError as error:
            try:
                pipe, defaults = self._load(not with_image)
            except HeterostepError:
                raise error from None
        return About(os.getpid(), str(self._models.device if self._models else ""), defaults, size_rules(pipe))

    def attempt(self, job: str, order: Order) -> Outcome:
        """Make a video; whatever goes wrong is told in the outcome."""
        try:
            return Outcome(self._make(job, order))
        except making.Cancelled:
            return Outcome(message="cancelled", cancelled=True)
        except HeterostepError as error:
            self._tidy()
            full = error.__cause__ is not None and making.is_out_of_memory(error.__cause__)
            return Outcome(None, str(error), error.field or "", why="full" if full else "refused")
        except Exception as error:
            full = making.is_out_of_memory(error)
            if not full:
                _log.exception("a video could not be made")
            self._tidy()
            if full:
                return Outcome(message=f"out of memory: {SMALLER}", why="full")
            return Outcome(message=f"it failed: {first_line(error)}", why="unforeseen")
        finally:
            with self._lock:
                self._progress = None
                self._cancelled.discard(job)

    def progress(self) -> Progress | None:
        """Where the present job is."""
        with self._lock:
            return self._progress

    def cancel(self, job: str) -> None:
        """End a job after its present step; one that has not come yet is not begun."""
        with self._lock:
            self._cancelled.add(job)

    def _load(self, with_image: bool) -> tuple[Any, dict[str, Any]]:
        if self._models is None:
            place = device_of(self.device)
            self._models = making.Models(place, precision_of(self.dtype, place), self._prepare)
        return self._models.get(self.model, with_image)

    def _prepare(self, pipe: Any) -> None:
        """What is done with a pipeline that was loaded."""

    def _tidy(self) -> None:
        """What a failed run leaves goes back, so that the next one has the memory."""
        if self._models is not None:
            self._models.tidy()

    def _check(self, job: str) -> None:
        if job in self._cancelled:
            raise making.Cancelled

    def _make(self, job: str, order: Order) -> Made:
        self._check(job)
        self._tell(Progress(job, 0, order.steps))
        picture = None if order.picture is None else order.picture.image
        pipe, defaults = self._load(picture is not None)
        options, fps = making.call_options(pipe, defaults, order.call(), picture)
        if picture is not None:
            check_shape(picture, options["width"], options["height"])

        def on_step(info: StepInfo) -> None:
            self._check(job)
            self._tell(Progress(job, info.step + 1, info.num_inference_steps))

        config = order.config()
        with making.memory_advice(pipe, config, options, SMALLER, WHOLE_STEPS):
            result = making.make(pipe, config, options, order.seed, on_step)
        self._check(job)
        video = self._file(result, fps)
        # As they were resolved, under the names of a pipeline's call.
        sizes = {name: options[name] for name in (*making.SIZES, "guidance_scale")}
        settings = {name: value for name, value in order.data().items() if name not in ("frames", "guidance")} | sizes
        settings |= {"fps": fps, "dtype": self.dtype.value, "device": str(pipe.device)}
        settings |= {"gpus": self.gpus, "heterostep": heterostep.__version__}
        # What a report has of numpy's types goes no further than here.
        report = json.loads(json.dumps(making.report_content(result, None)))
        return Made(video, report, settings, making.summary(result, None))

    def _file(self, result: making.Result, fps: float) -> bytes:
        return _bytes(lambda path: _write_video(path, result, fps))

    def _tell(self, progress: Progress) -> None:
        with self._lock:
            self._progress = progress


def _write_video(path: Path, result: making.Result, fps: float) -> None:
    from heterostep.video import write_video

    write_video(path, result.clip, fps, result.audio)


def _bytes(write: Callable[[Path], None]) -> bytes:
    """What is written to a file, for the process that asked need not share a disk with this one."""
    with tempfile.TemporaryDirectory(prefix="heterostep-") as folder:
        path = Path(folder) / "video.mp4"
        write(path)
        return path.read_bytes()
