"""The CUDA kernels, run on the CPU by the emulator of tests/simt, as two more backends.

"simt" runs them as they are, "simt checked" under the checker, which raises RuntimeError at a race, an
access out of bounds, a misaligned one or a read of what was never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from simt import build

from crrcd_ext import _backend, _schema

EMULATED = ["simt"]
"""To be added to the backends of tests of operators that have CUDA kernels."""
SCHEDULES = [(name, late) for name in build.SCHEDULES for late in (False, True)]


def _backend_of(name: str, checked: bool) -> build.Library:
    namespace = name.replace(" ", "_")
    namespace = f"crrcd_{namespace}"
    library = torch.library.Library(namespace, "DEF")
    for schema in _schema.SCHEMAS:
        library.define(schema)
    kernels = build.load(checked)
    kernels.definitions = library  # lives as long
    operators = _backend.COMPILED["cuda"].operators
    _backend.COMPILED[name] = _backend.Compiled("cpu", namespace, operators)
    return kernels


LIBRARIES = {"simt": _backend_of("simt", False), "simt checked": _backend_of("simt checked", True)}


@contextmanager
def emulation(
    backend: str, schedule: str = "forward", *, seed: int = 0, late: bool = False
) -> Iterator[None]:
    """Order of the threads; tensors that are made inside are all that kernels may touch, and are full
    of NaN until something is written."""
    library = LIBRARIES[backend]
    library.configure(schedule, seed=seed, late=late)
    library.watch_tensors(True)
    try:
        yield
    finally:
        library.watch_tensors(False)
        library.configure()
