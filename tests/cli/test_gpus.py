"""`--gpus`: what is checked before any process is started, what they are started with, and two on the CPU."""

import json
import subprocess
import sys

import pytest
import torch

from heterostep import HeterostepError, cli, launch, tiny
from heterostep.video import read_video

PROMPT = "a red circle moving right"
SMALL = ["--steps", "8", "--frames", "9", "--height", "64", "--width", "64", "--share", "0.5", "--device", "cpu"]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No rank, in an empty folder; no model is loaded, and no process started."""

    def refuse(*args, **kwargs):
        raise AssertionError("it went on")

    for name in ("RANK", "WORLD_SIZE", "HETEROSTEP_RANKS", "HETEROSTEP_LIFELINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny, "load", refuse)
    monkeypatch.setattr(launch, "run", refuse)


@pytest.fixture
def cards(monkeypatch):
    """Two GPUs, as far as is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def fails(capsys, *arguments):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.removeprefix("heterostep: ").strip()


def test_no_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = fails(capsys, "generate", PROMPT, "--gpus", "2")
    assert line == "there are no 2 GPUs: torch sees none (--device cpu is for a try without)"
    line = fails(capsys, "generate", PROMPT, "--gpus", "100000", "--device", "cpu")
    assert line.startswith("--gpus 100000 would start as many processes on this CPU: give ")


def test_too_few_gpus_or_one_by_number(cards, capsys):
    assert fails(capsys, "generate", PROMPT, "--gpus", "3") == "there are no 3 GPUs: torch sees 2"
    line = fails(capsys, "generate", PROMPT, "--gpus", "2", "--device", "cuda:1")
    assert line == "--gpus takes the first GPUs: leave out the number of --device"


def test_faults_are_found_before_processes_are_started(cards, capsys):
    assert "end in .mp4" in fails(capsys, "generate", PROMPT, "--gpus", "2", "--out", "video.txt")
    assert "--shares expects numbers" in fails(capsys, "bench", "--config", "x", "--gpus", "2", "--shares", "a")


@pytest.mark.parametrize(
    "arguments", [("generate", PROMPT, "--gpus", "2"), ("bench", "--config", "wan2.1-t2v-1.3b", "--gpus", "2")]
)
def test_each_process_gets_the_same_arguments(cards, monkeypatch, arguments):
    started = []
    monkeypatch.setattr(launch, "run", lambda given, ranks: started.append((list(given), ranks)) or 0)
    assert cli.main(arguments) == 0
    assert started == [(list(arguments), 2)]


def test_what_a_rank_fails_with_is_left_for_the_starter(monkeypatch, capfd, tmp_path):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "HETEROSTEP_RANKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["generate", PROMPT, "--gpus", "4", *SMALL]) == 2
    assert capfd.readouterr() == ("", "")
    order, _, line = (tmp_path / "1.error").read_text().split(" ", 2)
    assert (order, line) == ("0", "--gpus is 4, but 2 processes were started")


def test_an_unforeseen_error_is_left_too(monkeypatch, capfd, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "HETEROSTEP_RANKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tiny, "load", lambda image_to_video: {}["x"])
    assert cli.main(["generate", PROMPT, *SMALL]) == 2
    order, _, line = (tmp_path / "0.error").read_text().split(" ", 2)
    assert (order, line) == ("1", "KeyError: 'x'")


def test_the_starters_error_is_one_line(cards, monkeypatch, capsys):
    def run(arguments, ranks):
        raise HeterostepError("GPU 1: out of memory")

    monkeypatch.setattr(launch, "run", run)
    assert fails(capsys, "generate", PROMPT, "--gpus", "2") == "GPU 1: out of memory"


def command(*arguments):
    done = subprocess.run([sys.executable, "-m", "heterostep", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_video_of_two_processes(tmp_path):
    done = command("generate", PROMPT, "--gpus", "2", *SMALL, "--report", "two.json", "--out", "two.mp4")
    # One of them is seen.
    assert done.stdout.count("seconds ") == 1 and done.stderr.count("8/8") == 1
    command("generate", PROMPT, *SMALL, "--report", "one.json", "--out", "one.mp4")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["active_share"] == two["active_share"] and min(one["active_share"]) == 0
    assert (read_video(tmp_path / "one.mp4")[0] == read_video(tmp_path / "two.mp4")[0]).mean() > 0.99


@pytest.mark.slow
def test_one_line_for_what_all_of_them_say():
    done = subprocess.run(
        [sys.executable, "-m", "heterostep", "generate", PROMPT, *SMALL, "--gpus", "3"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("heterostep: the 4 heads of WanTransformer3DModel cannot be split over 3 GPUs: take")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_call_of_two_processes_is_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROSTEP_CACHE", str(tmp_path / "cache"))
    size = ["--height", "64", "--width", "64", "--frames", "5", "--layers", "1", "--repeats", "1", "--shares", "0.5"]
    done = command("bench", "--config", "wan2.1-t2v-1.3b", *size, "--device", "cpu", "--gpus", "2", "--quiet")
    result = json.loads(done.stdout)
    assert result["gpus"] == 2 and [row["share"] for row in result["rows"]] == [1.0, 0.5]
    (line,) = (tmp_path / "cache" / "timings.jsonl").read_text().splitlines()
    assert json.loads(line)["how"]["gpus"] == 2


# The second process runs out of memory in its fifth step.
FULL = """
import sys
from heterostep import launch
from heterostep.engine import steps

start_step = steps.start_step

def full(generation, step):
    if launch.rank() == 1 and step == 4:
        import torch
        raise torch.OutOfMemoryError("CUDA out of memory.\\nTried to allocate 2 GiB")
    start_step(generation, step)

steps.start_step = full
from heterostep.__main__ import main
sys.exit(main())
"""


@pytest.mark.slow
def test_memory_that_runs_out_on_one_of_them(tmp_path, monkeypatch, capfd):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    given = ["generate", PROMPT, "--gpus", "2", *SMALL]
    with pytest.raises(HeterostepError, match=r"^out of memory: lower --height, --width or --frames") as error:
        launch.run(given, 2, program=("-c", FULL))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    # Of a traceback, nothing is seen.
    assert "Traceback" not in capfd.readouterr().err
