"""Batches on a real Ray of two workers with the bundled model: `make test-ray`."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from heterostep.batch import lines, manifest
from heterostep.batch.run import run
from heterostep.video import read_video
from processes import heed

pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
pytestmark = [
    pytest.mark.slow,
    # Ray's own: pipes to its processes are closed by the collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
SMALL = {"size": "64x64", "frames": 5, "steps": 6, "share": 0.5}


def rows(count, **more):
    return [{"prompt": "a red circle moving right", "seed": seed, **SMALL, **more} for seed in range(count)]


def write(path, content):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content))
    return path


def command(*arguments):
    """The command in a process of its own, where Ctrl-C works as in a shell."""
    return [sys.executable, "-m", "heterostep", "batch", *map(str, arguments), "--workers", "2"]


def entries(folder):
    path = folder / manifest.NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def done(folder):
    return [entry["line"] for entry in entries(folder) if entry["state"] == "done"]


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


class Watcher:
    """Notes what is said, and ends a worker's process once some videos are there."""

    def __init__(self):
        self.said, self.workers, self.killed = [], [], None

    def say(self, text, fault=False):
        self.said.append(text)

    def show(self, counts, running):
        if counts.made >= 3 and self.killed is None and running:
            self.killed = running[0].worker.about.process
            os.kill(self.killed, signal.SIGKILL)


def test_twenty_lines_a_lost_worker_and_a_broken_line(tmp_path):
    from heterostep.workers import cluster

    # What is left when the worker is lost takes longer than a new one needs to begin.
    content = [*rows(6), *rows(20, steps=40)[6:]]
    whole = json.dumps(content[7])
    content[7] = whole[:30]
    path, out, watcher = write(tmp_path / "prompts.jsonl", content), tmp_path / "out", Watcher()

    async def hire():
        cluster.connect(None)
        watcher.workers = cluster.hire(None, "cpu", "auto", 2)
        return watcher.workers

    try:
        with manifest.opened(out) as made:
            counts = asyncio.run(run(lines.read(path, {}, None), made, hire, watcher))
    finally:
        cluster.disconnect()
    assert (counts.all, counts.before, counts.made, counts.failed) == (20, 0, 19, 1)
    assert watcher.killed is not None and any("its worker was lost; it is made again" in said for said in watcher.said)
    assert watcher.killed not in [worker.about.process for worker in watcher.workers]
    assert sorted(done(out)) == [number for number in range(1, 21) if number != 8]
    assert {entry["worker"] for entry in entries(out) if entry["state"] == "done"} == {"worker 1", "worker 2"}
    assert [entry["message"][:14] for entry in entries(out) if entry["state"] == "failed"] == ["not valid JSON"]
    before = times(out)
    # The line is mended: it alone is made.
    content[7] = whole
    result = subprocess.run(command(write(path, content), "--out", out), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "19 of 20 were made before" in result.stderr and "20 of 20 videos are in" in result.stdout
    after = times(out)
    assert len(after) == 20 and before.items() <= after.items()
    assert sorted(done(out)) == list(range(1, 21))
    for video in out.glob("*.mp4"):
        assert read_video(video)[0].shape == (5, 64, 64, 3)
        report = json.loads(video.with_suffix(".json").read_text())
        assert report["report"]["share"]["target"] == 0.5 and report["settings"]["num_frames"] == 5
    assert not list(out.glob("*.part"))
    # And once more: there is nothing to do, and no Ray is begun for it.
    began = time.monotonic()
    assert subprocess.run(command(path, "--out", out), capture_output=True).returncode == 0
    assert times(out) == after and time.monotonic() - began < 30


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_batch_that_is_stopped_goes_on(tmp_path, ending):
    path, out = write(tmp_path / "prompts.jsonl", rows(8, steps=20)), tmp_path / "out"
    process = subprocess.Popen(command(path, "--out", out), stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    until(lambda: len(done(out)) >= 2)
    process.send_signal(ending)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if ending == signal.SIGKILL else 130)
    if ending != signal.SIGKILL:
        assert err.endswith("heterostep: interrupted\n") and "the same command goes on" in err
    before = times(out)
    assert 2 <= len(before) < 8
    result = subprocess.run(command(path, "--out", out, "--quiet"), capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert before.items() <= times(out).items() and sorted(done(out)) == list(range(1, 9))


def test_frames_texts_and_names_as_the_generate_command_makes_them(tmp_path):
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "first.png")
    content = [*rows(1), {**rows(1)[0], "image": "first.png", "name": "from a frame"}, {**rows(1)[0], "size": "60x64"}]
    out = tmp_path / "out"
    result = subprocess.run(
        command(write(tmp_path / "prompts.jsonl", content), "--out", out), capture_output=True, text=True
    )
    assert result.returncode == 2 and "line 3 failed: width must be a multiple of 16" in result.stderr
    assert (out / "from a frame.mp4").is_file() and len(times(out)) == 2
    arguments = ["--steps", "6", "--share", "0.5", "--height", "64", "--width", "64", "--frames", "5"]
    alone = [sys.executable, "-m", "heterostep", "generate", content[0]["prompt"], *arguments, "--device", "cpu"]
    # A worker has one thread here, and sums depend on it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*alone, "--out", tmp_path / "alone.mp4", "--quiet"], check=True, env=environment)
    (text,) = (video for video in out.glob("*.mp4") if video.name != "from a frame.mp4")
    assert Path(tmp_path / "alone.mp4").read_bytes() == text.read_bytes()


def of_one_command(row, path):
    """The video that `generate` makes of the same on two processes."""
    width, height = row["size"].split("x")
    given = [["--" + name, str(value)] for name, value in row.items() if name not in ("prompt", "size")]
    arguments = ["--gpus", "2", "--device", "cpu", "--height", height, "--width", width, "--quiet", "--out", str(path)]
    command = [sys.executable, "-m", "heterostep", "generate", row["prompt"], *sum(given, []), *arguments]
    # A rank of a group has one thread here.
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return path.read_bytes()


def test_groups_make_what_one_command_on_two_processes_makes(tmp_path):
    content, out = rows(3), tmp_path / "out"
    # Two groups at the same time, on one machine.
    given = command(write(tmp_path / "prompts.jsonl", content), "--out", out, "--device", "cpu", "--gpus-per-video", 2)
    result = subprocess.run(given, capture_output=True, text=True)
    assert result.returncode == 0 and "(2 workers)" in result.stderr, result.stderr
    reports = {path: json.loads(path.with_suffix(".json").read_text()) for path in out.glob("*.mp4")}
    assert sorted(done(out)) == [1, 2, 3] and {report["settings"]["gpus"] for report in reports.values()} == {2}
    for path, report in reports.items():
        if report["settings"]["seed"] == 1:
            assert path.read_bytes() == of_one_command(content[1], tmp_path / "alone.mp4")


class RankKiller(Watcher):
    """Kills the second process of a group in the middle of the second line, once."""

    def show(self, counts, running):
        for job in running:
            self.ranks |= set(job.worker.about.ranks)
            if counts.made == 1 and self.killed is None and job.done >= 2:
                self.killed = job.worker.about.ranks[1]
                os.kill(self.killed, signal.SIGKILL)


def test_a_rank_that_is_killed_costs_no_video(tmp_path):
    from heterostep.workers import cluster

    content = rows(3, steps=100)
    path, out, watcher = write(tmp_path / "prompts.jsonl", content), tmp_path / "out", RankKiller()
    watcher.ranks = set()

    async def hire():
        cluster.connect(None)
        return cluster.hire(None, "cpu", "auto", 1, 2)

    try:
        with manifest.opened(out) as made:
            counts = asyncio.run(run(lines.read(path, {}, None), made, hire, watcher))
    finally:
        cluster.disconnect()
    assert (counts.all, counts.made, counts.failed) == (3, 3, 0) and done(out) == [1, 2, 3]
    assert watcher.killed is not None and watcher.said.count("line 2: its worker was lost; it is made again") == 1
    # The group before and the one after; none of either is left.
    assert len(watcher.ranks) == 4
    until(lambda: not any(psutil.pid_exists(pid) for pid in watcher.ranks), 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "99"], "--workers 99, but Ray sees"),
        (["--gpus-per-video", "2"], "--gpus-per-video 2, but Ray sees no GPU"),
        (
            ["--gpus-per-video", "3", "--device", "cpu"],
            "the 4 heads of WanTransformer3DModel cannot be split over 3 GPUs",
        ),
        (["--device", "cuda:1"], "--device is auto, cpu or cuda here"),
        (["--address", "127.0.0.1:1"], "no Ray at 127.0.0.1:1"),
        (["--address", "somewhere"], "--address is host:port"),
        (["--model", "/no/model"], "the folder /no/model does not exist"),
        (["--share", "7"], "share should be from 0.001 to 1"),
        (["--size", "big"], "such as 832x480"),
    ],
)
def test_used_wrongly(tmp_path, arguments, message):
    path = write(tmp_path / "prompts.jsonl", rows(1))
    result = subprocess.run(
        [*command(path, "--out", tmp_path / "out"), *arguments], capture_output=True, text=True, timeout=100
    )
    faults = [line for line in result.stderr.splitlines() if line.startswith("heterostep: ")]
    assert result.returncode == 2 and len(faults) == 1 and message in faults[0], result.stderr
    assert "Traceback" not in result.stderr
