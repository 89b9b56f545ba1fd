"""Adds the prompts that a later run of a comparison made to the results of an earlier one, in place.

    heterostep compare --model rooms --regime ltx-2 --count 32 ... --out first
    heterostep compare --model rooms --regime ltx-2 --seed 32 --count 32 ... --out later
    python benchmarks/joined.py first/ltx-2/results.json later/ltx-2/results.json

For runs on machines that do not keep the folder: where it is kept, `heterostep compare` adds prompts itself. Both runs
have the same settings and methods. What the later one was is in the results' `added`. An earlier file that ends in .gz
is written as one.
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
from heterostep.errors import HeterostepError

LISTS = ("dense", "chance", "generations")


def joined(first: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The results of both runs' prompts, the first one's before the later one's.

    Raises:
        ValueError: the runs do not go together.
    """
    start, end = len(first["prompts"]), len(first["prompts"]) + len(later["prompts"])
    if not (first["complete"] and later["complete"]):
        raise ValueError("one of the runs is not complete")
    if first["settings"] != later["settings"]:
        raise ValueError("the runs have other settings")
    if any(prompt in first["prompts"] for prompt in later["prompts"]):
        raise ValueError("the runs have prompts in common")
    moved = {name: [{**each, "prompt": each["prompt"] + start} for each in later[name]] for name in LISTS}
    records = {name: first[name] + moved[name] for name in LISTS}
    counts = Counter((record["method"], record["value"]) for record in records["generations"])
    if short := sorted({method for (method, _), count in counts.items() if count != end}):
        raise ValueError(f"not all of both runs' prompts: {', '.join(short)}")
    # What one of the runs did not measure is null there.
    keys = dict.fromkeys(key for name in LISTS for record in records[name] for key in record)
    records = {name: [{key: record.get(key) for key in keys} for record in records[name]] for name in LISTS}
    names, cost = [method["name"] for method in first["methods"]], first["settings"]["cost"]
    curves = summary.curves(records["generations"], records["dense"], cost)
    curves.sort(key=lambda line: names.index(line["method"]))
    bounds = [method["name"] for method in first["methods"] if method["diagnostic"]]
    # Where a run was written is nobody else's.
    command = re.sub(r" --out \S+", "", later["command"])
    return {
        **first,
        **records,
        "prompts": first["prompts"] + later["prompts"],
        "curves": curves,
        "frontier": summary.frontier(curves, first["settings"]["runtimes"], bounds, cost),
        "added": {
            "prompts": [start, end],
            "command": command,
            **{name: later[name] for name in ("machine", "versions")},
        },
        **{name: later.get(name) for name in ("lpips_missing", "vmaf_missing")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="results.json or results.json.gz, which gets the prompts")
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
    print(f"{args.first}: {len(results['prompts'])} prompts")


if __name__ == "__main__":
    main()
