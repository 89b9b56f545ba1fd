"""Where the steps went: a map of evaluations per token over the frames of a video.

Shapes: F frames, H height, W width of the video; f, h, w of the token grid.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from heterostep.files import replacing
from heterostep.video import side_by_side, write_video

LEGEND = "evaluations per token"
SUFFIXES = (".png", ".mp4")
_COLOURS = colormaps["inferno"]


def token_frames(num_frames: int, num_token_frames: int) -> np.ndarray:
    """The token frame that each pixel frame belongs to, int [F]: the first stands alone, each other covers (F-1)/(f-1).

    Raises:
        ValueError: the pixel frames cannot be divided so.
    """
    if num_token_frames == 1 and num_frames == 1:
        return np.zeros(1, dtype=int)
    if num_token_frames < 2 or (num_frames - 1) % (num_token_frames - 1):
        raise ValueError(f"{num_frames} frames do not divide over {num_token_frames} token frames")
    stride = (num_frames - 1) // (num_token_frames - 1)
    return (np.arange(num_frames) + stride - 1) // stride


def heat(frames: np.ndarray, steps_map: np.ndarray) -> np.ndarray:
    """The video in grey under its map in colours, dark for few evaluations and light for many.

    Args:
        frames: uint8 [F, H, W, 3].
        steps_map: int [f, h, w], evaluations per token; h divides H, w divides W.

    Returns:
        uint8 [F, H, W, 3].

    Raises:
        ValueError: the map does not fit the frames.
    """
    count, height, width = frames.shape[:3]
    if height % steps_map.shape[1] or width % steps_map.shape[2]:
        raise ValueError(f"a token grid {list(steps_map.shape)} does not fit frames of {height} x {width}")
    colours = _COLOURS(_scale(steps_map)(steps_map))[..., :3]
    colours = colours[token_frames(count, len(steps_map))]
    colours = colours.repeat(height // steps_map.shape[1], axis=1).repeat(width // steps_map.shape[2], axis=2)
    grey = frames.mean(axis=3, keepdims=True) / 255
    return ((0.85 * colours + 0.15 * grey) * 255).round().astype(np.uint8)


def _scale(steps_map: np.ndarray) -> Normalize:
    low, high = int(steps_map.min()), int(steps_map.max())
    return Normalize(low if low < high else 0, high)


def write_heatmap(path: str | os.PathLike, frames: np.ndarray, steps_map: np.ndarray, fps: float) -> None:
    """Write the heat map with its legend: a .png contact sheet, or an .mp4 beside the video.

    Args:
        frames: uint8 [F, H, W, 3].
        steps_map: int [f, h, w], evaluations per token.
        fps: frames per second of the video.

    Raises:
        ValueError: the map does not fit the frames, or the path has another suffix.
        OSError: the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        _write_sheet(path, frames, steps_map, fps)
    elif suffix == ".mp4":
        pair = side_by_side(frames, heat(frames, steps_map), ("video", LEGEND))
        legend = _legend(steps_map, pair.shape[1])
        legends = np.broadcast_to(legend, (len(pair), *legend.shape))
        write_video(path, np.concatenate([pair, legends], axis=2), fps)
    else:
        raise ValueError(f"a heat map is {' or '.join(SUFFIXES)}, not {suffix or 'a file without a suffix'}")


def _write_sheet(path: str | os.PathLike, frames: np.ndarray, steps_map: np.ndarray, fps: float) -> None:
    shown = np.unique(np.linspace(0, len(frames) - 1, 6).round().astype(int))
    heated = heat(frames, steps_map)
    tall = frames.shape[1] / frames.shape[2]
    figure = Figure(figsize=(1.8 * len(shown) + 1.2, 3.6 * tall + 0.6), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, frame in enumerate(shown):
        axes[0, column].imshow(frames[frame])
        axes[1, column].imshow(heated[frame])
        axes[0, column].set_title(f"{frame / fps:.2f} s", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    bar = figure.colorbar(ScalarMappable(_scale(steps_map), _COLOURS), ax=axes, label=LEGEND, shrink=0.9, aspect=25)
    bar.locator = MaxNLocator(integer=True)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120, metadata={"Software": None})


def _legend(steps_map: np.ndarray, height: int) -> np.ndarray:
    """A colour bar as a picture, uint8 [height, W, 3]."""
    width, dpi = 64, 80
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    bar = figure.colorbar(ScalarMappable(_scale(steps_map), _COLOURS), cax=figure.add_axes((0.15, 0.08, 0.25, 0.84)))
    bar.locator = MaxNLocator(integer=True, nbins=6)
    bar.ax.tick_params(labelsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
