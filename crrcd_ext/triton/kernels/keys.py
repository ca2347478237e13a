"""Second pass, where keys or anchors want a gradient: a tile of keys meets all anchors."""

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
    logits,
    matrix,
    positions,
    products,
    relation_block,
    rows_of,
)
from crrcd_ext.triton.kernels.tile import (
    INFONCE,
    LN2,
    dot,
    narrow,
    number,
    power,
    sigmoid,
    weighted,
)


@triton.jit
def slopes(
    query,
    query_bias,
    anchor,
    rows,
    stride,
    at,
    position,
    weight,
    bias,
    beta,
    weights,
    touched,
    kept_bits,  # of the keys, see mask
    words,
    anchor_id,
    key_id,
    root,
    scale,
    A,
    B,
    F,
    H,
    R,
    a,
    query_block,
    n,
    keys,
    hid,  # hidden units [n, h] and W' [h, r], where one block of them is all there is
    weight_first,
    EPS: tl.constexpr,
    FORM: tl.constexpr,
    MODE: tl.constexpr,
    EACH: tl.constexpr,
    BIAS: tl.constexpr,
    NAMED: tl.constexpr,
    ANCHORS: tl.constexpr,
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
):
    """(d, f): derivatives [n, b] of the loss by <query, feature>, and the features, where one block
    is all there is.

    Logits once more, with the keys first, which is how the products want their derivatives.
    """
    UNIT: tl.constexpr = FORM == DIFFERENCE and tl.float16 == DTYPE
    b = query_block * BB + tl.arange(0, BB)
    pair = a * B + b
    query_row = query + a * B * F
    query_first = matrix(query_row, b, B, tl.arange(0, BF), F)
    constant = tl.zeros([BB], WIDE)
    if FORM == GRAM and BIAS:
        constant = tl.load(query_bias + pair, mask=b < B, other=0).to(WIDE)
    product, _, f = products(
        query_row, query_first, constant, anchor, a, rows, at, stride, weight, bias, root,
        b, B, F, H, R, hid, weight_first,
        EPS, FORM, UNIT, BIAS, DTYPE, WIDE, PRECISION, FAST, NF, NH, NR, BF, BH, BR,
    )  # fmt: skip
    critic_scale = binary(scale, WIDE)
    less = tl.load(beta + pair, mask=b < B, other=float("inf"))
    left = tl.full([n.shape[0]], 1.0, WIDE) if UNIT else root  # of the norm, after the product
    s = logits(
        product, left * critic_scale, less, root != 0, a, n, position, anchor_id, key_id,
        query_block, kept_bits, words, touched, FORM, NAMED, ANCHORS, BB,
    )  # fmt: skip
    if MODE == INFONCE:
        slope = power(s, FAST)
    else:
        slope, _ = sigmoid(s, FAST)
    if EACH:
        slope = weighted(slope, weights, pair, b < B)
    return slope * (left * critic_scale * LN2)[:, None], f


@triton.jit
def keys(
    query,
    query_bias,
    anchor,
    rows,
    stride,
    index,
    weight,
    bias,
    scale,
    beta,
    weights,
    flags,
    kept_bits,  # of the keys, see mask
    words,
    anchor_id,
    key_id,
    gram,  # [H, H] W'W
    gram_bias,  # [H] W'c
    inverse_norm,
    coefficient,
    d_rows,  # [keys, H] gradient of what the rows hold
    part_anchor,  # [tiles, A, H]
    A,
    B,
    F,
    H,
    R,
    first,
    keys,
    FORM: tl.constexpr,
    MODE: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHOR: tl.constexpr,
    PROJECTED: tl.constexpr,
    INDEXED: tl.constexpr,
    BIAS: tl.constexpr,
    NAMED: tl.constexpr,
    ANCHORS: tl.constexpr,
    EPS: tl.constexpr,  # not a number, which would come in float32
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    NF: tl.constexpr,
    NH: tl.constexpr,
    NR: tl.constexpr,
    NB: tl.constexpr,
    ND: tl.constexpr,
    BF: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """A tile of keys, a block of hidden units; W meets BD hidden units at a time.

    With w the key's features, d_w = sum_b d q + coefficient w, and through W to the hidden units;
    in the Gram form W'w = W'W hid + W'c.
    """
    UNIT: tl.constexpr = FORM == DIFFERENCE and tl.float16 == DTYPE
    tile = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    n = tile * BN + tl.arange(0, BN)
    position = positions(n, first, keys, index, INDEXED)
    here, at, step = rows_of(rows, stride, position, tile, PROJECTED, BN)
    touched = tl.load(flags + tile) != 0
    weight_first = tl.zeros([BH, BR], DTYPE)
    if FORM == DIRECT and NF == 1 and ND == 1:
        weight_first = tl.trans(matrix(weight, tl.arange(0, BR), R, tl.arange(0, BH), H))
    gram_first = tl.zeros([BH, BH], DTYPE)
    if FORM == GRAM and NH == 1:
        gram_first = matrix(gram, h, H, h, H)

    d_x = tl.zeros([BN, BH], WIDE)
    for anchor_number in range(A):
        a = number(anchor_number)
        root = tl.load((inverse_norm + a * keys) + n, mask=n < keys, other=0)
        c = tl.load((coefficient + a * keys) + n, mask=n < keys, other=0)
        if FORM == DIFFERENCE:
            own = difference(anchor, a, here, at, step, h, H, EPS, WIDE)
        else:
            own = hidden(anchor, a, here, at, step, h, H, DTYPE, WIDE, FAST)
        d_hid = tl.zeros([BN, BH], WIDE)
        if FORM == GRAM:
            for block in tl.static_range(NH):
                if NH == 1:
                    d_hid = dot(own, gram_first, d_hid, PRECISION)
                else:
                    columns = block * BH + tl.arange(0, BH)
                    x = hidden(anchor, a, here, at, step, columns, H, DTYPE, WIDE, FAST)
                    d_hid = dot(x, matrix(gram, columns, H, h, H), d_hid, PRECISION)
            if BIAS:
                d_hid += tl.load(gram_bias + h, mask=h < H, other=0).to(WIDE)[None, :]
            d_hid *= c[:, None]
        for query_block in range(NB):
            d, f = slopes(
                query, query_bias, anchor, here, step, at, position, weight, bias, beta,
                weights, touched, kept_bits, words, anchor_id, key_id, root, scale,
                A, B, F, H, R, a, query_block, n, keys,
                own, weight_first, EPS, FORM, MODE, EACH, BIAS, NAMED, ANCHORS,
                DTYPE, WIDE, PRECISION, FAST, NF, ND, NR, BF, BD, BR, BB,
            )  # fmt: skip
            d = narrow(d, DTYPE)
            b = query_block * BB + tl.arange(0, BB)
            query_row = query + a * B * F
            if FORM == DIRECT:
                for block in range(NF):
                    r = block * BF + tl.arange(0, BF)
                    d_w = dot(d, matrix(query_row, b, B, r, F), tl.zeros([BN, BF], WIDE), PRECISION)
                    if query_block == 0:
                        if NF == 1:
                            w = f
                        else:
                            w = relation_block(
                                anchor, a, here, at, step, weight, bias, r, R, H,
                                own, weight_first,
                                BD, ND, NR, BIAS, DTYPE, WIDE, PRECISION, FAST,
                            )  # fmt: skip
                        d_w += c[:, None] * w
                    d_hid = dot(narrow(d_w, DTYPE), matrix(weight, r, R, h, H), d_hid, PRECISION)
            else:
                d_hid = dot(d, matrix(query_row, b, B, h, F), d_hid, PRECISION)
        if FORM == DIFFERENCE:
            if UNIT:
                d_hid *= root[:, None]
            d_hid += c[:, None] * own
            d_x += d_hid
        else:
            d_hid = tl.where(own <= 0, 0.0, d_hid)
            d_x -= d_hid
        if ANCHOR:
            place = part_anchor + (tile.to(tl.int64) * A + a) * H
            total = tl.sum(d_hid, 0)
            tl.store(place + h, -total if FORM == DIFFERENCE else total, mask=h < H)
    if ROWS:
        cells = (n < keys)[:, None] & (h < H)[None, :]
        tl.store(d_rows + n.to(tl.int64)[:, None] * H + h[None, :], d_x, mask=cells)
