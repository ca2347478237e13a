"""First pass over the keys: logits, loss, gradient of the queries, and what the norms leave."""

from __future__ import annotations

import triton
import triton.language as tl

from crrcd_ext.triton.kernels.features import (
    DIFFERENCE,
    DIRECT,
    GRAM,
    binary,
    difference,
    hidden,
    matrix,
    positions,
    products,
    relation_block,
    rows_of,
)
from crrcd_ext.triton.kernels.features import logits as logits_of
from crrcd_ext.triton.kernels.tile import (
    LN2,
    NCE,
    NORMALISER,
    TINY,
    dot,
    grown_by_two,
    inverse_root,
    log1p,
    narrow,
    power,
    softplus,
    softplus_of_each,
    weighted,
)


@triton.jit
def put(target, value, mask, ADD: tl.constexpr):
    """Stores the value, or adds it to what the launch for the segment before left there."""
    if ADD:
        value += tl.load(target, mask=mask)
    tl.store(target, value, mask=mask)


@triton.jit
def norms(
    anchor,
    rows,
    stride,
    index,
    weight,
    bias,
    inverse_norm,  # [A, keys]
    A,
    H,
    R,
    first,
    keys,
    tiles,
    PROJECTED: tl.constexpr,
    INDEXED: tl.constexpr,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    NH: tl.constexpr,
    NR: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """1 / |W relu(P_a - X_n) + c| of one anchor and a slice of the segment's keys. The Gram form
    has no other use of relations, and registers for more in one kernel there are not."""
    part = tl.program_id(0)
    a = tl.program_id(1).to(tl.int64)
    h = tl.arange(0, BH)
    weight_first = tl.trans(matrix(weight, tl.arange(0, BR), R, h, H))
    begin = part * tiles
    for tile in range(begin, tl.minimum(begin + tiles, tl.cdiv(keys, BN))):
        n = tile * BN + tl.arange(0, BN)
        position = positions(n, first, keys, index, INDEXED)
        here, at, step = rows_of(rows, stride, position, tile, PROJECTED, BN)
        hid = weight_first
        if NH == 1:
            hid = hidden(anchor, a, here, at, step, h, H, DTYPE, WIDE, FAST)
        square = tl.zeros([BN], WIDE)
        for block in tl.static_range(NR):
            r = block * BR + tl.arange(0, BR)
            w = relation_block(
                anchor, a, here, at, step, weight, bias, r, R, H, hid, weight_first,
                BH, NH, NR, BIAS, DTYPE, WIDE, PRECISION, FAST,
            )  # fmt: skip
            square += tl.sum(w * w, 1)
        tl.store((inverse_norm + a * keys) + n, inverse_root(square, FAST), mask=n < keys)


@triton.jit
def logits(
    query,  # [A, B, F] what meets the features: q, W'q or the queries' directions
    query_bias,  # [A, B] <q, c>, GRAM with BIAS
    anchor,  # [A, H]
    rows,  # [.., H] projected keys of the segment, or rows of the bank
    stride,
    index,  # [K] rows of the bank
    weight,  # [R, H]
    bias,  # [R]
    scale,
    beta,  # [A, B] what logits are less; see passes.shifts
    weights,  # [A, B] of the pairs' losses, with EACH
    flags,  # [tiles] of keys that masks touch
    kept_bits,  # of the keys, see mask
    words,
    anchor_id,
    key_id,
    part_sum,  # [slices, query blocks, A] sums of softplus, or [slices, A, B], of 2^(s - top) too
    part_top,  # [slices, A, B]
    part_query,  # [slices, A, B, F] gradient of ``query``
    part_bias,  # [slices, A, B] gradient of ``query_bias``
    part_scale,  # [slices, query blocks, A]
    part_offset,  # [slices, query blocks, A]
    inverse_norm,  # [A, keys], in the Gram form those of norms
    coefficient,  # [query blocks, A, keys] what a norm's gradient is a multiple of
    A,
    B,
    F,
    H,
    R,
    first,
    keys,
    tiles,  # of keys, for each slice
    FORM: tl.constexpr,
    MODE: tl.constexpr,
    EACH: tl.constexpr,
    QUERY: tl.constexpr,
    NORM: tl.constexpr,
    CRITIC: tl.constexpr,
    PROJECTED: tl.constexpr,
    INDEXED: tl.constexpr,
    BIAS: tl.constexpr,
    NAMED: tl.constexpr,
    ANCHORS: tl.constexpr,
    EPS: tl.constexpr,  # not a number, which would come in float32
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    NF: tl.constexpr,
    NH: tl.constexpr,
    NR: tl.constexpr,
    BF: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
):
    """One anchor, a slice of the segment's keys, a block of queries, a block of features."""
    UNIT: tl.constexpr = FORM == DIFFERENCE and tl.float16 == DTYPE
    part = tl.program_id(0)
    a = tl.program_id(1).to(tl.int64)
    own: tl.constexpr = NF if QUERY else 1
    query_block = tl.program_id(2) // own
    feature_block = tl.program_id(2) % own
    b = query_block * BB + tl.arange(0, BB)
    pair = a * B + b
    first_h = tl.arange(0, BH)
    first_f = tl.arange(0, BF)
    first_r = tl.arange(0, BR)
    own_f = feature_block * BF + first_f
    critic_scale = binary(scale, WIDE)
    less = tl.load(beta + pair, mask=b < B, other=float("inf"))

    # Loaded once where one block is all there is.
    query_row = query + a * B * F
    query_first = matrix(query_row, b, B, first_f, F)
    weight_first = query_first
    if FORM == DIRECT:
        weight_first = tl.trans(matrix(weight, first_r, R, first_h, H))
    # Features first: of products that follow each other, all have to be at least as high as wide,
    # or Triton gives each warp a column of them, and every warp all of the first's left side.
    d_query = tl.zeros([BF, BB], WIDE)
    d_constant = tl.zeros([BB, 16], WIDE)  # each column the same
    d_scale = tl.zeros([BN], WIDE)
    d_offset = tl.zeros([BN], WIDE)
    product = tl.zeros([BN, BB if EACH else BB // 4], WIDE)
    linear = tl.zeros([BB if EACH else BN], WIDE)
    top = tl.full([BN // 2, BB], -float("inf"), WIDE)
    total = tl.zeros([BN // 2, BB], WIDE)

    begin = part * tiles
    for tile in range(begin, tl.minimum(begin + tiles, tl.cdiv(keys, BN))):
        n = tile * BN + tl.arange(0, BN)
        position = positions(n, first, keys, index, INDEXED)
        here, at, step = rows_of(rows, stride, position, tile, PROJECTED, BN)

        if FORM != DIFFERENCE:  # again for each tile, as there are no registers to keep it in
            less = tl.load(beta + pair, mask=b < B, other=float("inf"))
        constant = less
        if FORM == GRAM and BIAS:
            constant = tl.load(query_bias + pair, mask=b < B, other=0).to(WIDE)
        root = tl.zeros([BN], WIDE)
        hid = query_first
        if UNIT:
            square = root
            for block in tl.static_range(NF):
                columns = block * BF + first_f
                x = difference(anchor, a, here, at, step, columns, F, EPS, WIDE)
                square += tl.sum(x * x, 1)
            root = inverse_root(square, FAST)
        elif FORM != DIFFERENCE and NH == 1:
            hid = hidden(anchor, a, here, at, step, first_h, H, DTYPE, WIDE, FAST)
        logit, own_square, f = products(
            query_row, query_first, constant, anchor, a, here, at, step, weight, bias, root,
            b, B, F, H, R, hid, weight_first,
            EPS, FORM, UNIT, BIAS, DTYPE, WIDE, PRECISION, FAST, NF, NH, NR, BF, BH, BR,
        )  # fmt: skip
        if FORM == GRAM:
            root = tl.load((inverse_norm + a * keys) + n, mask=n < keys, other=0)
        elif not UNIT:
            square = own_square
            root = inverse_root(square, FAST)
        left = tl.full([BN], 1.0, WIDE) if UNIT else root  # of the norm, after the product
        present = n < keys
        if FORM == DIFFERENCE:
            # What is not a number counts, so that it shows in the loss.
            present = (square > TINY) | (square != square)
        touched = tl.load(flags + tile) != 0
        # In units of log 2, for the logits alone: derivatives are those of the loss.
        s = logits_of(
            logit, left * critic_scale, less, present, a, n, position, anchor_id, key_id,
            query_block, kept_bits, words, touched, FORM, NAMED, ANCHORS, BB,
        )  # fmt: skip

        if MODE == NORMALISER:
            top, total = grown_by_two(s, top, total, FAST)
        else:
            if MODE == NCE:
                if EACH:
                    slope, product, linear = softplus_of_each(s, product, linear, FAST)
                else:
                    slope, product, linear = softplus(s, product, linear, FAST)
            else:
                slope = power(s, FAST)
            if EACH:
                slope = weighted(slope, weights, pair, b < B)
            factor = left * critic_scale * LN2
            if NORM or CRITIC:
                across = tl.sum(slope * logit, 1)
                d_scale += across * left
                if NORM:
                    seen = (n < keys) & (feature_block == 0)
                    if FORM != GRAM:
                        only = seen & (query_block == 0)
                        tl.store((inverse_norm + a * keys) + n, root, mask=only)
                    norms = coefficient + (query_block * A + a) * keys
                    tl.store(norms + n, -across * factor * root * root, mask=seen)
            if CRITIC:
                d_offset -= tl.sum(slope, 1)
            if QUERY:
                d = slope * factor[:, None]
                if NF > 1:  # the block that is this program's
                    if FORM == DIRECT:
                        f = relation_block(
                            anchor, a, here, at, step, weight, bias, own_f, R, H, hid,
                            weight_first, BH, NH, NR, BIAS, DTYPE, WIDE, PRECISION, FAST,
                        )  # fmt: skip
                    elif FORM == GRAM:
                        f = hidden(anchor, a, here, at, step, own_f, H, DTYPE, WIDE, FAST)
                    else:
                        f = difference(anchor, a, here, at, step, own_f, H, EPS, WIDE)
                        if UNIT:
                            f *= root[:, None]
                d = narrow(d, DTYPE)
                d_query = dot(tl.trans(narrow(f, DTYPE)), d, d_query, PRECISION)
                if FORM == GRAM and BIAS:  # a sum over keys, across warps, takes longer
                    ones = narrow(tl.full([BN, 16], 1.0, WIDE), DTYPE)
                    d_constant = dot(tl.trans(d), ones, d_constant, PRECISION)

    inside = b < B
    place = part.to(tl.int64) * A * B + pair
    first_only = inside & (feature_block == 0)
    cell = (part * (tl.num_programs(2) // own) + query_block) * A + a
    if QUERY:
        cells = inside[None, :] & (own_f < F)[:, None]
        put(part_query + place[None, :] * F + own_f[:, None], d_query, cells, ADD)
        if FORM == GRAM and BIAS:
            d_constant = tl.max(d_constant, 1)
            put(part_bias + place, d_constant, first_only, ADD)
    if MODE == NORMALISER:
        most = tl.max(top, 0)
        base = tl.where(most == -float("inf"), 0.0, most)
        total = tl.sum(total * power(top - base[None, :], FAST), 0)
        tl.store(part_sum + place, total, mask=first_only)
        tl.store(part_top + place, most, mask=first_only)
    if feature_block == 0:
        if MODE == NCE:
            if EACH:
                put(part_sum + place, tl.sum(log1p(product), 0) + linear * LN2, inside, ADD)
            else:
                loss = tl.sum(tl.sum(log1p(product), 1) + linear * LN2, 0)
                put(part_sum + cell, loss, None, ADD)
        if CRITIC:
            put(part_scale + cell, tl.sum(d_scale, 0), None, ADD)
            put(part_offset + cell, tl.sum(d_offset, 0), None, ADD)
