"""What tells a working relation from a collapsed one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CONSTANT_RELATION = (
    "crrcd_ext.CRRCDLoss: the loss ({loss:.4g}) sits at its no-information value "
    "({no_information_loss:.4g}) and the relation vectors hardly differ between samples (variance "
    "{relation_variance:.2g}): the relation has collapsed to a constant and the student learns "
    "nothing from this loss. Likely causes: heads and relation trained at the student's learning "
    "rate (use criterion.parameter_groups(lr), which gives them a tenth), standardize=False, or a "
    "changed initialisation of the relation; objective='infonce' resists better."
)
FRESHNESS_SHORTCUT = (
    "crrcd_ext.CRRCDLoss: positives sit at a mean cosine of {positive_cosine:.2f} and negatives at "
    "{negative_cosine:.2f}, same-class ones included: the loss is probably telling fresh rows from "
    "the bank's stale ones instead of learning relations. Use keys='stop_gradient' with a bank "
    "filled from the teacher (criterion.fill(loader) before training), or keys='live' or 'bank'."
)


def no_information_loss(negatives: int, objective: str) -> float:
    """The least loss of a critic that gives every candidate the same score.

    NCE: log(1 + K) + K log(1 + 1/K); InfoNCE: log(1 + K).
    """
    value = math.log1p(negatives)
    return value + negatives * math.log1p(1 / negatives) if objective == "nce" else value


def relation_variance(relation: Tensor) -> float:
    """Variance of [A, B, R] over b, mean over anchors and dimensions; 1/R is its bound."""
    return float(relation.var(dim=1, correction=0).mean())


def effective_rank(relation: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007).

    Of [A, B, R], centred over b for every anchor and stacked to [A B, R]; 0 for a constant.
    """
    centred = (relation - relation.mean(dim=1, keepdim=True)).flatten(0, 1)
    values = torch.linalg.svdvals(centred.to(torch.float64))
    total = values.sum()
    if total <= 1e-12:
        return 0.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


def masked_mean(values: Tensor, keep: Tensor) -> float:
    """Mean of the kept entries; NaN when there are none."""
    return float(values[keep].mean())


def is_constant(values: dict[str, float], relation_dim: int) -> bool:
    """The loss within 1% of no information while the relation hardly varies.

    The bar of 1e-3 is meant for R up to 128; unit vectors of more dimensions vary less in each.
    """
    level = values["no_information_loss"]
    bar = 1e-3 * min(1.0, 128 / relation_dim)
    return abs(values["loss"] - level) <= 0.01 * level and values["relation_variance"] < bar


def is_shortcut(values: dict[str, float]) -> bool:
    """Positives together and negatives not merely unrelated but opposite."""
    return values["positive_cosine"] > 0.9 and values["negative_cosine"] < -0.5
