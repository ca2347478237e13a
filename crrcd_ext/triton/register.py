"""Gives the operators of ``crrcd_triton::`` their kernels, which are imported when first called."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from crrcd_ext.triton import INTERPRETED

MODULES = {
    "relation": "relation",
    "relation_backward": "relation",
    "relation_nce": "relation_nce",
    "relation_nce_": "relation_nce",
    "difference_nce": "difference_nce",
    "difference_nce_": "difference_nce",
    "instance_nce": "instance_nce",
    "instance_nce_": "instance_nce",
    "similar_mask": "similar_mask",
    "bank_update_": "bank_update",
}
"""Operators and the modules of this package that have functions of their names."""


def entry(operator: str, module: str) -> Callable:
    function = None

    def call(*arguments):
        nonlocal function
        if function is None:
            imported = importlib.import_module(f"crrcd_ext.triton.{module}")
            function = getattr(imported, operator)
        return function(*arguments)

    return call


library = torch.library.Library("crrcd_triton", "IMPL")
for _operator, _module in MODULES.items():
    library.impl(_operator, entry(_operator, _module), "CPU" if INTERPRETED else "CUDA")
