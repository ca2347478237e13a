"""Which implementation runs.

The argument ``backend=`` decides, then set_backend or use_backend, then CRRCD_BACKEND, then "auto".
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

# The operators are defined before they are given kernels.
from crrcd_ext import autograd, triton  # noqa: F401  isort: skip
from crrcd_ext.triton import register  # noqa: F401  isort: skip


class Compiled(NamedTuple):
    """A backend of kernels: the type of its tensors' device, the library that has its operators,
    dtypes that its computations cannot have, and the operators that take weights and have their
    losses one by one."""

    device: str
    library: str = "crrcd"
    lacks: tuple[torch.dtype, ...] = ()
    weighs: tuple[str, ...] = ("relation_nce", "difference_nce", "instance_nce")


COMPILED = {
    "cpu": Compiled("cpu", lacks=(torch.float16,)),
    "cuda": Compiled("cuda", weighs=("instance_nce",)),
    "triton": Compiled("cpu" if triton.INTERPRETED else "cuda", "crrcd_triton", triton.lacks()),
}
BACKENDS = ("reference", *COMPILED)
"""The names for users; tests add backends of their own to ``COMPILED``."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATORS = (
    "relation",
    "relation_nce",
    "difference_nce",
    "instance_nce",
    "similar_mask",
    "bank_update_",
)
AUTO = {
    "cpu": dict.fromkeys(OPERATORS, ("cpu",)),
    "cuda": dict.fromkeys(OPERATORS, ("cuda", "triton")),
}
"""What "auto" tries, in order, by the type of the device and the operator; the last resort is the
reference. CUDA comes before Triton since its kernels issue fewer instructions for a pair of anchor
and key; no GPU has timed either."""

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
    "`python -m crrcd_ext` shows the result), or choose backend 'reference' or, on a GPU, 'triton'"
)

_environment = os.environ.get("CRRCD_BACKEND") or None
_chosen: str | None = None
_warned = False
_logged: set[tuple[str, str, str]] = set()
log = logging.getLogger("crrcd_ext")


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run and otherwise the reason why it cannot."""
    return {name: _why_not(name) for name in BACKENDS}


def _why_not(name: str) -> str | None:
    if name == "triton":
        return triton.why_not()
    if name == "reference":
        return None
    if COMPILED[name].library != "crrcd":
        return None  # of a test or a benchmark
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

    ``name`` is "auto", "reference", "cpu", "cuda" or "triton", or several with commas between them,
    of which each call takes the first that can run on its tensors' device and in their dtype (the
    reference, if none can), as in "triton,cuda". None gives the choice back to CRRCD_BACKEND and
    "auto". Raises ValueError for another name, RuntimeError for a single one that cannot run here.
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
    """The choice for calls without ``backend=``: "auto" or what set_backend takes."""
    return _chosen or _environment or "auto"


def resolve(
    operator: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    too_small: tuple[str, ...] = (),
    weighed: bool = False,
) -> str:
    """The backend that ``operator`` runs with for tensors on ``device``, computing in ``dtype``.

    One that was named alone has to be able to; others are passed over, those among them whose tiles
    turned out to be ``too_small`` for the widths of the call, or that add up losses alone where the
    call is ``weighed``: it has weights or wants them one by one.
    """
    name = backend or _chosen
    if name is not None:
        _require(name, operator)
    elif _environment is not None:
        name = _environment
        _require(name, "CRRCD_BACKEND")
    else:
        name = "auto"
    if name == "auto":
        if device.type == "cpu" and missing is not None:
            _warn_once()
        names = AUTO.get(device.type, {}).get(operator, ())
        return _first(operator, names, device.type, dtype, too_small, weighed)
    if "," in name:
        return _first(operator, tuple(name.split(",")), device.type, dtype, too_small, weighed)
    if name == "reference":
        return name
    kernels = COMPILED[name]
    expected = kernels.device
    if expected != device.type:
        if name == "triton" and triton.INTERPRETED:
            expected += " (TRITON_INTERPRET=1 has the kernels run in Python; unset it for the GPU)"
        raise ValueError(
            f"crrcd_ext.{operator}: backend {name!r}: expected tensors on {expected}, got {device}"
        )
    if dtype in kernels.lacks:
        *most, last = (_short(x) for x in DTYPES if x not in kernels.lacks)
        taken = f"{', '.join(most)} or {last}"
        raise TypeError(
            f"crrcd_ext.{operator}: operands: expected {taken} on backend {name!r} "
            f"({_short(dtype)}: backend='reference'), got {_short(dtype)}"
        )
    return name


def does_not_fit(error: Exception) -> bool:
    """Whether kernels say that tiles of the call's widths exceed what a GPU has on its chip, or
    blocks what its grids can have.

    They say so before they change anything.
    """
    return "fit this GPU's" in str(error) or type(error).__name__ == "OutOfResources"


def _first(
    operator: str,
    names: tuple[str, ...],
    device: str,
    dtype: torch.dtype | None,
    too_small: tuple[str, ...],
    weighed: bool,
) -> str:
    """The first of ``names`` that can run there."""
    passed_over = ""
    for name in names:
        if name == "reference":
            break
        if COMPILED[name].device != device or _why_not(name) is not None:
            continue
        if dtype in COMPILED[name].lacks:
            passed_over += f" ({name} does not compute in {_short(dtype)})"
            continue
        if weighed and operator not in COMPILED[name].weighs:
            passed_over += f" ({name} has no weights for it, nor losses one by one)"
            continue
        if name in too_small:
            passed_over += f" (tiles of these widths do not fit the GPU with {name})"
            continue
        _log_once(operator, device, name, passed_over)
        return name
    _log_once(operator, device, "reference", passed_over)
    return "reference"


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def automatic(device: str) -> dict[str, str]:
    """What "auto" comes to here, by operator: the first that can run, then the others."""
    rows = {}
    for operator, names in AUTO[device].items():
        able = [COMPILED[n].device == device and _why_not(n) is None for n in names]
        words = [n if can else f"{n} (absent)" for n, can in zip(names, able, strict=True)]
        rows[operator] = ", then ".join([*words, "reference"])
    return rows


def _require(name: str, where: str) -> None:
    several = name.split(",")
    for one in several:
        if one not in BACKENDS and one not in COMPILED and (one != "auto" or len(several) > 1):
            names = ", ".join(["auto", *BACKENDS])
            raise ValueError(f"crrcd_ext.{where}: backend: expected one of {names}, got {one!r}")
    reason = _why_not(name) if len(several) == 1 and name != "auto" else None
    if reason is not None:
        remedy = f"; {INSTALL}" if missing is not None and name != "triton" else ""
        raise RuntimeError(
            f"crrcd_ext.{where}: backend {name!r} is not available: {reason}{remedy}"
        )


def _constant(function: Callable) -> Callable:
    """Traced code calls the function while it is traced and never breaks the graph.

    This is torch.compiler.assume_constant_result, which would import the whole compiler.
    """
    function._dynamo_marked_constant = True
    return function


@_constant
def _warn_once() -> bool:
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


@_constant
def _log_once(operator: str, device: str, name: str, passed_over: str) -> bool:
    choice = operator, device, name + passed_over
    if choice not in _logged:
        _logged.add(choice)
        level = logging.WARNING if passed_over else logging.INFO
        log.log(level, "%s on %s: backend %s", *choice)
    return True
