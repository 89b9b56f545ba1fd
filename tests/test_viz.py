import numpy as np
import pytest
from PIL import Image

from heterostep.video import read_video
from heterostep.viz import heat, token_frames, write_heatmap


@pytest.fixture
def frames():
    return np.full((9, 64, 96, 3), 100, np.uint8)


@pytest.fixture
def steps_map():
    steps = np.full((3, 4, 6), 5)
    steps[0] = 20
    steps[2, 1, 3] = 40
    return steps


def test_the_first_token_frame_is_one_pixel_frame_and_each_other_four():
    assert token_frames(9, 3).tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert token_frames(1, 1).tolist() == [0]


@pytest.mark.parametrize("counts", [(9, 1), (8, 3)])
def test_frames_that_do_not_divide_are_refused(counts):
    with pytest.raises(ValueError, match="do not divide"):
        token_frames(*counts)


def test_heat_is_bright_where_and_when_evaluations_were_spent(frames, steps_map):
    brightness = heat(frames, steps_map).astype(int).sum(axis=3)
    assert brightness.shape == frames.shape[:3]
    assert brightness[0].min() > brightness[1].max(), "frame 0 had 20 evaluations, frame 1 had 5"
    hot = np.argwhere(brightness == brightness.max())
    assert hot.min(0).tolist() == [5, 16, 48] and hot.max(0).tolist() == [8, 31, 63]


def test_heat_shows_the_video_through(frames, steps_map):
    frames[4, :, :48] = 250
    heated = heat(frames, steps_map).astype(int)
    assert (heated[4, 0, 0] > heated[4, 0, 95]).all()


def test_a_map_that_does_not_fit_is_refused(frames):
    with pytest.raises(ValueError, match="does not fit"):
        heat(frames, np.ones((3, 5, 6), int))


@pytest.mark.parametrize("steps", [None, np.full((3, 4, 6), 40)], ids=["varied", "uniform"])
def test_the_sheet_is_a_picture_and_reproducible(frames, steps_map, steps, tmp_path):
    for name in ("a.png", "b.png"):
        write_heatmap(tmp_path / name, frames, steps_map if steps is None else steps, fps=16)
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert picture.shape[1] > 600 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_video_stands_beside_its_map_and_the_legend(frames, steps_map, tmp_path):
    write_heatmap(tmp_path / "heat.mp4", frames, steps_map, fps=16)
    shown, fps = read_video(tmp_path / "heat.mp4")
    assert len(shown) == 9 and fps == 16
    assert shown.shape[2] > 2 * 96
    assert shown[:, -32:, 2 * 96 :].std() > 10, "the legend is empty"


def test_one_frame_has_a_sheet_too(tmp_path):
    write_heatmap(tmp_path / "heat.png", np.zeros((1, 32, 32, 3), np.uint8), np.ones((1, 2, 2), int), fps=16)
    assert (tmp_path / "heat.png").stat().st_size > 0


def test_another_suffix_is_refused(frames, steps_map, tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.mp4"):
        write_heatmap(tmp_path / "heat.gif", frames, steps_map, fps=16)
    assert not list(tmp_path.iterdir())
