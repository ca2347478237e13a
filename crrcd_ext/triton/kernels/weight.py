"""Third pass, where the relation's weight wants a gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from crrcd_ext.triton.kernels.features import (
    DIRECT,
    hidden,
    matrix,
    positions,
    relation_block,
    rows_of,
)
from crrcd_ext.triton.kernels.keys import slopes
from crrcd_ext.triton.kernels.logits import put
from crrcd_ext.triton.kernels.tile import dot, narrow, number


@triton.jit
def gram(
    anchor,
    rows,
    stride,
    index,
    coefficient,
    part_gram,  # [slices, H, H] sums of coefficient hid hid', on and above the diagonal
    part_hidden,  # [slices, H] sums of coefficient hid
    part_total,  # [slices] sums of coefficient
    A,
    H,
    first,
    keys,
    tiles,
    PROJECTED: tl.constexpr,
    INDEXED: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
):
    """A slice of the keys' tiles, two blocks of hidden units. The norms' part of W's gradient is W
    times the sum, which is symmetric."""
    part = tl.program_id(0)
    row_block = tl.program_id(1)
    column_block = tl.program_id(2)
    if row_block <= column_block:
        i = row_block * BH + tl.arange(0, BH)
        j = column_block * BH + tl.arange(0, BH)
        outer = tl.zeros([BH, BH], WIDE)
        once = tl.zeros([BH], WIDE)
        total = tl.zeros([BN], WIDE)
        begin = part * tiles
        for tile in range(begin, tl.minimum(begin + tiles, tl.cdiv(keys, BN))):
            n = tile * BN + tl.arange(0, BN)
            position = positions(n, first, keys, index, INDEXED)
            here, at, step = rows_of(rows, stride, position, tile, PROJECTED, BN)
            for anchor_number in range(A):
                a = number(anchor_number)
                place = a * keys + n
                c = tl.load(coefficient + place, mask=n < keys, other=0)
                x = hidden(anchor, a, here, at, step, i, H, DTYPE, WIDE, FAST)
                x = x.to(WIDE) * c[:, None]
                y = hidden(anchor, a, here, at, step, j, H, DTYPE, WIDE, FAST)
                outer = dot(tl.trans(narrow(x, DTYPE)), y, outer, PRECISION)
                once += tl.sum(x, 0)
                total += c
        cells = (i < H)[:, None] & (j < H)[None, :]
        place = part.to(tl.int64) * H
        put(part_gram + (place + i)[:, None] * H + j[None, :], outer, cells, ADD)
        if column_block == row_block:
            put(part_hidden + place + i, once, i < H, ADD)
        if column_block == 0:
            put(part_total + part, tl.sum(total, 0), None, ADD)


@triton.jit
def weight(
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
    inverse_norm,
    coefficient,
    part_weight,  # [slices, R, H]
    part_bias,  # [slices, R]
    A,
    B,
    H,
    R,
    first,
    keys,
    tiles,
    MODE: tl.constexpr,
    EACH: tl.constexpr,
    PROJECTED: tl.constexpr,
    INDEXED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    NR: tl.constexpr,
    NB: tl.constexpr,
    ND: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """A slice of the tiles of keys, a block of features, one of hidden units: d_w hid' as it is."""
    part = tl.program_id(0)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    h = tl.program_id(2) * BH + tl.arange(0, BH)
    weight_first = tl.zeros([BD, BR], DTYPE)
    if NR == 1 and ND == 1:
        weight_first = tl.trans(matrix(weight, tl.arange(0, BR), R, tl.arange(0, BD), H))
    outer = tl.zeros([BR, BH], WIDE)
    once = tl.zeros([BR], WIDE)
    begin = part * tiles
    for tile in range(begin, tl.minimum(begin + tiles, tl.cdiv(keys, BN))):
        n = tile * BN + tl.arange(0, BN)
        position = positions(n, first, keys, index, INDEXED)
        here, at, step = rows_of(rows, stride, position, tile, PROJECTED, BN)
        touched = tl.load(flags + tile) != 0
        for anchor_number in range(A):
            a = number(anchor_number)
            place = a * keys + n
            root = tl.load(inverse_norm + place, mask=n < keys, other=0)
            c = tl.load(coefficient + place, mask=n < keys, other=0)
            hid = hidden(anchor, a, here, at, step, h, H, DTYPE, WIDE, FAST)
            w = relation_block(
                anchor, a, here, at, step, weight, bias, r, R, H, hid, weight_first,
                BD, ND, NR, BIAS, DTYPE, WIDE, PRECISION, FAST,
            )  # fmt: skip
            d_w = c[:, None] * w
            for query_block in range(NB):
                d, _ = slopes(
                    query, query_bias, anchor, here, step, at, position, weight, bias,
                    beta, weights, touched, kept_bits, words, anchor_id, key_id, root, scale,
                    A, B, R, H, R, a, query_block, n, keys,
                    hid, weight_first, 0.0, DIRECT, MODE, EACH, BIAS, False, False,
                    DTYPE, WIDE, PRECISION, FAST, NR, ND, NR, BR, BD, BR, BB,
                )  # fmt: skip
                b = query_block * BB + tl.arange(0, BB)
                q = matrix(query + a * B * R, b, B, r, R)
                d_w = dot(narrow(d, DTYPE), q, d_w, PRECISION)
            outer = dot(tl.trans(narrow(d_w, DTYPE)), hid, outer, PRECISION)
            once += tl.sum(d_w, 0)
    cells = (r < R)[:, None] & (h < H)[None, :]
    place = part.to(tl.int64) * R
    put(part_weight + (place + r)[:, None] * H + h[None, :], outer, cells, ADD)
    if tl.program_id(2) == 0:
        put(part_bias + place + r, once, r < R, ADD)
