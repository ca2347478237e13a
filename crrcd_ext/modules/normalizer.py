"""The normaliser Zbar of the first batch."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext.modules.cosines import Cosines

MAX_NEGATIVES = 16384
"""Zbar is a mean: more candidates than this would cost time and change nothing."""
_CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def log_mean_exp_logit(cosines: Cosines, scale: Tensor | float) -> Tensor:
    """log Zbar = log mean exp(<u, v>/tau) over kept pairs and their candidates, scale = 1/tau.

    Candidates are the positive and the kept negatives, so that this is CRD's constant Z = N Zbar,
    in log space. At most 16,384 rows, evenly spaced, enter as negatives; they are taken in pieces
    of 16 MB. Returns float32, or float64 when the cosines are; NaN when no negative is kept, since
    the positives alone are no measure of the candidates.
    """
    dtype = cosines.positive.dtype
    if isinstance(scale, Tensor):
        scale = scale.to(dtype)
    logit = (scale * cosines.positive).masked_fill(~cosines.pairs, -torch.inf)
    total = logit.flatten().logsumexp(0)
    pairs = count = cosines.pairs.sum()
    size = max(1, _CHUNK_ELEMENTS // max(1, cosines.width))
    for piece in cosines.positions(MAX_NEGATIVES).split(size):
        cosine, keep = cosines.negative(piece)
        logit = (scale * cosine).masked_fill(~keep, -torch.inf)
        total = torch.logaddexp(total, logit.flatten().logsumexp(0))
        count = count + keep.sum()
    return (total - count.to(dtype).log()).masked_fill(count == pairs, torch.nan)
