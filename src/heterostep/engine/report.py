"""What a run was asked for and what it did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

SCHEMA = 3


@dataclass(frozen=True)
class RuntimeReport:
    """The time of the denoising loop.

    Attributes:
        target: seconds asked for, over the dense loop's; None where a share was asked for.
        achieved: seconds taken, over the dense loop's, without warm-up; None where the run was
            interrupted or its steps could not be timed.
        seconds: all of the loop's, warm-up included.
        dense_seconds: what the dense loop would take without heterostep, estimated from the run's dense steps, where
            there are such from those that kept no K and V.
        warmup_seconds: of `seconds`, those of calls that the process made for the first time (compilation,
            autotuning): a second run of the kind has none.
    """

    target: float | None
    achieved: float | None
    seconds: float
    dense_seconds: float | None
    warmup_seconds: float = 0.0


@dataclass(frozen=True)
class ShareReport:
    """Token evaluations over those of the dense run.

    Attributes:
        target: asked for; None where a runtime was.
        achieved: spent.
        unspent: what is left of the asked share: less than one dense step, or what `divisors` without 1 cannot spend.
    """

    target: float | None
    achieved: float
    unspent: float = 0.0


@dataclass(frozen=True)
class StepsReport:
    """How often a token was evaluated: the mean over all tokens, the rarest, the most frequent."""

    mean: float
    min: int
    max: int


@dataclass(frozen=True)
class MemoryReport:
    """Where K and V were kept, and bytes.

    Attributes:
        kv_cache_bytes: the most K/V held at once on the device, with what decoding and transfers use.
        peak_bytes: the process's peak (on CUDA: the device's peak of allocated memory).
        kv_host_bytes: the most held in host memory for it.
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
    """Where a run is, as `on_step` is told after each step.

    Attributes:
        step: the step that was made, from 0.
        num_inference_steps: of the run.
        active_share: of the tokens, those that this step evaluated, 0..1.
        elapsed_seconds: of the denoising loop so far.
        projected_runtime: seconds that the whole run will take as it is planned now, over the dense loop's; None while
            no step has been timed.
        projected_share: token evaluations of the whole run as it is planned now, over the dense run's.
    """

    step: int
    num_inference_steps: int
    active_share: float
    elapsed_seconds: float
    projected_runtime: float | None
    projected_share: float


@dataclass(frozen=True)
class Report:
    """What one generation was asked for and what it did.

    Attributes:
        pipeline: its class name.
        num_inference_steps: denoising steps.
        runtime: the time of the denoising loop.
        share: token evaluations.
        steps: evaluations per token.
        memory: where K and V were kept.
        active_share: tokens evaluated over all tokens, one per step; as `share=` it replays the run.
        replay: options that repeat the run bit for bit: `enable(pipe, **report.replay)`, then the same call and seed.
            Beside the shares they name the stores that K and V were in, which free memory would choose anew. Where
            memory ran out in mid-run (`memory.fell_back`), a replay has the store of its end throughout.
        steps_maps: evaluations per token of each sample, int [samples, frames, height, width] of the token grid.
        policy: what decided where evaluations went.
        solver: how steps were made.
        finished: False where the run was interrupted.
        advice: what would probably serve better than this run's settings, or why its target was out of reach, one
            sentence; None where nothing is known.
        seed: of the noise, where the command made the video; None from Python, where it is in your generator.
        schema: the version of the keys of `to_json`.
    """

    pipeline: str
    num_inference_steps: int
    runtime: RuntimeReport
    share: ShareReport
    steps: StepsReport
    active_share: list[float]
    memory: MemoryReport
    steps_maps: np.ndarray = field(repr=False, compare=False)
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

    def to_json(self, *, indent: int | None = None) -> str:
        """The report as JSON; `schema` tells the version of its keys."""
        return json.dumps(self.to_dict(), indent=indent)
