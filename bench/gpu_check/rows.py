"""Rows of the report: a stage's script writes each as it is known, so that none is lost with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

VARIABLE = "CRRCD_CHECK_ROWS"
"""Environment variable that names the file for the rows of a process."""


def emit(**row: object) -> None:
    """Prints a row and appends it to the file of this process, when it has one.

    ``ok``: whether what the row tells of is right; False makes a failure of it, None a case that
    was left out. ``command``: the smallest one that shows a failure.
    """
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    path = os.environ.get(VARIABLE)
    if path:
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict]:
    """The rows that a process has written; its last may be half a line when it was killed."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
