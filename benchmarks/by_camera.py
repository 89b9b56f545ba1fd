"""A comparison's regimes once more, still and moving cameras apart, for a model whose held-out prompts say which.

    python benchmarks/by_camera.py matrix --model rooms

`matrix` is what `heterostep compare --model rooms --regime ... --out matrix` wrote; the model's `heterostep.json` has
"camera" for each of its held-out prompts. Prints a table for each camera, as `compare` does for all prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heterostep.checkpoints import about
from heterostep.compare.matrix import matrix, read, table
from heterostep.errors import HeterostepError


def of_prompts(results: dict[str, Any], wanted: set[str]) -> dict[str, Any]:
    """The results of these prompts alone."""
    numbers = [number for number, each in enumerate(results["prompts"]) if each["prompt"] in wanted]
    new = {number: position for position, number in enumerate(numbers)}
    parts = {
        name: [{**each, "prompt": new[each["prompt"]]} for each in results[name] if each["prompt"] in new]
        for name in ("dense", "chance", "generations")
    }
    return {**results, **parts, "prompts": [results["prompts"][number] for number in numbers]}


def cameras(model: str) -> dict[str, set[str]]:
    """The model's held-out prompts by camera, "moving" before "still".

    Raises:
        HeterostepError: the model's `heterostep.json` does not say which.
    """
    found: dict[str, set[str]] = {}
    for entry in about(model).get("held_out", []):
        found.setdefault(entry["camera"], set()).add(entry["prompt"])
    if not found:
        raise HeterostepError(f"{model} does not say with which camera its held-out prompts are: give another --model")
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    found = read(args.folder)
    for camera, prompts in cameras(args.model).items():
        some = {name: of_prompts(results, prompts) for name, results in found.items()}
        counts = sorted({len({record["prompt"] for record in results["dense"]}) for results in some.values()})
        print(f"### {camera.capitalize()} camera ({' to '.join(map(str, counts))} prompts)\n\n{table(matrix(some))}\n")


if __name__ == "__main__":
    main()
