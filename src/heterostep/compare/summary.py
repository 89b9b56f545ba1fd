"""From generations to curves, and from curves to what each method reaches at the asked runtimes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

METRICS = ("psnr", "ssim", "lpips", "caption", "motion", "vbench")
# What a curve is against: what a generation costs, over dense's.
RUNTIME, EVALUATIONS = "runtime", "evaluations"
# Equal to the dense video on every prompt: a figure above every other serves, and JSON has no infinity.
IDENTICAL_DB = 100.0


def _value(record: dict[str, Any], dense: dict[str, Any], metric: str) -> float | None:
    if metric == "caption":
        parts = [value for value in (record["caption"] or {}).values() if value is not None]
        return statistics.mean(parts) if parts else None
    if metric == "motion":
        # The distance in motion from the dense run, as a share of its displacement.
        moved, dense_moved = record["displacement"], dense["displacement"]
        return None if moved is None or not dense_moved else abs(moved / dense_moved - 1)
    if metric == "vbench":
        return statistics.mean(record["vbench"].values()) if record.get("vbench") else None
    return record[metric]


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.mean(known), "spread": statistics.stdev(known) if len(known) > 1 else 0.0}


def curves(generations: list[dict[str, Any]], dense: list[dict[str, Any]], cost: str = RUNTIME) -> list[dict[str, Any]]:
    """For each method its points, cheapest last: mean and spread over the prompts of every metric."""
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
            # Prompts at which a video equals the dense one have no PSNR; the mean is that of the others.
            point["psnr"] = point["psnr"] or {"mean": IDENTICAL_DB, "spread": 0.0}
            rows.append(point)
        rows.sort(key=lambda point: -point[cost]["mean"])
        out.append({"method": method, "points": rows})
    return out


def read_off(points: list[dict[str, Any]], asked: float, cost: str = RUNTIME) -> dict[str, Any]:
    """A curve's metrics at an asked cost: of the point within 1 % of it, or between its two neighbours.

    Returns:
        reached (False beyond the curve's cheap end), interpolated, and a value or None for each metric.
    """
    nothing = {"reached": False, "interpolated": False, **dict.fromkeys(METRICS)}
    if not points or asked < points[-1][cost]["mean"] * 0.99:
        return nothing
    near = min(points, key=lambda point: abs(point[cost]["mean"] - asked))
    cheaper = next((point for point in points if point[cost]["mean"] <= asked), None)
    dearer = next((point for point in reversed(points) if point[cost]["mean"] >= asked), None)
    if abs(near[cost]["mean"] - asked) <= 0.01 * asked or dearer is None or cheaper is None:
        # Budgets above the dearest point are spent on that: it is what a user would take.
        chosen = near if dearer is not None else points[0]
        values = {metric: chosen[metric]["mean"] if chosen.get(metric) else None for metric in METRICS}
        return {"reached": True, "interpolated": False, **values}
    gap = dearer[cost]["mean"] - cheaper[cost]["mean"]
    weight = (asked - cheaper[cost]["mean"]) / gap
    values = {}
    for metric in METRICS:
        low, high = cheaper.get(metric), dearer.get(metric)
        if metric == "psnr" and low and high and IDENTICAL_DB in (low["mean"], high["mean"]):
            # On the way to a video that equals the dense one the decibels have no end.
            high = None
        values[metric] = low["mean"] * (1 - weight) + high["mean"] * weight if low and high else None
    return {"reached": True, "interpolated": True, **values}


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
