"""functional.relation against the formula, in value and derivative."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import cases
from helpers.cases import TINY, angle, distance, strided, unit_rows
from helpers.emulated import EMULATED
from helpers.interpreted import INTERPRETED

from crrcd_ext import functional

BACKENDS, COMPILED = (names + EMULATED + INTERPRETED for names in (cases.BACKENDS, cases.COMPILED))
SHAPES = [  # A, M, H, R
    (1, 1, 1, 1),
    (1, 3, 2, 5),
    (7, 9, 17, 15),
    (8, 16, 64, 64),
    (5, 65, 33, 127),
    (3, 31, 129, 2),
    (2, 130, 4, 70),
    (9, 127, 128, 129),
]


def make(A, M, H, R, *, bias=True, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = (
        normal(A, H),
        normal(M, H),
        normal(R, H) * math.sqrt(2 / H),
        normal(R) if bias else None,
    )
    # A fixed direction of the incoming gradient, one that differs for every entry.
    return tuple(x if x is None else x.to(dtype) for x in tensors), normal(A, M, R).to(dtype)


def run(tensors, incoming, backend):
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in tensors]
    v = functional.relation(*leaves, backend=backend)
    wanted = [x for x in leaves if x is not None]
    return [v.detach(), *torch.autograd.grad(v, wanted, incoming)]


def loop(anchor, sample, weight, bias):
    """The formula, entry by entry."""
    A, M, R = len(anchor), len(sample), len(weight)
    v = torch.zeros(A, M, R, dtype=torch.float64)
    for a in range(A):
        for m in range(M):
            hidden = [max(float(p - x), 0.0) for p, x in zip(anchor[a], sample[m], strict=True)]
            w = [
                sum(float(weight[r, h]) * hidden[h] for h in range(len(hidden)))
                + (0.0 if bias is None else float(bias[r]))
                for r in range(R)
            ]
            square = sum(x * x for x in w)
            if square > 1e-24:
                for r in range(R):
                    v[a, m, r] = w[r] / math.sqrt(square)
    return v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_formula(backend, bias):
    tensors, _ = make(3, 4, 5, 6, bias=bias)
    torch.testing.assert_close(
        functional.relation(*tensors, backend=backend), loop(*tensors), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(backend, bias):
    tensors, _ = make(3, 4, 5, 4, bias=bias)
    leaves = [x if x is None else x.requires_grad_() for x in tensors]
    # By a few random directions instead of every entry where each call takes long.
    assert torch.autograd.gradcheck(
        lambda *t: functional.relation(*t, backend=backend),
        leaves,
        fast_mode=backend in INTERPRETED,
    )


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_matches_reference(backend, shape, bias):
    tensors, incoming = make(*shape, bias=bias)
    expected = run(tensors, incoming, "reference")
    for x, y in zip(run(tensors, incoming, backend), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] > 1])
def test_error_budget(backend, dtype, shape, bias):
    true, plain, got = [], [], []
    # One where it takes seconds and is of entries enough that none is right or wrong by luck.
    for seed in range(1 if backend in INTERPRETED and shape == SHAPES[-1] else 3):
        tensors, incoming = make(*shape, bias=bias, seed=seed, dtype=dtype)
        wide = tuple(x if x is None else x.double() for x in tensors)
        true.append(run(wide, incoming.double(), "reference"))
        plain.append(run(tensors, incoming, "reference"))
        got.append(run(tensors, incoming, backend))
        assert all(x.dtype == dtype for x in got[-1])
    # A column per result: relation, d_anchor, d_sample, d_weight, d_bias.
    for t, p, x in zip(*(zip(*r, strict=True) for r in (true, plain, got)), strict=True):
        t, p, x = (torch.cat([e.double().flatten() for e in r]) for r in (t, p, x))
        for measure in (distance, angle):
            assert measure(x, t) <= 2 * measure(p, t) + TINY[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strides_and_a_strided_gradient(backend, dtype):
    tensors, incoming = make(5, 6, 7, 9, dtype=dtype)
    expected = run(tensors, incoming, backend)
    views = [strided(x) for x in tensors]
    leaves = [x.requires_grad_() for x in views]
    v = functional.relation(*leaves, backend=backend)
    for x, y in zip(
        (v.detach(), *torch.autograd.grad(v, leaves, strided(incoming))), expected, strict=True
    ):
        torch.testing.assert_close(x, y)
    # An expanded gradient has stride 0, as that of a sum has.
    v = functional.relation(*leaves, backend=backend)
    got = torch.autograd.grad(v.sum(), leaves)
    for x, y in zip(got, run(tensors, torch.ones_like(incoming), backend)[1:], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_vanishing_vectors_are_zero_with_zero_gradient(backend, dtype):
    (anchor, sample, weight, _), incoming = make(4, 5, 6, 7, bias=False, dtype=dtype)
    sample[2] = anchor.amax(0) + 1  # every hidden unit of this column is off
    out = run((anchor, sample, weight, None), incoming, backend)
    assert out[0][:, 2].eq(0).all()
    assert all(x.isfinite().all() for x in out)
    assert out[2][2].eq(0).all()
    # Only the other columns may reach the weight.
    rest = [0, 1, 3, 4]
    others = run((anchor, sample[rest], weight, None), incoming[:, rest], backend)
    assert distance(out[3], others[3]) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_null_space(backend, dtype):
    # W hid cancels to exactly 0 for hid = (1, 1, 2, 2): the norm must not come out as rounding.
    weight = torch.tensor([[1, -1, 0, 0], [0, 0, 3, -3], [2, -2, 1, -1]], dtype=dtype)
    anchor = torch.tensor([[1, 1, 2, 2], [5, 1, 2, 3]], dtype=dtype)
    sample = torch.zeros(3, 4, dtype=dtype)
    out = run((anchor, sample, weight, None), torch.ones(2, 3, 3, dtype=dtype), backend)
    assert out[0][0].eq(0).all()
    assert out[1][0].eq(0).all()
    expected = unit_rows(weight.double() @ anchor[1].double())
    torch.testing.assert_close(
        out[0][1, 0].double(), expected, rtol=0, atol=5e-3 if dtype == torch.bfloat16 else 1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty(backend, shape):
    tensors, incoming = make(*shape, 5, 6)
    out = run(tensors, incoming, backend)
    assert out[0].shape == (*shape, 6)
    assert all(x.eq(0).all() for x in out[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_asked(backend):
    tensors, incoming = make(3, 4, 5, 6)
    everything = run(tensors, incoming, backend)[1:]
    for i in range(4):
        leaves = [x.detach().clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
        v = functional.relation(*leaves, backend=backend)
        (gradient,) = torch.autograd.grad(v, leaves[i], incoming)
        torch.testing.assert_close(gradient, everything[i])
    assert not functional.relation(*tensors, backend=backend).requires_grad
    with torch.no_grad():
        assert not functional.relation(*leaves, backend=backend).requires_grad


@pytest.mark.parametrize("backend", COMPILED)
def test_double_backward_is_refused(backend):
    tensors, _ = make(3, 4, 5, 6)
    leaf = tensors[0].requires_grad_()
    v = functional.relation(leaf, *tensors[1:], backend=backend)
    with pytest.raises(RuntimeError, match=r"crrcd_ext\.relation: double backward"):
        torch.autograd.grad(v.sum(), leaf, create_graph=True)


def test_reference_has_a_second_derivative():
    tensors, _ = make(2, 3, 4, 3)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradgradcheck(
        lambda *t: functional.relation(*t, backend="reference"), leaves
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_over_one_graph(backend):
    tensors, incoming = make(3, 4, 5, 6)
    leaves = [x.requires_grad_() for x in tensors]
    v = functional.relation(*leaves, backend=backend)
    first = torch.autograd.grad(v, leaves, incoming, retain_graph=True)
    second = torch.autograd.grad(v, leaves, incoming)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_promote_and_autocast(backend):
    tensors, _ = make(3, 4, 5, 6, dtype=torch.float32)
    mixed = [tensors[0].bfloat16().requires_grad_(), *tensors[1:]]
    v = functional.relation(*mixed, backend=backend)
    assert v.dtype == torch.float32
    assert torch.autograd.grad(v.sum(), mixed[0])[0].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = functional.relation(*tensors, backend=backend)
        assert v.dtype == torch.bfloat16
        assert functional.relation(tensors[0].double(), *tensors[1:], backend=backend).dtype == (
            torch.float64
        )
    exact = functional.relation(*(x.bfloat16().double() for x in tensors), backend="reference")
    assert distance(v, exact) < 1e-2


def test_float16_on_reference():
    tensors, _ = make(3, 4, 5, 6)
    v = functional.relation(*(x.half() for x in tensors), backend="reference")
    assert v.dtype == torch.float16
    assert distance(v, functional.relation(*tensors, backend="reference")) < 5e-3


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_repeat(backend, threads):
    torch.set_num_threads(threads)
    sizes = (3, 70, 33, 47) if backend in INTERPRETED else (9, 130, 33, 47)
    for dtype in (torch.float32, torch.bfloat16):
        tensors, incoming = make(*sizes, dtype=dtype)
        first = run(tensors, incoming, backend)
        for _ in range(1 if backend in INTERPRETED else 3):
            again = run(tensors, incoming, backend)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
