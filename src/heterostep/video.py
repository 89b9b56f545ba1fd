"""Videos as arrays of 8-bit frames, to files and from files.

Shapes: F frames, H height, W width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.codec.context import Flags
from PIL import Image, ImageDraw, ImageFont

from heterostep.errors import HeterostepError
from heterostep.files import replacing


@dataclass(frozen=True)
class Audio:
    """A clip's sound: samples, float [channels, samples] in -1..1, one or two channels; samples per second."""

    samples: np.ndarray
    rate: int


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float, audio: Audio | None = None) -> None:
    """Write an MP4 (H.264, yuv420p, AAC). The same frames give the same bytes; the file appears when it is complete.

    Args:
        frames: uint8 [F, H, W, 3]; H and W even.
        fps: frames per second.
        audio: its sound, from the first frame on.

    Raises:
        HeterostepError: the frames have another type or shape, an odd size, or there are none; or fps is not above 0.
        OSError: the file cannot be written.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise HeterostepError(
            f"frames must be uint8 [F, H, W, 3], F at least 1, not {frames.dtype} {list(frames.shape)}"
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise HeterostepError(f"height and width must be even for yuv420p, not {height} and {width}")
    if not 0 < fps < float("inf"):
        raise HeterostepError(f"fps must be above 0, not {fps}")
    options = {"movflags": "faststart", "fflags": "+bitexact"}
    with replacing(path) as part, av.open(os.fspath(part), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # x264's macroblock tree reads memory that was never written, so that its choices vary from run to run; and its
        # output depends on its number of threads.
        stream.options = {"crf": "16", "mbtree": "0"}
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= Flags.bitexact
        sound = None
        if audio is not None:
            layout = "mono" if len(audio.samples) == 1 else "stereo"
            sound = container.add_stream("aac", rate=audio.rate, layout=layout)
            sound.codec_context.flags |= Flags.bitexact
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
        if audio is not None and sound is not None:
            samples = np.ascontiguousarray(audio.samples.clip(-1, 1), np.float32)
            block = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            block.sample_rate = audio.rate
            container.mux(sound.encode(block))
            container.mux(sound.encode())


def read_video(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """A video file's frames, uint8 [F, H, W, 3], and its frames per second.

    Raises:
        OSError: the file is missing or is no video.
    """
    with av.open(os.fspath(path)) as container:
        rate = container.streams.video[0].average_rate
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames), float(rate or 0)


def _label(text: str, width: int, height: int) -> np.ndarray:
    """Centred white text on black, uint8 [height, width, 3], as large as it fits."""
    strip = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(strip)
    size = height * 0.6
    font = ImageFont.load_default(size)
    if draw.textlength(text, font) > width * 0.95:
        font = ImageFont.load_default(size * width * 0.95 / draw.textlength(text, font))
    draw.text((width / 2, height / 2), text, fill="white", font=font, anchor="mm")
    return np.asarray(strip)


def side_by_side(left: np.ndarray, right: np.ndarray, labels: tuple[str, str]) -> np.ndarray:
    """Two clips in one picture with a labelled strip above each.

    Args:
        left, right: uint8 [F, H, W, 3], of one shape; H and W even.

    Returns:
        uint8 [F, H + strip, 2 W, 3]; the strip's height is even.

    Raises:
        HeterostepError: the shapes differ.
    """
    if left.shape != right.shape:
        raise HeterostepError(f"the clips' shapes differ: {left.shape} and {right.shape}")
    count, height, width = left.shape[:3]
    strip_height = max(20, 2 * (height // 20))
    strip = np.concatenate([_label(text, width, strip_height) for text in labels], axis=1)
    strips = np.broadcast_to(strip, (count, *strip.shape))
    return np.concatenate([strips, np.concatenate([left, right], axis=2)], axis=1)
