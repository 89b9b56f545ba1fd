import dataclasses
import json

import numpy as np
import pytest

from heterostep.errors import HeterostepError
from heterostep.tiny import world
from heterostep.tiny.world.judge import judge, read

FIRST_SEED = 20_000_000
FACTS = ("colour", "direction", "kind", "background_colour", "pattern", "pan")


def sampled(seed):
    rng = np.random.default_rng(seed)
    scene = world.sample_scene(rng)
    return scene, world.caption(scene, rng), rng


def worsened(video, rng):
    """The clip after a Gaussian blur of sigma 2 pixels and noise of sigma 8 grey levels."""
    size = video.shape[1]
    at = np.arange(size)
    blur = np.exp(-((at[:, None] - at[None, :]) ** 2) / 8).astype(np.float32)
    blur /= blur.sum(1, keepdims=True)
    x = video.astype(np.float32)
    for _ in "yx":
        # Square frames: blurred along the rows' axis, then turned, twice.
        x = (blur @ x.reshape(len(x), size, -1)).reshape(x.shape).swapaxes(1, 2)
    x += 8 * rng.standard_normal(x.shape, dtype=np.float32)
    return np.clip(x + 0.5, 0, 255).astype(np.uint8)


def shares(verdicts):
    """The share of facts met over all verdicts, by fact."""
    shapes = [s for v in verdicts for s in v.shapes]
    met = {name: [getattr(s, name) for s in shapes] for name in FACTS[:3]}
    met |= {name: [getattr(v, name) for v in verdicts] for name in FACTS[3:]}
    return {name: np.mean(values) for name, values in met.items()}


@pytest.fixture(scope="module")
def clean():
    """Clips of twenty-four scenes, each with its caption."""
    samples = [sampled(FIRST_SEED + i)[:2] for i in range(24)]
    return [(world.render(scene), text) for scene, text in samples]


def test_clean_clips_meet_their_captions(clean):
    met = shares([judge(video, text) for video, text in clean])
    assert met["colour"] >= 0.99
    assert met["direction"] >= 0.97
    assert met["background_colour"] >= 0.98
    assert min(met["pattern"], met["kind"], met["pan"]) >= 0.9


def test_blurred_and_noisy_clips_meet_their_captions():
    verdicts = []
    for seed in range(FIRST_SEED + 24, FIRST_SEED + 36):
        scene, text, rng = sampled(seed)
        verdicts.append(judge(worsened(world.render(scene), rng), text))
    met = shares(verdicts)
    assert met["colour"] >= 0.95
    assert met["direction"] >= 0.93
    assert met["background_colour"] >= 0.9


def test_other_captions_are_not_met(clean):
    others = [text for _, text in clean[1:]] + [clean[0][1]]
    verdicts = [judge(video, text) for (video, _), text in zip(clean[:8], others)]
    met = shares(verdicts)
    assert met["colour"] < 0.5
    assert met["direction"] < 0.25
    assert met["kind"] < 0.25


@pytest.mark.parametrize("levels", [(0, 256), (96, 160)])
def test_noise_has_no_shapes(levels):
    rng = np.random.default_rng(0)
    assert read(rng.integers(*levels, (9, 192, 192, 3), dtype=np.uint8)).shapes == ()


@pytest.mark.parametrize("pattern", ["stripes", "checks", "dots", "clouds"])
@pytest.mark.parametrize("colour", ["blue", "gray"])
def test_a_background_alone_has_no_shapes(colour, pattern):
    ground = world.Background(colour, pattern, 34.0, 0.0, (3.0, 5.0), "", 11)
    reading = read(world.render(world.Scene(ground, ()), 5))
    assert reading.shapes == ()
    assert (reading.background_colour, reading.pattern, reading.pan) == (colour, pattern, "")
    assert reading.background_flicker == 0


@pytest.mark.parametrize(
    "text",
    [
        "a small blue ring moving left slowly over blue checks",
        "a white triangle moving up over gray clouds",
        "a large green square moving down quickly over green dots",
    ],
)
def test_shapes_over_their_own_hue(text):
    verdict = judge(world.render(world.scene_from_caption(text, 1)), text)
    assert (verdict.colour, verdict.direction, verdict.kind, verdict.background) == (1, 1, 1, 1)


def test_a_reading_measures_the_shape():
    shape = world.Shape("red", "circle", "right", "", "", 22.0, (40.0, 90.0), (2.0, 0.0))
    ground = world.Background("gray", "clouds", 34.0, 0.0, (0.0, 0.0), "", 3)
    reading = read(world.render(world.Scene(ground, (shape,))))
    (seen,) = reading.shapes
    assert (seen.colour, seen.kind, seen.direction) == ("red", "circle", "right")
    assert seen.displacement[0] > 30
    assert abs(seen.displacement[1]) < 1
    assert seen.speed == pytest.approx(2.0, abs=0.1)
    assert seen.area == pytest.approx(np.pi * 22**2, rel=0.1)
    assert seen.track.shape == (world.NUM_FRAMES, 2)
    np.testing.assert_allclose(seen.track, shape.centres(), atol=1)


def test_the_track_is_nan_where_a_shape_is_not_seen():
    shape = world.Shape("red", "circle", "right", "", "", 22.0, (40.0, 90.0), (2.0, 0.0))
    ground = world.Background("gray", "clouds", 34.0, 0.0, (0.0, 0.0), "", 3)
    video = world.render(world.Scene(ground, (shape,)))
    video[20:] = world.render(world.Scene(ground, ()), 1)
    (seen,) = read(video).shapes
    assert np.isnan(seen.track[20:]).all()
    assert not np.isnan(seen.track[:20]).any()


def test_a_shape_that_stands_still_has_no_direction():
    scene = world.scene_from_caption("a red square moving right over brown clouds", 0)
    video = np.repeat(world.render(scene, 1), 9, axis=0)
    verdict = judge(video, "a red square moving right")
    assert read(video).shapes[0].direction == ""
    assert (verdict.colour, verdict.kind, verdict.direction) == (1, 1, 0)
    assert judge(video, "a red square").direction is None


@pytest.mark.parametrize("pan", ["right", "left", "down", "up"])
def test_pans_are_told_apart(pan):
    ground = world.Background("purple", "checks", 30.0, 0.0, (0.0, 0.0), pan, 0)
    reading = read(world.render(world.Scene(ground, ()), 9))
    assert reading.pan == pan
    assert reading.background_flicker > 0


def test_what_stripes_hide_is_not_held_against_a_clip():
    ground = world.Background("green", "stripes", 30.0, 0.0, (0.0, 0.0), "up", 0)
    shape = world.Shape("red", "circle", "right", "", "", 22.0, (40.0, 90.0), (2.0, 0.0))
    video = world.render(world.Scene(ground, (shape,)), 9)
    assert judge(video, "a red circle over green stripes, the camera pans up").pan
    assert judge(video, "a red circle over green stripes").pan
    assert not judge(video, "a red circle over green stripes, the camera pans left").pan


def test_flicker_is_that_of_the_background():
    scene, _, rng = sampled(FIRST_SEED)
    scene = dataclasses.replace(scene, background=dataclasses.replace(scene.background, pan=""))
    video = world.render(scene, 9)
    assert read(video).background_flicker < 0.1
    video[1::2] = np.minimum(video[1::2], 249) + 6
    assert read(video).background_flicker == pytest.approx(6, abs=0.1)


def test_a_verdict_is_json_ready():
    scene, text, _ = sampled(FIRST_SEED)
    verdict = judge(world.render(scene, 9), text)
    told = verdict.to_dict()
    # JSON has lists for tuples.
    assert json.loads(json.dumps(told)) == told | {"shapes": list(told["shapes"])}
    assert verdict.shapes[0].colour is True


def test_errors():
    clip = np.zeros((5, 32, 32, 3), np.uint8)
    assert read(clip).shapes == ()
    for bad in (clip[:4], clip.astype(np.float32), clip[..., :2], clip[0]):
        with pytest.raises(ValueError, match="uint8"):
            read(bad)
    with pytest.raises(HeterostepError, match="names no shape"):
        judge(clip, "a cat")
