"""difference_nce: directions and their gradients, the passes, the mean. See functional."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crrcd_ext._schema import wide_dtype
from crrcd_ext.reference import TINY, kept_pairs
from crrcd_ext.triton import bank_rows, critic, launch
from crrcd_ext.triton.own_keys import OwnKeys
from crrcd_ext.triton.passes import DIFFERENCE, Masks, Passes

QUERY, POSITIVE, ANCHOR, BANK, SCALE, OFFSET = (1 << n for n in range(6))


@dataclass
class Directions:
    """unit(x_b - anchor_a + eps) of rows [B, D] and anchors [A, D], in the wide dtype."""

    unit: Tensor  # [A, B, D], 0 where the difference vanishes
    inverse_norm: Tensor  # [A, B, 1]
    alive: Tensor  # bool [A, B]; what is not a number counts, so that it shows in the loss

    def backward(self, d_unit: Tensor) -> Tensor:
        """[A, B, D] gradient of the differences."""
        along = (d_unit * self.unit).sum(-1, keepdim=True)
        return torch.addcmul(d_unit, self.unit, along, value=-1).mul_(self.inverse_norm)


def directions(rows: Tensor, anchor: Tensor, eps: float) -> Directions:
    wide = wide_dtype(rows.dtype)
    difference = rows.to(wide) - anchor.to(wide)[:, None] + eps
    square = difference.square().sum(-1, keepdim=True)
    vanishing = square <= TINY
    inverse_norm = square.masked_fill(vanishing, 1).rsqrt().masked_fill(vanishing, 0)
    return Directions(difference * inverse_norm, inverse_norm, ~vanishing.squeeze(-1))


def difference_nce(*arguments) -> tuple[Tensor, ...]:
    """``crrcd_triton::difference_nce``."""
    return difference_nce_(*arguments)


def difference_nce_(
    query: Tensor,
    positive: Tensor,
    anchor: Tensor,
    bank: Tensor,
    scale: Tensor,
    offset: Tensor,
    index: Tensor | None,
    anchor_id: Tensor | None,
    query_id: Tensor | None,
    key_id: Tensor | None,
    query_label: Tensor | None,
    key_label: Tensor | None,
    excluded: Tensor | None,
    self_pairs: bool,
    eps: float,
    objective: str,
    weights: Tensor | None,
    reduction: str,
    need: int,
    *update,
) -> tuple[Tensor, ...]:
    """``crrcd_triton::difference_nce_``, and without ``update`` the operator that changes
    nothing."""
    bank_rows.check("difference_nce", "index", index, bank)
    if update:
        bank_rows.check("difference_nce", "update index", update[0], bank)
    inputs = (query, positive, anchor, bank, scale, offset)
    scale, offset = (critic.number(x, query.device) for x in (scale, offset))
    wide = wide_dtype(query.dtype)
    u, v = directions(query, anchor, eps), directions(positive, anchor, eps)
    pairs = kept_pairs(anchor, u.unit, anchor_id, query_id, self_pairs)
    pairs = pairs & u.alive & v.alive
    weights = critic.weights_of(weights, reduction, query, len(query))
    options = {
        "types": launch.precision(query.dtype),
        "anchor": anchor.contiguous(),
        "bank": bank,
        "scale": scale,
        "offset": offset,
        "masks": Masks(pairs, anchor_id, query_id, key_id, query_label, key_label, excluded),
        "eps": eps,
        "wants_query": bool(need & (QUERY | ANCHOR)),
        "wants_critic": bool(need & (SCALE | OFFSET)),
        "wants_keys": bool(need & BANK),
        "wants_anchor": bool(need & ANCHOR),
    }
    if index is not None and index.dim() == 2:
        passes = OwnKeys(query=u.unit, index=index, weights=weights, **options)
    else:
        index = index if index is None else index.contiguous()
        directed = u.unit.to(query.dtype).contiguous()
        of_pairs = weights if weights is None else weights.expand(pairs.shape).contiguous()
        passes = Passes(DIFFERENCE, query=directed, index=index, weights=of_pairs, **options)
    cosine = (u.unit * v.unit).sum(-1)
    gradients = bool(need & ~POSITIVE)
    loss, slope, mean = critic.contrast(
        objective, passes, cosine, scale, offset, pairs, gradients, weights, reduction
    )
    if loss.dim() == 2:  # of a query, as its gradient is one for all anchors
        loss = loss.sum(0)
    by_cosine = (slope * scale.to(wide))[..., None]
    d_query = d_positive = d_anchor = None
    if need & (QUERY | ANCHOR):
        d_query = u.backward(torch.addcmul(passes.d_query, by_cosine, v.unit))
    if need & (POSITIVE | ANCHOR):
        d_positive = v.backward(by_cosine * u.unit)
    if need & ANCHOR:
        d_anchor = (passes.d_anchor - (d_query + d_positive).sum(1)) * mean
    found = (
        d_query.sum(0) * mean if need & QUERY else None,
        d_positive.sum(0) * mean if need & POSITIVE else None,
        d_anchor,
        passes.d_bank * mean if need & BANK else None,
        (passes.d_scale + (slope * cosine).sum()) * mean if need & SCALE else None,
        (passes.d_offset - slope.sum()) * mean if need & OFFSET else None,
    )
    result = critic.results(query, loss, need, inputs, found)
    critic.update(bank, update)
    return result
