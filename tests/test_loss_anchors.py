"""anchors=: the samples to relate a batch to, in place of some of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.losses import DT, B, N, batch, make, same_state

RELATIONS = ["crcd", "crrcd"]


@pytest.mark.parametrize("kind", RELATIONS)
def test_those_that_the_step_would_choose(kind):
    criterion = make(kind=kind, direction="both", bank_dtype=torch.float64).double()
    twin = copy.deepcopy(criterion)
    for step in range(3):
        values = *batch(step, torch.float64)[:2], torch.arange(step, step + B)
        chosen = criterion._select_anchors(B)
        given = values[1][chosen], values[2][chosen]
        torch.testing.assert_close(criterion(*values, anchors=given), twin(*values))
        seen, expected = criterion.diagnostics(), twin.diagnostics()
        assert list(seen) == list(expected)
        for name, value in expected.items():
            assert seen[name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("kind", RELATIONS)
def test_a_batch_of_one_has_pairs_with_them(kind):
    criterion = make(kind=kind, standardize=False)
    student, teacher, index = batch(0)
    one = student[:1], teacher[:1], index[:1]
    assert criterion(*one) == 0 and not criterion.zbar_weight.any()
    ids = (index[0] + torch.arange(1, 4)) % N
    loss = criterion(*one, anchors=(teacher[1:4], ids))
    assert loss > 0 and criterion.zbar_weight[0] == 1


def test_every_number_of_them():
    criterion = make(direction="both")
    student, teacher, index = batch(0)
    for count in (1, 4, 20):
        anchors = torch.randn(count, DT), torch.arange(count)
        each = criterion(student, teacher, index, anchors=anchors, update=False)
        assert each.isfinite()


@pytest.mark.parametrize(
    "anchors, error, text",
    [
        (
            torch.ones(2, DT),
            TypeError,
            r"anchors: expected \(teacher's features, ids\), two tensors, got",
        ),
        ((torch.ones(2, DT + 1), torch.arange(2)), ValueError, r"anchors\[0\]: expected"),
        (
            (torch.ones(0, DT), torch.arange(0)),
            ValueError,
            r"anchors\[0\]: expected one row or more",
        ),
        (
            (torch.full((2, DT), torch.nan), torch.arange(2)),
            ValueError,
            r"anchors\[0\]: expected finite",
        ),
        ((torch.ones(2, DT), torch.arange(3)), ValueError, r"anchors\[1\]: expected"),
        ((torch.ones(2, DT), torch.ones(2)), TypeError, r"anchors\[1\]: expected"),
        ((torch.ones(2, DT), torch.tensor([0, N])), IndexError, r"anchors\[1\]: expected"),
    ],
)
def test_what_is_refused(anchors, error, text):
    criterion = make()
    before = copy.deepcopy(criterion)
    with pytest.raises(error, match=f"^crrcd_ext.CRRCDLoss: {text}"):
        criterion(*batch(0), anchors=anchors)
    assert same_state(criterion, before)


def test_crd_has_none():
    criterion = make(kind="crd")
    with pytest.raises(
        ValueError, match="CRDLoss: anchors: expected None, since it relates no samples"
    ):
        criterion(*batch(0), anchors=(torch.ones(2, DT), torch.arange(2)))


def test_a_step_is_skipped_for_them():
    criterion = make(nonfinite="skip")
    criterion(*batch(0))
    before = copy.deepcopy(criterion.state_dict())
    loss = criterion(*batch(1), anchors=(torch.full((2, DT), torch.inf), torch.arange(2)))
    assert loss == 0
    after = criterion.state_dict()
    assert int(after.pop("skipped_steps")) == 1
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_they_compile():
    torch._dynamo.reset()
    criterion = make(normalizer=2.0)
    compiled = torch.compile(copy.deepcopy(criterion), fullgraph=True, backend="aot_eager")
    for step in range(3):
        values = batch(step)
        anchors = torch.randn(5, DT), torch.arange(5)
        expected = criterion(*values, anchors=anchors)
        torch.testing.assert_close(compiled(*values, anchors=anchors), expected)
