"""One generation, measured: its seconds, its token evaluations, its peak memory, and how its video differs.

Shapes: B videos of a batch, F frames, H height, W width; f, h, w those of the token grid.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

import heterostep
from heterostep.compare.methods.method import Method
from heterostep.errors import HeterostepError, first_line
from heterostep.pipeline import transformers


@dataclass(frozen=True)
class Prompt:
    """What is to be generated: text, the noise's seed, and a first frame, uint8 [H, W, 3], where one is given."""

    text: str
    seed: int
    image: np.ndarray | None = field(default=None, compare=False)


@dataclass
class Generated:
    """One call of the pipeline: one generation, or a batch of them.

    Attributes:
        clips: frames uint8 [B, F, H, W, 3].
        seconds: of the denoising loop.
        rows: that went through the blocks.
        peak_bytes: of the GPU's memory; None on the CPU.
        steps_maps: evaluations per token [B, f, h, w], where the method has such a map.
    """

    clips: np.ndarray
    seconds: float
    rows: int
    peak_bytes: int | None
    steps_maps: np.ndarray | None = None


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


def refuses_batch(pipe: Any, with_images: bool) -> str | None:
    """Why a pipeline cannot make several videos in one call, in one line; None where it can."""
    if not with_images:
        return None
    name = type(pipe).__name__
    if name != "WanImageToVideoPipeline":
        return f"{name} is not known to take several first frames in one call: take a batch of 1"
    if any(model.config.image_dim is not None for model in transformers(pipe)):
        return f"{name} repeats the image encoder's states over a batch of different first frames: take a batch of 1"
    return None


@contextlib.contextmanager
def _first_frames_apart(pipe: Any) -> Iterator[None]:
    """Let WanImageToVideoPipeline prepare a batch sample by sample.

    With a list of generators diffusers (0.42.1) encodes all first frames once for each of them: B * B conditions.
    """
    prepare = pipe.prepare_latents

    def one_by_one(image: torch.Tensor, batch_size: int, *args: Any) -> tuple[torch.Tensor, ...]:
        # channels, height, width, frames, dtype, device; then what belongs to the samples.
        *common, generators, latents, last_image = args
        made = []
        for i in range(batch_size):
            given = None if latents is None else latents[i : i + 1]
            last = None if last_image is None else last_image[i : i + 1]
            made.append(prepare(image[i : i + 1], 1, *common, generators[i], given, last))
        noise, conditions, *masks = zip(*made)
        # The mask of a pipeline that expands timesteps, [1, 1, f, h, w], is the same for all.
        return torch.cat(noise), torch.cat(conditions), *(mask[0] for mask in masks)

    pipe.prepare_latents = one_by_one
    try:
        yield
    finally:
        del pipe.prepare_latents


def generate(
    pipe: Any, prompts: Sequence[Prompt], method: Method | None, value: float, options: dict[str, Any]
) -> Generated:
    """Run the pipeline once, plainly where `method` is None; each prompt from the noise that it has alone.

    Args:
        prompts: one, or several that are made in one call, all with a first frame or all without.
        options: the dense call's, with `num_inference_steps`.

    Raises:
        HeterostepError: the pipeline cannot make several such videos in one call.
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
    texts: Any = [prompt.text for prompt in prompts]
    noise: Any = [torch.Generator("cpu").manual_seed(prompt.seed) for prompt in prompts]
    pictures = [_picture(prompt.image) for prompt in prompts if prompt.image is not None]
    apart: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if len(prompts) == 1:
        (texts,), (noise,) = texts, noise
        if pictures:
            options = {**options, "image": pictures[0]}
    elif reason := refuses_batch(pipe, bool(pictures)):
        raise HeterostepError(reason)
    elif pictures:
        # It takes one picture, or a tensor [B, 3, H, W] in 0..1, which it would not scale as it does pictures.
        sized = [pipe.video_processor.resize(each, options["height"], options["width"]) for each in pictures]
        frames = pipe.video_processor.numpy_to_pt(pipe.video_processor.pil_to_numpy(sized))
        options, apart = {**options, "image": frames}, _first_frames_apart(pipe)
    plain: contextlib.AbstractContextManager[dict[str, Any]] = contextlib.nullcontext({})
    how = plain if method is None else method.apply(pipe, value, options["num_inference_steps"])
    hooks = [model.register_forward_pre_hook(first) for model in transformers(pipe)]
    try:
        with how as changed, counted(pipe) as rows, apart:
            output = pipe(
                prompt=texts,
                generator=noise,
                callback_on_step_end=mark,
                output_type="pt",
                **{**options, **changed},
            )
            steps_maps = heterostep.report(pipe).steps_maps if method is not None and method.maps else None
    finally:
        for hook in hooks:
            hook.remove()
    # [B, F, 3, H, W] in 0..1; made small before it leaves the GPU.
    clips = (output.frames * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous().cpu().numpy()
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return Generated(clips, marks[-1] - marks[0], sum(rows), peak, steps_maps)


def _picture(image: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(image)


# VMAF halves a frame four times, and mirrors its edges.
LEAST_PIXELS_OF_VMAF = 32


def likeness(clip: np.ndarray, dense: np.ndarray, device: Any = "cpu") -> dict[str, Any]:
    """`ssim`, `lpips` and `vmaf` of two clips uint8 [F, H, W, 3], on a device.

    LPIPS needs the `lpips` package and its weights, VMAF `vmaf-torch`: of what cannot be had the value is None, and
    `lpips_missing` or `vmaf_missing` says why.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    # [F, 3, H, W]; frame by frame, as everybody else does.
    a, b = (torch.from_numpy(x).to(device).permute(0, 3, 1, 2).float() for x in (clip, dense))
    ssim = structural_similarity_index_measure(a, b, data_range=255.0)
    assert isinstance(ssim, torch.Tensor)
    found: dict[str, Any] = {"ssim": float(ssim)}
    for name, learned in (("lpips", _lpips), ("vmaf", _vmaf)):
        value = learned(a, b)
        found |= {name: None, f"{name}_missing": value} if isinstance(value, str) else {name: value}
    return found


def _lpips(clip: torch.Tensor, dense: torch.Tensor) -> float | str:
    """LPIPS of two clips in 0..255, [F, 3, H, W], or why there is none."""
    network = _perceptual()
    if isinstance(network, str):
        return network
    with torch.no_grad():
        return float(network.to(clip.device)(clip / 127.5 - 1, dense / 127.5 - 1).mean())


@functools.cache
def _perceptual() -> Any:
    """The network of LPIPS, or why there is none."""
    try:
        import lpips

        return lpips.LPIPS(net="alex", verbose=False)
    except Exception as error:
        # The package is optional, and it downloads its weights.
        return f"{type(error).__name__}: {first_line(error)}"


def _vmaf(clip: torch.Tensor, dense: torch.Tensor) -> float | str:
    """VMAF of a clip, 0 to 100, beside its reference, both in 0..255, [F, 3, H, W]; or why there is none."""
    if min(clip.shape[-2:]) < LEAST_PIXELS_OF_VMAF:
        return f"its frames want {LEAST_PIXELS_OF_VMAF} x {LEAST_PIXELS_OF_VMAF} pixels"
    if absent := [name for name in ("vmaf_torch", "einops") if importlib.util.find_spec(name) is None]:
        return f"not installed: {', '.join(absent)} (pip install '.[vmaf]' in heterostep's checkout)"
    # [1, 3, F, H, W] in 0..1.
    a, b = (each.transpose(0, 1)[None] / 255 for each in (clip, dense))
    try:
        from torchmetrics.functional.video import video_multi_method_assessment_fusion

        # Its variances are differences of squares, for which TF32 has too few bits.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            scores = video_multi_method_assessment_fusion(a, b)
        assert isinstance(scores, torch.Tensor)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    # As Netflix's own program has them.
    return float(scores.clamp(0, 100).mean())


@dataclass
class Record:
    """One generation's line of `results.json`; see docs/reference/results.md.

    A batch's seconds and memory are not a video's.
    """

    method: str
    value: float
    prompt: int
    seconds: list[float] | None
    runtime: float | None
    evaluations: float
    peak_bytes: int | None
    psnr: float | None
    ssim: float
    lpips: float | None
    vmaf: float | None = None
    caption: dict[str, float | None] | None = None
    displacement: float | None = None
    flicker: float | None = None
    activity: float | None = None
    video: str | None = None
    heatmap: str | None = None
    vbench: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
