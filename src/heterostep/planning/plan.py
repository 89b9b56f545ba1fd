"""What a run will need and take, before anything is loaded: tokens, memory by store, evaluations, seconds.

Architectures come from configurations alone (`heterostep.configs`); memory from the calls of a dry run on the meta
device (`dry_run`, `heterostep.engine.forecast`); seconds from what `heterostep bench` has timed on the device.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from heterostep import configs, parallel
from heterostep.checkpoints import size_rules
from heterostep.compat import use_backend
from heterostep.config import HSAConfig, number, whole
from heterostep.engine import forecast
from heterostep.engine.schedule import Schedule
from heterostep.errors import HeterostepError
from heterostep.kv.cache import STORES
from heterostep.models import FAMILIES, cp_plan
from heterostep.planning import timings
from heterostep.planning.dry_run import DryRun, dry_run, dry_run_pipeline
from heterostep.policy import Run, Tokens
from heterostep.precision import name_of
from heterostep.sigmas import nominal_sigmas

OFFLOADS = ("none", "model")
UNLIMITED = sys.maxsize
# Pixels of all frames together that a dry run is made of: Wan's rotary tables of so many take a gigabyte. 121 frames of
# 3840 x 2160 have fewer.
MOST_PIXELS = 2**30


@dataclass(frozen=True)
class StorePlan:
    """K and V of all layers and guidance branches in one store; bytes.

    Attributes:
        store: its name, or how many layers have which.
        device_bytes: on the device, with what decoding and transfers use.
        host_bytes: in host memory.
        peak_bytes: the run's peak on the device with it.
        fits: whether that fits into the memory asked for or present; None where neither is known.
    """

    store: str
    device_bytes: int
    host_bytes: int
    peak_bytes: int
    fits: bool | None


@dataclass(frozen=True)
class Plan:
    """What a run will need. Bytes are of the denoising loop; decoding comes after K and V have been given back.

    Attributes:
        model, pipeline: as asked, and the pipeline's class.
        height, width: pixels.
        tokens: N.
        grid: of the tokens: frames, height, width.
        calls: of the transformer in each step (guidance branches).
        from_frames: whether the video continues given frames (image-to-video).
        share: token evaluations over dense, as planned (a runtime may spend a little less).
        active_share: tokens evaluated over all tokens, one per step, as the run begins; most runs plan the steps ahead
            anew as they go.
        advice: what would probably serve better than these settings, one sentence; None where nothing is known.
        weights: bytes of the modules on the device at once, by name.
        activation_bytes: the most that one call holds beside weights and K and V.
        dense_peak_bytes: the peak of the pipeline without heterostep.
        limit_bytes: memory that the process may use; None where it is not known.
        stores: every store, and what it needs.
        chosen: what `kv_store` gives; None where nothing fits, "none" where no K and V are kept.
        peak_bytes: with the chosen one; None where nothing fits.
        seconds, dense_seconds: of the denoising loop; None where this size was not timed on this device.
        device: that seconds are of.
        gpus: that share the video. All bytes are one's, weights too, which each has whole.
        roomy_share: what `share` is where the K and V of a short run's single tokens fit on the device; None where this
            is such a plan, or no run has any.
    """

    model: str
    pipeline: str
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    tokens: int
    grid: tuple[int, int, int]
    calls: int
    from_frames: bool
    share: float
    active_share: tuple[float, ...]
    advice: str | None
    weights: dict[str, int]
    activation_bytes: int
    dense_peak_bytes: int
    limit_bytes: int | None
    stores: tuple[StorePlan, ...]
    chosen: StorePlan | None
    peak_bytes: int | None
    seconds: float | None
    dense_seconds: float | None
    device: str | None
    gpus: int = 1
    roomy_share: float | None = None

    @property
    def evaluated(self) -> str:
        """The steps that evaluate tokens as the run begins, from 1, as in "all tokens at steps 1-3, 5; some at 4"."""
        counts = [round(share * self.tokens) for share in self.active_share]
        # One token comes along at every step where a model makes sound (LTX-2).
        some = _ranges(step for step, count in enumerate(counts, 1) if 1 < count < self.tokens)
        every = _ranges(step for step, count in enumerate(counts, 1) if count == self.tokens)
        return f"all tokens at steps {every}" + (f"; some at {some}" if some else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)

    def to_json(self, *, indent: int | None = None) -> str:
        """The plan as JSON."""
        return json.dumps(self.to_dict(), indent=indent)


def _ranges(steps: Iterable[int]) -> str:
    """Ascending numbers as text: 1-3, 5."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and runs[-1][-1] == step - 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def plan(
    model: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    image_to_video: bool = False,
    offload: str = "none",
    attention_backend: str | None = None,
    gpus: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    config: HSAConfig | None = None,
    **options: Any,
) -> Plan:
    """What a run will need and take. Nothing is loaded or allocated, and no network is asked.

    Args:
        model: a short name or hub id of `heterostep.configs`, a diffusers folder, or a pipeline.
        height, width, num_frames, num_inference_steps, guidance_scale: of the pipeline's call; by default the model's.
        image_to_video: from a first frame, where the model does both; of a pipeline, its class says so.
        offload: "none", all models are on the device; "model", one at a time (`enable_model_cpu_offload`).
        attention_backend: as given to `set_attention_backend`; some copy their inputs. A pipeline's own by default.
        gpus: that share the video (`enable_parallelism`).
        dtype: of weights and activations; Wan's VAE is counted in float32. A pipeline has its own.
        config: an `HSAConfig`, or its fields as keywords, as in `enable`; `vram` is the memory to plan for.

    Raises:
        HeterostepError: the model or an option is not known, the pipeline refuses the size, or the target is too low.
    """
    gpus = whole("gpus", gpus)
    if gpus < 1:
        raise HeterostepError(f"gpus must be at least 1, not {gpus}")
    if offload not in OFFLOADS:
        raise HeterostepError(f"offload must be one of {', '.join(OFFLOADS)}, not {offload!r}", "offload")
    loaded = hasattr(model, "components")
    if not loaded and not isinstance(model, str | os.PathLike):
        raise HeterostepError(f"plan expects a name, a folder or a pipeline, not {model!r:.60}")
    own = tuple(name for name, each in inspect.signature(plan).parameters.items() if each.kind is each.KEYWORD_ONLY)
    config = HSAConfig.of(config, options, beside=own)
    found = None if loaded else configs.load(model)
    if not found and "Modular" in type(model).__name__:
        raise HeterostepError(
            f"a plan needs the usual pipeline in place of {type(model).__name__}, or its checkpoint's name: the "
            "transformer's calls are the same"
        )
    if not isinstance(dtype, torch.dtype):
        raise HeterostepError(f"dtype must be a torch.dtype, such as torch.bfloat16, not {dtype!r}")
    defaults = found.defaults if found else configs.call_defaults(type(model).__name__)
    asked: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    sizes: dict[str, Any] = {name: defaults[name] if value is None else value for name, value in asked.items()}
    _check_sizes(sizes)
    if missing := [name for name, value in sizes.items() if value is None]:
        raise HeterostepError(f"{type(model).__name__} has no default {' and '.join(missing)}: give it")
    if found:
        # The largest share of the weights is the same whichever pipeline uses them.
        seen = dry_run(found, image_to_video=image_to_video, dtype=dtype, **sizes)
        weights = {
            name: configs.parameter_bytes(part, _precision(name, found.pipeline, dtype))
            for name, part in found.models().items()
        }
    else:
        seen = dry_run_pipeline(model, **sizes)
        if image_to_video and not seen.from_frames:
            raise HeterostepError(
                f"{type(model).__name__} does not take a first frame: give the image-to-video pipeline, or leave out "
                "image_to_video"
            )
        modules = {name: part for name, part in model.components.items() if isinstance(part, torch.nn.Module)}
        weights = {name: sum(p.nbytes for p in module.parameters()) for name, module in modules.items()}
    transformer: Any = seen.model
    if attention_backend is not None:
        use_backend(transformer, attention_backend)
    if offload == "model":
        transformers = {name: size for name, size in weights.items() if name.startswith("transformer")}
        name = max(transformers, key=lambda name: transformers[name])
        weights = {name: transformers[name]}
    return _plan(str(model) if found else type(model).__name__, seen, weights, sizes, config, attention_backend, gpus)


def _check_sizes(sizes: dict[str, Any]) -> None:
    """Check that these are numbers that a model can have; None where one is not known."""
    for name, value in sizes.items():
        if value is None:
            continue
        if name == "guidance_scale":
            if not 0 <= number(name, value) < math.inf:
                raise HeterostepError(f"{name} must be a number of at least 0, not {value}", name)
            continue
        sizes[name] = whole(name, value)
    pixels = math.prod(sizes[name] or 1 for name in ("height", "width", "num_frames"))
    if pixels > MOST_PIXELS:
        raise HeterostepError(
            f"height x width x frames can be {MOST_PIXELS:,} at the most, not {pixels:,}: give a smaller size"
        )


def _precision(name: str, pipeline: str, dtype: torch.dtype) -> torch.dtype:
    # Half precision in Wan's VAE shows in the pixels.
    return torch.float32 if name == "vae" and pipeline.startswith("Wan") else dtype


def _plan(
    model: str,
    seen: DryRun,
    weights: dict[str, int],
    sizes: dict[str, Any],
    config: HSAConfig,
    backend: str | None,
    gpus: int,
) -> Plan:
    adapter = FAMILIES[type(seen.model).__name__].adapter
    grid = adapter.token_grid(seen.model, seen.calls[0])
    if gpus > 1:
        cp_plan(seen.model)
        parallel.check_heads(seen.model, gpus)
    rules, frames = size_rules(seen.pipe), sizes["num_frames"]
    if frames != rules.frames(frames):
        # Diffusers makes another number then, by the tokens that there are.
        frames = (grid.shape[0] * (rules.token or (1,))[0] - 1) * rules.stride + 1
    total, sigmas = grid.num_tokens, _sigmas(seen, sizes["num_inference_steps"])
    num_steps, switch = len(sigmas) - 1, adapter.expert_switch(seen.pipe)
    restarts = () if switch is None or not 0 < switch - seen.first < num_steps else (switch - seen.first,)
    run = Run(sigmas, Tokens(total, adapter.min_active), restarts, seen.from_frames)
    schedule = Schedule(config, run)
    schedule.check()
    counts = schedule.plan()
    some = [count for count in counts if 0 < count < total]
    # Where the plan is made anew as the run goes, there may come to be sparse steps.
    keeps = config.sync != "fresh" and (bool(some) or (schedule.replans and schedule.sparse))
    active = max(some, default=total // 2) / total
    calls = [forecast.of_a_rank(forecast.call_memory(seen.model, call, active), gpus) for call in seen.calls]
    memory = _Memory(calls, sum(weights.values()), config, gpus)
    chosen = memory.chosen() if keeps else memory.without()
    roomy = chosen is not None and chosen.fits and (chosen.store == "device" or config.kv_store != "auto")
    roomy_share = None
    if keeps and not roomy and schedule.leave_out_single_tokens():
        roomy_share = sum(counts) / total / num_steps if some else None
        counts, chosen, keeps = schedule.plan(), memory.without(), False
    timed = _timed(seen, total, config, backend, gpus, keeps, chosen)
    seconds = dense_seconds = None
    if timed is not None:
        scale = len(seen.calls)
        seconds = scale * sum(timed.seconds(count / total) for count in counts)
        dense_seconds = scale * num_steps * timed.seconds(1.0)
    return Plan(
        model=model,
        pipeline=type(seen.pipe).__name__,
        tokens=total,
        grid=grid.shape,
        calls=len(seen.calls),
        from_frames=seen.from_frames,
        share=sum(counts) / total / num_steps,
        active_share=tuple(count / total for count in counts),
        advice=schedule.advice,
        weights=weights,
        activation_bytes=max(max(call.plain, call.dense, call.sparse) for call in calls),
        dense_peak_bytes=sum(weights.values()) + memory.plain,
        limit_bytes=memory.limit,
        stores=tuple(memory.account(forecast.uniform(name, memory.layers)) for name in STORES),
        chosen=chosen,
        peak_bytes=None if chosen is None else chosen.peak_bytes,
        seconds=seconds,
        dense_seconds=dense_seconds,
        device=None if timed is None else timed.device,
        gpus=gpus,
        roomy_share=roomy_share,
        **sizes | {"num_frames": frames},
    )


class _Memory:
    """The peaks of a run, by where its K and V are kept; bytes.

    Args:
        calls: what each call of a step takes.
        weights: of the modules on the device at once.
        config, gpus: see `plan`.
    """

    def __init__(self, calls: list[forecast.CallMemory], weights: int, config: HSAConfig, gpus: int) -> None:
        self.config = config
        self.layers = [replace(layer, drifts=config.sync == "drift") for call in calls for layer in call.layers]
        self.base = weights + sum(call.held for call in calls)
        self.plain = max(call.plain for call in calls)
        self.beside = self.base + sum(call.static for call in calls)
        self.dense, self.sparse = max(call.dense for call in calls), max(call.sparse for call in calls)
        self.limit = _limit(config, self.dense)
        # For another machine, its host memory is not known.
        self.host = forecast.host_room() // gpus if torch.cuda.is_available() else UNLIMITED

    def account(self, stores: forecast.Stores) -> StorePlan:
        """What these stores need."""
        sparse = self.beside + self.sparse + stores.device_bytes
        peak = max(self.base + self.plain, self.beside + self.dense + stores.dense_bytes, sparse)
        fits = None if self.limit is None else peak <= self.limit and stores.host_bytes <= self.host
        return StorePlan(str(stores), stores.device_bytes, stores.host_bytes, peak, fits)

    def without(self) -> StorePlan:
        """What a run needs that keeps no K and V."""
        peak = self.base + self.plain
        return StorePlan("none", 0, 0, peak, None if self.limit is None else peak <= self.limit)

    def chosen(self) -> StorePlan | None:
        """What `kv_store` gives; None where nothing fits."""
        asked = self.config.kv_store
        if isinstance(asked, tuple):
            forecast.check_names(asked, len(self.layers))
            return self.account(forecast.Stores(asked, tuple(self.layers)))
        if asked != "auto":
            return self.account(forecast.uniform(asked, self.layers))
        room = UNLIMITED if self.limit is None else self.limit - self.beside
        stores = forecast.choose(self.layers, room - self.dense, room - self.sparse, self.host)
        return None if stores is None else self.account(stores)


def _timed(
    seen: DryRun, total: int, config: HSAConfig, backend: str | None, gpus: int, keeps: bool, chosen: StorePlan | None
) -> timings.Timed | None:
    """What `heterostep bench` has timed of such calls on this device."""
    transformer: Any = seen.model
    states = seen.calls[0]["hidden_states"]
    how: dict[str, Any] = {"dtype": name_of(states.dtype), "batch": states.shape[0]}
    how |= {"attention_backend": backend, "compiled": False, "gpus": gpus}
    if keeps:
        how |= {"store": None if chosen is None else chosen.store, "sync": config.sync}
    return timings.find(type(transformer).__name__, dict(transformer.config), total, **how)


def _sigmas(seen: DryRun, num_steps: int) -> tuple[float, ...]:
    """The noise levels that the run begins with, or likely ones where its scheduler is not supported."""
    sigmas = getattr(seen.pipe.scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) != num_steps + 1 or sigmas[0] > 1:
        return nominal_sigmas(num_steps)
    return tuple(sigmas[seen.first :].float().tolist())


def _limit(config: HSAConfig, activations: int) -> int | None:
    """Bytes that the process may use, less a margin; None where neither asked nor present."""
    free = forecast.room_on(torch.device("cuda"), config.vram, activations) if torch.cuda.is_available() else None
    if free is not None:
        return free + torch.cuda.memory_allocated()
    return None if config.vram is None else forecast.less_margin(int(config.vram * 1e9), activations)
