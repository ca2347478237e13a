"""What all kernels share: rounding, products, the loss of a logit, reading rows and masks."""

from __future__ import annotations

import triton
import triton.language as tl

from crrcd_ext.triton import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)
TINY = tl.constexpr(1e-24)
"""Squared norm up to which a vector counts as vanishing."""

NCE = tl.constexpr(0)
"""Sums of softplus, with gradients."""
NORMALISER = tl.constexpr(1)
"""InfoNCE's first sweep: running maximum and sum of exponentials."""
INFONCE = tl.constexpr(2)
"""InfoNCE's second sweep: gradients, from the logarithm of the normaliser."""


@triton.jit
def number(i):
    """A loop's counter as int64, which the interpreter has as a number of Python's."""
    return (tl.program_id(0) * 0 + i).to(tl.int64)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in the operands' dtype, rounded to nearest; far values of float16 stay finite."""
    if tl.float16 == DTYPE:
        keeps: tl.constexpr = tl.PropagateNan.ALL
        x = tl.minimum(tl.maximum(x, -65504.0, keeps), 65504.0, keeps)
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter cuts off instead, and multiplies the bits of bfloat16 as integers: there
        # rounded values stay in float32.
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x.to(tl.float32))
    else:
        return x.to(DTYPE)


# relu(p - x), two at a time: of operands as they are, which rounds once too, and of float32.
_HINGE_BF16 = tl.constexpr(
    "{ .reg .b32 m; mov.b32 m, 0xBF80BF80; fma.rn.relu.bf16x2 $0, $2, m, $1; }"
)
_HINGE_FP16 = tl.constexpr(
    "{ .reg .b32 m, t; mov.b32 m, 0xBC00BC00; fma.rn.relu.f16x2 t, $2, m, $1;"
    " mov.b32 m, 0x7BFF7BFF; min.NaN.f16x2 $0, t, m; }"
)
_HINGE_TO_BF16 = tl.constexpr(
    "{ .reg .f32 a, b; sub.f32 a, $1, $3; sub.f32 b, $2, $4; cvt.rn.relu.bf16x2.f32 $0, b, a; }"
)
_HINGE_TO_FP16 = tl.constexpr(
    "{ .reg .f32 a, b; sub.f32 a, $1, $3; sub.f32 b, $2, $4; min.NaN.f32 a, a, 0f477FE000;"
    " min.NaN.f32 b, b, 0f477FE000; cvt.rn.relu.f16x2.f32 $0, b, a; }"
)


@triton.jit
def hinge(p, x, DTYPE: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr):
    """relu(p - x) in the operands' dtype; NaN stays NaN."""
    if FAST and (tl.bfloat16 == DTYPE or tl.float16 == DTYPE):
        # Not pure, or it would be made anew for each layout that it is wanted in. For loops with
        # products on Blackwell it means one stage.
        if x.dtype == DTYPE:
            return tl.inline_asm_elementwise(
                _HINGE_BF16 if tl.bfloat16 == DTYPE else _HINGE_FP16,
                "=r,r,r",
                [p, x],
                dtype=tl.bfloat16 if tl.bfloat16 == DTYPE else tl.float16,
                is_pure=False,
                pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                _HINGE_TO_BF16 if tl.bfloat16 == DTYPE else _HINGE_TO_FP16,
                "=r,f,f,f,f",
                [p.to(tl.float32), x.to(tl.float32)],
                dtype=tl.bfloat16 if tl.bfloat16 == DTYPE else tl.float16,
                is_pure=False,
                pack=2,
            )
    else:
        d = p.to(WIDE) - x.to(WIDE)
        if tl.float64 == WIDE:  # of which no GPU has a maximum that keeps NaN
            d = tl.where(d < 0, 0.0, d)
        else:
            d = tl.maximum(d, 0.0, tl.PropagateNan.ALL)
        return narrow(d, DTYPE)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b, accumulated in the type of ``total``."""
    if INTERPRETED:
        a = a.to(total.dtype)
        b = b.to(total.dtype)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:  # a division is a subroutine
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def inverse_root(square, FAST: tl.constexpr):
    """1 / sqrt(square), and 0 for what counts as vanishing; NaN stays NaN."""
    vanishing = square <= TINY
    safe = tl.where(vanishing, 1.0, square)
    if FAST:
        root = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [safe], dtype=tl.float32, is_pure=True, pack=1
        )
        root = root * (1.5 - 0.5 * safe * root * root)
    else:
        root = 1.0 / tl.sqrt(safe)
    return tl.where(vanishing, 0.0, root)


@triton.jit
def power(x, FAST: tl.constexpr):
    """2^x. Logits are kept in units of log 2, which saves a product for each of them."""
    if FAST:  # without care for results below 1e-38
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0, to the last digits of small x."""
    y = 1.0 + x
    rounded = y - 1.0  # Kahan: what of x is left in y, whose logarithm is right for it
    return tl.where(rounded == 0, x, tl.log(y) * (x / tl.where(rounded == 0, 1.0, rounded)))


@triton.jit
def sigmoid(s, FAST: tl.constexpr):
    """Sigmoid of s log 2, and what it takes on the way, 2^-|s|."""
    e = power(-tl.abs(s), FAST)
    r = reciprocal(1.0 + e, FAST)
    return tl.where(s >= 0, r, e * r), e


@triton.jit
def halved(x, BESIDE: tl.constexpr):
    """x [n, b] in two halves [n, b / 2]: of BESIDE columns at a time every other."""
    n: tl.constexpr = x.shape[0]
    b: tl.constexpr = x.shape[1]
    x = tl.reshape(x, [n, b // (2 * BESIDE), 2, BESIDE])
    one, other = tl.split(tl.permute(x, [0, 1, 3, 2]))
    return tl.reshape(one, [n, b // 2]), tl.reshape(other, [n, b // 2])


@triton.jit
def softplus(s, product, linear, FAST: tl.constexpr):
    """(slope, product, linear) after one more tile of logits s [n, b], in units of log 2; at
    s = -inf nothing is added and the slope is 0.

    The sum of softplus(s log 2) is the sum of log(1 + product), [n, b / 4], and log 2 times that of
    linear, [n]: with e = 2^-|s| products of all 1 + e are kept, less the 1, so that terms far
    below 1 are not lost and logarithms wait for the end. They grow by at most a factor of 16 a
    tile: see MOST_TILES.
    """
    slope, e = sigmoid(s, FAST)
    even, odd = halved(e, 1)
    even, odd = halved(even * odd + (even + odd), 4)
    both = even * odd + (even + odd)
    product = product * both + (product + both)
    return slope, product, linear + tl.sum(tl.maximum(s, 0.0), 1)


@triton.jit
def softplus_of_each(s, product, linear, FAST: tl.constexpr):
    """The same with product [n, b] and linear [b], from which each query's sum comes."""
    slope, e = sigmoid(s, FAST)
    product = product * e + (product + e)
    return slope, product, linear + tl.sum(tl.maximum(s, 0.0), 0)


@triton.jit
def weighted(slope, weights, at, inside):
    """Derivatives [n, b] times the weights of the pairs ``at`` [b]."""
    return slope * tl.load(weights + at, mask=inside, other=0)[None, :]


@triton.jit
def grown(s, top, total, FAST: tl.constexpr):
    """(top, total), cell by cell the running maximum and sum of 2^(s - top), after s."""
    higher = tl.maximum(top, s)
    base = tl.where(higher == -float("inf"), 0.0, higher)
    return higher, total * power(top - base, FAST) + power(s - base, FAST)


@triton.jit
def grown_by_two(s, top, total, FAST: tl.constexpr):
    """The same of s [n, b] with top and total [n / 2, b], each of two keys, 8 apart, which products
    leave in one thread."""
    n: tl.constexpr = s.shape[0]
    b: tl.constexpr = s.shape[1]
    s = tl.permute(tl.reshape(s, [n // 16, 2, 8, b]), [0, 2, 3, 1])
    one, other = tl.split(s)
    one = tl.reshape(one, [n // 2, b])
    other = tl.reshape(other, [n // 2, b])
    higher = tl.maximum(top, tl.maximum(one, other))
    base = tl.where(higher == -float("inf"), 0.0, higher)
    total = total * power(top - base, FAST) + (power(one - base, FAST) + power(other - base, FAST))
    return higher, total


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MOST_TILES = 30
"""Tiles that a product of softplus may take before it could leave float32."""


@triton.jit
def included(excluded, words, b, queries, entry, BN: tl.constexpr):
    """[n, b]: whether the bits of BN negatives are clear for the queries b. The first is ``entry``,
    int64, counted over all of the call, a multiple of BN, which is a power of two.

    A word of a query has the bits of 32 negatives, so that one is read for all of these.
    """
    n = tl.arange(0, BN)
    word = entry >> 5
    row = excluded + b.to(tl.int64) * words
    bits = tl.load(row + word, mask=b < queries, other=0)[None, :]
    for after in tl.static_range(1, BN // 32):
        inside = (b < queries) & (word + after < words)
        more = tl.load(row + word + after, mask=inside, other=0)
        bits = tl.where((n < 32 * after)[:, None], bits, more[None, :])
    shift = (n + (entry & 31).to(tl.int32)) & 31
    return ((bits >> shift[:, None]) & 1) == 0


@triton.jit
def kept(
    keep,
    b,
    queries,
    entry,
    position,
    query_id,
    key_id,
    query_label,
    key_label,
    excluded,  # [B, words] int32, a bit a negative
    words,
    ID: tl.constexpr,
    NAMED: tl.constexpr,
    LABEL: tl.constexpr,
    EXCLUDED: tl.constexpr,
):
    """keep [n, b], less the negatives that are the query's own, by their ids, or of its class, or
    that have their bit set.

    ``entry`` is the first of them, see included, and ``position`` [n] are their rows of the bank,
    of which none lies outside; with NAMED their ids are in key_id.
    """
    if ID:
        name = position
        if NAMED:
            name = tl.load(key_id + position)
        own = tl.load(query_id + b, mask=b < queries, other=0)
        keep = keep & (own[None, :] != name[:, None])
    if LABEL:
        own = tl.load(query_label + b, mask=b < queries, other=0)
        keep = keep & (own[None, :] != tl.load(key_label + position)[:, None])
    if EXCLUDED:
        keep = keep & included(excluded, words, b, queries, entry, position.shape[0])
    return keep
