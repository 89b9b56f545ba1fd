"""From generations to curves, and from curves to what each method reaches at the asked runtimes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

METRICS = ("psnr", "ssim", "vmaf", "lpips", "caption", "motion", "vbench")
# What a curve is against: what a generation costs, over dense's.
RUNTIME, EVALUATIONS = "runtime", "evaluations"
# Equal to the dense video on every prompt: a figure above every other serves, and JSON has no infinity.
IDENTICAL_DB = 100.0
# Dense from another seed has the same work to do: from this part of the seconds on, their difference is worth a word.
STEADY = 0.05
# The worst one in so many prompts are looked at by themselves, and at least one.
WORST = 10


def _value(record: dict[str, Any], dense: dict[str, Any], metric: str) -> float | None:
    if metric == "caption":
        parts = [value for value in (record["caption"] or {}).values() if value is not None]
        return statistics.mean(parts) if parts else None
    if metric == "motion":
        return motion_distance(record, dense)
    if metric == "vbench":
        return statistics.mean(record["vbench"].values()) if record.get("vbench") else None
    return record.get(metric)


def motion_distance(record: dict[str, Any], dense: dict[str, Any]) -> float | None:
    """How far a video's motion is from the dense one's, as a share of that: 0 moves as much, 1 stands still.

    Of the shapes' displacement where the bundled model's world has judged it, else of the change from frame to frame.
    """
    name = "displacement" if dense.get("displacement") is not None else "activity"
    moved, dense_moved = record.get(name), dense.get(name)
    return None if moved is None or not dense_moved else abs(moved / dense_moved - 1)


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.mean(known), "spread": statistics.stdev(known) if len(known) > 1 else 0.0}


def _psnr(values: Sequence[float | None]) -> dict[str, float]:
    """Mean and spread of dB, with `low`: the mean of the worst tenth of the prompts."""
    found = _spread(values)
    if found is None:
        return {"mean": IDENTICAL_DB, "spread": 0.0, "low": IDENTICAL_DB}
    # Prompts at which a video equals the dense one have no PSNR; the mean is that of the others, which are the worst.
    worst = sorted(value for value in values if value is not None)[: max(1, len(values) // WORST)]
    return {**found, "low": statistics.mean(worst)}


def curves(generations: list[dict[str, Any]], dense: list[dict[str, Any]], cost: str = RUNTIME) -> list[dict[str, Any]]:
    """For each method its points, cheapest last: mean and spread over the prompts of every metric, PSNR's `low` too."""
    by_prompt = {record["prompt"]: record for record in dense}
    cells: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for record in generations:
        cells.setdefault(record["method"], {}).setdefault(record["value"], []).append(record)
    out = []
    for method, points in cells.items():
        rows = []
        for value, records in points.items():
            point: dict[str, Any] = {"value": value}
            for name in (RUNTIME, EVALUATIONS):
                point[name] = _spread([record[name] for record in records])
            for metric in METRICS:
                point[metric] = _spread([_value(record, by_prompt[record["prompt"]], metric) for record in records])
            point["psnr"] = _psnr([record["psnr"] for record in records])
            rows.append(point)
        rows.sort(key=lambda point: -point[cost]["mean"])
        out.append({"method": method, "points": rows})
    return out


def unsteady(chance: list[dict[str, Any]]) -> str | None:
    """What is to be said of ratios of seconds, where a prompt's two dense runs took so different ones; else None.

    Args:
        chance: records of dense from another seed; of what was not timed `runtime` is None.
    """
    known = [abs(record["runtime"] - 1) for record in chance if record["runtime"] is not None]
    off = statistics.median(known) if known else 0.0
    if off <= STEADY:
        return None
    return (
        f"The two dense runs of a prompt differ by {off:.0%} in seconds: the machine was busy, or slow at first, so "
        "that ratios of seconds are uncertain."
    )


@dataclass(frozen=True)
class Place:
    """Where a curve is read off: at one of its points, which is both of these, or between two.

    Attributes:
        cheaper, dearer: its points.
        weight: of the dearer one, 0..1.
    """

    cheaper: dict[str, Any]
    dearer: dict[str, Any]
    weight: float = 0.0

    @property
    def interpolated(self) -> bool:
        return self.cheaper is not self.dearer


def place(points: list[dict[str, Any]], asked: float, cost: str = RUNTIME) -> Place | None:
    """Where a curve, cheapest point last, is at an asked cost: at a point within 1 % of it, or between its neighbours.

    Budgets above the dearest point are spent on that: it is what a user would take.

    Returns:
        None beyond the curve's cheap end.
    """
    if not points or asked < points[-1][cost]["mean"] * 0.99:
        return None
    near = min(points, key=lambda point: abs(point[cost]["mean"] - asked))
    cheaper = next((point for point in points if point[cost]["mean"] <= asked), None)
    dearer = next((point for point in reversed(points) if point[cost]["mean"] >= asked), None)
    if dearer is None:
        return Place(points[0], points[0])
    if abs(near[cost]["mean"] - asked) <= 0.01 * asked or cheaper is None:
        return Place(near, near)
    gap = dearer[cost]["mean"] - cheaper[cost]["mean"]
    return Place(cheaper, dearer, (asked - cheaper[cost]["mean"]) / gap)


def read_off(points: list[dict[str, Any]], asked: float, cost: str = RUNTIME) -> dict[str, Any]:
    """A curve's metrics at an asked cost; see `place`.

    Returns:
        reached (False beyond the curve's cheap end), interpolated, and a value or None for each metric.
    """
    found = place(points, asked, cost)
    if found is None:
        return {"reached": False, "interpolated": False, **dict.fromkeys(METRICS)}
    values = {metric: between(found, metric) for metric in METRICS}
    return {"reached": True, "interpolated": found.interpolated, **values}


def between(found: Place, metric: str, figure: str = "mean") -> float | None:
    """A metric's mean, or another of its figures, at a place of a curve; None where there is no such figure."""
    low, high = found.cheaper.get(metric), found.dearer.get(metric)
    if not low or not high:
        return None
    if not found.interpolated:
        return low[figure]
    if metric == "psnr" and IDENTICAL_DB in (low["mean"], high["mean"]):
        # On the way to a video that equals the dense one the decibels have no end.
        return None
    return low[figure] * (1 - found.weight) + high[figure] * found.weight


def frontier(
    lines: list[dict[str, Any]], runtimes: Sequence[float], diagnostic: Sequence[str] = (), cost: str = RUNTIME
) -> list[dict]:
    """What each method reaches at each asked runtime, or cost, and who is ahead; diagnostic methods never are."""
    out = []
    for runtime in runtimes:
        rows = [{"method": line["method"], **read_off(line["points"], runtime, cost)} for line in lines]
        winners = {}
        for metric in ("psnr", "ssim", "caption"):
            able = [row for row in rows if row[metric] is not None and row["method"] not in diagnostic]
            best = [row["method"] for row in able if row[metric] == max(row[metric] for row in able)]
            # A draw has no winner.
            winners[metric] = best[0] if len(best) == 1 else None
        out.append({"runtime": runtime, "rows": rows, "winners": winners})
    return out
