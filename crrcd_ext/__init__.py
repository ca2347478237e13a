"""Relational contrastive distillation losses for PyTorch.

``crrcd_ext.CRRCDLoss``, ``CRCDLoss`` and ``CRDLoss`` are the modules for a training script,
``crrcd_ext.functional`` has one function per operator, ``python -m crrcd_ext`` tells which backends
this installation has.
"""

from crrcd_ext import functional
from crrcd_ext._backend import available_backends, set_backend, use_backend
from crrcd_ext.modules import (
    ClassTable,
    CRCDLoss,
    CRDLoss,
    CRRCDLoss,
    FeatureRelation,
    MemoryBank,
    MemoryQueue,
)

__version__ = "0.1.0"

__all__ = [
    "CRCDLoss",
    "CRDLoss",
    "CRRCDLoss",
    "ClassTable",
    "FeatureRelation",
    "MemoryBank",
    "MemoryQueue",
    "__version__",
    "available_backends",
    "functional",
    "set_backend",
    "use_backend",
]
