"""Adds what a later run of a comparison made to the results of an earlier one, in place: prompts, or methods.

    heterostep compare --model rooms --regime ltx-2 --count 32 ... --out first
    heterostep compare --model rooms --regime ltx-2 --seed 32 --count 32 ... --out later
    python benchmarks/joined.py first/ltx-2/results.json later/ltx-2/results.json

For runs on machines that do not keep the folder: where it is kept, `heterostep compare` adds both itself. The runs have
the same settings, and either no prompt in common and the same methods, or the same prompts; then a method that both
have is the later run's. What the later one was is in the results' `added`, or for each method in their `made_anew`. An
earlier file that ends in .gz is written as one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from heterostep.compare import summary
from heterostep.compare.matrix import read_one
from heterostep.compare.methods import METHODS
from heterostep.errors import HeterostepError

Results = dict[str, Any]

LISTS = ("dense", "chance", "generations")
# dB between the runs' dense videos and those of another noise, above which their dense videos are not the same.
SAME_DB = 0.001


def joined(first: Results, later: Results) -> Results:
    """The results of both runs.

    Raises:
        ValueError: the runs do not go together.
    """
    if not (first["complete"] and later["complete"]):
        raise ValueError("one of the runs is not complete")
    if first["settings"] != later["settings"]:
        raise ValueError("the runs have other settings")
    if first["prompts"] == later["prompts"]:
        return _with_methods(first, later)
    if any(prompt in first["prompts"] for prompt in later["prompts"]):
        raise ValueError("the runs have prompts in common")
    return _with_prompts(first, later)


def _with_prompts(first: Results, later: Results) -> Results:
    """The first run's prompts before the later one's."""
    start, end = len(first["prompts"]), len(first["prompts"]) + len(later["prompts"])
    moved = {name: [{**each, "prompt": each["prompt"] + start} for each in later[name]] for name in LISTS}
    results = {
        **first,
        **{name: first[name] + moved[name] for name in LISTS},
        "prompts": first["prompts"] + later["prompts"],
        "added": {"prompts": [start, end], **_about(later)},
        **{name: later.get(name) for name in ("lpips_missing", "vmaf_missing")},
    }
    counts = Counter((record["method"], record["value"]) for record in results["generations"])
    if short := sorted({method for (method, _), count in counts.items() if count != end}):
        raise ValueError(f"not all of both runs' prompts: {', '.join(short)}")
    return _summed_up(results)


def _with_methods(first: Results, later: Results) -> Results:
    """The later run's methods, and those of the first one's that it does not have."""
    chances = [{record["prompt"]: record["psnr"] for record in each["chance"]} for each in (first, later)]
    if any(abs(chances[0][prompt] - chances[1][prompt]) > SAME_DB for prompt in chances[0]):
        raise ValueError("their dense videos are not the same")
    own = {method["name"]: method for method in later["methods"]}
    methods = {method["name"]: method for method in first["methods"]} | own
    names = [*(name for name in METHODS if name in methods), *(name for name in methods if name not in METHODS)]
    before = [each for each in first.get("made_anew", []) if each["method"] not in own]
    records = [record for record in first["generations"] if record["method"] not in own]
    return _summed_up(
        {
            **first,
            "methods": [methods[name] for name in names],
            "generations": records + later["generations"],
            "made_anew": before + [{"method": name, **_about(later)} for name in own],
        }
    )


def _about(run: Results) -> dict[str, Any]:
    """What a run was. Where it was written is nobody else's."""
    return {
        "command": re.sub(r" --out \S+", "", run["command"]),
        **{name: run[name] for name in ("machine", "versions")},
    }


def _summed_up(results: Results) -> Results:
    """With curves and frontier of all records, which have the same keys: what one run did not measure is null there."""
    keys = dict.fromkeys(key for name in LISTS for record in results[name] for key in record)
    records = {name: [{key: record.get(key) for key in keys} for record in results[name]] for name in LISTS}
    names, cost = [method["name"] for method in results["methods"]], results["settings"]["cost"]
    curves = summary.curves(records["generations"], records["dense"], cost)
    curves.sort(key=lambda line: names.index(line["method"]))
    bounds = [method["name"] for method in results["methods"] if method["diagnostic"]]
    frontier = summary.frontier(curves, results["settings"]["runtimes"], bounds, cost)
    return {**results, **records, "curves": curves, "frontier": frontier}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="results.json or results.json.gz, which gets the prompts or methods")
    parser.add_argument("later", type=Path, help="results.json")
    args = parser.parse_args()
    try:
        results = joined(read_one(args.first), read_one(args.later))
    except HeterostepError as error:
        raise SystemExit(str(error)) from error
    except ValueError as error:
        raise SystemExit(f"{args.later} cannot be added to {args.first}: {error}") from error
    data = json.dumps(results, separators=(",", ":")).encode()
    part = args.first.with_name(args.first.name + ".part")
    # No time in the file, so that it depends on what is in it alone.
    part.write_bytes(gzip.compress(data, 9, mtime=0) if args.first.suffix == ".gz" else data)
    part.replace(args.first)
    print(f"{args.first}: {len(results['prompts'])} prompts, {len(results['methods'])} methods")


if __name__ == "__main__":
    main()
