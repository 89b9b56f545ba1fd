"""What stands in `benchmarks/`: pages show what their results say, and results of two runs are joined rightly."""

import copy
import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

from heterostep.compare import summary
from heterostep.compare.matrix import matrix, read, read_one, table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """A script of `benchmarks/` by its name, as a module."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for path in BENCHMARKS.glob("*.py"):
        if path.stem not in known:
            sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("task", ["text", "image"])
@pytest.mark.parametrize("world", ["tiny-ti2v", "rooms", "drawn-regimes"])
def test_a_pages_table_is_that_of_its_results(world, task):
    page = (BENCHMARKS / world / "README.md").read_text()
    assert table(matrix(read(BENCHMARKS / world / task))) in page


@pytest.mark.parametrize("task", ["text", "image"])
def test_a_pages_table_of_single_tokens_is_that_of_its_results(script, task):
    figures = script("token_figures")
    page = (BENCHMARKS / "rooms" / "README.md").read_text()
    assert figures.table(figures.gains(read(BENCHMARKS / "rooms" / task))) in page


@pytest.fixture
def joined(script):
    return script("joined")


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
    assert capsys.readouterr().out == f"{path}: 64 prompts, 14 methods\n"
    made = read_one(path)
    assert made["prompts"] == whole["prompts"] and made["added"]["prompts"] == [32, 64]
    assert made["added"]["command"] == whole["command"]
    expected = summary.curves(whole["generations"], whole["dense"], "evaluations")
    assert {line["method"]: line["points"] for line in made["curves"]} == {
        line["method"]: line["points"] for line in expected
    }
    assert [line["method"] for line in made["curves"]] == [method["name"] for method in whole["methods"]]
    # A second time would count these prompts twice.
    with pytest.raises(SystemExit, match="cannot be added to .*: the runs have prompts in common"):
        joined.main()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda later: later.update(complete=False), "not complete"),
        (lambda later: later["settings"].update(guidance_scale=9), "other settings"),
        (lambda later: later["generations"].pop(0), "not all of both runs' prompts: heterostep"),
    ],
)
def test_runs_that_do_not_go_together_are_refused(joined, change, reason):
    whole = read_one(BENCHMARKS / "rooms" / "text" / "ltx-2.json.gz")
    first, later = part(whole, range(32)), part(whole, range(32, 64))
    change(later)
    with pytest.raises(ValueError, match=reason):
        joined.joined(first, later)


def test_a_later_runs_methods_are_added(joined):
    whole = read_one(BENCHMARKS / "rooms" / "text" / "ltx-2.json.gz")
    first = part(whole, range(64))
    first["methods"] = [method for method in whole["methods"] if method["name"] != "tokens"]
    first["generations"] = [record for record in whole["generations"] if record["method"] != "tokens"]
    later = part(whole, range(64))
    later["command"] += " --out somewhere/else"
    later["methods"] = [method for method in whole["methods"] if method["name"] in ("hsa", "tokens")]
    later["generations"] = [
        {**record, "psnr": 1.0} for record in whole["generations"] if record["method"] in ("hsa", "tokens")
    ]
    made = joined.joined(first, later)
    assert [method["name"] for method in made["methods"]] == [method["name"] for method in whole["methods"]]
    assert len(made["generations"]) == len(whole["generations"])
    assert {each["method"]: each["command"] for each in made["made_anew"]} == dict.fromkeys(
        ("hsa", "tokens"), whole["command"]
    )
    means = {line["method"]: {point["psnr"]["mean"] for point in line["points"]} for line in made["curves"]}
    assert means["hsa"] == means["tokens"] == {1.0} and means["steps"] != {1.0}
    # What was made anew once more is named once.
    assert [each["method"] for each in joined.joined(made, later)["made_anew"]] == ["hsa", "tokens"]


def test_methods_of_other_dense_videos_are_refused(joined):
    first = part(read_one(BENCHMARKS / "rooms" / "text" / "ltx-2.json.gz"), range(64))
    later = copy.deepcopy(first)
    later["chance"][3]["psnr"] += 0.01
    with pytest.raises(ValueError, match="dense videos are not the same"):
        joined.joined(first, later)
