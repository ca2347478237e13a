"""The operators in Triton: no compiler at install time, any GPU that Triton knows.

Importing this package does not import Triton; the first call of an operator does.
"""

from __future__ import annotations

import importlib.metadata
import os

import torch

OLDEST = (3, 4)
"""The oldest release of Triton that the kernels are written for (that of torch 2.8). Triton 3.2 takes
a type and a constant for different whatever they are, and ends the process when it compiles the
logits of all gradients for sm_90."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels in Python, on the CPU. It reads the variable when a kernel is
defined, so that it has to be set before."""


_reason: list[str | None] = []


def why_not() -> str | None:
    """Why the kernels cannot run here, or None when they can."""
    if not _reason:  # a look at the installed packages takes longer than a call of an operator
        _reason.append(_look())
    return _reason[0]


def missing() -> str | None:
    """Why no kernel can be compiled here, for any GPU, or None when they can be."""
    try:
        release = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed (pip install triton; on Windows triton-windows)"
    if tuple(int(part) for part in release.split(".")[:2]) < OLDEST:
        return f"Triton {release} is too old ({'.'.join(map(str, OLDEST))} or newer is needed)"
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
