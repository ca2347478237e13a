"""Chi-square tests with fixed seeds."""

from __future__ import annotations

import math

import torch


def chi_square_is_plausible(counts: torch.Tensor, spread: float = 1.0) -> bool:
    """Within 4.5 standard deviations of what equal probabilities give, on either side.

    ``spread`` scales the variance of a count: less than 1 for draws without replacement.
    """
    expected = counts.sum() / counts.numel()
    statistic = float(((counts - expected) ** 2 / expected).sum()) / spread
    degrees = counts.numel() - 1
    return abs(statistic - degrees) < 4.5 * math.sqrt(2 * degrees)
