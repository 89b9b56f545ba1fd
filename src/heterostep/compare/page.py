"""The comparison as one file: `results.json` and the videos that it names -> `index.html`, which needs no network.

`docs/compare.md` describes every key of `results.json`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from heterostep.compare.chart import (
    AXES,
    CAPTION,
    EVALUATIONS,
    LPIPS,
    METRICS,
    MOTION,
    PSNR,
    RUNTIME,
    SSIM,
    VBENCH,
    Chart,
    Metric,
    Value,
    marker,
)
from heterostep.compare.style import SCRIPT, STYLE
from heterostep.compare.summary import IDENTICAL_DB
from heterostep.errors import HeterostepError
from heterostep.files import replacing

SCHEMA = 3
Record = dict[str, Any]
_OURS = "heterostep"
_MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png"}
_PLOTS = (PSNR, SSIM, CAPTION, MOTION, LPIPS, VBENCH)


_CAPTION_PARTS = ("colour", "direction", "kind", "background")


def write_page(folder: Path) -> Path:
    """Write `index.html` from `results.json` in a folder, and return its path.

    A video that is named but not there is noted on the page.

    Raises:
        HeterostepError: `results.json` is of another schema, or no JSON.
        OSError: `results.json` cannot be read, or the page cannot be written.
    """
    folder = Path(folder)
    source = folder / "results.json"
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise HeterostepError(f"{source} is no JSON: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise HeterostepError(f"{source} has schema {schema}, and this heterostep reads schema {SCHEMA}")
    page = folder / "index.html"
    html = _Report(data, folder).html()
    with replacing(page) as part:
        part.write_text(html, encoding="utf-8", newline="\n")
    return page


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _value(entry: Any) -> Value | None:
    """A mean with its spread, or a bare number."""
    if isinstance(entry, dict):
        mean = _number(entry.get("mean"))
        return None if mean is None else Value(mean, _number(entry.get("spread")))
    mean = _number(entry)
    return None if mean is None else Value(mean)


def _metric_value(metric: Metric, entry: Any) -> Value | None:
    """A curve's or frontier row's entry; a PSNR of videos identical to dense is infinite."""
    value = _value(entry)
    if metric is PSNR and (value is None or value.mean >= IDENTICAL_DB):
        return Value(math.inf)
    return value


def _of(values: Iterable[float | None]) -> Value | None:
    """Mean and sample standard deviation of those that are known."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    return Value(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None)


def _caption_part(part: str, record: Record) -> str:
    return _fixed((record.get("caption") or {}).get(part), 2)


def _caption_score(record: Record) -> float | None:
    parts = [_number((record.get("caption") or {}).get(part)) for part in _CAPTION_PARTS]
    known = [part for part in parts if part is not None]
    return statistics.mean(known) if known else None


def _vbench_part(part: str, record: Record) -> str:
    return _fixed((record.get("vbench") or {}).get(part), 4)


def _vbench_score(record: Record) -> float | None:
    known = [score for value in (record.get("vbench") or {}).values() if (score := _number(value)) is not None]
    return statistics.mean(known) if known else None


def _with_spread(metric: Metric, value: Value | None) -> str:
    if value is None:
        return "–"
    if value.spread is None or math.isinf(value.mean):
        return metric.text(value.mean)
    return f'{metric.text(value.mean)} <span class="spread">± {value.spread:.{metric.digits}f}</span>'


def _plain(value: Any) -> str:
    """A setting or a version, for people."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reason(method: Record) -> str:
    return str(method.get("reason") or "no reason was given")


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _table(label: str, head: list[str], bodies: list[str]) -> str:
    """A table in a box of its own that scrolls sideways, by keyboard too."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{columns}</tr></thead>{''.join(f'<tbody>{body}</tbody>' for body in bodies if body)}"
        f"</table></div>"
    )


def _row(head: str, cells: list[str], kind: str = "") -> str:
    opened = f'<tr class="{kind}">' if kind else "<tr>"
    return f'{opened}<th scope="row">{head}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


class _Report:
    """What is in `results.json`, section by section."""

    def __init__(self, data: Record, folder: Path) -> None:
        self.data = data
        self.folder = folder
        self.prompts: list[Record] = data.get("prompts") or []
        self.settings: Record = data.get("settings") or {}
        # What the asked runtimes are of: a batch's seconds are not a video's.
        self.cost = str(self.settings.get("cost") or RUNTIME)
        self.axis = AXES[self.cost].split(",")[0]
        self._budget = "runtime" if self.cost == RUNTIME else f"share of {self.axis}"
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
        self.series = {name: i for i, name in enumerate(self.ordinary + self.diagnostic)}
        self.metrics = [metric for metric in METRICS if metric is PSNR or self._is_present(metric)]

    def _is_present(self, metric: Metric) -> bool:
        entries = [point.get(metric.key) for points in self.curves.values() for point in points]
        entries += [row.get(metric.key) for at in self.frontier for row in at["rows"]]
        return any(_value(entry) is not None for entry in entries)

    def _label(self, name: str) -> str:
        return escape(str(self.methods.get(name, {}).get("label") or name))

    def _mark(self, name: str) -> str:
        """A method's line and marker, as in the plots."""
        index = self.series.get(name)
        if index is None:
            return ""
        kind = " diagnostic" if name in self.diagnostic else ""
        return (
            f'<svg class="mark s{index % 8}{kind}" viewBox="0 0 34 16" aria-hidden="true">'
            f'<path class="line" d="M1 8H33"/>{marker(index, 17, 8)}</svg>'
        )

    def _named(self, name: str) -> str:
        return f'<div class="named">{self._mark(name)}<span>{self._label(name)}{self._batched(name)}</span></div>'

    def _batched(self, name: str) -> str:
        """What is to be known of a method in a batch."""
        whole = self.batch > 1 and self.methods.get(name, {}).get("whole_batch")
        return f"<small>decides for the whole batch of {self.batch}</small>" if whole else ""

    def html(self) -> str:
        model = escape(str(self.settings.get("model", "")))
        script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        # Nothing may be fetched, and no script but the one below may run, whatever a prompt says.
        policy = (
            "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"
        )
        # A style sheet can hide the lines that are not ticked; a browser that is too old for that shows them all.
        hide = "".join(f"#plots:has(#show{i}:not(:checked)) .m{i} {{ display:none }}\n" for i in self.series.values())
        sections = [
            ("verdict", "Verdict", self._verdicts()),
            ("plots", "Quality against cost", self._plots()),
            ("tables", f"At each {self._budget}", self._tables()),
            ("videos", "Side by side", self._videos()),
            ("chance", "What chance scores", self._chance()),
            ("run", "The run", self._run()),
            ("numbers", "Every number", self._numbers()),
            ("reading", "How to read this page", self._reading()),
        ]
        shown = [(key, title, body) for key, title, body in sections if body]
        links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
        main = "".join(f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, title, body in shown)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>heterostep compare: {model}</title><style>{STYLE}{hide}</style></head>\n"
            f"<body><header><h1>heterostep compare: {model}</h1>{self._summary()}"
            f'<nav aria-label="Sections">{links}</nav></header>\n<main>{main}</main>\n'
            f"<script>{SCRIPT}</script></body></html>\n"
        )

    def _summary(self) -> str:
        get = self.settings.get
        mode = {"text": "text-to-video", "image": "image-to-video"}.get(str(get("mode")), str(get("mode")))
        seeds = int(get("seeds") or 1)
        count = len(self.prompts) // seeds
        words = [
            mode,
            f"{get('width')} x {get('height')} pixels, {get('num_frames')} frames",
            f"{get('num_inference_steps')} steps",
            f"{count} prompt{'s' if count != 1 else ''}" + (f" x {seeds} seeds" if seeds > 1 else ""),
        ]
        seconds = [s for record in self.dense for s in record.get("seconds") or []]
        if seconds:
            words.append(f"dense takes {statistics.median(seconds):.3g} s in the denoising loop")
        html = f'<p class="summary">{escape("; ".join(words))}.</p>'
        if self.cost == EVALUATIONS:
            html += (
                f'<p class="summary">Wall-clock was not measured: prompts ran {self.batch} at a time, so that cost is '
                "token evaluations throughout.</p>"
            )
        if not self.data.get("complete"):
            html += (
                '<p class="warning"><strong>Incomplete.</strong> The run has not finished, or was stopped: what is '
                "shown is what was measured until then.</p>"
            )
        return html

    # Verdicts and tables

    def _rows(self, at: Record, metric: Metric) -> dict[str, Value]:
        """The values at an asked runtime of the methods that reach it, by name; diagnostic ones left out."""
        found = {}
        for row in at["rows"]:
            value = self._cell(row, at["runtime"], metric)
            if value is not None and row["method"] not in self.diagnostic:
                found[row["method"]] = value
        return found

    def _cell(self, row: Record, runtime: float, metric: Metric) -> Value | None:
        if not row.get("reached"):
            return None
        value = _metric_value(metric, row.get(metric.key))
        if value is not None and value.spread is None and math.isfinite(value.mean):
            value = Value(value.mean, self._spread_at(row["method"], runtime, metric))
        return value

    def _spread_at(self, name: str, runtime: float, metric: Metric) -> float | None:
        """The spread of a method's points, linear in their cost between them; its nearest point's outside of them."""
        known = []
        for point in self.curves.get(name, []):
            x, y = _value(point.get(self.cost)), _value(point.get(metric.key))
            if x is not None and y is not None and y.spread is not None:
                known.append((x.mean, y.spread))
        known.sort()
        if not known:
            return None
        for (x0, y0), (x1, y1) in zip(known, known[1:]):
            if x0 <= runtime <= x1:
                return y0 if x0 == x1 else y0 + (y1 - y0) * (runtime - x0) / (x1 - x0)
        return min(known, key=lambda pair: abs(pair[0] - runtime))[1]

    def _winners(self, at: Record, metric: Metric) -> list[str]:
        """The methods to mark as best: the winner, and whoever cannot be told from it at the digits shown."""
        values = self._rows(at, metric)
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

    def _verdicts(self) -> str:
        items = []
        for at in self.frontier:
            parts = [self._verdict(at, PSNR)]
            if CAPTION in self.metrics:
                parts.append(self._verdict(at, CAPTION))
            no_more = "takes no longer" if self.cost == RUNTIME else "spends no more"
            note = f" <small>(dense itself {no_more})</small>" if at["runtime"] >= 1 else ""
            head = f'<strong class="runtime">At {at["runtime"]:g} of dense\'s {self.axis}{note}</strong>'
            items.append(f"<li>{head} {' '.join(parts)}</li>")
        return f'<ul class="verdicts">{"".join(items)}</ul>' if items else ""

    def _verdict(self, at: Record, metric: Metric) -> str:
        """One metric at one runtime in one sentence: who wins, and by how much heterostep wins or loses."""
        by = {PSNR.key: "PSNR", CAPTION.key: "Caption score"}[metric.key]
        values, winners = self._rows(at, metric), self._winners(at, metric)
        own = _OURS in self.ordinary
        ours = _OURS if _OURS in values else None
        if not winners:
            return f'<span class="open">{by}: no method reaches it.</span>'
        best = values[winners[0]]
        score = self._score(metric, best)
        names = _list([f"<b>{self._label(name)}</b>" for name in winners])
        if ours in winners and len(winners) > 1:
            if len(winners) > 3:
                names = f"<b>{self._label(_OURS)}</b> and {len(winners) - 1} of {len(values) - 1} others"
            return f'<span class="tie">{by}: level, {score}: {names}.</span>'
        if ours in winners:
            others = [name for name in values if name != ours]
            if not others:
                return f'<span class="win">{by}: {names} alone reaches it, {score}.</span>'
            second = max(others, key=lambda name: values[name].mean)
            gap, note = self._gap(metric, best, values[second])
            lead = f"{gap} above {self._label(second)}{note}" if gap else f"before {self._label(second)}"
            return f'<span class="win">{by}: {names} wins, {score}, {lead}.</span>'
        if len(winners) > 3:
            names = f"{len(winners)} of {len(values)} methods"
        wins = "wins" if len(winners) == 1 else "win"
        if ours is None:
            kind = "loss" if own else "open"
            missed = f"; {_OURS} does not reach it" if own else ""
            return f'<span class="{kind}">{by}: {names} {wins}, {score}{missed}.</span>'
        gap, note = self._gap(metric, best, values[ours])
        behind = f"by {gap}{note}" if gap else f"with {self._score(metric, values[ours])}"
        return f'<span class="loss">{by}: {names} {wins}, {score}; {self._label(ours)} loses {behind}.</span>'

    @staticmethod
    def _score(metric: Metric, value: Value) -> str:
        if math.isinf(value.mean):
            return "identical to dense"
        return f"{metric.text(value.mean)}{' ' + metric.unit if metric.unit else ''}"

    @classmethod
    def _gap(cls, metric: Metric, best: Value, other: Value) -> tuple[str, str]:
        """How far the best is above another and what to say of it; nothing where the best is identical to dense."""
        if math.isinf(best.mean):
            return "", ""
        gap = best.mean - other.mean
        small = gap < max(best.spread or 0, other.spread or 0)
        return cls._score(metric, Value(gap)), " (less than the spread)" if small else ""

    def _tables(self) -> str:
        return "".join(
            f"<h3>{at['runtime']:g} of dense's {self.axis}</h3>{self._frontier_table(at)}" for at in self.frontier
        )

    def _frontier_table(self, at: Record) -> str:
        winners = {metric.key: self._winners(at, metric) for metric in self.metrics if metric.key in at["winners"]}
        rows = {row["method"]: row for row in at["rows"]}
        names = list(dict.fromkeys([*self.ordinary, *(n for n in rows if n not in self.diagnostic)]))
        reached = self._rows(at, PSNR)
        # Of equals the one named first; those that were not reached last.
        names.sort(key=lambda name: -reached[name].mean if name in reached else math.inf)
        head = ["Method", *(f"{m.heading}<small>{m.direction}</small>" for m in self.metrics), "How it was found"]
        bodies = ["".join(self._frontier_row(name, rows.get(name), at["runtime"], winners) for name in names)]
        if self.dense:
            cells = [_with_spread(metric, self._dense_value(metric)) for metric in self.metrics]
            bodies[0] += _row("dense, for reference", [*cells, f"at {self.axis} 1"], "reference")
        if self.diagnostic:
            group = f'<th scope="rowgroup" colspan="{len(head)}">Diagnostic: bounds, not results</th>'
            found = [self._frontier_row(name, rows.get(name), at["runtime"], {}) for name in self.diagnostic]
            bodies.append(f'<tr class="group">{group}</tr>{"".join(found)}')
        absent = [method for method in self.methods.values() if method["status"] != "ran"]
        bodies.append(
            "".join(
                self._unmeasured(self._named(method["name"]), f"{method['status']}: {escape(_reason(method))}")
                for method in absent
            )
        )
        return _table(f"Methods at {at['runtime']:g} of dense's {self.axis}", head, bodies)

    def _frontier_row(self, name: str, row: Record | None, runtime: float, winners: dict[str, list[str]]) -> str:
        head = self._named(name)
        if row is None or not row.get("reached"):
            reason = self.methods.get(name, {}).get("reason")
            return self._unmeasured(head, f"not reached{self._range(name)}" + (f"; {escape(reason)}" if reason else ""))
        cells = []
        for metric in self.metrics:
            text = _with_spread(metric, self._cell(row, runtime, metric))
            best = name in winners.get(metric.key, [])
            cells.append(f'<strong class="best">{text} <span class="badge">best</span></strong>' if best else text)
        means = self._costs(name)
        found = "interpolated" if row.get("interpolated") else "measured"
        if means and runtime > 1.01 * max(means):
            found = f"its {'slowest' if self.cost == RUNTIME else 'dearest'} point, at {max(means):.2f}"
        return _row(head, [*cells, found])

    def _unmeasured(self, head: str, why: str) -> str:
        span = len(self.metrics) + 1
        return f'<tr class="absent"><th scope="row">{head}</th><td colspan="{span}"><div>{why}</div></td></tr>'

    def _range(self, name: str) -> str:
        means = self._costs(name)
        return f" (its points: {min(means):.2f} to {max(means):.2f})" if means else ""

    def _costs(self, name: str) -> list[float]:
        return [x.mean for p in self.curves.get(name, []) if (x := _value(p.get(self.cost))) is not None]

    # Plots

    def _plots(self) -> str:
        shown = [name for name in [*self.ordinary, *self.diagnostic] if self.curves.get(name)]
        if not shown:
            return ""
        bound = " (diagnostic: a bound, not a result)"
        key = "".join(
            f'<li><label><input type="checkbox" id="show{self.series[name]}" checked> {self._mark(name)} '
            f"<span><b>{self._label(name)}</b>{bound if name in self.diagnostic else ''}"
            f"<small>{escape(str(self.methods[name].get('dial') or ''))}</small>{self._batched(name)}"
            "</span></label></li>"
            for name in shown
        )
        plots = [(self.cost, metric) for metric in _PLOTS if metric in self.metrics]
        if self.cost == RUNTIME:
            plots.insert(1, (EVALUATIONS, PSNR))
        figures = "".join(self._figure(x_key, metric, shown) for x_key, metric in plots)
        return (
            f'<ul class="key">{key}</ul><div class="figures">{figures}</div>'
            "<p>A point is the mean over prompts at one setting of a method's dial, its whiskers the standard "
            "deviation. Further left is cheaper.</p>"
        )

    def _figure(self, x_key: str, metric: Metric, names: list[str]) -> str:
        chart = Chart(x_key, metric)
        for name in names:
            points = [(_value(p.get(x_key)), _metric_value(metric, p.get(metric.key))) for p in self.curves[name]]
            chart.add(name, self._label(name), self.series[name], name in self.diagnostic, points)
        dense = self._dense_value(metric)
        chart.dense = dense.mean if dense else None
        chance = _of(_record_value(metric, r, self.dense) for r in self.chance)
        chart.chance = chance.mean if chance and metric in (PSNR, SSIM, LPIPS) else None
        chart.asked = [at["runtime"] for at in self.frontier] if x_key == self.cost else []
        svg, notes = chart.svg()
        legend = "".join(f"<li class='m{self.series[name]}'>{self._mark(name)} {escape(name)}</li>" for name in names)
        note = f" {' '.join(notes)}" if notes else ""
        return (
            f"<figure><h3>{metric.name} against {AXES[x_key].split(',')[0]}</h3>{svg}<figcaption>"
            f"<p>{metric.direction.capitalize()}.{note}</p>"
            f'<ul class="legend" aria-hidden="true">{legend}</ul></figcaption></figure>'
        )

    def _dense_value(self, metric: Metric) -> Value | None:
        if metric.dense is not None:
            return Value(metric.dense)
        return _of(_record_value(metric, record, self.dense) for record in self.dense)

    # Videos

    def _videos(self) -> str:
        kept = [record for record in self.generations if record.get("video")]
        target = self._shown_runtime(kept)
        html = ""
        for index, prompt in enumerate(self.prompts[: self.settings.get("shown")]):
            tiles = [self._tile(r, index) for r in self.dense if r["prompt"] == index and r.get("video")]
            heat = []
            for name in [*self.ordinary, *self.diagnostic]:
                own = [r for r in kept if r["prompt"] == index and r["method"] == name]
                if not own:
                    continue
                record = min(own, key=lambda r: abs((_number(r.get(self.cost)) or 0) - (target or 0)))
                tiles.append(self._tile(record, index))
                if record.get("heatmap"):
                    heat.append(self._heat(record, index))
            if not tiles:
                continue
            tiles += [self._tile(r, index, "dense, another seed") for r in self.chance if r["prompt"] == index][:1]
            html += (
                f'<article class="clips"><h3>Prompt {index + 1}</h3><blockquote>{escape(str(prompt["prompt"]))}'
                f'</blockquote><p class="controls"><span>Seed {escape(str(prompt["seed"]))}</span>'
                '<button type="button" hidden>Play all in step</button>'
                '<input type="range" min="0" max="1" step="any" value="0" aria-label="Moment, all videos" hidden></p>'
                f'<div class="tiles">{"".join(tiles)}</div>{self._heats(heat)}</article>'
            )
        if not html:
            return ""
        where = f" The methods' videos are those nearest to {target:g} of dense's {self.axis}." if target else ""
        return f"<p>Dense and every method from the same noise.{where}</p>{html}"

    def _shown_runtime(self, kept: list[Record]) -> float | None:
        """The asked cost that the kept videos are about."""
        runtimes = [r for record in kept if (r := _number(record.get(self.cost))) is not None]
        asked = [at["runtime"] for at in self.frontier] or list(self.settings.get("runtimes") or [])
        if not runtimes or not asked:
            return None
        middle = statistics.median(runtimes)
        return min(asked, key=lambda runtime: abs(runtime - middle))

    def _tile(self, record: Record, index: int, label: str | None = None) -> str:
        if label is not None and not record.get("video"):
            return ""
        dense = record["method"] == "dense"
        title = label or ("dense" if dense else self._label(record["method"]))
        facts = []
        if not dense and label is None:
            facts.append(f"{self.axis} {_plain(_number(record.get(self.cost)) and round(record[self.cost], 2))}")
        if not dense or label:
            psnr = _record_value(PSNR, record, self.dense)
            facts.append("identical to dense" if psnr is None else f"{psnr:.1f} dB to dense")
        score = _caption_score(record)
        if score is not None:
            facts.append(f"caption score {score:.2f}")
        if not dense and label is None:
            dial = self.methods.get(record["method"], {}).get("dial")
            facts.append(f"{escape(str(dial or 'dial'))}: {record['value']:g}")
        media = self._media(record["video"], f"Video of prompt {index + 1} by {title}")
        return f"<figure>{media}<figcaption><b>{title}</b><small>{'<br>'.join(facts)}</small></figcaption></figure>"

    def _heat(self, record: Record, index: int) -> str:
        label = self._label(record["method"])
        media = self._media(
            record["heatmap"], f"Map of the evaluations that each token of prompt {index + 1} got, {label}"
        )
        return (
            f'<figure class="heat">{media}<figcaption>Where <b>{label}</b> spent its evaluations: '
            "dark few, bright many.</figcaption></figure>"
        )

    @staticmethod
    def _heats(heat: list[str]) -> str:
        """The first heat map, which is heterostep's, and the others folded away."""
        rest = (
            f"<details><summary>The same of {len(heat) - 1} more</summary>{''.join(heat[1:])}</details>"
            if heat[1:]
            else ""
        )
        return "".join(heat[:1]) + rest

    def _media(self, name: str, alt: str) -> str:
        """A video or picture, inlined; `alt` is HTML already."""
        path = (self.folder / name).resolve()
        kind = _MEDIA_TYPES.get(path.suffix.lower())
        # A page that was sent to somebody must not carry files from elsewhere on the machine.
        if kind is None or not path.is_relative_to(self.folder.resolve()) or not path.is_file():
            return f'<p class="missing">{alt}: {escape(name)} is not there.</p>'
        data = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        if kind == "image/png":
            return f'<img src="{data}" alt="{alt}">'
        return f'<video src="{data}" aria-label="{alt}" controls loop muted playsinline preload="auto"></video>'

    # The rest

    def _chance(self) -> str:
        if not self.chance:
            return ""
        rows = []
        for metric in self.metrics:
            second = _of(_record_value(metric, r, self.dense) for r in self.chance)
            if second is None:
                continue
            reference = _with_spread(metric, self._dense_value(metric))
            rows.append(
                _row(f"{metric.heading}<small>{metric.direction}</small>", [reference, _with_spread(metric, second)])
            )
        table = _table("Dense against a second seed", ["Metric", "dense", "dense, another seed"], ["".join(rows)])
        return (
            "<p>The same prompts, dense, from other noise: two videos that are equally good and have nothing else in "
            "common. A method that scores no better than this against dense has kept the prompt and lost the video.</p>"
            f"{table}"
        )

    def _run(self) -> str:
        blocks = []
        # The cost is said at the top, and one at a time goes without saying.
        unsaid = {"cost", *(key for key in ("batch", "seeds") if self.settings.get(key) == 1)}
        for title, entries in (
            ("Machine", self.data.get("machine")),
            ("Versions", self.data.get("versions")),
            ("Settings", self.settings),
        ):
            pairs = "".join(
                f"<div><dt>{escape(self._key(key))}</dt><dd>{escape(_plain(value))}</dd></div>"
                for key, value in (entries or {}).items()
                if key not in unsaid
            )
            blocks.append(f"<div><h3>{title}</h3><dl>{pairs}</dl></div>")
        failed = "".join(
            f"<li>{self._label(each['method'])}, {each['value']:g}: {escape(str(each['reason']))}</li>"
            for each in (self.data.get("vbench") or {}).get("failed") or []
        )
        prompts = "".join(
            f"<li>{escape(str(p['prompt']))} <small>seed {escape(str(p['seed']))}</small></li>" for p in self.prompts
        )
        command = self.data.get("command") or ""
        command = shlex.join(command) if isinstance(command, list) else str(command)
        return (
            f'<h3>Command</h3><pre tabindex="0"><code>{escape(command)}</code></pre>'
            f'<div class="facts">{"".join(blocks)}</div><h3>Prompts</h3><ol class="prompts">{prompts}</ol>'
            f"{f'<h3>Without scores by VBench</h3><ul>{failed}</ul>' if failed else ''}"
        )

    def _key(self, key: str) -> str:
        """What a setting is called."""
        return f"{self.axis} asked" if key == "runtimes" and self.cost != RUNTIME else key.replace("_", " ")

    def _numbers(self) -> str:
        """Every record, folded away: also what the plots say, for those who cannot see them."""
        records = [*self.dense, *self.generations, *self.chance]
        if not records:
            return ""
        peak = any(r.get("peak_bytes") for r in records)
        columns: list[tuple[str, Callable[[Record], str]]] = [
            ("Prompt", lambda r: str(r["prompt"] + 1)),
            ("Dial", lambda r: f"{r['value']:g}"),
        ]
        if self.cost == RUNTIME:
            columns += [
                ("Seconds", lambda r: ", ".join(f"{s:.3g}" for s in r.get("seconds") or [])),
                ("Runtime, dense = 1", lambda r: _fixed(r.get("runtime"), 3)),
            ]
        columns.append(("Evaluations, dense = 1", lambda r: _fixed(r.get("evaluations"), 3)))
        if peak:
            columns.append(
                ("Peak memory, MiB", lambda r: _fixed((_number(r.get("peak_bytes")) or math.nan) / 2**20, 0))
            )
        columns.append((PSNR.heading, lambda r: _fixed(r.get("psnr"), 2) if r.get("psnr") is not None else "identical"))
        columns.append((SSIM.heading, lambda r: _fixed(r.get("ssim"), 4)))
        if LPIPS in self.metrics:
            columns.append((LPIPS.heading, lambda r: _fixed(r.get("lpips"), 4)))
        if any(r.get("caption") for r in records):
            columns += [(f"Caption: {part}", partial(_caption_part, part)) for part in _CAPTION_PARTS]
        if any(r.get("displacement") is not None for r in records):
            columns.append(("Displacement, px", lambda r: _fixed(r.get("displacement"), 1)))
        if any(r.get("flicker") is not None for r in records):
            columns.append(("Flicker, grey levels", lambda r: _fixed(r.get("flicker"), 2)))
        for name in dict.fromkeys(name for r in records for name in r.get("vbench") or {}):
            columns.append((f"VBench: {name.replace('_', ' ')}", partial(_vbench_part, name)))
        chance = {id(record) for record in self.chance}
        rows = [
            _row(
                "dense, another seed" if id(r) in chance else self._label(r["method"]),
                [escape(write(r)) for _, write in columns],
            )
            for r in records
        ]
        table = _table("Every generation", ["Method", *(title for title, _ in columns)], ["".join(rows)])
        return f"<details><summary>All {len(records)} generations</summary>{table}</details>"

    def _reading(self) -> str:
        batched = (
            f" Prompts ran {self.batch} at a time, and a batch's seconds are not a video's, so no wall-clock was "
            "measured."
        )
        if self.cost == RUNTIME:
            ends, cheap = "A method that is done sooner has its slowest point;", "fast"
        else:
            ends, cheap = "A method that always spends less has its dearest point;", "cheap"
        runtime = (
            "<b>Runtime</b> is the median time of the denoising loop over dense's on the same machine, in the same "
            "process; text encoding and decoding are not in it. "
        )
        items = [
            f"{runtime if self.cost == RUNTIME else ''}<b>Token evaluations</b> count how often the transformer "
            "evaluated a token, over dense's: they do not depend on the machine and know no overhead."
            f"{'' if self.cost == RUNTIME else batched}",
            "<b>PSNR</b> and <b>SSIM</b> say how near a video is to dense's from the same noise: whether it is the "
            "same video, not whether it is a good one. “Identical” means bit for bit.",
        ]
        if LPIPS in self.metrics:
            items.append("<b>LPIPS</b> is the distance of the two videos in a network's features.")
        if CAPTION in self.metrics:
            items.append(
                "The <b>caption score</b> (0 to 1) is the share of what the caption says that classical vision finds "
                "in the video: colours, directions, kinds, background. It does not look at dense's video, so a "
                "method may score above dense."
            )
        if MOTION in self.metrics:
            items.append(
                "<b>Motion distance</b> is how far the shapes' displacement is from dense's, as a share of it: 0 moves "
                "as far, 1 stands still or goes twice as far. A frozen video can have a good PSNR; here it shows."
            )
        if VBENCH in self.metrics:
            items.append(
                "<b>VBench</b> is the mean of what VBench gives for any video: consistency of subject and background, "
                "smoothness of motion, whether much moves, and aesthetic and imaging quality; each 0 to 1. It does not "
                "look at dense's video, nor at the prompt."
            )
        items += [
            "<b>±</b> is the standard deviation over prompts. Prompts often differ more than methods do on one prompt, "
            "so a gap below it can still be real; it can also be luck. With few prompts, believe large gaps only.",
            f"At an asked {self._budget} a method is <b>measured</b> where one of its points lies there, else "
            "<b>interpolated</b> between its two neighbouring points, and so is its spread. "
            f"{ends} one that cannot be made so {cheap} has <b>not reached</b> it.",
            "<b>Best</b> is marked on every method that cannot be told from the winner at the digits shown. "
            "<b>Diagnostic</b> methods spend more than they save, to show a bound: they stand at the "
            "budget that they were set to, whatever they cost, and never win.",
        ]
        if self.batch > 1 and any(method.get("whole_batch") for method in self.methods.values()):
            items.append(
                "A method that <b>decides for the whole batch</b> skips for all of its prompts or for none; one prompt "
                "at a time it might do better or worse."
            )
        return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _record_value(metric: Metric, record: Record, dense: list[Record]) -> float | None:
    """A metric of one generation; the motion distance is taken to the same prompt's dense record."""
    if metric is CAPTION:
        return _caption_score(record)
    if metric is VBENCH:
        return _vbench_score(record)
    if metric is not MOTION:
        return _number(record.get(metric.key))
    own = _number(record.get("displacement"))
    base = next((_number(r.get("displacement")) for r in dense if r["prompt"] == record["prompt"]), None)
    return abs(own / base - 1) if own is not None and base else None


def _fixed(value: Any, digits: int) -> str:
    number = _number(value)
    return "–" if number is None else f"{number:.{digits}f}"
