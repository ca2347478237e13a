"""Counter-based random numbers on int64 tensors.

A number is a hash of (seed, step, position), so the state of a stream is two integers that live in
a state_dict, the numbers are made on the device that needs them, and nothing is read back from it.
The hash is splitmix64 (Steele, Lea, Flood, 2014); int64 products wrap as unsigned ones do, and a
right shift is made logical by a mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crrcd_ext._backend import compiled


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_SEED_FACTOR = _signed(0xD1342543DE82EF95)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _xor_shift_(x: Tensor, bits: int) -> Tensor:
    shifted = torch.bitwise_right_shift(x, bits).bitwise_and_((1 << (64 - bits)) - 1)
    return x.bitwise_xor_(shifted)


def _mixed_(x: Tensor) -> Tensor:
    """splitmix64's finaliser, in place, of words that are a key and a counter.

    Its last xor-shift only touches the low half and is left out: callers use the high bits.
    """
    x = x.mul_(_GOLDEN)
    x = _xor_shift_(x, 30).mul_(_FIRST)
    return _xor_shift_(x, 27).mul_(_SECOND)


def _scaled_(words: Tensor, bound: int | Tensor) -> Tensor:
    """int64 in [0, bound) from the high bits of random words, which it overwrites.

    53 random bits times bound / 2^53 in float64: the product stays below `bound` after rounding,
    and a number's probability is off by at most bound / 2^53 of itself.
    """
    x = words.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1)
    return x.to(torch.float64).mul_(bound * 2.0**-53).to(torch.int64)


def hashes(seed: Tensor, step: Tensor, count: int) -> Tensor:
    """int64 [count]: well mixed 64-bit words; `seed` and `step` are int64 scalars on one device."""
    key = seed * _SEED_FACTOR
    key = key.add_(step * _GOLDEN)
    key = _xor_shift_(key, 30).mul_(_FIRST)
    key = _xor_shift_(key, 27).mul_(_SECOND)
    key = _xor_shift_(key, 31)
    # The key comes before the product: torch.compile would fold a product of an arange and a number
    # into signed index arithmetic, where the wrap-around is undefined and GCC breaks the loop.
    return _mixed_(torch.arange(count, dtype=torch.int64, device=seed.device).add_(key))


def uniform_index(
    seed: Tensor, step: Tensor, shape: int | tuple[int, ...], bound: int | Tensor
) -> Tensor:
    """int64 of `shape`, uniform over [0, bound) with replacement.

    `bound` may be an int64 tensor that broadcasts to `shape`.
    """
    shape = (shape,) if isinstance(shape, int) else shape
    if (
        compiled is not None
        and isinstance(bound, int)
        and seed.device.type == "cpu"
        and not torch.compiler.is_compiling()
    ):  # the same bits, whatever backend the losses have
        drawn = torch.ops.crrcd_counter.uniform_index(seed, step, math.prod(shape), bound)
        return drawn.view(shape)
    return _scaled_(hashes(seed, step, math.prod(shape)).view(shape), bound)


def distinct_index(
    seed: Tensor,
    step: Tensor,
    shape: int | tuple[int, int],
    bound: int | Tensor,
    largest: int | None = None,
) -> Tensor:
    """int64 [count] or [rows, count]: in each row distinct members of [0, bound), in random order.

    A subset drawn uniformly. `bound` is a number, or int64 [rows, 1] with entries from count to
    `largest`. Costs O(largest) for a row.
    """
    largest = bound if largest is None else largest
    if isinstance(shape, int):
        return hashes(seed, step, largest).topk(shape).indices
    rows, count = shape
    words = hashes(seed, step, rows * largest).view(rows, largest)
    if isinstance(bound, Tensor):
        position = torch.arange(largest, device=seed.device)
        words = words.masked_fill(position >= bound, torch.iinfo(torch.int64).min)
    return words.topk(count).indices


_ROUNDS = 6
"""Of the permutation. Chi-square tests of pairs and triples see a flaw in four, none in five."""


def permuted_index(
    seed: Tensor, step: Tensor, shape: tuple[int, int], bound: int | Tensor, largest: int
) -> Tensor:
    """int64 [rows, count]: as :func:`distinct_index`, in O(count + sqrt(largest)) for a row.

    The first members of a pseudo-random permutation, which needs a `largest` of thousands to look
    like a random one.

    A Feistel network permutes a rectangle [a] x [b] of a b >= bound cells, a = ceil(sqrt(bound)):
    rounds add a keyed hash of one coordinate to the other. Fewer than a of its cells lie outside
    of the bound, so that of count + a cells in a row at least count lie inside; they move up.
    """
    rows, count = shape
    device = seed.device
    if not isinstance(bound, Tensor):
        bound = torch.full((1, 1), bound, dtype=torch.int64, device=device)
    a = bound.to(torch.float64).sqrt_().ceil_().to(torch.int64)
    b = (bound + a - 1) // a
    position = torch.arange(count + math.isqrt(largest) + 1, device=device)
    cell = position.expand(rows, -1)
    first, second = cell // b, cell % b
    keys = hashes(seed, step, _ROUNDS * rows).view(_ROUNDS, rows, 1)
    for turn, key in enumerate(keys):
        if turn % 2 == 0:
            first = _shifted(first, second, key, a)
        else:
            second = _shifted(second, first, key, b)
    image = first * b + second
    # Positions past the rectangle, where a row has them, come after enough that lie inside.
    inside = image < bound
    rank = inside.cumsum(1)
    target = torch.where(inside, rank - 1, cell.shape[1] - 1 - (cell - rank))
    return torch.empty_like(image).scatter_(1, target, image)[:, :count]


def _shifted(x: Tensor, other: Tensor, key: Tensor, size: Tensor) -> Tensor:
    """(x + hash(key, other)) mod size, for x in [0, size)."""
    x = x + _scaled_(_mixed_(other + key), size)
    return torch.where(x >= size, x - size, x)
