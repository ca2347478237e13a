"""functional.relation_nce against the formula: loss, every gradient, every mask, every extreme."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from helpers import cases
from helpers.cases import (
    DIFFERENTIABLE,
    assert_close,
    assert_within_budget,
    cast,
    distance,
    is_excluded,
    make,
    moved,
    run,
    strided,
    truth,
    unit_rows,
    without_excluded,
)
from helpers.emulated import EMULATED
from helpers.interpreted import INTERPRETED
from helpers.on_device import native
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from crrcd_ext import functional

BACKENDS, COMPILED = (names + EMULATED + INTERPRETED for names in (cases.BACKENDS, cases.COMPILED))
OBJECTIVES = ["nce", "infonce"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def loop_loss(case: dict) -> float:
    """The loss pair by pair in Python numbers, masks by their definition."""
    scale, offset = float(case["scale"]), float(case["offset"])
    query, positive, anchor = (case[k].tolist() for k in ("query", "positive", "anchor"))
    bank, weight = case["bank"].tolist(), case["weight"].tolist()
    ids = {
        k: case[k].tolist() if case.get(k) is not None else None
        for k in ("anchor_id", "query_id", "key_id", "query_label", "key_label")
    }
    rows = range(len(bank)) if case["index"] is None else case["index"].tolist()

    def dot(x, y):
        return sum(a * b for a, b in zip(x, y, strict=True))

    def vector(p, row):
        x = row
        if case["key_weight"] is not None:
            x = [dot(w, row) for w in case["key_weight"].tolist()]
        hidden = [max(a - b, 0.0) for a, b in zip(p, x, strict=True)]
        bias = [0.0] * len(weight) if case["bias"] is None else case["bias"].tolist()
        w = [dot(row, hidden) + c for row, c in zip(weight, bias, strict=True)]
        norm = math.sqrt(dot(w, w))
        return [x / norm if norm * norm > 1e-24 else 0.0 for x in w]

    total, count = 0.0, 0
    for a, b in itertools.product(range(len(query)), range(len(query[0]) if query else 0)):
        if not case["self_pairs"]:
            if ids["anchor_id"] is not None:
                if ids["anchor_id"][a] == ids["query_id"][b]:
                    continue
            elif ids["query_id"] is None and len(query) == len(query[0]) and a == b:
                continue
        positive_logit = scale * dot(query[a][b], positive[a][b]) - offset
        logits = []
        for j, n in enumerate(rows):
            if is_excluded(case, b, j):
                continue
            if ids["query_id"] is not None:
                name = n if ids["key_id"] is None else ids["key_id"][n]
                if name == ids["query_id"][b]:
                    continue
            if ids["query_label"] is not None and ids["key_label"][n] == ids["query_label"][b]:
                continue
            logits.append(scale * dot(query[a][b], vector(anchor[a], bank[n])) - offset)
        if case["objective"] == "nce":
            total += softplus(-positive_logit) + sum(softplus(x) for x in logits)
        else:
            top = max([positive_logit, *logits])
            total += top - positive_logit
            total += math.log(sum(math.exp(x - top) for x in [positive_logit, *logits]))
        count += 1
    return total / count if count else 0.0


# ---------------------------------------------------------------------------------------- formula

VARIANTS = {
    "plain": {},
    "no bias": {"bias": False},
    "projected rows": {"key_weight": False},
    "whole bank": {"index": False},
    "whole projected bank": {"index": False, "key_weight": False, "bias": False},
    "square": {"A": 6},
    "square with self pairs": {"A": 6, "self_pairs": True},
    "ids": {"ids": True},
    "ids with self pairs": {"ids": True, "self_pairs": True},
    "labels": {"labels": True},
    "ids and labels, square": {"A": 6, "ids": True, "labels": True},
    "excluded": {"excluded": 0.3},
    "excluded of the whole bank, square": {"A": 6, "index": False, "excluded": 0.3},
    "no offset": {"offset": 0.0},
    "one of everything": {"A": 1, "B": 1, "K": 1, "H": 1, "R": 2, "D": 1, "N": 1, "self_pairs": 1},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@variants
def test_loss_is_the_formula(backend, objective, options):
    case = make(objective=objective, **options)
    loss = functional.relation_nce(**case, backend=backend)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(loop_loss(case), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@variants
def test_gradcheck(backend, objective, options):
    sizes = {"A": 2, "B": 3, "K": 5, "H": 4, "R": 3, "D": 2, "N": 6, "offset": 0.3, "scale": 3.0}
    if "A" in options:
        sizes["B"] = options["A"] = min(options["A"], 3)
    case = make(objective=objective, **{**sizes, **options})
    names = [k for k in DIFFERENTIABLE if case[k] is not None]
    leaves = [case[k].requires_grad_() for k in names]

    def loss(*values):
        return functional.relation_nce(
            **{**case, **dict(zip(names, values, strict=True))}, backend=backend
        )

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=backend in INTERPRETED)


# ------------------------------------------------------------------------------------------ budget

BUDGET_SHAPES = [  # A, B, K, H, R, D
    (16, 16, 257, 64, 64, 32),
    (8, 33, 130, 128, 128, 64),
    (5, 7, 300, 17, 130, 9),
    (4, 12, 200, 130, 3, 70),
    (3, 64, 511, 32, 65, 128),
]
BUDGET_OPTIONS = {
    "all": {"ids": True},
    "no bias, projected rows": {"bias": False, "key_weight": False},
    "whole bank, labels": {"index": False, "labels": True},
}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", BUDGET_OPTIONS.values(), ids=BUDGET_OPTIONS.keys())
@pytest.mark.parametrize("shape", BUDGET_SHAPES)
def test_error_budget(backend, dtype, objective, options, shape):
    sizes = dict(zip("ABKHRD", shape, strict=True), N=3 * shape[2])
    cases = [make(**sizes, objective=objective, seed=seed, **options) for seed in range(3)]
    assert_within_budget(cases, backend, dtype)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget_at_working_size(backend, dtype):
    torch.set_num_threads(2)
    sizes = (3, 16, 500) if backend in INTERPRETED else (32, 64, 1500)
    cases = [make(*sizes, 128, 128, 128, 4096, offset=math.log(sizes[2]), bias=False)]
    assert_within_budget(cases, backend, dtype)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [("query",), ("key_weight",), ("bank",), ("weight", "bias")])
def test_error_budget_of_some_gradients(backend, dtype, wanted):
    # Which gradients are asked for decides which form a backend may compute.
    cases = [make(9, 20, 200, 64, 48, 32, 500, seed=seed) for seed in range(3)]
    assert_within_budget(cases, backend, dtype, wanted=wanted)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_error_budget_with_an_ill_conditioned_weight(backend, dtype, objective, bias):
    cases = []
    for seed in range(4):
        case = make(6, 10, 150, 64, 64, 24, 200, objective=objective, bias=bias, seed=seed)
        u, _, v = torch.linalg.svd(case["weight"])
        case["weight"] = u @ torch.diag(torch.logspace(0, -4, 64, dtype=torch.float64)) @ v
        if bias:
            case["bias"] *= 0.1
        cases.append(case)
    assert_within_budget(cases, backend, dtype)


@pytest.mark.skipif(not INTERPRETED, reason="about interpreted kernels")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [DIFFERENTIABLE, ("query",)], ids=["all", "query"])
def test_error_budget_of_several_blocks(dtype, objective, wanted, monkeypatch):
    from crrcd_ext.triton import configs

    small = configs.Config(16, 4, 1, queries=16, features=32, depth=16)
    monkeypatch.setattr(configs, "INTERPRETER", small)
    # Of features and hidden units two blocks, or one that is summed in two.
    for H, R in ((40, 36), (30, 28)):
        cases = [make(2, 20, 40, H, R, 10, 50, objective=objective, ids=True)]
        assert_within_budget(cases, "triton", dtype, wanted=wanted)


def null_space_case(objective: str, seed: int, distance_to_it: float, bias: bool) -> dict:
    """Hidden vectors that the weight all but annihilates, so that |W hid|^2 cancels."""
    case = make(4, 6, 40, 24, 16, 24, 40, bias=False, objective=objective, seed=seed)
    g = torch.Generator().manual_seed(seed)
    null = torch.rand(24, generator=g, dtype=torch.float64) + 0.5
    w = case["weight"]
    case["weight"] = w - torch.outer(w @ null, null) / (null @ null)
    if bias:
        # The bias lies on the way: W (hid + h1) = -c cancels as a sum of two large vectors.
        extra = torch.rand(24, generator=g, dtype=torch.float64)
        case["bias"] = -(case["weight"] @ extra)
        null = null + extra
    near = torch.randn(40, 24, generator=g, dtype=torch.float64) * distance_to_it
    case["anchor"] = 3 + 0 * case["anchor"]
    case["key_weight"] = None
    case["bank"] = 3 - null - near
    case["index"] = torch.arange(40)
    return case


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("distance_to_it", [1e-1, 1e-2, 1e-3])
def test_error_budget_near_the_null_space(backend, objective, bias, distance_to_it):
    cases = [null_space_case(objective, seed, distance_to_it, bias) for seed in range(8)]
    assert_within_budget(cases, backend, torch.float32)


@pytest.mark.parametrize("backend", COMPILED)
def test_null_space_in_float64(backend):
    case = null_space_case("nce", 0, 1e-5, True)
    assert_close(run(case, backend), run(case, "reference"), 1e-6)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_weight", [True, False])
def test_bank_storage(backend, storage, dtype, key_weight):
    case = cast(make(4, 6, 70, 20, 24, 12, 90, key_weight=key_weight), dtype, also_bank=False)
    case["bank"] = case["bank"].to(storage)
    wanted = tuple(k for k in DIFFERENTIABLE if k != "bank")
    got, true = run(case, backend, wanted=wanted), truth(case, wanted=wanted)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    assert_close(got, true, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_bank_with_a_gradient_takes_part_in_the_dtype(backend, storage):
    if storage == torch.float16:
        case = cast(make(4, 6, 20, 8, 9, 7, 30), torch.float32)
    else:
        case = cast(make(4, 6, 20, 8, 9, 7, 30), torch.bfloat16)
    case["bank"] = case["bank"].to(storage)
    got = run(case, backend)
    expected = torch.promote_types(storage, case["query"].dtype)
    assert got["loss"].dtype == (torch.float64 if expected == torch.float64 else torch.float32)
    tolerance = {torch.float64: 5e-3, torch.float32: 5e-3, torch.bfloat16: 4e-2}[expected]
    assert_close(got, truth(case), tolerance)  # the gradients themselves are rounded to bfloat16


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicates_in_the_index_add_up(backend, dtype):
    case = cast(make(3, 5, 64, 10, 12, 6, 4), dtype)  # 64 draws out of 4 rows
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    assert_close(run(case, backend), truth(case), tolerance)


# ------------------------------------------------------------------------------------ ragged sizes

size = st.integers(1, 70)
CLOSE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def assert_close_to_truth(case: dict, backend: str, dtype: torch.dtype) -> None:
    plain = run(case, "reference")
    assert_close(run(case, backend), truth(case), CLOSE[dtype], plain)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis_settings(max_examples=40)
@given(
    sizes=st.tuples(size, size, size, size, size, size, size),
    flags=st.tuples(*[st.booleans()] * 6),
    objective=st.sampled_from(OBJECTIVES),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_ragged_sizes(backend, dtype, sizes, flags, objective, seed, threads):
    torch.set_num_threads(threads)
    options = dict(
        zip(("bias", "key_weight", "index", "ids", "labels", "self_pairs"), flags, strict=True)
    )
    if backend in INTERPRETED:
        sizes = [(size + 2) // 3 for size in sizes]
    A, B, K, H, R, D, N = sizes
    # With R = 1, or H = 1 and no bias, the direction is constant: gradients are rounding alone.
    R, H = max(R, 2), max(H, 2)
    case = make(A, B, K, H, R, D, N, objective=objective, seed=seed, **options)
    # A hidden vector close to zero has no precise direction in float32: start away from it.
    case["anchor"] = case["anchor"] + 1.0
    case = cast(case, dtype)
    assert_close_to_truth(case, backend, dtype)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_hidden_units(backend, dtype):
    # Where one or two units are active, the terms of a norm cancel: none may have lost digits.
    for A, B, K in ((21, 1, 6), (2, 3, 5), (3, 6, 20)):
        for hidden, relation, seed in itertools.product((2, 3), (2, 3), range(3)):
            options = {"seed": seed, "bias": False, "key_weight": False, "index": False}
            case = make(A, B, K, hidden, relation, **options)
            case["anchor"] = case["anchor"] + 1.0
            assert_close_to_truth(cast(case, dtype), backend, dtype)


EDGES = sorted({m * n + d for m in (8, 16, 64, 128) for n in (1, 2) for d in (-1, 0, 1)})


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("letter", "ABKHRD")
def test_sizes_around_the_tiles(backend, dtype, letter):
    for value in EDGES:
        sizes = {"A": 2, "B": 5, "K": 19, "H": 21, "R": 18, "D": 10, "N": 300, letter: value}
        case = cast(make(**sizes, seed=value), dtype)
        case["anchor"] = case["anchor"] + 1.0
        assert_close_to_truth(case, backend, dtype)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden, relation", [(200, 1), (1, 200), (257, 2), (2, 257)])
def test_narrow_against_wide(backend, dtype, hidden, relation):
    case = cast(make(3, 9, 150, hidden, relation, 11, 200), dtype)
    case["anchor"] = case["anchor"] + 1
    got, true = run(case, backend), truth(case)
    if min(hidden, relation) == 1:
        # Gradients through the norm vanish but for rounding, of the size of what cancels.
        for k in ("anchor", "weight", "bias", "key_weight", "bank"):
            assert float((got.pop(k).double() - true.pop(k)).abs().max()) < 200 * CLOSE[dtype]
    assert_close(got, true, CLOSE[dtype], run(case, "reference"))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_many_negatives(backend, objective):
    # Several chunks of keys for every thread, an index longer than the bank.
    torch.set_num_threads(2)
    case = make(2, 3, 20_001, 9, 10, 5, 7000, objective=objective, offset=math.log(20_001))
    assert_close(run(case, backend), run(case, "reference"), 1e-10)
    low = cast(case, torch.float32)
    assert_close(run(low, backend), truth(low), 5e-5)


# ----------------------------------------------------------------------------------- strides, masks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [True, False])
def test_strided_inputs(backend, dtype, index):
    options = {"ids": True, "labels": True, "excluded": 0.2, "index": index}
    case = cast(make(5, 6, 40, 9, 10, 8, 30, **options), dtype)
    views = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    expected = run(case, backend)
    leaves = {k: views[k].requires_grad_() for k in DIFFERENTIABLE}
    loss = functional.relation_nce(**views, backend=backend)
    gradients = torch.autograd.grad(loss * 0.7, list(leaves.values()))
    got = {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}
    assert_close(got, expected, {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 1e-2))


@pytest.mark.parametrize("backend", COMPILED)
def test_expanded_inputs(backend):
    case = make(4, 6, 20, 7, 8, 5, 30)
    case["query"] = case["query"][:1].expand(4, 6, 8)
    case["anchor"] = case["anchor"][:1].expand(4, 7)
    case["key_weight"] = case["key_weight"][:, :1].expand(7, 5)
    solid = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    got = functional.relation_nce(**case, backend=backend)
    torch.testing.assert_close(got, functional.relation_nce(**solid, backend="reference"))


MASKS = {
    "ids": {"ids": True},
    "ids, self pairs kept": {"ids": True, "self_pairs": True},
    "labels": {"labels": True},
    "both": {"ids": True, "labels": True},
    "excluded": {"excluded": 0.2},
    "all": {"ids": True, "labels": True, "excluded": 0.2},
}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("anchors", [9, 20])
def test_masks(backend, objective, dtype, options, anchors):
    case = cast(make(anchors, 20, 150, 12, 14, 6, 100, objective=objective, **options), dtype)
    assert_close_to_truth(case, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_id_defaults_to_the_position(backend):
    case = make(4, 6, 40, 7, 8, 5, 12)
    case["query_id"] = torch.tensor([0, 3, 3, 11, 12, -1])  # the last two name no row
    named = {**case, "key_id": torch.arange(12)}
    assert_close(run(case, backend), run(named, backend), 1e-14)
    assert float(run(case, backend)["loss"]) == pytest.approx(loop_loss(case) * 1.0, rel=1e-12)
    unmasked = {**case, "query_id": None}
    assert float(run(case, backend)["loss"]) < float(run(unmasked, backend)["loss"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_beyond_32_bits(backend):
    case = make(4, 6, 12, 7, 8, 5, 12)
    case["index"] = torch.arange(12)
    case["query_id"] = torch.arange(6) + 2**40
    case["anchor_id"] = torch.arange(4) + 2**40
    case["key_id"] = torch.arange(12)  # equal in the low 32 bits only
    assert float(run(case, backend)["loss"]) == pytest.approx(loop_loss(case), rel=1e-12)
    case["key_id"] = torch.arange(12) + 2**40
    assert float(run(case, backend)["loss"]) == pytest.approx(loop_loss(case), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_query_id_alone_names_no_pair(backend, dtype):
    case = make(6, 6, 12, 7, 8, 5, 12)
    case["query_id"] = torch.tensor([0, 1, 2, 3, 4, 5])
    true = loop_loss(cast(cast(case, dtype), torch.float64))
    got = functional.relation_nce(**cast(case, dtype), backend=backend)
    assert float(got) == pytest.approx(true, rel=1e-12 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_negatives_masked(backend, objective, dtype):
    case = make(4, 6, 30, 7, 8, 5, 12, objective=objective)
    case["query_label"] = torch.full((6,), 3)
    case["key_label"] = torch.full((12,), 3)
    case = cast(case, dtype)
    got, true = run(case, backend), truth(case)
    assert_close(got, true, CLOSE[dtype], run(case, "reference"))
    for k in ("anchor", "bank", "key_weight", "weight", "bias"):
        assert got[k].eq(0).all(), k
    if objective == "infonce":
        # The positive alone is certain: nothing to learn.
        assert all(abs(float(got[k].abs().max())) < 1e-5 for k in ("loss", "query", "scale"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("K", [1, 31, 33, 150])
@pytest.mark.parametrize("options", [{}, {"index": False}, {"ids": True, "labels": True}], ids=str)
@pytest.mark.parametrize("share", [0.05, 0.9])
def test_excluded_is_as_good_as_gone(backend, K, objective, options, share):
    """Against calls of one query each without them."""
    case = make(4, 6, K, 7, 8, 5, 12, objective=objective, excluded=share, **options)
    case["self_pairs"] = True
    assert_close(run(case, backend), without_excluded(case), 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_negatives_excluded(backend, objective, dtype):
    case = cast(make(4, 6, 70, 7, 8, 5, 12, objective=objective, excluded=1.0), dtype)
    got = run(case, backend)
    assert_close(got, truth(case), CLOSE[dtype], run(case, "reference"))
    for k in ("anchor", "bank", "key_weight", "weight", "bias"):
        assert got[k].eq(0).all(), k
    if objective == "infonce":
        assert all(abs(float(got[k].abs().max())) < 1e-5 for k in ("loss", "query", "scale"))
    else:
        logit = case["scale"] * (case["query"] * case["positive"]).double().sum(-1) - case["offset"]
        expected = float(torch.nn.functional.softplus(-logit).mean())
        assert float(got["loss"]) == pytest.approx(expected, rel=CLOSE[dtype])


@pytest.mark.skipif(not INTERPRETED, reason="about interpreted kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [True, False])
def test_excluded_in_several_segments(dtype, index, monkeypatch):
    """Two blocks of queries, three segments of keys."""
    monkeypatch.setattr("crrcd_ext.triton.passes.SEGMENT", 64)
    case = cast(make(2, 70, 150, 7, 8, 5, 90, index=index, excluded=0.5), dtype)
    plain = run(case, "reference")
    assert_close(run(case, "triton"), truth(case), CLOSE[dtype], plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_beside_an_update(backend):
    case = make(4, 6, 40, 7, 8, 5, 12, excluded=0.3)
    index, value = torch.tensor([3, 9, 3]), torch.ones(3, 5).double()
    expected = float(functional.relation_nce(**case, backend=backend))
    alone = case["bank"].clone()
    functional.bank_update_(alone, index, value, momentum=0.5, backend=backend)
    got = functional.relation_nce(**case, update=(index, value, 0.5), backend=backend)
    assert float(got) == expected
    assert torch.equal(case["bank"], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_without_negatives_among_others(backend):
    case = make(4, 6, 30, 7, 8, 5, 12, objective="infonce")
    case["query_label"] = torch.tensor([0, 1, 2, 3, 4, 9])
    case["key_label"] = torch.full((12,), 9)
    got = run(case, backend)
    assert_close(got, run(case, "reference"), 1e-11)
    assert got["query"][:, 5].abs().max() < 1e-14


# ------------------------------------------------------------------------------------ empty, single


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_weight", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [{"A": 0}, {"B": 0}, {"A": 0, "B": 0}, {"K": 0}, {"K": 0, "N": 0}, {"A": 0, "K": 0}],
    ids=str,
)
def test_empty(backend, objective, dtype, key_weight, sizes):
    for index in (True, False):
        case = cast(make(**sizes, index=index, key_weight=key_weight, objective=objective), dtype)
        got, true = run(case, backend), truth(case)
        assert_close(got, true, CLOSE[dtype], run(case, "reference"))
        if "K" not in sizes:
            assert all(x.eq(0).all() for x in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_one_has_no_pair(backend, dtype):
    case = cast(make(1, 1), dtype)
    got = run(case, backend)
    assert all(x.eq(0).all() for x in got.values())
    case["self_pairs"] = True
    assert_close_to_truth(case, backend, dtype)
    assert float(run(case, backend)["loss"]) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pair_kept_by_ids(backend):
    case = make(3, 4)
    case["anchor_id"], case["query_id"] = torch.full((3,), 7), torch.full((4,), 7)
    assert all(x.eq(0).all() for x in run(case, backend).values())


# ----------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("offset", [0.0, 9.7])
def test_logits_of_ten_thousand(backend, objective, dtype, sign, offset):
    case = make(5, 6, 30, 16, 12, 8, 40, objective=objective, scale=1e4, offset=offset)
    # Planted: queries that are some negatives' own relation vectors, so that cosines reach +-1.
    rows = case["bank"][case["index"][:6]] @ case["key_weight"].T
    case["query"] = sign * functional.relation(
        case["anchor"], rows, case["weight"], case["bias"], backend="reference"
    )
    case["positive"][:, :3] = case["query"][:, :3]
    case["positive"][:, 3:] = -case["query"][:, 3:]
    low = cast(case, dtype)
    got, true = run(low, backend), truth(low)
    assert torch.isfinite(got["loss"]) and float(true["loss"]) > 1e3
    # Rounding of a logit is 1e4 eps there, and a logit near 0 shifts its gradient by as much.
    assert_close(got, true, 1e-8 if dtype == torch.float64 else 2e-2)
    assert distance(got["loss"], true["loss"]) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_logits_of_ten_thousand(backend, dtype):
    # what is masked is no part of the normaliser, and can be far above it
    keys = 300 if backend in INTERPRETED else 2000
    case = make(4, 6, keys, 16, 12, 8, keys, labels=True, objective="infonce", scale=1e4)
    case["query_label"], case["key_label"] = torch.arange(6) % 2, torch.arange(keys) % 2
    case["bank"][::2] += 1
    low = cast(case, dtype)
    got, true = run(low, backend), truth(low)
    assert_close(got, true, 1e-8 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logits_of_ten_thousand_in_bfloat16(backend, objective):
    case = make(5, 6, 30, 16, 12, 8, 40, objective=objective, scale=1e4)
    low = cast(case, torch.bfloat16)
    got, true = run(low, backend), truth(low)
    assert all(x.isfinite().all() for x in got.values())
    assert distance(got["loss"], true["loss"]) < 2e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [-80.0, -100.0, -1000.0])
def test_softmax_of_logits_far_above_zero(backend, dtype, offset):
    # Five queries fill no vector: the lanes behind them have logits too.
    case = make(3, 5, 60, 20, 18, 13, 50, objective="infonce", scale=1.0, offset=offset)
    low = cast(case, dtype)
    got, true = run(low, backend), truth(low)
    assert_close(got, true, 1e-9 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
def test_softmax_with_one_winner(backend, scale):
    # The only negative has all of the softmax: its share must be 1 to the last place.
    case = make(3, 16, 1, 20, 18, 13, 50, objective="infonce", scale=scale, self_pairs=True)
    case["positive"] = -case["query"]
    low = cast(case, torch.float32)
    got, true = run(low, backend), truth(low)
    # CUDA subtracts the normaliser in the logit's own multiplication, which rounds otherwise than
    # the pass that found it: its share is off by the rounding of one logit.
    allowed = scale * torch.finfo(torch.float32).eps if backend in EMULATED else 1e-6
    for key in ("query", "anchor", "weight"):
        assert distance(got[key], true[key]) < max(allowed, 1e-6), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiny_terms_are_not_lost(backend, dtype):
    # With a large offset every term of the sum is exp(-large): their sum is the loss's gradient.
    case = make(4, 5, 3000, 12, 14, 6, 100, scale=2.0, offset=25.0)
    low = cast(case, dtype)
    got, true = run(low, backend), truth(low)
    for k in true:
        assert distance(got[k], true[k]) < (1e-9 if dtype == torch.float64 else 5e-5), k
    kept = {**low, "positive": low["query"], "offset": torch.tensor(40.0).double()}
    kept["scale"] = torch.tensor(80.0).double()  # positives certain too: only tiny terms are left
    got, true = run(kept, backend), truth(kept)
    for k in true:
        assert distance(got[k], true[k]) < (1e-8 if dtype == torch.float64 else 1e-3), k


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vanishing_relations(backend, objective, dtype):
    case = make(4, 6, 30, 7, 8, 7, 30, bias=False, key_weight=False, objective=objective)
    case["index"] = torch.arange(30)
    case["bank"][::3] = 100.0  # every hidden unit off: the relation vector is 0
    case = cast(case, dtype)
    got, true = run(case, backend), truth(case)
    assert_close(got, true, CLOSE[dtype], run(case, "reference"))
    assert got["bank"][::3].eq(0).all()
    case["bank"][:] = 100.0
    got, true = run(case, backend), truth(case)
    assert_close(got, true, CLOSE[dtype], run(case, "reference"))
    assert all(got[k].eq(0).all() for k in ("bank", "weight", "anchor"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_zero_weight(backend, dtype, bias):
    # With a bias every relation is c / |c|, without one it vanishes.
    case = make(4, 6, 30, 7, 8, 5, 30, bias=bias)
    case["weight"] = torch.zeros_like(case["weight"])
    case = cast(case, dtype)
    assert_close_to_truth(case, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_null_space(backend, dtype):
    case = make(3, 4, 10, 4, 3, 4, 10, bias=False, key_weight=False)
    case["weight"] = torch.tensor([[1, -1, 0, 0], [0, 0, 3, -3], [2, -2, 1, -1]]).double()
    case["bank"] = torch.zeros(10, 4).double()
    case["bank"][5:] = torch.tensor([-1, 3, 1, -2.0])
    case["index"] = torch.arange(10)
    case["anchor"] = torch.tensor([[1, 1, 2, 2], [3, 3, 1, 1], [4, 1, 2, 1]]).double()
    case = cast(case, dtype)
    got, true = run(case, backend), truth(case)
    assert_close(got, true, CLOSE[dtype], run(case, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_magnitudes_far_from_one(backend, dtype):
    # The relation is invariant to the size of its input; squares must not overflow or vanish.
    for size in (1e-4, 1e6):
        case = make(4, 6, 30, 16, 12, 8, 40, bias=False)
        case["anchor"], case["bank"] = case["anchor"] * size, case["bank"] * size
        case = cast(case, dtype)
        got, true = run(case, backend), truth(case)
        for k in true:
            assert got[k].isfinite().all()
            assert distance(got[k], true[k]) < (1e-10 if dtype == torch.float64 else 5e-5), k


# -------------------------------------------------------------------------- autograd, dtypes, state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_only_where_asked(backend, objective):
    case = make(4, 6, 30, 7, 8, 5, 40, objective=objective)
    everything = run(case, backend)
    for wanted in [(k,) for k in DIFFERENTIABLE] + [
        ("query", "positive"),
        ("anchor", "weight", "bias"),
        ("key_weight", "scale"),
    ]:
        got = run(case, backend, wanted=wanted)
        assert_close(got, {k: everything[k] for k in ("loss", *wanted)}, 1e-11)
    assert not functional.relation_nce(**case, backend=backend).requires_grad
    case["query"].requires_grad_()
    with torch.no_grad():
        assert not functional.relation_nce(**case, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_offset_as_numbers_or_tensors(backend, dtype):
    case = cast(make(), dtype)
    expected = functional.relation_nce(**case, backend=backend)
    for kind in (float, torch.Tensor.float, torch.Tensor.double):
        again = {**case, "scale": kind(case["scale"]), "offset": kind(case["offset"])}
        torch.testing.assert_close(functional.relation_nce(**again, backend=backend), expected)
    for scalar in (torch.float32, torch.float64, torch.bfloat16):
        again = {**case, "scale": case["scale"].to(scalar), "offset": case["offset"].to(scalar)}
        got = run(again, backend)  # asserts the gradients' dtypes
        assert distance(got["scale"], truth(case)["scale"]) < 6e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_dtype_and_promotion(backend):
    case = make()
    low = cast(case, torch.bfloat16)
    assert functional.relation_nce(**low, backend=backend).dtype == torch.float32
    for name in ("query", "positive", "anchor", "weight", "bias", "key_weight"):
        mixed = {**low, name: low[name].float()}
        assert run(mixed, backend)[name].dtype == torch.float32
        mixed = {**low, name: low[name].double()}
        assert functional.relation_nce(**mixed, backend=backend).dtype == torch.float64
    wide_bank = {**low, "bank": low["bank"].double()}
    assert functional.relation_nce(**wide_bank, backend=backend).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    case = cast(make(4, 6, 60, 24, 20, 12, 80), torch.float32)
    low = cast(case, torch.bfloat16, also_bank=False)
    wanted = tuple(k for k in DIFFERENTIABLE if k != "bank")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(case, backend, wanted=wanted)
    assert got["loss"].dtype == torch.float32
    assert all(got[k].dtype == torch.float32 for k in wanted if k not in ("scale", "offset"))
    expected = run(low, backend, wanted=wanted)
    assert torch.equal(got["loss"], expected["loss"])
    assert all(torch.equal(got[k].to(expected[k].dtype), expected[k]) for k in wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = functional.relation_nce(**cast(case, torch.float64), backend=backend)
        bank = run(case, backend)["bank"]
    assert wide.dtype == torch.float64
    assert bank.dtype == torch.float32


def test_float16_on_reference():
    case = make(4, 6, 30, 7, 8, 5, 40)
    low = cast(case, torch.float16)
    got = run(low, "reference")
    assert got["loss"].dtype == torch.float32
    assert_close(got, truth(low), 1e-2)


@pytest.mark.parametrize("backend", COMPILED)
def test_double_backward_is_refused(backend):
    case = make()
    query = case["query"].requires_grad_()
    loss = functional.relation_nce(**case, backend=backend)
    with pytest.raises(RuntimeError, match=r"crrcd_ext\.relation_nce: double backward"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_reference_has_a_second_derivative():
    case = make(2, 3, 4, 3, 3, 2, 5, scale=2.0)
    names = ("query", "weight", "scale")
    leaves = [case[k].requires_grad_() for k in names]
    assert torch.autograd.gradgradcheck(
        lambda *t: functional.relation_nce(
            **{**case, **dict(zip(names, t, strict=True))}, backend="reference"
        ),
        leaves,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_over_one_graph(backend):
    case = make()
    leaves = [case[k].requires_grad_() for k in DIFFERENTIABLE]
    loss = functional.relation_nce(**case, backend=backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves)
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(3 * x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nonfinite_incoming_gradient_passes(backend):
    # A GradScaler finds its overflow by what backward returns.
    case = make()
    query = case["query"].requires_grad_()
    loss = functional.relation_nce(**case, backend=backend)
    (gradient,) = torch.autograd.grad(loss * torch.tensor(math.inf), query)
    assert not gradient.isfinite().all()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bits_repeat(backend, threads, dtype, objective):
    torch.set_num_threads(threads)
    case = cast(make(7, 20, 1000, 33, 47, 20, 700, ids=True, objective=objective), dtype)
    first = run(case, backend)
    for _ in range(4):
        again = run(case, backend)
        assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_agree_within_the_budget(backend, dtype):
    cases = [make(7, 20, 1000, 33, 47, 20, 700, seed=seed) for seed in range(2)]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_within_budget(cases, backend, dtype)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_may_hold_anything(backend, objective, dtype):
    """Deterministic mode fills what torch.empty returns with NaN; freed memory holds NaN too."""
    case = cast(make(7, 9, 200, 33, 47, 20, 300, ids=True, objective=objective), dtype)
    expected = run(case, backend)
    poison = [torch.full((n,), math.nan) for n in (50, 700, 5000, 60_000, 900_000)]
    del poison
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        got = run(case, backend)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(got[k], expected[k]) for k in got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_stay_as_they_are(backend):
    case = make(ids=True, labels=True)
    copies = {k: v.clone() for k, v in case.items() if isinstance(v, torch.Tensor)}
    run(case, backend)
    assert all(torch.equal(case[k], copies[k]) for k in copies)


@pytest.mark.parametrize("backend", COMPILED)
def test_a_bank_beyond_31_bits_of_elements(backend, large_bank):
    backend, device = native(backend)
    rows, dim = 2**24 + 64, 130
    assert rows * dim > 2**31
    bank = large_bank(rows, dim, device)
    case = moved(cast(make(3, 4, 6, 7, 8, dim, 6), torch.float32), device)
    small = case["bank"].bfloat16()
    place = torch.tensor([0, 5, 2**23, 2**31 // dim + 1, rows - 2, rows - 1], device=device)
    bank[place] = small
    wanted = ("query", "key_weight", "weight")
    order = torch.arange(6, device=device)
    near = {**case, "bank": small.clone(), "index": order, "query_id": order[:4]}
    far = {**case, "bank": bank, "index": place, "query_id": place[:4]}
    value, written = torch.ones(2, dim, device=device), torch.tensor([5, 3], device=device)
    near["update"], far["update"] = (written, value, 0.5), (place[written], value, 0.5)
    expected, got = (run(x, backend, wanted=wanted) for x in (near, far))
    assert all(torch.equal(got[k], expected[k]) for k in expected)
    assert torch.equal(bank[place], near["bank"])


# Not under emulation, where so many negatives would take minutes: tests/test_gpu_plan.py instead.
@pytest.mark.parametrize("backend", cases.COMPILED)
@pytest.mark.parametrize("wanted", [("query",), DIFFERENTIABLE])
def test_memory_does_not_grow_with_the_negatives(backend, wanted):
    """Nothing of size K x H or A x B x K: here they would be 102 MB and 205 MB."""
    wanted = tuple(k for k in wanted if k != "bank")  # that gradient is as large as the bank
    case = cast(make(16, 16, 200_000, 128, 64, 32, 20_000), torch.float32)
    run({**case, "index": case["index"][:1000]}, backend, wanted=wanted)
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("peak memory is read from Linux's /proc")

    def status(name: str) -> float:
        text = Path("/proc/self/status").read_text()
        return int(text.split(f"{name}:")[1].split()[0]) / 1024

    reset.write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run(case, backend, wanted=wanted)
    assert status("VmHWM") - before < 48


@pytest.mark.parametrize("backend", COMPILED)
def test_a_step_down_the_gradient_lowers_the_loss(backend):
    case = make(4, 6, 50, 16, 12, 8, 60, offset=2.0)
    query = case["query"].requires_grad_()
    before = functional.relation_nce(**case, backend=backend)
    (gradient,) = torch.autograd.grad(before, query)
    case["query"] = unit_rows(query.detach() - 1e-3 * gradient)
    assert functional.relation_nce(**case, backend=backend) < before
