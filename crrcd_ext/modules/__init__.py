"""Modules: the loss of a training script and its parts."""

from crrcd_ext.modules.bank import MemoryBank
from crrcd_ext.modules.crrcd import CRRCDLoss
from crrcd_ext.modules.heads import EmbeddingHead, Standardizer
from crrcd_ext.modules.relation import FeatureRelation

__all__ = ["CRRCDLoss", "EmbeddingHead", "FeatureRelation", "MemoryBank", "Standardizer"]
