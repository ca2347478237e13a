"""relation_nce: needs, the passes, the positives, the mean. See functional.relation_nce."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext._schema import wide_dtype
from crrcd_ext.reference import kept_pairs, nan_for_infinity
from crrcd_ext.triton import bank_rows, critic, launch
from crrcd_ext.triton.passes import DIRECT, GRAM, Masks, Passes

QUERY, POSITIVE, ANCHOR, BANK, KEY_WEIGHT, WEIGHT, BIAS, SCALE, OFFSET = (1 << n for n in range(9))
FEWEST = 6
"""With fewer rows or columns of W most norms cancel, which rounded products of W would show; the
same number as in csrc/relation_arguments.h."""
LIVE = ANCHOR | BANK | KEY_WEIGHT | WEIGHT | BIAS


def relation_nce(*arguments) -> tuple[Tensor, ...]:
    """``crrcd_triton::relation_nce``."""
    return relation_nce_(*arguments)


def relation_nce_(
    query: Tensor,
    positive: Tensor,
    anchor: Tensor,
    bank: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    offset: Tensor,
    index: Tensor | None,
    key_weight: Tensor | None,
    anchor_id: Tensor | None,
    query_id: Tensor | None,
    key_id: Tensor | None,
    query_label: Tensor | None,
    key_label: Tensor | None,
    excluded: Tensor | None,
    self_pairs: bool,
    objective: str,
    weights: Tensor | None,
    reduction: str,
    need: int,
    *update,
) -> tuple[Tensor, ...]:
    """``crrcd_triton::relation_nce_``, and without ``update`` the operator that changes nothing."""
    bank_rows.check("relation_nce", "index", index, bank)
    if update:
        bank_rows.check("relation_nce", "update index", update[0], bank)
    inputs = (query, positive, anchor, bank, key_weight, weight, bias, scale, offset)
    scale, offset = (critic.number(x, query.device) for x in (scale, offset))
    wide = wide_dtype(query.dtype)
    types = launch.precision(query.dtype)
    relation_dim, hidden_dim = weight.shape
    # W annihilates most of the hidden units, and W'W rounded to two bytes does not.
    annihilates = query.dtype.itemsize == 2 and 8 * relation_dim < hidden_dim
    narrow = min(relation_dim, hidden_dim) < FEWEST
    if need & LIVE and types.tensor_cores and (annihilates or narrow):
        # Relations as they stand, at full precision, take fewer products here.
        operands = (query, positive, anchor, weight, bias, key_weight)
        query, positive, anchor, weight, bias, key_weight = (
            None if x is None else x.to(wide) for x in operands
        )
        types = launch.Precision(wide, "ieee")
    pairs = kept_pairs(anchor, query, anchor_id, query_id, self_pairs)
    weights = critic.weights_of(weights, reduction, query, *pairs.shape)
    form = GRAM if need & LIVE and types.tensor_cores else DIRECT
    # Relations do not know how long W is; in float16 its products must not leave the range.
    unit = 1.0
    if form == GRAM and query.dtype == torch.float16:
        length = weight.to(wide).norm(dim=0).amax().clamp(min=1e-30)
        unit = torch.exp2(-torch.log2(length).round())
        weight, bias = (x if x is None else (x.to(wide) * unit).to(x.dtype) for x in (weight, bias))
    passes = Passes(
        form,
        types,
        query.contiguous(),
        nan_for_infinity(anchor).contiguous(),
        bank,
        _contiguous(index),
        scale,
        offset,
        Masks(pairs, anchor_id, query_id, key_id, query_label, key_label, excluded),
        weights,
        weight=weight.contiguous(),
        bias=_contiguous(bias),
        key_weight=_contiguous(key_weight),
        wants_query=bool(need & QUERY or (form == GRAM and need & (WEIGHT | BIAS))),
        wants_critic=bool(need & (SCALE | OFFSET)),
        wants_keys=bool(need & (BANK | KEY_WEIGHT)),
        wants_anchor=bool(need & ANCHOR),
        wants_weight=bool(need & (WEIGHT | BIAS)),
    )
    q, p = query.to(wide), positive.to(wide)
    cosine = (q * p).sum(-1)
    gradients = bool(need & ~POSITIVE)
    loss, slope, mean = critic.contrast(
        objective, passes, cosine, scale, offset, pairs, gradients, weights, reduction
    )
    loss = loss + passes.nan_of_infinity()
    by_cosine = slope * scale.to(wide)

    def averaged(gradient: Tensor | None, positives: Tensor | float = 0.0):
        return None if gradient is None else (gradient + positives) * mean

    found = (
        averaged(passes.d_query, by_cosine[..., None] * p) if need & QUERY else None,
        by_cosine[..., None] * q * mean if need & POSITIVE else None,
        averaged(passes.d_anchor),
        averaged(passes.d_bank),
        averaged(passes.d_key_weight),
        averaged(passes.d_weight) * unit if need & WEIGHT else None,
        averaged(passes.d_bias) * unit if need & BIAS else None,
        averaged(passes.d_scale, (slope * cosine).sum()) if need & SCALE else None,
        averaged(passes.d_offset, -slope.sum()) if need & OFFSET else None,
    )
    result = critic.results(inputs[0], loss, need, inputs, found)
    critic.update(bank, update)
    return result


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
