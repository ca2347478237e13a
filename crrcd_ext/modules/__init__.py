"""Modules: the losses of a training script and their parts."""

from crrcd_ext.modules.bank import MemoryBank
from crrcd_ext.modules.crcd import CRCDLoss
from crrcd_ext.modules.crd import CRDLoss
from crrcd_ext.modules.crrcd import CRRCDLoss
from crrcd_ext.modules.heads import EmbeddingHead, Standardizer
from crrcd_ext.modules.queue import MemoryQueue
from crrcd_ext.modules.relation import FeatureRelation
from crrcd_ext.modules.sampling import ClassTable

__all__ = [
    "CRCDLoss",
    "CRDLoss",
    "CRRCDLoss",
    "ClassTable",
    "EmbeddingHead",
    "FeatureRelation",
    "MemoryBank",
    "MemoryQueue",
    "Standardizer",
]
