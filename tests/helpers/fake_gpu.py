"""CRRCD_FAKE_GPU=1: tests are collected as on a machine with a GPU, whose backends do not run."""

from __future__ import annotations

import os

import torch

ASKED_FOR = os.environ.get("CRRCD_FAKE_GPU") == "1"

if ASKED_FOR:
    os.environ.pop("TRITON_INTERPRET", None)
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)

    from crrcd_ext import _backend

    _backend._with_cuda = _backend.compiled is not None
