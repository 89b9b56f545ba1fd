"""heterostep itself, its controls, and plain sampling with fewer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from heterostep.compare.methods.method import Method
from heterostep.pipeline import enabled, first_order

BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)


def heterostep_method(name: str, label: str, diagnostic: bool = False, **options: Any) -> Method:
    """heterostep by share, with these options of `HSAConfig`."""

    @contextlib.contextmanager
    def apply(pipe: Any, value: float, num_steps: int) -> Iterator[dict[str, Any]]:
        with enabled(pipe, share=value, **options):
            yield {}

    return Method(
        name, label, "share of token evaluations", BUDGETS, apply, budget=True, maps=True, diagnostic=diagnostic
    )


@contextlib.contextmanager
def _fewer_steps(pipe: Any, value: float, num_steps: int) -> Iterator[dict[str, Any]]:
    yield {"num_inference_steps": max(1, round(value * num_steps))}


@contextlib.contextmanager
def _fewer_euler_steps(pipe: Any, value: float, num_steps: int) -> Iterator[dict[str, Any]]:
    scheduler = pipe.scheduler
    pipe.scheduler = first_order(scheduler)
    try:
        yield {"num_inference_steps": max(1, round(value * num_steps))}
    finally:
        pipe.scheduler = scheduler


def round_robin_options(share: float, num_steps: int) -> dict[str, Any]:
    """Options of a round-robin at a share: half of the budget for the dense start, and half of the rest for probes."""
    start = max(2, round(0.5 * share * num_steps))
    rest = share * num_steps - start
    return {"dense_start": start - 1, "round_robin": max(1, round(2 * (num_steps - start) / rest)) if rest > 0 else 1}


def _round_robin_method(name: str, label: str, sync: str, diagnostic: bool = False) -> Method:
    @contextlib.contextmanager
    def apply(pipe: Any, value: float, num_steps: int) -> Iterator[dict[str, Any]]:
        with enabled(pipe, share=value, sync=sync, **round_robin_options(value, num_steps)):
            yield {}

    return Method(
        name, label, "share of token evaluations", BUDGETS, apply, budget=True, maps=True, diagnostic=diagnostic
    )


# A tenth of the evaluations for single tokens between dense steps, where a method is about these: better than a fifth
# (docs/background/tried.md).
SPARSE_SHARE = 0.1

OWN = (
    heterostep_method("heterostep", "heterostep"),
    heterostep_method("heterostep-euler", "heterostep, Euler", solver="euler"),
    heterostep_method("hsa", "HSA as published (step divisors, velocities held)", policy="hsa"),
    heterostep_method("tokens", "single tokens in the gaps", sparse_share=SPARSE_SHARE),
    heterostep_method("tokens-random", "single tokens at random (control)", sparse_share=SPARSE_SHARE, score="random"),
    heterostep_method(
        "tokens-oracle",
        "single tokens in the gaps, true errors (bound)",
        True,
        sparse_share=SPARSE_SHARE,
        score="oracle",
    ),
    heterostep_method(
        "tokens-fresh", "single tokens in the gaps, fresh K/V (bound)", True, sparse_share=SPARSE_SHARE, sync="fresh"
    ),
    heterostep_method(
        "tokens-drift", "single tokens in the gaps, K/V in drift", sparse_share=SPARSE_SHARE, sync="drift"
    ),
    _round_robin_method("round-robin", "tokens in turn, K/V in drift", "drift"),
    _round_robin_method("round-robin-hold", "tokens in turn, K/V held", "hold"),
    _round_robin_method("round-robin-fresh", "tokens in turn, fresh K/V (bound)", "fresh", diagnostic=True),
    Method("steps", "fewer steps, the pipeline's solver", "share of the steps", BUDGETS, _fewer_steps, budget=True),
    Method("steps-euler", "fewer steps, Euler", "share of the steps", BUDGETS, _fewer_euler_steps, budget=True),
)
