"""How well probes find their own in a gallery: identification, verification, ROC."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FAR = 0.01
"""The false accept rate at which the true accept rate is reported."""
FAR_GRID = np.logspace(-3.5, 0.0, 71)
"""Where curves of several splits are averaged."""


@dataclass
class Retrieval:
    """One evaluation, in percent.

    Attributes:
        rank1: probes whose best gallery entry is of their own class.
        tar: genuine pairs accepted at the threshold that accepts FAR of the impostor pairs.
        auc: chance that a genuine pair scores above an impostor pair.
        roc: true accept rate at each rate of FAR_GRID.
    """

    rank1: float
    tar: float
    auc: float
    roc: list[float]


def evaluate(scores: Tensor, labels: Tensor, gallery_labels: Tensor) -> Retrieval:
    """Identification and verification from scores [P, G] of probes and gallery entries.

    Every (probe, entry) is a pair: genuine where labels int64 [P] and gallery_labels int64 [G]
    agree.

    Raises:
        ValueError: scores that are not finite, or no pair of a kind.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    if not torch.isfinite(scores).all():
        raise ValueError("retrieval: scores are not finite")
    genuine = labels[:, None] == gallery_labels
    if genuine.all() or not genuine.any():
        raise ValueError("retrieval: genuine and impostor pairs are needed")
    truth, values = genuine.flatten().numpy(), scores.double().flatten().numpy()
    far, tar, _ = roc_curve(truth, values, drop_intermediate=False)
    return Retrieval(
        recall_at_1(scores, labels, gallery_labels),
        100.0 * _at(far, tar, FAR),
        100.0 * float(roc_auc_score(truth, values)),
        [100.0 * _at(far, tar, rate) for rate in FAR_GRID],
    )


def _at(far: np.ndarray, tar: np.ndarray, rate: float) -> float:
    """The highest true accept rate whose false accept rate is at most `rate`."""
    return float(tar[np.searchsorted(far, rate + 1e-12, side="right") - 1])


def recall_at_1(scores: Tensor, labels: Tensor, gallery_labels: Tensor) -> float:
    """Percent of probes [P] whose nearest gallery entry [G] has their label; scores [P, G]."""
    return 100.0 * float((gallery_labels[scores.argmax(1)] == labels).double().mean())
