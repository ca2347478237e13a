"""The normaliser Zbar of the first batch."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext import functional, reference

MAX_NEGATIVES = 16384
"""Zbar is a mean: more candidates than this would cost time and change nothing."""
_CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def log_mean_exp_logit(
    query: Tensor,
    positive: Tensor,
    anchor: Tensor,
    bank: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: Tensor | float,
    index: Tensor | None = None,
    key_weight: Tensor | None = None,
    anchor_id: Tensor | None = None,
    query_id: Tensor | None = None,
    key_id: Tensor | None = None,
    query_label: Tensor | None = None,
    key_label: Tensor | None = None,
    self_pairs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """log Zbar = log mean exp(<u, v>/tau) over kept pairs and their candidates.

    Candidates are the positive and the kept negatives, so that this is CRD's constant Z = N Zbar,
    in log space. Arguments as for :func:`crrcd_ext.functional.relation_nce`. At most 16,384
    negatives, evenly spaced, enter; they are related in pieces of 16 MB. Returns float32, or
    float64 when the operands are; -inf or NaN when no pair is kept.
    """
    device = query.device
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, positive, anchor = query.to(dtype), positive.to(dtype), anchor.to(dtype)
    weight, bias, key_weight = (x if x is None else x.to(dtype) for x in (weight, bias, key_weight))
    if isinstance(scale, Tensor):
        scale = scale.to(dtype)

    rows = torch.arange(len(bank), device=device) if index is None else index
    rows = rows[:: -(-len(rows) // MAX_NEGATIVES)] if len(rows) else rows
    with torch.autocast(device.type, enabled=False):
        dropped_pairs = ~reference.kept_pairs(anchor, query, anchor_id, query_id, self_pairs)
        logit = (scale * (query * positive).sum(-1)).masked_fill(dropped_pairs, -torch.inf)
        total = logit.flatten().logsumexp(0)
        count = (~dropped_pairs).sum()
        for piece in rows.split(max(1, _CHUNK_ELEMENTS // max(1, query.shape[0] * query.shape[2]))):
            sample = bank[piece].to(dtype)
            if key_weight is not None:
                sample = torch.nn.functional.linear(sample, key_weight)
            relation = functional.relation(anchor, sample, weight, bias, backend=backend)
            keep = reference.kept_negatives(
                query.shape[1], piece, query_id, key_id, query_label, key_label
            )
            drop = dropped_pairs[:, :, None] | ~keep
            logit = (scale * (query @ relation.mT)).masked_fill(drop, -torch.inf)
            total = torch.logaddexp(total, logit.flatten().logsumexp(0))
            count = count + (~drop).sum()
        return total - count.to(dtype).log()
