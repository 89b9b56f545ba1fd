"""The comparison as one file: `results.json` and the videos that it names -> `index.html`, which needs no network.

`docs/reference/results.md` describes every key of `results.json`. Here is what the page says, and in which order;
`page.html.jinja` has its HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from heterostep.compare.chart import (
    AXES,
    CAPTION,
    EVALUATIONS,
    LPIPS,
    MOTION,
    PSNR,
    RUNTIME,
    SSIM,
    VBENCH,
    VMAF,
    Chart,
    Metric,
    Value,
    marker,
)
from heterostep.compare.page_data import CAPTION_PARTS, Record, Report, metric_value, number, value_of, verdict
from heterostep.compare.style import SCRIPT, STYLE
from heterostep.compare.summary import unsteady
from heterostep.errors import HeterostepError
from heterostep.files import replacing

SCHEMA = 3
_MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png"}
_PLOTS = (PSNR, SSIM, VMAF, CAPTION, MOTION, LPIPS, VBENCH)


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
        raise HeterostepError(f"{source} is not valid JSON: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise HeterostepError(f"{source} has schema {schema}, and this heterostep reads schema {SCHEMA}")
    page = folder / "index.html"
    html = _html(Report(data), folder)
    with replacing(page) as part:
        part.write_text(html, encoding="utf-8", newline="\n")
    return page


def _html(report: Report, folder: Path) -> str:
    import jinja2

    budget = "runtime" if report.cost == RUNTIME else f"share of {report.axis}"
    target, clips = _clips(report, folder)
    shown = [name for name in report.series if report.curves.get(name)]
    records = [*report.dense, *report.generations, *report.chance]
    sections = [
        ("verdict", "Verdict", report.frontier),
        ("plots", "Quality against cost", shown),
        ("tables", f"At each {budget}", report.frontier),
        ("videos", "Side by side", clips),
        ("chance", "What chance scores", report.chance),
        ("run", "The run", True),
        ("numbers", "Every number", records),
        ("reading", "How to read this page", True),
    ]
    template = (Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(template).render(
        style=STYLE,
        script=SCRIPT,
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
        marker=marker,
        titles={key: title for key, title, content in sections if content},
        model=report.settings.get("model", ""),
        summary=_summary(report),
        complete=report.data.get("complete"),
        unsteady=unsteady(report.chance),
        timed=report.cost == RUNTIME,
        axis=report.axis,
        budget=budget,
        batch=report.batch,
        whole_batches=report.batch > 1 and any(method.get("whole_batch") for method in report.methods.values()),
        metrics=report.metrics,
        measured=[metric.key for metric in report.metrics],
        series=report.series.values(),
        verdicts=_verdicts(report),
        shown=[_method(report, name) for name in shown],
        figures=_figures(report, shown),
        tables=[_table(report, at) for at in report.frontier],
        target=f"{target:g}" if target else None,
        clips=clips,
        chance=_chance(report),
        command=_command(report),
        facts=_facts(report),
        prompts=report.prompts,
        unscored=_unscored(report),
        numbers=_numbers(report, records),
    )


def _method(report: Report, name: str) -> Record:
    """How a method is named: its label, and its line and marker as in the plots."""
    method = report.methods.get(name, {})
    return {
        "name": name,
        "label": report.label(name),
        "dial": method.get("dial") or "",
        "index": report.series.get(name),
        "diagnostic": name in report.diagnostic,
        "whole_batch": report.batch > 1 and method.get("whole_batch"),
    }


def _figure(metric: Metric, value: Value | None) -> Record:
    """A value and its spread, as they are written."""
    spread = None
    if value is not None and value.spread is not None and math.isfinite(value.mean):
        spread = f"{value.spread:.{metric.digits}f}"
    return {"text": metric.text(value.mean if value else None), "spread": spread}


def _fixed(value: Any, digits: int) -> str:
    known = number(value)
    return "–" if known is None else f"{known:.{digits}f}"


def _plain(value: Any) -> str:
    """A setting or a version, for people."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _summary(report: Report) -> str:
    get = report.settings.get
    mode = {"text": "text-to-video", "image": "image-to-video"}.get(str(get("mode")), str(get("mode")))
    seeds = int(get("seeds") or 1)
    count = len(report.prompts) // seeds
    words = [
        mode,
        f"{get('width')} x {get('height')} pixels, {get('num_frames')} frames",
        f"{get('num_inference_steps')} steps",
        f"{count} prompt{'s' if count != 1 else ''}" + (f" x {seeds} seeds" if seeds > 1 else ""),
    ]
    seconds = [s for record in report.dense for s in record.get("seconds") or []]
    if seconds:
        words.append(f"dense takes {statistics.median(seconds):.3g} s in the denoising loop")
    return "; ".join(words)


# Verdicts and tables


def _verdicts(report: Report) -> list[Record]:
    asked = [PSNR, CAPTION] if CAPTION in report.metrics else [PSNR]
    return [
        {
            "at": f"{at['runtime']:g}",
            "of_dense": at["runtime"] >= 1,
            "sentences": [verdict(report, at, metric) for metric in asked],
        }
        for at in report.frontier
    ]


def _table(report: Report, at: Record) -> Record:
    """What each method reaches at an asked cost."""
    winners = {metric.key: report.winners(at, metric) for metric in report.metrics if metric.key in at["winners"]}
    rows = {row["method"]: row for row in at["rows"]}
    names = list(dict.fromkeys([*report.ordinary, *(n for n in rows if n not in report.diagnostic)]))
    reached = report.reached(at, PSNR)
    # Of equals the one named first; those that were not reached last.
    names.sort(key=lambda name: -reached[name].mean if name in reached else math.inf)
    row = partial(_table_row, report, at["runtime"])
    absent = [method for method in report.methods.values() if method["status"] != "ran"]
    return {
        "at": f"{at['runtime']:g}",
        "rows": [row(name, rows.get(name), winners) for name in names],
        "dense": [_figure(metric, report.of_dense(metric)) for metric in report.metrics] if report.dense else None,
        "bounds": [row(name, rows.get(name), {}) for name in report.diagnostic],
        "absent": [
            {
                "method": _method(report, method["name"]),
                "missed": f"{method['status']}: {method.get('reason') or 'no reason was given'}",
            }
            for method in absent
        ],
    }


def _table_row(report: Report, runtime: float, name: str, row: Record | None, winners: dict[str, list[str]]) -> Record:
    """A method's cells and how they were found, or why it is missed."""
    method = _method(report, name)
    costs = report.costs(name)
    if row is None or not row.get("reached"):
        reason = report.methods.get(name, {}).get("reason")
        points = f" (its points: {min(costs):.2f} to {max(costs):.2f})" if costs else ""
        return {"method": method, "missed": f"not reached{points}{f'; {reason}' if reason else ''}"}
    cells = [
        _figure(metric, report.cell(row, runtime, metric)) | {"best": name in winners.get(metric.key, [])}
        for metric in report.metrics
    ]
    found = "interpolated" if row.get("interpolated") else "measured"
    if costs and runtime > 1.01 * max(costs):
        found = f"its {'slowest' if report.cost == RUNTIME else 'dearest'} point, at {max(costs):.2f}"
    return {"method": method, "missed": None, "cells": cells, "found": found}


# Plots


def _figures(report: Report, names: list[str]) -> list[Record]:
    plots = [(report.cost, metric) for metric in _PLOTS if metric in report.metrics]
    if report.cost == RUNTIME:
        plots.insert(1, (EVALUATIONS, PSNR))
    return [_plot(report, x_key, metric, names) for x_key, metric in plots] if names else []


def _plot(report: Report, x_key: str, metric: Metric, names: list[str]) -> Record:
    chart = Chart(x_key, metric)
    for name in names:
        points = [(value_of(p.get(x_key)), metric_value(metric, p.get(metric.key))) for p in report.curves[name]]
        chart.add(name, report.label(name), report.series[name], name in report.diagnostic, points)
    dense, chance = report.of_dense(metric), report.of_chance(metric)
    chart.dense = dense.mean if dense else None
    chart.chance = chance.mean if chance and metric in (PSNR, SSIM, VMAF, LPIPS) else None
    chart.asked = [at["runtime"] for at in report.frontier] if x_key == report.cost else []
    svg, notes = chart.svg()
    title = f"{metric.name} against {AXES[x_key].split(',')[0]}"
    return {"title": title, "svg": svg, "notes": [f"{metric.direction.capitalize()}.", *notes]}


# Videos


def _clips(report: Report, folder: Path) -> tuple[float | None, list[Record]]:
    """The asked cost that the videos are nearest to, and for each prompt its videos side by side."""
    kept = [record for record in report.generations if record.get("video")]
    target = report.shown_cost(kept)
    tile = partial(_tile, report, folder)
    clips = []
    for index, prompt in enumerate(report.prompts[: report.settings.get("shown")]):
        tiles = [tile(r) for r in report.dense if r["prompt"] == index and r.get("video")]
        heat = []
        for name in report.series:
            own = [r for r in kept if r["prompt"] == index and r["method"] == name]
            if not own:
                continue
            record = min(own, key=lambda r: abs((number(r.get(report.cost)) or 0) - (target or 0)))
            tiles.append(tile(record))
            if record.get("heatmap"):
                label = report.label(name)
                alt = f"Map of the evaluations that each token of prompt {index + 1} got, {label}"
                heat.append({"label": label, "media": _media(folder, record["heatmap"], alt)})
        if not tiles:
            continue
        another = next((r for r in report.chance if r["prompt"] == index), {})
        if another.get("video"):
            tiles.append(tile(another, "dense, another seed"))
        clips.append({"number": index + 1, **prompt, "tiles": tiles, "heat": heat})
    return target, clips


def _tile(report: Report, folder: Path, record: Record, label: str | None = None) -> Record:
    dense = record["method"] == "dense"
    ours = not dense and label is None
    title = label or ("dense" if dense else report.label(record["method"]))
    facts = []
    if ours:
        cost = number(record.get(report.cost))
        facts.append(f"{report.axis} {_plain(cost and round(record[report.cost], 2))}")
    if not dense or label:
        psnr = report.of_record(PSNR, record)
        facts.append("identical to dense" if psnr is None else f"{psnr:.1f} dB to dense")
    score = report.caption_score(record)
    if score is not None:
        facts.append(f"caption score {score:.2f}")
    if ours:
        dial = report.methods.get(record["method"], {}).get("dial")
        facts.append(f"{dial or 'dial'}: {record['value']:g}")
    media = _media(folder, record["video"], f"Video of prompt {record['prompt'] + 1} by {title}")
    return {"title": title, "facts": facts, "media": media}


def _media(folder: Path, name: str, alt: str) -> Record:
    """A video or picture, inlined; without `data` where it is not there."""
    path = (folder / name).resolve()
    kind = _MEDIA_TYPES.get(path.suffix.lower())
    media: Record = {"name": name, "alt": alt, "kind": kind, "data": None}
    # A page that was sent to somebody must not carry files from elsewhere on the machine.
    if kind is not None and path.is_relative_to(folder.resolve()) and path.is_file():
        media["data"] = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return media


# The rest


def _chance(report: Report) -> list[Record]:
    scores = [(metric, report.of_chance(metric)) for metric in report.metrics]
    return [
        {"metric": metric, "dense": _figure(metric, report.of_dense(metric)), "another": _figure(metric, value)}
        for metric, value in scores
        if value is not None
    ]


def _command(report: Report) -> str:
    command = report.data.get("command") or ""
    return shlex.join(command) if isinstance(command, list) else str(command)


def _facts(report: Report) -> dict[str, list[tuple[str, str]]]:
    # The cost is said at the top, and one at a time goes without saying.
    unsaid = {"cost", *(key for key in ("batch", "seeds") if report.settings.get(key) == 1)}
    names = {} if report.cost == RUNTIME else {"runtimes": f"{report.axis} asked"}
    blocks = {
        "Machine": report.data.get("machine"),
        "Versions": report.data.get("versions"),
        "Settings": report.settings,
    }
    return {
        title: [
            (names.get(key, key.replace("_", " ")), _plain(value))
            for key, value in (entries or {}).items()
            if key not in unsaid
        ]
        for title, entries in blocks.items()
    }


def _unscored(report: Report) -> list[str]:
    """The evaluations by VBench that failed."""
    failed = (report.data.get("vbench") or {}).get("failed") or []
    return [f"{report.label(each['method'])}, {each['value']:g}: {each['reason']}" for each in failed]


def _numbers(report: Report, records: list[Record]) -> Record:
    """Every record: also what the plots say, for those who cannot see them."""

    def fixed(key: str, digits: int, of: str | None = None) -> Callable[[Record], str]:
        return lambda r: _fixed(((r.get(of) or {}) if of else r).get(key), digits)

    columns: list[tuple[str, Callable[[Record], str]]] = [
        ("Prompt", lambda r: str(r["prompt"] + 1)),
        ("Dial", lambda r: f"{r['value']:g}"),
    ]
    if report.cost == RUNTIME:
        columns.append(("Seconds", lambda r: ", ".join(f"{s:.3g}" for s in r.get("seconds") or [])))
        columns.append(("Runtime, dense = 1", fixed("runtime", 3)))
    columns.append(("Evaluations, dense = 1", fixed("evaluations", 3)))
    if any(r.get("peak_bytes") for r in records):
        columns.append(("Peak memory, MiB", lambda r: _fixed((number(r.get("peak_bytes")) or math.nan) / 2**20, 0)))
    columns.append((PSNR.heading, lambda r: "identical" if r.get("psnr") is None else _fixed(r["psnr"], 2)))
    columns.append((SSIM.heading, fixed("ssim", 4)))
    if VMAF in report.metrics:
        columns.append((VMAF.heading, fixed("vmaf", 2)))
    if LPIPS in report.metrics:
        columns.append((LPIPS.heading, fixed("lpips", 4)))
    if any(r.get("caption") for r in records):
        columns += [(f"Caption: {part}", fixed(part, 2, "caption")) for part in CAPTION_PARTS]
    if any(r.get("displacement") is not None for r in records):
        columns.append(("Displacement, px", fixed("displacement", 1)))
    if any(r.get("flicker") is not None for r in records):
        columns.append(("Flicker, grey levels", fixed("flicker", 2)))
    for name in dict.fromkeys(name for r in records for name in r.get("vbench") or {}):
        columns.append((f"VBench: {name.replace('_', ' ')}", fixed(name, 4, "vbench")))
    chance = {id(record) for record in report.chance}
    return {
        "head": ["Method", *(title for title, _ in columns)],
        "rows": [
            (
                "dense, another seed" if id(r) in chance else report.label(r["method"]),
                [write(r) for _, write in columns],
            )
            for r in records
        ],
    }
