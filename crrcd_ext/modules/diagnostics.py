"""What tells a working relation from a collapsed one, for diagnostics and on the way."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crrcd_ext import functional

PATIENCE = 100
"""Steps for which a start may be flat, as that of independent Gaussian weights often is."""
GROWTH = 2.0
"""A variance that has grown by this factor since it was least is on its way."""
ROUNDING = 1e-10
"""Variance of unit vectors that differ by rounding alone."""
MAX_NEGATIVES = 256
"""Negatives whose cosines are looked at."""
CONSTANT_RELATION = (
    "crrcd_ext.{name}: the loss ({loss:.4g}) sits at its no-information value "
    "({no_information_loss:.4g}) and the {vectors} hardly differ between samples (variance "
    "{relation_variance:.2g}) at step {step:.0f}, as in every look since step {since:.0f}: they "
    "have collapsed to a constant and the student learns nothing from this loss. Likely causes: "
    "heads and relation trained at the student's learning rate (use "
    "criterion.parameter_groups(lr), which gives them a tenth), standardize=False, or a start "
    "other than init='mirrored'; objective='infonce' resists better."
)
FRESHNESS_SHORTCUT = (
    "crrcd_ext.{name}: positives sit at a mean cosine of {positive_cosine:.2f} and negatives at "
    "{negative_cosine:.2f}, same-class ones included: the loss is probably telling fresh rows from "
    "the bank's stale ones instead of learning relations. Use keys='stop_gradient' with a bank "
    "filled from the teacher (criterion.fill(loader) before training), or keys='live' or 'bank'."
)
NOTHING_LEFT = (
    "crrcd_ext.{name}: exclude_similar={exclude_similar:g} has masked every negative in "
    "{masked_steps:.0f} of {step:.0f} steps: the teacher's embeddings are more alike than that. "
    "Such a step only pulls positives together (a loss of 0 for objective='infonce'). Raise the "
    "threshold."
)
NOT_FINITE = (
    "crrcd_ext.{name}: the loss is {loss} at step {step:.0f}, though features are checked: "
    "parameters of the criterion or rows of its banks are not finite, or have grown out of range. "
    "Likely causes: too large a learning rate, or a learned temperature that runs away."
)


class Flat(NamedTuple):
    """Looks in a row that found the relation constant: since which step, the least variance."""

    since: float
    variance: float


def follow(flat: Flat | None, values: dict[str, float], width: int) -> Flat | None:
    """The stretch of flat looks after one more; None when this look was not flat."""
    if not is_constant(values, width):
        return None
    variance = values["relation_variance"]
    if flat is None or values["step"] < flat.since:
        return Flat(values["step"], variance)
    return Flat(flat.since, min(flat.variance, variance))


def is_collapse(flat: Flat, values: dict[str, float], width: int) -> bool:
    """Whether a flat look is the end of learning and not a late start.

    A late start is over within PATIENCE steps, or its variance is growing by then. Where the
    student's vectors are the same to rounding, or the teacher's hardly differ, nothing can grow.
    """
    variance = values["relation_variance"]
    hopeless = variance < ROUNDING or values["teacher_relation_variance"] < variance_floor(width)
    growing = variance >= GROWTH * flat.variance > 0
    return hopeless or (values["step"] >= PATIENCE and not growing)


def measure(criterion, step) -> tuple[dict[str, float], int]:
    """The numbers of :meth:`crrcd_ext.CRRCDLoss.diagnostics`, and the width of the vectors."""
    sides = criterion._sides(step)
    cosines = [criterion._cosines(side) for side in sides]
    negative = [masked_mean(*c.negative(c.positions(MAX_NEGATIVES))) for c in cosines]
    of_student, of_teacher = criterion._relations(step)
    level = no_information_loss(criterion.num_negatives, criterion.objective)
    values = {
        "step": float(criterion.step),
        "loss": float(mean_loss(step, cosines[0].pairs)),
        "no_information_loss": level * len(cosines),
        "relation_variance": relation_variance(of_student),
        "teacher_relation_variance": relation_variance(of_teacher),
        "effective_rank": effective_rank(of_student),
        "positive_cosine": masked_mean(cosines[0].positive, cosines[0].pairs),
        "negative_cosine": sum(negative) / len(negative),
        **_similar(criterion, sides),
        "temperature": 1 / float(criterion.scale()),
        "offset": criterion.current_offset(),
        "skipped_steps": float(criterion.skipped_steps),
    }
    return values, of_student.shape[-1]


LOOKED_AT = (
    "step",
    "loss",
    "relation_variance",
    "teacher_relation_variance",
    "masked_steps",
    "finite",
)


class Look(NamedTuple):
    """Numbers of a step on their way to the host: float64, in the order of ``LOOKED_AT``."""

    numbers: Tensor
    width: int
    warn: bool
    copied: Any

    def is_here(self, wait: bool = False) -> bool:
        """Whether the numbers have come."""
        if self.copied is not None and wait:
            self.copied.synchronize()
        return self.copied is None or self.copied.query()

    def values(self, criterion) -> dict[str, float] | None:
        """What :func:`measure` gives of them; None for a step that was skipped."""
        values = dict(zip(LOOKED_AT, self.numbers.tolist(), strict=True))
        sides = sum(bank is not None for bank in criterion._banks)
        level = no_information_loss(criterion.num_negatives, criterion.objective)
        values["no_information_loss"] = level * sides
        return values if values.pop("finite") else None


def look(criterion, step, finite: Tensor | None, warn: bool) -> Look:
    """What there is to warn of in a step, without waiting for the device.

    ``finite``, bool [], is False for a step that was skipped. ``warn``: whether to warn of it, or
    only to compare later looks with it.
    """
    device = step.loss.device
    with torch.autocast(device.type, enabled=False):
        relations = criterion._relations(step)
    loss = step.loss
    if step.weights is not None or step.reduction != "mean":
        loss = mean_loss(step, criterion._cosines(criterion._sides(step)[0]).pairs)
    none, yes = loss.new_zeros(()), loss.new_ones(())
    masked = none if criterion.masked_steps is None else criterion.masked_steps
    numbers = [criterion.step, loss, *map(_variance, relations), masked]
    numbers.append(yes if finite is None else finite)
    on_device = torch.stack([x.to(torch.float64) for x in numbers])
    width = relations[0].shape[-1]
    if device.type != "cuda":
        return Look(on_device, width, warn, None)
    on_host = torch.empty(on_device.shape, dtype=torch.float64, pin_memory=True)
    on_host.copy_(on_device, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(device))
    return Look(on_host, width, warn, copied)


def callers_level() -> int:
    """The stacklevel, for a warning in the calling function, of the line that called the library,
    past modules of PyTorch on the way."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in ("crrcd_ext", "torch")


def mean_loss(step, pairs: Tensor) -> Tensor:
    """The mean of the losses of ``pairs``, [A, B] or [B], by their weights, however the step's were
    reduced: what can be compared with the loss of a critic that tells nothing apart."""
    if step.reduction == "mean" and step.weights is None:
        return step.loss
    total = step.loss.sum()
    if step.reduction == "mean":
        total = total * pairs.sum()
    weight = (pairs if step.weights is None else pairs * step.weights).sum()
    return torch.where(weight == 0, 0.0, total / weight)


def _similar(criterion, sides) -> dict[str, float]:
    """What exclude_similar does, if it is set."""
    if criterion.exclude_similar is None:
        return {}
    masks = [side.arguments["excluded"] for side in sides]
    count = criterion.num_negatives
    shares = [float(functional.unpack_bits(mask, count).double().mean()) for mask in masks]
    return {
        "similar_share": sum(shares) / len(shares),
        "masked_steps": float(criterion.masked_steps),
    }


def no_information_loss(negatives: int, objective: str) -> float:
    """The least loss of a critic that gives every candidate the same score.

    NCE: log(1 + K) + K log(1 + 1/K); InfoNCE: log(1 + K).
    """
    value = math.log1p(negatives)
    return value + negatives * math.log1p(1 / negatives) if objective == "nce" else value


def relation_variance(relation: Tensor) -> float:
    """Variance of [A, B, R] over b, mean over anchors and dimensions; 1/R is its bound."""
    return float(_variance(relation))


def _variance(relation: Tensor) -> Tensor:
    return relation.var(dim=1, correction=0).mean()


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
    """The loss within 1% of no information while the relation hardly varies."""
    level = values["no_information_loss"]
    low = values["relation_variance"] < variance_floor(relation_dim)
    return low and abs(values["loss"] - level) <= 0.01 * level


def variance_floor(relation_dim: int) -> float:
    """1e-3 is meant for R up to 128; unit vectors of more dimensions vary less in each."""
    return 1e-3 * min(1.0, 128 / relation_dim)


def is_shortcut(values: dict[str, float]) -> bool:
    """Positives together and negatives not merely unrelated but opposite."""
    return values["positive_cosine"] > 0.9 and values["negative_cosine"] < -0.5
