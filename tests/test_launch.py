"""Ranks are started together, and none is left whatever ends them. Programs here are small: no torch is imported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from heterostep import HeterostepError, launch
from processes import heed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX has them")

# What a rank begins with: it can be found by its file.
BEGIN = """
import os, pathlib, signal, sys, time
from heterostep import launch
launch.follow()
rank = launch.rank()
# The command ends quietly on Ctrl-C.
sys.excepthook = lambda *error: None
pathlib.Path(sys.argv[1], str(rank)).write_text(str(os.getpid()))
"""
WAIT = "time.sleep(60)\n"
FAIL = "launch.tell('the reason'); sys.exit(2)\n"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)


def run(folder, code, ranks=2):
    return launch.run([str(folder)], ranks, program=("-c", BEGIN + code))


def pids(folder):
    return [int(path.read_text()) for path in sorted(folder.iterdir()) if path.name.isdigit()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def none_is_left(folder, count=2):
    left = time.monotonic() + 10
    while any(map(alive, pids(folder))) and time.monotonic() < left:
        time.sleep(0.05)
    assert len(pids(folder)) == count and not any(map(alive, pids(folder)))


def fails(folder, code, ranks=2):
    began = time.monotonic()
    with pytest.raises(HeterostepError) as error:
        run(folder, code, ranks)
    assert time.monotonic() - began < 30
    none_is_left(folder, ranks)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_first_rank_is_seen_alone(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launch.rank() is None and launch.size() == 1
    code = "print('rank', rank, 'of', launch.size(), os.environ['LOCAL_RANK'], os.environ['MASTER_ADDR'])\n"
    assert run(tmp_path, code, ranks=3) == 0
    assert capfd.readouterr().out == "rank 0 of 3 0 127.0.0.1\n"
    none_is_left(tmp_path, 3)


def test_an_error_on_one_rank_ends_all(tmp_path, capfd):
    assert fails(tmp_path, f"if rank == 1: {FAIL}{WAIT}") == "the reason"
    assert capfd.readouterr() == ("", "")


def test_what_knew_the_reason_is_told_and_not_what_missed_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 5.0)
    missing = "time.sleep(0.3); launch.tell('RuntimeError: connection closed', clear=False); sys.exit(2)\n"
    assert fails(tmp_path, f"if rank == 0: {missing}time.sleep(0.6); {FAIL}") == "the reason"


def test_an_unforeseen_error_names_its_gpu(tmp_path):
    code = "if rank == 1: launch.tell('KeyError: x', clear=False); sys.exit(2)\n"
    assert fails(tmp_path, code + WAIT) == "GPU 1: KeyError: x"


def test_a_rank_that_says_nothing(tmp_path):
    assert fails(tmp_path, f"if rank == 1: sys.exit(3)\n{WAIT}") == "the process of GPU 1 ended with 3"
    said = fails(tmp_path, f"if rank == 1: print('no such module\\n\\n', file=sys.stderr); sys.exit(3)\n{WAIT}")
    assert said == "the process of GPU 1 ended with 3: no such module"


def test_a_rank_that_is_killed(tmp_path):
    said = fails(tmp_path, f"if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n{WAIT}")
    assert said == "the process of GPU 1 was ended from outside (SIGKILL), perhaps for its memory"


def test_what_a_rank_has_started_and_one_that_will_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    code = """
if rank == 0:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pathlib.Path(sys.argv[1], "9").write_text(str(child.pid))
else:
    while not pathlib.Path(sys.argv[1], "9").exists(): time.sleep(0.05)
"""
    with pytest.raises(HeterostepError, match="the reason"):
        run(tmp_path, code + f"if rank == 1: {FAIL}{WAIT}")
    none_is_left(tmp_path, 3)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_starter_is_ended(tmp_path, sent):
    folder = tmp_path / "ranks"
    folder.mkdir()
    code = f"from heterostep import launch; launch.run([{str(folder)!r}], 2, ('-c', {BEGIN + WAIT!r}))"
    starter = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        preexec_fn=heed,
    )
    left = time.monotonic() + 20
    while len(list(folder.iterdir())) < 2 and time.monotonic() < left:
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(starter.pid, sent)
    starter.wait(timeout=20)
    none_is_left(folder)


def test_outside_of_ranks_nobody_listens(monkeypatch):
    monkeypatch.delenv("HETEROSTEP_RANKS", raising=False)
    assert launch.tell("something") is False
    launch.follow()


def test_the_ports_where_ranks_meet_are_their_own(tmp_path):
    code = """
import socket
port = int(os.environ["MASTER_PORT"])
if rank == 0:
    listening = socket.socket(fileno=launch.meeting())
    assert listening.getsockname() == ("127.0.0.1", port)
    listening.accept()[0].sendall(b"met")
else:
    assert launch.meeting() is None and launch.is_ours()
    try:
        socket.socket().bind(("127.0.0.1", port))
    except OSError:
        with socket.create_connection(("127.0.0.1", port)) as other:
            assert other.recv(3) == b"met"
    else:
        sys.exit("anybody could have it")
"""
    assert run(tmp_path, code) == 0
