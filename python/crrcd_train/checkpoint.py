"""Checkpoints that survive a crash: written beside and renamed, the previous one kept, checked.

A checkpoint is an ordinary torch.save file that `torch.load(path, weights_only=True)` opens.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

FILE = "checkpoint.pt"
FORMAT = 1


def previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` so that at every moment `path` or its previous version is whole on disk.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous(path))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Reads a checkpoint; where it is missing or damaged its previous version, saying so.

    Raises:
        UserError: neither can be read.
    """
    reasons = []
    for candidate in (path, previous(path)):
        try:
            state = _read(candidate)
        except _Unreadable as error:
            reasons.append(f"{candidate} {error}")
            continue
        if reasons:
            say(f"{reasons[0]}: going on from the previous one, {candidate}")
        return state
    raise UserError(f"no usable checkpoint: {'; '.join(reasons)}")


def exists(path: Path) -> bool:
    return path.exists() or previous(path).exists()


def digest(path: Path) -> str:
    """SHA-256 of the file, to tell what was derived from it from what was not."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Unreadable(Exception):
    pass


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise _Unreadable("is missing")
    try:
        # torch.load does not compare the archive's checksums; zipfile does.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise _Unreadable("is damaged (wrong checksum)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _Unreadable:
        raise
    except PermissionError:
        raise _Unreadable("cannot be read (permission denied)") from None
    except Exception:  # a damaged archive fails in whatever layer meets the damage first
        raise _Unreadable("is damaged") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _Unreadable("is no checkpoint of this program")
    return state
