"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from heterostep.errors import HeterostepError, first_line

# Bytes in a file's name, on the file systems that people have.
LONGEST_NAME = 255


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def name_is_too_long(path: Path) -> bool:
    """Whether the file, or what is written beside it at first, has a longer name than file systems take."""
    return len(os.fsencode(_part(path).name)) > LONGEST_NAME


def told(error: OSError) -> str:
    """What the system says of a file, in one line; what is written beside a file at first goes by that file's name."""
    part = Path(str(error.filename))
    if error.strerror and part.suffix == ".part":
        name = part.stem.removeprefix(".").rpartition(".")[0]
        return f"cannot write {part.with_name(name)}: {error.strerror}"
    return first_line(error)


def locked(folder: Path) -> IO[str]:
    """A file in a folder that one process may have open, until it is closed or the process ends.

    Raises:
        BlockingIOError: another process has it.
    """
    file = (folder / ".lock").open("a")
    try:
        import fcntl
    except ImportError:
        # Windows has no such lock: there it is the user who must not start two.
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` when the block ends, and vanishes if the block raises."""
    path = Path(path)
    part = _part(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Name the file that cannot be written, where what is there already is taken up by the same command.

    Raises:
        HeterostepError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        # numpy has no number for a write that was cut short.
        if error.errno in (None, errno.ENOSPC, errno.EDQUOT):
            raise HeterostepError(f"no room left for {path}: the same command goes on once there is some") from error
        why = error.strerror or first_line(error)
        raise HeterostepError(f"cannot write {path} ({why}): the same command goes on once that works") from error
