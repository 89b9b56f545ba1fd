"""One generation, measured: its seconds, its token evaluations, its peak memory, and how its video differs.

Shapes: F frames, H height, W width.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

import heterostep
from heterostep.compare.method import Method
from heterostep.metrics import psnr
from heterostep.pipeline import transformers


@dataclass(frozen=True)
class Prompt:
    """What is to be generated: text, the noise's seed, and a first frame, uint8 [H, W, 3], where one is given."""

    text: str
    seed: int
    image: np.ndarray | None = field(default=None, compare=False)


@dataclass
class Run:
    """One generation.

    Attributes:
        clip: frames uint8 [F, H, W, 3].
        seconds: of the denoising loop.
        rows: that went through the blocks.
        peak_bytes: of the GPU's memory; None on the CPU.
        steps_map: evaluations per token, where the method has such a map.
    """

    clip: np.ndarray
    seconds: float
    rows: int
    peak_bytes: int | None
    steps_map: np.ndarray | None = None


@contextlib.contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """Rows that go through the feed-forward networks and the queries of the blocks, added up while inside.

    Skipped blocks, skipped attentions and skipped tokens all show, whoever skips them.
    """
    rows: list[int] = []
    hooks = []

    def count(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else next(iter(kwargs.values()))
        rows.append(states.shape[0] * states.shape[1])

    for model in transformers(pipe):
        for name, module in model.named_modules():
            if name.split(".")[-1] in ("ffn", "ff") or name.endswith(("attn1.to_q", "attn.to_q")):
                hooks.append(module.register_forward_pre_hook(count, with_kwargs=True))
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def generate(pipe: Any, prompt: Prompt, method: Method | None, value: float, options: dict[str, Any]) -> Run:
    """Run the pipeline once, plainly where `method` is None.

    Args:
        options: the dense call's, with `num_inference_steps`.
    """
    marks: list[float] = []
    cuda = pipe.device.type == "cuda"

    def mark(*_: Any) -> dict[str, Any]:
        if cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return {}

    def first(*_: Any) -> None:
        if not marks:
            mark()

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if prompt.image is not None:
        from PIL import Image

        options = {**options, "image": Image.fromarray(prompt.image)}
    plain: contextlib.AbstractContextManager[dict[str, Any]] = contextlib.nullcontext({})
    how = plain if method is None else method.apply(pipe, value, options["num_inference_steps"])
    hooks = [model.register_forward_pre_hook(first) for model in transformers(pipe)]
    try:
        with how as changed, counted(pipe) as rows:
            output = pipe(
                prompt=prompt.text,
                generator=torch.Generator("cpu").manual_seed(prompt.seed),
                callback_on_step_end=mark,
                output_type="np",
                **{**options, **changed},
            )
            steps_map = heterostep.report(pipe).steps_map if method is not None and method.maps else None
    finally:
        for hook in hooks:
            hook.remove()
    clip = (output.frames[0] * 255).round().astype(np.uint8)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return Run(clip, marks[-1] - marks[0], sum(rows), peak, steps_map)


def likeness(clip: np.ndarray, dense: np.ndarray, device: Any = "cpu") -> dict[str, float | None]:
    """PSNR (dB, None where equal), SSIM and, where the `lpips` package is at hand, LPIPS, of two clips."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = psnr(clip, dense)
    # [F, 3, H, W]; frame by frame, as everybody else does.
    a, b = (torch.from_numpy(x).to(device).permute(0, 3, 1, 2).float() for x in (clip, dense))
    ssim = structural_similarity_index_measure(a, b, data_range=255.0)
    assert isinstance(ssim, torch.Tensor)
    return {"psnr": value if math.isfinite(value) else None, "ssim": float(ssim), "lpips": _lpips(clip, dense)}


_perceptual: list[Any] = []


def _lpips(clip: np.ndarray, dense: np.ndarray) -> float | None:
    if not _perceptual:
        try:
            import lpips

            _perceptual.append(lpips.LPIPS(net="alex", verbose=False))
        except Exception:
            # The package is optional, and it downloads its weights.
            _perceptual.append(None)
    (network,) = _perceptual
    if network is None:
        return None
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (clip, dense))
    with torch.no_grad():
        return float(network(a, b).mean())


def world_scores(clip: np.ndarray, text: str) -> dict[str, Any]:
    """What the bundled model's world says of a clip by itself: the caption's parts met (0..1), motion, flicker."""
    from heterostep.tiny import world

    verdict, reading = world.judge(clip, text), world.read(clip)
    moves = [math.hypot(*shape.displacement) for shape in reading.shapes]
    return {
        "caption": {name: getattr(verdict, name) for name in ("colour", "direction", "kind", "background")},
        "displacement": statistics.mean(moves) if moves else None,
        "flicker": reading.background_flicker,
    }


@dataclass
class Record:
    """One generation's line of `results.json`; see docs/compare.md."""

    method: str
    value: float
    prompt: int
    seconds: list[float]
    runtime: float
    evaluations: float
    peak_bytes: int | None
    psnr: float | None
    ssim: float
    lpips: float | None
    caption: dict[str, float | None] | None = None
    displacement: float | None = None
    flicker: float | None = None
    video: str | None = None
    heatmap: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
