"""What steps of single tokens give beside whole steps, in folders of regimes where both were compared.

    python benchmarks/token_figures.py benchmarks/rooms/text benchmarks/rooms/image --model runs/rooms/release/rooms

How much better than whole steps alone, in dB: mean, worst tenth. Keys and values of the tokens that a step leaves out
are held, in drift, or fresh (a bound). Each figure is read off the methods' curves at the share of the dense
evaluations, as in the matrix. With `--model` still and moving cameras apart as well, for a model whose held-out prompts
say which.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from by_camera import cameras, of_prompts
from heterostep.compare import summary
from heterostep.compare.matrix import OURS, SHARES, TIE, read

METHODS = {"tokens": "held", "tokens-drift": "drift", "tokens-fresh": "fresh"}
FIGURES = {"mean": "mean", "low": "worst tenth"}

# By regime, share and method: dB ahead of whole steps by figure.
Gains = dict[tuple[str, float, str], dict[str, float]]


def gains(regimes: dict[str, dict[str, Any]]) -> Gains:
    """dB by which each method of single tokens is ahead of whole steps, where both were run."""
    out: Gains = {}
    for regime, results in regimes.items():
        lines = summary.curves(results["generations"], results["dense"], summary.EVALUATIONS)
        points = {line["method"]: line["points"] for line in lines}
        for share in SHARES:
            places = {
                name: summary.place(points.get(name, []), share, summary.EVALUATIONS) for name in (OURS, *METHODS)
            }
            db = {
                name: {key: summary.between(found, "psnr", key) for key in FIGURES}
                for name, found in places.items()
                if found
            }
            for name in METHODS:
                if name in db and OURS in db:
                    out[regime, share, name] = {key: db[name][key] - db[OURS][key] for key in FIGURES}
    return out


def table(found: Gains) -> str:
    """A line for each regime, a column for each share and way to keep K and V: mean, worst tenth."""
    titles = [
        f"{share:g}: {METHODS[name]}" if not n else METHODS[name] for share in SHARES for n, name in enumerate(METHODS)
    ]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for regime in dict.fromkeys(regime for regime, *_ in found):
        cells = []
        for share in SHARES:
            for name in METHODS:
                each = found.get((regime, share, name))
                cells.append(", ".join(f"{each[key]:+.1f}" for key in FIGURES) if each else "-")
        lines.append(f"| {regime} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summed_up(parts: dict[str, Gains]) -> str:
    """A line for each part and way to keep K and V: the mean over the regimes, and in how many it is ahead."""
    titles = [f"{share:g}: {title}" if not n else title for share in SHARES for n, title in enumerate(FIGURES.values())]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for part, found in parts.items():
        for name, kept in METHODS.items():
            cells = []
            for share in SHARES:
                rows = [each for (_, of, method), each in found.items() if (of, method) == (share, name)]
                for key in FIGURES:
                    values = [each[key] for each in rows]
                    ahead = sum(value >= TIE for value in values)
                    cells.append(f"{statistics.mean(values):+.1f} ({ahead} of {len(values)})" if values else "-")
            lines.append(f"| {part}, {kept} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--model", help="whose held-out prompts say whether the camera moves")
    args = parser.parse_args()
    apart = cameras(args.model) if args.model else {}
    parts: dict[str, Gains] = {}
    for folder in args.folders:
        regimes = read(folder)
        parts[folder.name] = gains(regimes)
        print(f"{folder.name}\n\n{table(parts[folder.name])}\n")
        for camera, prompts in apart.items():
            some = {name: of_prompts(results, prompts) for name, results in regimes.items()}
            parts[f"{folder.name}, {camera} camera"] = gains(some)
    print(f"Mean over the regimes (in how many single tokens are ahead)\n\n{summed_up(parts)}")


if __name__ == "__main__":
    main()
