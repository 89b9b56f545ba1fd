"""What a folder of regimes says beside the mean PSNR of its matrix: leads, SSIM, VMAF, motion kept.

    python benchmarks/other_figures.py benchmarks/rooms/text benchmarks/rooms/image

Each figure is read off the methods' curves at 0.75, 0.5 and 0.25 of the dense evaluations, as in the matrix. VMAF is of
the prompts for which it was measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heterostep.compare import summary
from heterostep.compare.matrix import HSA, OURS, SHARES, STEPS, TIE, matrix, read
from heterostep.compare.methods import PEERS

BEST_CACHE = "best cache"
SHOWN = (OURS, STEPS, HSA)
CACHES = {method.name for method in PEERS}


def measured(results: dict[str, Any], figure: str) -> dict[str, Any]:
    """The results of the prompts whose dense video has the figure."""
    known = {record["prompt"] for record in results["dense"] if record.get(figure) is not None}
    names = ("dense", "generations")
    return {**results, **{name: [each for each in results[name] if each["prompt"] in known] for name in names}}


def figures(results: dict[str, Any], share: float, figure: str) -> dict[str, float]:
    """By method: a figure's mean over the prompts at a share of the evaluations; without those that do not reach it."""
    out = {}
    for line in summary.curves(results["generations"], results["dense"], summary.EVALUATIONS):
        found = summary.place(line["points"], share, summary.EVALUATIONS)
        value = None if found is None else summary.between(found, figure)
        if value is not None:
            out[line["method"]] = value
    return out


def motion_kept(results: dict[str, Any], share: float) -> dict[str, float]:
    """By method, 1: as dense moves."""
    found = figures(results, share, "motion")
    return {name: 1 - found[name] for name in SHOWN if name in found}


def vmaf(results: dict[str, Any], share: float) -> dict[str, float]:
    """By method, with the cache that is best by it."""
    found = figures(measured(results, "vmaf"), share, "vmaf")
    caches = [value for name, value in found.items() if name in CACHES]
    return {name: found[name] for name in SHOWN if name in found} | ({BEST_CACHE: max(caches)} if caches else {})


def ssim_otherwise(results: dict[str, Any], share: float) -> list[str]:
    """Fewer steps and HSA, where SSIM and PSNR say different things of them and heterostep."""
    psnr, ssim = (figures(results, share, figure) for figure in ("psnr", "ssim"))
    out = []
    for name in (STEPS, HSA):
        if name not in psnr:
            continue
        near, alike = psnr[OURS] - psnr[name], ssim[OURS] - ssim[name]
        if near * alike < 0 and abs(near) >= TIE:
            out.append(f"{share:g}, {name}: {near:+.2f} dB, SSIM {alike:+.5f}")
    return out


def table(cells: list[tuple[str, dict[str, list[float]]]], digits: int) -> str:
    """A column for each title, a line for each method: the mean over the regimes, and the least of them."""
    names = dict.fromkeys(name for _, column in cells for name in column)
    lines = ["| | " + " | ".join(title for title, _ in cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for name in names:
        columns = [column.get(name) for _, column in cells]
        shown = [f"{statistics.mean(each):.{digits}f} ({min(each):.{digits}f})" if each else "-" for each in columns]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def gathered(
    regimes: dict[str, dict[str, Any]], of: Callable[[dict[str, Any], float], dict[str, float]], digits: int
) -> str:
    """The table of a figure: all regimes of a folder at a share in one column."""
    cells = []
    for folder, each in regimes.items():
        for share in SHARES:
            column: dict[str, list[float]] = {}
            for results in each.values():
                for name, value in of(results, share).items():
                    column.setdefault(name, []).append(value)
            cells.append((f"{folder}, {share:g}", column))
    return table(cells, digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    regimes = {folder.name: read(folder) for folder in parser.parse_args().folders}
    rows = {(folder, f"{row['regime']} {row['share']:g}"): row for folder in regimes for row in matrix(regimes[folder])}
    leads = sorted((row["ahead"], *name) for name, row in rows.items())
    ahead = [lead for lead, *_ in leads if lead >= TIE]
    print(f"Ahead of all others in {len(ahead)} of {len(rows)} rows, by up to {ahead[-1]:.2f} dB; the least:\n")
    print(*(f"- {folder} {name}: {lead:+.2f} dB" for lead, folder, name in leads[:15]), sep="\n")
    print("\nThe worst tenth is behind:\n")
    for (folder, name), row in rows.items():
        if row["low_ahead"] <= -TIE:
            print(f"- {folder} {name}: {row['low_ahead']:+.2f} dB ({', '.join(row['loses']['low'])})")
    cells = [(folder, name, each[name], share) for folder, each in regimes.items() for name in each for share in SHARES]
    print("\nSSIM says otherwise than PSNR:\n")
    for folder, name, results, share in cells:
        for line in ssim_otherwise(results, share):
            print(f"- {folder} {name} {line}")
    seen = {(folder, name, share): found for folder, name, each, share in cells if (found := vmaf(each, share))}
    behind = {key: found for key, found in seen.items() if max(found.values()) > found[OURS]}
    print(f"\nVMAF: ahead of all others in {len(seen) - len(behind)} of {len(seen)} rows; behind in\n")
    for (folder, name, share), found in behind.items():
        print(f"- {folder} {name} {share:g}:", ", ".join(f"{method} {value:.1f}" for method, value in found.items()))
    print(f"\n{gathered(regimes, vmaf, 1)}\n\nMotion kept:\n\n{gathered(regimes, motion_kept, 2)}")


if __name__ == "__main__":
    main()
