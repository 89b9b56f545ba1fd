"""From generations to curves, and from curves to what each method reaches at the asked runtimes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

METRICS = ("psnr", "ssim", "lpips", "caption", "motion")
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
    return record[metric]


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.mean(known), "spread": statistics.stdev(known) if len(known) > 1 else 0.0}


def curves(generations: list[dict[str, Any]], dense: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each method its points, fastest last: mean and spread over the prompts of every metric."""
    by_prompt = {record["prompt"]: record for record in dense}
    cells: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for record in generations:
        cells.setdefault(record["method"], {}).setdefault(record["value"], []).append(record)
    out = []
    for method, points in cells.items():
        rows = []
        for value, records in points.items():
            point: dict[str, Any] = {"value": value}
            for name in ("runtime", "evaluations"):
                point[name] = _spread([record[name] for record in records])
            for metric in METRICS:
                point[metric] = _spread([_value(record, by_prompt[record["prompt"]], metric) for record in records])
            # Prompts at which a video equals the dense one have no PSNR; the mean is that of the others.
            point["psnr"] = point["psnr"] or {"mean": IDENTICAL_DB, "spread": 0.0}
            rows.append(point)
        rows.sort(key=lambda point: -point["runtime"]["mean"])
        out.append({"method": method, "points": rows})
    return out


def read_off(points: list[dict[str, Any]], runtime: float) -> dict[str, Any]:
    """A curve's metrics at a runtime: of the point within 1 % of it, or between its two neighbours.

    Returns:
        reached (False beyond the curve's fast end), interpolated, and a value or None for each metric.
    """
    nothing = {"reached": False, "interpolated": False, **dict.fromkeys(METRICS)}
    if not points or runtime < points[-1]["runtime"]["mean"] * 0.99:
        return nothing
    near = min(points, key=lambda point: abs(point["runtime"]["mean"] - runtime))
    faster = next((point for point in points if point["runtime"]["mean"] <= runtime), None)
    slower = next((point for point in reversed(points) if point["runtime"]["mean"] >= runtime), None)
    if abs(near["runtime"]["mean"] - runtime) <= 0.01 * runtime or slower is None or faster is None:
        # Slower budgets than the slowest point are spent on that: it is what a user would take.
        chosen = near if slower is not None else points[0]
        values = {metric: chosen[metric] and chosen[metric]["mean"] for metric in METRICS}
        return {"reached": True, "interpolated": False, **values}
    gap = slower["runtime"]["mean"] - faster["runtime"]["mean"]
    weight = (runtime - faster["runtime"]["mean"]) / gap
    values = {}
    for metric in METRICS:
        ends = faster[metric], slower[metric]
        values[metric] = None if None in ends else ends[0]["mean"] * (1 - weight) + ends[1]["mean"] * weight
    return {"reached": True, "interpolated": True, **values}


def frontier(lines: list[dict[str, Any]], runtimes: Sequence[float], diagnostic: Sequence[str] = ()) -> list[dict]:
    """What each method reaches at each asked runtime, and who is ahead; diagnostic methods never are."""
    out = []
    for runtime in runtimes:
        rows = [{"method": line["method"], **read_off(line["points"], runtime)} for line in lines]
        winners = {}
        for metric in ("psnr", "ssim", "caption"):
            able = [row for row in rows if row[metric] is not None and row["method"] not in diagnostic]
            best = [row["method"] for row in able if row[metric] == max(row[metric] for row in able)]
            # A draw has no winner.
            winners[metric] = best[0] if len(best) == 1 else None
        out.append({"runtime": runtime, "rows": rows, "winners": winners})
    return out
