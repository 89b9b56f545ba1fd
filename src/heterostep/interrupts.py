"""Remembers Ctrl-C, because exceptions raised during imports or in finalisers are swallowed."""

from __future__ import annotations

import contextlib
import signal
import sys
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

    Python would print where a finaliser swallows one.

    Other handlers than Python's own stay as they are.
    """
    usual = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGINT) is usual

    def interrupt(number: int, frame: Any) -> None:
        _seen.set()
        usual(number, frame)

    hook = sys.unraisablehook

    def quiet(swallowed: Any) -> None:
        if not (_seen.is_set() and issubclass(swallowed.exc_type, KeyboardInterrupt)):
            hook(swallowed)

    if ours:
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = quiet
    try:
        yield
        check()
    finally:
        # Whoever catches it has been told.
        _seen.clear()
        if ours:
            signal.signal(signal.SIGINT, usual)
            sys.unraisablehook = hook


@contextlib.contextmanager
def delayed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the block's end: half of what it changes would be worse than all or nothing."""
    waiting: list[tuple[int, Any]] = []
    # Python calls handlers in the main thread alone. What is not Python's ends the process, or nothing.
    usual: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        usual = {number: handler for number, handler in usual.items() if callable(handler)}
    for number in usual:
        signal.signal(number, lambda *given: waiting.append(given))
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        for number, frame in waiting[:1]:
            usual[number](number, frame)


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
