import copy
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from heterostep.compare.page import write_page
from heterostep.errors import HeterostepError
from heterostep.video import write_video

PROMPTS = (
    """a red <script>alert("1")</script> circle & a 'blue' square</p><img src=x onerror=alert(2)>""",
    "a green triangle moving up",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "br", "input"}

# name -> (dial, the points: value, runtime, evaluations, PSNR, SSIM, caption score, motion distance)
CURVES = {
    "heterostep": (
        "share of evaluations",
        [
            (1.0, 1.0, 1.0, None, 1.0, 0.97, 0.0),
            (0.75, 0.74, 0.75, 44.1, 0.99, 0.97, 0.01),
            (0.5, 0.5, 0.5, 35.2, 0.965, 0.95, 0.03),
            (0.25, 0.26, 0.25, 28.0, 0.90, 0.92, 0.08),
        ],
    ),
    "fewer-steps": (
        "number of steps",
        [
            (30, 0.75, 0.75, 29.8, 0.93, 0.96, 0.03),
            (20, 0.5, 0.5, 26.4, 0.88, 0.95, 0.07),
            (10, 0.25, 0.25, 20.6, 0.75, 0.93, 0.16),
        ],
    ),
    "whole-step": (
        "threshold",
        [
            (0.05, 0.81, 0.8, 36.4, 0.97, 0.96, 0.02),
            (0.1, 0.62, 0.6, 33.0, 0.95, 0.95, 0.04),
            (0.2, 0.43, 0.4, 25.5, 0.86, 0.90, 0.12),
        ],
    ),
    "oracle": (
        "share of evaluations",
        [
            (0.75, 1.35, 0.75, 46.0, 0.992, 0.97, 0.01),
            (0.5, 1.18, 0.5, 38.0, 0.975, 0.96, 0.02),
            (0.1, 2.6, 0.1, 22.0, 0.8, 0.9, 0.2),
        ],
    ),
}
METRICS = ("psnr", "ssim", "lpips", "caption", "motion")


def method(name, label, status="ran", reason=None, diagnostic=False, whole_batch=False):
    dial = CURVES.get(name, ("its own",))[0]
    return {
        "name": name,
        "label": label,
        "dial": dial,
        "status": status,
        "reason": reason,
        "diagnostic": diagnostic,
        "whole_batch": whole_batch,
    }


def spread(mean, of):
    return None if mean is None else {"mean": mean, "spread": of}


def record(name, prompt, value=1.0, runtime=1.0, evaluations=1.0, psnr=None, ssim=1.0, **others):
    return {
        "method": name,
        "value": value,
        "prompt": prompt,
        "seconds": [12.5 * runtime, 12.7 * runtime],
        "runtime": runtime,
        "evaluations": evaluations,
        "peak_bytes": 3 * 2**30,
        "psnr": psnr,
        "ssim": ssim,
        "lpips": None,
        "caption": {"colour": 1.0, "direction": 0.5 if prompt else None, "kind": 1.0, "background": 2 / 3},
        "displacement": 80.0 + prompt,
        "flicker": 1.2,
        "video": None,
        "heatmap": None,
        **others,
    }


def frontier_row(name, psnr, ssim, caption, motion, interpolated=False, reached=True):
    values = dict(zip(METRICS, (psnr, ssim, None, caption, motion)))
    return {"method": name, "reached": reached, "interpolated": interpolated, **values}


def results():
    curves = [
        {
            "method": name,
            "points": [
                {
                    "value": value,
                    "runtime": spread(runtime, 0.02),
                    "evaluations": spread(evaluations, 0.0),
                    "psnr": spread(psnr, 2.4),
                    "ssim": spread(ssim, 0.012),
                    "lpips": None,
                    "caption": spread(caption, 0.05),
                    "motion": spread(motion, 0.02),
                }
                for value, runtime, evaluations, psnr, ssim, caption, motion in points
            ],
        }
        for name, (_, points) in CURVES.items()
    ]
    generations = [
        record(name, prompt, value, runtime, evaluations, psnr and psnr - prompt, ssim)
        for name, (_, points) in CURVES.items()
        for prompt in (0, 1)
        for value, runtime, evaluations, psnr, ssim, *_ in points
    ]
    for kept in generations:
        if (kept["method"], kept["value"]) in {("heterostep", 0.5), ("fewer-steps", 20), ("whole-step", 0.1)}:
            kept["video"] = "videos/method.mp4"
        if (kept["method"], kept["value"]) == ("heterostep", 0.5):
            kept["heatmap"] = "videos/method.mp4"
    return {
        "schema": 3,
        "complete": True,
        "command": "heterostep compare --prompts 'my \"prompts\".txt' --runtimes 0.5,0.25 --out report/",
        "machine": {"processor": "a processor", "threads": 2, "gpu": None, "platform": "Linux"},
        "versions": {"heterostep": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.0", "python": "3.11.7"},
        "settings": {
            "model": "bundled",
            "mode": "text",
            "num_inference_steps": 40,
            "height": 192,
            "width": 192,
            "num_frames": 33,
            "guidance_scale": 5.0,
            "runtimes": [0.5, 0.25],
            "repeats": 2,
            "fps": 16.0,
            "cost": "runtime",
            "batch": 1,
            "seeds": 1,
        },
        "prompts": [{"prompt": prompt, "seed": 7 + i} for i, prompt in enumerate(PROMPTS)],
        "methods": [
            method("heterostep", "heterostep"),
            method("fewer-steps", "plain sampling with fewer steps"),
            method("whole-step", "whole steps cached", whole_batch=True),
            method("blocks", "blocks cached", "not supported", "it needs a <hook> that this model lacks"),
            method("broken", "broken cache", "failed", "ValueError: shapes differ & more"),
            method("oracle", "oracle scores", diagnostic=True),
        ],
        "generations": generations,
        "dense": [record("dense", prompt, video="videos/dense.mp4") for prompt in (0, 1)],
        "chance": [record("dense", prompt, psnr=14.2 + prompt, ssim=0.41) for prompt in (0, 1)],
        "curves": curves,
        "frontier": [
            {
                "runtime": 0.5,
                "rows": [
                    frontier_row("heterostep", 35.2, 0.965, 0.94, 0.03),
                    frontier_row("fewer-steps", 26.4, 0.88, 0.95, 0.07),
                    frontier_row("whole-step", 28.0, 0.90, 0.92, 0.08, interpolated=True),
                    frontier_row("oracle", None, None, None, None, reached=False),
                ],
                "winners": {"psnr": "heterostep", "ssim": "heterostep", "caption": "fewer-steps"},
            },
            {
                "runtime": 0.25,
                "rows": [
                    frontier_row("heterostep", 28.0, 0.9, 0.93, 0.08, interpolated=True),
                    frontier_row("fewer-steps", 20.6, 0.75, 0.93, 0.16),
                    frontier_row("whole-step", None, None, None, None, reached=False),
                    frontier_row("oracle", None, None, None, None, reached=False),
                ],
                "winners": {"psnr": "heterostep", "ssim": "heterostep", "caption": "heterostep"},
            },
        ],
    }


class Page(HTMLParser):
    """Text, tags and attributes of a page; raises where a tag is closed that is not open."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text, self.rows = [], [], "", []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if "tr" in self.open:
            self.rows[-1] += data

    def all(self, tag):
        return [attrs for found, attrs in self.tags if found == tag]


def write(folder, data):
    (folder / "results.json").write_text(json.dumps(data), encoding="utf-8")
    return write_page(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "videos").mkdir()
    for name, level in (("dense", 60), ("method", 180)):
        frames = np.full((9, 96, 96, 3), level, np.uint8)
        for i in range(9):
            frames[i, 30:60, 8 * i : 8 * i + 24] = (220, 40, 40)
        write_video(folder / "videos" / f"{name}.mp4", frames, fps=8)
    write(folder, results())
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def rows_of(page, label, number):
    return [row for row in page.rows if row.strip().startswith(label)][number]


def test_the_page_is_one_file_and_fetches_nothing(folder, source, page):
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "results.json", "videos"]
    assert not re.search(r"https?:", source)
    assert "@import" not in source and "url(" not in source
    for tag, attrs in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#")), f"{tag} {name}={attrs[name][:40]}"


def test_prompts_and_reasons_are_text_and_not_markup(source, page):
    for prompt in PROMPTS:
        assert prompt in page.text
        assert "<" not in prompt or prompt not in source
    assert len(page.all("script")) == 1
    assert len(page.all("input")) == 2 + len(CURVES) and not page.all("img")
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert 'my "prompts".txt' in page.text


def test_every_method_is_named_with_its_reason(page):
    for entry in results()["methods"]:
        assert entry["label"] in page.text
        if entry["reason"]:
            said = f"{entry['status']}: {entry['reason']}"
            assert sum(said in row for row in page.rows) == 2, "once for each runtime"


def test_winners_ties_and_what_was_not_measured_are_marked(page):
    best = [rows_of(page, "heterostep", i).count("best") for i in (0, 1)]
    assert best == [2, 3], "PSNR and SSIM at 0.5; the caption score too at 0.25"
    assert rows_of(page, "plain sampling", 0).count("best") == 1
    assert rows_of(page, "plain sampling", 1).count("best") == 1, "0.93 and 0.93 cannot be told apart"
    assert "interpolated" in rows_of(page, "whole steps cached", 0)
    assert "not reached (its points: 0.43 to 0.81)" in rows_of(page, "whole steps cached", 1)
    assert "measured" in rows_of(page, "plain sampling", 0)
    assert all("best" not in row for row in page.rows if "oracle" in row)


def test_the_spread_stands_beside_the_mean(page):
    assert "35.2 ± 2.4" in rows_of(page, "heterostep", 0)


def test_the_verdict_says_where_heterostep_wins_and_where_it_loses(page):
    assert "PSNR: heterostep wins, 35.2 dB, 7.2 dB above whole steps cached." in page.text
    wins = "Caption score: plain sampling with fewer steps wins, 0.95; "
    assert f"{wins}heterostep loses by 0.01 (less than the spread)." in page.text
    assert "Caption score: level, 0.93: heterostep and plain sampling with fewer steps." in page.text


def test_a_method_that_alone_reaches_a_runtime_and_one_nobody_reaches(folder, tmp_path):
    data = results()
    for row in data["frontier"][1]["rows"][:1]:
        row |= dict.fromkeys(METRICS) | {"reached": False}
    data["frontier"][1]["winners"] = {"psnr": "fewer-steps", "ssim": "fewer-steps", "caption": "fewer-steps"}
    for row in data["frontier"][0]["rows"]:
        row |= dict.fromkeys(METRICS) | {"reached": False}
    data["frontier"][0]["winners"] = dict.fromkeys(("psnr", "ssim", "caption"))
    text = Page(write(tmp_path, data).read_text(encoding="utf-8")).text
    assert "PSNR: no method reaches it." in text
    assert "plain sampling with fewer steps wins, 20.6 dB; heterostep does not reach it." in text


def test_a_video_identical_to_dense_wins_by_psnr(tmp_path):
    data = results()
    data["frontier"][0]["rows"][1]["psnr"] = None
    text = Page(write(tmp_path, data).read_text(encoding="utf-8")).text
    assert "plain sampling with fewer steps wins, identical to dense; heterostep loses with 35.2 dB." in text


def test_100_db_stands_for_identical(tmp_path):
    data = results()
    data["frontier"][0]["rows"][0]["psnr"] = 100.0
    data["curves"][0]["points"][0]["psnr"] = {"mean": 100.0, "spread": 0.0}
    page = Page(write(tmp_path, data).read_text(encoding="utf-8"))
    assert "heterostep wins, identical to dense" in page.text
    assert "identical at 1.00" in next(a for a in page.all("svg") if a.get("role") == "img")["aria-label"]


def test_a_budget_beyond_the_slowest_point_says_what_was_taken(tmp_path):
    data = results()
    data["frontier"][0]["runtime"] = 0.9
    page = Page(write(tmp_path, data).read_text(encoding="utf-8"))
    assert "its slowest point, at 0.75" in rows_of(page, "plain sampling", 0)


def test_a_variant_of_heterostep_does_not_win_for_it(tmp_path):
    data = results()
    data["methods"].insert(0, method("heterostep-random", "picked at random"))
    data["frontier"][0]["rows"].append(frontier_row("heterostep-random", 40.0, 0.9, 0.9, 0.1))
    data["frontier"][0]["winners"]["psnr"] = "heterostep-random"
    text = Page(write(tmp_path, data).read_text(encoding="utf-8")).text
    assert "picked at random wins, 40.0 dB; heterostep loses by 4.8 dB." in text


def test_batched_runs_are_about_token_evaluations(tmp_path):
    data = results()
    data["settings"] |= {"cost": "evaluations", "batch": 64, "seeds": 2, "repeats": 1}
    data["command"] = "heterostep compare --batch 64"
    for entry in data["generations"] + data["dense"] + data["chance"]:
        entry |= dict.fromkeys(("seconds", "runtime", "peak_bytes"))
        if entry["method"] == "heterostep" and entry["value"] == 0.5:
            entry["video"] = "videos/none.mp4"
    for point in [p for curve in data["curves"] for p in curve["points"]]:
        point["runtime"] = None
    page = Page(write(tmp_path, data).read_text(encoding="utf-8"))
    assert "untime" not in page.text and "Seconds" not in page.text
    assert "Wall-clock was not measured: prompts ran 64 at a time" in page.text and "1 prompt x 2 seeds" in page.text
    assert "At 0.5 of dense's token evaluations" in page.text and "nearest to 0.5 of dense's token" in page.text
    assert "not reached (its points: 0.40 to 0.80)" in rows_of(page, "whole steps cached", 1)
    assert "decides for the whole batch of 64" in rows_of(page, "whole steps cached", 0)
    assert page.text.count("decides for the whole batch of 64") == 3, "in both tables and beneath the plots' key"
    charts = [attrs["aria-label"] for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert len(charts) == 4 and all("against token evaluations" in label for label in charts)
    assert sum(attrs.get("class") == "asked" for attrs in page.all("path")) == 2 * 4


def test_one_at_a_time_nothing_is_said_of_batches(page):
    assert "batch" not in page.text and "Wall-clock" not in page.text


def test_seconds_of_a_busy_machine_are_said_to_be_uncertain(page, tmp_path):
    said = "the machine was busy, or slow at first, so that ratios of seconds are uncertain"
    assert said not in page.text
    data = results()
    for runtimes, off in (((1.01, 1.08), None), ((0.88, 1.02), "7%"), ((1.2, 1.1), "15%")):
        for entry, runtime in zip(data["chance"], runtimes):
            entry["runtime"] = runtime
        text = Page(write(tmp_path, data).read_text()).text
        assert (said in text) is (off is not None) and (off is None or f"differ by {off} in seconds" in text)


def test_one_prompt_has_no_spread(tmp_path):
    data = results()
    for key in ("prompts", "dense", "chance"):
        data[key] = data[key][:1]
    data["generations"] = [entry for entry in data["generations"] if entry["prompt"] == 0]
    page = Page(write(tmp_path, data).read_text(encoding="utf-8"))
    assert not any("±" in row for row in page.rows)


def test_plots_have_words_points_and_reference_lines(source, page):
    charts = [attrs for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert len(charts) == 5, "PSNR twice, SSIM, caption score, motion distance; no LPIPS was measured"
    assert all("heterostep:" in attrs["aria-label"] and "oracle scores:" in attrs["aria-label"] for attrs in charts)
    assert "identical at 1.00" in charts[0]["aria-label"]
    kinds = [attrs.get("class", "") for attrs in page.all("path")]
    assert kinds.count("dense") == 5 and kinds.count("chance") == 2
    assert sum("diagnostic" in attrs.get("class", "") for attrs in page.all("g")) == 5
    legends = re.findall(r'<ul class="legend".*?</ul>', source, re.DOTALL)
    labels = [entry["label"] for entry in results()["methods"] if entry["status"] == "ran"]
    assert len(legends) == 5 and all(f" {label}</li>" in legend for legend in legends for label in labels)
    assert "2 diagnostic points lie further right." in page.text
    assert "Dense of another seed, at 0.410, lies outside." in page.text
    assert "nan" not in re.sub(r'"data:[^"]*"', "", source).lower()


def test_metrics_that_were_not_measured_are_left_out(tmp_path):
    data = results()
    for point in [p for curve in data["curves"] for p in curve["points"]]:
        point |= {"caption": None, "motion": None}
    for row in [r for at in data["frontier"] for r in at["rows"]]:
        row |= {"caption": None, "motion": None}
    for entry in data["generations"] + data["dense"] + data["chance"]:
        entry |= {"caption": None, "displacement": None, "flicker": None, "peak_bytes": None}
    page = Page(write(tmp_path, data).read_text(encoding="utf-8"))
    assert sum(attrs.get("role") == "img" for attrs in page.all("svg")) == 3
    for word in ("Caption", "Motion", "LPIPS", "Flicker", "Peak"):
        assert word not in page.text


def test_lpips_is_shown_where_it_was_measured(tmp_path):
    data = results()
    data["curves"][0]["points"][1]["lpips"] = {"mean": 0.02, "spread": 0.01}
    page = Page(write(tmp_path, data).read_text(encoding="utf-8"))
    assert sum(attrs.get("role") == "img" for attrs in page.all("svg")) == 6


def test_vmaf_is_shown_where_it_was_measured(tmp_path):
    data = results()
    data["curves"][0]["points"][1]["vmaf"] = {"mean": 91.23, "spread": 3.2}
    for name, score in (("dense", 99.24), ("chance", 7.31), ("generations", 91.23)):
        for entry in data[name]:
            entry["vmaf"] = score
    page = Page(write(tmp_path, data).read_text(encoding="utf-8"))
    charts = [attrs for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert len(charts) == 6 and any("VMAF" in attrs["aria-label"] and "91.2" in attrs["aria-label"] for attrs in charts)
    assert "99.2" in page.text and "7.3" in page.text and "viewers' ratings" in page.text


def test_videos_are_inlined_and_named(page):
    videos = page.all("video")
    assert len(videos) == 2 * (1 + 3 + 1), "for each prompt dense, three methods and a heat map"
    assert all(attrs["src"].startswith("data:video/mp4;base64,") and attrs["aria-label"] for attrs in videos)
    assert "nearest to 0.5 of dense's runtime" in page.text
    assert "number of steps: 20" in page.text


@pytest.mark.parametrize("path", ["videos/gone.mp4", "../outside.mp4", "results.json"])
def test_only_videos_in_the_folder_are_inlined(path, tmp_path):
    (tmp_path / "outside.mp4").write_bytes(b"secret")
    report = tmp_path / "report"
    report.mkdir()
    data = results()
    data["dense"][0]["video"] = path
    text = Page(write(report, data).read_text(encoding="utf-8")).text
    assert f"Video of prompt 1 by dense: {path} is not there." in text


def test_chance_machine_and_settings_are_told(page):
    assert any("PSNR" in row and "14.7 ± 0.7" in row for row in page.rows)
    for word in ("a processor", "2.13.0", "guidance scale", "seed 7", "Peak memory, MiB", "3072"):
        assert word in page.text
    assert "Incomplete" not in page.text


def test_headings_come_in_order_and_links_lead_somewhere(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {attrs["href"][1:] for attrs in page.all("a")} <= ids


def test_a_run_that_was_stopped_early_has_a_page(tmp_path):
    data = results() | {"complete": False, "generations": [], "chance": [], "curves": [], "frontier": []}
    text = Page(write(tmp_path, data).read_text(encoding="utf-8")).text
    assert "Incomplete" in text and "Against" not in text


def test_another_schema_is_refused_and_leaves_the_old_page(tmp_path):
    page = write(tmp_path, results())
    before = page.read_bytes()
    for text in (json.dumps(results() | {"schema": 1}), "[]", "{"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(HeterostepError, match=r"results\.json"):
            write_page(tmp_path)
    assert page.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "results.json"]


def dump(url, *options):
    """The DOM of a page after its scripts have run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", *options]
    done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("long", [False, True], ids=["plain", "long words"])
def test_no_sideways_scroll(source, folder, tmp_path, long):
    if long:
        data = copy.deepcopy(results())
        data["prompts"][0]["prompt"] = data["settings"]["model"] = data["methods"][1]["label"] = "x" * 300
        data["methods"][3]["reason"] = "y" * 300
        source = write(tmp_path, data).read_text(encoding="utf-8")
    # A frame has the width that it is given, which a window has not always; its file may not be read, but may speak.
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    speak = "const e = document.documentElement; parent.postMessage([innerWidth, e.scrollWidth, e.clientWidth], '*')"
    spoken, count = policy.subn(
        "",
        source.replace("<details>", "<details open>").replace(
            "</body>", f"<script>onload = () => {{ {speak} }}</script></body>"
        ),
    )
    assert count == 1
    (tmp_path / "framed.html").write_text(spoken, encoding="utf-8")
    frames = "".join(f'<iframe src="framed.html" style="width:{width}px;border:0"></iframe>' for width in (390, 1280))
    hear = "onmessage = e => { document.body.append(`[${e.data.join()}]`) }"
    (tmp_path / "frames.html").write_text(f"<body><script>{hear}</script>{frames}</body>", encoding="utf-8")
    heard = re.findall(r"\[(\d+),(\d+),(\d+)\]", dump((tmp_path / "frames.html").as_uri()))
    assert sorted(int(width) for width, *_ in heard) == [390, 1280]
    for width, scroll, client in heard:
        assert scroll == client, f"{scroll} px of page in {client} px at {width}"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_script_runs_under_the_policy(folder):
    dom = dump((folder / "index.html").as_uri())
    buttons = re.findall(r"<button[^>]*>", dom)
    assert len(buttons) == 2 and not any("hidden" in button for button in buttons)
    assert html.escape(PROMPTS[0], quote=False) in dom
