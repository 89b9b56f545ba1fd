"""Ctrl-C ends the command with one line and 130, also where a library swallows it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from heterostep import interrupts
from processes import heed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX has them")

ARGUMENTS = ["generate", "a red circle", "--share", "0.5", "--steps", "40", "--quiet", "--out", "video.mp4"]

# Each import of `name` is interrupted, and its KeyboardInterrupt is swallowed.
SWALLOW = """
import os, signal, sys, threading, time

class Swallow:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            try:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
                time.sleep(5)
            except KeyboardInterrupt:
                print("swallowed", flush=True)

sys.meta_path.insert(0, Swallow())
from heterostep.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "name",
    ["torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rich.console", "diffusers.pipelines.wan"))],
)
def test_a_ctrl_c_that_an_import_swallows(name, tmp_path):
    command = [sys.executable, "-c", SWALLOW.format(name=name), *ARGUMENTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=heed)
    assert done.stdout == "swallowed\n"
    assert (done.returncode, done.stderr) == (130, "heterostep: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_ctrl_c_that_a_finaliser_swallows():
    class Interrupted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    class Broken:
        def __del__(self):
            raise ValueError("said as ever")

    hook, told = sys.unraisablehook, []
    sys.unraisablehook = lambda swallowed: told.append(swallowed.exc_type)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts.watched():
            Broken()
            Interrupted()
            told.append("went on")
    finally:
        sys.unraisablehook = hook
    assert told == [ValueError, "went on"]


def test_a_ctrl_c_inside_of_what_runs_from_a_string(tmp_path):
    """`python -m` would end by the signal then, whatever the command returns."""
    code, _ = SWALLOW.format(name="torch").split("from heterostep")
    code = code.replace("except KeyboardInterrupt", "except ZeroDivisionError")
    code = code.replace("time.sleep(5)", "exec('time.sleep(5)')")
    (tmp_path / "sitecustomize.py").write_text(code)
    command = [sys.executable, "-m", "heterostep", *ARGUMENTS]
    surroundings = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True, preexec_fn=heed)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "heterostep: interrupted\n")
    assert not (tmp_path / "video.mp4").exists()


@pytest.mark.parametrize(
    "seconds", [pytest.param(s, marks=[] if s == 2.5 else pytest.mark.slow) for s in (0.3, 0.6, 1, 1.5, 2.5, 4)]
)
def test_ctrl_c_at_any_time(seconds, tmp_path):
    command = [sys.executable, "-m", "heterostep", *ARGUMENTS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, preexec_fn=heed, **pipes)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "heterostep: interrupted\n")
    assert not list(tmp_path.iterdir())
