"""The bank's update, a row each program."""

from __future__ import annotations

import triton
import triton.language as tl

from crrcd_ext.triton.kernels.tile import TINY, narrow


@triton.jit
def blend(row, d, D, step, value, update, momentum, KEEPS: tl.constexpr, WIDE: tl.constexpr):
    inside = d < D
    kept = tl.load(momentum).to(WIDE)
    new = (1.0 - kept) * tl.load(value + update * D + d, mask=inside, other=0).to(WIDE)
    if KEEPS:  # 0 times an infinity that the row holds would be NaN
        new += kept * tl.load(row + d * step, mask=inside, other=0).to(WIDE)
    return tl.where(inside, new, 0.0)


@triton.jit
def bank_update(
    bank,
    stride,
    step,
    index,
    last,  # [N] the update that wins a row
    value,
    momentum,  # [] float64, as numbers come to kernels in float32
    D,
    NORMALIZE: tl.constexpr,
    KEEPS: tl.constexpr,
    WIDE: tl.constexpr,
    BD: tl.constexpr,
):
    """m <- unit(momentum m + (1 - momentum) value)."""
    update = tl.program_id(0).to(tl.int64)
    at = tl.load(index + update)
    if tl.load(last + at) == update:
        row = bank + at * stride
        factor = tl.full([1], 1.0, WIDE)
        if NORMALIZE:
            square = tl.zeros([BD], WIDE)
            for begin in range(0, D, BD):
                d = begin + tl.arange(0, BD)
                new = blend(row, d, D, step, value, update, momentum, KEEPS, WIDE)
                square += new * new
            total = tl.sum(square, 0)
            vanishing = total <= TINY
            factor = tl.where(vanishing, 0.0, 1.0 / tl.sqrt(tl.where(vanishing, 1.0, total)))
        for begin in range(0, D, BD):
            d = begin + tl.arange(0, BD)
            new = blend(row, d, D, step, value, update, momentum, KEEPS, WIDE)
            new *= factor
            if tl.float16 != bank.dtype.element_ty:  # there what is too far becomes infinite
                new = narrow(new, bank.dtype.element_ty)
            tl.store(row + d * step, new.to(bank.dtype.element_ty), mask=d < D)
