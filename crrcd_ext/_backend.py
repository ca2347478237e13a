"""Which implementation runs.

The argument ``backend=`` decides, then set_backend or use_backend, then CRRCD_BACKEND, then "auto".
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from crrcd_ext import _schema  # noqa: F401  the operators are defined before _C gives them kernels

LIBRARY = "crrcd"


class Compiled(NamedTuple):
    """A backend of compiled kernels: the type of its tensors' device and the library that has its
    operators."""

    device: str
    library: str = LIBRARY


COMPILED = {"cpu": Compiled("cpu"), "cuda": Compiled("cuda")}

compiled = None
"""The module crrcd_ext._C, or None."""
missing: str | None = None
"""Why the compiled module is absent, or None when it is there."""

try:
    compiled = importlib.import_module("crrcd_ext._C")
except ImportError as error:
    missing = f"{type(error).__name__}: {error}"
# Asked once: a graph that is traced cannot ask the compiled module.
_with_cuda = compiled is not None and compiled.build_info()["cuda"]

INSTALL = (
    "build it with `pip install .` in the source folder (it needs a C++20 compiler; "
    "`python -m crrcd_ext` shows the result), or choose backend 'reference'"
)

_environment = os.environ.get("CRRCD_BACKEND") or None
_chosen: str | None = None
_warned = False


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run and otherwise the reason why it cannot."""
    return {name: _why_not(name) if name in COMPILED else None for name in _names()}


def _names() -> list[str]:
    return ["reference", *(name for name, k in COMPILED.items() if k.library == LIBRARY)]


def _why_not(name: str) -> str | None:
    if missing is not None:
        return f"crrcd_ext._C is not there ({missing})"
    if COMPILED[name].device == "cuda":
        if not _with_cuda:
            return "this build has no CUDA kernels (CRRCD_CUDA=1 pip install . makes one that has)"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
    return None


def set_backend(name: str | None) -> None:
    """Choose the backend of every later call in this process that does not name its own.

    ``name`` is "auto", "reference", "cpu" or "cuda"; None gives the choice back to CRRCD_BACKEND
    and "auto". Raises ValueError for another name, RuntimeError for one that cannot run here.
    """
    global _chosen
    if name is not None:
        _require(name, "set_backend")
    _chosen = name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """``with use_backend("reference"): ...`` is set_backend for a block, in every thread."""
    global _chosen
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        _chosen = before


def current_backend() -> str:
    """The choice for calls without ``backend=``: "auto" or the name of a backend."""
    return _chosen or _environment or "auto"


def resolve(operator: str, backend: str | None, device: torch.device) -> str:
    """The backend that ``operator`` runs with for tensors on ``device``."""
    name = backend or _chosen
    if name is not None:
        _require(name, operator)
    elif _environment is not None:
        name = _environment
        _require(name, "CRRCD_BACKEND")
    else:
        name = "auto"
    if name == "auto":
        return _best(operator, device)
    if name == "reference":
        return name
    kernels = COMPILED[name]
    if kernels.device != device.type:
        raise ValueError(
            f"crrcd_ext.{operator}: backend {name!r}: expected tensors on {kernels.device}, got "
            f"{device}"
        )
    return name


def _best(operator: str, device: torch.device) -> str:
    if device.type == "cpu" and missing is not None:
        _warn_once()
    for name, kernels in COMPILED.items():
        if kernels.device == device.type and _why_not(name) is None:
            return name
    return "reference"


def _require(name: str, where: str) -> None:
    if name not in ("auto", "reference", *COMPILED):
        names = ", ".join(["auto", *_names()])
        raise ValueError(f"crrcd_ext.{where}: backend: expected one of {names}, got {name!r}")
    reason = _why_not(name) if name in COMPILED else None
    if reason is not None:
        remedy = f"; {INSTALL}" if missing is not None else ""
        raise RuntimeError(
            f"crrcd_ext.{where}: backend {name!r} is not available: {reason}{remedy}"
        )


@torch.compiler.assume_constant_result
def _warn_once() -> bool:
    # A constant for the compiler: traced code warns while it is traced and never breaks the graph.
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "crrcd_ext runs on the slow 'reference' backend: "
            f"crrcd_ext._C is not there ({missing}); {INSTALL}",
            RuntimeWarning,
            stacklevel=4,
        )
    return True
