"""Ctrl-C and SIGTERM: a `KeyboardInterrupt` in the main thread that is raised again if Python loses it.

Python drops an exception that a signal handler raises inside a destructor or a callback, and libraries written in C may replace
it by their own. So the signal is also remembered, and every report of progress asks for it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_received: int | None = None


def received() -> int | None:
    """The signal that has arrived since the innermost `handled` began, or None."""
    return _received


def raise_again() -> None:
    """Raise KeyboardInterrupt if a signal has arrived."""
    if _received is not None:
        raise KeyboardInterrupt


def _handle(number: int, frame: object) -> None:
    global _received
    _received = number
    # A second one ends it at once.
    signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    raise KeyboardInterrupt


@contextmanager
def handled() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt. Only the main thread may, so that in others this does nothing."""
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _received = None
    try:
        for number in before:
            signal.signal(number, _handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received = None
