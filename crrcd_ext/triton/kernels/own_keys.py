"""Keys that each query has of its own, by their differences from the anchors: difference_nce.

There is no product of matrices here: a key meets one query, whose direction is another for each
anchor. All is multiplied and summed in the wide dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crrcd_ext.triton.kernels.features import binary
from crrcd_ext.triton.kernels.tile import (
    INFONCE,
    LN2,
    NCE,
    NORMALISER,
    TINY,
    inverse_root,
    log1p,
    number,
    power,
    sigmoid,
)


@triton.jit
def gathered(row, d, D, WIDE: tl.constexpr):
    """[1, c, n, j]: elements d [c, j] of the rows [n]."""
    inside = (d < D)[None, :, None, :]
    place = row[None, None, :, None] + d[None, :, None, :]
    return tl.load(place, mask=inside, other=0).to(WIDE)


@triton.jit
def of_anchors(x, a, A, d, D, step, outside):
    """[a, c, 1, j]: elements d [c, j] of the rows a of x, whose rows are ``step`` apart."""
    inside = (a < A)[:, None, None] & (d < D)[None, :, :]
    place = x + (a * step)[:, None, None] + d[None, :, :]
    return tl.load(place, mask=inside, other=outside)[:, :, None, :]


@triton.jit
def difference(m, p, eps: tl.constexpr):
    x = m - p
    if eps != 0:
        x += eps
    return x


@triton.jit
def over_features(x):
    """[a, n] sums of x [a, c, n, j]."""
    return tl.sum(tl.sum(x, 1), 2)


@triton.jit
def add(target, value, mask):
    tl.store(target, tl.load(target, mask=mask) + value, mask=mask)


@triton.jit
def own_keys(
    direction,  # [A, B, D] unit vectors of the queries, in the wide dtype
    anchor,  # [A, D] in the wide dtype
    bank,
    stride,
    index,  # [B, K] rows of the bank
    index_stride,
    index_step,
    scale,
    beta,  # [A, B] what logits are less; see passes.shifts
    weights,  # [B] of the queries' losses, with EACH
    anchor_id,
    query_id,
    key_id,
    query_label,
    key_label,
    excluded,  # [B, words] int32, a bit a key
    words,
    part_sum,  # [slices, B] sums of softplus, or [slices, A, B] of 2^(s - top)
    part_top,  # [slices, A, B]
    part_direction,  # [slices, A, B, D] gradient of ``direction``
    part_anchor,  # [slices, A, B, D] gradient of ``anchor``
    part_scale,  # [slices, B]
    part_offset,  # [slices, B]
    d_rows,  # [B, keys, D]
    A,
    B,
    D,
    first,
    keys,
    tiles,  # of keys, for each slice
    MODE: tl.constexpr,
    EACH: tl.constexpr,
    DIRECTION: tl.constexpr,
    ANCHOR: tl.constexpr,
    ROWS: tl.constexpr,
    CRITIC: tl.constexpr,
    ID: tl.constexpr,
    NAMED: tl.constexpr,
    LABEL: tl.constexpr,
    EXCLUDED: tl.constexpr,
    ANCHORS: tl.constexpr,
    EPS: tl.constexpr,  # not a number, which would come in float32
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
    ND: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
):
    """One query, a slice of its keys in this segment, a block of BC BJ features.

    The rows of a tile of keys stay in registers while all anchors pass, BA at a time. What belongs
    to an anchor is added to the program's own part of the sums, which the host has cleared.

    Features are two dimensions, chunks c of elements j side by side, so that a warp reads several
    rows at a time and a sum over features is mostly a thread's own.
    """
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    block = tl.program_id(2)
    chunk = tl.arange(0, BC)[:, None] * BJ + tl.arange(0, BJ)[None, :]
    d = block * BC * BJ + chunk
    factor = tl.load(scale).to(WIDE)
    # Logits, and they alone, are in units of log 2.
    binary_factor = binary(scale, WIDE)
    sum_scale = tl.zeros([BA, BN], WIDE)
    sum_offset = tl.zeros([BA, BN], WIDE)
    sum_loss = tl.zeros([BA, BN], WIDE)
    beyond = tl.full([1, 1, 1], EPS, WIDE)  # the last feature differences are 0 - EPS + EPS

    begin = part * tiles
    for tile in range(begin, tl.minimum(begin + tiles, tl.cdiv(keys, BN))):
        n = tile * BN + tl.arange(0, BN)
        present = n < keys
        entry = tl.where(present, n, 0).to(tl.int64) + first
        position = tl.load(index + b * index_stride + entry * index_step)
        name = position
        if NAMED:
            name = tl.load(key_id + position)
        if ID:
            present = present & (name != tl.load(query_id + b))
        if LABEL:
            present = present & (tl.load(key_label + position) != tl.load(query_label + b))
        if EXCLUDED:
            bits = tl.load(excluded + b * words + (entry >> 5))
            present = present & (((bits >> (entry & 31).to(tl.int32)) & 1) == 0)
        row = bank + position * stride
        m = gathered(row, d, D, WIDE)
        d_m = tl.zeros([1, BC, BN, BJ], WIDE)
        # Of this tile: sums of sums lose less than one long sum.
        d_scale = tl.zeros([BA, BN], WIDE)
        d_offset = tl.zeros([BA, BN], WIDE)
        loss = tl.zeros([BA, BN], WIDE)

        for anchor_number in range(0, A, BA):
            a = number(anchor_number) + tl.arange(0, BA)
            inside = a < A
            pair = a * B + b
            u = of_anchors(direction + b * D, a, A, d, D, B * D, 0)
            x = difference(m, of_anchors(anchor, a, A, d, D, D, beyond), EPS)
            if ND == 1:
                square = over_features(x * x)
                along = over_features(x * u)
            else:
                square = tl.zeros([BA, BN], WIDE)
                along = tl.zeros([BA, BN], WIDE)
                for column in range(0, D, BC * BJ):
                    e = column + chunk
                    p = of_anchors(anchor, a, A, e, D, D, beyond)
                    y = difference(gathered(row, e, D, WIDE), p, EPS)
                    square += over_features(y * y)
                    along += over_features(y * of_anchors(direction + b * D, a, A, e, D, B * D, 0))
            root = inverse_root(square, FAST)
            cosine = along * root
            less = tl.load(beta + pair, mask=inside, other=float("inf"))
            s = cosine * binary_factor - less[:, None]
            # What is not a number counts, so that it shows in the loss.
            keep = present[None, :] & ((square > TINY) | (square != square))
            if ANCHORS:
                # The anchor's own row has no direction from the anchor.
                own = tl.load(anchor_id + a, mask=inside, other=0)
                keep = keep & (name[None, :] != own[:, None])
            s = tl.where(keep, s, -float("inf"))

            place = part.to(tl.int64) * A * B + pair
            if MODE == NORMALISER:
                top = tl.load(part_top + place, mask=inside, other=0)
                total = tl.load(part_sum + place, mask=inside, other=0)
                higher = tl.maximum(top, tl.max(s, 1))
                base = tl.where(higher == -float("inf"), 0.0, higher)
                total *= power(top - base, FAST)
                total += tl.sum(power(s - base[:, None], FAST), 1)
                tl.store(part_top + place, higher, mask=inside)
                tl.store(part_sum + place, total, mask=inside)
            else:
                if MODE == INFONCE:
                    slope = power(s, FAST)
                else:
                    slope, e = sigmoid(s, FAST)
                    loss += log1p(e) + LN2 * tl.maximum(s, 0.0)
                if EACH:
                    slope *= tl.load(weights + b)
                if CRITIC:
                    d_scale += slope * cosine
                    d_offset -= slope
                by_along = slope * factor * root
                cells = inside[:, None, None] & (d < D)[None, :, :]
                wide_place = (place * D)[:, None, None] + d[None, :, :]
                if DIRECTION:
                    d_u = tl.sum(by_along[:, None, :, None] * x, 2)
                    add(part_direction + wide_place, d_u, cells)
                if ANCHOR or ROWS:
                    by_square = -by_along * cosine * root
                    d_x = by_along[:, None, :, None] * u
                    d_x += by_square[:, None, :, None] * x
                    if ANCHOR:
                        add(part_anchor + wide_place, -tl.sum(d_x, 2), cells)
                    if ROWS:
                        d_m += d_x if BA == 1 else tl.sum(d_x, 0)[None, :, :, :]
        if ROWS:
            cells = (n < keys)[None, None, :, None] & (d < D)[None, :, None, :]
            place = ((b * keys + n) * D)[None, None, :, None] + d[None, :, None, :]
            tl.store(d_rows + place, d_m, mask=cells)
        sum_loss += loss
        sum_scale += d_scale
        sum_offset += d_offset
        # The next tile adds to what any thread has stored.
        tl.debug_barrier()

    if block == 0:
        place = part * B + b
        if MODE == NCE:
            add(part_sum + place, tl.sum(tl.sum(sum_loss, 1), 0), None)
        if CRITIC:
            add(part_scale + place, tl.sum(tl.sum(sum_scale, 1), 0), None)
            add(part_offset + place, tl.sum(tl.sum(sum_offset, 1), 0), None)
