"""The operators under torch.library.opcheck, torch.compile(fullgraph=True) and fake tensors."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import BACKENDS, COMPILED, assert_close, cast, make, unit_rows
from helpers.interpreted import INTERPRETED
from torch._subclasses.fake_tensor import FakeTensorMode

from crrcd_ext import functional

ALL = 0b111111111
MASKS = ("anchor_id", "query_id", "key_id", "query_label", "key_label", "excluded")


def nce_arguments(need: int, **options) -> tuple:
    case = make(5, 6, 20, 7, 8, 4, 30, **options)
    names = ("query", "positive", "anchor", "bank", "weight", "bias", "scale", "offset")
    return (
        *(case[k] for k in names),
        case["index"],
        case["key_weight"],
        *(case.get(k) for k in MASKS),
        case["self_pairs"],
        case["objective"],
        case.get("weights"),
        case.get("reduction", "mean"),
        need,
    )


def lower(arguments: tuple, dtype: torch.dtype) -> tuple:
    """Operands in ``dtype``; 0-dim scale and offset are handed over in float64."""
    return tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() else x
        for x in arguments
    )


UPDATE = (torch.tensor([3, 1, 3]), torch.randn(3, 4, dtype=torch.float64), 0.5, True)


@pytest.mark.skipif(not COMPILED, reason="kernels come with the compiled module")
class TestOpcheck:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bias", [True, False])
    def test_relation(self, dtype, bias):
        arguments = (
            torch.randn(4, 5, dtype=dtype),
            torch.randn(6, 5, dtype=dtype),
            torch.randn(7, 5, dtype=dtype),
            torch.randn(7, dtype=dtype) if bias else None,
        )
        torch.library.opcheck(torch.ops.crrcd.relation.default, arguments)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("need", [0, 1, 2, 4, 8, 15])
    def test_relation_backward(self, dtype, need):
        anchor, sample, weight = (torch.randn(n, 5, dtype=dtype) for n in (4, 6, 7))
        relation, inverse_norm = torch.ops.crrcd.relation(anchor, sample, weight, None)
        assert inverse_norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        arguments = (
            torch.randn(4, 6, 7, dtype=dtype),
            relation,
            inverse_norm,
            anchor,
            sample,
            weight,
            need,
        )
        torch.library.opcheck(torch.ops.crrcd.relation_backward.default, arguments)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("need", [0, 1, ALL])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"bias": False, "key_weight": False, "objective": "infonce"},
            {"index": False, "ids": True, "labels": True},
            {"excluded": 0.3},
        ],
        ids=str,
    )
    def test_relation_nce(self, dtype, need, options):
        arguments = lower(nce_arguments(need, **options), dtype)
        if options.get("bias") is False:
            arguments = (*arguments[:-1], need & ~(64 | 16))
        torch.library.opcheck(torch.ops.crrcd.relation_nce.default, arguments)

    @pytest.mark.parametrize("bit", range(9))
    def test_relation_nce_single_gradient(self, bit):
        arguments = nce_arguments(1 << bit)
        torch.library.opcheck(
            torch.ops.crrcd.relation_nce.default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )
        result = torch.ops.crrcd.relation_nce(*arguments)
        assert [x.numel() > 0 for x in result[1:]] == [i == bit for i in range(9)]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_relation_nce_(self, dtype):
        arguments = (*lower(nce_arguments(ALL & ~8), dtype), *UPDATE)
        torch.library.opcheck(torch.ops.crrcd.relation_nce_.default, arguments)

    @pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.bfloat16])
    def test_bank_update_(self, storage):
        bank = torch.randn(9, 4).to(storage)
        torch.library.opcheck(torch.ops.crrcd.bank_update_.default, (bank, *UPDATE))


@pytest.mark.skipif(not INTERPRETED, reason="about interpreted kernels")
class TestOpcheckOfTriton:
    def test_relation(self):
        anchor, sample, weight = (torch.randn(n, 5) for n in (4, 6, 7))
        operators = torch.ops.crrcd_triton
        torch.library.opcheck(operators.relation.default, (anchor, sample, weight, torch.ones(7)))
        result = operators.relation(anchor, sample, weight, None)
        arguments = (torch.randn(4, 6, 7), *result, anchor, sample, weight, 15)
        torch.library.opcheck(operators.relation_backward.default, arguments)

    @pytest.mark.parametrize("objective", ["nce", "infonce"])
    def test_relation_nce(self, objective):
        arguments = lower(nce_arguments(ALL, objective=objective), torch.float32)
        torch.library.opcheck(torch.ops.crrcd_triton.relation_nce.default, arguments)

    def test_updates(self):
        arguments = (*lower(nce_arguments(1, index=False, ids=True), torch.float32), *UPDATE)
        torch.library.opcheck(torch.ops.crrcd_triton.relation_nce_.default, arguments)
        bank = torch.randn(9, 4).to(torch.bfloat16)
        torch.library.opcheck(torch.ops.crrcd_triton.bank_update_.default, (bank, *UPDATE))


def step(case: dict, names: tuple, update: tuple | None, backend: str):
    """A training step around the operators, as a module has it."""

    def function(anchor, sample, weight, bias, bank, key_weight, scale, index, value):
        query = functional.relation(anchor, sample, weight, bias, backend=backend)
        positive = functional.relation(anchor, 2 * sample, weight, bias, backend=backend)
        return functional.relation_nce(
            query,
            positive.detach(),
            anchor,
            bank,
            weight,
            bias,
            scale=scale,
            offset=0.5,
            index=index,
            key_weight=key_weight,
            query_id=torch.arange(sample.shape[0]),
            objective=case["objective"],
            update=None if update is None else (update[0], value, *update[2:]),
            backend=backend,
        )

    return function


def inputs(dtype=torch.float32, seed=0, anchors=4, queries=6) -> dict:
    case = cast(make(anchors, queries, 20, 7, 8, 5, 30, seed=seed), dtype)
    g = torch.Generator().manual_seed(seed)
    return {
        "anchor": case["anchor"],
        "sample": torch.randn(queries, 7, generator=g).to(dtype),
        "weight": case["weight"],
        "bias": case["bias"],
        "bank": case["bank"],
        "key_weight": case["key_weight"],
        "scale": torch.tensor(7.0, dtype=torch.float64),
        "index": case["index"],
        "value": unit_rows(torch.randn(queries, 5, generator=g)),
    }


def evaluate(function, tensors: dict, with_gradient: bool) -> dict:
    tensors = {k: v.clone() for k, v in tensors.items()}
    names = ("anchor", "sample", "weight", "bias", "key_weight", "scale")
    leaves = {k: tensors[k].requires_grad_(with_gradient) for k in names}
    loss = function(**tensors)
    result = {"loss": loss.detach(), "bank": tensors["bank"]}
    if with_gradient:
        gradients = torch.autograd.grad(loss * 0.7, list(leaves.values()))
        result |= dict(zip(leaves, gradients, strict=True))
    return result


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS + INTERPRETED)
class TestCompile:
    @pytest.mark.parametrize("with_gradient", [True, False])
    @pytest.mark.parametrize("objective", ["nce", "infonce"])
    @pytest.mark.parametrize("with_update", [True, False])
    def test_full_graph(self, backend, with_gradient, objective, with_update):
        update = (torch.tensor([2, 5, 9, 2, 0, 5]), None, 0.5) if with_update else None
        function = step({"objective": objective}, (), update, backend)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        tensors = inputs()
        expected = evaluate(function, tensors, with_gradient)
        got = evaluate(compiled, tensors, with_gradient)
        assert_close(got, expected, 1e-5)
        assert torch.equal(expected["bank"], tensors["bank"]) == (not with_update)

    def test_inductor_with_update(self, backend):
        update = (torch.tensor([2, 5, 9, 2, 0, 5]), None, 0.5, False)
        function = step({"objective": "nce"}, (), update, backend)
        compiled = torch.compile(function, fullgraph=True)
        tensors = inputs()
        assert_close(evaluate(compiled, tensors, True), evaluate(function, tensors, True), 1e-5)

    def test_whole_bank_is_read_before_the_update(self, backend):
        tensors = inputs()
        tensors["index"] = None
        value = tensors["value"]

        def function(anchor, bank, key_weight, weight):
            query = functional.relation(anchor, anchor, weight, backend=backend)
            return functional.relation_nce(
                query,
                query,
                anchor,
                bank,
                weight,
                scale=5.0,
                offset=0.0,
                key_weight=key_weight,
                update=(torch.arange(6), value, 0.0),
                backend=backend,
            )

        results = []
        for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            bank = tensors["bank"].clone()
            weight = tensors["weight"].clone().requires_grad_()
            loss = f(tensors["anchor"], bank, tensors["key_weight"], weight)
            (gradient,) = torch.autograd.grad(loss, weight)
            results.append({"loss": loss.detach(), "bank": bank, "weight": gradient})
        assert_close(results[1], results[0], 1e-5)
        assert not torch.equal(results[0]["bank"], tensors["bank"])

    def test_other_sizes(self, backend):
        # The second size makes the graph a dynamic one, the third must fit it.
        function = step({"objective": "nce"}, (), None, backend)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for queries in (6, 9, 11):
            tensors = inputs(queries=queries, anchors=queries - 2)
            got = evaluate(compiled, tensors, True)
            assert_close(got, evaluate(function, tensors, True), 1e-5)

    def test_autocast_inside(self, backend):
        function = step({"objective": "nce"}, (), None, backend)

        def under_autocast(**tensors):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(**tensors)

        compiled = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")
        tensors = inputs()
        got, expected = (evaluate(f, tensors, True) for f in (compiled, under_autocast))
        assert_close(got, expected, 2e-2)

    def test_use_backend_outside(self, backend):
        import crrcd_ext

        function = step({"objective": "nce"}, (), None, None)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        tensors = inputs()
        with crrcd_ext.use_backend(backend):
            got = evaluate(compiled, tensors, True)
        expected = evaluate(step({"objective": "nce"}, (), None, backend), tensors, True)
        assert_close(got, expected, 1e-5)

    def test_bank_update(self, backend):
        def function(bank, index, value):
            functional.bank_update_(bank, index, value, momentum=0.3, backend=backend)
            return bank.sum()

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        start = torch.randn(9, 4)
        index, value = torch.tensor([3, 8, 3, 0]), torch.randn(4, 4)
        banks = [start.clone(), start.clone()]
        sums = [f(b, index, value) for f, b in zip((function, compiled), banks, strict=True)]
        torch.testing.assert_close(banks[0], banks[1])
        torch.testing.assert_close(sums[0], sums[1])


@pytest.mark.parametrize("backend", BACKENDS + INTERPRETED)
def test_export(backend):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("bank", inputs()["bank"].clone())
            self.weight = torch.nn.Parameter(inputs()["weight"].clone())

        def forward(self, anchor, sample, key_weight, index, value):
            query = functional.relation(anchor, sample, self.weight, backend=backend)
            return functional.relation_nce(
                query,
                query.detach(),
                anchor,
                self.bank,
                self.weight,
                scale=10.0,
                offset=1.0,
                key_weight=key_weight,
                index=index,
                update=(torch.arange(6), value, 0.5),
                backend=backend,
            )

    tensors = inputs()
    arguments = tuple(tensors[k] for k in ("anchor", "sample", "key_weight", "index", "value"))
    eager = Loss()
    exported = torch.export.export(Loss(), arguments).module()
    torch.testing.assert_close(exported(*arguments), eager(*arguments))
    torch.testing.assert_close(dict(exported.named_buffers())["bank"], eager.bank)


def test_fakes_give_shapes_without_kernels():
    """A graph can be traced where nothing is compiled."""
    with FakeTensorMode():
        arguments = lower(nce_arguments(ALL), torch.bfloat16)
        loss, *gradients = torch.ops.crrcd.relation_nce(*arguments)
        like = [arguments[i] for i in (0, 1, 2, 3, 9, 4, 5, 6, 7)]
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in like]
