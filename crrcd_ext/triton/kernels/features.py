"""What a key is to an anchor, for a tile of keys: hidden units, relations, logits, slopes.

Names of sizes: A anchors, B queries, K keys, H hidden units, F features; BN, BB, BH, BF are blocks
of keys, queries, hidden units and features, NH and NF the numbers of such blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crrcd_ext.triton.kernels.tile import LOG2E, dot, hinge, kept, narrow

DIRECT = tl.constexpr(0)
"""The features of a key are its relation before it has unit length, w = W relu(P - X) + c."""
GRAM = tl.constexpr(1)
"""The features are hidden units, hid = relu(P - X): <q, w> = <W'q, hid> + <q, c>."""
DIFFERENCE = tl.constexpr(2)
"""The features are differences, x - anchor + eps. Products in float16, whose range they may leave,
take them at unit length."""


@triton.jit
def positions(n, first, keys, index, INDEXED: tl.constexpr):
    """Rows of the bank that are the keys n of a segment; those beyond its end repeat the first."""
    n = tl.where(n < keys, n, 0).to(tl.int64) + first
    if INDEXED:
        return tl.load(index + n)
    else:
        return n


@triton.jit
def rows_of(rows, stride, position, tile, PROJECTED: tl.constexpr, BN: tl.constexpr):
    """Where the rows of a tile of keys are counted from, their places from there, and their stride.

    PROJECTED is the stride of projected keys, which are a tile's as they lie, so that addresses
    differ by constants; 0 is for rows of the bank.
    """
    if PROJECTED:
        return rows + tl.cast(tile, tl.int64) * (BN * PROJECTED), tl.arange(0, BN), PROJECTED
    else:
        return rows, position, stride


@triton.jit
def hidden(
    anchor,
    a,
    rows,
    at,
    stride,
    h,
    H,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
):
    """[n, h]: relu(P_a - X_n) of the rows at ``at``, in the operands' dtype."""
    inside = h < H
    p = tl.load(anchor + a * H + h, mask=inside, other=0)
    x = tl.load(rows + at[:, None] * stride + h[None, :], mask=inside[None, :], other=0)
    return hinge(p[None, :], x, DTYPE, WIDE, FAST)


@triton.jit
def difference(anchor, a, rows, at, stride, d, D, eps, WIDE: tl.constexpr):
    """[n, d]: x_n - anchor_a + eps, of the rows at ``at``."""
    inside = d < D
    p = tl.load(anchor + a * D + d, mask=inside, other=0).to(WIDE)
    x = tl.load(rows + at[:, None] * stride + d[None, :], mask=inside[None, :], other=0).to(WIDE)
    return tl.where(inside[None, :], x - p[None, :] + eps, 0.0)


@triton.jit
def matrix(x, row, rows, column, columns):
    """x [rows, columns] at row (x) column, 0 outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0)


@triton.jit
def relation_block(
    anchor,
    a,
    rows,
    at,
    stride,
    weight,
    bias,
    r,
    R,
    H,
    hid_first,
    weight_first,
    BH: tl.constexpr,
    NH: tl.constexpr,
    NF: tl.constexpr,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """w [n, r]. hid_first are the hidden units [n, h] in the operands' dtype, where one block of
    them is all there is, and weight_first is W' [h, r], where one of features is, too."""
    w = tl.zeros([at.shape[0], r.shape[0]], WIDE)
    if NH == 1 and NF == 1:
        w = dot(hid_first, weight_first, w, PRECISION)
    elif NH == 1:
        h = tl.arange(0, BH)
        w = dot(hid_first, tl.trans(matrix(weight, r, R, h, H)), w, PRECISION)
    else:  # a loop: at full precision a product is long code as it is
        for block in range(NH):
            h = block * BH + tl.arange(0, BH)
            hid = hidden(anchor, a, rows, at, stride, h, H, DTYPE, WIDE, FAST)
            w = dot(hid, tl.trans(matrix(weight, r, R, h, H)), w, PRECISION)
    if BIAS:
        w += tl.load(bias + r, mask=r < R, other=0).to(WIDE)[None, :]
    return w


@triton.jit
def binary(scale, WIDE: tl.constexpr):
    """The scale of logits in units of log 2, rounded once: what it is off, all logits are."""
    return (tl.load(scale).to(tl.float64) * LOG2E).to(WIDE)


@triton.jit
def product_block(
    block,
    q,  # of the queries, this block of features [b, f]
    square,
    product,
    anchor,
    a,
    rows,
    at,
    stride,
    weight,
    bias,
    root,
    F,
    H,
    R,
    hid,
    weight_first,
    EPS: tl.constexpr,
    FORM: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    NF: tl.constexpr,
    NH: tl.constexpr,
    NR: tl.constexpr,
    BF: tl.constexpr,
    BH: tl.constexpr,
):
    """(features [n, f], square, product) with one more block of features; see products."""
    columns = block * BF + tl.arange(0, BF)
    if FORM == DIRECT:
        f = relation_block(
            anchor, a, rows, at, stride, weight, bias, columns, R, H, hid, weight_first,
            BH, NH, NR, BIAS, DTYPE, WIDE, PRECISION, FAST,
        )  # fmt: skip
    elif FORM == GRAM:
        f = hid
        if NF > 1:
            f = hidden(anchor, a, rows, at, stride, columns, F, DTYPE, WIDE, FAST)
    else:
        f = difference(anchor, a, rows, at, stride, columns, F, EPS, WIDE)
        if UNIT:
            f *= root[:, None]
    if FORM != GRAM:
        square += tl.sum(f * f, 1)
    return f, square, dot(narrow(f, DTYPE), tl.trans(q), product, PRECISION)


@triton.jit
def products(
    query_row,
    query_first,  # of the queries b, the first block of features [b, f]
    constant,  # [b]
    anchor,
    a,
    rows,
    at,
    stride,
    weight,
    bias,
    root,
    b,
    B,
    F,
    H,
    R,
    hid,  # hidden units [n, h], where one block of them is all there is
    weight_first,
    EPS: tl.constexpr,
    FORM: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS: tl.constexpr,
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
):
    """(<query, feature> [n, b], the features' squares [n], and the features, where one block is all
    there is, [n, f]).

    With UNIT features are first multiplied by ``root``.
    """
    square = tl.zeros([at.shape[0]], WIDE)
    product = tl.zeros([at.shape[0], b.shape[0]], WIDE)
    f = hid
    if NF == 1:
        f, square, product = product_block(
            0, query_first, square, product, anchor, a, rows, at, stride, weight, bias, root,
            F, H, R, hid, weight_first,
            EPS, FORM, UNIT, BIAS, DTYPE, WIDE, PRECISION, FAST, NF, NH, NR, BF, BH,
        )  # fmt: skip
    else:
        for block in range(NF):
            q = matrix(query_row, b, B, block * BF + tl.arange(0, BF), F)
            _, square, product = product_block(
                block, q, square, product, anchor, a, rows, at, stride, weight, bias, root,
                F, H, R, hid, weight_first,
                EPS, FORM, UNIT, BIAS, DTYPE, WIDE, PRECISION, FAST, NF, NH, NR, BF, BH,
            )  # fmt: skip
    if FORM == GRAM and BIAS:
        product += constant[None, :]
    return product, square, f


@triton.jit
def logits(
    product,
    factor,
    less,
    present,  # [n] whether there is a direction, DIFFERENCE
    a,
    n,
    position,
    anchor_id,
    key_id,
    query_block,
    kept_bits,
    words,
    touched,
    FORM: tl.constexpr,
    NAMED: tl.constexpr,
    ANCHORS: tl.constexpr,
    BB: tl.constexpr,
):
    """[n, b] in units of log 2, -inf for what is no negative; ``factor`` is of the product [n]."""
    s = product * factor[:, None] - less[None, :]
    if FORM == DIFFERENCE:
        if ANCHORS:  # the anchor's own row has no direction from it
            name = position
            if NAMED:
                name = tl.load(key_id + position)
            present = present & (name != tl.load(anchor_id + a))
        s = tl.where(present[:, None], s, -float("inf"))
    if touched:
        number = n * words + query_block * BB // 32  # of a segment: fits
        bits = tl.load(kept_bits + number)[:, None]
        b = tl.arange(0, BB)[None, :] + (query_block * BB) % 32
        if BB > 32:
            bits = tl.where(b < 32, bits, tl.load(kept_bits + number + 1)[:, None])
        s = tl.where(((bits >> (b % 32)) & 1) != 0, s, -float("inf"))
    return s


@triton.jit
def mask(
    index,
    query_id,
    key_id,
    query_label,
    key_label,
    excluded,  # [B, excluded_words] int32, a bit a key
    excluded_words,
    kept_bits,  # [tiles x BN, words] int32: queries that have the key for a negative
    flags,  # [tiles] whether any key of the tile is none to any query
    B,
    words,
    first,
    keys,
    INDEXED: tl.constexpr,
    ID: tl.constexpr,
    NAMED: tl.constexpr,
    LABEL: tl.constexpr,
    EXCLUDED: tl.constexpr,
    BN: tl.constexpr,
):
    """What ids, labels and bits mask of a segment's keys, once for all anchors: most tiles have
    nothing, and need not even look."""
    tile = tl.program_id(0)
    n = tile * BN + tl.arange(0, BN)
    entry = tile.to(tl.int64) * BN + first
    position = positions(n, first, keys, index, INDEXED)
    bit = tl.arange(0, 32)
    touched = tl.zeros([BN], tl.int32)
    for word in range(words):
        b = word * 32 + bit
        keep = tl.broadcast_to((n < keys)[:, None], [BN, 32])
        keep = kept(
            keep, b, B, entry, position, query_id, key_id, query_label, key_label,
            excluded, excluded_words, ID, NAMED, LABEL, EXCLUDED,
        )  # fmt: skip
        bits = tl.sum(keep.to(tl.int32) << bit[None, :], 1).to(tl.int32)
        tl.store(kept_bits + n.to(tl.int64) * words + word, bits)
        touched = tl.maximum(touched, tl.max((~keep & (b < B)[None, :]).to(tl.int32), 1))
    tl.store(flags + tile, tl.max(touched, 0))
