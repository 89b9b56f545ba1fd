import dataclasses

import numpy as np
import pytest

from heterostep.errors import HeterostepError
from heterostep.tiny import world
from heterostep.tiny.world.scene import BACKGROUND_COLOURS, DIRECTIONS, KINDS, PATTERNS, SHAPE_COLOURS, make_shape

FIRST_SEED = 20_000_000


def scenes(count):
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        rng = np.random.default_rng(seed)
        yield world.sample_scene(rng), rng


def plain(*shapes):
    return world.Scene(world.Background("gray", "stripes", 30.0, 0.0, (0.0, 0.0), "", 0), shapes)


def still(colour, kind, centre, radius=20.0, velocity=(0.0, 0.0)):
    return world.Shape(colour, kind, "right", "", "", radius, centre, velocity)


def painted(video, colour):
    """Pixels of exactly that shape colour, bool like the clip without its last axis."""
    return (video == np.array(SHAPE_COLOURS[colour])).all(-1)


def test_centres_stay_a_radius_inside_the_frame():
    for scene, _ in scenes(200):
        for shape in scene.shapes:
            track = shape.centres()
            assert track.shape == (world.NUM_FRAMES, 2)
            assert track.min() >= shape.radius - 1e-9
            assert track.max() <= world.SIZE - shape.radius + 1e-9


def test_a_shape_leaves_as_it_is_told_to():
    for scene, _ in scenes(200):
        for shape in scene.shapes:
            step = np.diff(shape.centres()[:2], axis=0)[0]
            dx, dy = DIRECTIONS[shape.direction]
            assert step @ (dx, dy) > 0.98 * np.hypot(*shape.velocity)


def test_a_shape_bounces_off_the_wall():
    track = still("red", "circle", (150.0, 90.0), 20.0, (4.0, 0.0)).centres(20)
    assert np.argmax(track[:, 0]) in (5, 6)
    assert track[5:7, 0] == pytest.approx([170.0, 170.0 - 2.0], abs=2.1)
    np.testing.assert_allclose(np.diff(track[:5, 0]), 4.0)
    np.testing.assert_allclose(np.diff(track[7:, 0]), -4.0)
    np.testing.assert_allclose(track[:, 1], 90.0)


def test_most_of_a_clip_passes_before_the_bounce():
    early = 0
    total = 0
    for scene, _ in scenes(200):
        for shape in scene.shapes:
            along = shape.centres() @ np.array(DIRECTIONS[shape.direction])
            early += np.argmax(along) < 0.6 * world.NUM_FRAMES
            total += 1
    assert early / total < 0.1


def test_the_last_shape_is_in_front():
    below, above = still("red", "square", (90.0, 90.0)), still("cyan", "square", (90.0, 90.0), 12.0)
    picture = world.render(plain(below, above), 1)[0]
    assert painted(picture, "cyan")[90, 90]
    assert painted(picture, "red")[90, 90 + 14]
    assert not painted(world.render(plain(above, below), 1), "cyan").any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_covers_its_area_about_its_centre(kind):
    radius = 24.0
    mask = painted(world.render(plain(still("pink", kind, (100.0, 80.0), radius)), 1)[0], "pink")
    y, x = np.nonzero(mask)
    assert np.hypot(x.mean() + 0.5 - 100, y.mean() + 0.5 - 80) < 1
    share = {"circle": np.pi, "square": 2.96, "diamond": 2.65, "triangle": 1.3, "ring": 2.29}[kind]
    # A pixel-wide rim is mixed with the background.
    assert 0.75 * share * radius**2 < mask.sum() < share * radius**2
    assert mask[80, 100] == (kind != "ring")


def test_clips_are_uint8_and_repeatable():
    for scene, _ in scenes(4):
        video = world.render(scene, 5)
        assert video.dtype == np.uint8
        assert video.shape == (5, world.SIZE, world.SIZE, 3)
        np.testing.assert_array_equal(video, world.render(scene, 5))


def test_a_frame_does_not_depend_on_the_length_of_its_clip():
    scene, _ = next(scenes(1))
    np.testing.assert_array_equal(world.render(scene, 6)[:3], world.render(scene, 3))


def test_scenes_and_captions_follow_from_their_seed():
    for seed in range(FIRST_SEED, FIRST_SEED + 20):
        first, second = np.random.default_rng(seed), np.random.default_rng(seed)
        a, b = world.sample_scene(first), world.sample_scene(second)
        assert a == b
        assert world.caption(a, first) == world.caption(b, second)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pan", ["", *DIRECTIONS])
def test_a_background_pans_against_the_camera(pattern, pan):
    ground = world.Background("blue", pattern, 32.0, np.pi / 4, (0.0, 0.0), pan, 7)
    video = world.render(world.Scene(ground, ()), 5)
    # Four frames at 0.75 pixels move the picture by three.
    dx, dy = (-3 * v for v in DIRECTIONS.get(pan, (0, 0)))
    moved = np.roll(video[0].astype(int), (dy, dx), (0, 1))
    assert np.abs(video[4] - moved)[4:-4, 4:-4].max() <= 1


def test_scenes_are_varied():
    drawn = [scene for scene, _ in scenes(200)]
    assert {s.background.colour for s in drawn} == set(BACKGROUND_COLOURS)
    assert {s.background.pattern for s in drawn} == set(PATTERNS)
    assert {s.background.pan for s in drawn} == {"", *DIRECTIONS}
    assert {len(s.shapes) for s in drawn} == {1, 2, 3}
    assert {shape.kind for s in drawn for shape in s.shapes} == set(KINDS)
    assert {shape.colour for s in drawn for shape in s.shapes} == set(SHAPE_COLOURS)
    for scene in drawn:
        assert len({shape.colour for shape in scene.shapes}) == len(scene.shapes)


def said(shape):
    return (shape.colour, shape.kind, shape.direction, shape.size, shape.speed)


def test_captions_parse_back_to_their_scene():
    for scene, rng in scenes(200):
        words = world.parse(world.caption(scene, rng))
        assert sorted(map(said, words.shapes)) == sorted(map(said, scene.shapes))
        ground = scene.background
        assert (words.background_colour, words.pattern, words.pan) == (ground.colour, ground.pattern, ground.pan)


def test_a_scene_from_a_caption_keeps_what_is_said():
    for i, (scene, rng) in enumerate(scenes(200)):
        text = world.caption(scene, rng)
        again = world.scene_from_caption(text, seed=i)
        assert sorted(map(said, again.shapes)) == sorted(map(said, scene.shapes))
        assert world.parse(world.caption(again, rng)).background_colour == scene.background.colour
        assert (again.background.pattern, again.background.pan) == (scene.background.pattern, scene.background.pan)


def test_what_a_caption_leaves_open_follows_from_the_seed():
    made = [world.scene_from_caption("a red circle", seed) for seed in range(30)]
    assert made[3] == world.scene_from_caption("a red circle", 3)
    assert len({s.background.colour for s in made}) > 2
    assert len({s.shapes[0].direction for s in made}) > 2
    assert {(s.shapes[0].colour, s.shapes[0].kind, s.background.pan) for s in made} == {("red", "circle", "")}


@pytest.mark.parametrize(
    ("text", "shapes", "pan"),
    [
        ("A  Little BLUE Ring\nmoves up fast over blue checks", [("blue", "ring", "up", "small", "quickly")], ""),
        ("a white square on gray dots", [("white", "square", "", "", "")], ""),
        (
            "the camera pans left over green clouds, a big red circle moving right",
            [("red", "circle", "right", "large", "")],
            "left",
        ),
        ("a pink ring, the camera is slowly panning to the right", [("pink", "ring", "", "", "")], "right"),
        ("the camera does not pan, a red circle moves right", [("red", "circle", "right", "", "")], ""),
        ("a colored circle and a green diamond", [("green", "diamond", "", "", "")], ""),
    ],
)
def test_free_wording(text, shapes, pan):
    words = world.parse(text)
    assert [said(s) for s in words.shapes] == shapes
    assert words.pan == pan


@pytest.mark.parametrize("text", ["", "a cat on a sofa", "blue stripes", "a purple circle", "a colored circle"])
def test_a_caption_without_a_shape_is_refused(text):
    for reader in (world.parse, world.scene_from_caption, world.first_frame):
        with pytest.raises(HeterostepError, match="names no shape"):
            reader(text)


def test_moved_keeps_the_words():
    for scene, _ in scenes(20):
        other = world.moved(scene, 5)
        assert other != scene
        assert other == world.moved(scene, 5)
        assert list(map(said, other.shapes)) == list(map(said, scene.shapes))
        ground, old = other.background, scene.background
        assert (ground.colour, ground.pattern, ground.pan) == (old.colour, old.pattern, old.pan)


def test_first_frame_is_that_of_the_scene():
    text = "a large yellow diamond moving up over purple dots"
    frame = world.first_frame(text, seed=4)
    assert frame.shape == (world.SIZE, world.SIZE, 3)
    np.testing.assert_array_equal(frame, world.render(world.scene_from_caption(text, 4), 3)[0])
    assert painted(frame, "yellow").sum() > 1000
    assert (frame != world.first_frame(text, seed=5)).any()


def test_unknown_names_are_refused():
    rng = np.random.default_rng(0)
    shape = make_shape(rng, "red", "circle", "up", "", "")
    with pytest.raises(ValueError, match="no such kind"):
        world.render(plain(dataclasses.replace(shape, kind="star")), 1)
    scene = plain(shape)
    with pytest.raises(ValueError, match="no such pattern"):
        world.render(dataclasses.replace(scene, background=dataclasses.replace(scene.background, pattern="waves")), 1)
