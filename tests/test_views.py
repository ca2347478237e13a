"""Inputs that are views: the operators give what they give on contiguous copies."""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from helpers import cases
from helpers.cases import assert_close, cast, make, make_difference, make_instance
from helpers.emulated import EMULATED, NAMES, emulation

from crrcd_ext import functional

OPERATORS = {  # inputs in float64, by operator and kind of negatives
    "relation_nce": lambda: make(5, 6, 40, 9, 12, 8, 13, ids=True, labels=True),
    "relation_nce, whole bank": lambda: make(5, 6, 40, 9, 12, 8, index=False, ids=True),
    "instance_nce": lambda: make_instance(6, 40, 8, 13, ids=True, labels=True),
    "instance_nce, shared": lambda: make_instance(6, 40, 8, 13, index="shared", labels=True),
    "instance_nce, whole bank": lambda: make_instance(6, 40, 8, index=None, ids=True),
    "difference_nce": lambda: make_difference(5, 6, 40, 16, 13, ids=True, labels=True),
}
# The checker finds misaligned accesses, and those of what is no tensor's memory.
ALL = [*cases.BACKENDS, *EMULATED, *(name for name in NAMES if name not in EMULATED)]
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_operator = pytest.mark.parametrize("operator, backend", [*itertools.product(OPERATORS, ALL)])


def memory_of(backend: str) -> AbstractContextManager:
    """Where tensors have to be made that the backend may use."""
    return emulation(backend) if backend in NAMES else nullcontext()


def filled(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """Memory in which whatever is no part of the view must not be read."""
    return x.new_full(shape, math.nan if x.is_floating_point() else 1 << 40)


def one_further(x: torch.Tensor) -> torch.Tensor:
    """Begins one element behind what is aligned."""
    memory = filled(x, x.numel() + 1)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def odd_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows an odd number of elements apart, so that each is aligned in another way."""
    wide = filled(x, *x.shape[:-1], x.shape[-1] + 1 + x.shape[-1] % 2)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def every_third(x: torch.Tensor) -> torch.Tensor:
    wide = filled(x, *x.shape[:-1], 3 * x.shape[-1] + 1)
    wide[..., 1::3] = x
    return wide[..., 1::3]


def rows_expanded(x: torch.Tensor) -> torch.Tensor:
    """One row in all places: a stride of 0."""
    return x[:1].expand_as(x)


def columns_expanded(x: torch.Tensor) -> torch.Tensor:
    return x[..., :1].expand_as(x)


PLACED = [one_further, odd_rows, transposed, every_third]  # each element has a place of its own
EXPANDED = [rows_expanded, columns_expanded]


def each(views: list, name: str = "view"):
    return pytest.mark.parametrize(name, views, ids=lambda view: view.__name__)


def call(operator: str, case: dict, backend: str) -> dict:
    """Loss and gradients with the very tensors of the case as leaves."""
    leaves = {
        k: case[k].detach().requires_grad_()
        for k in cases.DIFFERENTIABLE
        if case.get(k) is not None
    }
    run = getattr(functional, operator.split(",")[0])
    loss = run(**{**case, **leaves}, backend=backend)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


@each_operator
@each_dtype
@each(PLACED)
def test_losses_of_views(operator, backend, dtype, view):
    with memory_of(backend):
        case = {
            k: view(v) if isinstance(v, torch.Tensor) and v.dim() > 0 else v
            for k, v in cast(OPERATORS[operator](), dtype).items()
        }
        dense = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
        expected, got = (call(operator, x, backend) for x in (dense, case))
        assert_close(got, expected, DTYPES[dtype])


@each_operator
@each(EXPANDED)
def test_an_expanded_argument_of_a_loss(operator, backend, view):
    with memory_of(backend):
        case = cast(OPERATORS[operator](), torch.float32)
        for k, v in case.items():
            if isinstance(v, torch.Tensor) and v.dim() > 0:
                changed = view(v)
                expected = call(operator, {**case, k: changed.contiguous()}, backend)
                got = call(operator, {**case, k: changed}, backend)
                assert_close(got, expected, DTYPES[torch.float32])


@pytest.mark.parametrize("backend", ALL)
@each_dtype
@each(PLACED + EXPANDED)
def test_relation(backend, dtype, view):
    with memory_of(backend):
        case = cast(make(5, 6, 7, 9, 12), dtype)
        case["sample"] = case["query"][0, :, :9].clone()
        inputs = [view(case[k]) for k in ("anchor", "sample", "weight", "bias")]
        results = []
        for tensors in ([x.contiguous() for x in inputs], inputs):
            leaves = [x.detach().requires_grad_() for x in tensors]
            relation = functional.relation(*leaves, backend=backend)
            outer = view(torch.linspace(-1, 1, relation.numel(), dtype=dtype).view(relation.shape))
            gradients = torch.autograd.grad(relation, leaves, outer)
            results.append(dict(enumerate([relation.detach(), *gradients])))
        assert_close(results[1], results[0], DTYPES[dtype])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("storage", [*DTYPES, torch.float16])
@each(PLACED, "bank_view")
@each(PLACED + EXPANDED)
def test_bank_update(backend, storage, bank_view, view):
    with memory_of(backend):
        g = torch.Generator().manual_seed(0)
        bank, value = torch.randn(13, 8, generator=g).to(storage), torch.randn(6, 8, generator=g)
        index = torch.tensor([3, 12, 3, 0, 12, 3])
        expected, got = bank.clone(), bank_view(bank)
        given = view(index), view(value)
        dense = [x.contiguous() for x in given]
        functional.bank_update_(expected, *dense, momentum=0.5, backend=backend)
        functional.bank_update_(got, *given, momentum=0.5, backend=backend)
        torch.testing.assert_close(got.contiguous(), expected)
        assert not torch.equal(expected, bank)
