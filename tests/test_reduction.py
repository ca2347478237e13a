"""weights and reduction of the losses: one by one, their sum and their mean."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from helpers import cases
from helpers.cases import (
    DIFFERENTIABLE,
    assert_close,
    assert_within_budget,
    cast,
    make,
    make_difference,
    make_instance,
    run,
    truth,
)
from helpers.emulated import EMULATED
from helpers.interpreted import INTERPRETED

from crrcd_ext import _backend, functional

BACKENDS, COMPILED = cases.BACKENDS + INTERPRETED, cases.COMPILED + INTERPRETED
_C = _backend.compiled
AVAILABLE = _C.isa_available() if _C else []
OBJECTIVES = ["nce", "infonce"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CLOSE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}
OWN = ("query", "positive")
"""What has a gradient through losses that are not reduced."""

MASKS = {"ids": True, "labels": True, "excluded": 0.3}
# Operators in their forms: a maker of cases, and its options. Sizes are no multiples of a tile.
FORMS = {
    "relation": (make, {"A": 3, "B": 9, "K": 150, "N": 170}),
    "relation, masked": (make, {"A": 3, "B": 9, "K": 150, "N": 170, **MASKS}),
    "relation, direct": (make, {"A": 3, "B": 9, "K": 150, "H": 40, "R": 3, "bias": False}),
    "relation, rows as they are": (make, {"B": 5, "K": 70, "index": False, "key_weight": False}),
    "difference, shared": (make_difference, {"B": 9, "K": 150, "N": 170, "index": "shared"}),
    "difference, own": (make_difference, {"B": 9, "K": 70, "N": 170, "index": "own"}),
    "difference, masked": (make_difference, {"K": 150, "N": 170, "index": "shared", **MASKS}),
    "difference, own, masked": (make_difference, {"K": 70, "N": 170, "index": "own", **MASKS}),
    "instance, shared": (make_instance, {"B": 37, "K": 150, "N": 170, "index": "shared"}),
    "instance, own": (make_instance, {"B": 9, "K": 150, "N": 170, "index": "own"}),
    "instance, masked": (make_instance, {"B": 9, "K": 150, "N": 170, "index": "shared", **MASKS}),
    "instance, own, masked": (make_instance, {"B": 9, "K": 150, "N": 170, **MASKS}),
    "instance, whole bank": (make_instance, {"B": 5, "K": 70, "index": None}),
}
all_forms = pytest.mark.parametrize("form", FORMS)
# Reductions, whether there are weights, and the gradients to compare.
REDUCED = {
    "mean, weighted": ("mean", True, DIFFERENTIABLE),
    "sum": ("sum", False, DIFFERENTIABLE),
    "sum, weighted": ("sum", True, DIFFERENTIABLE),
    "none": ("none", False, OWN),
    "none, weighted": ("none", True, OWN),
}
all_reductions = pytest.mark.parametrize("reduced", REDUCED)
objectives = pytest.mark.parametrize("objective", OBJECTIVES)


@pytest.fixture(autouse=True)
def _as_it_came():
    yield
    if _C is not None:
        _C.set_poison(False)
        _C.set_instance_order(None)


def operator(case: dict):
    return cases._operator(case)


def shape_of(case: dict) -> tuple[int, ...]:
    """That of losses that are not reduced."""
    return case["query"].shape[:2] if "weight" in case else case["query"].shape[:1]


def some_weights(case: dict, whole: bool = False) -> torch.Tensor:
    """[B], or as the losses: one is 0, and one less."""
    shape = shape_of(case)
    weights = torch.linspace(-0.5, 2, shape[-1], dtype=torch.float64)
    weights[0] = 0
    if whole:
        weights = weights * torch.linspace(0.5, 1.5, shape[0], dtype=torch.float64)[:, None]
    return weights


def prepared(form: str, reduced: str | None = None, **options) -> dict:
    maker, given = FORMS[form]
    case = maker(**given, **options)
    if reduced is not None:
        reduction, weighted, _ = REDUCED[reduced]
        case |= {"reduction": reduction, "weights": some_weights(case) if weighted else None}
    return case


def alone(case: dict, b: int, a: int | None = None) -> dict:
    """The case with query b alone, and of the anchors with a alone."""
    one = {k: v for k, v in case.items() if k not in ("weights", "reduction")}
    for k in ("query_id", "query_label", "excluded"):
        if case.get(k) is not None:
            one[k] = case[k][b : b + 1]
    if case["index"] is not None and case["index"].dim() == 2:
        one["index"] = case["index"][b]
    if a is not None:
        one["anchor"] = case["anchor"][a : a + 1]
        if case.get("anchor_id") is not None:
            one["anchor_id"] = case["anchor_id"][a : a + 1]
    for k in OWN:
        x = case[k][a : a + 1] if a is not None and "weight" in case else case[k]
        one[k] = x[..., b : b + 1, :]
    return one


# ---------------------------------------------------------------------------------------- formula


@all_forms
@objectives
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_each_loss_is_that_of_its_pair(form, objective, weighted):
    """By calls for one pair each; 0 for one that is not kept."""
    case = prepared(form, objective=objective)
    if "anchor" in case and "anchor_id" not in case:
        case["self_pairs"] = True  # a pair alone would be on the diagonal
    weights = some_weights(case) if weighted else None
    got = operator(case)(**case, weights=weights, reduction="none", backend="reference")
    assert got.shape == shape_of(case)
    for b in range(got.shape[-1]):
        anchors = range(len(case["anchor"])) if "anchor" in case else [None]
        losses = [operator(case)(**alone(case, b, a), backend="reference") for a in anchors]
        true = torch.stack(losses) * (1 if weights is None else weights[b])
        torch.testing.assert_close(got[..., b], true if got.dim() == 2 else true.sum())


@pytest.mark.parametrize("backend", BACKENDS)
@all_forms
@objectives
@all_reductions
def test_against_the_truth(backend, form, objective, reduced):
    for dtype in DTYPES if backend != "reference" else [torch.float32]:
        case = cast(prepared(form, reduced, objective=objective), dtype)
        wanted = REDUCED[reduced][2]
        plain = run(case, "reference", wanted=wanted)
        assert plain["loss"].shape == (shape_of(case) if case["reduction"] == "none" else ())
        true = truth(case, wanted=wanted)
        got = run(case, backend, wanted=wanted)
        assert got["loss"].dtype == plain["loss"].dtype
        assert_close(got, true, CLOSE[dtype], plain)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("instance")])
@objectives
@all_reductions
def test_against_the_truth_on_cuda(backend, form, objective, reduced):
    for dtype in DTYPES:
        case = cast(prepared(form, reduced, objective=objective), dtype)
        wanted = REDUCED[reduced][2]
        got = run(case, backend, wanted=wanted)
        assert_close(
            got, truth(case, wanted=wanted), CLOSE[dtype], run(case, "reference", wanted=wanted)
        )


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("instance")])
@objectives
def test_sum_on_cuda(backend, form, objective):
    for dtype in DTYPES:
        case = cast(prepared(form, "sum", objective=objective), dtype)
        # Of one loss, as the bounds of what is 0 are.
        sums = run(case, backend), truth(case), run(case, "reference")
        got, true, plain = ({k: x / prod(shape_of(case)) for k, x in each.items()} for each in sums)
        assert_close(got, true, CLOSE[dtype], plain)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("width", [700, 5000], ids=["block", "wide"])
def test_weights_of_wide_rows_on_cuda(backend, width):
    """A block keeps a row of the first; those of the second are read twice."""
    case = make_instance(B=3, K=40, D=width, N=50, index="own")
    for reduction, wanted in (("mean", DIFFERENTIABLE), ("none", OWN)):
        weighted = {**case, "reduction": reduction, "weights": some_weights(case)}
        assert_close(run(weighted, backend, wanted=wanted), truth(weighted, wanted=wanted), 1e-10)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    "form", ["relation", "difference, shared", "difference, own", "instance, own"]
)
@objectives
def test_errors_stay_within_the_budget(backend, form, objective):
    for reduced in ("mean, weighted", "none"):
        made = [prepared(form, reduced, objective=objective, seed=seed) for seed in range(3)]
        assert_within_budget(made, backend, torch.float32, wanted=REDUCED[reduced][2])


@pytest.mark.parametrize("backend", BACKENDS)
@objectives
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_weight_for_each_pair(backend, objective, reduction):
    """Of relations, whose losses are the pairs'."""
    case = prepared("relation, masked", objective=objective)
    case |= {"weights": some_weights(case, whole=True), "reduction": reduction}
    wanted = OWN if reduction == "none" else DIFFERENTIABLE
    assert_close(run(case, backend, wanted=wanted), truth(case, wanted=wanted), 1e-10)


@pytest.mark.parametrize("isa", AVAILABLE)
@all_forms
@all_reductions
def test_instruction_sets(isa, form, reduced):
    _C.set_isa(isa)
    for objective, dtype in itertools.product(OBJECTIVES, [torch.float64, torch.float32]):
        case = cast(prepared(form, reduced, objective=objective), dtype)
        options = {"wanted": REDUCED[reduced][2]}
        plain = run(case, "reference", **options)
        assert_close(run(case, "cpu", **options), truth(case, **options), CLOSE[dtype], plain)


@pytest.mark.parametrize("isa", AVAILABLE)
@all_reductions
def test_pairs_of_bfloat16(isa, reduced):
    """Wide enough for every path of such operands, where the processor has one."""
    _C.set_isa(isa)
    case = make(3, 33, 200, 64, 48, 32, 220, ids=True)
    reduction, weighted, wanted = REDUCED[reduced]
    case |= {"reduction": reduction, "weights": some_weights(case) if weighted else None}
    case = cast(case, torch.bfloat16)
    plain = run(case, "reference", wanted=wanted)
    got = run(case, "cpu", wanted=wanted)
    assert_close(got, truth(case, wanted=wanted), CLOSE[torch.bfloat16], plain)


@pytest.mark.skipif(_C is None, reason="about the compiled module")
@all_forms
@objectives
def test_threads_and_scratch(form, objective):
    """Several parts add up to what one has, and nothing that was never written is read."""
    for reduced in ("mean, weighted", "none, weighted"):
        case = cast(prepared(form, reduced, objective=objective), torch.float32)
        options = {"wanted": REDUCED[reduced][2]}
        true, plain = truth(case, **options), run(case, "reference", **options)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results = []
            for poison in (False, True):
                _C.set_poison(poison)
                results.append(run(case, "cpu", **options))
            assert_close(results[0], true, CLOSE[torch.float32], plain)
            for k in true:
                assert torch.equal(results[0][k], results[1][k]), k


@pytest.mark.skipif(_C is None, reason="about the compiled module")
@pytest.mark.parametrize("order", ["direct", "bucketed"])
@objectives
@pytest.mark.parametrize("reduced", ["sum, weighted", "none"])
def test_orders_of_own_negatives(order, objective, reduced):
    _C.set_instance_order(order)
    case = prepared("instance, own, masked", reduced, objective=objective)
    wanted = tuple(k for k in REDUCED[reduced][2] if k != "bank")
    assert_close(run(case, "cpu", wanted=wanted), truth(case, wanted=wanted), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@objectives
@pytest.mark.parametrize("index", ["shared", "own"])
def test_small_and_large_differences(backend, objective, index):
    """Queries at anchors, rows at anchors and rows far away, which go ways of their own."""
    case = make_difference(4, 6, 40, 8, 20, index=index, objective=objective)
    case["query"][1] = case["anchor"][2] + 1e-4
    case["bank"][:5] = case["anchor"][1] + 1e-4 * case["bank"][:5]
    case["bank"][7] = case["anchor"][3]  # no direction from there
    for reduced in REDUCED:
        reduction, weighted, wanted = REDUCED[reduced]
        given = {**case, "reduction": reduction}
        given["weights"] = some_weights(case) if weighted else None
        assert_close(run(given, backend, wanted=wanted), truth(given, wanted=wanted), 1e-6)
    far = {**case, "bank": 300 * case["bank"], "reduction": "none"}
    assert_close(run(far, backend, wanted=OWN), truth(far, wanted=OWN), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@all_forms
@objectives
def test_gradcheck(backend, form, objective):
    case = prepared(form, objective=objective)
    maker, given = FORMS[form]
    small = {"B": 3, "K": 9, "N": 11, **({} if maker is make_instance else {"A": 2})}
    case = maker(**{**given, **small}, objective=objective, scale=2.0)
    weights = some_weights(case)
    for reduction, names in (("none", OWN), ("sum", DIFFERENTIABLE)):
        leaves = {k: case[k].clone().requires_grad_() for k in names if case.get(k) is not None}

        def loss(*tensors, reduction=reduction, leaves=leaves):
            given = {**case, **dict(zip(leaves, tensors, strict=True))}
            options = {"weights": weights, "reduction": reduction, "backend": backend}
            return operator(case)(**given, **options)

        # In one direction where every number's own would take minutes.
        fast = backend in INTERPRETED
        assert torch.autograd.gradcheck(loss, list(leaves.values()), fast_mode=fast)


# ------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("backend", BACKENDS)
@all_forms
@objectives
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_one_change_nothing(backend, form, objective, dtype):
    """Gradients to the bit; the loss is added up in another order."""
    case = cast(prepared(form, objective=objective), dtype)
    ones = torch.ones(shape_of(case)[-1])
    without, given = run(case, backend), run({**case, "weights": ones}, backend)
    rounding = torch.finfo(without["loss"].dtype).eps
    torch.testing.assert_close(
        given.pop("loss"), without.pop("loss"), rtol=4 * rounding, atol=0, equal_nan=True
    )
    for k, gradient in given.items():
        if k in ("scale", "offset"):  # sums over what is added up in that order too
            torch.testing.assert_close(gradient, without[k], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(gradient, without[k]), k


@pytest.mark.parametrize("backend", BACKENDS)
@all_forms
@objectives
def test_losses_add_up_to_their_sum(backend, form, objective):
    case = prepared(form, objective=objective)
    each, total = (
        run({**case, "reduction": r, "weights": some_weights(case)}, backend, wanted=OWN, factor=1)
        for r in ("none", "sum")
    )
    torch.testing.assert_close(each["loss"].sum(), total["loss"])
    mean = run(case, backend)
    plain = run({**case, "reduction": "sum"}, backend)
    pairs = plain["loss"] / mean["loss"]
    torch.testing.assert_close(pairs, pairs.round())
    for k in mean:
        torch.testing.assert_close(plain[k], mean[k] * pairs.round(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [f for f in FORMS if f != "relation, rows as they are"])
@objectives
def test_a_weight_of_0_leaves_a_query_out(backend, form, objective):
    case = prepared(form, objective=objective)
    if "anchor" in case and "anchor_id" not in case:
        case["self_pairs"] = True  # where there are as many queries as anchors
    out = 2
    weights = torch.ones(shape_of(case)[-1])
    weights[out] = 0
    kept = weights > 0
    less = dict(case)
    for k in OWN:
        less[k] = case[k][..., kept, :]
    for k in ("query_id", "query_label", "excluded"):
        if case.get(k) is not None:
            less[k] = case[k][kept]
    if case["index"] is not None and case["index"].dim() == 2:
        less["index"] = case["index"][kept]
    got = run({**case, "weights": weights, "reduction": "sum"}, backend)
    true = run({**less, "reduction": "sum"}, backend)
    for k in OWN:
        assert not got[k][..., out, :].any()
        got[k] = got[k][..., kept, :]
    assert_close(got, true, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@all_forms
def test_an_empty_batch(backend, form):
    maker, given = FORMS[form]
    case = maker(**{**given, "B": 0})
    for reduced in REDUCED:
        reduction, weighted, wanted = REDUCED[reduced]
        weights = torch.ones(0) if weighted else None
        got = run({**case, "reduction": reduction, "weights": weights}, backend, wanted=wanted)
        assert got["loss"].shape == (shape_of(case) if reduction == "none" else ())
        assert not got["loss"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@all_forms
@objectives
def test_what_is_no_number_stays_with_its_query(backend, form, objective):
    case = prepared(form, objective=objective)
    case["positive"][..., 1, 0] = torch.nan
    with torch.no_grad():
        loss = operator(case)(**case, reduction="none", backend=backend)
    lost = loss.isnan()
    assert lost[..., 1].any()
    lost[..., 1] = False
    assert not lost.any()


@pytest.mark.parametrize("backend", BACKENDS)
@all_forms
def test_the_bank_is_updated_after_all_reads(backend, form):
    case = prepared(form, "none, weighted")
    plain = operator(case)(**case, backend=backend)
    rows = case["bank"].clone()
    update = (torch.tensor([3, 1, 3]), torch.ones(3, rows.shape[1]).double(), 0.5)
    query = case["query"].clone().requires_grad_()
    given = {**case, "query": query, "bank": rows, "update": update}
    loss = operator(case)(**given, backend=backend)
    assert torch.equal(loss, plain)
    changed = (rows != case["bank"]).any(-1).nonzero().flatten()
    assert changed.tolist() == [1, 3]
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    torch.testing.assert_close(
        gradient, run(case, backend, wanted=OWN, factor=0)["query"] + gradient
    )


# ----------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["relation", "difference, own", "instance, shared"])
@pytest.mark.parametrize("reduced", ["mean, weighted", "none, weighted"])
def test_full_graph(backend, form, reduced):
    case = cast(prepared(form, reduced), torch.float32)

    def step(query, weights):
        options = {**case, "query": 2 * query, "weights": weights}
        return operator(case)(**options, backend=backend)

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        query = case["query"].clone().requires_grad_()
        loss = function(query, case["weights"])
        (gradient,) = torch.autograd.grad(loss.square().sum(), query)
        results.append({"loss": loss.detach(), "query": gradient})
    torch._dynamo.reset()
    assert_close(results[1], results[0], 1e-5)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["relation", "difference, own", "instance, shared"])
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"reduction": "median"}, ValueError, "reduction: expected one of mean, sum, none, got 'm"),
        ({"weights": 1.0}, TypeError, "weights: expected a tensor, got float"),
        ({"weights": torch.ones(9).long()}, TypeError, "weights: expected dtype .*, got int64"),
        ({"weights": torch.ones(8)}, ValueError, r"weights: expected shape \[B\] = \[\d+\], got"),
        ({"weights": torch.ones(1, 1, 1)}, ValueError, r"weights: expected shape .*\[1, 1, 1\]"),
        ({"weights": "nan"}, ValueError, "weights: expected finite numbers, got nan at position 4"),
        ({"weights": "inf"}, ValueError, "weights: expected finite numbers, got inf at position 4"),
        ({"weights": "grad"}, ValueError, "weights: expected a tensor that requires no gradient"),
        ({"weights": torch.ones(9, device="meta")}, ValueError, "weights: expected device cpu"),
    ],
    ids=str,
)
def test_errors(backend, form, change, error, message):
    case = prepared(form)
    before = case["bank"].clone()
    change = dict(change)
    if isinstance(change.get("weights"), str):
        weights = torch.ones(shape_of(case)[-1])
        if change["weights"] == "grad":
            weights.requires_grad_()
        else:
            weights[4] = float(change["weights"])
        change["weights"] = weights
    name = operator(case).__name__
    update = (torch.tensor([0]), torch.ones(1, before.shape[1]), 0.5)
    with pytest.raises(error, match=rf"^crrcd_ext\.{name}: {message}"):
        operator(case)(**case, **change, update=update, backend=backend)
    assert torch.equal(case["bank"], before)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("form", ["relation", "difference, own", "instance, shared"])
def test_losses_by_themselves_have_no_shared_gradient(backend, form):
    case = prepared(form)
    before = case["bank"].clone()
    update = (torch.tensor([0]), torch.ones(1, before.shape[1]).double(), 0.5)
    options = {"reduction": "none", "backend": backend}
    for argument in DIFFERENTIABLE:
        if argument in OWN or case.get(argument) is None:
            continue
        given = {**case, argument: case[argument].clone().requires_grad_()}
        message = (
            f"reduction: expected 'mean' or 'sum', with weights, where {argument} requires a "
            rf"gradient and the backend is {backend} \('reference' takes any\), got 'none'"
        )
        if argument != "bank":
            given["update"] = update
        with pytest.raises(ValueError, match=message):
            operator(case)(**given, **options)
        assert torch.equal(case["bank"], before)
        given.pop("update", None)
        with torch.no_grad():
            operator(case)(**given, **options)
        run({**case, "reduction": "none"}, "reference", wanted=(*OWN, argument))


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("form", ["relation", "difference, own"])
def test_a_backend_without_them_says_so(backend, form):
    case = cast(prepared(form), torch.float32)
    before = case["bank"].clone()
    update = (torch.tensor([0]), torch.ones(1, before.shape[1]), 0.5)
    for change in ({"reduction": "none"}, {"weights": some_weights(case)}):
        message = r"reduction: expected .mean. or .sum. without weights on backend \w+, which has"
        with pytest.raises(NotImplementedError, match=message):
            operator(case)(**case, **change, update=update, backend=backend)
        assert torch.equal(case["bank"], before)


def test_the_reductions_are_named():
    assert functional.REDUCTIONS == ("mean", "sum", "none")
