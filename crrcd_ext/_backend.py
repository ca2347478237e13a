"""Which implementation runs.

The argument ``backend=`` decides, then set_backend or use_backend, then CRRCD_BACKEND, then "auto".
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from crrcd_ext import _schema  # noqa: F401  the operators are defined before _C gives them kernels

BACKENDS = ("reference", "cpu")
NAMES = ("auto", *BACKENDS)

compiled = None
"""The module crrcd_ext._C, or None."""
missing: str | None = None
"""Why the compiled module is absent, or None when it is there."""

try:
    compiled = importlib.import_module("crrcd_ext._C")
except ImportError as error:
    missing = f"{type(error).__name__}: {error}"

INSTALL = (
    "build it with `pip install .` in the source folder (it needs a C++20 compiler; "
    "`python -m crrcd_ext` shows the result), or choose backend 'reference'"
)

_environment = os.environ.get("CRRCD_BACKEND") or None
_chosen: str | None = None
_warned = False


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run and otherwise the reason why it cannot."""
    return {"reference": None, "cpu": missing and f"crrcd_ext._C is not there ({missing})"}


def set_backend(name: str | None) -> None:
    """Choose the backend of every later call in this process that does not name its own.

    ``name`` is "auto", "reference" or "cpu"; None gives the choice back to CRRCD_BACKEND and
    "auto". Raises ValueError for another name, RuntimeError for one that cannot run here.
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
    """The choice for calls without ``backend=``: "auto", "reference" or "cpu"."""
    return _chosen or _environment or "auto"


def resolve(operator: str, backend: str | None, device: torch.device) -> str:
    """The backend, "reference" or "cpu", that ``operator`` runs with for tensors on ``device``."""
    name = backend or _chosen
    if name is not None:
        _require(name, operator)
    elif _environment is not None:
        name = _environment
        _require(name, "CRRCD_BACKEND")
    else:
        name = "auto"
    if name == "auto":
        if device.type != "cpu":
            return "reference"
        if missing is None:
            return "cpu"
        _warn_once()
        return "reference"
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"crrcd_ext.{operator}: backend 'cpu': expected tensors on cpu, got {device}"
        )
    return name


def _require(name: str, where: str) -> None:
    if name not in NAMES:
        raise ValueError(
            f"crrcd_ext.{where}: backend: expected one of {', '.join(NAMES)}, got {name!r}"
        )
    if name == "cpu" and missing is not None:
        raise RuntimeError(
            f"crrcd_ext.{where}: backend 'cpu' is not available: "
            f"crrcd_ext._C is not there ({missing}); {INSTALL}"
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
