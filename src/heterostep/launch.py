"""The command in several processes, one on each GPU: started, watched and ended together.

`run` starts them, as torchrun would, and stays beside them. Rank 0 is the one that is seen: its progress and its
results. Where one fails, all are ended and one line says why. None outlives the command, however that ends: a rank
whose starter is gone ends itself.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from heterostep.errors import HeterostepError

if TYPE_CHECKING:
    import torch

# What a rank finds in its environment beside torchrun's names: a pipe that closes when its starter ends, and, where it
# has one, a folder for the line that it fails with, the socket of `meeting`, the pipe of `pipe`.
_LIFELINE, _FOLDER = "HETEROSTEP_LIFELINE", "HETEROSTEP_RANKS"
_MEETING, _PIPE = "HETEROSTEP_MEETING", "HETEROSTEP_PIPE"
_POSIX = os.name == "posix"
# Seconds between two looks at the ranks; that others have to say what they failed with; that they have to clean up.
LOOK, GRACE, PATIENCE = 0.05, 2.0, 3.0
# How long ranks wait for each other to begin.
MEETING_TIMEOUT = datetime.timedelta(minutes=10)


def rank() -> int | None:
    """Which rank this process is, where `run` or torchrun started it; None where nobody did."""
    found = os.environ.get("RANK", "")
    return int(found) if found.isdigit() and "WORLD_SIZE" in os.environ else None


def size() -> int:
    """How many ranks there are."""
    return int(os.environ["WORLD_SIZE"]) if rank() is not None else 1


def follow() -> None:
    """In a rank: end when the starter has ended. Without a starter of ours this does nothing."""
    if not is_ours():
        return
    lifeline = int(os.environ[_LIFELINE])

    def wait() -> None:
        # It is never written to.
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def tell(message: str, clear: bool = True) -> bool:
    """In a rank: leave the line that it fails with for the starter to show.

    Args:
        clear: whether it says what was wrong, rather than that another rank is gone.

    Returns:
        whether there is a starter of ours that will.
    """
    if _FOLDER not in os.environ:
        return False
    path = Path(os.environ[_FOLDER]) / f"{rank()}.error"
    if not path.exists():
        with contextlib.suppress(OSError):
            path.write_text(f"{0 if clear else 1} {time.time_ns()} {message}", encoding="utf-8")
    return True


def is_ours() -> bool:
    """Whether this process is a rank that was started here, and not by torchrun. (On Windows it cannot be told.)"""
    return _LIFELINE in os.environ


def meeting() -> int | None:
    """In rank 0: the socket on which the ranks meet. It listens since they were started: nobody else has its port."""
    return int(os.environ[_MEETING]) if _MEETING in os.environ else None


def pipe() -> int:
    """In a rank that was given one: its end of a pipe to its starter."""
    return int(os.environ[_PIPE])


@contextlib.contextmanager
def joined(kind: str) -> Iterator[torch.device]:
    """In a rank: in one process group with the others, on this one's device.

    Args:
        kind: cuda or cpu.
    """
    # Here alone: the command starts ranks before it needs torch.
    import torch
    import torch.distributed as dist

    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **_rendezvous())
    else:
        dist.init_process_group("gloo", **_rendezvous())
    yield device
    # Not after an error: others may be waiting for this rank, and it would wait for them.
    dist.destroy_process_group()


def _rendezvous() -> dict[str, Any]:
    """How the ranks of our starter find each other: by the socket that rank 0 has from it. Of others torch knows it."""
    import torch.distributed as dist

    if not is_ours():
        return {}
    place, number, ranks = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), rank(), size()
    store = dist.TCPStore(*place, ranks, number == 0, timeout=MEETING_TIMEOUT, master_listen_fd=meeting())
    return {"store": store, "rank": number, "world_size": ranks}


def run(arguments: Sequence[str], ranks: int, program: Sequence[str] = ("-m", "heterostep")) -> int:
    """Run Python with a program and these arguments in so many processes.

    Args:
        program: what Python is to run.

    Returns:
        0 where all ended well.

    Raises:
        HeterostepError: one failed; says what it said.
        KeyboardInterrupt: Ctrl-C; all are ended before.
    """
    with (
        tempfile.TemporaryDirectory(prefix="heterostep-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as logs,
    ):
        hidden = [logs.enter_context(Path(folder, f"{number}.log").open("wb")) for number in range(1, ranks)]
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        surroundings = {_FOLDER: folder, "OMP_NUM_THREADS": threads}
        started = Started([sys.executable, *program, *arguments], ranks, surroundings, outputs=[None, *hidden])
        try:
            while (codes := started.codes()) != [0] * ranks:
                if any(codes):
                    # Others may know better why, or be about to end by themselves.
                    _wait(lambda: None not in started.codes(), GRACE)
                    break
                time.sleep(LOOK)
            codes = started.codes()
        finally:
            started.end()
        if any(code != 0 for code in codes):
            raise HeterostepError(_why(codes, Path(folder)))
    return 0


class Started:
    """Ranks on this machine. `end` leaves none of them, nor does this process's own end, whatever that is.

    Args:
        command: of each.
        ranks: how many.
        surroundings: what their environment has besides.
        pipes: for each, a file descriptor that it inherits.
        outputs: for each, where what it prints goes; None is where this process's goes.
    """

    def __init__(
        self,
        command: Sequence[str],
        ranks: int,
        surroundings: Mapping[str, str],
        pipes: Sequence[int] = (),
        outputs: Sequence[IO[bytes] | None] = (),
    ) -> None:
        # The other end is this process's, and closes with it, whatever ends it.
        lifeline, self._other_end = os.pipe()
        self.children: list[subprocess.Popen] = []
        with contextlib.closing(socket.socket()) as meeting:
            meeting.bind(("127.0.0.1", 0))
            common = {
                **os.environ,
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(meeting.getsockname()[1]),
                **surroundings,
            }
            if _POSIX:
                meeting.listen(ranks)
            else:
                # Rank 0 cannot inherit it there: it takes the port anew.
                meeting.close()
            try:
                for number in range(ranks):
                    inherited = {_LIFELINE: lifeline} if _POSIX else {}
                    if number == 0 and _POSIX:
                        inherited[_MEETING] = meeting.fileno()
                    if pipes:
                        inherited[_PIPE] = pipes[number]
                    place = {"RANK": number, "LOCAL_RANK": number, **inherited}
                    shown = outputs[number] if outputs else None
                    self.children.append(
                        subprocess.Popen(
                            command,
                            env=common | {name: str(value) for name, value in place.items()},
                            stdin=subprocess.DEVNULL,
                            stdout=shown,
                            stderr=shown,
                            pass_fds=tuple(inherited.values()),
                            # Ctrl-C is for the starter, which tells all.
                            start_new_session=_POSIX,
                        )
                    )
            except BaseException:
                self.end()
                raise
            finally:
                os.close(lifeline)

    def codes(self) -> list[int | None]:
        """How each has ended; None is one that runs."""
        return [child.poll() for child in self.children]

    def end(self) -> None:
        """End what runs still."""
        _end(self.children)
        if self._other_end >= 0:
            os.close(self._other_end)
            self._other_end = -1


def _end(children: Sequence[subprocess.Popen]) -> None:
    """End what runs still: politely, so that unfinished files are removed, then at once."""
    for number in (signal.SIGINT, getattr(signal, "SIGKILL", signal.SIGTERM)):
        for child in children:
            # What it has started itself goes with it.
            with contextlib.suppress(OSError):
                if _POSIX:
                    if child.poll() is None or number != signal.SIGINT:
                        os.killpg(child.pid, number)
                elif child.poll() is None:
                    child.kill()
        _wait(lambda: all(child.poll() is not None for child in children), PATIENCE)
    for child in children:
        child.wait()


def _wait(until: Callable[[], bool], seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not until() and time.monotonic() < ends:
        time.sleep(LOOK)


def _why(codes: Sequence[int | None], folder: Path) -> str:
    """One line: what the first rank said that knew what was wrong, or how it ended."""
    said = []
    for number in range(len(codes)):
        with contextlib.suppress(OSError, ValueError):
            order, when, message = (folder / f"{number}.error").read_text(encoding="utf-8").split(" ", 2)
            said.append((int(order), int(when), number, message))
    if said and min(said)[0] == 0:
        return min(said)[3]
    # Where one is killed, what the others say is that they miss it.
    for number, code in enumerate(codes):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"the process of GPU {number} was ended from outside ({name}), perhaps for its memory"
    if said:
        _, _, number, message = min(said)
        return f"GPU {number}: {message}"
    number, code = next((number, code) for number, code in enumerate(codes) if code)
    lines = (folder / f"{number}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"the process of GPU {number} ended with {code}" + (f": {last}" if last else "")
