"""The comparison on a small random pipeline: what is measured, what a stop and a fault leave, what is read off."""

import contextlib
import io
import itertools
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from heterostep.compare import summary, table
from heterostep.compare.measure import Prompt, counted, generate, likeness
from heterostep.compare.method import Method
from heterostep.compare.own import OWN
from heterostep.compare.prompts import held_out, read_prompts
from heterostep.compare.run import CHANCE, DENSE, Comparison, Settings, sweep
from heterostep.errors import HeterostepError
from heterostep.video import read_video
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
    with pytest.raises(HeterostepError, match="another comparison"):
        Comparison(pipe, PROMPTS, methods[:2], settings(runtimes=(0.3,)), tmp_path, "other")


def test_a_bound_stands_at_the_budget_that_it_is_the_bound_of(pipe, tmp_path):
    methods = [BY_NAME["heterostep"], BY_NAME["heterostep-fresh"]]
    results = Comparison(pipe, PROMPTS[:1], methods, settings(runtimes=(0.5,)), tmp_path, "").run()
    (bound,) = (r for r in results["generations"] if r["method"] == "heterostep-fresh")
    assert bound["runtime"] == bound["evaluations"] == 0.5
    assert results["frontier"][0]["winners"]["psnr"] != "heterostep-fresh"


def test_repeats_are_interleaved_and_their_median_counts(pipe, methods, tmp_path):
    comparison = Comparison(pipe, PROMPTS[:1], methods[:2], settings(repeats=3, runtimes=(0.5,)), tmp_path, "")
    order = [visit.name for visit in comparison.visits()]
    assert order == [DENSE, CHANCE, "heterostep", "steps"] + [DENSE, "heterostep", "steps"] * 2
    results = comparison.run()
    assert all(len(record["seconds"]) == 3 for record in results["generations"] + results["dense"])
    (record,) = (r for r in results["generations"] if r["method"] == "steps")
    assert record["runtime"] == pytest.approx(np.median(record["seconds"]) / np.median(results["dense"][0]["seconds"]))


@pytest.mark.parametrize("method", OWN, ids=lambda method: method.name)
def test_every_budget_saves_what_it_says_and_leaves_nothing(pipe, method):
    scheduler = pipe.scheduler
    plain = generate(pipe, PROMPTS[0], None, 1.0, OPTIONS)
    half = generate(pipe, PROMPTS[0], method, 0.5, OPTIONS)
    if not method.diagnostic:
        assert half.rows / plain.rows == pytest.approx(0.5, abs=0.02)
    assert not np.array_equal(half.clip, plain.clip)
    assert pipe.scheduler is scheduler
    assert np.array_equal(generate(pipe, PROMPTS[0], None, 1.0, OPTIONS).clip, plain.clip)


def test_rows_tell_skipped_tokens_from_skipped_steps(pipe):
    with counted(pipe) as rows, torch.no_grad():
        generate(pipe, PROMPTS[0], None, 1.0, OPTIONS)
    # Queries and feed-forward of two layers, two guidance branches, 48 tokens, 12 steps.
    assert sum(rows) == 2 * 2 * 2 * 48 * 12


def test_likeness_of_equal_and_of_other_clips():
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 255, (3, 32, 32, 3), np.uint8)
    assert likeness(clip, clip)["psnr"] is None and likeness(clip, clip)["ssim"] == pytest.approx(1)
    other = likeness(np.clip(clip.astype(int) + 8, 0, 255).astype(np.uint8), clip)
    assert 28 < other["psnr"] < 32 and 0.9 < other["ssim"] < 1


def point(runtime, psnr, value=0.0):
    figure = {"mean": psnr, "spread": 0.0}
    runtimes = {"mean": runtime, "spread": 0.0}
    return {"value": value, "runtime": runtimes, "evaluations": runtimes, "psnr": figure, "ssim": None, "lpips": None,
            "caption": None, "motion": None}  # fmt: skip


def test_curves_are_read_off_between_points_and_never_beyond_the_fast_end():
    points = [point(0.8, 40.0), point(0.4, 30.0)]
    assert summary.read_off(points, 0.6) == {
        "reached": True, "interpolated": True, "psnr": pytest.approx(35.0),
        "ssim": None, "lpips": None, "caption": None, "motion": None,
    }  # fmt: skip
    assert summary.read_off(points, 0.4)["psnr"] == 30.0 and not summary.read_off(points, 0.4)["interpolated"]
    assert summary.read_off(points, 1.0)["psnr"] == 40.0
    assert not summary.read_off(points, 0.3)["reached"] and not summary.read_off([], 0.5)["reached"]


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
        "methods": [{"name": "failing", "label": "x", "status": "failed", "reason": "no luck [1]"}],
    }
    console = Console(width=100, file=io.StringIO())
    table.show(results, console)
    shown = console.file.getvalue()
    assert "30.0 *" in shown and "not reached" in shown and "failing: failed: no luck [1]" in shown


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
    with pytest.raises(HeterostepError, match="no file"):
        read_prompts(tmp_path / "none.txt", 0, None)
    first, second = held_out(2, with_image=True)
    assert first.text != second.text and first.image.shape == (192, 192, 3)
