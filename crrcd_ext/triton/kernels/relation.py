"""All pairwise relation vectors of anchors and samples."""

from __future__ import annotations

import triton
import triton.language as tl

from crrcd_ext.triton.kernels.features import DIRECT, hidden, matrix, relation_block
from crrcd_ext.triton.kernels.tile import inverse_root, narrow


@triton.jit
def relation(
    anchor,  # [A, H]
    sample,  # [M, H]
    weight,  # [R, H]
    bias,  # [R]
    vectors,  # [A, M, R]
    inverse_norm,  # [A, M]
    M,
    H,
    R,
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
    """One anchor, a tile of samples: v = unit(W relu(P - X) + c)."""
    a = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BN + tl.arange(0, BN)
    at = tl.where(m < M, m, 0).to(tl.int64)
    h = tl.arange(0, BH)
    hid = narrow(hidden(anchor, a, sample, at, H, h, H, 0.0, DIRECT, WIDE), DTYPE)
    weight_first = tl.trans(matrix(weight, tl.arange(0, BR), R, h, H))
    square = tl.zeros([BN], WIDE)
    for block in tl.static_range(NR):
        r = block * BR + tl.arange(0, BR)
        w = relation_block(
            anchor, a, sample, at, H, weight, bias, r, R, H, hid, weight_first,
            BH, NH, NR, BIAS, DTYPE, WIDE, PRECISION,
        )  # fmt: skip
        square += tl.sum(w * w, 1)
    root = inverse_root(square, FAST)
    place = a * M + m
    tl.store(inverse_norm + place, root, mask=m < M)
    for block in tl.static_range(NR):
        r = block * BR + tl.arange(0, BR)
        if NR > 1:  # once more: all of a vector is too much to keep
            w = relation_block(
                anchor, a, sample, at, H, weight, bias, r, R, H, hid, weight_first,
                BH, NH, NR, BIAS, DTYPE, WIDE, PRECISION,
            )  # fmt: skip
        v = narrow(w * root[:, None], DTYPE).to(DTYPE)
        cells = (m < M)[:, None] & (r < R)[None, :]
        tl.store(vectors + place[:, None] * R + r[None, :], v, mask=cells)
