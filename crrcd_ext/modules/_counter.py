"""Counter-based random numbers on int64 tensors.

A number is a hash of (seed, step, position), so the state of a stream is two integers that live in
a state_dict, the numbers are made on the device that needs them, and nothing is read back to the
host. The hash is splitmix64 (Steele, Lea, Flood, 2014); int64 products wrap as unsigned ones do,
and a right shift is made logical by a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_SEED_FACTOR = _signed(0xD1342543DE82EF95)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _xor_shift_(x: Tensor, bits: int) -> Tensor:
    shifted = torch.bitwise_right_shift(x, bits).bitwise_and_((1 << (64 - bits)) - 1)
    return x.bitwise_xor_(shifted)


def hashes(seed: Tensor, step: Tensor, count: int) -> Tensor:
    """int64 [count]: well mixed 64-bit words; `seed` and `step` are int64 scalars on one device.

    The last xor-shift of splitmix64 only touches the low half and is left out: callers use the
    high bits.
    """
    key = seed * _SEED_FACTOR
    key = key.add_(step * _GOLDEN)
    key = _xor_shift_(key, 30).mul_(_FIRST)
    key = _xor_shift_(key, 27).mul_(_SECOND)
    key = _xor_shift_(key, 31)
    # The key comes before the product: torch.compile would fold a product of an arange and a number
    # into signed index arithmetic, where the wrap-around is undefined and GCC breaks the loop.
    x = torch.arange(count, dtype=torch.int64, device=seed.device).add_(key).mul_(_GOLDEN)
    x = _xor_shift_(x, 30).mul_(_FIRST)
    return _xor_shift_(x, 27).mul_(_SECOND)


def uniform_index(seed: Tensor, step: Tensor, count: int, bound: int) -> Tensor:
    """int64 [count], uniform over [0, bound) with replacement.

    53 random bits times bound / 2^53 in float64: the product stays below `bound` after rounding,
    and a row's probability is off by at most bound / 2^53 of itself.
    """
    x = hashes(seed, step, count).bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1)
    return x.to(torch.float64).mul_(bound * 2.0**-53).to(torch.int64)


def distinct_index(seed: Tensor, step: Tensor, count: int, bound: int) -> Tensor:
    """int64 [count], distinct members of [0, bound) in random order: a uniformly drawn subset."""
    return hashes(seed, step, bound).topk(count).indices
