"""Every instruction set of the build that this processor can run gives the same results."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.cases import (
    DIFFERENTIABLE,
    assert_close,
    assert_within_budget,
    cast,
    make,
    run,
    truth,
)
from helpers.process import python

from crrcd_ext import _backend, functional

_C = _backend.compiled
AVAILABLE = _C.isa_available() if _C else []
KNOWN = ["amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline"]

each = pytest.mark.parametrize("isa", AVAILABLE)

USE = """
import crrcd_ext
from crrcd_ext import _C, functional
from helpers.cases import make
print(_C.isa_active(), float(functional.relation_nce(**make(), backend="cpu")))
"""


@pytest.mark.skipif(_C is None, reason="instruction sets are the compiled module's")
class TestChoice:
    def test_best_first(self):
        assert AVAILABLE
        assert AVAILABLE[-1] == "baseline"
        assert sorted(AVAILABLE, key=KNOWN.index) == AVAILABLE

    def test_force_and_undo(self):
        best = _C.isa_active()
        for isa in AVAILABLE:
            _C.set_isa(isa)
            assert _C.isa_active() == isa
        _C.set_isa(None)
        assert _C.isa_active() == best

    def test_wrong_name(self):
        before = _C.isa_active()
        with pytest.raises(Exception, match=re.escape(", ".join(AVAILABLE))):
            _C.set_isa("sse9")
        assert _C.isa_active() == before

    @pytest.mark.parametrize("isa", sorted({AVAILABLE[0], AVAILABLE[-1]}) if AVAILABLE else [])
    def test_environment(self, isa):
        done = python(USE, CRRCD_CPU_ISA=isa)
        assert done.returncode == 0, done.stderr
        active, loss = done.stdout.split()
        assert active == isa
        expected = functional.relation_nce(**make(), backend="reference")
        assert float(loss) == pytest.approx(float(expected), rel=1e-12)

    def test_environment_with_a_wrong_name(self):
        done = python(
            "from crrcd_ext.__main__ import main; main(); print('reported')" + USE,
            CRRCD_CPU_ISA="avx9000",
        )
        assert "reported" in done.stdout  # the report shows the mistake and goes on
        report, _ = done.stdout.split("reported")
        assert done.returncode != 0
        for text in (report, done.stderr):
            assert "CRRCD_CPU_ISA" in text
            assert "avx9000" in text
            assert ", ".join(AVAILABLE) in text


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["nce", "infonce"])
@pytest.mark.parametrize("wanted", [DIFFERENTIABLE, ("query",), ("anchor",)])
@pytest.mark.parametrize(
    "shape",
    [
        (8, 33, 257, 64, 64, 32),
        (5, 17, 130, 130, 7, 19),
        (3, 9, 300, 20, 70, 65),
        (4, 40, 183, 150, 130, 33),  # rows, columns and sums that end within a tile register
    ],
)
def test_error_budget(isa, dtype, objective, wanted, shape):
    _C.set_isa(isa)
    sizes = dict(zip("ABKHRD", shape, strict=True), N=400)
    options = {"objective": objective, "ids": True, "excluded": 0.1}
    cases = [make(**sizes, **options, seed=seed) for seed in range(3)]
    assert_within_budget(cases, "cpu", dtype, wanted=wanted)


@each
@pytest.mark.parametrize("wanted", [("query",), ("weight", "bias"), ("bank",)])
@pytest.mark.parametrize("key_weight", [True, False])
def test_float64(isa, wanted, key_weight):
    _C.set_isa(isa)
    for seed in range(3):
        case = make(4, 9, 140, 33, 31, 17, 150, key_weight=key_weight, labels=True, seed=seed)
        assert_close(run(case, "cpu", wanted=wanted), truth(case, wanted=wanted), 1e-11)


@each
@pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bank_storage(isa, storage):
    _C.set_isa(isa)
    case = cast(make(3, 5, 60, 20, 18, 13, 50), torch.float32)
    case["bank"] = case["bank"].to(storage)
    wanted = ("query", "key_weight", "weight")
    assert_close(run(case, "cpu", wanted=wanted), truth(case, wanted=wanted), 2e-5)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_extremes(isa, dtype):
    _C.set_isa(isa)
    # The exponential of every instruction set sees the whole range of its argument.
    for scale, offset in ((1e4, 0.0), (1e4, 1e4), (1.0, 80.0), (1.0, -80.0), (1e-3, 700.0)):
        for objective in ("nce", "infonce"):
            case = make(3, 5, 60, 20, 18, 13, 50, scale=scale, offset=offset, objective=objective)
            case = cast(case, dtype)
            got, true = run(case, "cpu"), truth(case)
            tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.3}[dtype]
            assert_close(got, true, tolerance, run(case, "reference"))


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("logit", [-1.0, 0.69, 0.7, 3.0, 60.0])
def test_products_of_many_factors(isa, dtype, logit):
    # the loss is the logarithm of products of 1 + exp(logit): here of thousands alike
    _C.set_isa(isa)
    for ids in (False, True):
        case = make(2, 19, 700, 20, 18, 13, 400, scale=1e-3, offset=-logit, ids=ids)
        case = cast(case, dtype)
        got, true = run(case, "cpu"), truth(case)
        assert_close(got, true, 1e-11 if dtype == torch.float64 else 2e-5, run(case, "reference"))


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_relation(isa, dtype):
    _C.set_isa(isa)
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*s, generator=g).to(dtype) for s in ((5, 33), (70, 33), (65, 33), (65,))]
    for x in tensors:
        x.requires_grad_()
    got, true = (
        functional.relation(*t, backend=b)
        for t, b in ((tensors, "cpu"), ([x.double() for x in tensors], "reference"))
    )
    incoming = torch.randn(got.shape, generator=g).to(dtype)
    gradients = torch.autograd.grad(got, tensors, incoming)
    expected = torch.autograd.grad(true, tensors, incoming.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    names = ("relation", "anchor", "sample", "weight", "bias")
    assert_close(
        dict(zip(names, (got.detach(), *gradients), strict=True)),
        dict(zip(names, (true.detach(), *expected), strict=True)),
        tolerance,
    )


@each
def test_bits_repeat(isa):
    _C.set_isa(isa)
    torch.set_num_threads(2)
    case = cast(make(5, 20, 400, 33, 47, 20, 300, ids=True), torch.float32)
    first = run(case, "cpu")
    for _ in range(3):
        again = run(case, "cpu")
        assert all(torch.equal(first[k], again[k]) for k in first)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["nce", "infonce"])
@pytest.mark.parametrize("shape", [(4, 9, 140, 33, 31, 17, 150), (3, 5, 70, 65, 4, 9, 80)])
def test_poisoned_scratch(isa, dtype, objective, shape):
    """Scratch memory full of NaN must not show anywhere."""
    _C.set_isa(isa)
    case = cast(make(*shape, objective=objective, ids=True, excluded=0.2), dtype)
    for wanted in (DIFFERENTIABLE, ("query",), ("weight",), ("bank",), ("anchor", "key_weight")):
        expected = run(case, "cpu", wanted=wanted)
        _C.set_poison(True)
        try:
            got = run(case, "cpu", wanted=wanted)
        finally:
            _C.set_poison(False)
        assert all(torch.equal(got[k], expected[k]) for k in expected), wanted
