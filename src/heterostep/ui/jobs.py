"""Orders made into videos, one at a time, in a thread of their own. Nothing here knows of the web."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from heterostep import making, pipeline, tiny
from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError, first_line
from heterostep.files import replacing
from heterostep.order import SMALLER, WHOLE_STEPS, Order, check_shape
from heterostep.ui.estimate import Estimates, Size

if TYPE_CHECKING:
    from heterostep.engine.report import StepInfo

_log = logging.getLogger("heterostep")
# Orders of one person that may wait at once, finished jobs that are kept, and dense videos kept for the next order.
MOST_WAITING = 4
MOST_KEPT = 24
MOST_DENSE = 2
# Seconds that closing waits for a step to end.
PATIENCE = 20.0
FINAL = ("done", "cancelled", "failed")


@dataclass
class Progress:
    """Where one of a job's runs is: "dense" or "heterostep".

    active: share of the tokens evaluated, of the `done` steps made; of those ahead as planned now.
    remaining: seconds to the end of the loop; None where they are not known.
    """

    run: str
    steps: int
    done: int = 0
    elapsed: float = 0.0
    remaining: float | None = None
    active: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Job:
    """An order and what became of it.

    state: "waiting", "running", "done", "cancelled" or "failed".
    phase: what is going on, for people.
    message, fault: why it failed, and the form's field that it is about, "" for none.
    """

    client: str
    order: Order
    folder: Path
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: str = "waiting"
    phase: str = "waiting"
    message: str = ""
    fault: str = ""
    progress: Progress | None = None
    result: dict[str, Any] | None = None
    seconds: float | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises `making.Cancelled` where the job is to end."""
        if self.stop.is_set():
            raise making.Cancelled


class Studio:
    """Takes orders and makes them in turn. Close it, or use it in a with block: its folder goes then.

    Args:
        device, precision: where and in what the transformer runs.
        model: in place of the bundled model where an order names none; a diffusers folder or hub id.
        only: refuse orders that name another model.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        precision: torch.dtype = torch.float32,
        model: str | None = None,
        only: bool = False,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.precision, self.model, self.only = precision, model, only
        self.estimates = Estimates(self.device, precision)
        self.folder = Path(tempfile.mkdtemp(prefix="heterostep-ui-"))
        self._lock = threading.Condition()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._queue: list[Job] = []
        self._closed = False
        self._models = making.Models(self.device, precision)
        self._defaults: dict[tuple[str | None, bool], dict[str, Any]] = {}
        self._dense: OrderedDict[tuple[Any, ...], making.Result] = OrderedDict()
        self._thread = threading.Thread(target=self._work, name="heterostep-ui", daemon=True)
        self._thread.start()

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and waits, and remove the folder with all videos."""
        with self._lock:
            self._closed = True
            for job in self._jobs.values():
                job.stop.set()
            self._lock.notify_all()
        self._thread.join(PATIENCE)
        shutil.rmtree(self.folder, ignore_errors=True)

    def submit(self, order: Order, client: str = "") -> Job:
        """Put an order at the end of the queue.

        Raises:
            HeterostepError: the model is not to be had here, or too many orders of this client wait.
        """
        order = self.complete(order)
        with self._lock:
            if self._closed:
                raise HeterostepError("the page is being closed")
            if sum(job.client == client for job in self._queue) >= MOST_WAITING:
                raise HeterostepError(f"{MOST_WAITING} of your videos wait already: cancel one, or let one end")
            job = Job(client, order, self.folder)
            job.folder = self.folder / job.id
            self._jobs[job.id] = job
            self._queue.append(job)
            self._forget()
            self._lock.notify_all()
            return job

    def complete(self, order: Order) -> Order:
        """The order with the model that is meant.

        Raises:
            HeterostepError: it names another one than this page may run.
        """
        if order.model is None or order.model == self.model:
            return Order(**(vars(order) | {"model": self.model}))
        if self.only:
            raise HeterostepError("this page only runs its own model: start your own page to run another", "model")
        return order

    def find(self, job_id: str) -> Job | None:
        """A job that is kept."""
        with self._lock:
            return self._jobs.get(job_id)

    def of_client(self, client: str) -> list[Job]:
        """A client's jobs, the newest first."""
        with self._lock:
            return [job for job in reversed(self._jobs.values()) if job.client == client]

    def position(self, job: Job) -> int:
        """How many jobs come before this one; 0 where it runs or has run."""
        with self._lock:
            return self._queue.index(job) + 1 if job in self._queue else 0

    def cancel(self, job: Job) -> None:
        """End a job: at once where it waits, after its present step where it runs."""
        with self._lock:
            job.stop.set()
            if job in self._queue:
                self._queue.remove(job)
                job.state = job.phase = "cancelled"
            elif job.state == "running":
                job.phase = "cancelling"

    def estimate(self, order: Order) -> dict[str, Any]:
        """Seconds that an order will take, None where they are not known yet.

        Returns:
            share of the evaluations as planned; seconds of the faster video; dense_seconds of the dense one; whole,
            whether encoding and decoding are in both; made, whether the dense video is there already; jobs ahead.
        """
        order = self.complete(order)
        share = order.planned_share()
        with self._lock:
            ahead = len(self._queue) + any(job.state == "running" for job in self._jobs.values())
            made = order.dense_key() in self._dense
        size = self._size(order)
        step = None if size is None else self.estimates.dense_step(size)
        around = None if size is None else self.estimates.around(size)
        known: dict[str, Any] = {"share": share, "made": made, "ahead": ahead, "whole": around is not None}
        loop = None if step is None else order.steps * step
        known["seconds"] = None if loop is None else share * loop + (around or 0)
        known["dense_seconds"] = None if loop is None else loop + (around or 0)
        return known

    def told(self, job: Job) -> dict[str, Any]:
        """A job as plain types."""
        order, progress = job.order, job.progress
        return {
            "id": job.id,
            "state": job.state,
            "phase": job.phase,
            "ahead": self.position(job),
            "message": job.message,
            "field": job.fault,
            "prompt": order.prompt,
            "dial": order.dial,
            "target": order.target,
            "steps": order.steps,
            "seed": order.seed,
            "image": None if order.picture is None else order.picture.name,
            "progress": None if progress is None else vars(progress),
            "seconds": job.seconds,
            "result": job.result,
        }

    def _forget(self) -> None:
        """Keep the newest of the videos that were made, and as many of the jobs that came to nothing."""
        for states in (("done",), ("failed", "cancelled")):
            finished = [job for job in self._jobs.values() if job.state in states]
            for job in finished[: max(0, len(finished) - MOST_KEPT)]:
                del self._jobs[job.id]
                shutil.rmtree(job.folder, ignore_errors=True)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
                job = self._queue.pop(0)
                job.state = "running"
            began = time.perf_counter()
            state = "failed"
            try:
                job.folder.mkdir()
                self._run(job)
                state = "done"
            except (making.Cancelled, KeyboardInterrupt):
                # `interrupts.check` raises the latter in this thread, too, where Ctrl-C came while a model was loaded.
                state = "cancelled"
            except HeterostepError as error:
                job.message, job.fault = str(error), error.field or ""
            except Exception as error:
                _log.exception("a video could not be made")
                full = making.is_out_of_memory(error)
                job.message = f"out of memory: {SMALLER}" if full else f"it failed: {first_line(error)}"
            if state == "failed":
                # What it leaves goes back, so that the next one has the memory.
                self._models.tidy()
            if state != "done":
                shutil.rmtree(job.folder, ignore_errors=True)
            with self._lock:
                job.seconds = time.perf_counter() - began
                job.state = job.phase = state

    def _run(self, job: Job) -> None:
        order = job.order
        picture = None if order.picture is None else order.picture.image
        job.phase = "loading the model"
        pipe, defaults = self._load(order.model, picture is not None)
        job.check()
        options, fps = making.call_options(pipe, defaults, order.call(), picture)
        if picture is not None:
            check_shape(picture, options["width"], options["height"])
        size = self._size(order)
        config, key = order.config(), order.dense_key()
        with making.memory_advice(pipe, config, options, SMALLER, WHOLE_STEPS):
            reference = self._dense.get(key) if order.dense else None
            if order.dense and reference is None:
                reference = self._make(job, pipe, HSAConfig(share=1.0), options, size, "dense")
                self._dense[key] = reference
                while len(self._dense) > MOST_DENSE:
                    self._dense.popitem(last=False)
            result = self._make(job, pipe, config, options, size, "heterostep")
        job.phase = "writing the files"
        files = _write(job, result, reference, fps, options.get("image"))
        report = result.report
        steps_map = report.steps_map
        job.result = {
            "files": files,
            "fps": fps,
            "frames": len(result.clip),
            "width": result.clip.shape[2],
            "height": result.clip.shape[1],
            "seconds": result.seconds,
            "dense_seconds": None if reference is None else reference.seconds,
            "psnr": None if reference is None else making.report_content(result, reference)["psnr"],
            "active": list(report.active_share),
            "evaluations": [int(steps_map.min()), int(steps_map.max())],
            "summary": making.summary(result, reference),
            "code": order.code(),
            "command": order.command(),
        }
        job.check()

    def _load(self, model: str | None, with_image: bool) -> tuple[Any, dict[str, Any]]:
        pipe, self._defaults[model, with_image] = self._models.get(model, with_image)
        return pipe, self._defaults[model, with_image]

    def _size(self, order: Order) -> Size | None:
        """None where the model's own size is not known before it is loaded."""
        key = (order.model, order.picture is not None)
        defaults = tiny.DEFAULTS if order.model is None else self._defaults.get(key)
        return None if defaults is None else Size(*key, **order.sizes(defaults))

    def _make(
        self, job: Job, pipe: Any, config: HSAConfig, options: dict[str, Any], size: Size | None, name: str
    ) -> making.Result:
        steps = options["num_inference_steps"]
        job.phase, job.progress = "encoding the prompt", Progress(name, steps)
        known = None if size is None else self.estimates.dense_step(size)

        def on_step(info: StepInfo) -> None:
            job.check()
            done = info.step + 1
            generation = pipeline.inspect(pipe).generation
            active = [] if generation is None else [count / generation.total for count in generation.counts]
            step = info.elapsed_seconds / done if name == "dense" else known
            remaining = None if step is None else step * sum(active[done:])
            job.progress = Progress(name, steps, done, info.elapsed_seconds, remaining, active)
            job.phase = "decoding" if done == steps else "denoising"

        began = time.perf_counter()
        result = making.make(pipe, config, options, job.order.seed, on_step)
        job.check()
        runtime = result.report.runtime
        # A dense run has timed all steps; a faster one estimates dense's seconds from those that it made.
        dense = runtime.seconds - runtime.warmup_seconds if name == "dense" else runtime.dense_seconds
        if size is not None and dense:
            around = time.perf_counter() - began - runtime.seconds
            self.estimates.learn(size, dense / steps if name == "dense" or known is None else known, around)
        return result


def _write(
    job: Job, result: making.Result, reference: making.Result | None, fps: float, picture: Any
) -> dict[str, str]:
    """The files of a job that is done, by what they are."""
    from PIL import Image

    from heterostep.video import write_video
    from heterostep.viz import write_heatmap

    files = {"heterostep": "heterostep.mp4", "report": "report.json", "poster": "poster.png"}
    write_video(job.folder / files["heterostep"], result.clip, fps, result.audio)
    if reference is not None:
        files |= {"dense": "dense.mp4", "both": "side-by-side.mp4"}
        write_video(job.folder / files["dense"], reference.clip, fps, reference.audio)
        write_video(job.folder / files["both"], making.beside(reference, result), fps, result.audio)
    steps_map = result.report.steps_map
    if steps_map.min() < steps_map.max():
        # Otherwise it has one colour.
        files["heat"] = "heat.png"
        write_heatmap(job.folder / files["heat"], result.clip, steps_map, fps)
    if picture is not None:
        files["first"] = "first.png"
        picture.save(job.folder / files["first"])
    poster = Image.fromarray(result.clip[len(result.clip) // 2])
    poster.thumbnail((160, 160))
    poster.save(job.folder / files["poster"])
    with replacing(job.folder / files["report"]) as part:
        part.write_text(json.dumps(making.report_content(result, reference)) + "\n", encoding="utf-8")
    return files
