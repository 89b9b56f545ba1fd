"""What the page's orders become, without a browser."""

import functools
import gc
import io
import json
import re
import shlex
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import heterostep
from heterostep import making, tiny
from heterostep.errors import HeterostepError
from heterostep.order import Order, check_shape, read_picture
from heterostep.ui import jobs
from heterostep.ui.estimate import Estimates, Size
from heterostep.ui.jobs import FINAL, Studio
from heterostep.video import read_video
from small import small_pipeline

SMALL = {"height": 64, "width": 64, "num_frames": 9, "fps": 16, "guidance_scale": 3.0}
PROMPT = "a red circle moving right"
FORM = {"prompt": PROMPT, "dial": "share", "target": "0.5", "steps": "12"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HETEROSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny, "DEFAULTS", SMALL)
    return tmp_path / "cache" / "timings.jsonl"


@functools.lru_cache
def pipeline(image_to_video):
    return small_pipeline(image_to_video)


@pytest.fixture
def pipes(monkeypatch):
    """The small pipeline in place of the bundled one; the list of loaded pipelines."""
    loaded = []

    def load(image_to_video=False):
        loaded.append(pipeline(image_to_video))
        return loaded[-1]

    monkeypatch.setattr(tiny, "load", load)
    return loaded


@pytest.fixture
def studio(pipes):
    with Studio() as made:
        yield made


def order(**fields):
    return Order.of({**FORM, **{name: str(value) for name, value in fields.items()}})


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def ended(job):
    until(lambda: job.state in FINAL)
    return job


def picture(width=64, height=64):
    out = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), (200, 30, 30), np.uint8)).save(out, format="PNG")
    return out.getvalue()


def test_an_order_becomes_two_videos(studio, pipes):
    asked = order(dense="on")
    before = studio.estimate(asked)
    assert before["seconds"] is before["dense_seconds"] is None and not before["made"] and before["share"] == 0.5
    job = ended(studio.submit(asked, "me"))
    assert (job.state, job.message) == ("done", "")
    told = json.loads(json.dumps(studio.told(job)))["result"]
    assert set(told["files"]) == {"heterostep", "dense", "both", "report", "poster"}
    assert all((job.folder / name).is_file() for name in told["files"].values())
    dense, fast = (read_video(job.folder / told["files"][name]) for name in ("dense", "heterostep"))
    assert dense[0].shape == fast[0].shape == (9, 64, 64, 3) and dense[1] == fast[1] == told["fps"] == 16
    report = json.loads((job.folder / "report.json").read_text())
    assert report["share"]["achieved"] == 0.5 and report["psnr"] == told["psnr"] and report["seed"] == 0
    assert len(told["active"]) == 12 and sum(told["active"]) == 6 and told["evaluations"] == [6, 6]
    assert "asked 0.50" in told["summary"]["share"] and studio.of_client("me") == [job]
    assert studio.of_client("you") == []
    with pytest.raises(HeterostepError):
        heterostep.pipeline.inspect(pipes[0])
    after = studio.estimate(asked)
    assert after["made"] and 0 < after["seconds"] < after["dense_seconds"]


def test_the_dense_video_is_made_once(studio, monkeypatch, pipes):
    targets = []
    make = making.make

    def counted(pipe, config, *rest):
        targets.append(config.target)
        return make(pipe, config, *rest)

    monkeypatch.setattr(making, "make", counted)
    first, second = (ended(studio.submit(order(dense="on", target=target))) for target in (0.5, 0.75))
    assert targets == [1, 0.5, 0.75] and len(pipes) == 1
    clips = [read_video(job.folder / "dense.mp4")[0] for job in (first, second)]
    assert np.array_equal(*clips)
    alone = ended(studio.submit(order(seed=1)))
    assert targets[3:] == [0.5] and "dense" not in alone.result["files"] and alone.result["psnr"] is None


def test_the_papers_policy_has_a_heat_map(studio):
    job = ended(studio.submit(order(policy="hsa", target=0.6, steps=24)))
    least, most = job.result["evaluations"]
    assert least < most
    with Image.open(job.folder / job.result["files"]["heat"]) as heat:
        assert heat.format == "PNG"


def test_a_first_frame_is_cropped_and_kept(studio, pipes):
    asked = Order.of(FORM, read_picture(picture(128, 64), "C:\\photos\\x.png"))
    job = ended(studio.submit(asked))
    assert job.state == "done" and type(pipes[0]).__name__ == "WanImageToVideoPipeline"
    with Image.open(job.folder / job.result["files"]["first"]) as kept:
        assert kept.size == (64, 64)
    assert "--image x.png" in job.result["command"]


def test_a_run_is_cancelled_between_steps_and_the_next_one_is_made(studio):
    long, waiting, last = (studio.submit(order(steps=steps), "me") for steps in (1000, 500, 12))
    until(lambda: long.progress is not None and long.progress.done > 0)
    assert [studio.position(job) for job in (long, waiting, last)] == [0, 1, 2]
    assert 0 < sum(long.progress.active) < 1000 and studio.estimate(order())["ahead"] == 3
    studio.cancel(waiting)
    assert waiting.state == "cancelled" and studio.position(last) == 1
    studio.cancel(long)
    assert ended(long).state == "cancelled" and long.progress.done < 1000 and not long.folder.exists()
    assert ended(last).state == "done" and waiting.progress is None


def test_closing_cancels_and_leaves_no_files(pipes):
    with Studio() as studio:
        job = studio.submit(order(steps=1000))
        until(lambda: job.progress is not None and job.progress.done > 0)
        assert job.folder.is_dir()
    assert job.state == "cancelled" and not studio.folder.exists()
    with pytest.raises(HeterostepError, match="closed"):
        studio.submit(order())
    assert not any(thread.name == "heterostep-ui" for thread in threading.enumerate())


def test_only_so_many_wait_and_are_kept(studio, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_KEPT", 2)
    made = studio.submit(order(), "you")
    ended(made)
    first = studio.submit(order(steps=1000), "me")
    until(lambda: first.state == "running")
    waiting = [studio.submit(order(), "me") for _ in range(jobs.MOST_WAITING)]
    with pytest.raises(HeterostepError, match="wait already"):
        studio.submit(order(), "me")
    other = studio.submit(order(), "you")
    for job in (first, *waiting):
        studio.cancel(job)
    ended(first), ended(other)
    studio.submit(order(), "you")
    # Cancelled ones take no video's place.
    assert len(studio.of_client("me")) == 2
    assert made in studio.of_client("you") and other in studio.of_client("you")


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"model": Path(__file__).parent}, "model", "is not a diffusers folder or hub id"),
        ({"width": 70}, "width", "^width must be a multiple of 16"),
        ({"frames": 8}, "frames", "^frames must be a multiple of 4 plus 1"),
    ],
)
def test_what_shows_when_the_model_is_loaded_is_told_by_field(studio, fields, field, message):
    job = ended(studio.submit(order(**fields)))
    assert (job.state, job.fault) == ("failed", field) and "\n" not in job.message
    assert re.search(message, job.message)


def test_a_run_that_failed_gives_back_its_memory(studio, monkeypatch):
    left = []

    def full(*arguments):
        held = torch.nn.Module()
        held.itself = [held]
        left.append(weakref.ref(held))
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(making, "make", full)
    gc.disable()
    try:
        job = ended(studio.submit(order()))
        assert job.message.startswith("out of memory: take a smaller") and left[0]() is None
    finally:
        gc.enable()


def test_an_unexpected_fault_ends_one_job_alone(studio, monkeypatch, caplog):
    make = making.make

    def broken(pipe, config, options, seed, on_step):
        if seed == 7:
            raise RuntimeError("something\nbroke")
        return make(pipe, config, options, seed, on_step)

    monkeypatch.setattr(making, "make", broken)
    failed, made = (studio.submit(order(seed=seed)) for seed in (7, 8))
    assert ended(failed).message == "it failed: something" and failed.fault == ""
    assert ended(made).state == "done" and "something" in caplog.text


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"prompt": "  "}, "prompt", "say what"),
        ({"prompt": "x" * 3000}, "prompt", "3000 characters"),
        ({"target": "half"}, "target", "should be a number"),
        ({"target": "1.5"}, "target", "from 0.001 to 1"),
        ({"target": "nan"}, "target", "from 0.001 to 1"),
        ({"target": "0.05"}, "target", "lowest possible 0.084 for 12 steps"),
        ({"model": "/no/such/folder"}, "model", "the folder /no/such/folder does not exist"),
        ({"dial": "speed"}, "target", "runtime or a share"),
        ({"policy": "fastest"}, "policy", "policy"),
        ({"policy": "round-robin"}, "policy", "policy must be one of auto, hsa, not 'round-robin'"),
        ({"policy": "hsa", "sparse_share": "0.5"}, "sparse_share", "belongs to"),
        ({"steps": "0"}, "steps", "from 1 to 1000"),
        ({"steps": "2.5"}, "steps", "whole number"),
        ({"seed": "-1"}, "seed", "from 0"),
        ({"guidance": "strong"}, "guidance", "number"),
        ({"frames": "-3"}, "frames", "from 1"),
    ],
)
def test_bad_fields_are_told_in_one_line(fields, field, message):
    with pytest.raises(HeterostepError, match=message) as told:
        order(**fields)
    assert told.value.field == field and "\n" not in str(told.value)


def test_pictures_that_cannot_be_used_are_told():
    for data, message in ((b"no picture", "cannot be read"), (b"", "cannot be read"), (picture(8, 64), "8 x 64")):
        with pytest.raises(HeterostepError, match=message) as told:
            read_picture(data, "photo.png")
        assert told.value.field == "image" and "BytesIO" not in str(told.value)
    image = read_picture(picture(64, 300), "x.png").image
    with pytest.raises(HeterostepError, match="21%"):
        check_shape(image, 64, 64)
    assert check_shape(image, 40, 160) and check_shape(image, 64, 300) is None
    with pytest.raises(HeterostepError, match="64 x 300"):
        Order.of(FORM, read_picture(picture(64, 300), "x.png"))


def test_the_lines_to_copy_say_what_was_ordered():
    plain = Order.of({"prompt": "it's a cat", "dense": "on"})
    assert plain.code() == "heterostep.enable(pipe, runtime=0.5)"
    assert shlex.split(plain.command()) == ["heterostep", "generate", "it's a cat", "--runtime", "0.5", "--both"]
    other = order(policy="hsa", target=0.75, seed=3, guidance=2.5, negative="blur")
    assert other.code() == 'heterostep.enable(pipe, share=0.75, policy="hsa")'
    assert shlex.split(other.command())[3:] == [
        *("--share", "0.75", "--policy", "hsa", "--steps", "12", "--guidance", "2.5", "--negative", "blur"),
        *("--seed", "3"),
    ]
    # Without them it would take the model's own.
    published = Order.of({"prompt": "a cat", "model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}).command()
    assert "--steps 50" in published


def test_seconds_are_found_by_the_next_session(cache):
    size = Size(None, False, 64, 64, 9, 3.0)
    cpu, wide = torch.device("cpu"), Size(None, False, 64, 128, 9, 3.0)
    first = Estimates(cpu, torch.float32)
    assert first.dense_step(size) is None
    first.learn(size, 2.0, 5.0)
    first.learn(size, 2.1, 5.0)
    assert (first.dense_step(size), first.around(size)) == (2.1, 5.0)
    assert len(cache.read_text().splitlines()) == 1
    later = Estimates(cpu, torch.float32)
    assert later.dense_step(size) == pytest.approx(2.0) and later.around(size) is None
    assert later.dense_step(wide) is None and Estimates(cpu, torch.bfloat16).dense_step(size) is None
    assert later.dense_step(Size("some/model", False, 64, 64, 9, 3.0)) is None


def test_a_page_for_others_runs_one_model(pipes):
    with Studio(only=True) as studio, pytest.raises(HeterostepError, match="only runs its own model") as told:
        studio.submit(order(model="some/model"))
    assert told.value.field == "model"
