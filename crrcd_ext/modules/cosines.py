"""Cosines of positives and negatives outside of the operators: for the normaliser, and to look at.

A function for each operator takes the operator's tensors by their names there. What comes back is
at least float32; negatives are made when they are asked for, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from crrcd_ext import functional, reference


class Cosines(NamedTuple):
    """``positive`` and ``pairs``, [A, B] or [B]: cosines, and which of them count; ``index``, int64
    [K] or [B, K], the rows of the negatives; ``width``, the elements that one more of them takes;
    ``negative(positions)``, for int64 [k], columns of ``index``: cosines and which of them count,
    [..., B, k]."""

    positive: Tensor
    pairs: Tensor
    index: Tensor
    width: int
    negative: Callable[[Tensor], tuple[Tensor, Tensor]]

    def positions(self, limit: int) -> Tensor:
        """Of at most ``limit`` of the negatives, evenly spaced."""
        count = self.index.shape[-1]
        if self.index.dim() == 2:
            limit = max(1, limit // max(1, len(self.index)))
        return torch.arange(0, count, max(1, -(-count // limit)), device=self.index.device)


def of_relation(
    query,
    positive,
    anchor,
    bank,
    weight,
    bias,
    index=None,
    key_weight=None,
    anchor_id=None,
    query_id=None,
    key_id=None,
    query_label=None,
    key_label=None,
    excluded=None,
    self_pairs=False,
    backend=None,
) -> Cosines:
    """For :func:`crrcd_ext.functional.relation_nce`."""
    query, positive, anchor, weight, bias, key_weight = _wide(
        query, positive, anchor, weight, bias, key_weight
    )
    pairs = reference.kept_pairs(anchor, query, anchor_id, query_id, self_pairs)
    index = _rows(bank, index)
    masks = (query_id, key_id, query_label, key_label, excluded)

    def negative(positions):
        rows = index[positions]
        sample = bank[rows].to(query.dtype)
        if key_weight is not None:
            sample = torch.nn.functional.linear(sample, key_weight)
        relation = functional.relation(anchor, sample, weight, bias, backend=backend)
        keep = reference.kept_negatives(query.shape[1], rows, *masks, positions)
        return query @ relation.mT, pairs[:, :, None] & keep

    width = query.shape[0] * query.shape[2]
    return Cosines((query * positive).sum(-1), pairs, index, width, negative)


def of_difference(
    query,
    positive,
    anchor,
    bank,
    index=None,
    anchor_id=None,
    query_id=None,
    key_id=None,
    query_label=None,
    key_label=None,
    excluded=None,
    self_pairs=False,
    backend=None,
) -> Cosines:
    """For :func:`crrcd_ext.functional.difference_nce`."""
    query, positive, anchor = _wide(query, positive, anchor)
    index = _rows(bank, index)
    shared = index.dim() == 1
    masks = (query_id, key_id, query_label, key_label, excluded)
    (u, alive_u), (v, alive_v) = (reference.directions(x, anchor, 0.0) for x in (query, positive))
    pairs = reference.kept_pairs(anchor, u, anchor_id, query_id, self_pairs) & alive_u & alive_v

    def negative(positions):
        rows = index[..., positions]
        w, alive = reference.directions(bank[rows].to(query.dtype), anchor, 0.0)
        keep = reference.kept_negatives(len(query), rows, *masks, positions)
        keep = keep & pairs[:, :, None] & (alive[:, None] if shared else alive)
        if anchor_id is not None:
            keep = keep & (anchor_id[:, None, None] != reference.key_ids(rows, key_id))
        return reference.products(u, w, shared), keep

    width = anchor.numel() * (1 if shared else len(query))
    return Cosines((u * v).sum(-1), pairs, index, width, negative)


def of_instance(
    query,
    positive,
    bank,
    index=None,
    query_id=None,
    key_id=None,
    query_label=None,
    key_label=None,
    excluded=None,
    backend=None,
) -> Cosines:
    """For :func:`crrcd_ext.functional.instance_nce`."""
    query, positive = _wide(query, positive)
    index = _rows(bank, index)
    shared = index.dim() == 1
    masks = (query_id, key_id, query_label, key_label, excluded)

    def negative(positions):
        rows = index[..., positions]
        keep = reference.kept_negatives(len(query), rows, *masks, positions)
        return reference.products(query, bank[rows].to(query.dtype), shared), keep

    width = max(query.shape) if shared else query.numel()
    pairs = torch.ones(len(query), dtype=torch.bool, device=query.device)
    return Cosines((query * positive).sum(-1), pairs, index, width, negative)


def _wide(first: Tensor, *others: Tensor | None) -> tuple:
    dtype = torch.promote_types(first.dtype, torch.float32)
    return tuple(x if x is None else x.to(dtype) for x in (first, *others))


def _rows(bank: Tensor, index: Tensor | None) -> Tensor:
    return torch.arange(len(bank), device=bank.device) if index is None else index
