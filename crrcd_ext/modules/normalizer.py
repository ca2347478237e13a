"""The normaliser Zbar of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crrcd_ext.modules.cosines import Cosines

MAX_NEGATIVES = 16384
"""Zbar is a mean: more candidates than this would cost time and change nothing."""
FOLLOWED_NEGATIVES = 1024
"""The same for a moving average, which has some of every batch."""
_CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def log_mean_exp_logit(cosines: Cosines, scale: Tensor | float, limit: int) -> Tensor:
    """log Zbar = log mean exp(<u, v>/tau) over kept pairs and their candidates, scale = 1/tau.

    Candidates are the positive and the kept negatives, so that this is CRD's constant Z = N Zbar,
    in log space. Of more than ``limit`` negatives some, evenly spaced, stand for all; they are
    taken in pieces of 16 MB. Returns float32, or float64 when the cosines are; NaN when no negative
    is kept, since the positives alone are no measure of the candidates.
    """
    dtype = cosines.positive.dtype
    if isinstance(scale, Tensor):
        scale = scale.to(dtype)
    logit = (scale * cosines.positive).masked_fill(~cosines.pairs, -torch.inf)
    total, pairs = logit.flatten().logsumexp(0), cosines.pairs.sum()
    positions, kept = cosines.positions(limit), torch.zeros_like(pairs)
    each = cosines.index.shape[-1] / max(1, len(positions))
    size = max(1, _CHUNK_ELEMENTS // max(1, cosines.width))
    for piece in positions.split(size):
        cosine, keep = cosines.negative(piece)
        logit = (scale * cosine).masked_fill(~keep, -torch.inf)
        total = torch.logaddexp(total, logit.flatten().logsumexp(0) + math.log(each))
        kept = kept + keep.sum()
    count = pairs + each * kept.to(torch.float64)
    return (total - count.to(dtype).log()).masked_fill(kept == 0, torch.nan)
