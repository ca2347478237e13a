"""Progress of a run: its bar, and one line for what is finished."""

from __future__ import annotations

import sys
from typing import Any

from .loop import Watcher
from .meter import meter


class Bar(Watcher):
    """A bar over steps, with the latest loss and validation accuracy."""

    def __init__(self, label: str, enabled: bool = True) -> None:
        self.label, self.enabled = label, enabled
        self.bar: Any = None

    def start(self, label: str, total: int, done: int) -> None:
        self.bar = meter(self.label, "step", enabled=self.enabled, total=total, initial=done)

    def step(self, count: int) -> None:
        self.bar.update(count)

    def epoch(self, row: dict[str, Any]) -> None:
        shown = {"epoch": row["epoch"], "loss": f"{row['loss']:.3f}"}
        if "validation" in row:
            shown["validation"] = f"{row['validation']:.2f}%"
        self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def say(text: str) -> None:
    """A line on standard output that does not tear an active bar."""
    from tqdm import tqdm

    tqdm.write(text)
    sys.stdout.flush()
