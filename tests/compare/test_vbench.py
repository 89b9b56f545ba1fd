"""VBench's scores, from a command in its place that takes its arguments and writes its files."""

import dataclasses
import io
import json
import os
import sys

import pytest
from rich.console import Console

from heterostep import cli, tiny
from heterostep.compare import run, table, vbench
from heterostep.compare.page import write_page
from heterostep.errors import HeterostepError
from small import small_pipeline

# As `vbench evaluate` and `VBench.evaluate` in mode custom_input, without its networks: how it joins and quotes the
# arguments of its second process, which videos it takes, what it writes, and that it exits with 0 after a fault.
FAKE = """#!{python}
import argparse, datetime, json, os, pathlib, shlex, subprocess, sys

parser = argparse.ArgumentParser(prog="vbench")
evaluate = parser.add_subparsers().add_parser("evaluate")
if "--inner" in sys.argv:
    sys.argv.remove("--inner")
    evaluate.add_argument("--dimension", nargs="+", required=True)
    inner = True
else:
    evaluate.add_argument("--dimension", type=str, required=True)
    inner = False
evaluate.add_argument("--videos_path", type=str, required=True)
evaluate.add_argument("--output_path", type=str, default="./evaluation_results/")
evaluate.add_argument("--mode", choices=["custom_input", "vbench_standard"], default="vbench_standard")
evaluate.add_argument("--prompt", type=str, default="None")
evaluate.add_argument("--prompt_file", type=str)
args = parser.parse_args()
if not inner:
    command = ["python", shlex.quote(__file__), "--inner", "evaluate"]
    for name, value in vars(args).items():
        if value is None:
            continue
        if name in ("videos_path", "prompt", "prompt_file", "output_path"):
            command.append(f'--{{name}}="{{value}}"')
        else:
            command += [f"--{{name}}", str(value)]
    subprocess.run(" ".join(command), shell=True)
    sys.exit()

assert os.path.dirname(sys.executable) == os.path.dirname(os.path.realpath(__file__))
with open("{calls}", "a") as log:
    names = sorted(os.listdir(args.videos_path))
    log.write(json.dumps([args.mode, args.dimension, names]) + "\\n")
broken = "{broken}"
if broken and any(broken in name for name in names):
    print("Traceback (most recent call last):\\n  File evaluate.py, line 1", file=sys.stderr)
    print("RuntimeError: no kernel image is available", file=sys.stderr)
    print("torch.distributed.elastic.multiprocessing.errors.ChildFailedError:", file=sys.stderr)
    sys.exit("====================")
custom = ("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
          "imaging_quality")
assert args.mode == "custom_input" and set(args.dimension) <= set(custom)
prompts = json.loads(pathlib.Path(args.prompt_file).read_text())
assert set(prompts) == set(names) and all(name.endswith(".mp4") for name in names)
assert args.prompt == "None"
results = {{}}
for dimension in args.dimension:
    each = []
    for name in reversed(names):
        score = {{"imaging_quality": 60.0, "dynamic_degree": name.startswith("0")}}.get(dimension, 0.9)
        each.append({{"video_path": os.path.join(args.videos_path, name), "video_results": score}})
    mean = sum(entry["video_results"] for entry in each) / len(each)
    results[dimension] = [mean / 100 if dimension == "imaging_quality" else mean, each]
os.makedirs(args.output_path, exist_ok=True)
now = datetime.datetime.now().strftime("%Y-%m-%d-%H:%M:%S")
path = pathlib.Path(args.output_path)
(path / f"results_{{now}}_full_info.json").write_text("[]")
(path / f"results_{{now}}_eval_results.json").write_text(json.dumps(results, indent=4))
"""
SIZES = ["--steps", "12", "--frames", "9", "--height", "64", "--width", "64", "--device", "cpu"]
METHODS = ["--methods", "heterostep,steps", "--runtimes", "1,0.5", "--points", "1"]
ARGUMENTS = ["compare", "--count", "2", *METHODS, *SIZES, "--videos", "1", "--vbench", "--out"]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(broken) puts a vbench on the PATH that fails on videos with that in their name; returns its calls."""
    calls = tmp_path / "calls"

    def install(broken=""):
        program = tmp_path / "bin" / "vbench"
        program.parent.mkdir(exist_ok=True)
        program.write_text(FAKE.format(python=sys.executable, calls=calls, broken=broken))
        program.chmod(0o755)
        python = program.with_name("python")
        python.unlink(missing_ok=True)
        python.symlink_to(sys.executable)
        calls.write_text("")
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()]

    link = tmp_path / "linked" / "vbench"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "bin" / "vbench")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}{link.parent}")
    monkeypatch.setattr(tiny, "load", lambda image_to_video=False: small_pipeline(image_to_video))
    return install


def test_without_the_command_it_is_refused_before_anything_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tiny, "load", lambda image_to_video=False: pytest.fail("the model was loaded"))
    assert cli.main([*ARGUMENTS, str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err == (
        "heterostep: --vbench needs the vbench command, which is not on the PATH: pip install vbench, in an "
        "environment of its own\n"
    )
    assert not (tmp_path / "report").exists()


def test_scores_come_into_the_results_the_table_and_the_page(install, tmp_path, capsys, monkeypatch):
    calls = install()
    plain = run.generate
    # Seconds that a busy machine does not change.
    monkeypatch.setattr(run, "generate", lambda *a: dataclasses.replace(made := plain(*a), seconds=float(made.rows)))
    # What a shell would make something of.
    folder = tmp_path / "my $HOME `x` report"
    assert cli.main([*ARGUMENTS, str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "VBench" in out and "4/4 VBench steps 0.5: 0.783" in err.splitlines()
    assert [(mode, tuple(dimensions)) for mode, dimensions, _ in calls()] == [("custom_input", vbench.DIMENSIONS)] * 4
    assert calls()[2][2] == ["0-heterostep-0.5.mp4", "1-heterostep-0.5.mp4"]
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"] and results["vbench"] == {"dimensions": list(vbench.DIMENSIONS), "failed": []}
    records = results["dense"] + results["chance"] + results["generations"]
    assert len(records) == 8
    for record in records:
        moves = float(record["prompt"] == 0)
        assert record["vbench"] == pytest.approx(
            dict.fromkeys(vbench.DIMENSIONS, 0.9) | {"dynamic_degree": moves, "imaging_quality": 0.6}
        )
    (point,) = results["curves"][0]["points"]
    assert point["vbench"]["mean"] == pytest.approx((4 * 0.9 + 0.5 + 0.6) / 6)
    assert point["vbench"]["spread"] > 0 and point["vbench"]["dimensions"]["dynamic_degree"] == 0.5
    # At runtime 1 every method is done sooner, so its only point counts.
    assert [row["vbench"] for row in results["frontier"][0]["rows"]] == pytest.approx([0.7833, 0.7833], abs=1e-4)
    page = (folder / "index.html").read_text()
    assert "VBench against runtime" in page and "VBench: dynamic degree" in page
    # Both prompts' videos are kept, and the page shows those of as many prompts as were asked for.
    assert page.count('<article class="clips">') == 1 and len(list((folder / "videos").glob("1-*.mp4"))) == 4
    assert sorted(path.suffix for path in (folder / "work" / "vbench").iterdir()) == [".json"] * 4 + [".log"] * 4


@pytest.mark.slow
def test_batches_and_seeds_are_scored_too(install, tmp_path):
    calls = install()
    assert cli.main([*ARGUMENTS, str(tmp_path / "report"), "--batch", "2", "--seeds", "2"]) == 0
    assert [len(names) for _, _, names in calls()] == [4] * 4
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["settings"]["cost"] == "evaluations" and all(record["vbench"] for record in results["generations"])
    assert all(row["vbench"] for at in results["frontier"] for row in at["rows"] if row["reached"])


def test_an_evaluation_that_fails_is_told_and_made_again_alone(install, tmp_path, capsys):
    install(broken="steps")
    assert cli.main([*ARGUMENTS, str(tmp_path / "report")]) == 0
    out, err = capsys.readouterr()
    reason = "RuntimeError: no kernel image is available (work/vbench/steps-0.5.log)"
    assert f"4/4 VBench steps 0.5: {reason}" in err.splitlines()
    assert f"VBench of fewer steps, the pipeline's solver, 0.5: failed: {reason}" in out.splitlines()
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["vbench"]["failed"] == [{"method": "steps", "value": 0.5, "reason": reason}]
    values = {line["method"]: line["points"][0]["vbench"] for line in results["curves"]}
    assert values["steps"] is None and values["heterostep"] is not None
    assert "Without scores by VBench" in (tmp_path / "report" / "index.html").read_text()
    calls = install()
    assert cli.main([*ARGUMENTS, str(tmp_path / "report")]) == 0
    assert [names for _, _, names in calls()] == [["0-steps-0.5.mp4", "1-steps-0.5.mp4"]]
    again = json.loads((tmp_path / "report" / "results.json").read_text())
    assert again["vbench"]["failed"] == [] and all(line["points"][0]["vbench"] for line in again["curves"])


def test_other_results_than_vbenchs_are_refused(tmp_path):
    path = tmp_path / "results_eval_results.json"
    entries = [{"video_path": "videos/0.mp4", "video_results": 0.5}]
    whole = {dimension: [0.5, entries] for dimension in vbench.DIMENSIONS}
    path.write_text(json.dumps(whole))
    assert vbench.read(path, ["videos/0.mp4"])["0.mp4"]["imaging_quality"] == 0.005
    for broken in ("", "[]", json.dumps(whole | {"aesthetic_quality": 3}), '{"subject_consistency": [0.5, []]}'):
        path.write_text(broken)
        with pytest.raises(HeterostepError, match="not of the known form"):
            vbench.read(path, ["videos/0.mp4"])
    path.write_text(json.dumps(whole | {"aesthetic_quality": [0, [entries[0] | {"video_results": float("nan")}]]}))
    with pytest.raises(HeterostepError, match="aesthetic_quality of 0.mp4 is nan"):
        vbench.read(path, ["videos/0.mp4"])


def test_without_scores_there_is_neither_column_nor_plot(install, tmp_path):
    arguments = [argument for argument in ARGUMENTS if argument != "--vbench"]
    calls = install()
    assert cli.main([*arguments, str(tmp_path / "report")]) == 0
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert not calls() and all(record["vbench"] is None for record in results["generations"])
    assert results["curves"][0]["points"][0]["vbench"] is None
    assert "VBench" not in write_page(tmp_path / "report").read_text()
    console = Console(record=True, width=200, file=io.StringIO())
    table.show(results, console)
    assert "VBench" not in console.export_text()
