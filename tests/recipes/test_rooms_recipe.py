"""The recipe of the rooms: clips depend on their seed alone, captions say the labels, every stage runs."""

import json
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from heterostep.cli import app

pytest.importorskip("vizdoom", reason="vizdoom is not installed: pip install '.[rooms]'")
pytest.importorskip("skimage", reason="scikit-image is not installed: pip install '.[rooms]'")

RECIPE = Path(__file__).parents[2] / "recipes" / "rooms"


@pytest.fixture(scope="module")
def rooms():
    """The recipe's modules."""
    sys.path.insert(0, str(RECIPE))
    try:
        import captions
        import check
        import text
        import world

        yield {"captions": captions, "check": check, "text": text, "world": world}
    finally:
        sys.path.remove(str(RECIPE))


@pytest.fixture
def stage(rooms, monkeypatch, capsys):
    """Run one stage as `python recipes/rooms ...` does, in this process: starting Python a dozen times takes longer."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["rooms", *map(str, arguments)])
        runpy.run_path(str(RECIPE / "__main__.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_clip_depends_on_its_seed_alone(rooms):
    maker, other = rooms["world"].World(), rooms["world"].World()
    try:
        first = [maker.clip(seed) for seed in (3, 4)]
        # Another game, another order: what was played before leaves no trace.
        again = [other.clip(4), other.clip(3)][::-1]
    finally:
        maker.close()
        other.close()
    for (frames, labels, caption), (frames2, labels2, caption2) in zip(first, again, strict=True):
        assert np.array_equal(frames, frames2)
        assert (labels, caption) == (labels2, caption2)
        assert frames.shape == (33, 256, 256, 3)
        said = rooms["captions"].parse(caption)
        assert said == dict.fromkeys(said, "none") | labels


def test_every_caption_of_the_grammar_is_read_back(rooms):
    captions, rng = rooms["captions"], np.random.default_rng(0)
    known = set(captions.vocabulary())
    for _ in range(300):
        labels = rooms["text"].random_labels(rng)
        text = captions.caption(labels)
        assert captions.parse(text) == dict.fromkeys(captions.LABELS, "none") | labels
        assert set(text.replace(",", " ,").split()) <= known


def test_the_splits_share_no_level(rooms):
    world = rooms["world"]
    splits = [set(world.LEVELS), set(world.TUNING_LEVELS), set(world.HELD_OUT_LEVELS)]
    assert sum(map(len, splits)) == len(set.union(*splits))
    assert world.levels_of(world.HELD_OUT_SEED) == world.HELD_OUT_LEVELS
    clips = json.loads((RECIPE / "manifest.json").read_text())["splits"]["held-out"]["clips"]
    assert len(clips) >= 64
    assert all(rooms["captions"].caption(clip["labels"]) == clip["caption"] for clip in clips)


@pytest.mark.parametrize(
    ("moves", "found"), [((0, 0), "still"), ((3, 0), "left"), ((-3, 0), "right"), ((0, 3), "up"), ((0, -3), "down")]
)
def test_the_check_sees_how_the_image_moves(rooms, moves, found):
    world = np.random.default_rng(1).integers(0, 255, (90, 90)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    frames = [world[40 + t * moves[1] :, 40 + t * moves[0] :][:256, :256] for t in range(9)]
    video = np.stack(frames)[..., None].repeat(3, -1)
    assert rooms["check"].what_it_does(video) == found


# Libraries warn of what is theirs; bf16 is slow on a CPU, and they say so.
@pytest.mark.filterwarnings("ignore")
def test_every_stage_runs(stage, tmp_path):
    out, clips = tmp_path / "run", tmp_path / "clips"
    few = ("--device", "cpu")
    said = stage("data", "--to", clips, "--count", 3, "--workers", 1)
    assert "clips/s" in said
    assert len(json.loads((clips / "clips.json").read_text())) == 3
    stage("text", "--out", out, "--steps", 2, "--batch", 4, *few)
    tiny = RECIPE.parents[1] / "src" / "heterostep" / "tiny" / "weights" / "vae"
    size = ("--batch", 1, "--crop", 32, "--workers", 0, "--measure", 0)
    stage("vae", "--out", out, "--clips", clips, "--init", tiny, "--steps", 1, *size, *few)
    toy = ("--frames", 5, "--crop", 64, "--workers", 0, "--batch", 3)
    stage("encode", "--out", out, "--clips", clips, "--statistics", *toy, *few)
    train = ("train", "--out", out, "--toy", "--phases", "1:0.5:4,2:0.5:2", *few)
    assert "ended at step 2" in stage(*train, "--steps", 2)
    stage("pack", "transformer", "--out", out, "--to", tmp_path / "parts")
    stage("pack", "rest", "--out", out, "--to", tmp_path / "parts")
    stage("unpack", tmp_path / "parts", "--out", tmp_path / "again")
    for path in out.glob("latents-*"):
        path.rename(tmp_path / "again" / path.name)
    train = ("train", "--out", tmp_path / "again", *train[3:])
    assert "resumed at step 2" in stage(*train, "--steps", 3, "--resume")
    stage("assemble", "--out", tmp_path / "again", "--to", tmp_path / "pipeline", "--toy")
    small = ("--pipeline", tmp_path / "pipeline", "--frames", 5, "--size", 64, "--steps", 1, *few)
    stage("sheet", "--to", tmp_path / "sheets", "--count", 2, "--images", 1, *small)
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["image.png", "text.png"]
    result = stage("check", "--count", 1, *small)
    assert "agree" in result
    stage("release", "--pipeline", tmp_path / "pipeline", "--to", tmp_path, "--count", 2, "--frames", 5, "--size", 64)
    with tarfile.open(tmp_path / "rooms.tar") as archive:
        archive.extractall(tmp_path / "elsewhere", filter="data")
    model = str(tmp_path / "elsewhere" / "rooms")
    asked = ["compare", "--model", model, "--image-to-video", "--count", "1", "--steps", "4", "--methods", "heterostep"]
    made = CliRunner().invoke(app, [*asked, "--runtimes", "0.5", "--out", str(tmp_path / "report"), "--device", "cpu"])
    assert made.exit_code == 0, made.output
    settings = json.loads((tmp_path / "report" / "results.json").read_text())["settings"]
    assert (settings["height"], settings["num_frames"], settings["fps"]) == (64, 5, 12)
