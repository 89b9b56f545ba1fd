"""What a run was asked for and what it did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

SCHEMA = 3


@dataclass(frozen=True)
class RuntimeReport:
    """The denoising loop: asked (or None) and achieved as ratios to the dense loop; seconds of both.

    `seconds` are all of the loop's. `warmup_seconds` of them went to calls that were made for the first time
    (compilation, autotuning); they are in neither `achieved` nor `dense_seconds`, which is this machine's estimate from
    the run's own dense steps.
    """

    target: float | None
    achieved: float | None
    seconds: float
    dense_seconds: float | None
    warmup_seconds: float = 0.0


@dataclass(frozen=True)
class ShareReport:
    """Token evaluations over dense token evaluations: asked (or None) and spent.

    `unspent` is what whole dense steps left of the asked share, less than one of them.
    """

    target: float | None
    achieved: float
    unspent: float = 0.0


@dataclass(frozen=True)
class StepsReport:
    """Evaluations per token."""

    mean: float
    min: int
    max: int


@dataclass(frozen=True)
class MemoryReport:
    """Where K and V were kept, and bytes.

    kv_cache_bytes: the most K/V held at once on the device, with what decoding and transfers use.
    kv_host_bytes: the most held in host memory for it.
    peak_bytes: the process's peak (on CUDA: the device's peak of allocated memory).
    kv_store: the store's name, or how many layers had which; "none" where nothing was kept.
    fell_back: memory ran out in the run, and `kv_store` took over from a larger one.
    """

    kv_cache_bytes: int
    peak_bytes: int
    kv_host_bytes: int = 0
    kv_store: str = "none"
    fell_back: bool = False


@dataclass(frozen=True)
class StepInfo:
    """Where a run is, for `on_step`. Steps count from 0; shares and runtimes are ratios to dense."""

    step: int
    num_inference_steps: int
    active_share: float
    elapsed_seconds: float
    projected_runtime: float | None
    projected_share: float


@dataclass(frozen=True)
class Report:
    """One generation's account.

    Attributes:
        active_share: tokens evaluated over all tokens, one per step; as `share=` it replays the run.
        replay: options that repeat the run bit for bit: `enable(pipe, **report.replay)`, then the same call and seed.
            Beside the shares they name the stores that K and V were in, which free memory would choose anew. Where
            memory ran out in mid-run (`memory.fell_back`), a replay has the store of its end throughout.
        steps_map: evaluations per token of the first sample, int [frames, height, width] of the token grid.
        steps_maps: the same for every sample, [samples, frames, height, width].
        finished: False where the run was interrupted.
        advice: what would probably serve better than this run's settings, one sentence; None where nothing is known.
    """

    pipeline: str
    num_inference_steps: int
    runtime: RuntimeReport
    share: ShareReport
    steps: StepsReport
    active_share: list[float]
    memory: MemoryReport
    steps_maps: np.ndarray = field(repr=False)
    replay: dict[str, Any] = field(default_factory=dict)
    policy: str = "auto"
    solver: str = "pipeline"
    finished: bool = True
    advice: str | None = None
    seed: int | None = None
    schema: int = SCHEMA

    @property
    def steps_map(self) -> np.ndarray:
        """Evaluations per token of the first sample, int [frames, height, width]."""
        return self.steps_maps[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, the steps maps as nested lists."""
        out = asdict(self)
        out["steps_maps"] = self.steps_maps.tolist()
        return out

    def to_json(self, indent: int | None = None) -> str:
        """The report as JSON; `schema` tells the version of its keys."""
        return json.dumps(self.to_dict(), indent=indent)
