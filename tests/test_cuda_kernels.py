"""The CUDA kernels under the checker: every order of the threads, exact bounds, poisoned memory.

What they compute is tested with the other backends' tests, where the emulation is one more backend.
"""

from __future__ import annotations

import pytest
import torch
from helpers import emulated
from helpers.cases import assert_close, cast, distance, make_instance, run, truth
from helpers.emulated import SCHEDULES, emulation

from crrcd_ext import functional

if emulated.missing is not None:
    pytest.skip(f"no emulation: {emulated.missing}", allow_module_level=True)

CHECKED = "simt checked"
OBJECTIVES = ["nce", "infonce"]
each_schedule = pytest.mark.parametrize("schedule, late", SCHEDULES)


def copied(case: dict) -> dict:
    """The case in new memory, which the checker knows."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in case.items()}


@each_schedule
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("index", ["own", "shared", None])
@pytest.mark.parametrize(
    "sizes", [(5, 70, 17, 90), (67, 130, 36, 150), (3, 40, 200, 50), (2, 33, 600, 40)], ids=str
)
def test_instance_nce_has_no_race_and_stays_in_bounds(sizes, index, objective, schedule, late):
    case = make_instance(*sizes, index=index, objective=objective, ids=True, labels=True)
    true = truth(case)
    for storage, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        with emulation(CHECKED, schedule, seed=3, late=late):
            got = run(copied(cast(case, torch.float64)), CHECKED)
            rounded = cast(case, torch.float32) | {"bank": case["bank"].to(storage)}
            single = run(copied(rounded), CHECKED)
        assert_close(got, true, 1e-11)
        assert_close(single, truth(rounded), tolerance)


@each_schedule
@pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bank_update_has_no_race_and_stays_in_bounds(storage, schedule, late):
    bank, index, value = torch.randn(30, 37), torch.randint(9, (40,)), torch.randn(40, 37)
    banks = {}
    for backend in ("reference", CHECKED):
        with emulation(CHECKED, schedule, seed=5, late=late):
            banks[backend] = bank.to(storage, copy=True)
            functional.bank_update_(
                banks[backend], index.clone(), value.clone(), momentum=0.3, backend=backend
            )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(storage, 2.0**-8)
    assert distance(banks[CHECKED], banks["reference"]) <= tolerance


@each_schedule
def test_every_order_of_the_threads_gives_the_same_bits(schedule, late):
    case = cast(make_instance(40, 200, 70, 90, index="shared"), torch.float32)
    expected = run(case, "simt")
    with emulation("simt", schedule, seed=11, late=late):
        got = run(copied(case), "simt")
    assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("index", ["own", "shared"])
def test_half_precision_operands(index, objective):
    case = cast(make_instance(9, 60, 33, 70, index=index, objective=objective), torch.float16)
    got, true = run(case, "simt"), truth(case)
    assert got["loss"].dtype == torch.float32
    assert_close(got, true, 2e-3)


@pytest.mark.parametrize("index", ["own", "shared"])
@pytest.mark.parametrize("row", [-1, 13, 1 << 40])
def test_a_row_outside_of_the_bank_is_trapped(index, row):
    case = make_instance(index=index)
    case["index"] = case["index"].clone()
    case["index"].view(-1)[-1] = row
    message = r"instance_nce: index: expected rows of the bank in \[0, N\)"
    with pytest.raises(RuntimeError, match=message):
        functional.instance_nce(**case, backend="simt")


@pytest.mark.parametrize("row", [-1, 30])
def test_an_update_outside_of_the_bank_is_trapped(row):
    message = r"bank_update_: index: expected rows of the bank in \[0, N\)"
    with pytest.raises(RuntimeError, match=message):
        functional.bank_update_(
            torch.ones(30, 4),
            torch.tensor([3, row]),
            torch.ones(2, 4),
            momentum=0.5,
            backend="simt",
        )


def test_what_cannot_be_deterministic_says_so():
    case = make_instance()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(
            RuntimeError, match="instance_nce with the bank's gradient and an index"
        ):
            run(case, "simt")
        run(case, "simt", wanted=("query", "positive", "scale", "offset"))
        run(make_instance(index="shared"), "simt")
    finally:
        torch.use_deterministic_algorithms(False)


def test_rows_wider_than_a_block_holds_are_refused():
    message = (
        "instance_nce: query: expected at most 4096 columns with an index for each query, got 4100"
    )
    with pytest.raises(ValueError, match=message):
        functional.instance_nce(**make_instance(2, 3, 4100, 5), backend="simt")
    case = make_instance(2, 3, 4100, 5, index="shared")
    assert_close(run(case, "simt"), truth(case), 1e-10)
