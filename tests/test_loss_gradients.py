"""Which parameters get a gradient does not depend on the batch: where there is no loss it is 0."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.cases import BACKENDS
from helpers.losses import DS, DT, KINDS, B, batch, make

DIRECTIONS = ["student", "teacher", "both"]
KEYS = ["stop_gradient", "live", "bank"]
LEARNED = {"learnable_temperature": True, "learnable_offset": True}


def without(size):
    return torch.empty(size, DS), torch.empty(size, DT), torch.zeros(size, dtype=torch.int64)


def empty():
    return without(0)


def one_sample():
    student, teacher, index = batch(1)
    return student[:1], teacher[:1], index[:1]


def repeated():
    student, teacher, index = batch(1)
    return student, teacher, torch.full_like(index, 3)


def gradients(criterion, values):
    """Loss, the features' gradient and {parameter: gradient} of one step."""
    student, teacher, index = values
    student = student.clone().requires_grad_()
    criterion.zero_grad(set_to_none=True)
    loss = criterion(student, teacher, index)
    loss.backward()
    return loss.detach(), student.grad, {n: p.grad for n, p in criterion.named_parameters()}


def assert_zero_where_a_full_batch_has_one(criterion, values):
    before = {n: b.clone() for n, b in criterion.named_buffers()}
    loss, of_features, found = gradients(criterion, values)
    unchanged = len(values[2]) == 0
    assert loss == 0 and of_features.shape == values[0].shape and not of_features.any()
    if unchanged:
        assert all(torch.equal(b, before[n]) for n, b in criterion.named_buffers())
    _, _, expected = gradients(criterion, batch(2))
    assert any(g is not None for g in expected.values()) or not any(True for _ in found)
    for name, gradient in found.items():
        assert (gradient is None) == (expected[name] is None), name
        assert gradient is None or not gradient.any(), name


OPTIONS = [
    {"learnable_temperature": True},
    {"objective": "infonce", "learnable_temperature": True},
    {"normalizer": 2.0, **LEARNED},
    {"nonfinite": "skip", "exclude_similar": 0.5},
]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o))
@pytest.mark.parametrize(
    "kind, direction, keys",
    [
        case
        for case in itertools.product(KINDS, DIRECTIONS, KEYS)
        if case[0] == "crrcd" or case[1:] != ("teacher", "bank")
    ],
)
def test_an_empty_batch(kind, direction, keys, options, started):
    if direction == "teacher":
        options = {k: v for k, v in options.items() if k != "exclude_similar"}
    criterion = make(kind=kind, direction=direction, keys=keys, **options)
    if started:
        criterion(*batch(0))
    assert_zero_where_a_full_batch_has_one(criterion, empty())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_of_every_backend(kind, backend):
    criterion = make(kind=kind, direction="both", keys="live", backend=backend)
    assert_zero_where_a_full_batch_has_one(criterion, empty())


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_of_other_heads_samplers_and_modes(kind):
    for options in ({"standardize": False}, {"head": "linear", "capacity": 20}):
        criterion = make(kind=kind, **options)
        assert_zero_where_a_full_batch_has_one(criterion, empty())
        assert_zero_where_a_full_batch_has_one(criterion.eval(), empty())
    if kind != "crrcd":
        own = {"negative_sampling": "per_sample", "exclusion": "draw", "self_pairs": True}
        if kind == "crd":
            del own["self_pairs"]
        assert_zero_where_a_full_batch_has_one(make(kind=kind, **own), empty())


@pytest.mark.parametrize("kind", KINDS)
def test_nan_parameters_do_not_reach_the_features_of_an_empty_batch(kind):
    criterion = make(kind=kind)
    with torch.no_grad():
        for p in criterion.parameters():
            p.fill_(torch.nan)
    loss, _, found = gradients(criterion, empty())
    assert loss == 0
    assert all(g is None or not g.any() for g in found.values())


@pytest.mark.parametrize("values", [one_sample, repeated])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_batch_without_a_pair(direction, keys, values):
    criterion = make(direction=direction, keys=keys, normalizer=2.0, **LEARNED)
    assert_zero_where_a_full_batch_has_one(criterion, values())


@pytest.mark.parametrize("values", [one_sample, repeated])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_batch_without_a_pair_of_differences(direction, values):
    criterion = make(kind="crcd", direction=direction, normalizer=2.0, **LEARNED)
    assert_zero_where_a_full_batch_has_one(criterion, values())


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_to_skip(kind, keys):
    criterion = make(
        kind=kind, direction="both", keys=keys, normalizer=2.0, nonfinite="skip", **LEARNED
    )
    student, teacher, index = batch(1)
    student[2, 3] = torch.nan
    assert_zero_where_a_full_batch_has_one(criterion, (student, teacher, index))


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradient_an_empty_batch_is_a_number(kind):
    with torch.no_grad():
        loss = make(kind=kind)(*empty())
    assert loss == 0 and loss.dtype == torch.float32 and not loss.requires_grad
    assert make(kind=kind).double()(*empty()).dtype == torch.float64


def test_diagnostics_are_those_of_the_last_batch_that_was_not_empty():
    criterion = make()
    loss = criterion(*batch(0))
    criterion(*empty())
    assert criterion.diagnostics()["loss"] == float(loss.detach())
    assert len(criterion._last.index) == B
