"""Comparisons in several regimes as one matrix: regime x share, ours, the best cache, fewer steps, HSA as published.

Each regime is a comparison in a folder of its own; the matrix is made of whatever results are there.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from heterostep.compare import summary
from heterostep.compare.folder import check_own
from heterostep.compare.measure import Prompt
from heterostep.compare.methods import PEERS
from heterostep.compare.methods.calibration import calibrate_with
from heterostep.compare.methods.method import Method
from heterostep.compare.page import write_page
from heterostep.compare.regimes import REGIMES, Regime, in_regime, named, refuses
from heterostep.compare.run import Comparison, Settings
from heterostep.compare.style import STYLE
from heterostep.compare.summary import EVALUATIONS, IDENTICAL_DB, Place
from heterostep.errors import HeterostepError
from heterostep.files import replacing, writing

OURS, STEPS, HSA = "heterostep", "steps", "hsa"
SHARES = (0.75, 0.5, 0.25)
SCHEMA = 3
# dB: a lead below this is not seen in the table, and not bold.
TIE = 0.05
# A setting with which fewer than this part of the videos differ from the dense ones counts as one that skips nothing.
LEAST_DIFFER = 0.05
# Beside a mean that leaves out videos which equal the dense ones.
EQUAL_MARK = "+"
# Half of a 95 % interval, in standard errors.
INTERVAL = 1.96
TITLES = {"text": "Text-to-video", "image": "Image-to-video"}
COLUMNS = {"ours": "heterostep", "peer": "best cache", "steps": "fewer steps", "hsa": "HSA as published"}

Row = dict[str, Any]
Results = dict[str, Any]


def compare_regimes(
    pipe: Any,
    prompts: Sequence[Prompt],
    methods: Sequence[Method],
    regimes: Sequence[Regime],
    settings: Settings,
    folder: Path,
    command: str = "",
    tell: Callable[[str], None] = lambda line: None,
    known: Sequence[Method] = (),
) -> Path:
    """Compare in each regime, in a folder named after it, then write the matrix of all that is there.

    Several processes may work in one folder, on regimes of their own. What was stopped goes on; see `Comparison`.

    Args:
        regimes: in their order.
        settings: of all; each regime's guidance, steps and name take the place of those in it.
        folder: of the matrix; the regimes' folders are in it.

    Returns:
        the page of the matrix.

    Raises:
        HeterostepError: the pipeline cannot be put into one of the regimes, or the folder has files of another kind,
            before anything is generated; or as `Comparison` does.
    """
    if reasons := [reason for regime in regimes if (reason := refuses(pipe, regime))]:
        raise HeterostepError(reasons[0])
    if not (folder / "matrix.json").is_file():
        check_own(folder, "index.html", "matrix.png")
    for number, regime in enumerate(regimes, 1):
        tell(f"regime {number} of {len(regimes)}: {regime.name} ({regime.text})")
        with in_regime(pipe, regime) as changed:
            options = {**settings.options, **changed}
            calibrate_with(pipe, **{name: x for name, x in options.items() if name != "num_inference_steps"})
            own = replace(settings, options=options, regime=regime.name)
            Comparison(pipe, prompts, methods, own, folder / regime.name, command, tell, known).run()
        with writing(folder / regime.name / "index.html"):
            write_page(folder / regime.name)
    return write_matrix(folder)


class _Curves:
    """A regime's results, read off at a share of the evaluations.

    They are counted in every comparison, whatever its own curves are against.
    """

    def __init__(self, results: Results) -> None:
        bounds = {method["name"] for method in results["methods"] if method["diagnostic"]}
        self.labels = {method["name"]: method["label"] for method in results["methods"]}
        self.reasons = {method["name"]: method["reason"] for method in results["methods"]}
        lines = summary.curves(results["generations"], results["dense"], EVALUATIONS)
        self.points = {line["method"]: line["points"] for line in lines if line["method"] not in bounds}
        # Of the caches, those that were run and those that could not be.
        self.peers = [method.name for method in PEERS if method.name in {*self.points, *self.labels} - bounds]
        captions = [prompt["prompt"] for prompt in results["prompts"]]
        # By method, value and caption: dB of its videos, one for each seed.
        self._videos: dict[tuple[str, float], dict[str, list[float | None]]] = {}
        for record in results["generations"]:
            of = self._videos.setdefault((record["method"], record["value"]), {})
            of.setdefault(captions[record["prompt"]], []).append(record["psnr"])

    def cell(self, name: str, share: float) -> tuple[Row, dict[str, float]] | None:
        """A method's figures at a share, and its dB at each caption; None where it cannot be made so cheap."""
        points = self.points.get(name, [])
        found = summary.place(points, share, EVALUATIONS)
        if found is None:
            return None
        how = "interpolated" if found.interpolated else "measured"
        captions, of = self._captions(name, found), len(self._videos[name, found.cheaper["value"]])
        if found.interpolated and len(captions) < LEAST_DIFFER * of:
            # Nothing lies between a video that equals dense's and another: what costs less is there for the asking.
            found, how = Place(found.cheaper, found.cheaper), "its next cheaper point"
            captions = self._captions(name, found)
        elif points[0][EVALUATIONS]["mean"] < 0.99 * share:
            how = "its dearest point"
        row = {
            "name": name,
            "label": self.labels.get(name, name),
            "psnr": summary.between(found, "psnr"),
            "interval": _interval(list(captions.values())),
            "low": summary.between(found, "psnr", "low"),
            "found": how,
            "interpolated": found.interpolated,
            "equal": of - len(captions),
        }
        return row, captions

    def _captions(self, name: str, found: Place) -> dict[str, float]:
        cheaper, dearer = (self._videos[name, point["value"]] for point in (found.cheaper, found.dearer))
        captions = {}
        for caption in cheaper.keys() & dearer.keys():
            low, high = (_mean(of[caption]) for of in (cheaper, dearer))
            if low is not None and high is not None:
                captions[caption] = low * (1 - found.weight) + high * found.weight
        return captions

    def missing(self, name: str, share: float) -> Row:
        """Why a method has no figure at a share, with the point of its curve that is nearest."""
        points = self.points.get(name)
        if not points:
            return {"reason": self.reasons.get(name) or "not run", "nearest": None}
        point = min(points, key=lambda point: abs(point[EVALUATIONS]["mean"] - share))
        near = {"value": point["value"], EVALUATIONS: point[EVALUATIONS]["mean"]}
        return {"reason": "not so cheap", "nearest": near | {name: point["psnr"][name] for name in ("mean", "low")}}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean; None of a single value."""
    return INTERVAL * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def matrix(results: dict[str, Results], shares: Sequence[float] = SHARES) -> list[Row]:
    """A row for each regime and share of the token evaluations.

    Peers are the caches of the catalogue; of equals the one named first there. Where a curve has no point at a share it
    is read off between its neighbours, the worst tenth like the mean. A peer that cannot be made so cheap is not
    counted.

    Args:
        results: by regime, what a comparison writes (docs/reference/results.md).
        shares: of the evaluations.

    Returns:
        rows as docs/reference/results.md describes them.
    """
    rows = []
    for regime, result in results.items():
        curves = _Curves(result)
        # Of a comparison that was stopped some prompts are left.
        made = {record["prompt"] for record in result["dense"]}
        for share in shares:
            found = {name: curves.cell(name, share) for name in (OURS, STEPS, HSA, *curves.peers)}
            cells = {name: each[0] for name, each in found.items() if each is not None}
            able = [cells[name] for name in curves.peers if name in cells]
            peer = max(able, key=lambda cell: cell["psnr"], default=None)
            ours, others = cells.get(OURS), [cell for name, cell in cells.items() if name != OURS]
            columns = {"ours": ours, "peer": peer, "steps": cells.get(STEPS), "hsa": cells.get(HSA)}
            leads = {key: _lead(found[OURS], found[cell["name"]]) for key, cell in columns.items() if cell}
            rows.append(
                {
                    "regime": regime,
                    "share": share,
                    "captions": len({result["prompts"][number]["prompt"] for number in made}),
                    "videos": len(made),
                    **columns,
                    "low_peer": max(able, key=lambda cell: cell["low"], default=None),
                    "lead": {key: lead for key, lead in leads.items() if key != "ours"},
                    "ahead": _ahead(ours, others, "psnr"),
                    "low_ahead": _ahead(ours, others, "low"),
                    "loses": {
                        figure: [cell["name"] for cell in others if ours is None or cell[key] > ours[key]]
                        for figure, key in (("mean", "psnr"), ("low", "low"))
                    },
                    "not_counted": {name: curves.missing(name, share) for name, cell in found.items() if cell is None},
                }
            )
    return rows


def _ahead(ours: Row | None, others: Sequence[Row], key: str) -> float | None:
    return ours[key] - max(other[key] for other in others) if ours is not None and others else None


def _lead(ours: tuple[Row, dict[str, float]] | None, theirs: tuple[Row, dict[str, float]] | None) -> Row | None:
    """dB of ours less theirs, caption by caption: their mean, half of its interval, and the share that is above 0."""
    if ours is None or theirs is None or not (shared := ours[1].keys() & theirs[1].keys()):
        return None
    gaps = [ours[1][caption] - theirs[1][caption] for caption in shared]
    above = sum(gap > 0 for gap in gaps) / len(gaps)
    return {"mean": statistics.mean(gaps), "interval": _interval(gaps), "above": above}


def read_one(path: Path) -> Results:
    """The results of one comparison, from its results.json, compressed or not.

    Raises:
        HeterostepError: it cannot be read, or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        results = json.loads(content)
    except (OSError, EOFError, ValueError) as error:
        raise HeterostepError(f"{path} cannot be read: {error}") from error
    if not isinstance(results, dict) or "generations" not in results:
        raise HeterostepError(f"{path} does not hold a comparison's results")
    return results


def read(folder: Path) -> dict[str, Results]:
    """The results of a folder's regimes, in the order of `REGIMES`, then of others in it by name.

    Those of a regime are in `<regime>/results.json` or, where nothing else was kept, compressed in
    `<regime>/results.json.gz` or `<regime>.json.gz`.

    Raises:
        HeterostepError: there are none, or one cannot be read.
    """
    found = {}
    names = {path.name if path.is_dir() else path.name.removesuffix(".json.gz") for path in folder.glob("*")}
    others = sorted(names - REGIMES.keys())
    for name in (*REGIMES, *others):
        places = (folder / name / "results.json", folder / name / "results.json.gz", folder / f"{name}.json.gz")
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            continue
        found[name] = read_one(path)
    if not found:
        raise HeterostepError(f"{folder} has no results of any regime yet")
    return found


def write_matrix(folder: Path, shares: Sequence[float] = SHARES) -> Path:
    """Write matrix.json, matrix.png and index.html of the regimes whose results are in the folder.

    Returns:
        the page's path.

    Raises:
        HeterostepError: there are no results, or files cannot be written.
    """
    results = read(folder)
    rows = matrix(results, shares)
    content = {"schema": SCHEMA, "regimes": {name: _about(name, each) for name, each in results.items()}, "rows": rows}
    files: dict[str, Callable[[Path], Any]] = {
        "matrix.json": lambda part: part.write_text(json.dumps(content, indent=1) + "\n"),
        "matrix.png": lambda part: draw(rows, title(content), part),
    }
    for name, write in files.items():
        with writing(folder / name), replacing(folder / name) as part:
            write(part)
    # Results may be there without their page.
    pages = {name for name in results if (folder / name / "index.html").is_file()}
    html = page(content, (folder / "matrix.png").read_bytes(), pages)
    with writing(folder / "index.html"), replacing(folder / "index.html") as part:
        part.write_text(html, encoding="utf-8", newline="\n")
    return folder / "index.html"


def _about(name: str, results: Results) -> dict[str, Any]:
    """What is known of a regime's comparison beside its figures."""
    settings = results["settings"]
    try:
        label, text = (known := named(name)).label, known.text
    except HeterostepError:
        # One of somebody's own, made in Python.
        label, text = name, f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']}"
    return {
        "label": label,
        "text": text,
        "labels": {method["name"]: method["label"] for method in results["methods"]},
        "complete": results["complete"],
        **{key: settings.get(key) for key in ("model", "mode", "height", "width", "num_frames", "seeds")},
        **{key: results[key] for key in ("machine", "versions")},
    }


def title(content: dict[str, Any]) -> str:
    """What the matrix is of, as in "Image-to-video in 11 regimes"."""
    modes = {about["mode"] for about in content["regimes"].values()}
    count = len(content["regimes"])
    what = TITLES.get(min(modes), min(modes)) if len(modes) == 1 else "Comparisons"
    return f"{what} in {count} regime{'' if count == 1 else 's'}"


def decibels(value: float | None, digits: int = 1) -> str:
    """dB as text."""
    return "–" if value is None else "identical" if value >= IDENTICAL_DB else f"{value:.{digits}f}"


def cell(figures: Row | None) -> str:
    """A mean and its interval, then the worst tenth, as text."""
    if figures is None:
        return "-"
    mark = "~" if figures["interpolated"] else ""
    interval = "" if figures["interval"] is None else f" ± {figures['interval']:.1f}"
    equal = EQUAL_MARK if figures["equal"] and figures["psnr"] < IDENTICAL_DB else ""
    return f"{mark}{decibels(figures['psnr'])}{equal}{interval} (low {decibels(figures['low'])})"


def table(rows: Sequence[Row]) -> str:
    """The matrix as a table in Markdown; bold where ours is ahead of all, by mean."""
    head = ("regime", "share", *COLUMNS.values(), "loses, mean", "loses, worst tenth")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        ours = cell(row["ours"])
        ours = f"**{ours}**" if (row["ahead"] or 0) > TIE else ours
        peer = "-" if row["peer"] is None else f"{row['peer']['name']} {cell(row['peer'])}"
        lost = (", ".join(row["loses"][figure]) or "-" for figure in ("mean", "low"))
        cells = (row["regime"], f"{row['share']:g}", ours, peer, cell(row["steps"]), cell(row["hsa"]), *lost)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], name: str, path: Path) -> None:
    """PSNR of the four by regime, a panel a share: filled with its interval the mean, hollow the worst tenth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = sorted({row["share"] for row in rows}, reverse=True)
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    figure = Figure(figsize=(4.5 * len(shares) + 1.5, 1.7 + 0.5 * len(regimes)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for panel, share in zip(panels, shares):
        for number, (key, marker) in enumerate(zip(COLUMNS, "os^d")):
            shown = [(regimes.index(row["regime"]), row[key]) for row in rows if row["share"] == share and row[key]]
            # Beside each other, so that none hides another.
            y = [at + 0.16 * (number - 1.5) for at, _ in shown]
            style: dict[str, Any] = {
                "color": f"C{number}",
                "markersize": 7 if key == "ours" else 5,
                "linestyle": "none",
            }
            panel.errorbar(
                [each["psnr"] for _, each in shown],
                y,
                xerr=[each["interval"] or 0.0 for _, each in shown],
                fmt=marker,
                elinewidth=1,
                label=COLUMNS[key],
                **style,
            )
            panel.plot([each["low"] for _, each in shown], y, marker, fillstyle="none", alpha=0.7, **style)
        panel.set_title(f"{share:g} of the evaluations")
        panel.set_xlabel("PSNR to dense, dB; hollow: the worst tenth")
        panel.set_yticks(range(len(regimes)), regimes)
        panel.grid(alpha=0.3)
    panels[0].set_ylim(len(regimes) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(COLUMNS), frameon=False)
    figure.suptitle(name)
    figure.savefig(path, dpi=110, format="png")


def page(content: dict[str, Any], picture: bytes, pages: Collection[str]) -> str:
    """The matrix as a page in HTML, which needs no other file.

    Args:
        content: of matrix.json.
        picture: matrix.png.
        pages: the regimes that have a page of their own beside this one, to be linked.
    """
    import jinja2

    template = (Path(__file__).parent / "matrix.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    rows, regimes = content["rows"], content["regimes"]

    def labelled(row: Row, names: Sequence[str]) -> list[str]:
        return [regimes[row["regime"]]["labels"].get(name, name) for name in names]

    known = [row for row in rows if row["ours"] is not None]
    counts = {figure: (sum(not row["loses"][figure] for row in known), len(rows)) for figure in ("mean", "low")}
    return environment.from_string(template).render(
        style=STYLE,
        title=title(content),
        rows=rows,
        regimes=regimes,
        labelled=labelled,
        columns=COLUMNS,
        counts=counts,
        decibels=decibels,
        picture=base64.b64encode(picture).decode(),
        pages=pages,
    )
