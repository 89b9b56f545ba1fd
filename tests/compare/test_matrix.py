"""The matrix over regimes on made-up results: what is read off, who is best, where it is lost, and the page of it."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from heterostep.compare import matrix as module
from heterostep.compare.matrix import matrix, read, table, write_matrix
from heterostep.compare.methods import PEERS
from heterostep.errors import HeterostepError

CAPTIONS = ("a <b>red</b> circle", "a square", "a triangle")
VOID = {"meta", "img", "br"}

# method -> value -> evaluations, dB at each caption.
CURVES: dict[str, dict[float, tuple[float, list[float | None]]]] = {
    "heterostep": {0.75: (0.75, [44.0, 42.0, 40.0]), 0.5: (0.5, [36.0, 34.0, 32.0]), 0.25: (0.25, [28.0, 26.0, 24.0])},
    "heterostep-euler": {0.5: (0.5, [60.0, 60.0, 60.0])},
    "oracle": {0.5: (0.5, [70.0, 70.0, 70.0])},
    "hsa": {0.75: (0.75, [30.0, 31.0, 32.0]), 0.5: (0.5, [25.0, 25.0, 25.0])},
    "steps": {0.75: (0.75, [28.0, 27.0, 26.0]), 0.5: (0.5, [35.0, 34.0, 33.0]), 0.25: (0.25, [20.0, 20.0, 20.0])},
    # Between .8 and .4 of the evaluations, and no cheaper.
    "easycache": {0.05: (0.8, [46.0, 44.0, 36.0]), 0.2: (0.4, [38.0, 36.0, 31.0])},
    # Dearest at .6, and cheap.
    "teacache": {0.1: (0.6, [34.0, 33.0, 32.5]), 0.4: (0.2, [27.0, 26.0, 19.0])},
    # Skips nothing, then much.
    "magcache": {0.03: (1.0, [None, None, None]), 0.5: (0.3, [22.0, 22.0, 22.0])},
}


def record(method: str, value: float, prompt: int, evaluations: float, psnr: float | None) -> dict[str, Any]:
    empty = dict.fromkeys(("ssim", "lpips", "caption", "displacement", "flicker", "runtime", "seconds"))
    return {"method": method, "value": value, "prompt": prompt, "evaluations": evaluations, "psnr": psnr, **empty}


def results(curves: Any = None, captions: tuple[str, ...] = CAPTIONS, complete: bool = True) -> dict[str, Any]:
    curves = CURVES if curves is None else curves
    generations = [
        record(method, value, prompt, evaluations, psnr)
        for method, points in curves.items()
        for value, (evaluations, dbs) in points.items()
        for prompt, psnr in enumerate(dbs)
    ]
    names = [*curves, *(name for name in ("pab",) if name not in curves)]
    return {
        "schema": 3,
        "complete": complete,
        "machine": {"processor": "a processor", "gpu": None},
        "versions": {"heterostep": "0", "torch": "2", "diffusers": "0.42"},
        "settings": {
            "model": "made up", "mode": "text", "height": 64, "width": 64, "num_frames": 9, "seeds": 1,
            "num_inference_steps": 40, "guidance_scale": 4.0,
        },
        "prompts": [{"prompt": caption, "seed": i} for i, caption in enumerate(captions)],
        "methods": [
            {
                "name": name,
                "label": name.title(),
                "diagnostic": name == "oracle",
                "reason": "ValueError: no <luck>" if name == "pab" else None,
            }
            for name in names
        ],
        "dense": [record("dense", 1.0, prompt, 1.0, None) for prompt in range(len(captions))],
        "generations": generations,
    }  # fmt: skip


def rows(curves: Any = None, **options: Any) -> dict[float, dict[str, Any]]:
    return {row["share"]: row for row in matrix({"bundled": results(curves, **options)})}


def test_every_regime_has_a_row_for_each_share() -> None:
    found = matrix({"bundled": results(), "lightx2v": results()}, (0.5, 0.25))
    assert [(row["regime"], row["share"]) for row in found] == [
        ("bundled", 0.5), ("bundled", 0.25), ("lightx2v", 0.5), ("lightx2v", 0.25),
    ]  # fmt: skip
    assert all(row["captions"] == row["videos"] == 3 for row in found)
    stopped = results(complete=False)
    stopped["dense"].pop()
    stopped["generations"] = [each for each in stopped["generations"] if each["prompt"] < 2]
    assert matrix({"bundled": stopped})[0]["videos"] == 2


def test_ours_at_a_point() -> None:
    ours = rows()[0.5]["ours"]
    assert ours["psnr"] == 34.0 and ours["low"] == 32.0 and ours["found"] == "measured" and not ours["interpolated"]
    assert ours["interval"] == pytest.approx(1.96 * 2.0 / math.sqrt(3))


def test_peers_are_read_off_between_their_points_and_the_best_is_taken() -> None:
    found = rows()
    # EasyCache at .5: a quarter of the way from .4 to .8.
    peer = found[0.5]["peer"]
    assert peer["name"] == "easycache" and peer["label"] == "Easycache" and peer["found"] == "interpolated"
    assert peer["psnr"] == pytest.approx(35 + 0.25 * (42 - 35)) and peer["low"] == pytest.approx(31 + 0.25 * 5)
    gaps = [36 - (38 + 0.25 * 8), 34 - (36 + 0.25 * 8), 32 - (31 + 0.25 * 5)]
    lead = found[0.5]["lead"]["peer"]
    assert lead["mean"] == pytest.approx(statistics.mean(gaps)) and lead["above"] == 0
    assert lead["interval"] == pytest.approx(1.96 * statistics.stdev(gaps) / math.sqrt(3))
    # By the worst tenth another one may be the best.
    assert found[0.5]["low_peer"]["name"] == "easycache" and found[0.5]["low_peer"]["low"] == pytest.approx(32.25)
    only = {"heterostep": CURVES["heterostep"], "easycache": {1: (0.5, [40, 40, 10])}, "pab": {1: (0.5, [20, 20, 19])}}
    row = rows(only)[0.5]
    assert row["peer"]["name"] == "easycache" and row["low_peer"]["name"] == "pab"
    assert row["loses"] == {"mean": [], "low": []}


def test_controls_bounds_and_our_own_are_no_peers() -> None:
    found = rows()
    for row in found.values():
        assert row["peer"] is None or row["peer"]["name"] in {method.name for method in PEERS}
        assert not {"heterostep-euler", "oracle"} & {*row["loses"]["mean"], *row["loses"]["low"], *row["not_counted"]}


def test_a_budget_above_the_dearest_point_is_spent_on_that() -> None:
    only = {"heterostep": CURVES["heterostep"], "teacache": CURVES["teacache"]}
    peer = rows(only)[0.75]["peer"]
    assert peer["psnr"] == pytest.approx(99.5 / 3) and peer["found"] == "its dearest point"


def test_videos_that_equal_dense_are_told_of_a_mean_that_leaves_them_out() -> None:
    captions = tuple(f"caption {i}" for i in range(40))
    dbs = [30.0] * 40

    def peer(differ: int) -> tuple[dict[str, Any], str]:
        dearer = [40.0] * differ + [None] * (40 - differ)
        curves = {"heterostep": {0.5: (0.5, dbs)}, "easycache": {1: (0.4, dbs), 2: (0.6, dearer)}}
        row = matrix({"bundled": results(curves, captions=captions)}, (0.5,))
        return row[0]["peer"], table(row)

    found, text = peer(10)
    assert found["psnr"] == pytest.approx(35) and found["equal"] == 30 and "easycache ~35.0+ ± 0.0 (low" in text
    assert peer(40)[0]["equal"] == 0 and "+" not in peer(40)[1]
    # One of 40 says nothing of the others.
    found, text = peer(1)
    assert found["psnr"] == 30 and found["found"] == "its next cheaper point" and "easycache 30.0 ± 0.0" in text


def test_what_is_not_reached_is_not_counted_and_told() -> None:
    row = rows()[0.25]
    assert row["peer"]["name"] == "teacache" and row["hsa"] is None and "hsa" not in row["lead"]
    assert set(row["not_counted"]) == {"hsa", "easycache", "magcache", "pab"}
    nearest = {"value": 0.2, "evaluations": 0.4, "mean": 35.0, "low": 31.0}
    assert row["not_counted"]["easycache"] == {"reason": "not so cheap", "nearest": nearest}
    assert row["not_counted"]["pab"] == {"reason": "ValueError: no <luck>", "nearest": None}


def test_beside_an_identical_video_the_cheaper_point_counts() -> None:
    only = {"heterostep": CURVES["heterostep"], "magcache": CURVES["magcache"]}
    peer = rows(only)[0.5]["peer"]
    assert peer["psnr"] == peer["low"] == 22.0 and peer["found"] == "its next cheaper point"
    # Identical at the share itself: none is better.
    only["magcache"] = {1: (0.5, [None, None, None])}
    row = rows(only)[0.5]
    assert row["peer"]["psnr"] == 100.0 and row["loses"] == {"mean": ["magcache"], "low": ["magcache"]}
    assert row["peer"]["interval"] is None and row["lead"]["peer"] is None
    # Some are: the others are what is told of, and are the worst.
    only["magcache"] = {1: (0.5, [None, 30.0, 31.0])}
    assert rows(only)[0.5]["peer"]["psnr"] == 30.5 and rows(only)[0.5]["peer"]["low"] == 30.0


def test_losses_are_told_of_mean_and_worst_tenth() -> None:
    found = rows()
    assert found[0.75]["loses"] == {"mean": [], "low": []}
    # EasyCache by both; fewer steps are level by the mean, which is no loss, and ahead in the worst tenth.
    assert found[0.5]["loses"] == {"mean": ["easycache"], "low": ["steps", "easycache"]}
    assert found[0.5]["ahead"] == pytest.approx(34 - 36.75) and found[0.5]["low_ahead"] == pytest.approx(32 - 33)
    assert found[0.25]["loses"] == {"mean": [], "low": []}
    without = {name: points for name, points in CURVES.items() if name != "heterostep"}
    row = rows(without)[0.5]
    assert row["ours"] is None and row["ahead"] is None and row["lead"] == {"peer": None, "steps": None, "hsa": None}
    assert row["loses"]["mean"] == ["steps", "hsa", "easycache", "teacache", "magcache"]


def test_of_equals_the_first_of_the_catalogue_is_named() -> None:
    only = {name: {1: (0.5, [30.0, 30.0, 30.0])} for name in ("taylorseer", "heterostep", "easycache")}
    row = rows(only)[0.5]
    assert row["peer"]["name"] == row["low_peer"]["name"] == "easycache"
    assert row["loses"] == {"mean": [], "low": []} and row["ahead"] == 0 and row["lead"]["peer"]["above"] == 0


def test_seeds_of_a_caption_are_one_value_and_videos_are_not() -> None:
    captions = ("a", "b") * 10
    dbs = [30.0 + (i % 2) + i // 2 for i in range(20)]
    row = rows({"heterostep": {0.5: (0.5, dbs)}}, captions=captions)[0.5]
    means = [statistics.mean(dbs[0::2]), statistics.mean(dbs[1::2])]
    assert row["captions"] == 2 and row["videos"] == 20
    assert row["ours"]["interval"] == pytest.approx(1.96 * statistics.stdev(means) / math.sqrt(2))
    assert row["ours"]["low"] == statistics.mean(sorted(dbs)[:2])
    assert rows({"heterostep": {0.5: (0.5, [30.0])}}, captions=("a",))[0.5]["ours"]["interval"] is None


def test_a_curve_against_runtime_is_read_off_by_evaluations_all_the_same() -> None:
    result = results()
    for each in result["generations"]:
        each["runtime"] = 2 - each["evaluations"]
    assert matrix({"bundled": result})[1]["peer"]["psnr"] == pytest.approx(36.75)


class Checker(HTMLParser):
    """Opens and closes in order; what is shown, and what is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def kept(folder: Path, **regimes: dict[str, Any]) -> None:
    for name, result in regimes.items():
        path = folder / name.replace("_", "-")
        path.mkdir(parents=True)
        (path / "results.json").write_text(json.dumps(result))


def test_files_are_written_from_what_is_there(tmp_path: Path) -> None:
    kept(tmp_path, ours_alone=results(complete=False), bundled=results())
    (tmp_path / "notes").mkdir()
    # From other machines, compressed.
    (tmp_path / "lightx2v.json.gz").write_bytes(gzip.compress(json.dumps(results()).encode()))
    (tmp_path / "ltx-2").mkdir()
    (tmp_path / "ltx-2" / "results.json.gz").write_bytes(gzip.compress(json.dumps(results()).encode()))
    assert write_matrix(tmp_path) == tmp_path / "index.html"
    content = json.loads((tmp_path / "matrix.json").read_text())
    assert list(content["regimes"]) == ["ltx-2", "lightx2v", "bundled", "ours-alone"]
    assert content["regimes"]["ltx-2"]["text"] == "Euler 40, shift 7.8, terminal 0.1, guidance 3"
    assert content["regimes"]["ours-alone"]["text"] == "40 steps, guidance 4.0"
    assert not content["regimes"]["ours-alone"]["complete"]
    assert content["rows"] == json.loads(json.dumps(matrix(read(tmp_path))))
    with Image.open(tmp_path / "matrix.png") as picture:
        assert picture.size[0] > 800 and len(set(picture.convert("L").tobytes())) > 10
    assert 'href="bundled/' not in (tmp_path / "index.html").read_text()
    (tmp_path / "bundled" / "index.html").touch()
    html = write_matrix(tmp_path).read_text()
    assert html.count('/index.html"') == 1 and '<a href="bundled/index.html">bundled</a>' in html
    checker = Checker()
    checker.feed(html)
    assert not checker.open and len(checker.sources) == 1 and checker.sources[0].startswith("data:image/png")
    text = " ".join(checker.text.split())
    assert "Text-to-video in 4 regimes" in text and "incomplete" in text and "ValueError: no <luck>" in text
    assert "Of 12 rows heterostep loses to nobody in 8 by the mean, and in 8 by the worst tenth" in text
    assert "mean: to Easycache (2.75 dB)" in text and "worst tenth: to Steps; Easycache (1.00 dB)" in text
    assert "bundled at 0.25: Hsa (not so cheap; nearest" in text and "Pab (ValueError: no <luck>)" in text
    assert content["regimes"]["bundled"]["labels"]["easycache"] == "Easycache"
    shown = table(matrix({"bundled": results()}))
    assert "| bundled | 0.75 | **42.0 ± 2.3 (low 40.0)** | easycache ~41.1" in shown and "| steps, easycache |" in shown


def test_a_page_of_one_caption_and_of_nothing_reached(tmp_path: Path) -> None:
    kept(tmp_path, bundled=results({"steps": {0.5: (0.5, [20.0])}}, captions=("a",)))
    text = write_matrix(tmp_path).read_text()
    assert "in 1 regime<" in text and "not reached" in text and "heterostep does not reach it" in text


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeterostepError, match="no results of any regime yet"):
        write_matrix(tmp_path)
    (tmp_path / "bundled.json.gz").write_bytes(b"no gzip")
    with pytest.raises(HeterostepError, match="bundled.json.gz cannot be read"):
        write_matrix(tmp_path)
    (tmp_path / "bundled.json.gz").write_bytes(gzip.compress(b"[]"))
    with pytest.raises(HeterostepError, match="does not hold a comparison's results"):
        read(tmp_path)
    assert module.SCHEMA == 3
