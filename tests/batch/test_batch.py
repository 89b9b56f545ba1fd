"""A batch's run without Ray: over workers that make nothing."""

import asyncio
import json

import pytest

from crews import FakeWorker
from heterostep.batch import lines, manifest
from heterostep.batch.run import Counts, run
from heterostep.errors import HeterostepError


class Watcher:
    def __init__(self):
        self.said, self.faults, self.shown = [], [], []

    def say(self, text, fault=False):
        (self.faults if fault else self.said).append(text)

    def show(self, counts, running):
        self.shown.append((counts.ended, [job.id for job in running]))


@pytest.fixture
def batch(tmp_path):
    """Runs lines, of objects or texts, on workers; gives the counts and what was said."""

    def made(rows, *workers):
        path, watcher = tmp_path / "prompts.jsonl", Watcher()
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

        async def hire():
            return workers

        with manifest.opened(tmp_path / "out") as noted:
            counts = asyncio.run(asyncio.wait_for(run(lines.read(path, {}, None), noted, hire, watcher), 20))
        return counts, watcher

    return made


ROWS = [{"prompt": "a cat", "seed": seed} for seed in range(4)]


def test_what_is_missing_is_made_and_then_there_is_nothing_to_do(batch, tmp_path):
    worker = FakeWorker()
    counts, watcher = batch([*ROWS[:2], "broken", {"prompt": "fail"}, {"prompt": "die once"}], worker)
    assert counts == Counts(5, 0, 3, 2) and worker.ended
    assert [fault[:13] for fault in watcher.faults] == ["line 3 failed", "line 4 failed"]
    assert "line 5: its worker was lost; it is made again" in watcher.said and watcher.shown[-1] == (5, [])
    videos = {path.read_bytes() for path in (tmp_path / "out").glob("*.mp4")}
    assert videos == {b"video of a cat 0", b"video of a cat 1", b"video of die once 0"}
    again = FakeWorker()
    counts, watcher = batch([*ROWS, {"prompt": "die once"}], again)
    assert counts == Counts(5, 3, 2, 0) and again.jobs == ["3", "4"] and "3 of 5 were made before" in watcher.said
    idle = FakeWorker()
    counts, _ = batch(ROWS, idle)
    assert counts == Counts(4, 4, 0, 0) and idle.starts == 0


def test_of_many_faulty_lines_the_first_are_told_and_the_others_counted(batch, tmp_path):
    counts, watcher = batch(["broken"] * 4 + [{"prompt": "a"}, *["broken"] * 3], FakeWorker())
    assert counts == Counts(8, 0, 1, 7) and [fault[:13] for fault in watcher.faults[:5]] == [
        f"line {number} failed" for number in (1, 2, 3, 4, 6)
    ]
    noted = tmp_path / "out" / manifest.NAME
    assert watcher.faults[5:] == [f"2 more lines failed: {noted} says why"]
    assert noted.read_text().count("not valid JSON") == 7


def test_a_model_that_cannot_be_loaded_ends_the_batch_in_one_line(batch):
    worker = FakeWorker()
    worker.fault = "x/y is no diffusers model folder or hub id"
    with pytest.raises(HeterostepError, match="^x/y is no diffusers model"):
        batch(ROWS, worker)
    assert worker.ended


def test_a_worker_that_does_not_start_is_done_without(batch):
    broken, whole = FakeWorker("worker 1"), FakeWorker("worker 2")
    broken.broken = True
    counts, watcher = batch(ROWS, broken, whole)
    assert counts.made == 4 and "worker 1 does not start; the others go on" in watcher.said
    with pytest.raises(HeterostepError, match="no worker could be started"):
        batch([*ROWS, {"prompt": "a dog"}], broken)


def test_when_the_last_worker_is_lost_the_lines_are_left_for_the_next_run(batch, monkeypatch):
    worker = FakeWorker()
    attempt = worker.attempt

    async def dying(job, order):
        worker.broken = job == "2"
        return await attempt(job, order)

    worker.attempt = dying
    with pytest.raises(HeterostepError, match="no worker is left: worker 1 does not start"):
        batch(ROWS, worker)
    counts, _ = batch(ROWS, FakeWorker())
    assert counts == Counts(4, 1, 3, 0)


def test_a_full_disk_ends_the_batch_and_what_was_made_stays(batch, monkeypatch):
    add = manifest.Manifest.add

    def full(self, line, *rest):
        if line.number == 2:
            raise OSError(28, "No space left on device")
        add(self, line, *rest)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(manifest.Manifest, "add", full)
        batch(ROWS, FakeWorker())
    counts, _ = batch(ROWS, FakeWorker())
    assert counts == Counts(4, 1, 3, 0)
