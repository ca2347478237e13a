"""functional.instance_nce against the formula: loss, gradients, every order of the negatives."""

from __future__ import annotations

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
    make_excluded,
    make_instance,
    moved,
    run,
    strided,
    truth,
    without_excluded,
)
from helpers.emulated import EMULATED
from helpers.interpreted import INTERPRETED
from helpers.on_device import ON_DEVICE, native
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from crrcd_ext import _backend, functional

BACKENDS, COMPILED = (names + EMULATED + INTERPRETED for names in (cases.BACKENDS, cases.COMPILED))
_C = _backend.compiled
AVAILABLE = _C.isa_available() if _C else []
TRITON = [name for name in COMPILED if name.endswith("triton")]
needs_triton = pytest.mark.skipif(not TRITON, reason="kernels in Triton cannot run here")
OBJECTIVES = ["nce", "infonce"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CLOSE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}
# The bank's gradient is always computed in the bucketed order: without it both can be forced.
BUT_THE_BANK = tuple(k for k in DIFFERENTIABLE if k != "bank")

# How the negatives are given and worked off: index, order, gradients.
ORDERS = {
    "whole bank": (None, None, DIFFERENTIABLE),
    "shared": ("shared", None, DIFFERENTIABLE),
    "direct": ("own", "direct", BUT_THE_BANK),
    "bucketed": ("own", "bucketed", BUT_THE_BANK),
    "bucketed, with the bank's gradient": ("own", None, DIFFERENTIABLE),
}
all_orders = pytest.mark.parametrize("how", ORDERS.values(), ids=ORDERS.keys())


def each_order(backends: list[str]) -> pytest.MarkDecorator:
    """Backends and their orders: only "cpu" has more than one for a query's own negatives."""
    pairs = {
        f"{backend}-{name}": (backend, how)
        for backend in backends
        for name, how in ORDERS.items()
        if name != "bucketed" or backend == "cpu"
    }
    return pytest.mark.parametrize("backend, how", pairs.values(), ids=pairs.keys())


@pytest.fixture(autouse=True)
def _order_of_the_process():
    yield
    if _C is not None:
        _C.set_instance_order(None)
        _C.set_poison(False)


def force_order(order: str | None) -> None:
    if _C is not None:
        _C.set_instance_order(order)


def prepared(how: tuple, *sizes: int, **options) -> tuple[dict, dict]:
    """A case with its order forced, and the options of its runs."""
    index, order, wanted = how
    force_order(order)
    return make_instance(*sizes, index=index, **options), {"wanted": wanted}


def assert_close_to_truth(case: dict, backend: str, dtype: torch.dtype, **options) -> None:
    plain = run(case, "reference", **options)
    assert_close(run(case, backend, **options), truth(case, **options), CLOSE[dtype], plain)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def loop_loss(case: dict) -> float:
    """The loss entry by entry in Python numbers, masks by their definition."""
    scale, offset = float(case["scale"]), float(case["offset"])
    query, positive, bank = (case[k].tolist() for k in ("query", "positive", "bank"))
    ids = {
        k: case[k].tolist() if case.get(k) is not None else None
        for k in ("query_id", "key_id", "query_label", "key_label")
    }

    def logit(x, y):
        return scale * sum(a * b for a, b in zip(x, y, strict=True)) - offset

    total = 0.0
    for b in range(len(query)):
        rows = range(len(bank))
        if case["index"] is not None:
            rows = (case["index"] if case["index"].dim() == 1 else case["index"][b]).tolist()
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
            logits.append(logit(query[b], bank[n]))
        own = logit(query[b], positive[b])
        if case["objective"] == "nce":
            total += softplus(-own) + sum(softplus(x) for x in logits)
        else:
            top = max([own, *logits])
            total += top - own + math.log(sum(math.exp(x - top) for x in [own, *logits]))
    return total / len(query) if query else 0.0


# ---------------------------------------------------------------------------------------- formula

VARIANTS = {
    "plain": {},
    "ids": {"ids": True},
    "labels": {"labels": True},
    "ids and labels": {"ids": True, "labels": True},
    "excluded": {"excluded": 0.3},
    "everything": {"ids": True, "labels": True, "excluded": 0.3},
    "no offset": {"offset": 0.0},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.mark.parametrize("objective", OBJECTIVES)
@variants
@each_order(BACKENDS)
def test_loss_is_the_formula(backend, objective, options, how):
    case, _ = prepared(how, objective=objective, **options)
    loss = functional.instance_nce(**case, backend=backend)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(loop_loss(case), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("objective", OBJECTIVES)
@variants
@each_order(BACKENDS)
def test_gradcheck(backend, objective, options, how):
    options = {"offset": 0.3, **options}
    case, runs = prepared(how, 3, 5, 3, 6, objective=objective, scale=3.0, **options)
    names = [k for k in runs["wanted"] if case.get(k) is not None]
    leaves = [case[k].requires_grad_() for k in names]

    def loss(*values):
        return functional.instance_nce(
            **{**case, **dict(zip(names, values, strict=True))}, backend=backend
        )

    # By a few random directions instead of every entry where each call takes long.
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=backend in INTERPRETED)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_positive_may_be_the_banks_own_row(backend):
    case = make_instance(N=30)
    case["query_id"] = torch.tensor([4, 29, 0, 4, 7, 11])
    given = {**case, "positive": case["bank"][case["query_id"]]}
    case["positive"] = None
    expected = functional.instance_nce(**given, backend=backend)
    assert torch.equal(functional.instance_nce(**case, backend=backend), expected)


# ------------------------------------------------------------------------------------------ budget


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 300, 128, 900), (33, 257, 17, 500), (5, 700, 130, 300)])
@each_order(COMPILED)
def test_error_budget(backend, dtype, objective, shape, how):
    if backend in INTERPRETED:
        shape = (shape[0] // 2, shape[1] // 2, *shape[2:])
    cases = []
    for seed in range(1 if backend in INTERPRETED else 3):
        case, runs = prepared(how, *shape, objective=objective, ids=True, seed=seed)
        cases.append(case)
    assert_within_budget(cases, backend, dtype, **runs)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("index, wanted", [("own", BUT_THE_BANK), ("shared", DIFFERENTIABLE)])
def test_error_budget_at_working_size(backend, objective, index, wanted):
    torch.set_num_threads(2)
    sizes, seeds = {"own": (8, 4096, 128, 20_000), "shared": (64, 20_000, 128, 20_000)}[index], 1
    if backend in INTERPRETED:  # one would leave sums to luck
        sizes, seeds = {"own": (2, 2048, 128, 5000), "shared": (64, 1000, 128, 1000)}[index], 3
    options = {"index": index, "objective": objective, "offset": math.log(sizes[1])}
    cases = [make_instance(*sizes, seed=seed, **options) for seed in range(seeds)]
    for order in ("direct", "bucketed") if index == "own" and backend == "cpu" else (None,):
        force_order(order)
        assert_within_budget(cases, backend, torch.float32, wanted=wanted)


@pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 37])
@each_order(COMPILED)
def test_bank_storage(backend, storage, dtype, dim, how):
    case, _ = prepared(how, 5, 70, dim, 60)
    case = cast(case, dtype, also_bank=False)
    case["bank"][3] *= 1e-5  # subnormal in float16
    case["bank"] = case["bank"].to(storage)
    got, true = run(case, backend, wanted=BUT_THE_BANK), truth(case, wanted=BUT_THE_BANK)
    assert_close(got, true, {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 2e-2))


@pytest.mark.parametrize("objective", OBJECTIVES)
@each_order([name for name in BACKENDS if name != "cpu"])
def test_float16(backend, objective, how):
    case, _ = prepared(how, 6, 200, 40, 60, objective=objective, ids=True)
    low = cast(case, torch.float16)
    plain = run(low, "reference", wanted=BUT_THE_BANK)
    got = run(low, backend, wanted=BUT_THE_BANK)
    assert_close(got, truth(low, wanted=BUT_THE_BANK), 1e-3, plain)


@needs_triton
@each_order(TRITON or ["triton"])
def test_slopes_below_what_float16_has(backend, how):
    # Each is some 1e-8, and they are all that the queries' gradients are made of.
    case, _ = prepared(how, 5, 500, 16, 300, scale=5e3, offset=17.0)
    case["query"] *= 1e-3
    case["positive"] = case["query"] * 2e4  # certain
    low = cast(case, torch.float16)
    got = run(low, backend, wanted=("query",))["query"]
    assert distance(got, truth(low, wanted=("query",))["query"]) < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.bfloat16])
def test_a_bank_with_a_gradient_takes_part_in_the_dtype(backend, storage):
    case = cast(make_instance(4, 20, 8, 30), torch.bfloat16)
    case["bank"] = case["bank"].to(storage)
    got = run(case, backend)
    assert got["loss"].dtype == (torch.float64 if storage == torch.float64 else torch.float32)
    assert got["bank"].dtype == storage
    assert_close(got, truth(case), 4e-2 if storage == torch.bfloat16 else 5e-3)


# ------------------------------------------------------------------------------------ ragged sizes


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 17, 128, 130])
@each_order(COMPILED)
def test_ragged_sizes(backend, dtype, objective, dim, how):
    sizes = [(1, 1), (1, 65), (5, 1), (5, 65)]
    if backend in INTERPRETED:
        sizes = sizes[::3] if dim == 1 else sizes[3:]
    for queries, keys in sizes:
        case, runs = prepared(how, queries, keys, dim, 40, objective=objective, ids=True)
        assert_close_to_truth(cast(case, dtype), backend, dtype, **runs)


size = st.integers(1, 150)
drawn = {
    "sizes": st.tuples(size, size, size, size),
    "how": st.sampled_from(list(ORDERS.values())),
    "masks": st.tuples(st.booleans(), st.booleans()),
    "objective": st.sampled_from(OBJECTIVES),
    "seed": st.integers(0, 1000),
    "threads": st.integers(1, 3),
}


def check_drawn(backend, dtype, sizes, how, masks, objective, seed, threads):
    torch.set_num_threads(threads)
    ids, labels = masks
    case, runs = prepared(how, *sizes, objective=objective, seed=seed, ids=ids, labels=labels)
    assert_close_to_truth(cast(case, dtype), backend, dtype, **runs)


@pytest.mark.parametrize("backend", [name for name in COMPILED if name not in INTERPRETED])
@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis_settings(max_examples=40)
@given(**drawn)
def test_drawn_sizes(backend, dtype, **values):
    check_drawn(backend, dtype, **values)


@pytest.mark.skipif(not INTERPRETED, reason="a few are for where Python runs the kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis_settings(max_examples=5)
@given(**drawn)
def test_few_drawn_sizes(dtype, **values):
    check_drawn("triton", dtype, **values)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("queries", [255, 256, 257, 520])
def test_many_queries(backend, queries):
    # More than meet a tile of shared keys at a time.
    case = make_instance(queries, 70, 9, 80, index="shared", ids=True)
    assert_close(run(case, backend), run(case, "reference"), 1e-11)
    case["objective"] = "infonce"
    assert_close(run(case, backend), run(case, "reference"), 1e-11)


@pytest.mark.parametrize("objective", OBJECTIVES)
@each_order(COMPILED)
def test_many_negatives(backend, objective, how):
    # Several tiles or chunks for every thread, many entries a row of the bank.
    torch.set_num_threads(2)
    keys = 1001 if backend in INTERPRETED else 20_001
    case, runs = prepared(how, 3, keys, 5, 7000, objective=objective, offset=math.log(keys))
    assert_close(run(case, backend, **runs), run(case, "reference", **runs), 1e-10)
    low = cast(case, torch.float32)
    assert_close(run(low, backend, **runs), truth(low, **runs), 5e-5)


@needs_triton
@pytest.mark.parametrize("objective", OBJECTIVES)
@each_order(TRITON or ["triton"])
def test_several_pieces(backend, objective, how, monkeypatch):
    """Work that has to be done in pieces only when there is much of it."""
    from crrcd_ext.triton import instance_nce
    from crrcd_ext.triton.kernels import tile

    monkeypatch.setattr(tile, "MOST_TILES", 2)
    for dim, rows in ((3, 200), (140, 300)):
        monkeypatch.setattr(instance_nce, "SEGMENT_BYTES", 8 * dim * rows)
        case, runs = prepared(how, 3, 250, dim, 90, objective=objective, ids=True, excluded=0.3)
        if case["index"] is not None:
            case["index"] = case["index"].repeat_interleave(3, -1)
            case["excluded"] = make_excluded(3, 750, 0.3)
        assert_close(run(case, backend, **runs), run(case, "reference", **runs), 1e-11)


@pytest.mark.parametrize("backend", cases.COMPILED)  # the emulation would take minutes
def test_more_entries_than_are_sorted_at_once(backend):
    torch.set_num_threads(2)
    case = make_instance(2, 2_200_000, 1, 50)
    _C.set_instance_order("bucketed")
    for objective in OBJECTIVES:
        case["objective"] = objective
        assert_close(run(case, backend), run(case, "reference"), 1e-9)
    # an id that only the last batch meets
    case["index"][1, -1] = 50
    before = case["bank"].clone()
    update = torch.tensor([3]), torch.ones(1, 1), 0.5
    with pytest.raises(IndexError, match=r"index: .* got 50 at position \[1, 2199999\]"):
        functional.instance_nce(**case, update=update, backend=backend)
    assert torch.equal(case["bank"], before)


@pytest.mark.parametrize("backend", cases.COMPILED)
@pytest.mark.parametrize("keys", [3, 700])
def test_many_queries_with_negatives_of_their_own(backend, keys):
    # Short runs in a tile and long ones, several lists of entries with the latter.
    torch.set_num_threads(2)
    queries = 9000 if keys > 3 else 600
    case = make_instance(queries, keys, 2, 40 if keys > 3 else 5000, ids=True)
    _C.set_instance_order("bucketed")
    for objective in OBJECTIVES:
        case["objective"] = objective
        assert_close(run(case, backend), run(case, "reference"), 1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("index", ["own", "shared"])
@pytest.mark.parametrize("backend", cases.COMPILED)
def test_no_columns(backend, index, objective):
    case = make_instance(3, 5, 0, 7, index=index, objective=objective)
    for order in ("direct", "bucketed"):
        _C.set_instance_order(order)
        _C.set_poison(True)
        try:
            got = run(case, backend)
        finally:
            _C.set_poison(False)
        assert_close(got, run(case, "reference"), 1e-12)


@pytest.mark.parametrize("backend", cases.COMPILED)
@pytest.mark.parametrize("learns", [True, False])
def test_no_rows(backend, learns):
    case = make_instance(2, 3, 8, 0)
    case["bank"].requires_grad_(learns)
    for order in ("direct", "bucketed"):
        _C.set_instance_order(order)
        with pytest.raises(IndexError, match=r"index: expected rows of the bank in \[0, 0\)"):
            functional.instance_nce(**case, backend=backend)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 7, 5, 9), (5, 0, 7, 9), (5, 0, 7, 0), (0, 0, 7, 0)])
@each_order(BACKENDS)
def test_empty(backend, objective, dtype, sizes, how):
    case, runs = prepared(how, *sizes, objective=objective)
    case = cast(case, dtype)
    got = run(case, backend, **runs)
    assert_close(got, truth(case, **runs), CLOSE[dtype], run(case, "reference", **runs))
    if sizes[0] == 0:
        assert all(x.eq(0).all() for x in got.values())


# ----------------------------------------------------------------------------------- strides, masks


@pytest.mark.parametrize("dtype", DTYPES)
@each_order(BACKENDS)
def test_strided_inputs(backend, dtype, how):
    case, runs = prepared(how, 5, 70, 16, 30, ids=True, labels=True, excluded=0.2)
    case = cast(case, dtype)
    expected = run(case, backend, **runs)
    names = [k for k in runs["wanted"] if case.get(k) is not None]
    views = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    leaves = {k: views[k].requires_grad_() for k in names}
    loss = functional.instance_nce(**views, backend=backend)
    gradients = torch.autograd.grad(loss * 0.7, list(leaves.values()))
    got = {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}
    assert_close(got, expected, {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 1e-2))


@pytest.mark.parametrize("dim", [16, 19])
@each_order(COMPILED)
def test_nothing_beyond_a_row_is_read(backend, dim, how):
    # Rows of a wider matrix: what lies behind each is NaN, which a product with 0 would show.
    case, runs = prepared(how, 5, 70, dim, 30)
    case = cast(case, torch.float32)
    wide = torch.full((30 if case["index"] is not None else 70, dim + 5), math.nan)
    wide[:, :dim] = case["bank"]
    expected = run(case, backend, **runs)
    case["bank"] = wide[:, :dim]
    got = run(case, backend, **runs)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("order", ["direct", "bucketed"])
def test_an_index_is_read_where_it_lies(backend, order):
    force_order(order)
    case = make_instance(5, 70, 8, 30)
    expected = functional.instance_nce(**case, backend=backend)
    index = case["index"]
    assert not index.is_contiguous()
    backward = index.flip(1).contiguous().flip(1)
    for view in (index.T.contiguous().T, backward, index.repeat_interleave(3, 1)[:, 1::3]):
        got = functional.instance_nce(**{**case, "index": view}, backend=backend)
        assert torch.equal(got, expected)
    shared = {**case, "index": index[:1].expand(5, -1)}
    got = functional.instance_nce(**shared, backend=backend)
    once = functional.instance_nce(**{**case, "index": index[0]}, backend=backend)
    torch.testing.assert_close(got, once)


@each_order(BACKENDS)
def test_key_id_defaults_to_the_position(backend, how):
    case, runs = prepared(how, 6, 40, 8, 12)
    case["query_id"] = torch.tensor([0, 3, 3, 11, 12, -1])  # the last two may name no row
    named = {**case, "key_id": torch.arange(len(case["bank"]))}
    assert_close(run(case, backend, **runs), run(named, backend, **runs), 1e-14)
    assert float(run(case, backend)["loss"]) == pytest.approx(loop_loss(case), rel=1e-12)
    unmasked = {**case, "query_id": None}
    assert float(run(case, backend)["loss"]) < float(run(unmasked, backend)["loss"])


@each_order(BACKENDS)
def test_ids_beyond_32_bits(backend, how):
    case, _ = prepared(how, 6, 12, 8, 12)
    case["query_id"] = torch.arange(6) + 2**40
    for above in (0, 2**40):  # equal in the low 32 bits only, equal
        case["key_id"] = torch.arange(12) + above
        loss = functional.instance_nce(**case, backend=backend)
        assert float(loss) == pytest.approx(loop_loss(case), rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
@each_order(BACKENDS)
def test_all_negatives_masked(backend, objective, dtype, how):
    case, runs = prepared(how, 6, 70, 8, 12, objective=objective)
    case["query_label"] = torch.tensor([9, 9, 0, 9, 9, 9])
    case["key_label"] = torch.full((len(case["bank"]),), 9)
    case = cast(case, dtype)
    got, true = run(case, backend, **runs), truth(case, **runs)
    assert_close(got, true, CLOSE[dtype], run(case, "reference", **runs))
    case["query_label"][:] = 9
    got = run(case, backend, **runs)
    assert_close(got, truth(case, **runs), CLOSE[dtype], run(case, "reference", **runs))
    if "bank" in got:
        assert got["bank"].eq(0).all()
    if objective == "infonce":  # the positive alone is certain: nothing to learn
        assert all(abs(float(got[k].abs().max())) < 1e-5 for k in ("loss", "query", "scale"))


# How many of a query's negatives are excluded: few, most, and all but those of a query or two.
SHARES = [0.05, 0.9]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("K", [1, 31, 32, 33, 150])
@each_order(BACKENDS)
def test_excluded_is_as_good_as_gone(backend, K, objective, share, how):
    """Against calls of one query each without them; duplicates are excluded one by one."""
    case, runs = prepared(how, 6, K, 8, 12, objective=objective, excluded=share)
    assert_close(run(case, backend, **runs), without_excluded(case, **runs), 1e-10)
    more, runs = prepared(
        how, 6, K, 8, 12, objective=objective, excluded=share, ids=True, labels=True
    )
    assert_close(run(more, backend, **runs), without_excluded(more, **runs), 1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
@each_order(BACKENDS)
def test_excluded_of_several_blocks_of_queries(backend, objective, how):
    case, runs = prepared(how, 130, 150, 8, 90, objective=objective, excluded=0.3)
    assert_close(run(case, backend, **runs), truth(case, **runs), 1e-10)


@pytest.mark.parametrize("scale, offset", [(0.0, 1.0), (-7.0, 0.5), (1e4, 9.7), (2.0, -1e6)])
@pytest.mark.parametrize("dtype", DTYPES)
@each_order(BACKENDS)
def test_excluded_at_any_scale(backend, dtype, scale, offset, how):
    case, runs = prepared(how, 6, 70, 8, 12, scale=scale, offset=offset, excluded=0.3)
    case = cast(case, dtype)
    plain = run(case, "reference", **runs)
    assert_close(run(case, backend, **runs), without_excluded(case, **runs), CLOSE[dtype], plain)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
@each_order(BACKENDS)
def test_all_negatives_excluded(backend, objective, dtype, how):
    case, runs = prepared(how, 6, 70, 8, 12, objective=objective, excluded=1.0)
    case = cast(case, dtype)
    got = run(case, backend, **runs)
    assert_close(got, truth(case, **runs), CLOSE[dtype], run(case, "reference", **runs))
    if "bank" in got:
        assert got["bank"].eq(0).all()
    if objective == "infonce":
        assert all(abs(float(got[k].abs().max())) < 1e-5 for k in ("loss", "query", "scale"))
    else:
        logit = case["scale"] * (case["query"] * case["positive"]).double().sum(-1) - case["offset"]
        expected = float(torch.nn.functional.softplus(-logit).mean())
        assert float(got["loss"]) == pytest.approx(expected, rel=CLOSE[dtype])


@each_order(BACKENDS)
def test_excluded_beside_an_update(backend, how):
    case, _ = prepared(how, 6, 40, 8, 30, excluded=0.3)
    index, value = torch.tensor([3, 9, 3]), torch.ones(3, 8).double()
    expected = float(functional.instance_nce(**case, backend=backend))
    alone = case["bank"].clone()
    functional.bank_update_(alone, index, value, momentum=0.5, backend=backend)
    got = functional.instance_nce(**case, update=(index, value, 0.5), backend=backend)
    assert float(got) == expected
    assert torch.equal(case["bank"], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@each_order(COMPILED)
def test_duplicates_add_up(backend, dtype, how):
    case, runs = prepared(how, 5, 300, 16, 4)  # 300 draws out of 4 rows
    assert_close_to_truth(cast(case, dtype), backend, dtype, **runs)


# ----------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
@each_order(BACKENDS)
def test_logits_of_ten_thousand(backend, objective, dtype, sign, how):
    case, runs = prepared(how, 6, 70, 16, 40, objective=objective, scale=1e4, offset=9.7)
    # Planted: queries that are rows of the bank, so that cosines reach +-1.
    case["query"] = sign * case["bank"][:6].clone()
    if case["index"] is not None:
        case["index"][..., :6] = torch.arange(6)
    case["positive"][:3] = case["query"][:3]
    case["positive"][3:] = -case["query"][3:]
    low = cast(case, dtype)
    got, true = run(low, backend, **runs), truth(low, **runs)
    assert all(x.isfinite().all() for x in got.values())
    assert float(true["loss"]) > 1e3
    tolerance = {torch.float64: 1e-8, torch.float32: 2e-2}.get(dtype)
    if tolerance:  # a logit is rounded by 1e4 eps, and one near 0 shifts its gradient by as much
        assert_close(got, true, tolerance)
    assert distance(got["loss"], true["loss"]) < {torch.float64: 1e-12}.get(dtype, 2e-2)


@each_order(COMPILED)
def test_a_rising_maximum(backend, how):
    # Every chunk and every tile raises the maximum of what was summed before.
    torch.set_num_threads(2)
    case, runs = prepared(how, 5, 1000, 16, 1000, objective="infonce", scale=300.0)
    order = (case["bank"] @ case["query"][0]).argsort()
    case["bank"] = case["bank"][order]
    if case["index"] is not None:
        case["index"] = torch.arange(1000).expand_as(case["index"])
    assert_close(run(case, backend, **runs), run(case, "reference", **runs), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each_order(BACKENDS)
def test_tiny_terms_are_not_lost(backend, dtype, how):
    # With a large offset every term of the sum is exp(-large): their sum is the loss's gradient.
    case, runs = prepared(how, 5, 1000, 16, 100, scale=2.0, offset=25.0)
    low = cast(case, dtype)
    got, true = run(low, backend, **runs), truth(low, **runs)
    for k in true:
        assert distance(got[k], true[k]) < (1e-9 if dtype == torch.float64 else 5e-5), k
    low = cast({**case, "positive": case["query"]}, dtype)
    low["scale"], low["offset"] = torch.tensor(80.0).double(), torch.tensor(40.0).double()
    got, true = run(low, backend, **runs), truth(low, **runs)  # the positives are certain too
    for k in true:
        assert distance(got[k], true[k]) < (1e-8 if dtype == torch.float64 else 1e-3), k


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@each_order(BACKENDS)
def test_a_key_that_is_not_finite_shows(backend, objective, value, how):
    case, _ = prepared(how, 5, 70, 16, 40, objective=objective)
    row = 7 if case["index"] is None else case["index"].flatten()[7]
    case["bank"][row, 3] = value
    case["query"][:, 3] = 0.5
    loss = functional.instance_nce(**case, backend=backend)
    assert not loss.isfinite()


# -------------------------------------------------------------------------- autograd, dtypes, state


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("index", ["own", "shared", None])
def test_gradients_only_where_asked(backend, objective, index):
    case = make_instance(6, 70, 8, 40, index=index, objective=objective)
    everything = run(case, backend)
    names = ("query", "positive", "bank", "scale", "offset")
    for wanted in [(k,) for k in names] + [("query", "bank"), ("positive", "scale")]:
        got = run(case, backend, wanted=wanted)
        assert_close(got, {k: everything[k] for k in ("loss", *wanted)}, 1e-12)
    assert not functional.instance_nce(**case, backend=backend).requires_grad
    arguments = [case[k] for k in names] + [case["index"], *[None] * 5, objective, None, "mean"]
    operators = getattr(torch.ops, _backend.COMPILED[backend].library)
    for bit in range(5):
        result = operators.instance_nce(*arguments, 1 << bit)
        assert [x.numel() > 0 for x in result[1:]] == [i == bit for i in range(5)]
        assert [list(x.shape) for x in result[1:] if x.numel() == 0] == [[0]] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_dtype_and_promotion(backend):
    low = cast(make_instance(), torch.bfloat16)
    assert functional.instance_nce(**low, backend=backend).dtype == torch.float32
    for name in ("query", "positive"):
        assert run({**low, name: low[name].float()}, backend)[name].dtype == torch.float32
        mixed = {**low, name: low[name].double()}
        assert functional.instance_nce(**mixed, backend=backend).dtype == torch.float64
    wide_bank = {**low, "bank": low["bank"].double()}
    assert functional.instance_nce(**wide_bank, backend=backend).dtype == torch.float32
    for scalar in (torch.float32, torch.float64, torch.bfloat16):
        again = {**low, "scale": low["scale"].to(scalar), "offset": low["offset"].to(scalar)}
        assert run(again, backend)["scale"].dtype == scalar


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    case = cast(make_instance(6, 60, 12, 80), torch.float32)
    low = cast(case, torch.bfloat16, also_bank=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(case, backend, wanted=BUT_THE_BANK)
    expected = run(low, backend, wanted=BUT_THE_BANK)
    assert torch.equal(got["loss"], expected["loss"])
    assert all(torch.equal(got[k].to(expected[k].dtype), expected[k]) for k in expected)


@pytest.mark.parametrize("backend", COMPILED)
def test_double_backward_is_refused(backend):
    case = make_instance()
    query = case["query"].requires_grad_()
    loss = functional.instance_nce(**case, backend=backend)
    with pytest.raises(RuntimeError, match=r"crrcd_ext\.instance_nce: double backward"):
        torch.autograd.grad(loss, query, create_graph=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
@each_order(COMPILED)
def test_bits_repeat_and_threads_agree(backend, threads, objective, how, request):
    if backend in ON_DEVICE and how[0] and "bank" in how[2]:
        # rows that are named several times are added to in any order, unless this forbids it
        torch.use_deterministic_algorithms(True)
        request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    sizes = (3, 150, 33, 100) if backend in INTERPRETED else (20, 1000, 33, 700)
    case, runs = prepared(how, *sizes, objective=objective, ids=True)
    case = cast(case, torch.float32)
    torch.set_num_threads(threads)
    first = run(case, backend, **runs)
    for _ in range(1 if backend in INTERPRETED else 3):
        again = run(case, backend, **runs)
        assert all(torch.equal(first[k], again[k]) for k in first)
    assert_close(first, truth(case, **runs), 2e-6, run(case, "reference", **runs))


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("objective", OBJECTIVES)
@all_orders
def test_every_instruction_set(isa, objective, how):
    """Results, and that scratch memory full of NaN shows nowhere."""
    _C.set_isa(isa)
    for dtype in DTYPES:
        for dim in (64, 37):
            options = {"objective": objective, "ids": True, "excluded": 0.2}
            case, runs = prepared(how, 9, 150, dim, 90, **options)
            low = cast(case, dtype)
            if dtype == torch.float64:
                assert_close(run(low, "cpu", **runs), truth(low, **runs), 1e-11)
            else:
                assert_within_budget([low], "cpu", dtype, **runs)
            expected = run(low, "cpu", **runs)
            _C.set_poison(True)
            got = run(low, "cpu", **runs)
            _C.set_poison(False)
            assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("index", ["shared", None])
@pytest.mark.parametrize(
    "B, K, D, spare, scale, offset",
    [
        (64, 256, 64, 0, 10.0, 1.5),
        (64, 256, 64, 0, 1.0, 80.0),
        (37, 700, 37, 0, 10.0, 1.5),  # nothing fills a register
        (300, 150, 20, 3, 10.0, 1.5),  # queries meet a tile in two blocks; an odd distance of rows
        (16, 1, 96, 0, 10.0, 1.5),
    ],
)
def test_banks_of_bfloat16(isa, dtype, objective, index, B, K, D, spare, scale, offset):
    """They are multiplied as they are; float32 queries and derivatives lose nothing by it."""
    _C.set_isa(isa)
    torch.set_num_threads(2)
    options = {"ids": True, "scale": scale, "offset": offset, "objective": objective}
    case = cast(make_instance(B, K, D, 500, index=index, **options), dtype)
    rows = torch.zeros(len(case["bank"]), D + spare, dtype=torch.bfloat16)[:, :D]
    case["bank"] = rows.copy_(case["bank"])
    wanted = ("query", "positive", "scale", "offset")
    got, true = run(case, "cpu", wanted=wanted), truth(case, wanted=wanted)
    plain = run(case | {"bank": rows.to(dtype)}, "reference", wanted=wanted)
    if objective == "infonce":
        assert float(got.pop("offset").abs()) < CLOSE[dtype]  # a sum of probabilities minus 1
    for k, value in got.items():
        allowed = 2 * distance(plain[k], true[k]) + (3e-7 if dtype == torch.float32 else 4e-3)
        assert distance(value, true[k]) < allowed, k
    _C.set_poison(True)
    again = run(case, "cpu", wanted=wanted)
    assert all(torch.equal(got[k], again[k]) for k in got)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@all_orders
def test_extremes_of_every_instruction_set(isa, dtype, how):
    _C.set_isa(isa)
    for scale, offset in ((1e4, 0.0), (1e4, 1e4), (1.0, 80.0), (1.0, -80.0), (1e-3, 700.0)):
        for objective in OBJECTIVES:
            case, runs = prepared(
                how, 17, 60, 20, 50, scale=scale, offset=offset, objective=objective
            )
            case = cast(case, dtype)
            got, true = run(case, "cpu", **runs), truth(case, **runs)
            tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.3}[dtype]
            assert_close(got, true, tolerance, run(case, "reference", **runs))


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [-1.0, 0.69, 0.7, 3.0, 60.0])
@all_orders
def test_products_of_many_factors(isa, dtype, logit, how):
    # the loss is the logarithm of products of 1 + exp(logit): here of thousands alike
    _C.set_isa(isa)
    case, runs = prepared(how, 19, 3000, 5, 400, scale=1e-3, offset=-logit)
    case = cast(case, dtype)
    got, true = run(case, "cpu", **runs), truth(case, **runs)
    assert_close(
        got, true, 1e-11 if dtype == torch.float64 else 2e-5, run(case, "reference", **runs)
    )


@each_order(BACKENDS)
def test_inputs_stay_as_they_are(backend, how):
    case, runs = prepared(how, ids=True, labels=True)
    copies = {k: v.clone() for k, v in case.items() if isinstance(v, torch.Tensor)}
    run(case, backend, **runs)
    assert all(torch.equal(case[k], copies[k]) for k in copies)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("order", ["direct", "bucketed", "shared"])
def test_a_bank_beyond_31_bits_of_elements(backend, order, large_bank):
    backend, device = native(backend)
    rows, dim = 2**24 + 64, 130
    assert rows * dim > 2**31
    bank = large_bank(rows, dim, device)
    kind = "shared" if order == "shared" else "own"
    case = moved(cast(make_instance(4, 6, dim, 6, index=kind), torch.float32), device)
    place = torch.tensor([0, 5, 2**23, 2**31 // dim + 1, rows - 2, rows - 1], device=device)
    small = case["bank"].bfloat16()
    bank[place] = small
    value, written = torch.ones(2, dim, device=device), torch.tensor([5, 3], device=device)
    near = {**case, "bank": small.clone(), "update": (written, value, 0.5)}
    far = {**case, "bank": bank, "update": (place[written], value, 0.5)}
    far["index"] = place[case["index"]]
    if kind == "own":
        force_order(order)
    expected, got = (run(x, backend, wanted=("query", "scale")) for x in (near, far))
    assert_close(got, expected, 1e-6)
    assert torch.equal(bank[place], near["bank"])


@pytest.mark.parametrize("backend", cases.COMPILED)
@pytest.mark.parametrize("index, limit", [("direct", 16), ("bucketed", 40), ("shared", 16)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_memory_does_not_grow_with_the_negatives(backend, index, limit, objective):
    """Nothing of size B x K x D, here 2 GB, or of shared K x D, here 102 MB."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("peak memory is read from Linux's /proc")
    kind = "shared" if index == "shared" else "own"
    case = make_instance(20, 200_000, 128, 5000, index=kind, objective=objective)
    case = cast(case, torch.float32)
    if kind == "own":
        _C.set_instance_order(index)
    run({**case, "index": case["index"][..., :1000]}, backend, wanted=BUT_THE_BANK)

    def status(name: str) -> float:
        text = Path("/proc/self/status").read_text()
        return int(text.split(f"{name}:")[1].split()[0]) / 1024

    reset.write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run(case, backend, wanted=BUT_THE_BANK)
    assert status("VmHWM") - before < limit


# ------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@each_order(BACKENDS)
def test_update(backend, storage, how):
    """Every read comes before the writes; of a row that is named twice the last value wins."""
    case, _ = prepared(how, 6, 40, 8, 30)
    case["bank"] = case["bank"].to(storage)
    index = torch.tensor([3, 9, 3, 0, 9, 3])
    value = torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = run(case, backend, wanted=("query", "scale"))
    alone = case["bank"].clone()
    functional.bank_update_(alone, index, value, momentum=0.5, backend=backend)
    last = case["bank"].clone()
    functional.bank_update_(last, index[[3, 4, 5]], value[[3, 4, 5]], momentum=0.5, backend=backend)
    assert torch.equal(alone, last)
    version = case["bank"]._version
    got = run({**case, "update": (index, value, 0.5)}, backend, wanted=("query", "scale"))
    assert all(torch.equal(got[k], expected[k]) for k in expected)
    assert torch.equal(case["bank"], alone)
    assert case["bank"]._version > version


@each_order(cases.BACKENDS + INTERPRETED)
def test_an_error_leaves_the_bank_as_it_was(backend, how):
    case, _ = prepared(how, 6, 40, 8, 30)
    before = case["bank"].clone()
    update = (torch.tensor([3, 30]), torch.ones(2, 8).double(), 0.5)
    if case["index"] is None:
        update = (torch.tensor([3, 40]), *update[1:])
    with pytest.raises(IndexError, match=r"instance_nce: update index: expected rows of the bank"):
        functional.instance_nce(**case, update=update, backend=backend)
    assert torch.equal(case["bank"], before)
    if case["index"] is not None:
        case["index"][..., -1] = 30
        update = (torch.tensor([3]), torch.ones(1, 8).double(), 0.5)
        with pytest.raises(IndexError, match=r"instance_nce: index: .* got 30 at position"):
            functional.instance_nce(**case, update=update, backend=backend)
        assert torch.equal(case["bank"], before)


# --------------------------------------------------------------------------------- compiled graphs

NAMES = ("query", "positive", "bank", "scale", "offset")
MASKS = ("query_id", "key_id", "query_label", "key_label", "excluded")


def arguments(need: int, dtype: torch.dtype = torch.float32, **options) -> tuple:
    case = make_instance(5, 20, 7, 30, **options)
    case |= {k: case[k].to(dtype) for k in ("query", "positive", "bank")}
    masks = (case.get(k) for k in MASKS)
    settings = (case["objective"], case.get("weights"), case.get("reduction", "mean"))
    return (*(case[k] for k in NAMES), case["index"], *masks, *settings, need)


@pytest.mark.skipif(not cases.COMPILED, reason="kernels come with the compiled module")
class TestOpcheck:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("need", [0, 1, 31])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"index": "shared", "objective": "infonce"},
            {"index": None, "ids": True},
            {"excluded": 0.3},
        ],
        ids=str,
    )
    def test_instance_nce(self, dtype, need, options):
        operator = torch.ops.crrcd.instance_nce.default
        torch.library.opcheck(operator, arguments(need, dtype, **options))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_instance_nce_(self, dtype):
        update = (torch.tensor([3, 1, 3]), torch.randn(3, 7), 0.5, True)
        operator = torch.ops.crrcd.instance_nce_.default
        torch.library.opcheck(operator, (*arguments(31 & ~4, dtype), *update))

    def test_a_bank_that_is_updated_has_no_gradient(self):
        update = (torch.tensor([3]), torch.randn(1, 7), 0.5, True)
        with pytest.raises(ValueError, match=r"crrcd_ext\.instance_nce: update: a bank that"):
            torch.ops.crrcd.instance_nce_(*arguments(31), *update)


@pytest.mark.skipif(not INTERPRETED, reason="for tensors on the CPU")
@pytest.mark.parametrize(
    "options",
    [{}, {"index": "shared", "objective": "infonce"}, {"index": None, "ids": True}],
    ids=str,
)
def test_opcheck_of_triton(options):
    operators = torch.ops.crrcd_triton
    torch.library.opcheck(operators.instance_nce.default, arguments(31, **options))
    update = (torch.tensor([3, 1, 3]), torch.randn(3, 7), 0.5, True)
    given = (*arguments(31 & ~4, **options), *update)
    torch.library.opcheck(operators.instance_nce_.default, given)


@pytest.mark.parametrize("backend", cases.BACKENDS + INTERPRETED)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_full_graph(backend, objective):
    case = cast(make_instance(6, 20, 7, 30, objective=objective), torch.float32)
    case |= {"query_id": torch.arange(6), "scale": 7.0, "offset": 0.5}
    value = torch.randn(6, 7)

    def step(query, bank):
        options = {**case, "query": 2 * query, "bank": bank}
        update = (torch.tensor([2, 5, 9, 2, 0, 5]), value, 0.5)
        return functional.instance_nce(**options, update=update, backend=backend)

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        query, bank = case["query"].clone().requires_grad_(), case["bank"].clone()
        loss = function(query, bank)
        (gradient,) = torch.autograd.grad(loss * 0.7, query)
        results.append({"loss": loss.detach(), "query": gradient, "bank": bank})
    torch._dynamo.reset()
    assert_close(results[1], results[0], 1e-5)
    assert not torch.equal(results[0]["bank"], case["bank"])


@pytest.mark.skipif(not cases.COMPILED, reason="a switch of the compiled module")
def test_a_wrong_order():
    with pytest.raises(ValueError, match=r"set_instance_order: expected direct or bucketed"):
        _C.set_instance_order("sorted")
