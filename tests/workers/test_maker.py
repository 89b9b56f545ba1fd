import functools
import io
import json
import pickle
import threading
import time

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from heterostep import making, tiny
from heterostep.errors import HeterostepError
from heterostep.order import Order, read_picture
from heterostep.video import read_video
from heterostep.workers.maker import Maker
from small import small_pipeline
from small_ltx2 import small_ltx2

SMALL = {"height": 64, "width": 64, "num_frames": 9, "fps": 16, "guidance_scale": 3.0}
ASKED = {"prompt": "a red circle", "share": 0.5, "steps": 12}


@functools.lru_cache
def pipeline(image_to_video):
    return small_pipeline(image_to_video)


@pytest.fixture
def loads(monkeypatch):
    """The small pipeline in place of the bundled one; the kinds that were loaded."""
    found = []

    def load(image_to_video=False):
        found.append(image_to_video)
        return pipeline(image_to_video)

    monkeypatch.setattr(tiny, "load", load)
    monkeypatch.setattr(tiny, "DEFAULTS", SMALL)
    return found


@pytest.fixture
def maker(loads):
    return Maker(None, "cpu", "auto")


def order(picture=None, **fields):
    return Order.of_data({**ASKED, **fields}, picture)


def frame():
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(out, format="PNG")
    return read_picture(out.getvalue(), "first.png")


def test_a_video_comes_with_its_report_and_settings(maker, tmp_path):
    about = maker.start()
    assert about.device == "cpu" and about.defaults["num_frames"] == 9 and about.rules.frames(10) == 9
    outcome = pickle.loads(pickle.dumps(maker.attempt("1", order(size="48x32", seed=3))))
    assert outcome.message == "" and maker.progress() is None
    made = outcome.made
    (tmp_path / "video.mp4").write_bytes(made.video)
    assert read_video(tmp_path / "video.mp4")[0].shape == (9, 32, 48, 3)
    assert json.loads(json.dumps(made.report))["share"]["achieved"] == 0.5 and made.report["seed"] == 3
    wanted = {"prompt": "a red circle", "seed": 3, "width": 48, "num_frames": 9, "guidance_scale": 3.0, "target": 0.5}
    assert wanted.items() <= made.settings.items() and "seconds" in made.summary


def test_two_sizes_in_turn_give_what_each_gives_alone(maker, loads):
    orders = [order(), order(size="48x32", steps=15), order(frame())]
    alone = [Maker(None, "cpu", "auto").attempt("1", each).made.video for each in orders]
    loads.clear()
    again = [maker.attempt("1", each).made.video for each in [orders[0], orders[2], orders[1], orders[0]]]
    assert again == [alone[0], alone[2], alone[1], alone[0]]
    # Both kinds have the same weights.
    assert loads == [False]


@pytest.mark.parametrize("kind", ["wan2.2-ti2v-t2v", pytest.param("ltx2", marks=pytest.mark.slow)])
def test_both_kinds_share_the_weights_of_a_checkpoint(tmp_path, kind):
    pipe = small_ltx2() if kind == "ltx2" else small_pipeline()
    pipe.save_pretrained(tmp_path)
    model, cpu = str(tmp_path), torch.device("cpu")
    models = making.Models(cpu, torch.float32)
    text, _ = models.get(model, False)
    image, defaults = models.get(model, True)
    assert image is not text and image.transformer is text.transformer and image.vae is text.vae
    assert type(image) is type(making.Models(cpu, torch.float32).get(model, True)[0])
    assert defaults == making.load(model, True, torch.float32)[1] and models.get(model, False)[0] is text


def test_a_checkpoint_of_text_alone_stays_loaded_when_it_is_asked_for_more(tmp_path):
    small_pipeline(expand_timesteps=False).save_pretrained(tmp_path)
    models = making.Models(torch.device("cpu"), torch.float32)
    text, _ = models.get(str(tmp_path), False)
    with pytest.raises(HeterostepError, match="from text alone: leave the first frame out"):
        models.get(str(tmp_path), True)
    assert models.get(str(tmp_path), False)[0] is text


def test_what_goes_wrong_is_told_and_the_next_one_is_made(maker, monkeypatch):
    outcome = maker.attempt("1", order(width=60))
    assert outcome.made is None and outcome.fault == "width"
    assert outcome.message.startswith("width must be a multiple of 16")
    make = making.make
    faults = [RuntimeError("something\nbroke"), torch.OutOfMemoryError("no")]

    def broken(*arguments):
        raise faults.pop(0)

    monkeypatch.setattr(making, "make", broken)
    assert maker.attempt("2", order()).message == "it failed: something"
    assert maker.attempt("3", order()).message == "out of memory: take a smaller or shorter video"
    monkeypatch.setattr(making, "make", make)
    assert maker.attempt("4", order()).made is not None


def test_a_job_is_cancelled_before_and_while_it_runs(maker):
    maker.cancel("1")
    assert maker.attempt("1", order()).cancelled
    found = []
    thread = threading.Thread(target=lambda: found.append(maker.attempt("2", order(steps=1000))))
    thread.start()
    end = time.monotonic() + 30
    while (at := maker.progress()) is None or not at.done:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert at.job == "2" and at.steps == 1000
    maker.cancel("2")
    thread.join(30)
    assert found[0].cancelled and found[0].made is None
    assert maker.attempt("2", order()).made is not None


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(HeterostepError, match="is not a diffusers folder"):
        Maker(str(tmp_path), "cpu", "auto").start()


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch):
    """Without a network diffusers says that the file does not exist."""

    def load_config(model):
        try:
            raise LocalEntryNotFoundError("no connection, and not in the cache")
        except LocalEntryNotFoundError as error:
            raise OSError(f"{model} does not appear to have a file named model_index.json.") from error

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", load_config)
    with pytest.raises(
        HeterostepError, match=r"^a/b is not a folder here, the hub cannot be reached.* check the network"
    ):
        Maker("a/b", "cpu", "auto").start()


def test_a_model_of_images_alone_starts_as_what_it_is(tmp_path):
    small_pipeline(image_to_video=True).save_pretrained(tmp_path)
    model = str(tmp_path)
    maker = Maker(model, "cpu", "auto")
    assert maker.start().rules.multiple == 16
    text = maker.attempt("1", Order("a cat", model=model, steps=12, height=64, width=64, frames=9))
    assert "makes videos from a first frame: give one" in text.message
