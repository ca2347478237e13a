"""What a user can cause, told in one line, and the two ways in which a command ends early."""

from __future__ import annotations

import os
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The command line prints its text alone and exits with 2."""


class Interrupted(Exception):
    """Training stopped on request, after its state was saved. The command line exits with 130."""


def writable_folder(path: Path) -> Path:
    """Creates `path` when needed and proves that a file can be written there.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    probe = path / f".write-probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output folder {path} cannot be written ({error.strerror or error}); "
            "choose another with --output"
        ) from None
    return path
