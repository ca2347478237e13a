"""Identification and verification against what a search over all pairs finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crrcd_train import retrieval


def _pairs(scores: Tensor, labels: Tensor, gallery: Tensor) -> tuple[list[float], list[float]]:
    """Scores of genuine and of impostor pairs."""
    genuine, impostor = [], []
    for p, label in enumerate(labels.tolist()):
        for g, own in enumerate(gallery.tolist()):
            (genuine if label == own else impostor).append(float(scores[p, g]))
    return genuine, impostor


def _true_accepts(genuine: list[float], impostor: list[float], rate: float) -> float:
    """The most genuine pairs, in percent, that a threshold accepts which accepts so few others."""
    best = 0.0
    for threshold in {*genuine, *impostor}:
        accepted = sum(value >= threshold for value in impostor) / len(impostor)
        if accepted <= rate + 1e-12:
            best = max(best, sum(value >= threshold for value in genuine) / len(genuine))
    return 100 * best


@pytest.mark.parametrize("seed", range(3))
def test_random_scores_with_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels, gallery = torch.arange(60) % 12, torch.arange(24) % 12
    signal = 0.8 * (labels[:, None] == gallery)
    noise = torch.randn(60, 24, generator=generator)
    scores = torch.round(4 * (signal + noise)) / 4  # some thirty values for 1440 pairs
    found = retrieval.evaluate(scores, labels, gallery)
    genuine, impostor = _pairs(scores, labels, gallery)
    above = sum((g > i) + 0.5 * (g == i) for g in genuine for i in impostor)
    assert found.auc == pytest.approx(100 * above / len(genuine) / len(impostor))
    assert found.tar == pytest.approx(_true_accepts(genuine, impostor, 0.01))
    assert 0 < found.tar < 50 < found.auc < 90
    for rate, value in zip(retrieval.FAR_GRID[::7], found.roc[::7], strict=True):
        assert value == pytest.approx(_true_accepts(genuine, impostor, float(rate)))
    assert found.roc[-1] == 100.0 and len(found.roc) == len(retrieval.FAR_GRID)
    right = 0
    for p in range(60):
        best = max(range(24), key=lambda g: float(scores[p, g]))
        right += int(gallery[best] == labels[p])
    assert found.rank1 == pytest.approx(100 * right / 60)
    assert retrieval.recall_at_1(scores, labels, gallery) == found.rank1


def test_the_rate_itself_is_allowed() -> None:
    """One of a hundred impostors is accepted: exactly 1 %."""
    labels, gallery = torch.zeros(1, dtype=torch.int64), torch.arange(101)
    scores = torch.linspace(0, 1, 101)[None].clone()
    scores[0, 0] = 0.995  # second best of all
    assert retrieval.evaluate(scores, labels, gallery).tar == 100.0
    scores[0, 0] = 0.985  # two impostors are above
    found = retrieval.evaluate(scores, labels, gallery)
    assert (found.tar, found.rank1) == (0.0, 0.0) and found.auc == pytest.approx(98.0)


def test_perfect_and_useless_scores() -> None:
    labels, gallery = torch.arange(8) % 4, torch.arange(4)
    same = (labels[:, None] == gallery).float()
    found = retrieval.evaluate(same, labels, gallery)
    assert (found.rank1, found.tar, found.auc) == (100.0, 100.0, 100.0)
    assert set(found.roc) == {100.0}
    found = retrieval.evaluate(-same, labels, gallery)
    assert (found.rank1, found.tar, found.auc) == (0.0, 0.0, 0.0)
    found = retrieval.evaluate(torch.zeros(8, 4), labels, gallery)
    # All scores equal: no threshold accepts some pairs only, the first entry is everybody's best.
    assert (found.rank1, found.tar, found.auc) == (25.0, 0.0, 50.0)
    assert set(found.roc[:-1]) == {0.0} and found.roc[-1] == 100.0


def test_differences_below_single_precision_count() -> None:
    labels, gallery = torch.tensor([0, 1]), torch.tensor([0, 1])
    scores = torch.ones(2, 2, dtype=torch.float64) + 1e-12 * torch.eye(2, dtype=torch.float64)
    found = retrieval.evaluate(scores, labels, gallery)
    assert (found.rank1, found.tar, found.auc) == (100.0, 100.0, 100.0)


def test_mistakes() -> None:
    labels = torch.arange(3)
    for value in (torch.nan, torch.inf):
        scores = torch.eye(3)
        scores[1, 2] = value
        with pytest.raises(ValueError, match=r"retrieval: scores are not finite"):
            retrieval.evaluate(scores, labels, labels)
    for own in (labels * 0, labels + 3):
        with pytest.raises(ValueError, match=r"genuine and impostor pairs are needed"):
            retrieval.evaluate(torch.eye(3), labels * 0, own)
