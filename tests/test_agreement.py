"""All backends give one loss and one set of gradients: a random sweep over their options."""

from __future__ import annotations

import pytest
from helpers.cases import BACKENDS, assert_close, make, make_difference, make_instance, run
from helpers.emulated import EMULATED
from helpers.interpreted import INTERPRETED
from hypothesis import given, note, settings
from hypothesis import strategies as st

OTHERS = [name for name in BACKENDS if name != "reference"] + EMULATED + INTERPRETED

sizes = st.integers(1, 9)
keys = st.integers(1, 40)
rows = st.integers(1, 30)
widths = st.integers(1, 20)
SHARED = {
    "B": sizes,
    "K": keys,
    "D": widths,
    "N": rows,
    "seed": st.integers(0, 2**32 - 1),
    "ids": st.booleans(),
    "labels": st.booleans(),
    "excluded": st.sampled_from([0.0, 0.3]),
    "scale": st.sampled_from([-3.0, 0.0, 1.0, 14.0, 40.0]),
    "offset": st.sampled_from([-2.0, 0.0, 3.0]),
    "objective": st.sampled_from(["nce", "infonce"]),
}
RELATIONS = {"A": sizes, "self_pairs": st.booleans()}
OPERATORS = {
    "relation_nce": (
        make,
        SHARED
        | RELATIONS
        | {"H": widths, "R": widths}
        | dict.fromkeys(("bias", "key_weight", "index"), st.booleans()),
    ),
    "instance_nce": (make_instance, SHARED | {"index": st.sampled_from([None, "shared", "own"])}),
    "difference_nce": (
        make_difference,
        SHARED
        | RELATIONS
        | {
            "index": st.sampled_from([None, "shared", "own"]),
            "eps": st.sampled_from([0.0, 1e-3]),
            "D": st.integers(2, 20),  # on a line no direction has a gradient, but for roundings
        },
    ),
}


@pytest.mark.skipif(not OTHERS, reason="needs a backend beside the reference")
@pytest.mark.parametrize("operator", OPERATORS)
def test_backends_agree(operator):
    make_case, drawn = OPERATORS[operator]

    # a failure prints the arguments of make_case, its seed among them
    @settings(max_examples=20, deadline=None, print_blob=True)
    @given(st.fixed_dictionaries(drawn))
    def agree(arguments):
        case = make_case(**arguments)
        expected = run(case, "reference")
        for backend in OTHERS:
            note(f"backend: {backend}")
            assert_close(run(case, backend), expected, 1e-9)

    agree()
