"""What each method reaches at the asked runtimes, on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from heterostep.compare.chart import AXES
from heterostep.compare.summary import IDENTICAL_DB, unsteady

# A metric's heading and digits.
COLUMNS = {
    "psnr": ("PSNR dB", 1),
    "ssim": ("SSIM", 3),
    "vmaf": ("VMAF", 1),
    "lpips": ("LPIPS", 3),
    "caption": ("caption", 3),
    "motion": ("motion off", 3),
    "vbench": ("VBench", 3),
}


def show(results: dict[str, Any], console: Console | None = None) -> None:
    """Print one table for each asked cost; interpolated figures are marked ~, the best of a column *."""
    console = console or Console(highlight=False)
    axis = AXES[results["settings"]["cost"]].split(",")[0]
    labels = {method["name"]: method["label"] for method in results["methods"]}
    cost = results["settings"]["cost"]
    lines = {line["method"]: line["points"] for line in results.get("curves", ())}
    for at in results["frontier"]:
        # Where nobody reaches the cost, there is still a column to say so.
        known = [name for name in COLUMNS if name == "psnr" or any(row.get(name) is not None for row in at["rows"])]
        table = Table("method", *(COLUMNS[name][0] for name in known), title=f"{axis} {at['runtime']:g} of dense")
        for row in at["rows"]:
            label = labels.get(row["method"], row["method"])
            if not row["reached"]:
                points = lines.get(row["method"], ())
                cheapest = min((point[cost]["mean"] for point in points if point[cost]), default=None)
                missed = "not reached" if cheapest is None else f"not reached ({cheapest:.2f} at the least)"
                table.add_row(label, *[missed][: len(known)])
                continue
            cells = []
            for name in known:
                value, mark, digits = row.get(name), "~" * row["interpolated"], COLUMNS[name][1]
                if name == "psnr":
                    # As the page has it: without a PSNR, or on the way to such a video, it equals the dense one.
                    same = value is None or value >= IDENTICAL_DB
                    text = mark + ("identical" if same else f"{value:.{digits}f}")
                else:
                    text = "-" if value is None else f"{mark}{value:.{digits}f}"
                cells.append(f"{text} *" if at["winners"].get(name) == row["method"] else text)
            table.add_row(label, *cells)
        console.print(table)
    console.print("* best  ~ interpolated between two settings", markup=False)
    if said := unsteady(results["chance"]):
        console.print(said, markup=False, soft_wrap=True)
    for method in results["methods"]:
        if method["reason"]:
            status = "" if method["status"] == "ran" else f"{method['status']}: "
            console.print(f"{method['label']}: {status}{method['reason']}", markup=False, soft_wrap=True)
    for each in (results.get("vbench") or {}).get("failed", []):
        text = f"VBench of {labels.get(each['method'], each['method'])}, {each['value']:g}: failed: {each['reason']}"
        console.print(text, markup=False, soft_wrap=True)
