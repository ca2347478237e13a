"""The CUDA kernels, run on the CPU by the emulator of tests/simt, as two more backends.

"simt" runs them as they are, "simt checked" under the checker, which raises RuntimeError at a race,
an access out of bounds, a misaligned one or a read of what was never written. Each is built and
loaded when a test first uses it, never while tests are collected.

CRRCD_EMULATOR=0 leaves them out, as a machine with a GPU does by itself; 1 has them there too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from simt import build

from crrcd_ext import _backend, _schema
from helpers.on_device import ON_DEVICE

SCHEDULES = [(name, late) for name in build.SCHEDULES for late in (False, True)]


def _why_not() -> str | None:
    default = "0" if torch.cuda.is_available() else "1"
    if os.environ.get("CRRCD_EMULATOR", default) == "0":
        return "the emulator is off, as where there is a GPU: CRRCD_EMULATOR=1 switches it on"
    try:
        build.compiler()
        build.toolkit_include()
    except build.Unavailable as error:
        return str(error)
    return None


missing = _why_not()
"""Why the emulation cannot be had here, or None when it can."""
NAMES = {"simt": False, "simt checked": True} if missing is None else {}
"""The backends, and whether the checker looks on."""
if build.SANITIZE:
    NAMES.pop("simt checked", None)
EMULATED = [*(["simt"] if "simt" in NAMES else []), *ON_DEVICE]
"""To be added to the backends of tests of operators that have CUDA kernels; on a machine with a GPU
its own are among them."""


def _namespace(name: str) -> str:
    return "crrcd_" + name.replace(" ", "_")


@functools.cache
def _built(name: str) -> build.Library | build.BuildError:
    """What cannot be built is not tried again by the next test."""
    try:
        kernels = build.load(NAMES[name])
    except build.BuildError as error:
        return error
    kernels.definitions = torch.library.Library(_namespace(name), "DEF")  # lives as long
    for schema in _schema.SCHEMAS:
        kernels.definitions.define(schema)
    return kernels


def library(name: str) -> build.Library:
    """The kernels of a backend, built and loaded once."""
    kernels = _built(name)
    if isinstance(kernels, build.BuildError):
        raise kernels
    return kernels


class _Emulated(_backend.Compiled):
    """A backend that is loaded when a call first asks for its operators' library."""

    @property
    def library(self) -> str:
        _, name, *_ = self  # the field that this property hides
        library(name)
        return _namespace(name)


for _name in NAMES:
    _backend.COMPILED[_name] = _Emulated("cpu", _name)


@contextmanager
def emulation(
    backend: str, schedule: str = "forward", *, seed: int = 0, late: bool = False
) -> Iterator[None]:
    """Order of the threads; tensors that are made inside are all that kernels may touch, and are
    full of NaN until something is written."""
    if build.SANITIZE and backend not in NAMES:
        pytest.skip("the sanitizers take the place of the checker")
    kernels = library(backend)
    kernels.configure(schedule, seed=seed, late=late)
    kernels.watch_tensors(True)
    try:
        yield
    finally:
        kernels.watch_tensors(False)
        kernels.configure()
