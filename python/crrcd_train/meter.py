"""How far long work has come: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO


class Lines:
    """A stream on which a bar, drawn over and over, becomes a line every SECONDS.

    Work that ends before the first one leaves none; longer work ends with its last state.
    """

    SECONDS = 25.0

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.last, self.written, self.since = "", "", time.monotonic()

    def write(self, text: str) -> None:
        ended = text.endswith("\n")
        self.last = text.strip() or self.last
        due = time.monotonic() - self.since >= self.SECONDS
        if self.last != self.written and (due or (ended and self.written)):
            self.stream.write(self.last + "\n")
            self.stream.flush()
            self.written, self.since = self.last, time.monotonic()

    def flush(self) -> None:
        self.stream.flush()


def meter(
    name: str,
    unit: str,
    *,
    enabled: bool = True,
    items: Iterable | None = None,
    total: int | None = None,
    initial: int = 0,
) -> Any:
    """A tqdm bar over ``items``, or to be updated, on a terminal; else lines on standard output."""
    from tqdm import tqdm

    look: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        look = {"file": Lines(sys.stdout), "bar_format": "{desc}: {n_fmt} of {total_fmt} {unit}s, "}
        look["bar_format"] += "{elapsed} so far, {remaining} left{postfix}"
    return tqdm(
        items, total=total, initial=initial, desc=name, unit=unit, disable=not enabled, **look
    )
