"""Progress on the terminal: one bar with rate and time left, one line for what is finished."""

from __future__ import annotations

import sys
from typing import Any

from .loop import Watcher


class Bar(Watcher):
    """A tqdm bar over steps, with the latest loss and validation accuracy."""

    def __init__(self, label: str, enabled: bool = True) -> None:
        self.label, self.enabled = label, enabled
        self.bar: Any = None

    def start(self, label: str, total: int, done: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=total,
            initial=done,
            desc=self.label,
            unit="step",
            disable=None if self.enabled else True,  # None: off where no terminal looks on
            file=sys.stderr,
            dynamic_ncols=True,
        )

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
