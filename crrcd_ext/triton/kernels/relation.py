"""All pairwise relation vectors of anchors and samples."""

from __future__ import annotations

import triton
import triton.language as tl

from crrcd_ext.triton.kernels.features import hidden, matrix
from crrcd_ext.triton.kernels.tile import dot, inverse_root, narrow


@triton.jit
def before_unit(
    anchor,
    a,
    sample,
    at,
    weight,
    bias,
    r,
    H,
    R,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    BH: tl.constexpr,
):
    """[m, r]: W relu(P - X) + c."""
    w = tl.zeros([at.shape[0], r.shape[0]], WIDE)
    for begin in range(0, H, BH):
        h = begin + tl.arange(0, BH)
        x = hidden(anchor, a, sample, at, H, h, H, DTYPE, WIDE, FAST)
        w = dot(x, tl.trans(matrix(weight, r, R, h, H)), w, PRECISION)
    if BIAS:
        w += tl.load(bias + r, mask=r < R, other=0).to(WIDE)[None, :]
    return w


@triton.jit
def store(vectors, place, M, m, w, root, r, R, DTYPE: tl.constexpr):
    v = narrow(w * root[:, None], DTYPE).to(DTYPE)
    cells = (m < M)[:, None] & (r < R)[None, :]
    tl.store(vectors + place[:, None] * R + r[None, :], v, mask=cells)


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
    BH: tl.constexpr,
    BR: tl.constexpr,
    SEVERAL: tl.constexpr,
    BN: tl.constexpr,
):
    """One anchor, a tile of samples: v = unit(W relu(P - X) + c)."""
    a = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BN + tl.arange(0, BN)
    at = tl.where(m < M, m, 0).to(tl.int64)
    place = a * M + m
    first_r = tl.arange(0, BR)
    w = before_unit(
        anchor, a, sample, at, weight, bias, first_r, H, R, BIAS, DTYPE, WIDE, PRECISION, FAST, BH
    )
    square = tl.sum(w * w, 1)
    if SEVERAL:
        for begin in range(BR, R, BR):
            x = before_unit(
                anchor, a, sample, at, weight, bias, begin + first_r, H, R,
                BIAS, DTYPE, WIDE, PRECISION, FAST, BH,
            )  # fmt: skip
            square += tl.sum(x * x, 1)
    root = inverse_root(square, FAST)
    tl.store(inverse_norm + place, root, mask=m < M)
    store(vectors, place, M, m, w, root, first_r, R, DTYPE)
    if SEVERAL:  # once more: all of a vector is too much to keep
        for begin in range(BR, R, BR):
            r = begin + first_r
            x = before_unit(
                anchor, a, sample, at, weight, bias, r, H, R, BIAS, DTYPE, WIDE, PRECISION, FAST, BH
            )
            store(vectors, place, M, m, x, root, r, R, DTYPE)
