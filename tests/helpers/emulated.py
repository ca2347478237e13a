"""The CUDA kernels, run on the CPU by the emulator of tests/simt, as two more backends.

"simt" runs them as they are, "simt checked" under the checker, which raises RuntimeError at a race,
an access out of bounds, a misaligned one or a read of what was never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from simt import build

from crrcd_ext import _backend, _schema
from helpers.on_device import ON_DEVICE

SCHEDULES = [(name, late) for name in build.SCHEDULES for late in (False, True)]


def _backend_of(name: str, checked: bool) -> build.Library:
    namespace = "crrcd_" + name.replace(" ", "_")
    library = torch.library.Library(namespace, "DEF")
    for schema in _schema.SCHEMAS:
        library.define(schema)
    kernels = build.load(checked)
    kernels.definitions = library  # lives as long
    _backend.COMPILED[name] = _backend.Compiled("cpu", namespace)
    return kernels


missing: str | None = None
"""Why the emulation cannot be had here, or None when it can."""
LIBRARIES: dict[str, build.Library] = {}
try:
    LIBRARIES = {
        name: _backend_of(name, checked)
        for name, checked in (("simt", False), ("simt checked", True))
        if not (checked and build.SANITIZE)
    }
except build.Unavailable as error:
    missing = str(error)
EMULATED = [*(["simt"] if missing is None else []), *ON_DEVICE]
"""To be added to the backends of tests of operators that have CUDA kernels; on a machine with a GPU
its own are among them."""


@contextmanager
def emulation(
    backend: str, schedule: str = "forward", *, seed: int = 0, late: bool = False
) -> Iterator[None]:
    """Order of the threads; tensors that are made inside are all that kernels may touch, and are
    full of NaN until something is written."""
    if build.SANITIZE and backend not in LIBRARIES:
        pytest.skip("the sanitizers take the place of the checker")
    library = LIBRARIES[backend]
    library.configure(schedule, seed=seed, late=late)
    library.watch_tensors(True)
    try:
        yield
    finally:
        library.watch_tensors(False)
        library.configure()
