"""Cosines of positives and negatives outside of the operators."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import make, make_difference, make_instance

from crrcd_ext import functional
from crrcd_ext.modules import cosines

CASES = {
    "relation": lambda **options: make(4, 6, 70, self_pairs=True, **options),
    "relation of the bank": lambda **options: make(
        4, 6, 70, index=False, self_pairs=True, **options
    ),
    "difference": lambda **options: make_difference(4, 6, 70, self_pairs=True, **options),
    "difference of the bank": lambda **options: make_difference(
        4, 6, 70, index=None, self_pairs=True, **options
    ),
    "instance": lambda **options: make_instance(6, 70, **options),
    "instance, shared": lambda **options: make_instance(6, 70, index="shared", **options),
}


@pytest.mark.parametrize("name", CASES)
def test_excluded_goes_by_the_position(name):
    case = CASES[name](excluded=0.4, labels=True)
    of = getattr(cosines, "of_" + name.split()[0].rstrip(","))
    given = {k: v for k, v in case.items() if k not in ("scale", "offset", "objective", "eps")}
    with_bits, without = of(**given), of(**{**given, "excluded": None})
    excluded = functional.unpack_bits(case["excluded"], 70)
    assert 0 < excluded.sum() < excluded.numel()
    for limit in (70 * 6, 13):
        position = with_bits.positions(limit)
        assert torch.equal(position, without.positions(limit))
        (cosine, kept), (same, all_kept) = (c.negative(position) for c in (with_bits, without))
        torch.testing.assert_close(cosine, same)
        assert torch.equal(kept, all_kept & ~excluded[:, position])


def test_positions_are_evenly_spaced():
    case = make_instance(6, 70)
    given = {k: case[k] for k in ("query", "positive", "bank", "index")}
    own = cosines.of_instance(**given)
    shared = cosines.of_instance(**{**given, "index": case["index"][0]})
    assert shared.positions(70).tolist() == list(range(70))
    assert shared.positions(30).tolist() == list(range(0, 70, 3))
    assert own.positions(30).tolist() == list(range(0, 70, 14))  # 30 of them over six queries
    assert own.positions(2).tolist() == [0]
    empty = cosines.of_instance(**{**given, "index": torch.zeros(0).long()})
    assert empty.positions(30).tolist() == []
