"""Bits of the rows whose products with a query are above a threshold: of the rows for all queries
alike, and of each query's own.

Names of sizes as in instance.py; BN is a multiple of the 32 rows that a word has bits for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crrcd_ext.triton.kernels.features import matrix, positions
from crrcd_ext.triton.kernels.instance import gathered
from crrcd_ext.triton.kernels.tile import dot


@triton.jit
def packed(above):
    """Words [n / 32, b] of above [n, b], bits in the order of the rows."""
    words: tl.constexpr = above.shape[0] // 32
    bits = tl.reshape(above.to(tl.int32), [words, 32, above.shape[1]])
    return tl.sum(bits << tl.arange(0, 32)[None, :, None], 1).to(tl.int32)


@triton.jit
def shared(
    query,  # [B, D]
    bank,
    stride,
    index,  # [K] rows of the bank
    threshold,
    bits,  # [B, words]
    B,
    D,
    keys,
    words,
    INDEXED: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BD: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
):
    """A tile of rows meets a block of queries."""
    tile = tl.program_id(0).to(tl.int64)
    n = tile * BN + tl.arange(0, BN)
    b = tl.program_id(1).to(tl.int64) * BB + tl.arange(0, BB)
    position = positions(n, 0, keys, index, INDEXED)
    product = tl.zeros([BN, BB], WIDE)
    for block in range(0, D, BD):
        d = block + tl.arange(0, BD)
        x = gathered(bank, stride, position, d, D, WHOLE, WIDE)
        product = dot(x, tl.trans(matrix(query, b, B, d, D)), product, "ieee")
    above = (product > tl.load(threshold)) & (n < keys)[:, None]
    word = tile * (BN // 32) + tl.arange(0, BN // 32)
    cells = (word < words)[:, None] & (b < B)[None, :]
    tl.store(bits + b[None, :] * words + word[:, None], packed(above), mask=cells)


@triton.jit
def own(
    query,  # [B, D]
    bank,
    stride,
    index,  # [B, K] rows of the bank
    index_stride,
    index_step,
    threshold,
    bits,  # [B, words]
    D,
    keys,
    words,
    tiles,  # of a query's rows
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """One query, a tile of its rows."""
    b = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    n = tile * BN + tl.arange(0, BN)
    present = n < keys
    position = tl.load(index + b * index_stride + n * index_step, mask=present, other=0)
    product = tl.zeros([BN], WIDE)
    for block in range(0, D, BD):
        d = block + tl.arange(0, BD)
        q = tl.load(query + b * D + d, mask=d < D, other=0)
        x = gathered(bank, stride, position, d, D, WHOLE, WIDE)
        product += tl.sum(x * q[None, :], 1)
    above = (product > tl.load(threshold)) & present
    word = tile * (BN // 32) + tl.arange(0, BN // 32)
    place = bits + b * words + word
    tl.store(place[:, None], packed(above[:, None]), mask=(word < words)[:, None])
