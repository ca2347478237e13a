"""Picture files: opened whole, or named where they are damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError

NAMED = 5
"""Damaged pictures that a message names, before it counts."""


def open_image(path: Path) -> Any:
    """A PIL image in memory; raises UserError for a file that is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    # What Pillow raises depends on its format and on where the damage lies.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} is damaged or none ({error})") from None


def readable(files: list[Path], names: list[str], say: Callable[[str], None]) -> list[int]:
    """The places of those ``files`` that can be opened; says how many cannot, and which."""
    good, bad = [], []
    for row, (path, name) in enumerate(zip(files, names, strict=True)):
        try:
            open_image(path)
        except UserError:
            bad.append(name)
        else:
            good.append(row)
    if bad:
        rest = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        named = ", ".join(bad[:NAMED]) + rest
        say(f"{len(bad)} of {len(files)} pictures skipped as damaged: {named}")
    return good
