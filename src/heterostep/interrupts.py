"""Remembers Ctrl-C, because exceptions raised during imports or in finalisers are swallowed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_seen = threading.Event()


def check() -> None:
    """Raise what was swallowed.

    Raises:
        KeyboardInterrupt: there was a Ctrl-C inside of `watched`.
    """
    if _seen.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Note each Ctrl-C, which is raised as ever; raise it at the end once more where it was swallowed.

    Other handlers than Python's own stay as they are.
    """
    usual = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGINT) is usual

    def interrupt(number: int, frame: Any) -> None:
        _seen.set()
        usual(number, frame)

    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
        check()
    finally:
        # Whoever catches it has been told.
        _seen.clear()
        if ours:
            signal.signal(signal.SIGINT, usual)


@contextlib.contextmanager
def delayed() -> Iterator[None]:
    """Let Ctrl-C wait for the block's end: half of what the block changes would be worse than all of it or nothing."""
    waiting: list[tuple[int, Any]] = []
    usual = signal.getsignal(signal.SIGINT)
    # Python calls handlers in the main thread alone; what was not set from Python cannot be put back.
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if waiting:
            usual(*waiting[0])


@contextlib.contextmanager
def also_terminated() -> Iterator[None]:
    """Let a service manager's or a scheduler's SIGTERM end the block as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        # None is a handler that was not set from Python.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
