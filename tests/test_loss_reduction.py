"""weights and reduction in the call of the three losses."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.cases import BACKENDS
from helpers.losses import KINDS, B, K, N, batch, make, same_state

kinds = pytest.mark.parametrize("kind", KINDS)
backends = pytest.mark.parametrize("backend", BACKENDS)
DIRECTIONS = [(kind, d) for kind in KINDS for d in ("student", "teacher", "both")]
UNREDUCED = [(kind, d) for kind, d in DIRECTIONS if kind != "crrcd" or d == "student"]
WEIGHTS = torch.linspace(0, 2, B, dtype=torch.float64)


def trained(kind, steps=2, **options):
    """In float64, with Zbar known and banks that differ from those at the start."""
    options = {"bank_dtype": torch.float64, **options}
    criterion = make(kind=kind, **options).double()
    for i in range(steps):
        criterion(*batch(i, torch.float64))
    return criterion


def pairs_of_samples(criterion, kind, index):
    """[B]: of each sample, the anchors that are other samples."""
    if kind == "crd":
        return torch.ones(len(index), dtype=torch.int64)
    anchors = index[criterion._last.selected]
    return (anchors[:, None] != index).sum(0)


def stepped(criterion, *given, **options):
    """Loss, gradients of the student's features and of all parameters, and the module after."""
    criterion = copy.deepcopy(criterion)
    student = given[0].clone().requires_grad_()
    loss = criterion(student, *given[1:], **options)
    parameters = [p for p in criterion.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss.sum(), [student, *parameters], allow_unused=True)
    return loss.detach(), gradients, criterion


def assert_same(got, true):
    torch.testing.assert_close(got[0], true[0])
    for one, other in zip(got[1], true[1], strict=True):
        torch.testing.assert_close(one, other)
    assert same_state(got[2], true[2])


@backends
@pytest.mark.parametrize("kind, direction", DIRECTIONS)
@pytest.mark.parametrize("objective", ["nce", "infonce"])
def test_sum_and_weights(backend, kind, direction, objective):
    """The sum is the mean times the pairs; weights of one are none; a weight counts linearly."""
    criterion = trained(kind, backend=backend, direction=direction, objective=objective)
    given = batch(7, torch.float64)
    mean = stepped(criterion, *given)
    assert_same(stepped(criterion, *given, weights=torch.ones(B)), mean)
    pairs = pairs_of_samples(mean[2], kind, given[2]).sum()
    total = stepped(criterion, *given, reduction="sum")
    torch.testing.assert_close(total[0], mean[0] * pairs)
    parts = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        one = torch.zeros(B)
        one[b] = 1
        parts += WEIGHTS[b] * stepped(criterion, *given, weights=one)[0]
    weighted = stepped(criterion, *given, weights=WEIGHTS)
    torch.testing.assert_close(weighted[0], parts)
    assert same_state(weighted[2], mean[2])


@backends
@pytest.mark.parametrize("kind, direction", UNREDUCED)
@pytest.mark.parametrize("objective", ["nce", "infonce"])
def test_a_loss_for_each_sample(backend, kind, direction, objective):
    criterion = trained(kind, backend=backend, direction=direction, objective=objective)
    given = batch(7, torch.float64)
    loss, _, after = stepped(criterion, *given, reduction="none")
    assert loss.shape == (B,)
    true = stepped(criterion, *given, reduction="sum", weights=WEIGHTS)
    assert same_state(after, true[2])
    weighted = stepped(criterion, *given, reduction="none", weights=WEIGHTS)
    torch.testing.assert_close(weighted[0], loss * WEIGHTS)
    torch.testing.assert_close(weighted[0].sum(), true[0])
    assert_same((true[0], weighted[1], weighted[2]), true)
    # with factors that come later
    student = given[0].clone().requires_grad_()
    each = copy.deepcopy(criterion)(student, *given[1:], reduction="none")
    (gradient,) = torch.autograd.grad((each * WEIGHTS).sum(), student)
    torch.testing.assert_close(gradient, true[1][0])


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_of_weights(kind, dtype):
    criterion = trained(kind).to(dtype)
    given = batch(7, dtype)
    losses = [
        stepped(criterion, *given, weights=WEIGHTS.to(other))[0]
        for other in (torch.float64, torch.float32, torch.bfloat16)
    ]
    assert {x.dtype for x in losses} == {dtype}
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-2, atol=0)


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {"keys": "live"},
        {"keys": "bank"},
        {"learnable_temperature": True},
        {"learnable_offset": True},
        {"direction": "teacher"},
        {"direction": "both"},
    ],
    ids=str,
)
def test_what_all_losses_share_has_no_gradient_through_them(kind, options):
    """By one error before anything changes, in the first direction too."""
    criterion = trained(kind, **options)
    before = copy.deepcopy(criterion)
    given = batch(7, torch.float64)
    allowed = kind == "crd" and options == {"keys": "bank"}
    allowed |= kind != "crrcd" and "direction" in options
    if not allowed:
        message = r"Loss: reduction: expected 'mean' or 'sum', which take weights, with \w+.*'none'"
        with pytest.raises(ValueError, match=message):
            criterion(*given, reduction="none")
        assert same_state(criterion, before)
    else:
        assert criterion(*given, reduction="none").shape == (B,)
    with torch.no_grad():
        assert before(*given, reduction="none").shape == (B,)


@kinds
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"reduction": "max"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got"),
        ({"weights": [1.0] * B}, TypeError, "weights: expected a tensor, got list"),
        ({"weights": torch.ones(B + 1)}, ValueError, r"weights: expected shape \[B\] = \[8\], got"),
        ({"weights": torch.ones(B, 1)}, ValueError, r"weights: expected shape \[B\] = \[8\], got"),
        ({"weights": torch.ones(B).int()}, TypeError, "weights: expected dtype .* got int32"),
        ({"weights": torch.full((B,), torch.nan)}, ValueError, "weights: expected finite numbers"),
        ({"weights": torch.ones(B, requires_grad=True)}, ValueError, "weights: .* no gradient"),
    ],
    ids=str,
)
def test_errors(kind, change, error, message):
    criterion = trained(kind, direction="both")
    before = copy.deepcopy(criterion)
    with pytest.raises(error, match=rf"^crrcd_ext\.C\w+Loss: {message}"):
        criterion(*batch(7, torch.float64), **change)
    assert same_state(criterion, before)


@kinds
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch(kind, reduction):
    criterion = trained(kind)
    student, teacher, index = (x[:0] for x in batch(7, torch.float64))
    student.requires_grad_()
    loss = criterion(student, teacher, index, weights=torch.ones(0), reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    loss.sum().backward()
    assert student.grad.shape == student.shape


@kinds
def test_a_step_to_skip_has_losses_of_zero(kind):
    criterion = trained(kind, nonfinite="skip")
    student, teacher, index = batch(7, torch.float64)
    student[3, 1] = torch.nan
    before = copy.deepcopy(criterion)
    loss = criterion(student.requires_grad_(), teacher, index, weights=WEIGHTS, reduction="none")
    assert torch.equal(loss, torch.zeros(B, dtype=torch.float64))
    loss.sum().backward()
    assert not student.grad.any()
    assert torch.equal(criterion._banks[0].rows, before._banks[0].rows)


@kinds
@pytest.mark.parametrize("self_pairs", [True, False])
def test_diagnostics_have_the_mean(kind, self_pairs):
    """What they compare with the loss of a critic that tells nothing apart."""
    options = {} if kind == "crd" else {"self_pairs": self_pairs}
    criterion = trained(kind, objective="infonce", **options)
    given = batch(7, torch.float64)
    index = given[2].clone()
    index[:2] = index[2]  # an anchor more often than others
    given = (*given[:2], index)

    def shown(**how):
        return stepped(criterion, *given, **how)[2].diagnostics()["loss"]

    plain = shown()
    for reduction in ("mean", "sum", "none"):
        assert shown(weights=torch.full((B,), 3.0), reduction=reduction) == pytest.approx(plain)
        assert shown(reduction=reduction) == pytest.approx(plain)
    weighted = [shown(weights=WEIGHTS, reduction=r) for r in ("mean", "sum", "none")]
    assert weighted == pytest.approx([weighted[0]] * 3)
    assert weighted[0] != pytest.approx(plain)
    assert shown(weights=torch.zeros(B)) == 0


@kinds
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_full_graph(kind, reduction):
    criterion = trained(kind)
    given = batch(7, torch.float64)

    def step(module, student, teacher, index, weights):
        return module(student, teacher, index, weights=weights, reduction=reduction)

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        module, student = copy.deepcopy(criterion), given[0].clone().requires_grad_()
        loss = function(module, student, *given[1:], WEIGHTS)
        (gradient,) = torch.autograd.grad(loss.square().sum(), student)
        results.append((loss.detach(), (gradient,), module))
    torch._dynamo.reset()
    assert_same(results[1], results[0])


def test_the_sizes_of_these_tests():
    """Anchors fewer than the batch, so that not all samples have as many pairs."""
    assert (B, K, N) == (8, 17, 40)
