"""Ray's part: a worker is an actor on a GPU, on several of one machine, or on cores of the CPU.

Ray is an extra: imported where it is used.
"""

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
from heterostep.workers.group import Group
from heterostep.workers.maker import About, Maker, Outcome, Progress

if TYPE_CHECKING:
    from heterostep.order import Order


def check_options(device: str, gpus_per_video: int = 1) -> None:
    """Check that workers can be had like this, before Ray is begun.

    Raises:
        HeterostepError: they cannot.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise HeterostepError(f"--device is auto, cpu or cuda here, for Ray chooses the GPUs, not {device}")
    if gpus_per_video > 1 and os.name != "posix":
        raise HeterostepError("a video on several GPUs wants Linux: leave out --gpus-per-video")


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
    """What each worker is: its model and device as `Maker` takes them, and the part of a machine that is its own.

    ranks: processes that make a video together; each has one of the GPUs.
    """

    model: str | None
    device: str
    dtype: str
    cpus: int
    gpus: int
    ranks: int = 1


def _reach(address: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise HeterostepError(f"--address is host:port of a Ray cluster's head, not {address}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise HeterostepError(f"no Ray at {address}: {first_line(error)}") from error


def hire(model: str | None, device: str, dtype: str, count: int | None, gpus_per_video: int = 1) -> list[RayWorker]:
    """Workers for the machines that are connected: one a GPU, or one for all cores where there is none.

    Args:
        model, device, dtype: as `Maker` takes them; "auto" is CUDA where Ray has a GPU.
        count: so many of them.
        gpus_per_video: GPUs of one machine that each worker has; on the CPU, processes.

    Raises:
        HeterostepError: there is not enough for so many.
    """
    gpus, cpus = _each("GPU"), _each("CPU")
    if device == "auto":
        device = "cuda" if any(gpus) else "cpu"
        if device == "cpu" and gpus_per_video > 1:
            raise HeterostepError(f"--gpus-per-video {gpus_per_video}, but Ray sees no GPU (--device cpu is for a try)")
    if device == "cuda" and not any(gpus):
        raise HeterostepError("--device cuda, but Ray sees no GPU")
    if device == "cuda" and max(gpus) < gpus_per_video:
        raise HeterostepError(f"--gpus-per-video {gpus_per_video}, but no machine of Ray's has more than {max(gpus)}")
    if device == "cuda":
        most, what = sum(each // gpus_per_video for each in gpus), "GPU" if gpus_per_video == 1 else "group"
        # Those that others use now are not waited for, unless they are asked for.
        used = sum(gpus) - int(ray.available_resources().get("GPU", 0))
        count = count or max(_certain(gpus, used, gpus_per_video), 1)
    else:
        most, what, count = sum(cpus), "CPU core", count or 1
    if count > most:
        of = f" of {gpus_per_video} GPUs" if what == "group" else ""
        raise HeterostepError(f"--workers {count}, but Ray sees {most} {what}{'s' * (most > 1)}{of}")
    part = (_largest(cpus, count), 0) if device == "cpu" else (1, gpus_per_video)
    spec = Spec(model, device, dtype, *part, gpus_per_video)
    return [RayWorker(f"worker {number}", spec) for number in range(1, count + 1)]


def _each(resource: str) -> list[int]:
    """How much of it each machine has."""
    return [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]


def _certain(gpus: Sequence[int], used: int, part: int) -> int:
    """How many times so many GPUs of one machine are free for certain: Ray does not say where those in use are."""
    # In use, the odd ones of a machine and one more cost a group; then each `part` of its GPUs cost another one.
    costs = sorted(cost for each in gpus if each >= part for cost in (each % part + 1, *[part] * (each // part - 1)))
    while costs and used >= costs[0]:
        used -= costs.pop(0)
    return len(costs)


def _largest(cpus: Sequence[int], count: int) -> int:
    """The most cores that each of so many workers can have, each on one machine."""
    return next((part for part in range(max(cpus), 1, -1) if sum(each // part for each in cpus) >= count), 1)


@ray.remote(concurrency_groups={"aside": 2})
class _Actor:
    """A `Maker` in a process of its own, or a `Group` below it. What it is asked aside is answered meanwhile.

    An exception that says what happened is returned, for Ray would wrap it.
    """

    def __init__(self, spec: Spec) -> None:
        # Into Ray's log of this process.
        logging.basicConfig(level=logging.WARNING)
        self.maker: Maker | Group = Maker(spec.model, spec.device, spec.dtype)
        if spec.ranks > 1:
            threads = max(1, spec.cpus // spec.ranks) if spec.device == "cpu" else None
            self.maker = Group(spec.model, spec.device, spec.dtype, spec.ranks, threads)

    def start(self, with_image: bool) -> About | str | WorkerLost:
        """What it is, or why it cannot be."""
        try:
            return self.maker.start(with_image)
        except HeterostepError as error:
            return str(error)
        except WorkerLost as error:
            return error

    def attempt(self, job: str, order: Order) -> Outcome | WorkerLost:
        try:
            return self.maker.attempt(job, order)
        except WorkerLost as error:
            return error

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
            answer = await getattr(self._actor, what).remote(*arguments)
        except RayError as error:
            raise WorkerLost(f"{self.name}: {first_line(error)}") from error
        if isinstance(answer, WorkerLost):
            raise WorkerLost(f"{self.name}: {answer}")
        return answer
