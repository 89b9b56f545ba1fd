"""A group in face of failures, with ranks that are threads and make nothing; then with two processes on the CPU."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from crews import ABOUT
from heterostep import checkpoints, launch, tiny
from heterostep.errors import HeterostepError
from heterostep.order import Order
from heterostep.workers.crew import WorkerLost
from heterostep.workers.group import Group
from heterostep.workers.maker import Made, Outcome, Progress

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="groups want POSIX")
MISSED = Outcome(message="it failed: Connection closed by peer", why="unforeseen")
FULL = Outcome(message="out of memory: take a smaller or shorter video", why="full")
REFUSED = Outcome(message="width must be a multiple of 16", fault="width", why="refused")
CANCELLED = Outcome(message="cancelled", cancelled=True)


class Child:
    """A rank as a thread: it says what its prompt's name tells, and `code` is what it has ended with."""

    def __init__(self, rank, pipe, start):
        self.rank, self.pid, self.code, self.stopped = rank, 1000 + rank, None, threading.Event()
        self.connection, self.begin = Connection(os.dup(pipe)), start
        self.thread = threading.Thread(target=self.live)
        self.thread.start()

    def live(self):
        self.connection.recv()
        with self.connection:
            try:
                if (begin := self.begin[self.rank]) is None:
                    self.code = -9
                    return
                self.connection.send(begin)
                while self.code is None:
                    self.act(*self.connection.recv())
            except (EOFError, OSError):
                pass

    def act(self, what, job, order):
        name, first = order.prompt, self.rank == 0
        if first:
            self.connection.send(Progress(job, 2, 12))
        if name == "wait":
            while first and self.connection.recv() != ("cancel", job):
                pass
            self.connection.send(CANCELLED)
        elif name == "one is killed":
            self.code = None if first else -9
            if first:
                self.connection.send(MISSED)
        elif name == "the other one is killed and this one waits":
            self.code = -9 if first else None
        elif name == "one is full":
            if not first:
                self.connection.send(FULL)
        elif name == "both are full":
            self.connection.send(FULL)
        elif name == "both refuse":
            self.connection.send(REFUSED)
        elif name == "one refuses":
            self.connection.send(MISSED if first else REFUSED)
        elif name == "one fails":
            if not first:
                self.connection.send(MISSED)
        elif name == "made before one is killed":
            self.code = None if first else -9
            if first:
                self.connection.send(Outcome(Made(b"video", {}, {}, {})))
        else:
            self.connection.send(Outcome(Made(b"video" * first, {}, {}, {})))

    def wait(self, timeout=None):
        return self.code


class Starts:
    """In place of `launch.Started`; `ended` counts those that were ended."""

    def __init__(self):
        self.count, self.ended, self.answers = 0, 0, [ABOUT, ABOUT]

    def __call__(self, command, ranks, surroundings, pipes):
        assert command[1:] == ["-m", "heterostep.workers.rank"] and ranks == len(pipes) == 2
        self.count += 1
        self.surroundings = surroundings
        self.children = [Child(rank, pipe, self.answers) for rank, pipe in enumerate(pipes)]
        return self

    def end(self):
        self.ended += 1


@pytest.fixture
def starts(monkeypatch):
    found = Starts()
    monkeypatch.setattr(launch, "Started", found)
    monkeypatch.setattr(launch, "GRACE", 0.1)
    return found


@pytest.fixture
def group(starts):
    made = Group(None, "cpu", "auto", 2, threads=3)
    yield made
    made.end()
    for child in starts.children:
        child.thread.join(5)
        assert not child.thread.is_alive()


def attempt(group, prompt, job="1"):
    return group.attempt(job, Order(prompt, dense=False))


def test_the_first_ranks_video_is_the_groups(group, starts):
    about = group.start()
    assert about.process == os.getpid() and about.ranks == (1000, 1001) and about.defaults == ABOUT.defaults
    assert starts.surroundings == {"OMP_NUM_THREADS": "3"}
    for job in "12":
        assert attempt(group, "a cat", job).made.video == b"video" and group.progress() is None
    assert (starts.count, starts.ended) == (1, 0)


def test_what_all_refuse_costs_one_job_alone(group, starts):
    group.start()
    assert attempt(group, "both refuse") == REFUSED
    assert attempt(group, "a cat").made is not None and starts.count == 1


@pytest.mark.parametrize(
    ("prompt", "outcome"),
    [
        ("one is full", FULL),
        ("both are full", FULL),
        ("one refuses", REFUSED),
        ("one fails", Outcome(message="GPU 1: it failed: Connection closed by peer", why="unforeseen")),
    ],
)
def test_a_failure_of_one_ends_the_job_in_one_line_and_the_group_begins_anew(group, starts, prompt, outcome):
    group.start()
    assert attempt(group, prompt) == outcome
    assert (starts.count, starts.ended) == (1, 1)
    assert attempt(group, "a cat").made is not None and starts.count == 2


@pytest.mark.parametrize(
    ("prompt", "number"), [("one is killed", 1), ("the other one is killed and this one waits", 0)]
)
def test_a_rank_that_is_killed_is_a_lost_worker(group, starts, prompt, number):
    group.start()
    with pytest.raises(WorkerLost, match=rf"^the process of GPU {number} was ended from outside \(SIGKILL\), perhaps"):
        attempt(group, prompt)
    assert starts.ended == 1
    group.start()
    assert attempt(group, "a cat").made is not None and starts.count == 2


def test_a_video_that_is_made_is_not_lost_with_another_rank(group, starts):
    group.start()
    assert attempt(group, "made before one is killed").made.video == b"video" and starts.ended == 1
    assert attempt(group, "a cat").made is not None


def test_jobs_are_cancelled_before_and_while_they_run(group, starts):
    group.start()
    group.cancel("1")
    assert attempt(group, "a cat", "1").cancelled and attempt(group, "a cat", "1").made is not None
    found = []
    thread = threading.Thread(target=lambda: found.append(attempt(group, "wait", "2")))
    thread.start()
    end = time.monotonic() + 5
    while group.progress() != Progress("2", 2, 12):
        assert time.monotonic() < end
        time.sleep(0.001)
    group.cancel("3")
    group.cancel("2")
    thread.join(5)
    assert found == [CANCELLED] and starts.count == 1
    assert attempt(group, "a cat", "2").made is not None and attempt(group, "a cat", "3").cancelled


def test_ranks_that_cannot_begin(group, starts):
    heads = Outcome(message="the 4 heads of X cannot be split over 3 GPUs", why="refused")
    starts.answers = [heads, heads]
    with pytest.raises(HeterostepError, match="^the 4 heads of X cannot be split"):
        group.start()
    # Those that ran a video before begin anew as a worker does.
    with pytest.raises(WorkerLost, match="^the 4 heads"):
        attempt(group, "a cat")
    starts.answers = [ABOUT, Outcome(message="RuntimeError: NCCL", why="unforeseen")]
    with pytest.raises(WorkerLost, match="^GPU 1: RuntimeError: NCCL$"):
        group.start()
    starts.answers = [ABOUT, None]
    with pytest.raises(WorkerLost, match="^the process of GPU 1 was ended from outside"):
        group.start()
    assert starts.count == starts.ended == 4


def test_what_cannot_be_shared_is_known_without_weights(tmp_path):
    def folder(**config):
        kinds = {"_class_name": "WanPipeline", "transformer": ["diffusers", config.pop("kind")]}
        (tmp_path / "model_index.json").write_text(json.dumps(kinds))
        (tmp_path / "transformer").mkdir(exist_ok=True)
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    wan = folder(kind="WanTransformer3DModel", num_attention_heads=12)
    checkpoints.check_gpus(wan, 4)
    with pytest.raises(HeterostepError, match="^the 12 heads of WanTransformer3DModel cannot be split over 8 GPUs"):
        checkpoints.check_gpus(wan, 8)
    for kind in ("LTXVideoTransformer3DModel", "WanVACETransformer3DModel"):
        with pytest.raises(HeterostepError, match=f"^{kind} on several GPUs is not supported: run it on one device"):
            checkpoints.check_gpus(folder(kind=kind, num_attention_heads=32), 2)
    # What is wrong otherwise is for loading to say.
    checkpoints.check_gpus(str(tmp_path / "none"), 2)
    checkpoints.check_gpus(str(tiny.WEIGHTS), 2)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def none_is_left(pids):
    left = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < left:
        time.sleep(0.05)
    assert pids and not any(map(alive, pids))


ASKED = {"prompt": "a red circle moving right", "steps": 12, "share": 0.5, "size": "64x64", "frames": 5}


@pytest.mark.slow
def test_two_processes_on_the_cpu():
    group, found = Group(None, "cpu", "auto", 2, threads=1), []

    def order(**fields):
        return Order.of_data(ASKED | fields)

    def aside(job, **fields):
        def make():
            try:
                found.append(group.attempt(job, order(**fields)))
            except WorkerLost as error:
                found.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        end = time.monotonic() + 60
        while (at := group.progress()) is None or at.done < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        return thread

    try:
        ranks = group.start().ranks
        first = group.attempt("1", order())
        assert first.made.settings["gpus"] == 2 and first.made.report["share"]["achieved"] == 0.5
        # Refused before the run, and in it: all are where they were.
        assert group.attempt("2", order(width=60, height=64, size=None)).fault == "width"
        assert "cannot be split evenly" in group.attempt("3", order(size="48x48", frames=1)).message
        thread = aside("4", steps=1000)
        group.cancel("4")
        thread.join(60)
        assert found.pop().cancelled
        assert group.attempt("5", order()).made.video == first.made.video and all(map(alive, ranks))
        thread = aside("6", steps=1000)
        os.kill(ranks[1], signal.SIGKILL)
        thread.join(60)
        assert "the process of GPU 1 was ended from outside (SIGKILL)" in str(found.pop())
        none_is_left(ranks)
        again = group.start().ranks
        assert not set(again) & set(ranks)
        assert group.attempt("6", order()).made.video == first.made.video
        group.end()
        none_is_left(again)
        with pytest.raises(HeterostepError, match="^the 4 heads of WanTransformer3DModel cannot be split over 3 GPUs"):
            Group(None, "cpu", "auto", 3, threads=1).start()
    finally:
        group.end()


@pytest.mark.slow
def test_none_is_left_when_their_starter_is_killed():
    code = "from heterostep.workers.group import Group; g = Group(None, 'cpu', 'auto', 2, 1); print(*g.start().ranks)"
    starter = subprocess.Popen(
        [sys.executable, "-c", f"{code}; import sys, time; sys.stdout.flush(); time.sleep(60)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with starter:
        ranks = [int(pid) for pid in starter.stdout.readline().split()]
        assert len(ranks) == 2 and all(map(alive, ranks))
        starter.kill()
        none_is_left(ranks)
