"""Embeddings against rows of the bank: keys for all queries alike, and keys of each query's own.

Names of sizes: B queries, K keys, D columns; BB, BN, BD are blocks of them, ND is the number of
blocks of columns. Logits are in units of log 2, derivatives those of the loss.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crrcd_ext.triton.kernels.features import binary, matrix, positions
from crrcd_ext.triton.kernels.tile import (
    INFONCE,
    LN2,
    NCE,
    NORMALISER,
    dot,
    grown,
    kept,
    log1p,
    narrow,
    power,
    sigmoid,
    softplus,
    softplus_of_each,
    weighted,
)


@triton.jit
def gathered(bank, stride, position, d, D, WHOLE: tl.constexpr, WIDE: tl.constexpr):
    """[n, d]: rows of the bank; WHOLE is for columns of which none lies outside."""
    at = bank + position[:, None] * stride + d[None, :]
    if WHOLE:
        return tl.load(at).to(WIDE)
    else:
        return tl.load(at, mask=(d < D)[None, :], other=0).to(WIDE)


@triton.jit
def without_masked(
    s,
    b,
    n,
    B,
    keys,
    entry,
    position,
    query_id,
    key_id,
    query_label,
    key_label,
    excluded,
    words,
    ID: tl.constexpr,
    NAMED: tl.constexpr,
    LABEL: tl.constexpr,
    EXCLUDED: tl.constexpr,
):
    """Logits s [n, b] with -inf for what is no negative."""
    keep = (n < keys)[:, None] & (b < B)[None, :]
    keep = kept(
        keep, b, B, entry, position, query_id, key_id, query_label, key_label,
        excluded, words, ID, NAMED, LABEL, EXCLUDED,
    )  # fmt: skip
    return tl.where(keep, s, -float("inf"))


@triton.jit
def logits(
    query,
    query_first,  # [b, d] of the block that ``rows`` are of
    bank,
    stride,
    position,
    rows,  # [n, d] where one block of columns is all there is
    factor,
    less,
    b,
    n,
    B,
    D,
    keys,
    entry,
    query_id,
    key_id,
    query_label,
    key_label,
    excluded,
    words,
    ID: tl.constexpr,
    NAMED: tl.constexpr,
    LABEL: tl.constexpr,
    EXCLUDED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    ND: tl.constexpr,
    BD: tl.constexpr,
):
    """Of keys for all queries alike: <query, row> and the logits, [n, b]."""
    cosine = tl.zeros([n.shape[0], b.shape[0]], WIDE)
    if ND == 1:
        cosine = dot(rows, tl.trans(query_first), cosine, PRECISION)
    else:
        for block in range(0, D, BD):
            d = block + tl.arange(0, BD)
            x = narrow(gathered(bank, stride, position, d, D, WHOLE, WIDE), DTYPE)
            cosine = dot(x, tl.trans(matrix(query, b, B, d, D)), cosine, PRECISION)
    s = without_masked(
        cosine * factor - less[None, :], b, n, B, keys, entry, position,
        query_id, key_id, query_label, key_label, excluded, words, ID, NAMED, LABEL, EXCLUDED,
    )  # fmt: skip
    return cosine, s


@triton.jit
def shared(
    query,  # [B, D]
    bank,
    stride,
    index,  # [K] rows of the bank
    scale,
    beta,  # [B] what logits are less; see passes.shifts
    weights,  # [B] of the queries' losses, with EACH
    query_id,
    key_id,
    query_label,
    key_label,
    excluded,
    words,
    part_sum,  # [slices, query blocks] sums of softplus, or [slices, B], of 2^(s - top) too
    part_top,  # [slices, B]
    part_query,  # [slices, B, D]
    part_scale,  # [slices, query blocks]
    part_offset,  # [slices, query blocks]
    B,
    D,
    keys,
    each,  # keys of a slice, fewer than 2^31
    MODE: tl.constexpr,
    EACH: tl.constexpr,
    QUERY: tl.constexpr,
    CRITIC: tl.constexpr,
    INDEXED: tl.constexpr,
    ID: tl.constexpr,
    NAMED: tl.constexpr,
    LABEL: tl.constexpr,
    EXCLUDED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    LIFT: tl.constexpr,
    MOST: tl.constexpr,
    WHOLE: tl.constexpr,
    ND: tl.constexpr,
    BD: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
):
    """A slice of the keys, a block of queries, and of columns for their gradient."""
    part = tl.program_id(0).to(tl.int64)
    column_blocks: tl.constexpr = ND if QUERY else 1
    query_block = tl.program_id(1) // column_blocks
    column_block = tl.program_id(1) % column_blocks
    b = query_block.to(tl.int64) * BB + tl.arange(0, BB)
    own_d = column_block * BD + tl.arange(0, BD)
    begin = part * each
    count = tl.minimum(keys - begin, each).to(tl.int32)
    factor = binary(scale, WIDE)
    less = tl.load(beta + b, mask=b < B, other=0)
    query_first = matrix(query, b, B, tl.arange(0, BD), D)

    d_query = tl.zeros([BB, BD], WIDE)
    d_scale = tl.zeros([BN], WIDE)
    d_offset = tl.zeros([BN], WIDE)
    loss = tl.zeros([BB if EACH else BN], WIDE)
    linear = tl.zeros([BB if EACH else BN], WIDE)
    top = tl.full([BN, BB], -float("inf"), WIDE)
    total = tl.zeros([BN, BB], WIDE)

    for several in range(0, count, MOST):
        product = tl.zeros([BN, BB if EACH else BB // 4], WIDE)
        for tile in range(several, tl.minimum(several + MOST, count), BN):
            n = tile + tl.arange(0, BN)
            position = positions(n, begin, count, index, INDEXED)
            rows = query_first
            if ND == 1:
                rows = narrow(gathered(bank, stride, position, own_d, D, WHOLE, WIDE), DTYPE)
            cosine, s = logits(
                query, query_first, bank, stride, position, rows, factor, less, b, n, B, D, count,
                begin + tile, query_id, key_id, query_label, key_label, excluded, words,
                ID, NAMED, LABEL, EXCLUDED,
                DTYPE, WIDE, PRECISION, WHOLE, ND, BD,
            )  # fmt: skip
            if MODE == NORMALISER:
                top, total = grown(s, top, total, FAST)
            else:
                if MODE == NCE:
                    if EACH:
                        slope, product, linear = softplus_of_each(s, product, linear, FAST)
                    else:
                        slope, product, linear = softplus(s, product, linear, FAST)
                else:
                    slope = power(s, FAST)
                if EACH:
                    slope = weighted(slope, weights, b, b < B)
                if CRITIC:
                    d_scale += tl.sum(slope * cosine, 1)
                    d_offset -= tl.sum(slope, 1)
                if QUERY:
                    if ND > 1:
                        rows = narrow(
                            gathered(bank, stride, position, own_d, D, WHOLE, WIDE), DTYPE
                        )
                    d_logit = narrow(slope * LIFT, DTYPE)
                    d_query = dot(tl.trans(d_logit), rows, d_query, PRECISION)
        if MODE == NCE:
            loss += tl.sum(log1p(product), 0 if EACH else 1)

    place = part * B + b
    if QUERY:
        cells = (b < B)[:, None] & (own_d < D)[None, :]
        d_query *= tl.load(scale).to(WIDE) / LIFT
        tl.store(part_query + place[:, None] * D + own_d[None, :], d_query, mask=cells)
    if MODE == NORMALISER:
        most = tl.max(top, 0)
        base = tl.where(most == -float("inf"), 0.0, most)
        total = tl.sum(total * power(top - base[None, :], FAST), 0)
        tl.store(part_sum + place, total, mask=b < B)
        tl.store(part_top + place, most, mask=b < B)
    if column_block == 0:
        cell = part * (tl.num_programs(1) // column_blocks) + query_block
        if MODE == NCE:
            if EACH:
                tl.store(part_sum + place, loss + linear * LN2, mask=b < B)
            else:
                tl.store(part_sum + cell, tl.sum(loss + linear * LN2, 0))
        if CRITIC:
            tl.store(part_scale + cell, tl.sum(d_scale, 0))
            tl.store(part_offset + cell, tl.sum(d_offset, 0))


@triton.jit
def shared_rows(
    query,
    bank,
    stride,
    index,
    scale,
    beta,
    weights,
    query_id,
    key_id,
    query_label,
    key_label,
    excluded,
    words,
    d_rows,  # [keys, D]
    B,
    D,
    first,
    keys,
    MODE: tl.constexpr,
    EACH: tl.constexpr,
    INDEXED: tl.constexpr,
    ID: tl.constexpr,
    NAMED: tl.constexpr,
    LABEL: tl.constexpr,
    EXCLUDED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    LIFT: tl.constexpr,
    WHOLE: tl.constexpr,
    ND: tl.constexpr,
    BD: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
):
    """A tile of a segment's keys meets all queries: a block of columns of the keys' gradient."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    entry = tl.program_id(0).to(tl.int64) * BN + first
    own_d = tl.program_id(1) * BD + tl.arange(0, BD)
    position = positions(n, first, keys, index, INDEXED)
    rows = tl.zeros([BN, BD], DTYPE)
    if ND == 1:
        rows = narrow(gathered(bank, stride, position, own_d, D, WHOLE, WIDE), DTYPE)
    factor = binary(scale, WIDE)
    d_row = tl.zeros([BN, BD], WIDE)
    for query_block in range(0, B, BB):
        b = query_block + tl.arange(0, BB).to(tl.int64)
        q = matrix(query, b, B, own_d, D)
        less = tl.load(beta + b, mask=b < B, other=0)
        _, s = logits(
            query, q, bank, stride, position, rows, factor, less, b, n, B, D, keys,
            entry, query_id, key_id, query_label, key_label, excluded, words,
            ID, NAMED, LABEL, EXCLUDED,
            DTYPE, WIDE, PRECISION, WHOLE, ND, BD,
        )  # fmt: skip
        if MODE == INFONCE:
            slope = power(s, FAST)
        else:
            slope, _ = sigmoid(s, FAST)
        if EACH:
            slope = weighted(slope, weights, b, b < B)
        d_row = dot(narrow(slope * LIFT, DTYPE), q, d_row, PRECISION)
    cells = (n < keys)[:, None] & (own_d < D)[None, :]
    d_row *= tl.load(scale).to(WIDE) / LIFT
    tl.store(d_rows + n.to(tl.int64)[:, None] * D + own_d[None, :], d_row, mask=cells)


@triton.jit
def own(
    query,  # [B, D]
    bank,
    stride,
    index,  # [B, K] rows of the bank
    index_stride,
    index_step,
    scale,
    beta,
    weights,
    query_id,
    key_id,
    query_label,
    key_label,
    excluded,
    words,
    part_sum,  # [slices, B] sums of softplus, or of 2^(s - top)
    part_top,  # [slices, B]
    part_query,  # [slices, B, D]
    part_scale,  # [slices, B]
    part_offset,  # [slices, B]
    slopes,  # [B, K] derivatives of the loss by the logits
    B,
    D,
    keys,
    each,
    MODE: tl.constexpr,
    EACH: tl.constexpr,
    QUERY: tl.constexpr,
    CRITIC: tl.constexpr,
    SLOPES: tl.constexpr,
    ID: tl.constexpr,
    NAMED: tl.constexpr,
    LABEL: tl.constexpr,
    EXCLUDED: tl.constexpr,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
    MOST: tl.constexpr,
    WHOLE: tl.constexpr,
    ND: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """One query, a slice of its keys. QUERY is for rows that are one block of columns."""
    part = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    begin = part * each
    count = tl.minimum(keys - begin, each).to(tl.int32)
    factor = binary(scale, WIDE)
    less = tl.load(beta + b)
    first_d = tl.arange(0, BD)
    query_first = matrix(query, b, B, first_d, D).to(WIDE)

    # Each place of a tile has sums of its own, which meet at the end.
    d_query = tl.zeros([BN, BD], WIDE)
    d_scale = tl.zeros([BN, 1], WIDE)
    d_offset = tl.zeros([BN, 1], WIDE)
    loss = tl.zeros([BN, 1], WIDE)
    linear = tl.zeros([BN, 1], WIDE)
    top = tl.full([BN, 1], -float("inf"), WIDE)
    total = tl.zeros([BN, 1], WIDE)

    for several in range(0, count, MOST):
        product = tl.zeros([BN, 1], WIDE)
        for tile in range(several, tl.minimum(several + MOST, count), BN):
            n = tile + tl.arange(0, BN)
            present = n < count
            at = index + b * index_stride + (begin + n) * index_step
            position = tl.load(at, mask=present, other=0)
            if ND == 1:
                rows = gathered(bank, stride, position, first_d, D, WHOLE, WIDE)
                logit = tl.sum(rows * query_first, 1)[:, None]
            else:
                logit = tl.zeros([BN, 1], WIDE)
                for block in range(0, D, BD):
                    d = block + first_d
                    x = gathered(bank, stride, position, d, D, WHOLE, WIDE)
                    logit += tl.sum(x * matrix(query, b, B, d, D).to(WIDE), 1)[:, None]
            s = without_masked(
                logit * factor - less[None, :], b, n, B, count, begin + tile, position,
                query_id, key_id, query_label, key_label, excluded, words,
                ID, NAMED, LABEL, EXCLUDED,
            )  # fmt: skip
            if MODE == NORMALISER:
                top, total = grown(s, top, total, FAST)
            else:
                if MODE == NCE:
                    slope, e = sigmoid(s, FAST)
                    product = product * e + (product + e)
                    linear += tl.maximum(s, 0.0)
                else:
                    slope = power(s, FAST)
                if EACH:
                    slope = weighted(slope, weights, b, b < B)
                if CRITIC:
                    d_scale += slope * logit
                    d_offset -= slope
                if QUERY:
                    d_query += slope * rows
                if SLOPES:
                    cells = slopes + b * keys + begin + n
                    tl.store(cells[:, None], slope, mask=present[:, None])
        if MODE == NCE:
            loss += log1p(product)

    place = part * B + b
    if QUERY:
        gradient = tl.sum(d_query, 0)[None, :] * tl.load(scale).to(WIDE)
        cells = (first_d < D)[None, :]
        tl.store(part_query + place[:, None] * D + first_d[None, :], gradient, mask=cells)
    if MODE == NORMALISER:
        most = tl.max(top, 0)
        base = tl.where(most == -float("inf"), 0.0, most)
        tl.store(part_sum + place, tl.sum(total * power(top - base[None, :], FAST), 0))
        tl.store(part_top + place, most)
    if MODE == NCE:
        tl.store(part_sum + place, tl.sum(loss + linear * LN2, 0))
    if CRITIC:
        tl.store(part_scale + place, tl.sum(d_scale, 0))
        tl.store(part_offset + place, tl.sum(d_offset, 0))


@triton.jit
def own_query(
    slopes,  # [B, K]
    bank,
    stride,
    index,
    index_stride,
    index_step,
    scale,
    part_query,  # [slices, B, D]
    B,
    D,
    keys,
    each,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """The queries' gradient of rows of several blocks: a query, a slice of its keys, a block."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    begin = part * each
    count = tl.minimum(keys - begin, each).to(tl.int32)
    d_query = tl.zeros([BN, BD], WIDE)
    for tile in range(0, count, BN):
        n = tile + tl.arange(0, BN)
        present = n < count
        at = index + b * index_stride + (begin + n) * index_step
        position = tl.load(at, mask=present, other=0)
        slope = tl.load(slopes + b * keys + begin + n, mask=present, other=0)
        d_query += slope[:, None] * gathered(bank, stride, position, d, D, WHOLE, WIDE)
    gradient = tl.sum(d_query, 0) * tl.load(scale).to(WIDE)
    tl.store(part_query + (part * B + b) * D + d, gradient, mask=d < D)
