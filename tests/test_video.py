import av
import numpy as np
import pytest

from heterostep.errors import HeterostepError
from heterostep.metrics import psnr
from heterostep.video import Audio, read_video, side_by_side, write_video


@pytest.fixture
def clip():
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    frames = [np.stack([np.roll(ramp, shift)[None].repeat(48, 0)] * 3, axis=-1) for shift in range(0, 20, 4)]
    return np.stack(frames)


def test_a_video_comes_back(clip, tmp_path):
    write_video(tmp_path / "clip.mp4", clip, fps=16)
    frames, fps = read_video(tmp_path / "clip.mp4")
    assert frames.shape == clip.shape and fps == 16
    assert psnr(frames, clip) > 35


@pytest.mark.parametrize("channels", [1, 2])
def test_sound_comes_back(clip, tmp_path, channels):
    time = np.arange(16_000) / 16_000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    audio = Audio(np.stack([tone] * channels).astype(np.float32), 16_000)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, clip, 5, audio)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        heard = np.concatenate([block.to_ndarray() for block in container.decode(audio=0)], axis=1)
    assert len(heard) == channels and abs(heard.shape[1] - 16_000) < 2100
    middle = heard[0, 4000:12_000]
    assert abs(np.fft.rfft(middle)).argmax() == 440 // 2 and 0.4 < abs(middle).max() < 0.6


def test_fractional_rates_are_kept(clip, tmp_path):
    write_video(tmp_path / "clip.mp4", clip, fps=23.976)
    assert read_video(tmp_path / "clip.mp4")[1] == pytest.approx(23.976, abs=1e-3)


def test_the_same_frames_give_the_same_bytes(tmp_path):
    # Smooth blobs in motion, written between allocations of varied size: an encoder that reads stale memory shows.
    rng = np.random.default_rng(0)
    blobs = rng.integers(0, 256, (16, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    clip = np.stack([np.roll(blobs, (shift, 2 * shift), (0, 1))[:64, :64] for shift in range(9)])
    written = set()
    for _ in range(8):
        garbage = rng.integers(0, 256, rng.integers(1000, 5_000_000), np.uint8)
        write_video(tmp_path / "clip.mp4", clip.copy(), fps=16)
        written.add((tmp_path / "clip.mp4").read_bytes())
        del garbage
    assert len(written) == 1


@pytest.mark.parametrize(
    ("shape", "fps"),
    [((2, 15, 16, 3), 16), ((2, 16, 15, 3), 16), ((0, 16, 16, 3), 16), ((2, 16, 16), 16), ((2, 16, 16, 3), 0)],
)
def test_frames_that_cannot_be_encoded_leave_no_file(shape, fps, tmp_path):
    with pytest.raises(HeterostepError, match="must be"):
        write_video(tmp_path / "clip.mp4", np.zeros(shape, np.uint8), fps)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(clip, tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("heterostep.video.av.VideoFrame.from_ndarray", fail)
    with pytest.raises(OSError, match="disk full"):
        write_video(path, clip, fps=16)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"] and path.read_bytes() == b"old"


def test_a_missing_or_broken_video_is_an_os_error(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for name in ("broken.mp4", "missing.mp4"):
        with pytest.raises((OSError, ValueError)):
            read_video(tmp_path / name)


def test_side_by_side_keeps_both_clips_below_their_labels(clip):
    right = 255 - clip
    pair = side_by_side(clip, right, ("dense 12.3 s", "heterostep 6.1 s"))
    strip = pair.shape[1] - clip.shape[1]
    assert strip > 0 and strip % 2 == 0
    assert (pair[:, strip:, :64] == clip).all() and (pair[:, strip:, 64:] == right).all()
    assert pair[:, :strip, :64].max() > 128 and pair[:, :strip, 64:].max() > 128
    assert not pair[:, :strip, 0].any(), "the label is cut off"


def test_side_by_side_wants_one_shape(clip):
    with pytest.raises(ValueError, match="differ"):
        side_by_side(clip, clip[:2], ("a", "b"))
