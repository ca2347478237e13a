"""The operators in plain PyTorch, as they stand on paper: the truth of the tests, on any device.

    v(a, x)  = unit(W relu(P_a - X_x) + c)            P [A, H], X [M, H], W [R, H], c [R]
    s_abn    = scale <query_ab, v(P_a, X_n)> - offset
    s+_ab    = scale <query_ab, positive_ab> - offset
    nce      : l_ab = softplus(-s+_ab) + sum_n keep_bn softplus(s_abn)
    infonce  : l_ab = log(exp s+_ab + sum_n keep_bn exp s_abn) - s+_ab
    loss     = mean of l_ab over the kept pairs

Operands share one dtype. With bfloat16 and float16 the products are rounded to it, as PyTorch does,
while norms, logits and sums are float32. All of [A, B, K] and [A, K, R] is materialised.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from crrcd_ext._schema import wide_dtype

TINY = 1e-24
"""Squared norm up to which a vector counts as vanishing."""


def unit(w: Tensor) -> Tensor:
    """w / |w| along the last dimension; zero, with zero gradient, where |w|^2 <= 1e-24."""
    wide = w.to(wide_dtype(w.dtype))
    square = wide.square().sum(-1, keepdim=True)
    alive = square > TINY
    # The inner where keeps the infinite slope of 1/|w| at 0 out of the gradient.
    return (wide * torch.where(alive, torch.where(alive, square, 1).rsqrt(), 0)).to(w.dtype)


def relation(anchor: Tensor, sample: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """v(P_a, X_m) for all pairs: [A, H], [M, H] -> [A, M, R]."""
    return unit(linear(torch.relu(anchor[:, None] - sample[None]), weight, bias))


def kept_pairs(anchor: Tensor, query: Tensor, anchor_id, query_id, self_pairs: bool) -> Tensor:
    """bool [A, B]: False for self pairs, by their ids, or without ids the diagonal when A == B."""
    anchors, queries = query.shape[:2]
    if not self_pairs and anchor_id is not None and query_id is not None:
        return anchor_id[:, None] != query_id[None]
    if not self_pairs and anchor_id is None and query_id is None and anchors == queries:
        return ~torch.eye(anchors, dtype=torch.bool, device=query.device)
    return torch.ones(anchors, queries, dtype=torch.bool, device=query.device)


def kept_negatives(
    query: Tensor, position: Tensor, query_id, key_id, query_label, key_label
) -> Tensor:
    """bool [B, K]: False where the bank row ``position[n]`` is the query's own, or of its class."""
    keep = torch.ones(query.shape[1], len(position), dtype=torch.bool, device=query.device)
    if query_id is not None:
        keep = keep & (query_id[:, None] != (position if key_id is None else key_id[position]))
    if query_label is not None:
        keep = keep & (query_label[:, None] != key_label[position])
    return keep


def relation_nce(
    query: Tensor,
    positive: Tensor,
    anchor: Tensor,
    bank: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | float,
    offset: Tensor | float,
    index: Tensor | None = None,
    key_weight: Tensor | None = None,
    anchor_id: Tensor | None = None,
    query_id: Tensor | None = None,
    key_id: Tensor | None = None,
    query_label: Tensor | None = None,
    key_label: Tensor | None = None,
    self_pairs: bool = False,
    objective: str = "nce",
) -> Tensor:
    """The loss of crrcd_ext.functional.relation_nce, differentiable by autograd in every tensor."""
    wide = wide_dtype(query.dtype)
    position = torch.arange(len(bank), device=bank.device) if index is None else index
    rows = (bank if index is None else bank[index]).to(query.dtype)
    sample = rows if key_weight is None else linear(rows, key_weight)
    negative = relation(anchor, sample, weight, bias)
    s = scale * torch.einsum("abr,anr->abn", query, negative).to(wide) - offset
    s_positive = scale * torch.einsum("abr,abr->ab", query, positive).to(wide) - offset

    drop = ~kept_negatives(query, position, query_id, key_id, query_label, key_label)
    if objective == "nce":
        loss = (-logsigmoid(-s)).masked_fill(drop, 0).sum(-1) - logsigmoid(s_positive)
    else:
        logits = torch.cat([s_positive[..., None], s.masked_fill(drop, -torch.inf)], -1)
        loss = logits.logsumexp(-1) - s_positive
    pairs = kept_pairs(anchor, query, anchor_id, query_id, self_pairs)
    return loss.masked_fill(~pairs, 0).sum() / pairs.sum().clamp(min=1)


def bank_update_(
    bank: Tensor, index: Tensor, value: Tensor, momentum: float, normalize: bool = True
) -> None:
    """m <- unit(momentum m + (1 - momentum) value), m = bank[index]; the last of equal ids wins."""
    order = torch.arange(len(index), device=index.device)
    # Every duplicate writes the winner's row, so that the order of the writes does not matter.
    last = torch.zeros(len(bank), dtype=torch.int64, device=bank.device).scatter_reduce(
        0, index, order, "amax"
    )
    wide = wide_dtype(torch.promote_types(bank.dtype, value.dtype))
    row = momentum * bank[index].to(wide) + (1 - momentum) * value[last[index]].to(wide)
    bank[index] = (unit(row) if normalize else row).to(bank.dtype)
