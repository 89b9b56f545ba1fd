"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from heterostep.errors import HeterostepError, first_line


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` when the block ends, and vanishes if the block raises."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
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
