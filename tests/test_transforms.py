"""torch.func and forward mode: the reference derives, compiled backends derive or refuse."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import cases
from helpers.cases import make, make_difference, make_instance
from helpers.emulated import EMULATED
from helpers.interpreted import INTERPRETED
from torch.autograd import forward_ad

from crrcd_ext import CRDLoss, CRRCDLoss, functional

COMPILED = cases.COMPILED + EMULATED + INTERPRETED
REFUSED = r"crrcd_ext\.{}: derivatives by torch\.func .* use backend='reference'"

compiled = pytest.mark.parametrize("backend", COMPILED)


RELATION = make(3, 4, H=5, R=6, D=5)


def _relation(sample, *, backend):
    """functional.relation, to a number."""
    operands = (RELATION["anchor"], sample, RELATION["weight"], RELATION["bias"])
    return (functional.relation(*operands, backend=backend) * RELATION["query"][:, :1]).sum()


CASES = {
    "relation_nce": make(2, 3, 5, 4, 6, 3, 7),
    "difference_nce": make_difference(2, 3, 5, 4, 6, index="shared"),
    "instance_nce": make_instance(3, 5, 4, 6),
}


def calls(name, backend):
    """A function of one tensor to a number, that tensor, and a tangent."""
    if name == "relation":
        x = RELATION["bank"]
        return lambda x: _relation(x, backend=backend), x, torch.ones_like(x) / 3
    case = CASES[name]
    operator = getattr(functional, name)
    x = case["query"]
    return (
        lambda x: operator(**{**case, "query": x}, backend=backend),
        x,
        torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x),
    )


operators = pytest.mark.parametrize("name", ["relation", *CASES])


@contextlib.contextmanager
def refusal(name):
    with pytest.raises(RuntimeError, match=REFUSED.format(name)):
        yield


def forward_mode(f, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent


def mapped_backward(f, x, tangent):
    leaves = torch.stack([x, x + tangent]).requires_grad_()
    return torch.autograd.grad(torch.func.vmap(f)(leaves).sum(), leaves)[0]


DERIVATIVES = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "forward mode": forward_mode,
    "grad": lambda f, x, t: torch.func.grad(f)(x),
    "vjp": lambda f, x, t: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jacrev": lambda f, x, t: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, t: torch.func.hessian(f)(x),
    "grad of grad": lambda f, x, t: torch.func.grad(lambda x: (torch.func.grad(f)(x) * t).sum())(x),
    "vmap of grad": lambda f, x, t: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x + t])),
    "grad of vmap": lambda f, x, t: torch.func.grad(
        lambda x: torch.func.vmap(f)(torch.stack([x, x + t])).sum()
    )(x),
    "vmap, then backward": mapped_backward,
    "vmap within forward mode": lambda f, x, t: forward_mode(
        lambda x: torch.func.vmap(f)(x[None])[0], x, t
    ),
    "jvp, then backward": lambda f, x, t: torch.autograd.grad(
        torch.func.jvp(f, ((leaf := x.clone().requires_grad_()),), (t,))[1], leaf
    )[0],
}


def expected(kind, name):
    f, x, tangent = calls(name, "reference")
    gradient = torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf)[0]
    if kind in ("jvp", "forward mode", "vmap within forward mode"):
        return (gradient * tangent).sum()
    if kind in ("grad", "vjp", "jacrev", "jacfwd"):
        return gradient
    hessian = torch.autograd.functional.hessian(f, x)
    if kind == "hessian":
        return hessian
    if kind in ("grad of grad", "jvp, then backward"):
        return (hessian * tangent).sum(tuple(range(x.dim(), 2 * x.dim())))
    other = torch.autograd.grad(f(leaf := (x + tangent).requires_grad_()), leaf)[0]
    return gradient + other if kind == "grad of vmap" else torch.stack([gradient, other])


@operators
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_reference(kind, name):
    f, x, tangent = calls(name, "reference")
    torch.testing.assert_close(DERIVATIVES[kind](f, x, tangent), expected(kind, name))


@compiled
@operators
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_compiled_backends_refuse(backend, kind, name):
    f, x, tangent = calls(name, backend)
    with refusal(name):
        DERIVATIVES[kind](f, x, tangent)


@pytest.mark.parametrize("kind", ["jvp", "forward mode", "grad", "vmap, then backward"])
@pytest.mark.parametrize("name", ["relation", "instance_nce"])
def test_a_graph_refuses(name, kind):
    f, x, tangent = calls(name, "cpu")
    torch.compiler.reset()
    graph = torch.compile(lambda x: DERIVATIVES[kind](f, x, tangent), backend="eager")
    with refusal(name):
        graph(x)


@compiled
def test_every_operand(backend):
    """Each of them may be the one that is derived by; the bank is as it was then."""
    for name, case in CASES.items():
        operator = getattr(functional, name)
        bank = case["bank"].clone()
        for operand in cases.DIFFERENTIABLE:
            if case.get(operand) is None:
                continue
            update = {"update": (torch.tensor([1]), bank[:1], 0.5)} if operand != "bank" else {}

            def f(x, operand=operand, case=case, operator=operator, update=update):
                return operator(**{**case, operand: x}, **update, backend=backend)

            with refusal(name):
                torch.func.jvp(f, (case[operand],), (torch.ones_like(case[operand]),))
            assert case["bank"].equal(bank), operand


@compiled
@operators
def test_values_without_derivatives(backend, name):
    """What nobody derives by is computed: beside tensors that a transform follows, and mapped."""
    f, x, tangent = calls(name, backend)
    true = calls(name, "reference")[0](x)
    square = torch.func.grad(lambda y: f(x) * y**2)
    torch.testing.assert_close(square(torch.tensor(3.0).double()), 6 * true)
    with forward_ad.dual_level():
        y = forward_ad.make_dual(torch.tensor(3.0).double(), torch.tensor(1.0).double())
        torch.testing.assert_close(forward_ad.unpack_dual(f(x) * y).tangent, true)
        leaf = x.clone().requires_grad_()
        gradient = torch.autograd.grad(f(leaf), leaf)[0]
    torch.testing.assert_close(gradient, expected("grad", name))
    if backend == "cpu":
        mapped = torch.func.vmap(f)(torch.stack([x, x + tangent]))
        reference = calls(name, "reference")[0]
        torch.testing.assert_close(mapped, torch.stack([reference(x), reference(x + tangent)]))


@pytest.mark.parametrize("backend", ["reference", *cases.COMPILED])
def test_similar_mask_and_bank_update(backend):
    """They have no derivative, and are the same under transforms."""
    case = make_instance(3, 40, 4, 50, index="shared")

    def bits(query):
        return functional.similar_mask(
            query, case["bank"], case["index"], threshold=0.3, backend=backend
        )

    def sum_and_bits(query):
        return query.sum(), bits(query)

    query = case["query"]
    plain = bits(query)
    assert torch.func.grad(sum_and_bits, has_aux=True)(query)[1].equal(plain)
    assert torch.func.jvp(sum_and_bits, (query,), (query,), has_aux=True)[2].equal(plain)

    value, index = case["query"], torch.tensor([4, 0, 4])
    true = case["bank"].clone()
    functional.bank_update_(true, index, value, momentum=0.5, backend="reference")

    def update(value):
        bank = case["bank"].clone()
        functional.bank_update_(bank, index, value, momentum=0.5, backend=backend)
        return value.sum(), bank

    gradient, bank = torch.func.grad(update, has_aux=True)(value)
    torch.testing.assert_close(gradient, torch.ones_like(value))
    torch.testing.assert_close(bank, true)


@pytest.mark.parametrize("make_loss", [CRDLoss, CRRCDLoss])
def test_functional_call_of_a_loss(make_loss):
    torch.manual_seed(0)
    options = {"negatives": 5, "normalizer": 1.0}
    student, teacher = torch.randn(4, 3), torch.randn(4, 6)
    index = torch.arange(4)
    criterion = {b: make_loss(3, 6, 20, **options, backend=b) for b in ("reference", "cpu")}
    criterion["reference"](student, teacher, index)
    criterion["cpu"].load_state_dict(criterion["reference"].state_dict())

    def loss(parameters, backend):
        call = (student, teacher, index), {"update": False}
        return torch.func.functional_call(criterion[backend], parameters, *call)

    learns = [kv for kv in criterion["reference"].named_parameters() if kv[1].requires_grad]
    parameters = {k: v.detach().clone() for k, v in learns}
    leaves = {k: v.clone().requires_grad_() for k, v in parameters.items()}
    states = {b: {k: v.clone() for k, v in c.state_dict().items()} for b, c in criterion.items()}
    with pytest.raises(RuntimeError, match="use backend='reference'"):
        torch.func.grad(loss)(parameters, "cpu")
    for k, v in criterion["cpu"].state_dict().items():
        assert v.equal(states["cpu"][k]), k
    got = torch.func.grad(loss)(parameters, "reference")
    value = loss(leaves, "cpu")
    gradients = torch.autograd.grad(value, list(leaves.values()))
    for k, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(got[k], gradient, rtol=2e-4, atol=1e-5)
