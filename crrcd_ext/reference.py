"""The operators in plain PyTorch, as they stand on paper: the truth of the tests, on any device.

    v(a, x)  = unit(W relu(P_a - X_x) + c)            P [A, H], X [M, H], W [R, H], c [R]
    s_abn    = scale <query_ab, v(P_a, X_n)> - offset
    s+_ab    = scale <query_ab, positive_ab> - offset
    nce      : l_ab = softplus(-s+_ab) + sum_n keep_bn softplus(s_abn)
    infonce  : l_ab = log(exp s+_ab + sum_n keep_bn exp s_abn) - s+_ab
    loss     = sum of w_b l_ab over the kept pairs / their number            w_b = 1 by default

difference_nce: v(a, x) = unit(x - a + eps) of embeddings a, x, for query, positive and negatives.
instance_nce: the embeddings themselves, and no anchors.

Operands share one dtype. With bfloat16 and float16 the products are rounded to it, as PyTorch does,
while differences, norms, logits and sums are float32. Everything is materialised.

Comparisons are written so that NaN passes them: what is not finite shows in the results.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from crrcd_ext._schema import wide_dtype, words_of

TINY = 1e-24
"""Squared norm up to which a vector counts as vanishing."""
PIECE = 1 << 20
"""Numbers that similar_mask makes of rows, or of products, at a time."""


def unit(w: Tensor) -> Tensor:
    """w / |w| along the last dimension; zero, with zero gradient, where |w|^2 <= 1e-24; NaN where w
    is not finite."""
    wide = w.to(wide_dtype(w.dtype))
    square = wide.square().sum(-1, keepdim=True)
    alive = ~(square <= TINY)
    # The inner where keeps the infinite slope of 1/|w| at 0 out of the gradient.
    return (wide * torch.where(alive, torch.where(alive, square, 1).rsqrt(), 0)).to(w.dtype)


def nan_for_infinity(x: Tensor) -> Tensor:
    """x, with NaN for its infinities: relu, which keeps that, might cut them to 0."""
    return x + 0 * x  # not torch.add with alpha=0, which Inductor takes for x + x


def relation(anchor: Tensor, sample: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """v(P_a, X_m) for all pairs: [A, H], [M, H] -> [A, M, R]."""
    anchor, sample = nan_for_infinity(anchor), nan_for_infinity(sample)
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
    queries: int,
    row: Tensor,
    query_id,
    key_id,
    query_label,
    key_label,
    excluded,
    position: Tensor | None = None,
) -> Tensor:
    """bool [B, K]: False where the bank row ``row[n]`` is the query's own, or of its class, and
    where ``excluded`` has the bit of ``position[n]``, the negative's place among all (None: n).

    ``row`` is [K], or [B, K] where each query has negatives of its own.
    """
    keep = torch.ones(queries, row.shape[-1], dtype=torch.bool, device=row.device)
    if query_id is not None:
        keep = keep & (query_id[:, None] != key_ids(row, key_id))
    if query_label is not None:
        keep = keep & (query_label[:, None] != key_label[row])
    if excluded is not None:
        if position is None:
            position = torch.arange(row.shape[-1], device=row.device)
        keep = keep & ~bits_at(excluded, position)
    return keep


def key_ids(position: Tensor, key_id) -> Tensor:
    """Ids of the bank rows ``position``: those in ``key_id`` [N], or the positions themselves."""
    return position if key_id is None else key_id[position]


def directions(x: Tensor, anchor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """unit(x - anchor_a + eps) and whether it has a direction: x [..., M, D] and anchor [A, D] give
    [A, ..., M, D] and bool [A, ..., M]; NaN is taken for one, so that it shows."""
    wide = wide_dtype(x.dtype)
    seen_from = anchor.to(wide)[(slice(None), *[None] * (x.dim() - 1))]
    difference = x.to(wide) - seen_from + eps
    return unit(difference).to(x.dtype), ~(difference.square().sum(-1) <= TINY)


def read_rows(bank: Tensor, position: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the bank, [K, D] or [B, K, D]; where each query has its own, zeros for those that are
    no negatives: 0 times what they hold, in a gradient, might be NaN."""
    rows = bank[position].to(dtype)
    return rows if position.dim() == 1 else rows.masked_fill(~keep[..., None], 0)


def products(query: Tensor, rows: Tensor, shared: bool) -> Tensor:
    """<query_b, row_n>: [..., B, D] with [..., K, D], or [..., B, K, D] when not shared."""
    return query @ rows.mT if shared else torch.einsum("...bd,...bkd->...bk", query, rows)


def contrast(
    s: Tensor,
    s_positive: Tensor,
    keep: Tensor,
    pairs: Tensor,
    objective: str,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    """The loss from logits [..., K] and [...], what is a negative and which pairs count.

    ``weights`` [B] or as ``pairs``; "none" has the pairs' losses, 0 for those that do not count.
    """
    if objective == "nce":
        loss = (-logsigmoid(-s)).masked_fill(~keep, 0).sum(-1) - logsigmoid(s_positive)
    else:
        logits = torch.cat([s_positive[..., None], s.masked_fill(~keep, -torch.inf)], -1)
        loss = logits.logsumexp(-1) - s_positive
    loss = loss.masked_fill(~pairs, 0)
    if weights is not None:
        loss = loss * weights
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / pairs.sum().clamp(min=1)


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
    excluded: Tensor | None = None,
    self_pairs: bool = False,
    objective: str = "nce",
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of crrcd_ext.functional.relation_nce, differentiable by autograd in every tensor."""
    wide = wide_dtype(query.dtype)
    position = torch.arange(len(bank), device=bank.device) if index is None else index
    rows = (bank if index is None else bank[index]).to(query.dtype)
    sample = rows if key_weight is None else linear(rows, key_weight)
    negative = relation(anchor, sample, weight, bias)
    s = scale * torch.einsum("abr,anr->abn", query, negative).to(wide) - offset
    s_positive = scale * torch.einsum("abr,abr->ab", query, positive).to(wide) - offset

    keep = kept_negatives(
        query.shape[1], position, query_id, key_id, query_label, key_label, excluded
    )
    pairs = kept_pairs(anchor, query, anchor_id, query_id, self_pairs)
    return contrast(s, s_positive, keep, pairs, objective, weights, reduction)


def difference_nce(
    query: Tensor,
    positive: Tensor,
    anchor: Tensor,
    bank: Tensor,
    scale: Tensor | float,
    offset: Tensor | float,
    index: Tensor | None = None,
    anchor_id: Tensor | None = None,
    query_id: Tensor | None = None,
    key_id: Tensor | None = None,
    query_label: Tensor | None = None,
    key_label: Tensor | None = None,
    excluded: Tensor | None = None,
    self_pairs: bool = False,
    eps: float = 0.0,
    objective: str = "nce",
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of crrcd_ext.functional.difference_nce, differentiable in every tensor."""
    wide = wide_dtype(query.dtype)
    position = torch.arange(len(bank), device=bank.device) if index is None else index
    shared = position.dim() == 1
    keep = kept_negatives(len(query), position, query_id, key_id, query_label, key_label, excluded)
    rows = read_rows(bank, position, keep, query.dtype)
    u, alive_u = directions(query, anchor, eps)  # [A, B, D]
    v, alive_v = directions(positive, anchor, eps)
    w, alive_w = directions(rows, anchor, eps)  # [A, K, D] or [A, B, K, D]
    s = scale * products(u, w, shared).to(wide) - offset
    s_positive = scale * (u * v).sum(-1).to(wide) - offset

    keep = keep & (alive_w[:, None] if shared else alive_w)
    if anchor_id is not None:
        keep = keep & (anchor_id[:, None, None] != key_ids(position, key_id))
    # kept_pairs looks at the first two sizes of a query seen from anchors.
    pairs = kept_pairs(anchor, u, anchor_id, query_id, self_pairs) & alive_u & alive_v
    loss = contrast(s, s_positive, keep, pairs, objective, weights, reduction)
    return loss.sum(0) if reduction == "none" else loss


def instance_nce(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    scale: Tensor | float,
    offset: Tensor | float,
    index: Tensor | None = None,
    query_id: Tensor | None = None,
    key_id: Tensor | None = None,
    query_label: Tensor | None = None,
    key_label: Tensor | None = None,
    excluded: Tensor | None = None,
    objective: str = "nce",
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of crrcd_ext.functional.instance_nce, differentiable in every tensor."""
    wide = wide_dtype(query.dtype)
    position = torch.arange(len(bank), device=bank.device) if index is None else index
    keep = kept_negatives(len(query), position, query_id, key_id, query_label, key_label, excluded)
    rows = read_rows(bank, position, keep, query.dtype)
    s = scale * products(query, rows, position.dim() == 1).to(wide) - offset
    s_positive = scale * (query * positive).sum(-1).to(wide) - offset
    pairs = torch.ones(len(query), dtype=torch.bool, device=query.device)
    return contrast(s, s_positive, keep, pairs, objective, weights, reduction)


def pack_bits(mask: Tensor) -> Tensor:
    """int32 [B, ceil(M / 32)] of bool [B, M]: bit j % 32 of word j // 32 is entry j."""
    queries, count = mask.shape
    words = words_of(count)
    spread = mask.new_zeros((queries, 32 * words))
    spread[:, :count] = mask
    bit = torch.arange(32, device=mask.device)
    # In int64, as 2^31 is no int32: there it is the sign.
    return (spread.view(queries, words, 32).long() << bit).sum(-1).to(torch.int32)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """bool [B, count] of int32 [B, ceil(count / 32)]; bits beyond ``count`` are left out."""
    return bits_at(bits, torch.arange(count, device=bits.device))


def bits_at(bits: Tensor, position: Tensor) -> Tensor:
    """bool [B, k]: the bits at int64 ``position`` [k]."""
    return (bits[:, position // 32] >> position % 32 & 1).bool()


def similar_mask(query: Tensor, bank: Tensor, index: Tensor | None, threshold: float) -> Tensor:
    """int32 [B, ceil(M / 32)], bits set where <query_b, row> > threshold, in pieces of the rows."""
    count = len(bank) if index is None else index.shape[-1]
    shared = index is None or index.dim() == 1
    width = max(query.shape) if shared else query.numel()
    piece = 32 * max(1, PIECE // (32 * max(1, width)))
    words = [query.new_zeros((len(query), 0), dtype=torch.int32)]
    for first in range(0, count, piece):
        chosen = slice(first, min(first + piece, count))
        rows = bank[chosen] if index is None else bank[index[..., chosen]]
        words.append(pack_bits(products(query, rows.to(query.dtype), shared) > threshold))
    return torch.cat(words, 1)


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
    row = (1 - momentum) * value[last[index]].to(wide)
    if momentum > 0:  # 0 times an infinity that the row holds would be NaN
        row = row + momentum * bank[index].to(wide)
    bank[index] = (unit(row) if normalize else row).to(bank.dtype)
