"""What tells a working relation from a collapsed one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_NEGATIVES = 256
"""Negatives whose cosines are looked at."""
CONSTANT_RELATION = (
    "crrcd_ext.{name}: the loss ({loss:.4g}) sits at its no-information value "
    "({no_information_loss:.4g}) and the {vectors} hardly differ between samples (variance "
    "{relation_variance:.2g}): they have collapsed to a constant and the student learns nothing "
    "from this loss. Likely causes: heads and relation trained at the student's learning rate (use "
    "criterion.parameter_groups(lr), which gives them a tenth), standardize=False, or a changed "
    "initialisation; objective='infonce' resists better."
)
FRESHNESS_SHORTCUT = (
    "crrcd_ext.{name}: positives sit at a mean cosine of {positive_cosine:.2f} and negatives at "
    "{negative_cosine:.2f}, same-class ones included: the loss is probably telling fresh rows from "
    "the bank's stale ones instead of learning relations. Use keys='stop_gradient' with a bank "
    "filled from the teacher (criterion.fill(loader) before training), or keys='live' or 'bank'."
)


def measure(criterion, step) -> tuple[dict[str, float], int]:
    """The numbers of :meth:`crrcd_ext.CRRCDLoss.diagnostics`, and the width of the vectors."""
    cosines = [criterion._cosines(side) for side in criterion._sides(step)]
    negative = [masked_mean(*c.negative(c.positions(MAX_NEGATIVES))) for c in cosines]
    of_student, of_teacher = criterion._relations(step)
    level = no_information_loss(criterion.num_negatives, criterion.objective)
    values = {
        "loss": float(step.loss),
        "no_information_loss": level * len(cosines),
        "relation_variance": relation_variance(of_student),
        "teacher_relation_variance": relation_variance(of_teacher),
        "effective_rank": effective_rank(of_student),
        "positive_cosine": masked_mean(cosines[0].positive, cosines[0].pairs),
        "negative_cosine": sum(negative) / len(negative),
        "temperature": 1 / float(criterion.scale()),
        "offset": criterion.current_offset(),
        "skipped_steps": float(criterion.skipped_steps),
    }
    return values, of_student.shape[-1]


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
