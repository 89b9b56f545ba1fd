"""What is in `results.json`, as figures for its page: who ran, what each reached, who is best, and the verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from heterostep.compare.chart import AXES, CAPTION, METRICS, MOTION, PSNR, RUNTIME, VBENCH, Metric, Value
from heterostep.compare.summary import IDENTICAL_DB, motion_distance

Record = dict[str, Any]
_OURS = "heterostep"
CAPTION_PARTS = ("colour", "direction", "kind", "background")


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def value_of(entry: Any) -> Value | None:
    """A mean with its spread, or a bare number."""
    if isinstance(entry, dict):
        mean = number(entry.get("mean"))
        return None if mean is None else Value(mean, number(entry.get("spread")))
    mean = number(entry)
    return None if mean is None else Value(mean)


def metric_value(metric: Metric, entry: Any) -> Value | None:
    """A curve's or frontier row's entry; a PSNR of videos identical to dense is infinite."""
    value = value_of(entry)
    if metric is PSNR and (value is None or value.mean >= IDENTICAL_DB):
        return Value(math.inf)
    return value


def _mean(values: Iterable[Any]) -> float | None:
    known = [each for value in values if (each := number(value)) is not None]
    return statistics.mean(known) if known else None


def _of(values: Iterable[float | None]) -> Value | None:
    """Mean and sample standard deviation of those that are known."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    return Value(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None)


class Report:
    """The results by method, metric and asked cost."""

    def __init__(self, data: Record) -> None:
        self.data = data
        self.prompts: list[Record] = data.get("prompts") or []
        self.settings: Record = data.get("settings") or {}
        # What the asked runtimes are of: a batch's seconds are not a video's.
        self.cost = str(self.settings.get("cost") or RUNTIME)
        self.axis = AXES[self.cost].split(",")[0]
        self.batch = int(self.settings.get("batch") or 1)
        self.dense: list[Record] = data.get("dense") or []
        self.chance: list[Record] = data.get("chance") or []
        self.generations: list[Record] = data.get("generations") or []
        self.frontier: list[Record] = data.get("frontier") or []
        self.methods: dict[str, Record] = {method["name"]: method for method in data.get("methods") or []}
        self.curves: dict[str, list[Record]] = {c["method"]: c["points"] for c in data.get("curves") or []}
        if len(self.prompts) < 2:
            # Of one prompt there is no spread, not one of 0.
            for entry in (e for points in self.curves.values() for p in points for e in p.values()):
                if isinstance(entry, dict):
                    entry["spread"] = None
        ran = [name for name, method in self.methods.items() if method["status"] == "ran"]
        self.ordinary = [name for name in ran if not self.methods[name].get("diagnostic")]
        self.diagnostic = [name for name in ran if self.methods[name].get("diagnostic")]
        # Of those that ran, in the order of their colours and markers.
        self.series = {name: i for i, name in enumerate(self.ordinary + self.diagnostic)}
        self.metrics = [metric for metric in METRICS if metric is PSNR or self._is_present(metric)]

    def _is_present(self, metric: Metric) -> bool:
        entries = [point.get(metric.key) for points in self.curves.values() for point in points]
        entries += [row.get(metric.key) for at in self.frontier for row in at["rows"]]
        return any(value_of(entry) is not None for entry in entries)

    def label(self, name: str) -> str:
        return str(self.methods.get(name, {}).get("label") or name)

    # One generation

    @staticmethod
    def caption_score(record: Record) -> float | None:
        return _mean((record.get("caption") or {}).get(part) for part in CAPTION_PARTS)

    def of_record(self, metric: Metric, record: Record) -> float | None:
        """A metric of one generation; the motion distance is taken to the same prompt's dense record."""
        if metric is CAPTION:
            return self.caption_score(record)
        if metric is VBENCH:
            return _mean((record.get("vbench") or {}).values())
        if metric is not MOTION:
            return number(record.get(metric.key))
        dense = next((r for r in self.dense if r["prompt"] == record["prompt"]), None)
        return None if dense is None else number(motion_distance(record, dense))

    def of_dense(self, metric: Metric) -> Value | None:
        if metric.dense is not None:
            return Value(metric.dense)
        return _of(self.of_record(metric, record) for record in self.dense)

    def of_chance(self, metric: Metric) -> Value | None:
        return _of(self.of_record(metric, record) for record in self.chance)

    # At an asked cost

    def reached(self, at: Record, metric: Metric) -> dict[str, Value]:
        """The values at an asked cost of the methods that reach it, by name; diagnostic ones left out."""
        found = {}
        for row in at["rows"]:
            value = self.cell(row, at["runtime"], metric)
            if value is not None and row["method"] not in self.diagnostic:
                found[row["method"]] = value
        return found

    def cell(self, row: Record, runtime: float, metric: Metric) -> Value | None:
        if not row.get("reached"):
            return None
        value = metric_value(metric, row.get(metric.key))
        if value is not None and value.spread is None and math.isfinite(value.mean):
            value = Value(value.mean, self._spread_at(row["method"], runtime, metric))
        return value

    def _spread_at(self, name: str, runtime: float, metric: Metric) -> float | None:
        """The spread of a method's points, linear in their cost between them; its nearest point's outside of them."""
        known = []
        for point in self.curves.get(name, []):
            x, y = value_of(point.get(self.cost)), value_of(point.get(metric.key))
            if x is not None and y is not None and y.spread is not None:
                known.append((x.mean, y.spread))
        known.sort()
        if not known:
            return None
        for (x0, y0), (x1, y1) in zip(known, known[1:]):
            if x0 <= runtime <= x1:
                return y0 if x0 == x1 else y0 + (y1 - y0) * (runtime - x0) / (x1 - x0)
        return min(known, key=lambda pair: abs(pair[0] - runtime))[1]

    def winners(self, at: Record, metric: Metric) -> list[str]:
        """The methods to mark as best: the winner, and whoever cannot be told from it at the digits shown."""
        values = self.reached(at, metric)
        if not values:
            return []
        named = (at.get("winners") or {}).get(metric.key)
        identical = [name for name, value in values.items() if math.isinf(value.mean)]
        if identical:
            return identical
        if named not in values:
            pick = max if metric.higher_is_better else min
            named = pick(values, key=lambda name: values[name].mean)
        shown = metric.text(values[named].mean)
        return [named, *(n for n, value in values.items() if n != named and metric.text(value.mean) == shown)]

    def costs(self, name: str) -> list[float]:
        """Of a method's points."""
        return [x.mean for p in self.curves.get(name, []) if (x := value_of(p.get(self.cost))) is not None]

    def shown_cost(self, kept: list[Record]) -> float | None:
        """The asked cost that the kept videos are about."""
        costs = [cost for record in kept if (cost := number(record.get(self.cost))) is not None]
        asked = [at["runtime"] for at in self.frontier] or list(self.settings.get("runtimes") or [])
        if not costs or not asked:
            return None
        middle = statistics.median(costs)
        return min(asked, key=lambda cost: abs(cost - middle))


def verdict(report: Report, at: Record, metric: Metric) -> Record:
    """One metric at one asked cost in one sentence: who wins, and by how much heterostep wins or loses.

    Returns:
        its kind, which is its sign, the labels that it names, and what is said before and after them.
    """
    values, winners = report.reached(at, metric), report.winners(at, metric)
    ours = _OURS if _OURS in values else None

    def sentence(kind: str, names: list[str], after: str, before: str = "") -> Record:
        labels = [report.label(name) for name in names]
        return {"kind": kind, "before": f"{metric.name}: {before}", "names": labels, "after": f"{after}."}

    if not winners:
        return sentence("open", [], "no method reaches it")
    best = values[winners[0]]
    score = _score(metric, best)
    if ours in winners and len(winners) > 1:
        level = f"level, {score}: "
        if len(winners) > 3:
            return sentence("tie", [_OURS], f" and {len(winners) - 1} of {len(values) - 1} others", level)
        return sentence("tie", winners, "", level)
    if ours in winners:
        others = [name for name in values if name != ours]
        if not others:
            return sentence("win", winners, f" alone reaches it, {score}")
        second = max(others, key=lambda name: values[name].mean)
        gap, note = _gap(metric, best, values[second])
        lead = f"{gap} above {report.label(second)}{note}" if gap else f"before {report.label(second)}"
        return sentence("win", winners, f" wins, {score}, {lead}")
    names = winners if len(winners) <= 3 else []
    many = "" if names else f"{len(winners)} of {len(values)} methods"
    wins = f"{many} {'wins' if len(winners) == 1 else 'win'}, {score}"
    if ours is None:
        own = _OURS in report.ordinary
        return sentence("loss" if own else "open", names, wins + (f"; {_OURS} does not reach it" if own else ""))
    gap, note = _gap(metric, best, values[ours])
    behind = f"by {gap}{note}" if gap else f"with {_score(metric, values[ours])}"
    return sentence("loss", names, f"{wins}; {report.label(ours)} loses {behind}")


def _score(metric: Metric, value: Value) -> str:
    if math.isinf(value.mean):
        return "identical to dense"
    return f"{metric.text(value.mean)}{' ' + metric.unit if metric.unit else ''}"


def _gap(metric: Metric, best: Value, other: Value) -> tuple[str, str]:
    """How far the best is above another and what to say of it; nothing where the best is identical to dense."""
    if math.isinf(best.mean):
        return "", ""
    gap = best.mean - other.mean
    small = gap < max(best.spread or 0, other.spread or 0)
    return _score(metric, Value(gap)), " (less than the spread)" if small else ""
