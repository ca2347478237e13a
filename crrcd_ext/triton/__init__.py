"""The operators in Triton: no compiler at install time, any GPU that Triton knows.

Importing this package does not import Triton; the first call of an operator does.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re

import torch

OLDEST = (3, 4)
"""The oldest release of Triton that the kernels are written for (that of torch 2.8). To Triton 3.2
no constant equals a type, and it ends the process when it compiles the logits of all gradients for
sm_90."""

WITH_FLOAT64 = (3, 6)
"""Before that its products take no float64."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels in Python, on the CPU. It reads the variable when a kernel is
defined, so that it has to be set before."""


_reason: list[str | None] = []


def why_not() -> str | None:
    """Why the kernels cannot run here, or None when they can."""
    if not _reason:  # a look at the installed packages takes longer than a call of an operator
        _reason.append(_look())
    return _reason[0]


@functools.cache
def release() -> tuple[int, ...] | None:
    """Of the installed Triton, as (3, 4, 0); None where there is none."""
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(map(int, re.findall(r"\d+", found)[:3]))


def lacks() -> tuple[torch.dtype, ...]:
    """Dtypes that its computations cannot have."""
    return (torch.float64,) if (release() or WITH_FLOAT64) < WITH_FLOAT64 else ()


def missing() -> str | None:
    """Why no kernel can be compiled here, for any GPU, or None when they can be."""
    found = release()
    if found is None:
        return "Triton is not installed (pip install triton; on Windows triton-windows)"
    if found < OLDEST:
        old, needed = (".".join(map(str, version)) for version in (found, OLDEST))
        return f"Triton {old} is too old ({needed} or newer is needed)"
    return None


def _look() -> str | None:
    reason = missing()
    if reason is not None:
        return reason
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels in Python, for tests)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU is sm_{major}{minor} (sm_80 or newer is needed)"
    return None
