"""Ctrl-C and SIGTERM as a request that the loop answers after the step in hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def _never() -> bool:
    return False


_requested: Callable[[], bool] = _never


def requested() -> bool:
    """True once the user, or the study's parent process, has asked to stop."""
    return _requested()


@contextmanager
def on_signals() -> Iterator[None]:
    """Within: the first signal is a request, the second one ends the program at once."""
    global _requested
    flags: list[int] = []
    before = _requested

    def note(number: int, frame: object) -> None:
        if flags:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        flags.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def noted() -> bool:
        return bool(flags)

    _requested = noted
    try:
        yield
    finally:
        _requested = before
        for number, handler in old.items():
            signal.signal(number, handler)


def follow_parent(event) -> None:
    """In a worker process: signals are the parent's business, which sets `event`.

    A parent that dies without a word counts as a request too.
    """
    global _requested
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def told() -> bool:
        return event.is_set() or os.getppid() != parent

    _requested = told
