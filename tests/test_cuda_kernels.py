"""The CUDA kernels under the checker: every order of the threads, exact bounds, poisoned memory.

What they compute is tested with the other backends' tests, where the emulation is one more backend.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import emulated
from helpers.cases import (
    DIFFERENTIABLE,
    assert_close,
    assert_within_budget,
    cast,
    distance,
    make,
    make_difference,
    make_instance,
    run,
    truth,
)
from helpers.emulated import SCHEDULES, emulation

from crrcd_ext import functional

if emulated.missing is not None:
    pytest.skip(f"no emulation: {emulated.missing}", allow_module_level=True)

CHECKED = "simt checked"
OBJECTIVES = ["nce", "infonce"]
each_schedule = pytest.mark.parametrize("schedule, late", SCHEDULES)


def excluding(case: dict, share: float = 0.3) -> dict:
    """The case with some negatives of each query left out by their bits."""
    negatives = len(case["bank"]) if case["index"] is None else case["index"].shape[-1]
    g = torch.Generator().manual_seed(negatives)
    drawn = torch.rand(case["query"].shape[-2], negatives, generator=g) < share
    return case | {"excluded": functional.pack_bits(drawn)}


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
    case = excluding(case)
    true = truth(case)
    for storage, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        with emulation(CHECKED, schedule, seed=3, late=late):
            got = run(copied(cast(case, torch.float64)), CHECKED)
            rounded = cast(case, torch.float32) | {"bank": case["bank"].to(storage)}
            single = run(copied(rounded), CHECKED)
        assert_close(got, true, 1e-11)
        assert_close(single, truth(rounded), tolerance)


@each_schedule
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("index", ["own", "shared", None])
def test_weights_have_no_race_and_stay_in_bounds(index, objective, schedule, late):
    # Two tiles of keys and of queries; rows of a block; no query, no negative.
    for sizes in [(66, 67, 5, 70), (2, 40, 600, 50), (0, 7, 5, 9), (5, 0, 7, 9)]:
        case = make_instance(*sizes, index=index, objective=objective)
        case["weights"] = torch.linspace(-1, 2, sizes[0]).double()
        for reduction in ("mean", "none"):
            given = case | {"reduction": reduction}
            wanted = ("query", "positive") if reduction == "none" else DIFFERENTIABLE
            with emulation(CHECKED, schedule, seed=4, late=late):
                got = run(copied(given), CHECKED, wanted=wanted)
            assert_close(got, truth(given, wanted=wanted), 1e-11)


@each_schedule
@pytest.mark.parametrize("index", ["own", "shared", None])
@pytest.mark.parametrize(
    "sizes", [(5, 70, 17, 90), (67, 130, 36, 150), (3, 40, 200, 50), (2, 1, 1, 3)], ids=str
)
def test_similar_mask_has_no_race_and_stays_in_bounds(sizes, index, schedule, late):
    case = make_instance(*sizes, index=index)
    operands = {k: case[k] for k in ("query", "bank", "index")}
    for dtype, storage, threshold in (  # below 0 lies what stands beyond the last row
        (torch.float64, torch.float64, 0.1),
        (torch.float32, torch.float32, -0.2),
        (torch.float32, torch.bfloat16, 0.1),
        (torch.float64, torch.float16, -0.2),
    ):
        given = cast(operands, dtype) | {"bank": case["bank"].to(storage)}
        with emulation(CHECKED, schedule, seed=3, late=late):
            got = functional.similar_mask(**copied(given), threshold=threshold, backend=CHECKED)
        expected = functional.similar_mask(**given, threshold=threshold, backend="reference")
        assert torch.equal(got, expected)


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


# How relation_nce multiplies, and how far it may be from the truth for that.
PRECISIONS = {
    "float64": (torch.float64, "highest", 1e-11),
    "float32": (torch.float32, "highest", 2e-5),
    "tf32": (torch.float32, "high", 3e-2),  # keys near an anchor change sides of the ReLU
    "bfloat16 products": (torch.float32, "medium", 6e-2),
    "bfloat16": (torch.bfloat16, "highest", 6e-2),
    "float16": (torch.float16, "highest", 2e-2),
}
each_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())


@contextmanager
def emulated_gpu(precision: str = "highest", shared_kilobytes: int = 99) -> Iterator[None]:
    """torch's setting of float32 products, and a GPU whose blocks have so much shared memory."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    for name in emulated.NAMES:
        emulated.library(name).set_shared_bytes(shared_kilobytes * 1024)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for name in emulated.NAMES:
            emulated.library(name).set_shared_bytes(99 * 1024)


@contextmanager
def segments_of(keys: int) -> Iterator[None]:
    """relation_nce works off so many keys at a time."""
    for name in emulated.NAMES:
        emulated.library(name).set_segment(keys)
    try:
        yield
    finally:
        for name in emulated.NAMES:
            emulated.library(name).set_segment(0)


@contextmanager
def deterministic(warn_only: bool = False) -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def settled(case: dict) -> dict:
    """Hidden vectors away from zero, where they have a direction in two-byte numbers."""
    return case | {"anchor": case["anchor"] + 1.0}


@each_schedule
@each_precision
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_relation_nce_has_no_race_and_stays_in_bounds(precision, objective, schedule, late):
    dtype, setting, tolerance = precision
    sizes = [(2, 5, 70, 17, 9, 11, 40), (3, 67, 33, 40, 24, 20, 50)]
    for A, B, K, H, R, D, N in sizes:
        case = make(A, B, K, H, R, D, N, ids=True, labels=True, objective=objective)
        case = cast(settled(excluding(case)), dtype)
        true, plain = truth(case), run(case, "reference")
        with emulated_gpu(setting), emulation(CHECKED, schedule, seed=7, late=late):
            got = run(copied(case), CHECKED)
        assert_close(got, true, tolerance, plain)


# Sizes that lead to every layout: everything resident, pieces that come and go, one warp a block.
LAYOUTS = [(96, 100, 72), (64, 130, 150), (227, 260, 70), (227, 100, 72), (48, 72, 40)]


@each_precision
@pytest.mark.parametrize("shared_kilobytes, hidden, relation", LAYOUTS)
def test_every_layout_of_relation_nce(precision, shared_kilobytes, hidden, relation):
    dtype, setting, tolerance = precision
    case = cast(settled(make(2, 9, 100, hidden, relation, 40, 150, index=False)), dtype)
    true, plain = truth(case), run(case, "reference")
    with (
        emulated_gpu(setting, shared_kilobytes),
        emulation(CHECKED, "random", seed=shared_kilobytes, late=True),
    ):
        got = run(copied(case), CHECKED)
    assert_close(got, true, tolerance, plain)


@each_precision
@pytest.mark.parametrize("queries, hidden", [(64, 64), (65, 64), (64, 65), (64, 128), (64, 129)])
def test_either_order_of_the_passes_of_relation_nce(precision, queries, hidden):
    """Norms come from the keys' pass or from the queries', by the numbers of both."""
    dtype, setting, tolerance = precision
    case = cast(settled(make(2, queries, 150, hidden, 40, 24, 160, ids=True)), dtype)
    true, plain = truth(case), run(case, "reference")
    with (
        emulated_gpu(setting, shared_kilobytes=227),
        emulation(CHECKED, "random", seed=queries, late=True),
    ):
        library = emulated.library(CHECKED)
        library.launched()
        got = run(copied(case), CHECKED)
    passes = [name for name in library.launched() if name in ("relation_keys", "relation_logits")]
    if dtype.itemsize > 2 and setting == "highest":
        assert passes == ["relation_logits"]
    elif queries <= 64 and hidden <= (64 if setting == "high" else 128):
        assert passes == ["relation_keys", "relation_logits"]  # a block has all of both
    else:
        assert passes == ["relation_logits", "relation_keys"]
    assert_close(got, true, tolerance, plain)


def annihilated(step: float, bias: bool) -> dict:
    """Keys whose hidden vectors have a part of which W makes zero, up to many times as long as the
    rest; every third has no such part, every seventh a hidden vector of zeros."""
    A, B, K, H, R = 3, 20, 170, 63, 48
    g = torch.Generator().manual_seed(5)
    one, two = torch.randint(-64, 65, (2, R, H // 3), generator=g).double() / 128
    weight = torch.stack([one, two, -one - two], dim=2).flatten(1)
    few = torch.randint(-4, 5, (A + K, H), generator=g).double() * step
    bank = few[A:] - 1
    bank[::3] = 2 * torch.randn(bank[::3].shape, generator=g, dtype=torch.float64)
    bank[::7] = 9
    # rows of W, so that what is made of queries and W is exact
    query = torch.nn.functional.one_hot(torch.randint(R, (A, B), generator=g), R).double()
    case = make(A, B, K, H, R, H, key_weight=False, index=False, bias=False)
    case |= {"query": query, "anchor": few[:A] + 1, "bank": bank, "weight": weight}
    return case | (
        {"bias": step * torch.randint(-4, 5, (R,), generator=g).double()} if bias else {}
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "precision, step", [("tf32", 2.0**-9), ("bfloat16", 2.0**-6), ("float16", 2.0**-7)]
)
def test_norms_of_hidden_vectors_that_the_weight_annihilates(precision, step, objective, bias):
    dtype, setting, _ = PRECISIONS[precision]
    case = cast(annihilated(step, bias) | {"objective": objective}, dtype)
    true = truth(case)
    with emulated_gpu(setting, shared_kilobytes=227), emulation(CHECKED):
        got = run(copied(case), CHECKED)
    # W'W hid itself, of which norms do not come here, cancels in the gradients of both sides of hid
    for names, tolerance in ((set(true) - {"anchor", "bank"}, 1e-2), (("anchor", "bank"), 1e-1)):
        assert_close(got, {k: true[k] for k in names}, tolerance)


def two_kinds_of_columns(shift: float) -> dict:
    """A weight whose columns are nearly one vector and its opposite: hidden vectors with as much of
    the one as of the other nearly vanish, and W'W has few values, which are all rounded alike."""
    A, B, K, H, R = 3, 20, 170, 64, 48
    g = torch.Generator().manual_seed(6)
    signs = torch.ones(H, dtype=torch.float64)
    signs[1::2] = shift - 1
    weight = torch.randn(R, 1, generator=g, dtype=torch.float64) * signs
    case = make(A, B, K, H, R, H, key_weight=False, index=False, bias=False)
    anchor = 1 + 0.02 * torch.randn(A, H, generator=g, dtype=torch.float64)
    bank = 0.02 * torch.randn(K, H, generator=g, dtype=torch.float64)
    return case | {"anchor": anchor, "bank": bank, "weight": weight}


@pytest.mark.parametrize("shift", [0.02, 0.06, 0.1, 0.14, 0.2, 0.26])
def test_norms_where_the_product_of_the_weight_is_rounded_one_way(shift):
    case = cast(two_kinds_of_columns(shift), torch.bfloat16)
    true = truth(case)
    with emulated_gpu("highest", shared_kilobytes=227), emulation("simt"):
        got = run(copied(case), "simt")
    assert_close(got, {k: true[k] for k in ("loss", "scale", "offset")}, 3e-2)
    # <hid, QW> cancels as the norm does
    assert_close(got, {"query": true["query"]}, 1e-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("queries", [20, 70])
@pytest.mark.parametrize("length", [300, 255.98, 1e-3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_product_of_the_weight_beyond_float16(objective, length, queries, bias):
    case = make(3, queries, 170, 64, 48, 64, index=False, bias=bias, objective=objective)
    if length > 1:
        case["weight"][:, 5] *= length / case["weight"][:, 5].norm()
    else:
        for name in ("weight", "bias") if bias else ("weight",):
            case[name] = case[name] * (length / case["weight"].norm(dim=0).max())
    case = cast(case, torch.float16)
    true, plain = truth(case), run(case, "reference")
    with emulated_gpu("highest", shared_kilobytes=227), emulation("simt"):
        got = run(copied(case), "simt")
    keys = ("anchor", "bank", "key_weight")  # some near an anchor change sides of the ReLU
    assert_close(got, {k: true[k] for k in true if k not in keys}, 1e-2)
    assert_close(got, true, 1e-2, plain)


@each_precision
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_relation_nce_in_several_segments(precision, objective):
    # So many hidden units that the keys do not fit in one segment.
    dtype, setting, tolerance = precision
    case = make(2, 3, 1300, 16, 16, 8, 1500, ids=True, objective=objective)
    case = cast(settled(case), dtype)
    true, plain = truth(case), run(case, "reference")
    with emulated_gpu(setting), segments_of(512), emulation("simt"):
        got = run(copied(case), "simt")
    assert_close(got, true, tolerance, plain)


@each_precision
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_relation_nce_excludes_by_the_place_among_all(precision, objective, index):
    """Two panels of queries, three segments of keys; nothing else is masked."""
    dtype, setting, tolerance = precision
    case = excluding(make(2, 70, 300, 17, 9, 11, 350, index=index, objective=objective), 0.5)
    case = cast(settled(case), dtype)
    true, plain = truth(case), run(case, "reference")
    assert abs(true["loss"] - truth(case | {"excluded": None})["loss"]) > 0.2
    with emulated_gpu(setting), segments_of(128), emulation("simt"):
        got = run(copied(case), "simt")
    assert_close(got, true, tolerance, plain)


@each_precision
@pytest.mark.parametrize("keys, segment", [(150, 128), (300, 256)])
def test_blocks_without_a_tile_leave_no_copy_under_way(precision, keys, segment):
    """The last segment has fewer tiles, of the logits' and of the keys' pass, than blocks."""
    dtype, setting, tolerance = precision
    case = cast(settled(make(1, 8, keys, 40, 40, 24, 300, self_pairs=True)), dtype)
    true, plain = truth(case), run(case, "reference")
    with emulated_gpu(setting), segments_of(segment), emulation("simt"):
        got = run(copied(case), "simt")
    assert_close(got, true, tolerance, plain)


@pytest.mark.parametrize("objective", OBJECTIVES)
@each_precision
def test_relation_nce_has_the_same_bits_in_every_order(precision, objective):
    dtype, setting, _ = precision
    case = cast(settled(make(4, 20, 200, 40, 33, 24, 300, objective=objective)), dtype)
    with emulated_gpu(setting):
        expected = run(case, "simt")
        for schedule, late in SCHEDULES:
            with emulation("simt", schedule, seed=13, late=late):
                got = run(copied(case), "simt")
            assert all(torch.equal(got[k], expected[k]) for k in expected), schedule


DIFFERENCE_CLOSE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 2e-2}
DIFFERENCE_WANTED = ("query", "positive", "anchor", "bank", "scale", "offset")


def close_to_anchors(case: dict) -> dict:
    """Some keys and a query whose differences from an anchor are taken one by one."""
    case["bank"][3::7] = case["anchor"][0] + 0.02 * case["bank"][3::7]
    case["query"][0] = case["anchor"][-1] + 0.02 * case["query"][0]
    return case


@each_schedule
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("index", ["own", "shared", None])
def test_difference_nce_has_no_race_and_stays_in_bounds(index, objective, schedule, late):
    queries = 9 if index == "own" else 67
    sizes = [(5, 6, 70, 17, 90), (70, queries, 40, 9, 50), (3, 2, 33, 70, 40)]
    for (dtype, tolerance), size in zip(DIFFERENCE_CLOSE.items(), sizes, strict=True):
        case = make_difference(*size, index=index, objective=objective, ids=True, labels=True)
        case = cast(close_to_anchors(excluding(case)), dtype)
        plain = run(case, "reference", wanted=DIFFERENCE_WANTED)
        with emulation(CHECKED, schedule, seed=3, late=late):
            got = run(copied(case), CHECKED, wanted=DIFFERENCE_WANTED)
        assert_close(got, truth(case, wanted=DIFFERENCE_WANTED), tolerance, plain)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("index", ["own", "shared", None])
def test_difference_nce_in_several_segments(index, objective):
    queries = 11 if index == "own" else 70
    case = make_difference(9, queries, 200, 20, 230, index=index, objective=objective, ids=True)
    case = close_to_anchors(excluding(case))
    with segments_of(96), emulation("simt"):
        got = run(copied(case), "simt", wanted=DIFFERENCE_WANTED)
    assert_close(got, truth(case, wanted=DIFFERENCE_WANTED), 1e-10)


@each_schedule
@pytest.mark.parametrize("index", ["own", "shared"])
def test_difference_nce_has_the_same_bits_in_every_order(index, schedule, late):
    case = cast(close_to_anchors(make_difference(40, 20, 70, 24, 90, index=index)), torch.float32)
    wanted = ("query", "positive", "anchor", "scale", "offset")
    expected = run(case, "simt", wanted=wanted)
    with emulation("simt", schedule, seed=17, late=late):
        got = run(copied(case), "simt", wanted=wanted)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("index", ["own", "shared"])
def test_difference_nce_with_half_precision_operands(index):
    case = cast(make_difference(9, 8, 60, 33, 70, index=index), torch.float16)
    got = run(case, "simt", wanted=DIFFERENCE_WANTED)
    assert got["loss"].dtype == torch.float32
    assert_close(got, truth(case, wanted=DIFFERENCE_WANTED), 2e-3)


@pytest.mark.parametrize("index", ["own", "shared"])
@pytest.mark.parametrize("row", [-1, 13, 1 << 40])
def test_difference_nce_traps_a_row_outside_of_the_bank(index, row):
    case = make_difference(index=index)
    case["index"] = case["index"].clone()
    case["index"].view(-1)[-1] = row
    message = r"difference_nce: index: expected rows of the bank in \[0, N\)"
    with pytest.raises(RuntimeError, match=message):
        functional.difference_nce(**case, backend="simt")


@each_precision
@pytest.mark.parametrize("row", [-1, 13, 1 << 40])
def test_relation_nce_traps_a_row_outside_of_the_bank(row, precision):
    dtype, setting, _ = precision
    case = cast(make(), dtype)
    case["index"] = case["index"].clone()
    case["index"][-1] = row
    message = r"relation_nce: index: expected rows of the bank in \[0, N\)"
    with emulated_gpu(setting), pytest.raises(RuntimeError, match=message):
        functional.relation_nce(**case, backend="simt")


def test_relation_nce_takes_more_panels_of_queries_than_a_grid_is_high():
    case = make(1, 32 * 65535 + 1, 1, 1, 1, 1, 2, ids=True, bias=False)
    assert_close(run(case, "simt", wanted=("query",)), truth(case, wanted=("query",)), 1e-11)


def test_relation_nce_refuses_more_anchors_than_it_counts():
    anchor = torch.zeros(1 << 23, 1, requires_grad=True)
    query = torch.zeros(1 << 23, 1, 1)
    message = "relation_nce: query: expected .* up to 4194304 anchors, got 1 and 8388608"
    with pytest.raises(ValueError, match=message):
        functional.relation_nce(
            query,
            query,
            anchor,
            torch.zeros(1024, 1),
            torch.ones(1, 1),
            scale=1.0,
            offset=0.0,
            self_pairs=True,
            backend="simt",
        )


def test_relation_nce_wider_than_shared_memory_is_refused():
    case = cast(make(2, 3, 20, 400, 8, 5, 30), torch.float64)
    message = "relation_nce: anchor: expected widths whose tiles fit this GPU's shared memory"
    with emulated_gpu(shared_kilobytes=48), pytest.raises(ValueError, match=message):
        functional.relation_nce(**case, backend="simt")
    # with others to choose from the next one takes it; the bank is updated once
    case["update"] = (torch.tensor([3, 1]), torch.randn(2, 5, dtype=torch.float64), 0.5)
    left, plain = copied(case), copied(case)
    with emulated_gpu(shared_kilobytes=48):
        got = functional.relation_nce(**left, backend="simt,reference")
    assert torch.equal(got, functional.relation_nce(**plain, backend="reference"))
    assert torch.equal(left["bank"], plain["bank"]) and not torch.equal(left["bank"], case["bank"])


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


@pytest.mark.parametrize("index, dim", [("own", 8), ("own", 600), ("own", 4100), ("shared", 8)])
@pytest.mark.parametrize("row", [-1, 13, 1 << 40])
def test_a_row_outside_of_the_bank_is_trapped(index, dim, row):
    case = make_instance(D=dim, index=index)
    case["index"] = case["index"].clone()
    case["index"].view(-1)[-1] = row
    message = r"instance_nce: index: expected rows of the bank in \[0, N\)"
    with pytest.raises(RuntimeError, match=message):
        functional.instance_nce(**case, backend="simt")
    with deterministic(), pytest.raises(RuntimeError, match=message):
        run(case, "simt")


@pytest.mark.parametrize("index", ["own", "shared"])
@pytest.mark.parametrize("row", [-1, 13, 1 << 40])
def test_similar_mask_traps_a_row_outside_of_the_bank(index, row):
    case = make_instance(index=index)
    case["index"] = case["index"].clone()
    case["index"].view(-1)[-1] = row
    message = r"similar_mask: index: expected rows of the bank in \[0, N\)"
    with pytest.raises(RuntimeError, match=message):
        functional.similar_mask(
            case["query"], case["bank"], case["index"], threshold=0.1, backend="simt"
        )


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dim", [4096, 4097, 4100])
def test_rows_wider_than_a_block_holds(dim, objective, dtype):
    for keys, rows in ((1, 3), (100, 40)):  # one entry; several warps of them for each part
        case = make_instance(2, keys, dim, rows, objective=objective, ids=True, labels=True)
        case = cast(excluding(case), dtype)
        tolerance = 1e-11 if dtype == torch.float64 else 2e-6
        assert_close(run(case, "simt"), truth(case), tolerance, run(case, "reference"))


@each_schedule
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_wide_rows_have_no_race_and_stay_in_bounds(objective, schedule, late):
    case = excluding(make_instance(1, 34, 4101, 5, objective=objective, ids=True))
    case = cast(case, torch.float32)
    true, plain = truth(case), run(case, "reference")
    with emulation(CHECKED, schedule, seed=19, late=late):
        got = run(copied(case), CHECKED)
    assert_close(got, true, 2e-6, plain)


@pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_wide_rows_whose_logits_rise(storage):
    # What was summed of the first entries counts for little beside the last ones.
    case = make_instance(2, 150, 4099, 150, objective="infonce", scale=300.0)
    order = (case["bank"] @ case["query"][0]).argsort()
    case |= {"bank": case["bank"][order].to(storage), "index": torch.arange(150).expand(2, -1)}
    wanted = ("query", "positive", "scale", "offset")
    assert_close(run(case, "simt", wanted=wanted), truth(case, wanted=wanted), 1e-10)


# ------------------------------------- instance_nce [B, K]: the bank's gradient in one order


# Rows that one query names twice, that several name, that none does; more than a warp's entries.
OWN = [(5, 70, 17, 90), (7, 130, 140, 4), (3, 40, 300, 500), (2, 40, 4100, 5)]


@pytest.mark.parametrize("warn_only", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sizes", OWN, ids=str)
def test_one_order_is_that_of_the_entries(sizes, objective, warn_only):
    case = make_instance(*sizes, objective=objective, ids=True, labels=True)
    with deterministic(warn_only), warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run(case, "simt")
    assert_close(got, truth(case), 1e-11)
    assert_close(got, run(case, "simt"), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sizes", [(16, 300, 128, 900), (33, 257, 17, 50), (5, 700, 130, 3)])
def test_error_budget_in_one_order(sizes, objective, dtype):
    cases = [make_instance(*sizes, objective=objective, ids=True, seed=seed) for seed in range(3)]
    with deterministic():
        assert_within_budget(cases, "simt", dtype)


@each_schedule
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sizes", OWN, ids=str)
def test_one_order_has_the_same_bits_whatever_comes_first(sizes, objective, schedule, late):
    case = cast(make_instance(*sizes, objective=objective, ids=True), torch.float32)
    with deterministic():
        expected = run(case, "simt")
        for backend in ("simt", CHECKED):
            with emulation(backend, schedule, seed=17, late=late):
                got = run(copied(case), backend)
            assert all(torch.equal(got[k], expected[k]) for k in expected), backend


@pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_order_in_every_storage(dtype, storage):
    case = cast(make_instance(9, 60, 33, 20), dtype)
    case["bank"] = case["bank"].to(storage)
    with deterministic():
        got = run(case, "simt")
    assert got["bank"].dtype == storage
    assert_close(got, run(case, "simt"), 1e-6 if storage.itemsize > 2 else 2.0**-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_order_of_few_entries_or_none(objective):
    for sizes in [(0, 7, 5, 9), (5, 0, 7, 9), (5, 0, 7, 0), (0, 0, 7, 0), (1, 1, 1, 1)]:
        case = make_instance(*sizes, objective=objective)
        with deterministic():
            assert_close(run(case, "simt"), truth(case), 1e-12)
    case = make_instance(6, 70, 8, 12, objective=objective)
    case |= {"query_label": torch.zeros(6).long(), "key_label": torch.zeros(12).long()}
    with deterministic():
        got = run(case, "simt")
    assert got["bank"].eq(0).all()  # everything is masked


def test_one_order_of_an_index_that_is_a_view():
    case = make_instance(5, 70, 8, 30)
    with deterministic():
        expected = run(case, "simt")
        index = case["index"]
        backward = index.flip(1).contiguous().flip(1)
        for view in (index.T.contiguous().T, backward, index.repeat_interleave(3, 1)[:, 1::3]):
            got = run({**case, "index": view}, "simt")
            assert all(torch.equal(got[k], expected[k]) for k in expected)
        shared = {**case, "index": index[:1].expand(5, -1)}
        assert_close(run(shared, "simt"), truth(shared), 1e-12)


def test_every_operator_runs_where_algorithms_must_be_deterministic():
    with deterministic():
        for index in ("own", "shared", None):
            case = make_instance(index=index)
            assert_close(run(case, "simt"), truth(case), 1e-11)
        case = make()
        assert_close(run(case, "simt"), truth(case), 1e-11)
