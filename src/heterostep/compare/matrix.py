"""Comparisons in several regimes as one matrix: regime x share, ours, the best peer, fewer steps, HSA as published.

Each regime is a comparison in a folder of its own; the matrix is made of whatever results are there.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heterostep.compare.regimes import REGIMES
from heterostep.compare.summary import IDENTICAL_DB
from heterostep.errors import HeterostepError
from heterostep.files import replacing, writing

OURS, STEPS, HSA = "heterostep", "steps", "hsa"
SHARES = (0.75, 0.5, 0.25)
# Of the captions, those whose videos are worst: one in so many, at least one.
WORST = 10
SCHEMA = 1


def low(values: Sequence[float]) -> float:
    """Mean of the worst tenth."""
    return statistics.mean(sorted(values)[: max(1, len(values) // WORST)])


def _figures(values: Sequence[float]) -> dict[str, float]:
    """Mean, half of its 95 % interval over the captions, and the worst tenth's mean, of PSNRs in dB."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"psnr": statistics.mean(values), "interval": 1.96 * error, "low": low(values)}


def points(results: dict[str, Any], method: str) -> list[dict[str, float]]:
    """A method's settings from dear to cheap: evaluations over dense, and PSNR's figures."""
    by_value: dict[float, list[dict[str, Any]]] = {}
    for record in results["generations"]:
        if record["method"] == method:
            by_value.setdefault(record["value"], []).append(record)
    found = []
    for records in by_value.values():
        values = [IDENTICAL_DB if r["psnr"] is None else min(r["psnr"], IDENTICAL_DB) for r in records]
        found.append({"evaluations": statistics.mean(r["evaluations"] for r in records), **_figures(values)})
    return sorted(found, key=lambda point: -point["evaluations"])


def read_off(curve: Sequence[dict[str, float]], share: float) -> dict[str, Any] | None:
    """A curve at a share of the evaluations, between its neighbours; None where it is dearer throughout."""
    if not curve or curve[-1]["evaluations"] > share * 1.01:
        return None
    names = ("psnr", "interval", "low")
    dearer = [point for point in curve if point["evaluations"] >= share * 0.99]
    cheaper = [point for point in curve if point["evaluations"] <= share * 1.01]
    if not dearer:
        return {name: curve[0][name] for name in names} | {"interpolated": False}
    above, below = dearer[-1], cheaper[0]
    gap = above["evaluations"] - below["evaluations"]
    part = 1.0 if gap <= 1e-9 else min(max((share - below["evaluations"]) / gap, 0.0), 1.0)
    near = abs(above["evaluations"] - share) <= 0.01 * share or gap <= 1e-9
    if near:
        return {name: above[name] for name in names} | {"interpolated": False}
    return {name: part * above[name] + (1 - part) * below[name] for name in names} | {"interpolated": True}


def matrix(results: dict[str, dict[str, Any]], shares: Sequence[float] = SHARES) -> list[dict[str, Any]]:
    """A row for each regime and share.

    Args:
        results: by regime, what a comparison writes (docs/compare.md).
        shares: of the evaluations.

    Returns:
        regime, share, captions; `ours`, `steps` and `hsa` with psnr, interval and low (None where they were not run);
        `peer`, the best cache's, with its name, and `low_peer`, the one whose worst tenth is best; `ahead`, our mean
        less the best of the others, and `low_ahead`, the same of the worst tenth against the best peer's.
    """
    rows = []
    for regime, result in results.items():
        own = {method["name"] for method in result["methods"] if method["diagnostic"]}
        names = [method["name"] for method in result["methods"]]
        peers = [name for name in names if _is_peer(name) and name not in own]
        for share in shares:
            cells = {name: read_off(points(result, name), share) for name in (OURS, STEPS, HSA, *peers)}
            able = {name: found for name in peers if (found := cells[name]) is not None}
            best = max(able, key=lambda name: able[name]["psnr"], default=None)
            best_low = max(able, key=lambda name: able[name]["low"], default=None)
            ours = cells[OURS]
            others = [found["psnr"] for name in (STEPS, HSA, *able) if (found := cells[name]) is not None]
            rows.append(
                {
                    "regime": regime,
                    "share": share,
                    "captions": len(result["prompts"]),
                    "ours": ours,
                    "steps": cells[STEPS],
                    "hsa": cells[HSA],
                    "peer": None if best is None else {"name": best, **able[best]},
                    "low_peer": None if best_low is None else {"name": best_low, "low": able[best_low]["low"]},
                    "ahead": ours["psnr"] - max(others) if ours and others else None,
                    "low_ahead": ours["low"] - able[best_low]["low"] if ours and best_low else None,
                    "not_reached": {
                        name: points(result, name)[-1] for name in peers if cells[name] is None and points(result, name)
                    },
                }
            )
    return rows


def _is_peer(name: str) -> bool:
    from heterostep.compare.own import OWN

    return name not in {method.name for method in OWN}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of a folder's regimes, in the order of `REGIMES`.

    Raises:
        HeterostepError: there are none, or one cannot be read.
    """
    found = {}
    for name in REGIMES:
        for path in (folder / name / "results.json", folder / f"{name}.json.gz"):
            if path.is_file():
                try:
                    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                    found[name] = json.loads(text)
                except (OSError, ValueError) as error:
                    raise HeterostepError(f"{path} cannot be read: {error}") from error
    if not found:
        raise HeterostepError(f"{folder} has no results of any regime yet")
    return found


def write_matrix(folder: Path) -> Path:
    """Write matrix.json, matrix.png and index.html of the regimes whose results are in the folder.

    Returns:
        the page's path.

    Raises:
        HeterostepError: there are no results.
    """
    results = read(folder)
    rows = matrix(results)
    first = next(iter(results.values()))
    about = {"schema": SCHEMA, "mode": first["settings"]["mode"], "machine": first["machine"]}
    about |= {"versions": first["versions"], "complete": {name: each["complete"] for name, each in results.items()}}
    with writing(folder / "matrix.json"), replacing(folder / "matrix.json") as part:
        part.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    with writing(folder / "matrix.png"), replacing(folder / "matrix.png") as part:
        draw(rows, about["mode"], part)
    with writing(folder / "index.html"), replacing(folder / "index.html") as part:
        part.write_text(page(rows, results, about["mode"]))
    return folder / "index.html"


def cell(figures: dict[str, Any] | None) -> str:
    """A mean and its interval, then the worst tenth, as text."""
    if figures is None:
        return "-"
    mark = "~" if figures.get("interpolated") else ""
    return f"{mark}{figures['psnr']:.1f} ± {figures['interval']:.1f} (low {figures['low']:.1f})"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The matrix as a table in Markdown; bold where ours is ahead, by mean or in the worst tenth."""
    lines = [
        "| regime | share | heterostep | best cache | fewer steps | HSA as published |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = cell(row["ours"])
        ours = f"**{ours}**" if (row["ahead"] or 0) > 0 else ours
        peer = "-" if row["peer"] is None else f"{row['peer']['name']} {cell(row['peer'])}"
        lines.append(
            f"| {row['regime']} | {row['share']:g} | {ours} | {peer} | {cell(row['steps'])} | {cell(row['hsa'])} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], mode: str, path: Path) -> None:
    """PSNR of the four by regime, a panel a share."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shares = sorted({row["share"] for row in rows}, reverse=True)
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    size = (5 * len(shares), 1.5 + 0.35 * len(regimes))
    figure, panels = plt.subplots(1, len(shares), figsize=size, layout="constrained", sharey=True, squeeze=False)
    kinds = [("ours", "heterostep", "o", 9), ("peer", "best cache", "s", 6), ("steps", "fewer steps", "^", 6)]
    kinds.append(("hsa", "HSA as published", "d", 6))
    for panel, share in zip(panels[0], shares):
        for number, (key, label, marker, width) in enumerate(kinds):
            shown = [(regimes.index(row["regime"]), row[key]) for row in rows if row["share"] == share and row[key]]
            x, y = [figures["psnr"] for _, figures in shown], [at for at, _ in shown]
            panel.plot(x, y, marker, color=f"C{number}", label=label, markersize=width, zorder=4 - number)
            lows = [figures["low"] for _, figures in shown]
            panel.plot(lows, y, marker, color=f"C{number}", markersize=width * 0.6, fillstyle="none", zorder=4 - number)
        panel.set_title(f"{share:g} of the evaluations")
        panel.set_xlabel("PSNR to dense, dB; hollow: the worst tenth")
        panel.set_yticks(range(len(regimes)), regimes)
        panel.grid(alpha=0.3)
    panels[0][0].invert_yaxis()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(kinds), frameon=False)
    figure.suptitle({"text": "Text-to-video", "image": "Image-to-video"}.get(mode, mode))
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def page(rows: Sequence[dict[str, Any]], results: dict[str, dict[str, Any]], mode: str) -> str:
    """The matrix as a page in HTML."""
    import jinja2

    first = next(iter(results.values()))
    template = (Path(__file__).parent / "matrix.html.jinja").read_text(encoding="utf-8")
    return (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            title={"text": "Text-to-video", "image": "Image-to-video"}.get(mode, mode),
            rows=rows,
            regimes=list(results),
            labels={name: REGIMES[name].text for name in results},
            versions=first["versions"],
            machine=first["machine"],
        )
    )
