"""functional.difference_nce against the formula: loss, gradients, masks, cancellation, updates."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from helpers import cases
from helpers.cases import (
    angle,
    assert_close,
    assert_within_budget,
    cast,
    distance,
    is_excluded,
    make_difference,
    run,
    strided,
    truth,
    unit_rows,
    without_excluded,
)
from helpers.emulated import EMULATED
from helpers.interpreted import INTERPRETED
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from crrcd_ext import _backend, functional
from crrcd_ext.triton import configs

BACKENDS, COMPILED = (names + EMULATED + INTERPRETED for names in (cases.BACKENDS, cases.COMPILED))
DIFFERENTIABLE = ("query", "positive", "anchor", "bank", "scale", "offset")
ALL = (1 << len(DIFFERENTIABLE)) - 1
OBJECTIVES = ["nce", "infonce"]
INDICES = [None, "shared", "own"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
STORAGES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}

if INTERPRETED:
    from crrcd_ext.triton import difference_nce, launch, own_keys, passes

_C = _backend.compiled
ISAS = _C.isa_available() if _C else []

objectives = pytest.mark.parametrize("objective", OBJECTIVES)
indices = pytest.mark.parametrize("index", INDICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
backends = pytest.mark.parametrize("backend", BACKENDS)
compiled = pytest.mark.parametrize("backend", COMPILED)


def backend_and(name: str, values: list, interpreted: list, names: list[str] = COMPILED):
    """Backends and a parameter, or several with commas between them, of which Triton's interpreter
    has fewer values: a pass takes it a tenth of a second. For the same reason its sizes are smaller
    wherever a test asks for ``in INTERPRETED``."""
    pairs = [(b, v) for b in names for v in (interpreted if b in INTERPRETED else values)]
    if "," in name:
        pairs = [(b, *v) for b, v in pairs]
    return pytest.mark.parametrize(f"backend, {name}", pairs, ids=str)


def assert_close_to_truth(case: dict, backend: str, dtype: torch.dtype, **options) -> None:
    plain = run(case, "reference", **options)
    assert_close(run(case, backend, **options), truth(case, **options), CLOSE[dtype], plain)


def loop_loss(case: dict) -> float:
    """The loss pair by pair in Python numbers, masks by their definition."""
    scale, offset, eps = float(case["scale"]), float(case["offset"]), case["eps"]
    query, positive, anchor, bank = (
        case[k].tolist() for k in ("query", "positive", "anchor", "bank")
    )
    names = ("anchor_id", "query_id", "key_id", "query_label", "key_label", "index")
    anchor_id, query_id, key_id, query_label, key_label, index = (
        case[k].tolist() if case.get(k) is not None else None for k in names
    )

    def direction(x, a):
        w = [p - q + eps for p, q in zip(x, a, strict=True)]
        square = sum(p * p for p in w)
        return [p / math.sqrt(square) for p in w] if square > 1e-24 else None

    def logit(x, y):
        return scale * sum(p * q for p, q in zip(x, y, strict=True)) - offset

    total, count = 0.0, 0
    for a, b in itertools.product(range(len(anchor)), range(len(query))):
        if not case["self_pairs"]:
            if anchor_id is not None and anchor_id[a] == query_id[b]:
                continue
            if query_id is None and len(anchor) == len(query) and a == b:
                continue
        u, v = direction(query[b], anchor[a]), direction(positive[b], anchor[a])
        if u is None or v is None:
            continue
        rows = range(len(bank)) if index is None else index
        logits = []
        for j, n in enumerate(rows[b] if index and isinstance(index[0], list) else rows):
            if is_excluded(case, b, j):
                continue
            name = n if key_id is None else key_id[n]
            if query_id is not None and name == query_id[b]:
                continue
            if anchor_id is not None and name == anchor_id[a]:
                continue
            if query_label is not None and key_label[n] == query_label[b]:
                continue
            w = direction(bank[n], anchor[a])
            if w is not None:
                logits.append(logit(u, w))
        own = logit(u, v)
        if case["objective"] == "nce":
            total += sum(math.log1p(math.exp(x)) for x in [-own, *logits])
        else:
            total += math.log(sum(math.exp(x) for x in [own, *logits])) - own
        count += 1
    return total / count if count else 0.0


# ---------------------------------------------------------------------------------------- formula

VARIANTS = {
    "plain": {},
    "eps": {"eps": 1e-6},
    "large eps": {"eps": 0.1},
    "square": {"A": 6},
    "square with self pairs": {"A": 6, "self_pairs": True},
    "ids": {"ids": True},
    "ids with self pairs": {"ids": True, "self_pairs": True},
    "labels": {"labels": True},
    "ids and labels, square": {"A": 6, "ids": True, "labels": True},
    "excluded": {"excluded": 0.3},
    "one of everything": {"A": 1, "B": 1, "K": 1, "D": 2, "N": 1, "self_pairs": True},
    "negative scale": {"scale": -4.0},
    "no scale": {"scale": 0.0},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@backends
@objectives
@indices
@variants
def test_loss_is_the_formula(backend, objective, index, options):
    case = make_difference(objective=objective, index=index, **options)
    loss = functional.difference_nce(**case, backend=backend)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(loop_loss(case), rel=1e-12, abs=1e-13)


@backend_and("variant", list(VARIANTS), ["plain"])
@objectives
@indices
def test_gradcheck(backend, objective, index, variant):
    sizes = {"A": 2, "B": 3, "K": 5, "D": 3, "N": 6, "offset": 0.3, "scale": 3.0}
    if backend in INTERPRETED:
        sizes |= {"A": 1, "B": 2}
    options = VARIANTS[variant]
    if options.get("A") == 6:
        options = {**options, "A": 3}
    case = make_difference(objective=objective, index=index, **{**sizes, **options})
    leaves = [case[k].requires_grad_() for k in DIFFERENTIABLE]

    def loss(*values):
        return functional.difference_nce(
            **{**case, **dict(zip(DIFFERENTIABLE, values, strict=True))}, backend=backend
        )

    # The fast mode takes one random direction of each input.
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=backend in INTERPRETED)


@backends
@objectives
def test_angles_of_a_batch(backend, objective):
    """With the batch as anchors, queries and keys the cosines are RKD's, at the anchor's corner."""
    x = unit_rows(torch.randn(6, 5, generator=torch.Generator().manual_seed(3)).double())
    total = 0.0
    for a in range(6):
        for b in range(6):
            if a == b:
                continue
            cosines = []
            for n in range(6):
                if n in (a, b):
                    continue
                # the law of cosines, from the lengths of the triangle's sides
                ab, an, bn = (float((x[i] - x[j]).norm()) for i, j in ((a, b), (a, n), (b, n)))
                cosines.append((ab * ab + an * an - bn * bn) / (2 * ab * an))
            logits = [4 * c - 0.5 for c in cosines]
            if objective == "nce":
                total += sum(math.log1p(math.exp(s)) for s in [-3.5, *logits])
            else:
                total += math.log(sum(math.exp(s) for s in [3.5, *logits])) - 3.5
    ids = dict.fromkeys(("anchor_id", "query_id"), torch.arange(6))
    options = {"scale": 4.0, "offset": 0.5, "objective": objective, "backend": backend}
    for index in (None, torch.arange(6), torch.arange(6).expand(6, 6)):
        loss = functional.difference_nce(x, x, x, x, index, **ids, **options)
        assert float(loss) == pytest.approx(total / 30, rel=1e-12)


# ------------------------------------------------------------------------------------------ budget

BUDGET_SHAPES = [  # A, B, K, D
    (16, 16, 130, 32),
    (8, 20, 70, 64),
    (5, 7, 300, 3),
    (1, 12, 200, 130),
    (33, 5, 140, 128),
]


@backend_and("shape", BUDGET_SHAPES, [(1, 2, 40, 130)])
@objectives
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@indices
def test_error_budget(backend, dtype, objective, index, shape):
    sizes = dict(zip("ABKD", shape, strict=True), N=3 * shape[2])
    options = {"objective": objective, "index": index, "labels": True, "eps": 1e-6}
    # Of small sizes more, or they are within the budget or out of it by luck.
    seeds = range(5 if backend in INTERPRETED else 3)
    cases = [make_difference(**sizes, seed=seed, **options) for seed in seeds]
    assert_within_budget(cases, backend, dtype, wanted=DIFFERENTIABLE)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", ["shared", "own"])
@pytest.mark.parametrize("wanted", [("query",), ("query", "anchor", "bank")], ids=str)
def test_error_budget_at_working_size(backend, dtype, index, wanted):
    torch.set_num_threads(2)
    sizes = (3, 4, 150, 128, 200) if backend in INTERPRETED else (16, 8, 1000, 128, 1500)
    case = make_difference(*sizes, offset=math.log(sizes[2]), index=index)
    assert_within_budget([case], backend, dtype, wanted=wanted)


def near_case(backend: str, what: str, size: float, seed: int, **options) -> dict:
    """Keys, queries or both at a small distance from an anchor, and as many that are not."""
    A, B = (2, 3) if backend in INTERPRETED else (6, 8)
    case = make_difference(A, B, 40, 24, 40, seed=seed, self_pairs=True, **options)
    g = torch.Generator().manual_seed(seed)
    for name in ("bank", "query", "positive"):
        if what in (name, "all"):
            rows = case[name][::2]
            place = torch.randint(A, (len(rows),), generator=g)
            noise = torch.randn(rows.shape, generator=g, dtype=torch.float64) / math.sqrt(24)
            case[name][::2] = case["anchor"][place] + size * noise
    return case


@backend_and(
    "what, size",
    list(itertools.product(["bank", "query", "positive", "all"], [0.3, 0.1, 0.03, 1e-3])),
    [("bank", 1e-3), ("all", 0.03)],
)
@objectives
@indices
def test_error_budget_close_to_an_anchor(backend, objective, index, what, size):
    options = {"index": index, "objective": objective}
    seeds = range(5 if backend in INTERPRETED else 3)
    cases = [near_case(backend, what, size, seed, **options) for seed in seeds]
    some = [("query", "positive", "anchor")] if backend not in INTERPRETED else []
    for wanted in (DIFFERENTIABLE, *some):
        assert_within_budget(cases, backend, torch.float32, wanted=wanted)


@compiled
@pytest.mark.parametrize("index", ["shared", "own"])
def test_error_budget_far_from_the_origin(backend, index):
    # Embeddings that share a large component: their differences are small beside all of them.
    cases = []
    A, B = (2, 3) if backend in INTERPRETED else (9, 8)
    for seed in range(3):
        case = make_difference(A, B, 60, 16, 70, seed=seed, index=index, labels=True)
        for name in ("query", "positive", "anchor", "bank"):
            case[name] = 0.1 * case[name] + 3
        cases.append(case)
    assert_within_budget(cases, backend, torch.float32, wanted=DIFFERENTIABLE)


@compiled
@pytest.mark.parametrize("index", ["shared", "own"])
@pytest.mark.parametrize("wanted", [*((k,) for k in DIFFERENTIABLE), ("positive", "query")])
def test_only_some_gradients(backend, index, wanted):
    for objective in OBJECTIVES:
        case = near_case(backend, "all", 0.02, 1, index=index, objective=objective)
        everything = run(case, backend, wanted=DIFFERENTIABLE)
        got = run(case, backend, wanted=wanted)
        assert_close(got, {k: everything[k] for k in ("loss", *wanted)}, 1e-12)
    assert not functional.difference_nce(**case, backend=backend).requires_grad


@backend_and(
    "dtype, storage",
    list(itertools.product(DTYPES, STORAGES)),
    [(d, s) for d, s in itertools.product(DTYPES, STORAGES) if torch.float32 in (d, s)],
)
@indices
def test_bank_storage(backend, index, storage, dtype):
    A, B = (2, 3) if backend in INTERPRETED else (4, 6)
    case = cast(make_difference(A, B, 70, 12, 90, index=index), dtype, also_bank=False)
    case["bank"] = case["bank"].to(storage)
    wanted = tuple(k for k in DIFFERENTIABLE if k != "bank")
    got, true = run(case, backend, wanted=wanted), truth(case, wanted=wanted)
    assert_close(got, true, {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, 2e-2))


# ------------------------------------------------------------------------------------ ragged sizes


RAGGED = {
    "N": st.sampled_from([1, 50, 1100]),
    "index": st.sampled_from(INDICES),
    "flags": st.tuples(*[st.booleans()] * 3),
    "objective": st.sampled_from(OBJECTIVES),
    "eps": st.sampled_from([0.0, 1e-6]),
    "seed": st.integers(0, 1000),
    "threads": st.integers(1, 3),
}


@pytest.mark.parametrize("backend", [b for b in COMPILED if b not in INTERPRETED])
@dtypes
@hypothesis_settings(max_examples=60)
@given(
    A=st.sampled_from([0, 1, 5, 17, 33]),
    B=st.sampled_from([0, 1, 5, 17]),
    K=st.sampled_from([0, 1, 16, 65, 129]),
    D=st.sampled_from([1, 3, 17, 128, 130]),
    **RAGGED,
)
def test_ragged_sizes(backend, dtype, **drawn):
    check_ragged_sizes(backend, dtype, **drawn)


@pytest.mark.parametrize("backend", INTERPRETED)
@dtypes
@hypothesis_settings(max_examples=10)
@given(
    A=st.sampled_from([0, 1, 5]),
    B=st.sampled_from([0, 1, 5]),
    K=st.sampled_from([0, 1, 16, 65]),
    D=st.sampled_from([1, 3, 17, 130]),
    **RAGGED,
)
def test_ragged_sizes_interpreted(backend, dtype, **drawn):
    check_ragged_sizes(backend, dtype, **drawn)


def check_ragged_sizes(backend, dtype, A, B, K, D, N, index, flags, objective, eps, seed, threads):
    torch.set_num_threads(threads)
    options = dict(zip(("ids", "labels", "self_pairs"), flags, strict=True))
    case = make_difference(A, B, K, D, N, index=index, objective=objective, eps=eps, seed=seed)
    if D == 1:
        # All on one line, unit rows would coincide; and a direction that is constant has no
        # gradient but rounding.
        g = torch.Generator().manual_seed(seed)
        for name in ("query", "positive", "anchor", "bank"):
            case[name] = torch.randn(case[name].shape, generator=g).double()
    masks = make_difference(A, B, K, D, N, seed=seed, index=index, **options)
    case |= {k: v for k, v in masks.items() if k.endswith(("_id", "_label", "_pairs"))}
    case = cast(case, dtype)
    if D > 1:
        return assert_close_to_truth(case, backend, dtype, wanted=DIFFERENTIABLE)
    wanted = ("scale", "offset")
    assert_close_to_truth(case, backend, dtype, wanted=wanted)


EDGES = sorted({m * n + d for m in (8, 16, 64, 256) for n in (1, 2) for d in (-1, 0, 1)})
# The interpreter's tiles are of 64 queries and 32 shared keys, or of 16 anchors and 64 keys.
INTERPRETED_EDGES = {
    "A": [15, 16, 17],
    "B": [15, 16, 17, 64, 65],
    "K": [31, 32, 33, 63, 64, 65],
    "D": [15, 16, 17, 127, 128, 129],
}


@backend_and("dtype", [torch.float64, torch.float32], [torch.float32])
@pytest.mark.parametrize("index", ["shared", "own"])
@pytest.mark.parametrize("letter", "ABKD")
def test_sizes_around_the_tiles(backend, dtype, index, letter):
    for value in INTERPRETED_EDGES[letter] if backend in INTERPRETED else EDGES:
        small = {"A": 2, "B": 2} if backend in INTERPRETED else {"A": 2, "B": 5}
        sizes = {**small, "K": 19, "D": 10, "N": 300, letter: value}
        case = cast(make_difference(**sizes, seed=value, index=index), dtype)
        assert_close_to_truth(case, backend, dtype, wanted=("query", "anchor", "bank"))


@compiled
@objectives
@pytest.mark.parametrize("index", ["shared", "own"])
def test_many_negatives(backend, objective, index):
    # Several tiles and blocks of entries for every thread, and rows that are drawn many times.
    torch.set_num_threads(2)
    sizes = (2, 2, 257, 9, 130) if backend in INTERPRETED else (3, 4, 5001, 9, 1300)
    offset = math.log(sizes[2])
    case = make_difference(*sizes, index=index, objective=objective, offset=offset)
    assert_close(*(run(case, b, wanted=DIFFERENTIABLE) for b in (backend, "reference")), 1e-10)
    low = cast(case, torch.float32)
    assert_close_to_truth(low, backend, torch.float32, wanted=DIFFERENTIABLE)


@compiled
@objectives
def test_one_row_for_everybody(backend, objective):
    A, B, K = (2, 3, 150) if backend in INTERPRETED else (3, 20, 700)
    case = make_difference(A, B, K, 6, 9, objective=objective)
    case["index"] = torch.full((B, K), 4)
    assert_close(*(run(case, b, wanted=DIFFERENTIABLE) for b in (backend, "reference")), 1e-11)


@pytest.mark.parametrize("backend", cases.COMPILED + EMULATED)  # how the CPU and CUDA add up
@pytest.mark.parametrize("wanted", [("query",), DIFFERENTIABLE], ids=str)
def test_more_anchors_than_a_product_takes(backend, wanted):
    # The loss is a product of 1 + exp: with many anchors its factors must be taken in turns.
    case = cast(make_difference(1100, 2, 3, 4, 5, scale=1.0, offset=-3.0), torch.float32)
    for isa in ISAS:
        _C.set_isa(isa)
        assert_close_to_truth(case, backend, torch.float32, wanted=wanted)


# ----------------------------------------------------------------------------------- strides, masks


@backend_and("dtype", DTYPES, [torch.float32], BACKENDS)
@indices
def test_strided_inputs(backend, dtype, index):
    options = {"ids": True, "labels": True, "excluded": 0.2, "index": index}
    case = cast(make_difference(5, 6, 40, 8, 30, **options), dtype)
    expected = run(case, backend, wanted=DIFFERENTIABLE)
    views = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    leaves = {k: views[k].requires_grad_() for k in DIFFERENTIABLE}
    loss = functional.difference_nce(**views, backend=backend)
    gradients = torch.autograd.grad(loss * 0.7, list(leaves.values()))
    got = {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}
    assert_close(got, expected, {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 1e-2))


@compiled
def test_an_index_and_a_bank_that_are_views(backend):
    case = make_difference(4, 6, 20, 8, 60)
    wide = torch.randint(60, (6, 21))
    case["index"] = wide[:, 1:]
    wider_bank = torch.full((60, 13), math.nan, dtype=torch.float64)
    wider_bank[:, 2:10] = case["bank"]
    case["bank"] = wider_bank[:, 2:10]
    wanted = ("query", "positive", "anchor")
    assert_close(*(run(case, b, wanted=wanted) for b in (backend, "reference")), 1e-11)
    case["index"] = torch.randint(60, (20,)).expand(6, 20)
    assert_close(*(run(case, b, wanted=wanted) for b in (backend, "reference")), 1e-11)
    shared = {**case, "index": case["index"][0]}
    assert_close(*(run(c, backend, wanted=wanted) for c in (case, shared)), 1e-12)


MASKS = {
    "ids": {"ids": True},
    "ids, self pairs kept": {"ids": True, "self_pairs": True},
    "labels": {"labels": True},
    "both": {"ids": True, "labels": True},
    "excluded": {"excluded": 0.2},
    "all": {"ids": True, "labels": True, "excluded": 0.2},
}


@backend_and("dtype", DTYPES, [torch.float32])
@objectives
@indices
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
def test_masks(backend, objective, index, dtype, options):
    sizes = (2, 3, 70, 6, 60) if backend in INTERPRETED else (9, 20, 150, 6, 100)
    case = make_difference(*sizes, objective=objective, index=index, **options)
    assert_close_to_truth(cast(case, dtype), backend, dtype, wanted=DIFFERENTIABLE)


@backends
@indices
def test_a_negative_with_the_anchors_id_is_left_out(backend, index):
    case = make_difference(2, 3, 5, 4, 5, index=index)
    if index == "own":
        case["index"] = torch.arange(5).expand(3, 5)
    elif index == "shared":
        case["index"] = torch.arange(5)
    case |= {"anchor_id": torch.tensor([1, 3]), "query_id": torch.tensor([10, 11, 12])}
    got = run(case, backend, wanted=("query", "anchor", "bank"))
    assert float(got["loss"]) == pytest.approx(loop_loss(case), rel=1e-12)
    # what row 1 is, only the other anchor sees
    case["bank"][1] += 1
    moved = run(case, backend, wanted=("query", "anchor", "bank"))
    torch.testing.assert_close(moved["anchor"][0], got["anchor"][0])
    assert not torch.allclose(moved["anchor"][1], got["anchor"][1])


@backends
@indices
def test_self_pairs(backend, index):
    case = make_difference(5, 5, 12, 4, 20, index=index)
    diagonal = float(functional.difference_nce(**case, backend=backend))
    kept = float(functional.difference_nce(**{**case, "self_pairs": True}, backend=backend))
    ids = {"anchor_id": torch.arange(5) + 50, "query_id": torch.arange(5) + 50}
    assert kept != pytest.approx(diagonal, rel=1e-3)
    by_id = functional.difference_nce(**{**case, **ids}, backend=backend)
    assert float(by_id) == pytest.approx(diagonal, rel=1e-12)
    alone = functional.difference_nce(**{**case, "query_id": ids["query_id"]}, backend=backend)
    assert float(alone) == pytest.approx(kept, rel=1e-12)


@backend_and("dtype", DTYPES, [torch.float32], BACKENDS)
@objectives
@indices
def test_all_negatives_masked(backend, objective, index, dtype):
    case = make_difference(4, 6, 30, 5, 12, objective=objective, index=index)
    case["query_label"] = torch.full((6,), 3)
    case["key_label"] = torch.full((12,) if index else (30,), 3)
    case = cast(case, dtype)
    assert_close_to_truth(case, backend, dtype, wanted=DIFFERENTIABLE)
    got = run(case, backend, wanted=DIFFERENTIABLE)
    assert got["bank"].eq(0).all()
    if objective == "infonce":
        assert all(abs(float(got[k].abs().max())) < 1e-5 for k in ("loss", "query", "scale"))


@backend_and("K", [1, 31, 33, 150], [33], BACKENDS)
@objectives
@indices
@pytest.mark.parametrize("options", [{}, {"ids": True, "labels": True}], ids=str)
@pytest.mark.parametrize("share", [0.05, 0.9])
def test_excluded_is_as_good_as_gone(backend, K, objective, index, options, share):
    """Against calls of one query each without them; duplicates are excluded one by one."""
    options = {**options, "objective": objective, "index": index, "excluded": share}
    case = make_difference(4, 6, K, 5, 12, self_pairs=True, **options)
    wanted = DIFFERENTIABLE
    assert_close(run(case, backend, wanted=wanted), without_excluded(case, wanted), 1e-9)


@backend_and("dtype", DTYPES, [torch.float32], BACKENDS)
@objectives
@indices
def test_all_negatives_excluded(backend, objective, index, dtype):
    case = make_difference(4, 6, 70, 5, 12, objective=objective, index=index, excluded=1.0)
    case = cast(case, dtype)
    assert_close_to_truth(case, backend, dtype, wanted=DIFFERENTIABLE)
    got = run(case, backend, wanted=DIFFERENTIABLE)
    assert got["bank"].eq(0).all()
    if objective == "infonce":
        assert all(abs(float(got[k].abs().max())) < 1e-5 for k in ("loss", "query", "scale"))
    else:
        assert float(got["loss"]) == pytest.approx(loop_loss(case), rel=CLOSE[dtype])


@backends
@indices
def test_excluded_pairs_that_are_made_exactly(backend, index):
    """Rows and queries close to an anchor, whose differences are taken one by one."""
    case = make_difference(3, 6, 40, 5, 12, index=index, excluded=0.4, self_pairs=True)
    case["bank"][2:6] = case["anchor"][1] + 1e-6 * case["bank"][2:6]
    case["query"][3] = case["anchor"][2] + 1e-6 * case["query"][3]
    expected = without_excluded(case, DIFFERENTIABLE)
    assert_close(run(case, backend, wanted=DIFFERENTIABLE), expected, 1e-7)


@backends
@indices
def test_excluded_beside_an_update(backend, index):
    case = make_difference(3, 6, 40, 8, 30, index=index, excluded=0.3)
    place, value = torch.tensor([3, 9, 3]), torch.ones(3, 8).double()
    expected = float(functional.difference_nce(**case, backend=backend))
    alone = case["bank"].clone()
    functional.bank_update_(alone, place, value, momentum=0.5, backend=backend)
    got = functional.difference_nce(**case, update=(place, value, 0.5), backend=backend)
    assert float(got) == expected
    assert torch.equal(case["bank"], alone)


# ------------------------------------------------------------------------------ vanishing, extremes


@backend_and(
    "dtype, eps, ids",
    list(itertools.product(DTYPES, [0.0, 1e-6], [False, True])),
    [(torch.float32, 0.0, True), (torch.float32, 1e-6, False)],
    BACKENDS,
)
@objectives
@indices
def test_keys_equal_to_an_anchor(backend, objective, index, dtype, eps, ids):
    A, B = (3, 4) if backend in INTERPRETED else (6, 7)
    case = make_difference(A, B, 40, 9, 40, objective=objective, index=index, eps=eps, ids=ids)
    case = cast(case, dtype)
    case["bank"][:A] = case["anchor"]  # bit for bit
    case["bank"][10] = case["anchor"][2]
    assert_close_to_truth(case, backend, dtype, wanted=DIFFERENTIABLE)
    if index is not None and dtype != torch.bfloat16:
        # A key that every anchor left out or saw: the same loss, with and without its exact row.
        assert math.isfinite(float(run(case, backend, wanted=("query",))["loss"]))


@backend_and("dtype", DTYPES, [torch.float64], BACKENDS)
@objectives
@indices
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_queries_equal_to_an_anchor(backend, objective, index, dtype, eps):
    case = make_difference(
        6, 6, 40, 9, 40, objective=objective, index=index, eps=eps, self_pairs=True
    )
    case = cast(case, dtype)
    case["query"] = case["anchor"].clone()
    case["positive"][3] = case["anchor"][1]
    case["bank"][5] = case["anchor"][4]
    if dtype == torch.float64:
        assert float(run(case, backend, wanted=("query",))["loss"]) == pytest.approx(
            loop_loss(case), rel=1e-11
        )
    plain, true = (
        run(case, "reference", wanted=DIFFERENTIABLE),
        truth(case, wanted=DIFFERENTIABLE),
    )
    got = run(case, backend, wanted=DIFFERENTIABLE)
    # With eps the slopes are of the size of 1 / eps, and so are their roundings.
    assert_close(got, true, CLOSE[dtype], plain)


@backends
@pytest.mark.parametrize("index", ["shared", "own"])
def test_nothing_but_vanishing_differences(backend, index):
    case = make_difference(4, 5, 6, 3, 6, index=index)
    case["bank"][:] = case["anchor"][0]
    case["anchor"][:] = case["anchor"][0]
    got = run(case, backend, wanted=DIFFERENTIABLE)
    assert float(got["loss"]) == pytest.approx(loop_loss(case), rel=1e-12)
    assert got["bank"].eq(0).all()
    case["query"][:] = case["anchor"][0]  # no pair has a direction
    assert all(x.eq(0).all() for x in run(case, backend, wanted=DIFFERENTIABLE).values())


@backend_and("dtype", [torch.float64, torch.float32], [torch.float32], BACKENDS)
@objectives
@pytest.mark.parametrize("sign", [1, -1])
@indices
def test_logits_of_ten_thousand(backend, objective, dtype, sign, index):
    case = make_difference(
        5, 6, 30, 8, 40, objective=objective, scale=sign * 1e4, offset=9.7, index=index
    )
    case["bank"][:6] = case["query"]  # cosines of 1
    case["positive"][3:] = -case["query"][3:]
    low = cast(case, dtype)
    got, true = run(low, backend, wanted=DIFFERENTIABLE), truth(low, wanted=DIFFERENTIABLE)
    assert torch.isfinite(got["loss"]) and float(true["loss"]) > 1e3
    assert_close(got, true, 1e-8 if dtype == torch.float64 else 2e-2)
    assert distance(got["loss"], true["loss"]) < (1e-12 if dtype == torch.float64 else 1e-5)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@indices
def test_tiny_terms_are_not_lost(backend, dtype, index):
    # With a large offset every term of the sum is exp(-large): their sum is the loss's gradient.
    sizes = (3, 2, 150, 6, 50) if backend in INTERPRETED else (4, 5, 900, 6, 100)
    case = make_difference(*sizes, scale=2.0, offset=25.0, index=index)
    low = cast(case, dtype)
    got, true = run(low, backend, wanted=DIFFERENTIABLE), truth(low, wanted=DIFFERENTIABLE)
    for k in true:
        assert distance(got[k], true[k]) < (1e-9 if dtype == torch.float64 else 5e-5), k
    low["positive"] = low["query"].clone()  # positives certain too: only tiny terms are left
    low["scale"], low["offset"] = (torch.tensor(x).double() for x in (80.0, 40.0))
    got, true = run(low, backend, wanted=("bank",)), truth(low, wanted=("bank",))
    for k in true:
        assert distance(got[k], true[k]) < (1e-8 if dtype == torch.float64 else 1e-3), k


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("index", ["shared", "own"])
def test_magnitudes_far_from_one(backend, dtype, index):
    for size in (1e-6, 1e6):
        case = make_difference(4, 6, 30, 8, 40, index=index)
        for name in ("query", "positive", "anchor", "bank"):
            case[name] = case[name] * size
        case = cast(case, dtype)
        got, true = run(case, backend, wanted=DIFFERENTIABLE), truth(case, wanted=DIFFERENTIABLE)
        for k in true:
            assert distance(got[k], true[k]) < (1e-10 if dtype == torch.float64 else 5e-5), k
            assert angle(got[k], true[k]) < 1e-4


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ratio", [30.0, 1e3, 1e6, 1e10])
@pytest.mark.parametrize("name", ["bank", "query"])
@objectives
@indices
def test_rows_much_longer_than_the_others(backend, objective, index, name, ratio, dtype):
    wanted = (DIFFERENTIABLE, tuple(k for k in DIFFERENTIABLE if k != "bank"))
    for sizes, options in itertools.product([(5, 7, 60, 24, 70), (1, 3, 20, 16, 30)], wanted):
        case = make_difference(*sizes, objective=objective, index=index)
        case[name][::2] *= ratio
        low = cast(case, dtype)
        got, true = run(low, backend, wanted=options), truth(low, wanted=options)
        assert_close(got, true, 1e-12 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@objectives
@indices
def test_an_eps_beside_long_coordinates(backend, objective, index):
    # What the origin's digits do not hold: the direction from an anchor to a key that equals it.
    for size in (1.0, 30.0):
        case = make_difference(1, 3, 20, 16, 20, objective=objective, index=index, eps=1e-6)
        for name in ("query", "positive", "anchor", "bank"):
            case[name] = case[name] * size
        case["bank"][::3] = case["anchor"][0]
        low = cast(case, torch.float32)
        low["bank"][::3] = low["anchor"][0]
        wanted = ("query", "positive", "scale")
        got, true = run(low, backend, wanted=wanted), truth(low, wanted=wanted)
        for k in true:
            assert distance(got[k], true[k]) < 2e-6, k


@backend_and(
    "D, value",  # rows of the bank are read as they are, if wide enough
    list(itertools.product([6, 16], [math.nan, math.inf, -math.inf])),
    [(6, math.nan), (6, -math.inf)],
)
@objectives
@indices
def test_what_is_not_finite_shows(backend, objective, index, value, D):
    for name in ("query", "positive", "anchor", "bank"):
        B = 2 if backend in INTERPRETED else 4
        case = make_difference(3, B, 20, D, 20, objective=objective, index=index)
        case = cast(case, torch.float32)
        row = 1 if index is None else int(case["index"].flatten()[3]) if name == "bank" else 1
        case[name][row, 2] = value
        some = [("query",)] if backend not in INTERPRETED else []
        for wanted in ((), *some, DIFFERENTIABLE):
            leaves = {k: case[k].clone().requires_grad_() for k in wanted}
            loss = functional.difference_nce(**{**case, **leaves}, backend=backend)
            assert loss.isnan(), (name, wanted)


# ---------------------------------------------------------------------------------- empty, autograd


@backend_and("dtype", DTYPES, [torch.float32], BACKENDS)
@objectives
@indices
@pytest.mark.parametrize(
    "sizes", [{"A": 0}, {"B": 0}, {"A": 0, "B": 0}, {"K": 0}, {"K": 0, "N": 0}, {"D": 0}], ids=str
)
def test_empty(backend, objective, index, dtype, sizes):
    case = cast(make_difference(**sizes, index=index, objective=objective), dtype)
    assert_close_to_truth(case, backend, dtype, wanted=DIFFERENTIABLE)
    if "K" not in sizes:
        got = run(case, backend, wanted=DIFFERENTIABLE)
        assert all(x.eq(0).all() for x in got.values())


@backends
@dtypes
def test_a_batch_of_one_has_no_pair(backend, dtype):
    case = cast(make_difference(1, 1), dtype)
    assert all(x.eq(0).all() for x in run(case, backend, wanted=DIFFERENTIABLE).values())
    case["self_pairs"] = True
    assert_close_to_truth(case, backend, dtype, wanted=DIFFERENTIABLE)


@backends
def test_positives_of_the_bank(backend):
    case = make_difference(3, 4, 6, 5, 9)
    case |= {"positive": None, "query_id": torch.tensor([3, 0, 8, 3])}
    given = {**case, "positive": case["bank"][case["query_id"]]}
    got, expected = (functional.difference_nce(**c, backend=backend) for c in (case, given))
    torch.testing.assert_close(got, expected)
    if backend != "reference":
        results = (run(case, b, wanted=("query", "bank")) for b in (backend, "reference"))
        assert_close(*results, 1e-12)  # the gradient of the positives reaches the bank


@backends
def test_dtypes_of_losses_and_gradients(backend):
    case = make_difference()
    low = cast(case, torch.bfloat16)
    assert functional.difference_nce(**low, backend=backend).dtype == torch.float32
    for name in ("query", "positive", "anchor"):
        mixed = {**low, name: low[name].float()}
        assert run(mixed, backend, wanted=DIFFERENTIABLE)[name].dtype == torch.float32
        mixed = {**low, name: low[name].double()}
        assert functional.difference_nce(**mixed, backend=backend).dtype == torch.float64
    single = cast(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(single, backend, wanted=("query",))
    low["bank"] = single["bank"]
    expected = run(low, backend, wanted=("query",))
    torch.testing.assert_close(got["loss"], expected["loss"])


@compiled
def test_double_backward_is_refused(backend):
    case = make_difference()
    query = case["query"].requires_grad_()
    loss = functional.difference_nce(**case, backend=backend)
    with pytest.raises(RuntimeError, match=r"crrcd_ext\.difference_nce: double backward"):
        torch.autograd.grad(loss, query, create_graph=True)


# ------------------------------------------------------------------------------------------- update


@backend_and("storage", [torch.float32, torch.bfloat16], [torch.bfloat16], BACKENDS)
@objectives
@indices
def test_the_update_comes_last(backend, objective, index, storage):
    case = cast(make_difference(4, 6, 40, 8, 30, index=index, objective=objective), torch.float32)
    case["bank"] = case["bank"].to(storage)
    wanted = ("query", "positive", "anchor")
    expected = run(case, backend, wanted=wanted)
    place = torch.tensor([3, 7, 3, 0])
    value = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    bank = case["bank"].clone()
    functional.bank_update_(bank, place, value, momentum=0.3, backend="reference")
    updated = {**case, "update": (place, value, 0.3)}
    got = run(updated, backend, wanted=wanted)
    assert all(torch.equal(got[k], expected[k]) for k in expected)  # read before it was written
    torch.testing.assert_close(case["bank"], bank)
    last = unit_rows(0.3 * 0 + value)  # momentum 0: rows are the values, the last of equal ids
    run({**case, "update": (place, value, 0.0)}, backend, wanted=wanted)
    torch.testing.assert_close(case["bank"][3], last[2].to(storage))


@pytest.mark.parametrize("backend", cases.BACKENDS + INTERPRETED)
@indices
def test_an_error_leaves_the_bank_as_it_was(backend, index):
    case = cast(make_difference(4, 6, 40, 8, 40, index=index), torch.float32)
    value, place = torch.ones(2, 8), torch.tensor([1, 2])
    wrong = [{"update": (torch.tensor([1, 40]), value, 0.5)}, {"update": (place, value, 2.0)}]
    if index is not None:
        outside = case["index"].clone()
        outside[-1] = 40
        wrong.append({"index": outside, "update": (place, value, 0.5)})
    before = case["bank"].clone()
    for change in wrong:
        with pytest.raises((IndexError, ValueError), match=r"crrcd_ext\.difference_nce: "):
            functional.difference_nce(**{**case, **change}, backend=backend)
        assert torch.equal(case["bank"], before)


# ---------------------------------------------------------------------- instruction sets, operators


@pytest.mark.parametrize("isa", ISAS)
class TestInstructionSets:
    @objectives
    @indices
    @dtypes
    def test_close_to_truth_and_no_read_of_what_was_not_written(self, isa, objective, index, dtype):
        _C.set_isa(isa)
        torch.set_num_threads(2)
        for sizes in ((5, 9, 140, 17, 150), (18, 3, 300, 33, 40)):
            options = {"ids": True, "labels": True, "excluded": 0.2, "index": index}
            case = make_difference(*sizes, objective=objective, **options)
            case["bank"][:3] = case["anchor"][:3] + 1e-3
            case["query"][0] = case["anchor"][1] + 1e-3
            case = cast(case, dtype)
            for wanted in ((), ("query",), ("scale",), DIFFERENTIABLE):
                if not wanted:
                    expected = functional.difference_nce(**case, backend="cpu")
                else:
                    expected = run(case, "cpu", wanted=wanted)
                    plain, true = run(case, "reference", wanted=wanted), truth(case, wanted=wanted)
                    assert_close(expected, true, CLOSE[dtype], plain)
                _C.set_poison(True)
                try:
                    if not wanted:
                        got = functional.difference_nce(**case, backend="cpu")
                        assert torch.equal(got, expected)
                    else:
                        got = run(case, "cpu", wanted=wanted)
                        assert all(torch.equal(got[k], expected[k]) for k in expected), wanted
                finally:
                    _C.set_poison(False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extremes(self, isa, dtype):
        _C.set_isa(isa)
        # The exponential of every instruction set sees the whole range of its argument.
        for scale, offset in ((1e4, 0.0), (1e4, 1e4), (1.0, 80.0), (1.0, -80.0), (1e-3, 700.0)):
            for index, objective in itertools.product(("shared", "own"), OBJECTIVES):
                options = {"index": index, "objective": objective}
                case = make_difference(3, 5, 60, 13, 50, scale=scale, offset=offset, **options)
                case = cast(case, dtype)
                results = (f(case, wanted=DIFFERENTIABLE) for f in (_cpu, truth, _plain))
                got, true, plain = results
                assert_close(got, true, 1e-9 if dtype == torch.float64 else 1e-3, plain)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("most", [-1.0, 1.0, 2.9, 5.0, 8.0, 14.0, 19.9, 20.1, 30.0])
    def test_products_of_many_factors(self, isa, dtype, most):
        # exp(logit) may be up to exp(most); the loss is the logarithm of products of 1 + exp(logit)
        _C.set_isa(isa)
        for index, scale in itertools.product(("shared", "own"), (4.0, -4.0)):
            for sizes in ((9, 6, 700, 10, 710), (35, 3, 250, 8, 260)):
                case = make_difference(*sizes, scale=scale, offset=4.0 - most, index=index)
                case["query"] = case["query"] + 4 * case["bank"].mean(0)  # cosines are mostly large
                case = cast(case, dtype)
                got, true = (f(case, wanted=("query", "scale", "offset")) for f in (_cpu, truth))
                assert_close(
                    got, true, CLOSE[dtype], _plain(case, wanted=("query", "scale", "offset"))
                )

    @pytest.mark.parametrize("name", ["query", "bank", "anchor"])
    @pytest.mark.parametrize("ratio", [1e4, 1e7, 1e9])
    def test_rows_of_another_size(self, isa, name, ratio):
        # cosines that are rounded far beyond 1 must not overflow what cosines of 1 would not
        _C.set_isa(isa)
        for index in ("shared", "own"):
            case = make_difference(8, 16, 640, 16, 700, scale=14.3, offset=4.0, index=index)
            case[name] = case[name].clone()
            case[name][::5] *= ratio
            case = cast(case, torch.float32)
            got = run(case, "cpu", wanted=("query", "scale", "offset"))
            assert all(x.isfinite().all() for x in got.values())
            if ratio == 1e4:
                assert_close({"loss": got["loss"]}, {"loss": truth(case)["loss"]}, 1e-3)


def _cpu(case, **options):
    return run(case, "cpu", **options)


def _plain(case, **options):
    return run(case, "reference", **options)


def _triton(case, **options):
    return run(case, "triton", **options)


@backend_and("threads", [1, 2, 3], [1])
@objectives
@indices
def test_bits_repeat(backend, threads, objective, index):
    torch.set_num_threads(threads)
    sizes = (3, 4, 100, 20, 110) if backend in INTERPRETED else (7, 20, 600, 20, 700)
    case = make_difference(*sizes, ids=True, objective=objective, index=index)
    case["bank"][: sizes[0]] = case["anchor"]
    case = cast(case, torch.float32)
    first = run(case, backend, wanted=DIFFERENTIABLE)
    for _ in range(1 if backend in INTERPRETED else 3):
        again = run(case, backend, wanted=DIFFERENTIABLE)
        assert all(torch.equal(first[k], again[k]) for k in first)
    assert_close(first, truth(case, wanted=DIFFERENTIABLE), 1e-5)


def arguments(need: int, dtype: torch.dtype, case: dict | None = None, **options) -> tuple:
    case = cast(case or make_difference(**options), dtype)
    names = ("query", "positive", "anchor", "bank", "scale", "offset", "index")
    masks = ("anchor_id", "query_id", "key_id", "query_label", "key_label", "excluded")
    settings = (case["self_pairs"], case["eps"], case["objective"])
    settings += (case.get("weights"), case.get("reduction", "mean"))
    leaves = [case[k].requires_grad_() for k in names[:6] if need & 1 << names.index(k)]
    assert len(leaves) == need.bit_count()
    return (*(case[k] for k in names), *(case.get(k) for k in masks), *settings, need)


@pytest.mark.skipif(_C is None, reason="the operators' kernels are the compiled module's")
class TestOperators:
    @dtypes
    @pytest.mark.parametrize("need", [0, 1, ALL])
    @pytest.mark.parametrize("index", INDICES)
    def test_opcheck(self, dtype, need, index):
        options = {"index": index, "ids": index == "own", "eps": 1e-6, "excluded": 0.3}
        given = arguments(need, dtype, **options)
        torch.library.opcheck(torch.ops.crrcd.difference_nce.default, given)

    def test_opcheck_with_an_update(self):
        given = arguments(0, torch.float32, ids=True)
        update = (torch.tensor([1, 3, 1]), torch.randn(3, 8), 0.5, True)
        torch.library.opcheck(torch.ops.crrcd.difference_nce_.default, (*given, *update))

    @pytest.mark.parametrize("bit", range(len(DIFFERENTIABLE)))
    @pytest.mark.parametrize("index", ["shared", "own"])
    def test_only_what_is_needed(self, bit, index):
        given = (*arguments(0, torch.float64, index=index)[:-1], 1 << bit)
        result = torch.ops.crrcd.difference_nce(*given)
        assert [x.numel() > 0 for x in result[1:]] == [i == bit for i in range(len(DIFFERENTIABLE))]

    @pytest.mark.parametrize(
        "position, value",
        [
            (1, torch.ones(6, 9)),
            (2, torch.ones(5, 7)),
            (3, torch.ones(13, 9)),
            (6, torch.zeros(5, 3, dtype=torch.int64)),
            (6, torch.full((6, 2), 13)),
            (7, torch.zeros(6, dtype=torch.int64)),
            (14, -1.0),
        ],
    )
    def test_operators_check_too(self, position, value):
        """Called past the functions, an operator still must not read outside of its tensors."""
        given = list(arguments(0, torch.float32))
        given[position] = value
        with pytest.raises((ValueError, IndexError), match=r"crrcd_ext\.difference_nce: \w+"):
            torch.ops.crrcd.difference_nce(*given)


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter runs where there is no GPU")
class TestTriton:
    """What the sizes of the tests above do not reach in the Triton kernels."""

    @objectives
    @indices
    def test_several_slices_and_segments(self, monkeypatch, objective, index):
        options = {"objective": objective, "index": index, "ids": True, "excluded": 0.3}
        case = make_difference(2, 3, 150, 12, 90, **options)
        expected = truth(case, wanted=DIFFERENTIABLE)
        monkeypatch.setattr(passes, "SEGMENT", 64)
        monkeypatch.setattr(own_keys, "MOST_BYTES", 64 * case["query"].numel() * 8)
        assert_close(run(case, "triton", wanted=DIFFERENTIABLE), expected, 1e-10)
        monkeypatch.setattr(launch, "multiprocessors", lambda device: 4)
        assert_close(run(case, "triton", wanted=DIFFERENTIABLE), expected, 1e-10)

    @objectives
    @pytest.mark.parametrize("D", [12, 130])
    @pytest.mark.parametrize("types", ["bfloat16", "float64"])
    def test_blocks_of_the_gpu(self, monkeypatch, objective, D, types):
        rows = configs.DEFAULTS["own_keys"]
        monkeypatch.setitem(rows, "interpreter", rows[types])
        case = make_difference(3, 2, 11, D, 20, objective=objective, labels=True)
        got, true = (f(case, wanted=DIFFERENTIABLE) for f in (_triton, truth))
        assert_close(got, true, 1e-10)

    @objectives
    @indices
    @pytest.mark.parametrize("size", [1.0, 2e-5, 1e4])  # at 2e-5 differences are subnormal
    def test_half_precision_operands(self, objective, index, size):
        case = make_difference(3, 4, 40, 20, 40, objective=objective, index=index)
        for name in ("query", "positive", "anchor", "bank"):
            case[name] = case[name] * size
        case = cast(case, torch.float16)
        wanted = ("query", "positive", "anchor", "bank", "scale", "offset")
        if size < 1:  # the gradients of the embeddings leave float16
            wanted = ("scale", "offset")
        results = (f(case, wanted=wanted) for f in (_triton, truth, _plain))
        got, true, plain = results
        assert got["loss"].dtype == torch.float32
        assert_close(got, true, 1e-3, plain)
        case["bank"][3 if index is None else int(case["index"].flatten()[3]), 2] = math.nan
        assert functional.difference_nce(**case, backend="triton").isnan()

    def test_an_eps_keeps_its_digits(self):
        case = make_difference(3, 3, 20, 5, 30, eps=1 / 3)
        got = float(functional.difference_nce(**case, backend="triton"))
        assert got == pytest.approx(loop_loss(case), rel=1e-14)

    @pytest.mark.parametrize("index", ["shared", "own"])
    def test_work_space_does_not_grow_with_the_negatives(self, monkeypatch, index):
        """But for the index: no tensor of size A x K or B x K x D is made."""
        monkeypatch.setattr(passes, "SEGMENT", 64)
        monkeypatch.setattr(own_keys, "MOST_BYTES", 1 << 14)
        largest = []
        for K in (256, 512):
            case = cast(make_difference(2, 2, K, 24, 16, index=index), torch.float32)
            given = arguments(ALL, torch.float32, case=case)
            with Largest() as mode:
                difference_nce.difference_nce(*given)
            largest.append(mode.bytes)
        assert largest[0] == largest[1] < 2 * 256 * 24 * 4

    @dtypes
    @pytest.mark.parametrize("need", [0, ALL])
    @pytest.mark.parametrize("index", INDICES)
    def test_opcheck(self, dtype, need, index):
        given = arguments(need, dtype, A=2, B=3, index=index, ids=index == "own", eps=1e-6)
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        operator = torch.ops.crrcd_triton.difference_nce.default
        torch.library.opcheck(operator, given, test_utils=utils)

    def test_opcheck_with_an_update(self):
        given = arguments(0, torch.float32, A=2, B=3, ids=True)
        update = (torch.tensor([1, 3, 1]), torch.randn(3, 8), 0.5, True)
        operator = torch.ops.crrcd_triton.difference_nce_.default
        torch.library.opcheck(operator, (*given, *update), test_utils=("test_schema",))

    @pytest.mark.parametrize("bit", range(len(DIFFERENTIABLE)))
    @pytest.mark.parametrize("index", ["shared", "own"])
    def test_only_what_is_needed(self, bit, index):
        given = (*arguments(0, torch.float64, A=2, B=3, index=index)[:-1], 1 << bit)
        result = torch.ops.crrcd_triton.difference_nce(*given)
        assert [x.numel() > 0 for x in result[1:]] == [i == bit for i in range(len(DIFFERENTIABLE))]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.nbytes)
        return result


@pytest.mark.parametrize("backend", cases.COMPILED + INTERPRETED)
def test_compiles_without_a_break(backend):
    case = cast(make_difference(4, 6, 20, 8, 30, ids=True, eps=1e-6), torch.float32)
    value = torch.randn(2, 8)

    def step(query, bank):
        update = (torch.tensor([2, 5]), value, 0.5)
        rest = {k: v for k, v in case.items() if k not in ("query", "bank")}
        loss = functional.difference_nce(
            query * 2, bank=bank, **rest, update=update, backend=backend
        )
        return loss * 3

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        query, bank = case["query"].clone().requires_grad_(), case["bank"].clone()
        loss = function(query, bank)
        loss.backward()
        results.append({"loss": loss.detach(), "query": query.grad, "bank": bank})
    assert_close(results[1], results[0], 1e-6)
    assert not torch.equal(results[0]["bank"], case["bank"])


@pytest.mark.parametrize("backend", cases.COMPILED)  # the emulation would take minutes
@pytest.mark.parametrize("index", ["shared", "own"])
def test_memory_does_not_grow_with_the_negatives(backend, index):
    """Nothing of size A x K or B x K x D: here they would be 51 MB (shared) or 655 MB (own)."""
    K = 200_000 if index == "shared" else 20_000
    case = cast(make_difference(64, 64, K, 128, 2000, index=index), torch.float32)
    small = {**case, "index": case["index"][..., :1000]}
    wanted = ("query", "positive", "anchor")
    run(small, backend, wanted=wanted)
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("peak memory is read from Linux's /proc")

    def status(name: str) -> float:
        text = Path("/proc/self/status").read_text()
        return int(text.split(f"{name}:")[1].split()[0]) / 1024

    reset.write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run(case, backend, wanted=wanted)
    entries = 0 if index == "shared" else 64 * K * 4 / 2**20
    assert status("VmHWM") - before < 24 + entries
