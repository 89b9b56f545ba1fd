"""What the user asks for: one dial (`runtime` or `share`) and options that have good defaults."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heterostep.errors import HeterostepError

SOLVERS = ("pipeline", "euler")
SCORES = ("velocity", "random", "oracle")
SYNCS = ("drift", "hold", "fresh")
KV_STORES = ("auto", "device", "fp8", "offload", "fp8-offload")


@dataclass(frozen=True)
class HSAConfig:
    """Options of heterogeneous step allocation. Give exactly one of `runtime` and `share`.

    Args:
        runtime: seconds of the denoising loop over the dense loop's seconds, 0..1; kept online by timing steps.
        share: token evaluations over dense token evaluations, 0..1; deterministic. A sequence gives one active share
            for each step: with `report.active_share` it replays a run exactly.
        policy: where evaluations go and which tokens get them. "auto": all tokens, at steps between which the velocity
            changes by equal amounts; "hsa": the paper's step divisors, with velocities held as they are; or the name of
            one added by `heterostep.policy.register_policy`.
        between: for "auto": share of the evaluations, 0..1, that goes to single tokens between dense steps, those whose
            velocities change fastest. Above 0 the K and V of all tokens are kept. At 0 what dense steps leave of the
            budget, less than one of them, is not spent (except on LTX-2, whose sound runs at every step).
        divisors: for "hsa": the step divisors that tokens may get, ascending, each a multiple of the one before; by
            default (1, 2, 4, 8). A token of divisor d is evaluated at every d-th step; all tokens meet at multiples of
            the largest divisor in play. To give them is to choose "hsa".
        rotation: for experiments: as many tokens at each step, each at least once in so many steps. It is its own
            policy, "rotation".
        dense_start: steps at the beginning that are all dense; by default as the policy sees fit.
        dense_end: steps at the end that are all dense.
        regroup_every: for "hsa": tokens are ranked anew at every such dense step that single tokens follow.
        extrapolate: how far a held velocity follows its last change over log(1 - sigma), 0..1: 0 holds it as it is, as
            the paper does; 1 extends the line through its last two evaluations. By default the policy decides: "auto"
            by how large that change was, "hsa" takes 0.
        solver: "pipeline" feeds held velocities to the scheduler that the pipeline has; "euler" is the paper's update,
            a first-order step on the same sigma grid.
        score: "velocity" ranks tokens by how fast their velocity changes. For experiments: "random" is a control;
            "oracle" evaluates all tokens for nothing and ranks them by how wrong their held velocity is.
        sync: "hold" keeps the K/V of sleeping tokens as they were, as the paper does; "drift" lets them go on along
            each token's last change, at the price of a byte for each of their values. "fresh" recomputes them at every
            step for nothing, a bound for experiments: it tells what stale K/V cost, and is no faster than dense.
        kv_store: where K and V are kept. "device": in the model's precision; "fp8": in half of the bytes; "offload" and
            "fp8-offload": in pinned host memory, fetched a layer ahead. "auto" takes the first of device, fp8,
            fp8-offload that fits beside the run, or two of them by layer.
        vram: bytes / 1e9 of the device's memory that the process may use, for "auto"; by default what is free.
        cuda_graphs: whether calls with few active tokens may be recorded and replayed, where K and V are all in the
            "device" store. The same kernels run on the same numbers, without the host's time to launch each.

    Raises:
        HeterostepError: a value is out of its range.
    """

    runtime: float | None = None
    share: float | Sequence[float] | None = None
    policy: str = "auto"
    between: float = 0.0
    divisors: tuple[int, ...] | None = None
    rotation: int | None = None
    dense_start: int | None = None
    dense_end: int = 0
    regroup_every: int = 1
    extrapolate: float | None = None
    solver: str = "pipeline"
    score: str = "velocity"
    sync: str = "hold"
    kv_store: str = "auto"
    vram: float | None = None
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        if (self.runtime is None) == (self.share is None):
            raise HeterostepError("give exactly one of runtime and share, for example runtime=0.5")
        if self.share is not None and not isinstance(self.share, int | float):
            object.__setattr__(self, "share", tuple(float(s) for s in self.share))
            if not self.share or not all(0 <= s <= 1 for s in self.share):
                raise HeterostepError("share as a sequence needs one active share in 0..1 for each step")
        else:
            name, target = ("runtime", self.runtime) if self.share is None else ("share", self.share)
            if not isinstance(target, int | float) or not 0 < target <= 1:
                raise HeterostepError(f"{name} must be above 0 and at most 1, not {target}")
        if self.between is None:
            warnings.warn("between=None is the default now, between=0: leave it out", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "between", 0.0)
        for name, value in (("between", self.between), ("extrapolate", self.extrapolate or 0)):
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise HeterostepError(f"{name} must be in 0..1, not {value}")
        if self.divisors is not None:
            divisors = tuple(self.divisors)
            object.__setattr__(self, "divisors", divisors)
            if not divisors or divisors[0] < 1 or any(b <= a or b % a for a, b in zip(divisors, divisors[1:])):
                raise HeterostepError(
                    f"divisors must ascend, each a multiple of the one before, as in (1, 2, 4, 8), not {divisors}"
                )
        if self.rotation is not None:
            if not isinstance(self.rotation, int) or self.rotation < 1:
                raise HeterostepError(f"rotation must be a number of steps, at least 1, not {self.rotation}")
            if self.divisors is not None or isinstance(self.share, tuple):
                raise HeterostepError("rotation chooses each step's tokens: leave out divisors and shares by step")
        self._choose_policy()
        if self.dense_start is not None and self.dense_start < 1:
            raise HeterostepError(
                "dense_start must be at least 1: the first step has no velocity yet that could be held"
            )
        if self.dense_end < 0:
            raise HeterostepError("dense_end must be at least 0")
        if self.regroup_every < 1:
            raise HeterostepError("regroup_every must be at least 1")
        if self.solver not in SOLVERS:
            raise HeterostepError(f"solver must be one of {', '.join(SOLVERS)}, not {self.solver!r}")
        if self.score not in SCORES:
            raise HeterostepError(f"score must be one of {', '.join(SCORES)}, not {self.score!r}")
        if self.sync not in SYNCS:
            raise HeterostepError(f"sync must be one of {', '.join(SYNCS)}, not {self.sync!r}")
        if self.kv_store not in KV_STORES:
            raise HeterostepError(f"kv_store must be one of {', '.join(KV_STORES)}, not {self.kv_store!r}")
        if self.vram is not None and (not isinstance(self.vram, int | float) or not 0 < self.vram < math.inf):
            raise HeterostepError(f"vram must be gigabytes above 0, not {self.vram}")

    def _choose_policy(self) -> None:
        """Options that belong to one policy choose it, and do not go with another."""
        for name, policy in (("divisors", "hsa"), ("rotation", "rotation")):
            if getattr(self, name) is not None and self.policy != policy:
                if self.policy != "auto":
                    raise HeterostepError(f"{name} belongs to policy={policy!r}, not to {self.policy!r}")
                object.__setattr__(self, "policy", policy)
        if self.policy == "rotation" and self.rotation is None:
            raise HeterostepError("policy='rotation' wants rotation=, a number of steps")
        if self.between and self.policy in ("hsa", "rotation"):
            raise HeterostepError(f"between belongs to policy='auto', not to {self.policy!r}")
        if self.policy == "hsa" and self.extrapolate is None:
            object.__setattr__(self, "extrapolate", 0.0)

    @classmethod
    def of(cls, config: HSAConfig | None, options: dict[str, Any]) -> HSAConfig:
        """The config that a caller gave as one, or as keywords.

        Raises:
            HeterostepError: both were given, or a keyword that is no field; or a value is out of its range.
        """
        if config is not None and options:
            raise HeterostepError("give config= or its fields as keywords, not both")
        if unknown := sorted(set(options) - set(cls.__dataclass_fields__)):
            known = ", ".join(cls.__dataclass_fields__)
            raise HeterostepError(f"no such option: {', '.join(unknown)}; the options are {known}")
        return config or cls(**options)

    @property
    def target(self) -> float:
        """The asked runtime or (mean) share, 0..1."""
        if self.runtime is not None:
            return float(self.runtime)
        if isinstance(self.share, tuple):
            return sum(self.share) / len(self.share)
        return float(self.share)  # type: ignore[arg-type]
