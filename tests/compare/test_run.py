"""The comparison on a small random pipeline: what is measured, what a stop and a fault leave, what is read off."""

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from heterostep.compare import measure, summary, table
from heterostep.compare.judging import Judges, activity, judge, world_scores
from heterostep.compare.measure import Prompt, counted, generate, likeness, refuses_batch
from heterostep.compare.methods import METHODS
from heterostep.compare.methods.method import Method
from heterostep.compare.methods.own import OWN
from heterostep.compare.prompts import NEXT_SEED, held_out, held_out_of, read_prompts, with_seeds
from heterostep.compare.run import CHANCE, DENSE, Comparison, Settings, sweep
from heterostep.errors import HeterostepError
from heterostep.video import read_video
from rows import ROWS, quickly
from small import small_pipeline

OPTIONS = {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3.0, "num_inference_steps": 12}
PROMPTS = [Prompt("a red circle moving right", 0), Prompt("green square over stripes", 1)]
BY_NAME = {method.name: method for method in OWN}


def settings(**changes):
    values = dict(model="small", mode="text", options=OPTIONS, runtimes=(1.0, 0.75, 0.5), fps=16, points=2)
    return Settings(**{**values, **changes})


def failing():
    @contextlib.contextmanager
    def apply(pipe, value, num_steps):
        raise ValueError("no such luck\nand more")
        yield

    return Method("failing", "always fails", "nothing", (1.0, 2.0), apply)


def refusing():
    return Method("refusing", "never runs", "nothing", (1.0,), BY_NAME["steps"].apply, lambda pipe: "not this model")


@pytest.fixture
def pipe():
    return small_pipeline()


@pytest.fixture
def methods():
    return [BY_NAME["heterostep"], BY_NAME["steps"], failing(), refusing()]


def test_a_comparison_from_end_to_end(pipe, methods, tmp_path):
    told = []
    results = Comparison(pipe, PROMPTS, methods, settings(), tmp_path / "report", "the command", told.append).run()
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == results
    status = {method["name"]: (method["status"], method["reason"]) for method in results["methods"]}
    assert status["heterostep"] == ("ran", None) and status["refusing"] == ("not supported", "not this model")
    assert status["failing"] == ("failed", "ValueError: no such luck")
    ran = {(r["method"], r["value"], r["prompt"]) for r in results["generations"]}
    assert ran == set(itertools.product(("heterostep", "steps"), (0.75, 0.5), (0, 1)))
    assert all(r["evaluations"] == 1 and r["psnr"] is None and r["ssim"] == 1 for r in results["dense"])
    assert all(r["psnr"] is not None for r in results["chance"])
    for record in results["generations"]:
        assert record["evaluations"] == pytest.approx(record["value"], abs=0.03)
        frames, _ = read_video(tmp_path / "report" / record["video"])
        assert frames.shape == (9, 64, 64, 3)
        assert (record["heatmap"] is not None) == (record["method"] == "heterostep")
        assert record["heatmap"] is None or (tmp_path / "report" / record["heatmap"]).is_file()
    # Two dense runs and two values of two methods for each of two prompts, and a method that failed once.
    assert len(told) == 2 * (2 + 4) + 1
    assert "forward" not in vars(pipe.transformer)


def test_a_stopped_comparison_goes_on(pipe, methods, tmp_path, monkeypatch):
    from heterostep.compare import run as module

    made = []
    plain = module.generate

    def interrupted(*arguments):
        if len(made) == 8:
            raise KeyboardInterrupt
        made.append(arguments[1:4])
        return plain(*arguments)

    monkeypatch.setattr(module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Comparison(pipe, PROMPTS, methods[:2], settings(), tmp_path, "first").run()
    # The first prompt is done and written; of the line that was being written, half is there.
    known = json.loads((tmp_path / "results.json").read_text())
    assert not known["complete"] and {r["prompt"] for r in known["generations"]} == {0}
    with (tmp_path / "work" / "generations.jsonl").open("a") as log:
        log.write('{"key": [0, 0, "st')
    rest = []
    monkeypatch.setattr(module, "generate", lambda *a: rest.append(a[1:4]) or plain(*a))
    results = Comparison(pipe, PROMPTS, methods[:2], settings(), tmp_path, "second").run()
    assert len(made) + len(rest) == 12 and len(results["generations"]) == 8
    again = []
    monkeypatch.setattr(module, "generate", lambda *a: again.append(a))
    assert Comparison(pipe, PROMPTS, methods[:2], settings(), tmp_path, "third").run()["curves"] == results["curves"]
    assert not again
    other = settings(runtimes=(0.3,), options={**OPTIONS, "num_inference_steps": 20})
    with pytest.raises(
        HeterostepError, match=r"another comparison \(runtimes 1.0,0.75,0.5, not 0.3; steps 12, not 20\)"
    ):
        Comparison(pipe, PROMPTS, methods[:2], other, tmp_path, "other")
    with pytest.raises(HeterostepError, match=r"\(2 prompts, not 1\)"):
        Comparison(pipe, PROMPTS[:1], methods[:2], settings(), tmp_path, "other")
    with pytest.raises(HeterostepError, match=r"\(other prompts or seeds\)"):
        Comparison(pipe, PROMPTS[::-1], methods[:2], settings(), tmp_path, "other")


def test_a_comparison_is_extended_method_by_method(pipe, tmp_path):
    bound = next(method for method in OWN if method.diagnostic)
    known, runtimes = list(METHODS.values()), settings(runtimes=(0.5,), shown=0)
    Comparison(pipe, PROMPTS, [bound, failing()], runtimes, tmp_path, "", known=known).run()
    log = tmp_path / "work" / "generations.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (line,) = (line for line in lines if line["key"] == [0, 0, bound.name, 0.5])
    with log.open("a") as file:
        file.write(json.dumps({**line, "key": [0, 0, "ours, once", 0.5]}) + "\n")
    results = Comparison(pipe, PROMPTS, [BY_NAME["heterostep"]], runtimes, tmp_path, "", known=known).run()
    assert [(m["name"], m["status"], m["diagnostic"]) for m in results["methods"]] == [
        ("heterostep", "ran", False), (bound.name, "ran", True), ("failing", "failed", False),
        ("ours, once", "ran", False),
    ]  # fmt: skip
    assert results["methods"][1]["label"] == bound.label and results["methods"][3]["label"] == "ours, once"
    assert results["methods"][1]["reason"] is None and "1 of 2 prompts" in results["methods"][3]["reason"]
    assert [line["method"] for line in results["curves"]] == ["heterostep", bound.name, "ours, once"]
    assert results["frontier"][0]["winners"]["psnr"] != bound.name
    assert all(r["evaluations"] == 0.5 for r in results["generations"] if r["method"] == bound.name)


def test_a_method_that_was_not_gone_on_with_is_missing(pipe, tmp_path, monkeypatch):
    from heterostep.compare import run as module

    short, plain = settings(runtimes=(0.5,), shown=0), module.generate

    def interrupted(pipe, prompts, method, *rest):
        if prompts[0] == PROMPTS[1] and method is not None:
            raise KeyboardInterrupt
        return plain(pipe, prompts, method, *rest)

    monkeypatch.setattr(module, "generate", interrupted)
    known = list(METHODS.values())
    with pytest.raises(KeyboardInterrupt):
        Comparison(pipe, PROMPTS, [BY_NAME["steps"]], short, tmp_path, "", known=known).run()
    monkeypatch.setattr(module, "generate", plain)
    results = Comparison(pipe, PROMPTS, [BY_NAME["heterostep"]], short, tmp_path, "", known=known).run()
    assert not results["complete"]
    assert [m["reason"] for m in results["methods"]] == [None, "stopped after 1 of 2 prompts, and not gone on with"]
    results = Comparison(pipe, PROMPTS, [BY_NAME["steps"]], short, tmp_path, "", known=known).run()
    assert results["complete"] and [m["reason"] for m in results["methods"]] == [None, None]


@pytest.mark.parametrize("name", ["index.html", "results.json", "videos/holiday.mp4", "work/thesis.txt"])
def test_a_folder_with_other_files_is_left_alone(pipe, tmp_path, name):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(HeterostepError, match="is of something else, and would be replaced: give a new or an empty"):
        Comparison(pipe, PROMPTS, [BY_NAME["steps"]], settings(), tmp_path, "")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine] and mine.read_text() == "mine"


@pytest.mark.parametrize("batch", [1, 2])
def test_prompts_are_added_to_a_comparison(pipe, tmp_path, monkeypatch, batch):
    from heterostep.compare import run as module

    made, plain = [], module.generate
    monkeypatch.setattr(module, "generate", lambda *a: made.append([prompt.seed for prompt in a[1]]) or plain(*a))
    both, short = [BY_NAME["steps"], failing()], settings(runtimes=(0.5,), shown=1, batch=batch)
    three = [*PROMPTS, Prompt("a blue circle", 2)]
    Comparison(pipe, PROMPTS[:1], both, short, tmp_path, "").run()
    with pytest.raises(HeterostepError, match="has steps for 1 of these 3 prompts: give steps too"):
        Comparison(pipe, three, [BY_NAME["heterostep"]], short, tmp_path, "", known=both)
    with pytest.raises(HeterostepError, match=r"\(1 prompt, not 2\)"):
        Comparison(pipe, three[1:], both, short, tmp_path, "")
    with pytest.raises(HeterostepError, match=r"\(points 2, not 3; 1 prompt, not 3\)"):
        Comparison(pipe, three, both, dataclasses.replace(short, points=3), tmp_path, "")
    made.clear()
    # The failed method need not be given: it is not tried again.
    added = Comparison(pipe, three, both[:1], dataclasses.replace(short, seeds=3, shown=2), tmp_path, "", known=both)
    results = added.run()
    assert results["complete"] and len(results["prompts"]) == 3
    assert {tuple(seeds) for seeds in made if seeds[0] < 3} == ({(1,), (2,)} if batch == 1 else {(0, 1), (2,)})
    whole = Comparison(pipe, three, both[:1], short, tmp_path / "whole", "").run()
    for name in ("dense", "chance", "generations"):
        figures = [{(r["method"], r["value"], r["prompt"]): r["psnr"] for r in each[name]} for each in (results, whole)]
        assert figures[0] == figures[1]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_budget_that_cannot_be_met_is_left_out_alone(pipe, tmp_path, batch):
    told = []
    few = settings(options={**OPTIONS, "num_inference_steps": 4}, runtimes=(0.75, 0.5, 0.01), batch=batch, shown=0)
    methods = [BY_NAME["heterostep"]]
    for _ in range(2):
        # Again: what was left out is known.
        results = Comparison(pipe, PROMPTS, methods, few, tmp_path, "", told.append).run()
        (method,) = results["methods"]
        assert method["status"] == "ran"
        assert method["reason"].startswith("without 0.01: ") and "lowest possible" in method["reason"]
        assert {r["value"] for r in results["generations"]} == {0.75, 0.5}
        assert not results["frontier"][-1]["rows"][0]["reached"]
    assert len([line for line in told if "left out" in line]) == 1
    console = Console(width=200, file=io.StringIO())
    table.show(results, console)
    assert "heterostep: without 0.01: " in console.file.getvalue()
    none = Comparison(pipe, PROMPTS, methods, dataclasses.replace(few, runtimes=(0.01,)), tmp_path / "none", "").run()
    assert none["methods"][0]["status"] == "not supported" and not none["curves"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": 1, "prompts": []}', None, b"\xff"])
def test_damaged_settings_are_told_in_one_line(pipe, methods, tmp_path, content):
    arguments = pipe, PROMPTS[:1], [], settings(shown=0), tmp_path, ""
    Comparison(*arguments).run()
    known = tmp_path / "settings.json"
    known.unlink()
    if content is not None:
        known.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        HeterostepError, match="settings.json is missing or damaged, or not a comparison's: restore it"
    ) as caught:
        Comparison(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["first line", "no key", "half a video", "empty video", "no video"])
def test_what_a_damaged_folder_lacks_is_made_again(pipe, tmp_path, damage):
    def compared(*methods):
        return Comparison(pipe, PROMPTS[:1], methods, settings(runtimes=(0.5,), shown=0), tmp_path, "").run()

    once = compared(BY_NAME["steps"])
    log, dense = tmp_path / "work" / "generations.jsonl", tmp_path / "work" / "dense-0.npy"
    lines = log.read_text().splitlines(keepends=True)
    if damage == "first line":
        log.write_text("".join([lines[0][:10] + "\n", *lines[1:]]))
    elif damage == "no key":
        log.write_text(
            "".join(
                [
                    *lines,
                    "{}\n",
                    "[]\n",
                    '{"key": [0, 0]}\n',
                    '{"key": [0, [], 1, 2]}\n',
                    '{"key": [0, 0, "steps", 0.9]}\n',
                ]
            )
        )
    elif damage == "half a video":
        dense.write_bytes(dense.read_bytes()[:-100])
    elif damage == "empty video":
        dense.write_bytes(b"")
    else:
        dense.unlink()
    again = compared(BY_NAME["steps"], BY_NAME["heterostep"])
    assert [curve["method"] for curve in again["curves"]] == ["steps", "heterostep"]
    assert again["curves"][0]["points"][0]["psnr"] == once["curves"][0]["points"][0]["psnr"]
    assert np.load(dense).shape[0] == 9


FILES = ("dense-0.npy", "0-dense-1.mp4", "0-heterostep-0-5.png", "results.json", "jsonl")


@pytest.mark.parametrize("name", quickly(FILES, ["0-dense-1.mp4", "jsonl"]))
def test_a_full_disk_is_told_with_the_file(pipe, tmp_path, monkeypatch, name):
    from heterostep import video, viz

    arguments = pipe, PROMPTS[:1], [BY_NAME["heterostep"]], settings(runtimes=(0.5,)), tmp_path, ""

    def full(*_):
        # As numpy says it.
        raise (
            OSError("problem writing element 303104 to file") if name.endswith("npy") else OSError(errno.ENOSPC, "full")
        )

    comparison = Comparison(*arguments)
    with monkeypatch.context() as patch:
        if name.endswith("npy"):
            patch.setattr(np, "save", full)
        elif name.endswith("mp4"):
            patch.setattr(video, "write_video", full)
        elif name.endswith("png"):
            patch.setattr(viz, "write_heatmap", full)
        elif name == "jsonl":
            (tmp_path / "work" / "generations.jsonl").symlink_to("/dev/full")
        else:
            patch.setattr(Path, "write_text", full)
        with pytest.raises(
            HeterostepError, match=f"no room left for .*{name.split('-')[-1]}: the same command goes on"
        ):
            comparison.run()
    if name == "jsonl":
        (tmp_path / "work" / "generations.jsonl").unlink()
    assert Comparison(*arguments).run()["complete"]


def test_a_bound_stands_at_the_budget_that_it_is_the_bound_of(pipe, tmp_path):
    diagnostic = next(method for method in OWN if method.diagnostic)
    methods = [BY_NAME["heterostep"], diagnostic]
    results = Comparison(pipe, PROMPTS[:1], methods, settings(runtimes=(0.5,)), tmp_path, "").run()
    (bound,) = (r for r in results["generations"] if r["method"] == diagnostic.name)
    assert bound["runtime"] == bound["evaluations"] == 0.5
    assert results["frontier"][0]["winners"]["psnr"] != diagnostic.name


def test_repeats_are_interleaved_and_their_median_counts(pipe, methods, tmp_path):
    comparison = Comparison(pipe, PROMPTS[:1], methods[:2], settings(repeats=3, runtimes=(0.5,)), tmp_path, "")
    order = [visit.name for visit in comparison.visits()]
    assert order == [DENSE, CHANCE, "heterostep", "steps"] + [DENSE, "heterostep", "steps"] * 2
    results = comparison.run()
    assert all(len(record["seconds"]) == 3 for record in results["generations"] + results["dense"])
    (record,) = (r for r in results["generations"] if r["method"] == "steps")
    assert record["runtime"] == pytest.approx(np.median(record["seconds"]) / np.median(results["dense"][0]["seconds"]))


@pytest.mark.parametrize(
    "method",
    quickly(OWN, [each for each in OWN if each.name in ("heterostep", "hsa", "tokens-drift", "round-robin", "steps")]),
    ids=lambda method: method.name,
)
def test_every_budget_saves_what_it_says_and_leaves_nothing(pipe, method):
    scheduler = pipe.scheduler
    plain = generate(pipe, PROMPTS[:1], None, 1.0, OPTIONS)
    half = generate(pipe, PROMPTS[:1], method, 0.5, OPTIONS)
    if not method.diagnostic:
        assert half.rows / plain.rows == pytest.approx(0.5, abs=0.02)
    assert not np.array_equal(half.clips, plain.clips)
    assert pipe.scheduler is scheduler
    assert np.array_equal(generate(pipe, PROMPTS[:1], None, 1.0, OPTIONS).clips, plain.clips)


def test_rows_tell_skipped_tokens_from_skipped_steps(pipe):
    with counted(pipe) as rows, torch.no_grad():
        generate(pipe, PROMPTS[:1], None, 1.0, OPTIONS)
    # Queries and feed-forward of two layers, two guidance branches, 48 tokens, 12 steps.
    assert sum(rows) == 2 * 2 * 2 * 48 * 12


def test_why_lpips_is_missing_is_said(monkeypatch):
    clip = np.zeros((1, 16, 16, 3), np.uint8)
    measure._perceptual.cache_clear()
    # So an import fails.
    monkeypatch.setitem(sys.modules, "lpips", None)
    found = likeness(clip, clip)
    measure._perceptual.cache_clear()
    assert found["lpips"] is None and found["lpips_missing"].startswith("ModuleNotFoundError: ")


def _drifting(frames):
    """Coarse and fine noise that moves a pixel a frame."""
    rng = np.random.default_rng(1)
    coarse = np.kron(rng.integers(0, 200, (8, 10)), np.ones((8, 8)))
    still = (coarse + rng.integers(0, 50, coarse.shape)).astype(np.uint8)[..., None].repeat(3, -1)
    return np.stack([still[:, at : at + 64] for at in range(frames)])


def test_vmaf_falls_with_detail_and_motion():
    clip = _drifting(8)
    softer = ((clip + np.roll(clip, 1, 1).astype(int) + np.roll(clip, 1, 2)) // 3).astype(np.uint8)
    scores = [likeness(each, clip)["vmaf"] for each in (clip, softer, clip[[0] * 8], 255 - clip)]
    assert 97 < scores[0] <= 100 and all(more > less + 5 for more, less in itertools.pairwise(scores))
    # What Netflix's own program (libvmaf, model v0.6.1) says of one picture beside itself.
    assert likeness(clip[:1], clip[:1])["vmaf"] == pytest.approx(97.428, abs=1e-3)


def test_why_vmaf_is_missing_is_said(monkeypatch):
    small, clip = np.zeros((2, 16, 32, 3), np.uint8), np.zeros((2, 32, 32, 3), np.uint8)
    found = likeness(small, small)
    assert found["vmaf"] is None and found["vmaf_missing"] == "its frames want 32 x 32 pixels"
    assert likeness(clip, clip)["vmaf"] is not None

    def broken(*args):
        raise RuntimeError("no memory\nleft")

    monkeypatch.setattr("torchmetrics.functional.video.video_multi_method_assessment_fusion", broken)
    assert likeness(clip, clip)["vmaf_missing"] == "RuntimeError: no memory"
    # An older torchmetrics has no VMAF.
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.video", None)
    assert likeness(clip, clip)["vmaf_missing"].startswith("ModuleNotFoundError: ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert likeness(clip, clip)["vmaf_missing"].startswith("not installed: vmaf_torch, einops (pip install")


def test_likeness_of_equal_and_of_other_clips(tmp_path):
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 255, (3, 32, 32, 3), np.uint8)
    np.save(tmp_path / "dense.npy", clip)
    same = judge(clip, tmp_path / "dense.npy", None)
    assert same["psnr"] is None and 80 < same["activity"] < 90 and likeness(clip, clip)["ssim"] == pytest.approx(1)
    assert activity(clip[:1]) == activity(clip[[0, 0, 0]]) == 0
    other = np.clip(clip.astype(int) + 8, 0, 255).astype(np.uint8)
    assert 28 < judge(other, tmp_path / "dense.npy", None)["psnr"] < 32 and 0.9 < likeness(other, clip)["ssim"] < 1


def test_motion_is_the_shapes_or_else_the_change_from_frame_to_frame():
    frozen, half = {"displacement": 0.0, "activity": 0.0}, {"displacement": 40.0, "activity": 3.0}
    dense, unjudged = {"displacement": 80.0, "activity": 4.0}, {"displacement": None, "activity": 4.0}
    assert [summary.motion_distance(each, dense) for each in (frozen, half, dense)] == [1, 0.5, 0]
    assert summary.motion_distance({**half, "displacement": None}, unjudged) == 0.25
    # Results that were written before there was such a figure.
    assert summary.motion_distance({"displacement": None}, {"displacement": None}) is None


def point(runtime, psnr, value=0.0, evaluations=None):
    figure = {"mean": psnr, "spread": 0.0}
    runtimes = {"mean": runtime, "spread": 0.0}
    spent = runtimes if evaluations is None else {"mean": evaluations, "spread": 0.0}
    return {"value": value, "runtime": runtimes, "evaluations": spent, "psnr": figure, "ssim": None, "lpips": None,
            "caption": None, "motion": None, "vbench": None}  # fmt: skip


def test_curves_are_read_off_between_points_and_never_beyond_the_fast_end():
    points = [point(0.8, 40.0), point(0.4, 30.0)]
    assert summary.read_off(points, 0.6) == {
        "reached": True, "interpolated": True, "psnr": pytest.approx(35.0),
        "ssim": None, "vmaf": None, "lpips": None, "caption": None, "motion": None, "vbench": None,
    }  # fmt: skip
    assert summary.read_off(points, 0.4)["psnr"] == 30.0 and not summary.read_off(points, 0.4)["interpolated"]
    assert summary.read_off(points, 1.0)["psnr"] == 40.0
    assert not summary.read_off(points, 0.3)["reached"] and not summary.read_off([], 0.5)["reached"]
    # Half way to a video that equals the dense one is no figure.
    identical = [point(1.0, summary.IDENTICAL_DB), point(0.4, 30.0)]
    assert summary.read_off(identical, 0.7)["psnr"] is None and summary.read_off(identical, 0.4)["psnr"] == 30.0


def test_the_worst_tenth_is_told_of_every_point():
    def low(psnrs):
        empty = dict.fromkeys(("ssim", "lpips", "caption", "displacement"), None)
        made = [
            {"method": "m", "value": 1, "prompt": i, "runtime": 0.5, "evaluations": 0.5, "psnr": psnr, **empty}
            for i, psnr in enumerate(psnrs)
        ]
        dense = [{"prompt": i, "displacement": None} for i in range(len(psnrs))]
        (line,) = summary.curves(made, dense)
        return line["points"][0]["psnr"]

    assert low([30.0]) == {"mean": 30.0, "spread": 0.0, "low": 30.0}
    assert low([40.0, 30.0, 35.0])["low"] == 30.0 and low([float(i) for i in range(19)])["low"] == 0.0
    assert low([float(i) for i in range(30, 0, -1)])["low"] == 2.0
    # Identical videos are of the best, and count among all.
    assert low([None] * 19 + [30.0])["low"] == 30.0 and low([None] * 18 + [30.0, 20.0])["low"] == 25.0
    assert low([None, None]) == {"mean": summary.IDENTICAL_DB, "spread": 0.0, "low": summary.IDENTICAL_DB}


def test_curves_can_be_read_off_by_evaluations():
    points = [
        {**point(0.0, 40.0, evaluations=0.8), "runtime": None},
        {**point(0.0, 30.0, evaluations=0.4), "runtime": None},
    ]
    read = summary.read_off(points, 0.6, summary.EVALUATIONS)
    assert read["psnr"] == pytest.approx(35.0) and read["interpolated"]
    assert not summary.read_off(points, 0.3, summary.EVALUATIONS)["reached"]
    crossed = [point(0.4, 40.0, evaluations=0.8), point(0.8, 30.0, evaluations=0.4)]
    (at,) = summary.frontier([{"method": "ours", "points": crossed}], [0.8], cost=summary.EVALUATIONS)
    assert at["rows"][0]["psnr"] == 40.0


def test_bounds_never_win():
    lines = [{"method": "ours", "points": [point(0.5, 30.0)]}, {"method": "bound", "points": [point(0.5, 40.0)]}]
    (at,) = summary.frontier(lines, [0.5], ["bound"])
    assert at["winners"] == {"psnr": "ours", "ssim": None, "caption": None}


def test_a_draw_has_no_winner():
    lines = [{"method": name, "points": [point(0.5, 30.0)]} for name in ("ours", "theirs")]
    assert summary.frontier(lines, [0.5])[0]["winners"]["psnr"] is None


def test_sweeps_are_the_budgets_or_a_few_of_the_values():
    assert sweep(BY_NAME["steps"], settings()) == [0.75, 0.5]
    dial = Method("dial", "", "", (1.0, 2.0, 3.0, 4.0, 5.0), BY_NAME["steps"].apply)
    assert sweep(dial, settings(points=3)) == [1.0, 3.0, 5.0] and sweep(dial, settings(points=1)) == [5.0]
    assert sweep(dial, settings(points=9)) == list(dial.values)


def test_the_table_marks_winners_and_what_was_not_reached():
    lines = [{"method": "heterostep", "points": [point(0.5, 30.0)]}, {"method": "steps", "points": [point(0.7, 28.0)]}]
    results = {
        "frontier": summary.frontier(lines, [0.5]),
        "methods": [{"name": "failing", "label": "Some Cache", "status": "failed", "reason": "no luck [1]"}],
        "settings": {"cost": "runtime"},
        "chance": [{"runtime": 1.04}],
        "vbench": {"failed": [{"method": "failing", "value": 2.0, "reason": "no network"}]},
    }
    console = Console(width=100, file=io.StringIO())
    table.show(results, console)
    shown = console.file.getvalue()
    assert "30.0 *" in shown and "not reached" in shown and "Some Cache: failed: no luck [1]" in shown
    assert "runtime 0.5 of dense" in shown and "VBench of Some Cache, 2: failed" in shown and "busy" not in shown
    table.show(results | {"curves": lines}, console)
    assert "not reached (0.70 at the least)" in console.file.getvalue()
    table.show(results | {"chance": [{"runtime": 0.8}, {"runtime": 1.02}, {"runtime": 1.2}]}, console)
    assert "differ by 20% in seconds: the machine was busy" in console.file.getvalue()
    table.show(results | {"settings": {"cost": "evaluations"}}, console)
    assert "token evaluations" in console.file.getvalue()


def test_the_table_says_where_videos_are_identical_to_dense():
    lines = [{"method": "cache", "points": [point(1.0, summary.IDENTICAL_DB), point(0.4, 30.0)]}]
    results = {"frontier": summary.frontier(lines, [1.0, 0.7, 0.4]), "methods": [], "settings": {"cost": "runtime"}}
    console = Console(width=100, file=io.StringIO())
    table.show(results | {"chance": []}, console)
    shown = console.file.getvalue()
    assert shown.count("identical") == 2 and "~identical" in shown and "30.0" in shown and "100.0" not in shown


def test_prompts_come_from_a_file_or_are_held_out(tmp_path):
    from PIL import Image

    Image.new("RGB", (100, 80), "teal").save(tmp_path / "first.png")
    (tmp_path / "prompts.txt").write_text("a cat\tfirst.png\n\na dog\tfirst.png\n")
    prompts = read_prompts(tmp_path / "prompts.txt", 5, (64, 64))
    assert [(p.text, p.seed, p.image.shape) for p in prompts] == [("a cat", 5, (64, 64, 3)), ("a dog", 7, (64, 64, 3))]
    assert read_prompts(tmp_path / "prompts.txt", 0, None)[0].image is None
    (tmp_path / "bad.txt").write_text("a cat\n")
    with pytest.raises(HeterostepError, match="line 1"):
        read_prompts(tmp_path / "bad.txt", 0, (64, 64))
    with pytest.raises(HeterostepError, match="none.txt does not exist"):
        read_prompts(tmp_path / "none.txt", 0, None)
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n")
    assert read_prompts(tmp_path / "marked.txt", 0, None)[0].text == "a cat"
    (tmp_path / "other.txt").write_bytes("a caf\u00e9\n".encode("latin-1"))
    with pytest.raises(HeterostepError, match="not UTF-8 text: .* at byte 5"):
        read_prompts(tmp_path / "other.txt", 0, None)
    first, second = held_out(2, with_image=True)
    assert first.text != second.text and first.image.shape == (192, 192, 3)


# Batches.


def pictures():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in PROMPTS]


@pytest.mark.parametrize(
    "kind",
    [
        "wan2.2-ti2v-t2v",
        "wan2.2-ti2v-i2v",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("wan2.2-i2v", "ltx2.0-t2v")),
    ],
)
@pytest.mark.parametrize("name", ["dense", "heterostep", "steps"])
def test_a_batch_gives_each_prompt_the_video_that_it_has_alone(kind, name):
    pipe, method = ROWS[kind].build(), BY_NAME.get(name)
    prompts = PROMPTS
    if kind.endswith("i2v"):
        prompts = [dataclasses.replace(prompt, image=image) for prompt, image in zip(PROMPTS, pictures())]
    alone = [generate(pipe, [prompt], method, 0.5, OPTIONS) for prompt in prompts]
    batch = generate(pipe, prompts, method, 0.5, OPTIONS)
    assert batch.clips.shape == (2, 9, 64, 64, 3) and batch.rows == sum(run.rows for run in alone)
    for i, run in enumerate(alone):
        assert np.abs(batch.clips[i].astype(int) - run.clips[0]).max() <= 1, "rounding, no more"
        if name == "heterostep":
            assert (batch.steps_maps[i] == run.steps_maps[0]).mean() > 0.95
    assert np.abs(batch.clips[0].astype(int) - batch.clips[1]).mean() > 1, "two prompts, two videos"
    assert "prepare_latents" not in vars(pipe)


def test_first_frames_of_another_size_are_scaled_as_one_is_alone():
    pipe, images = ROWS["wan2.2-ti2v-i2v"].build(), [image[:48, :, :] for image in pictures()]
    prompts = [dataclasses.replace(prompt, image=image) for prompt, image in zip(PROMPTS, images)]
    batch = generate(pipe, prompts, None, 1.0, OPTIONS)
    alone = [generate(pipe, [prompt], None, 1.0, OPTIONS).clips[0] for prompt in prompts]
    assert np.abs(batch.clips.astype(int) - np.stack(alone)).max() <= 1


def test_a_pipeline_that_cannot_take_several_first_frames_says_so(tmp_path):
    assert refuses_batch(small_pipeline(), False) is None
    assert refuses_batch(small_pipeline(image_to_video=True), True) is None
    prompts = [dataclasses.replace(prompt, image=image) for prompt, image in zip(PROMPTS, pictures())]
    for kind in ("wan2.1-i2v", "ltx2.0-i2v"):
        pipe = ROWS[kind].build()
        with pytest.raises(HeterostepError, match="take a batch of 1") as caught:
            Comparison(pipe, prompts, [], settings(batch=2), tmp_path / "report", "")
        assert "\n" not in str(caught.value) and not (tmp_path / "report").exists()
        with pytest.raises(HeterostepError, match="take a batch of 1"):
            generate(pipe, prompts, None, 1.0, OPTIONS)


def three_prompts():
    return [*PROMPTS, Prompt("a green circle", 2)]


def test_a_comparison_in_batches(pipe, methods, tmp_path):
    told = []
    comparison = Comparison(pipe, three_prompts(), methods, settings(batch=2, shown=1), tmp_path, "", told.append)
    assert [list(v.prompts) for v in comparison.visits() if v.name == DENSE] == [[0, 1], [2]]
    results = comparison.run()
    assert results["settings"]["cost"] == "evaluations" and results["settings"]["batch"] == 2
    ran = {(r["method"], r["value"], r["prompt"]) for r in results["generations"]}
    assert ran == set(itertools.product(("heterostep", "steps"), (0.75, 0.5), (0, 1, 2)))
    for record in results["generations"] + results["dense"] + results["chance"]:
        assert record["seconds"] is record["runtime"] is record["peak_bytes"] is None
    assert all(r["evaluations"] == 1 and r["psnr"] is None for r in results["dense"])
    for record in results["generations"]:
        assert record["evaluations"] == pytest.approx(record["value"], abs=0.03)
        assert (record["video"] is not None) == (record["prompt"] == 0)
    for line in results["curves"]:
        assert [p["evaluations"]["mean"] for p in line["points"]] == pytest.approx([0.75, 0.5], abs=0.03)
        assert all(p["runtime"] is None for p in line["points"])
    (steps,) = (r for at in results["frontier"][-1:] for r in at["rows"] if r["method"] == "steps")
    assert steps["reached"] and not steps["interpolated"]
    # Two batches of two dense runs and four of the methods, and one that failed.
    assert len(told) == 2 * (2 + 4) + 1 and "prompts 1-2 steps 0.5" in told[5] and "prompt 3 dense" in told[7]
    alone = Comparison(pipe, three_prompts(), methods[:2], settings(shown=0), tmp_path / "alone", "").run()
    for one, other in zip(*(sorted(r["generations"], key=str_of) for r in (results, alone))):
        assert str_of(one) == str_of(other) and one["psnr"] == pytest.approx(other["psnr"], abs=0.1)


def str_of(record):
    return f"{record['method']} {record['value']} {record['prompt']}"


@pytest.mark.slow
def test_half_a_batch_is_made_again(pipe, methods, tmp_path, monkeypatch):
    from heterostep.compare import run as module

    arguments = pipe, three_prompts(), methods[:2], settings(batch=2, shown=0), tmp_path, ""
    results = Comparison(*arguments).run()
    log = tmp_path / "work" / "generations.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    (at,) = (i for i, line in enumerate(lines) if json.loads(line)["key"] == [0, 1, "steps", 0.75])
    log.write_text("".join([*lines[:at], lines[at][:20] + "\n", *lines[at + 1 :]]))
    made, plain = [], module.generate
    monkeypatch.setattr(module, "generate", lambda *a: made.append(a[1]) or plain(*a))
    again = Comparison(*arguments).run()
    assert made == [PROMPTS]
    assert again["curves"] == results["curves"] and again["frontier"] == results["frontier"]
    assert len(log.read_text().splitlines()) == len(lines)


def test_the_time_that_is_left_is_told(pipe, methods, tmp_path, monkeypatch):
    from heterostep.compare import run as module

    # Every generation takes two minutes; nothing is left to say after the last.
    now = itertools.count(step=120)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    told = []
    Comparison(pipe, PROMPTS, methods[1:3], settings(runtimes=(0.5,), shown=0), tmp_path, "", told.append).run()
    names = [line.split(":")[0].rpartition(" ")[0] for line in told]
    left = [int(line.split("about ")[1].split()[0]) if "about" in line else 0 for line in told]
    assert all(line.endswith(" min left") for line in told[:-1]) and "left" not in told[-1]
    assert [name.split("prompt ")[1] for name in names] == ["1 dense", "1 dense, another seed", "1 steps", "1 failing",
                                                           "2 dense", "2 dense, another seed", "2 steps"]  # fmt: skip
    # Of nine there are eight left; then the failing method's three others are not made.
    assert left == [18, 16, 14, 6, 4, 2, 0]


def test_the_last_minute_is_told_as_less_than_one(pipe, tmp_path):
    told = []
    Comparison(pipe, PROMPTS[:1], [], settings(shown=0), tmp_path, "", told.append).run()
    assert [line.endswith(", less than a minute left") for line in told] == [True, False]


def test_judging_in_other_processes_gives_the_same(pipe, tmp_path, monkeypatch):
    from heterostep.compare import run as module

    arguments = pipe, held_out(3), [BY_NAME["steps"]], settings(batch=2, shown=0, judged=True)
    here = Comparison(*arguments, tmp_path / "here", "").run()
    monkeypatch.setattr(module, "free_cores", lambda: 2)
    there = Comparison(*arguments, tmp_path / "there", "").run()
    assert there["generations"][0]["caption"] is not None
    assert all(here[key] == there[key] for key in ("dense", "chance", "generations", "curves", "frontier"))
    logs = [(tmp_path / name / "work" / "generations.jsonl").read_text() for name in ("here", "there")]
    assert [json.loads(x) for x in logs[0].splitlines()] == [json.loads(x) for x in logs[1].splitlines()]


def test_an_interrupt_does_not_wait_for_the_judges(pipe, tmp_path, monkeypatch):
    from heterostep.compare import run as module

    monkeypatch.setattr(module, "free_cores", lambda: 2)
    plain, made = module.generate, []

    def interrupted(*arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(arguments)
        return plain(*arguments)

    arguments = pipe, held_out(2), [BY_NAME["steps"]], settings(batch=2, shown=0, judged=True), tmp_path, ""
    monkeypatch.setattr(module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Comparison(*arguments).run()
    monkeypatch.setattr(module, "generate", plain)
    results = Comparison(*arguments).run()
    assert len(results["generations"]) == 4 and all(r["caption"] for r in results["generations"])


def test_judges_here_answer_at_once(tmp_path):
    (prompt,) = held_out(1, with_image=True)
    clip = np.repeat(prompt.image[None], 5, 0)
    np.save(tmp_path / "dense.npy", clip)
    judges = Judges(0)
    figures = judges.judge(clip, tmp_path / "dense.npy", prompt.text)
    assert figures.done() and figures.result() == {"psnr": None, "activity": 0.0, **world_scores(clip, prompt.text)}
    judges.close()


def test_every_seed_is_a_prompt_and_whole_seeds_come_first():
    prompts = held_out(2, with_image=True)
    listed = with_seeds(prompts, 3)
    assert [p.text for p in listed] == [p.text for p in prompts] * 3
    assert [p.seed for p in listed] == [0, 1, NEXT_SEED, NEXT_SEED + 1, 2 * NEXT_SEED, 2 * NEXT_SEED + 1]
    assert listed[3].image is prompts[1].image and with_seeds(prompts, 1) == prompts


def test_which_methods_decide_for_a_whole_batch_is_in_the_results(pipe, tmp_path):
    whole = {name for name, method in METHODS.items() if method.whole_batch}
    assert whole == {"first-block-cache", "cache-dit", "seacache", "seacache-hold"}
    methods = [METHODS["steps"], METHODS["first-block-cache"]]
    results = Comparison(pipe, PROMPTS, methods, settings(batch=2, points=1, shown=0), tmp_path, "").run()
    assert [method["whole_batch"] for method in results["methods"]] == [False, True]


def test_a_models_folder_brings_prompts_and_sizes_along(tmp_path):
    from PIL import Image

    from heterostep.checkpoints import about

    (tmp_path / "frames").mkdir()
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "frames" / "0.png")
    (tmp_path / "frames" / "1.png").write_bytes(b"no picture")
    own = [
        {"prompt": "a cat", "image": "frames/0.png"},
        {"prompt": "a dog", "image": "frames/1.png"},
        {"prompt": "an owl"},
    ]
    file = tmp_path / "heterostep.json"
    file.write_text(json.dumps({"defaults": {"height": 48, "fps": 12}, "held_out": own}))
    assert about(str(tmp_path))["defaults"] == {"height": 48, "fps": 12}
    assert [(p.text, p.seed) for p in held_out_of(str(tmp_path), 2, 1)] == [("a dog", 1), ("an owl", 2)]
    (prompt,) = held_out_of(str(tmp_path), 1, with_image=True)
    assert prompt.image.shape == (48, 64, 3)
    for count, first, fault in (
        (4, 0, "^count 4 is more than .*'s own prompts .3.: lower it, or give a file of prompts"),
        (2, 2, "^count 2 from seed 2 on is more than .*'s own prompts"),
        (1, 1, "cannot read the image"),
        (1, 2, "without first frames"),
    ):
        with pytest.raises(HeterostepError, match=fault):
            held_out_of(str(tmp_path), count, first, with_image=True)
    for content, fault in (
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"defaults": {"hight": 48}}', "may have"),
    ):
        file.write_text(content)
        with pytest.raises(HeterostepError, match=fault):
            about(str(tmp_path))
    file.unlink()
    with pytest.raises(HeterostepError, match="give a file of"):
        held_out_of(str(tmp_path), 1)
