"""Ray's part: a worker is an actor on a GPU, or on cores of the CPU. Ray is an extra: imported where it is used."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from heterostep.errors import HeterostepError, first_line
from heterostep.workers.crew import WorkerLost
from heterostep.workers.maker import About, Maker, Outcome, Progress

if TYPE_CHECKING:
    from heterostep.order import Order


def check_options(device: str, gpus_per_video: int = 1) -> None:
    """Whether workers can be had like this, before Ray is begun.

    Raises:
        HeterostepError: they cannot.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise HeterostepError(f"--device is auto, cpu or cuda here, for Ray chooses the GPUs, not {device}")
    if gpus_per_video != 1:
        raise HeterostepError("a video on several GPUs is not to be had yet: leave out --gpus-per-video")


def connect(address: str | None) -> None:
    """Begin a Ray of this process's own on this machine, or join the cluster at an address, host:port.

    Raises:
        HeterostepError: there is no cluster at the address.
    """
    if address is not None:
        _reach(address)
    # Nothing is sent to Ray's makers. Who reaches this machine's ports cannot use them: Ray asks for its own token.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A worker without GPUs sees those that there are: it does not use them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        options |= {"address": "local", "include_dashboard": False}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        if address is None:
            raise HeterostepError(f"no Ray on this machine: {first_line(error)}") from error
        # Ray does not say that this was why.
        hint = (
            "" if "RAY_AUTH_MODE" in os.environ else " (where a cluster asks for Ray's token, set RAY_AUTH_MODE=token)"
        )
        raise HeterostepError(f"no Ray at {address}: {first_line(error)}{hint}") from error


def disconnect() -> None:
    """End this process's Ray, or leave the cluster; its workers end."""
    ray.shutdown()


@dataclasses.dataclass(frozen=True)
class Spec:
    """What each worker is: its model and device as `Maker` takes them, and the part of a machine that is its own."""

    model: str | None
    device: str
    dtype: str
    cpus: int
    gpus: int


def _reach(address: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise HeterostepError(f"--address is host:port of a Ray cluster's head, not {address}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise HeterostepError(f"no Ray at {address}: {first_line(error)}") from error


def hire(model: str | None, device: str, dtype: str, count: int | None) -> list[RayWorker]:
    """Workers for the machines that are connected: one a GPU, or one for all cores where there is none.

    Args:
        model, device, dtype: as `Maker` takes them; "auto" is CUDA where Ray has a GPU.
        count: so many of them.

    Raises:
        HeterostepError: there is not enough for so many.
    """
    gpus, cpus = _each("GPU"), _each("CPU")
    if device == "auto":
        device = "cuda" if any(gpus) else "cpu"
    what, most = ("GPU", sum(gpus)) if device == "cuda" else ("CPU core", sum(cpus))
    # Those that others use now are not waited for, unless they are asked for.
    count = count or (max(int(ray.available_resources().get("GPU", 0)), 1) if device == "cuda" else 1)
    if not most:
        raise HeterostepError("--device cuda, but Ray sees no GPU")
    if count > most:
        raise HeterostepError(f"--workers {count}, but Ray sees {most} {what}{'s' * (most > 1)}")
    part = (_largest(cpus, count), 0) if device == "cpu" else (1, 1)
    spec = Spec(model, device, dtype, *part)
    return [RayWorker(f"worker {number}", spec) for number in range(1, count + 1)]


def _each(resource: str) -> list[int]:
    """How much of it each machine has."""
    return [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]


def _largest(cpus: Sequence[int], count: int) -> int:
    """The most cores that each of so many workers can have, each on one machine."""
    return next((part for part in range(max(cpus), 1, -1) if sum(each // part for each in cpus) >= count), 1)


@ray.remote(concurrency_groups={"aside": 2})
class _Actor:
    """A `Maker` in a process of its own. What it is asked aside is answered while a video is made."""

    def __init__(self, spec: Spec) -> None:
        # Into Ray's log of this process.
        logging.basicConfig(level=logging.WARNING)
        self.maker = Maker(spec.model, spec.device, spec.dtype)

    def start(self, with_image: bool) -> About | str:
        """What it is, or why it cannot be."""
        try:
            return self.maker.start(with_image)
        except HeterostepError as error:
            return str(error)

    def attempt(self, job: str, order: Order) -> Outcome:
        return self.maker.attempt(job, order)

    @ray.method(concurrency_group="aside")
    def progress(self) -> Progress | None:
        return self.maker.progress()

    @ray.method(concurrency_group="aside")
    def cancel(self, job: str) -> None:
        self.maker.cancel(job)


class RayWorker:
    """A `crew.Worker` as an actor. It may be sent to another process after its start."""

    def __init__(self, name: str, spec: Spec) -> None:
        self.name, self.spec = name, spec
        self.about: About | None = None
        self._actor: Any = None

    async def start(self, with_image: bool) -> About:
        self.end()
        actor: Any = _Actor
        self._actor = actor.options(num_cpus=self.spec.cpus, num_gpus=self.spec.gpus).remote(self.spec)
        about = await self._ask("start", with_image)
        if isinstance(about, str):
            raise HeterostepError(about)
        self.about = about
        return about

    async def attempt(self, job: str, order: Order) -> Outcome:
        return await self._ask("attempt", job, order)

    async def progress(self) -> Progress | None:
        return await self._ask("progress")

    async def cancel(self, job: str) -> None:
        await self._ask("cancel", job)

    def end(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    async def _ask(self, what: str, *arguments: Any) -> Any:
        if self._actor is None:
            raise WorkerLost(f"{self.name} has ended")
        try:
            return await getattr(self._actor, what).remote(*arguments)
        except RayError as error:
            raise WorkerLost(f"{self.name}: {first_line(error)}") from error
