"""Before the passes: rows of the bank, gathered and projected, for the keys of a segment."""

from __future__ import annotations

import triton
import triton.language as tl

from crrcd_ext.triton.kernels.features import matrix, positions
from crrcd_ext.triton.kernels.tile import dot, narrow


@triton.jit
def project(
    bank,
    stride,
    index,
    key_weight,  # [H, D]
    rows,  # [.., stride], 0 beyond keys and hidden units
    D,
    H,
    first,
    keys,
    INDEXED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    PROJECTED: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
):
    """X_n = key_weight m_n of a tile of keys and a block of hidden units."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    at = positions(n, first, keys, index, INDEXED)
    total = tl.zeros([BN, BH], WIDE)
    for begin in range(0, D, BD):
        d = begin + tl.arange(0, BD)
        m = tl.load(bank + at[:, None] * stride + d[None, :], mask=(d < D)[None, :], other=0)
        k = matrix(key_weight, h, H, d, D)
        m = m.to(WIDE)
        if tl.float16 == DTYPE:  # narrow would make a number of an infinity
            m += 0.0 * m
        total = dot(narrow(m, DTYPE), tl.trans(k), total, PRECISION)
    # An infinity becomes NaN, which relu(anchor - key) keeps; that one it might cut to 0.
    total += 0.0 * total
    total = tl.where((n < keys)[:, None] & (h < H)[None, :], total, 0.0)
    tl.store(rows + n.to(tl.int64)[:, None] * PROJECTED + h[None, :], total)
