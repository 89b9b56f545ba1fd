"""Ctrl-C ends the command with one line and 130, also where a library swallows it."""

import signal
import subprocess
import sys
import time

import pytest

ARGUMENTS = ["generate", "a red circle", "--share", "0.5", "--steps", "40", "--quiet", "--out", "video.mp4"]

# Each import of `name` is interrupted, and its KeyboardInterrupt is swallowed.
SWALLOW = """
import os, signal, sys, time

class Swallow:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except KeyboardInterrupt:
                print("swallowed", flush=True)

sys.meta_path.insert(0, Swallow())
from heterostep.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("name", ["rich.console", "torch", "diffusers.pipelines.wan"])
def test_a_ctrl_c_that_an_import_swallows(name, tmp_path):
    command = [sys.executable, "-c", SWALLOW.format(name=name), *ARGUMENTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "swallowed\n"
    assert (done.returncode, done.stderr) == (130, "heterostep: interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "seconds", [pytest.param(s, marks=[] if s in (0.6, 2.5) else pytest.mark.slow) for s in (0.3, 0.6, 1, 1.5, 2.5, 4)]
)
def test_ctrl_c_at_any_time(seconds, tmp_path):
    command = [sys.executable, "-m", "heterostep", *ARGUMENTS]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "heterostep: interrupted\n")
    assert not list(tmp_path.iterdir())
