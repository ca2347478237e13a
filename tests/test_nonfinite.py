"""What is not finite shows: one NaN, and one infinity, in each operand of each operator.

NaN in what counts makes the loss NaN and every gradient that the reference has as such; an infinity
leaves something that is not finite. Rows that no index names may hold anything; on the CPU so may
each query's own negatives that are masked.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import cases
from helpers.cases import DIFFERENTIABLE, cast, make, make_difference, make_instance, run
from helpers.emulated import EMULATED
from helpers.interpreted import INTERPRETED

from crrcd_ext import CRRCDLoss, _backend, functional

_C = _backend.compiled
SETS = _C.isa_available() if _C else []
QUICK = [("reference", None), *(("cpu", isa) for isa in SETS)]
SLOW = [(name, None) for name in EMULATED + INTERPRETED]
"""A call takes long, where kernels are emulated or interpreted: less is tried."""

VALUES = [math.nan, math.inf, -math.inf]
OBJECTIVES = ["nce", "infonce"]


def on(backends):
    ids = [name if isa is None else isa for name, isa in backends]
    return pytest.mark.parametrize("backend, isa", backends, ids=ids)


@pytest.fixture(autouse=True)
def _instruction_set(request):
    if isa := request.node.callspec.params.get("isa"):
        _C.set_isa(isa)


def spoil(case: dict, operand: str, value: float) -> dict:
    """The case with ``value`` in a row of ``operand`` that counts."""
    x = case[operand].clone()
    if operand == "bank":
        x[0 if case["index"] is None else int(case["index"].flatten()[0]), -1] = value
    else:
        x.view(-1)[-1] = value
    return {**case, operand: x}


def assert_shows(case: dict, operand: str, value: float, backend: str, wanted) -> None:
    got = run(case, backend, wanted=wanted)
    finite = {k: bool(x.isfinite().all()) for k, x in got.items()}
    if not math.isnan(value):
        assert not all(finite.values()), operand
        return
    assert got["loss"].isnan(), operand
    assert not finite.get(operand, False), operand
    if backend != "reference":
        for k, x in run(case, "reference", wanted=wanted).items():
            assert x.isfinite().all() or not finite[k], (operand, k)


def sweep(case: dict, backend: str, *, values=VALUES, some: bool = True) -> None:
    """``some``: also with some of the gradients alone, and none."""
    assert all(x.isfinite().all() for x in run(case, backend).values())
    for operand in DIFFERENTIABLE:
        if case.get(operand) is None:
            continue
        for value in values:
            spoiled = spoil(case, operand, value)
            assert_shows(spoiled, operand, value, backend, DIFFERENTIABLE)
            if some and math.isnan(value):
                for wanted in (("query",), (operand,)):
                    assert_shows(spoiled, operand, value, backend, wanted)
                assert cases._operator(case)(**spoiled, backend=backend).isnan(), operand


# --------------------------------------------------------------------------------------- the losses

RELATIONS = {
    "direct": {"A": 3, "B": 4, "K": 70, "H": 12, "R": 3, "D": 5, "N": 40},
    "one sum": {"A": 4, "B": 40, "K": 140, "H": 16, "R": 33, "D": 5, "N": 40},
    "without index": {"A": 3, "B": 4, "K": 30, "H": 6, "R": 9, "D": 5, "index": False},
    "projected, no bias": {
        "A": 3,
        "B": 4,
        "K": 70,
        "H": 12,
        "R": 16,
        "D": 12,
        "key_weight": False,
        "bias": False,
    },
    "ids and labels": {
        "A": 3,
        "B": 5,
        "K": 70,
        "H": 12,
        "R": 8,
        "D": 5,
        "N": 40,
        "ids": True,
        "labels": True,
    },
}


@on(QUICK)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("options", RELATIONS.values(), ids=RELATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_relation_nce(backend, isa, objective, options, dtype):
    case = cast(make(**options, objective=objective), dtype)
    # Negatives that count for every query, where some do not.
    if "query_id" in case:
        case["key_id"], case["key_label"] = case["key_id"] + 100, case["key_label"] + 100
    sweep(case, backend)


@on(QUICK)
@pytest.mark.parametrize("wanted", [("query",), DIFFERENTIABLE], ids=["query", "all"])
@pytest.mark.parametrize("R", [3, 40])
def test_weight_of_a_unit_that_no_key_reaches(backend, isa, R, wanted):
    case = make(3, 9, 70, 12, R, 5, 40)
    for unit in (0, 7, 11):
        case["anchor"][:, unit] = -50.0
        for value in VALUES:
            spoiled = {**case, "weight": case["weight"].clone()}
            spoiled["weight"][1, unit] = value
            got = run(spoiled, backend, wanted=wanted)
            assert not any(x.isfinite().all() for k, x in got.items() if k != "positive")


INDICES = [None, "shared", "own"]


@on(QUICK)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_difference_nce(backend, isa, objective, index, dtype):
    for D in (5, 16):
        case = cast(make_difference(3, 4, 70, D, 40, index=index, objective=objective), dtype)
        sweep(case, backend)
    # Squares of the width of a vector, and of what is compared by exact differences.
    case = make_difference(3, 4, 70, 8, 40, index=index, objective=objective, eps=1e-3)
    case["bank"][::3] = case["anchor"][0] + 1e-6 * case["bank"][::3]
    sweep(cast(case, dtype), backend, values=VALUES[:1])


@on(QUICK)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_instance_nce(backend, isa, objective, index, dtype):
    case = cast(make_instance(5, 70, 16, 40, index=index, objective=objective), dtype)
    sweep(case, backend)
    if index == "own" and _C is not None:
        for order in ("direct", "bucketed"):
            _C.set_instance_order(order)
            try:
                sweep(case, backend)
            finally:
                _C.set_instance_order(None)


# Tiny, of each kernel of a backend where each call takes long.
SMALL = {
    "relation_nce": lambda o: make(2, 3, 5, 4, 6, 3, 7, objective=o),
    "relation_nce, projected": lambda o: make(2, 3, 4, 3, 2, 3, key_weight=False, index=False),
    "difference_nce": lambda o: make_difference(2, 2, 5, 4, 6, index="shared", objective=o),
    "difference_nce, own": lambda o: make_difference(2, 2, 3, 4, 6, index="own", objective=o),
    "instance_nce": lambda o: make_instance(3, 5, 4, 6, index="shared", objective=o),
    "instance_nce, own": lambda o: make_instance(3, 4, 4, 6, index="own", objective=o),
}


@on(SLOW)
@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize(
    "objective, dtype",
    [
        ("nce", torch.float32),
        ("nce", torch.bfloat16),
        ("nce", torch.float16),
        ("infonce", torch.float32),
    ],
)
@pytest.mark.parametrize("value", VALUES[:2], ids=["nan", "inf"])
def test_losses(backend, isa, kind, objective, dtype, value):
    sweep(cast(SMALL[kind](objective), dtype), backend, values=[value], some=False)


# ------------------------------------------------------------------------------------- the relation


@on(QUICK + SLOW)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_relation(backend, isa, dtype):
    g = torch.Generator().manual_seed(0)
    shapes = {"anchor": (2, 6), "sample": (3, 6), "weight": (5, 6), "bias": (5,)}
    operands = {k: torch.randn(s, generator=g).to(dtype) for k, s in shapes.items()}
    operands["anchor"][:, 2] = -50.0  # a unit that no pair reaches
    for operand, x in operands.items():
        for value in VALUES:
            spoiled = {**operands, operand: x.clone()}
            spoiled[operand].view(-1)[2] = value
            leaves = {k: v.requires_grad_() for k, v in spoiled.items()}
            for leaf in leaves.values():
                leaf.grad = None
            v = functional.relation(**leaves, backend=backend)
            true = functional.relation(**spoiled, backend="reference")
            assert v.isfinite().equal(true.isfinite()), (operand, value)
            # Either all of the vectors, or those of one anchor or sample.
            assert not v.isfinite().all(), (operand, value)
            for k, got in zip(leaves, torch.autograd.grad(v.sum(), leaves.values()), strict=True):
                assert not got.isfinite().all(), (operand, value, k)
    leaves = {k: v.detach().clone().requires_grad_() for k, v in operands.items()}
    incoming = torch.ones(2, 3, 5, dtype=dtype)
    incoming[1, 2, 3] = math.nan
    v = functional.relation(**leaves, backend=backend)
    for got in torch.autograd.grad(v, leaves.values(), incoming):
        assert got.isnan().any()


@on(QUICK + SLOW)
def test_the_relation_of_nan_is_nan(backend, isa):
    sample = torch.full((1, 2), math.nan)
    v = functional.relation(torch.zeros(1, 2), sample, torch.ones(3, 2), backend=backend)
    assert v.isnan().all()


# ---------------------------------------------------------------------------------- masks and banks


@on(QUICK + SLOW)
@pytest.mark.parametrize("index", INDICES)
def test_similar_mask_leaves_nan_in(backend, isa, index):
    case = make_instance(3, 40, 8, 50, index=index)
    query, bank = case["query"], case["bank"]
    query[0, 1] = math.nan
    bank[::5, 2] = math.nan
    arguments = {"threshold": -0.5, "backend": backend}
    bits = functional.similar_mask(query, bank, case["index"], **arguments)
    count = len(bank) if index is None else 40
    rows = bank if index is None else bank[case["index"]]
    products = (rows * query[:, None]).sum(-1)
    assert functional.unpack_bits(bits, count).equal(products > -0.5)
    assert not functional.unpack_bits(bits, count)[products.isnan()].any()


@on(QUICK + SLOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_bank_update(backend, isa, dtype, normalize):
    for value in VALUES:
        bank = torch.eye(6, dtype=dtype)
        bank[4, 1] = value
        fresh = torch.ones(3, 6, dtype=dtype)
        fresh[1, 2] = value
        functional.bank_update_(
            bank, torch.tensor([0, 2, 4]), fresh, momentum=0.5, normalize=normalize, backend=backend
        )
        finite = bank.isfinite().all(1)
        assert finite.tolist() == [True, True, False, True, False, True]
        if normalize and math.isnan(value):
            assert bank[[2, 4]].isnan().all()


OWN = {
    "difference_nce": lambda **o: make_difference(2, 3, 12, 8, 9, index="own", **o),
    "instance_nce": lambda **o: make_instance(3, 12, 8, 9, index="own", **o),
}


@on(QUICK)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("operator", OWN)
@pytest.mark.parametrize("mask", ["id", "label", "excluded"])
def test_own_negatives_that_are_masked_may_hold_anything(backend, isa, operator, objective, mask):
    case = OWN[operator](objective=objective)
    case["index"][case["index"] == 5] = 6
    case["index"][1, 3] = case["index"][2, 7] = 5
    if mask == "id":
        case["query_id"] = torch.tensor([20, 5, 5])
    elif mask == "label":
        case |= {"query_label": torch.tensor([0, 1, 1]), "key_label": torch.zeros(9).long()}
        case["key_label"][5] = 1
    else:
        case["excluded"] = functional.pack_bits(case["index"] == 5)
    wanted = tuple(k for k in DIFFERENTIABLE if k in case)
    expected = run(case, backend, wanted=wanted)
    for value in VALUES:
        case["bank"][5, ::2] = value
        got = run(case, backend, wanted=wanted)
        for k in expected:
            torch.testing.assert_close(got[k], expected[k], msg=lambda m, k=k: f"{k}: {m}")


@on(QUICK + SLOW)
@pytest.mark.parametrize("kind", SMALL)
def test_rows_that_no_index_names_may_hold_anything(backend, isa, kind):
    case = SMALL[kind]("nce")
    if case["index"] is None:
        case["index"] = torch.tensor([0, 2, 0])
    case["index"] = case["index"].clone()
    case["index"][case["index"] == 1] = 0
    expected = run(case, backend)
    for value in VALUES:
        case["bank"][1] = value
        got = run(case, backend)
        for k in expected:
            torch.testing.assert_close(got[k], expected[k], msg=lambda m, k=k: f"{k}: {m}")


PARAMETERS = [name for name, _ in CRRCDLoss(4, 6, 20, negatives=8).named_parameters()]


@on(QUICK)
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_of_a_loss(backend, isa, name):
    torch.manual_seed(0)
    criterion = CRRCDLoss(4, 6, 20, negatives=8, normalizer=1.0, direction="both", backend=backend)
    batch = torch.randn(5, 4), torch.randn(5, 6), torch.arange(5)
    assert criterion(*batch, update=False).isfinite()
    parameters = dict(criterion.named_parameters())
    with torch.no_grad():
        parameters[name].view(-1)[0] = math.nan
    assert criterion(*batch, update=False).isnan()
