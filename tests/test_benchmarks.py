"""What stands in `benchmarks/`: pages show what their results say, and results of two runs are joined rightly."""

import copy
import gzip
import json
import sys
from pathlib import Path

import pytest

from heterostep.compare import summary
from heterostep.compare.matrix import matrix, read, read_one, table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("task", ["text", "image"])
@pytest.mark.parametrize("world", ["tiny-ti2v", "rooms", "drawn-regimes"])
def test_a_pages_table_is_that_of_its_results(world, task):
    page = (BENCHMARKS / world / "README.md").read_text()
    assert table(matrix(read(BENCHMARKS / world / task))) in page


@pytest.fixture
def joined(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import joined

    yield joined
    sys.modules.pop("joined")


def part(results, prompts):
    """What a run of these prompts alone would have written, but for its curves."""
    made = copy.deepcopy({**results, "prompts": [results["prompts"][i] for i in prompts]})
    for name in ("dense", "chance", "generations"):
        made[name] = [{**r, "prompt": r["prompt"] - prompts[0]} for r in made[name] if r["prompt"] in prompts]
    return {name: value for name, value in made.items() if name not in ("added", "made_anew", "curves", "frontier")}


def test_two_runs_are_joined(joined, tmp_path, monkeypatch, capsys):
    whole = read_one(BENCHMARKS / "rooms" / "text" / "ltx-2.json.gz")
    first, later = part(whole, range(32)), part(whole, range(32, 64))
    later["command"] += " --out somewhere/else"
    path = tmp_path / "results.json.gz"
    path.write_bytes(gzip.compress(json.dumps(first).encode()))
    (tmp_path / "later.json").write_text(json.dumps(later))
    monkeypatch.setattr(sys, "argv", ["joined", str(path), str(tmp_path / "later.json")])
    joined.main()
    assert capsys.readouterr().out == f"{path}: 64 prompts\n"
    made = read_one(path)
    assert made["prompts"] == whole["prompts"] and made["added"]["prompts"] == [32, 64]
    assert made["added"]["command"] == whole["command"]
    assert made["curves"] == summary.curves(whole["generations"], whole["dense"], "evaluations")
    assert [line["method"] for line in made["curves"]] == [method["name"] for method in whole["methods"]]
    # A second time would count these prompts twice.
    with pytest.raises(SystemExit, match="cannot be added to .*: the runs have prompts in common"):
        joined.main()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda later: later.update(complete=False), "not complete"),
        (lambda later: later["settings"].update(guidance_scale=9), "other settings"),
        (lambda later: later["generations"].pop(), "not all of both runs' prompts: cache-dit"),
    ],
)
def test_runs_that_do_not_go_together_are_refused(joined, change, reason):
    whole = read_one(BENCHMARKS / "rooms" / "text" / "ltx-2.json.gz")
    first, later = part(whole, range(32)), part(whole, range(32, 64))
    change(later)
    with pytest.raises(ValueError, match=reason):
        joined.joined(first, later)
