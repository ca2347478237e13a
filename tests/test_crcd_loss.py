"""CRCDLoss against the formula in float64, and what is its own."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.cases import BACKENDS
from helpers.loss_formula import DifferenceStep, check

from crrcd_ext import CRCDLoss

B, DS, DT, N, K = 6, 5, 7, 20, 9
LABELS = torch.arange(N) % 3
PAIRED = [(d, k) for d in ("student", "teacher", "both") for k in ("stop_gradient", "live", "bank")]
PAIRED.remove(("teacher", "bank"))


def make(dtype=torch.float64, seed=0, width=DT, **options):
    torch.manual_seed(seed)
    options = {"negatives": K, "embedding_dim": 6, "anchors": 3, "bank_dtype": dtype, **options}
    return CRCDLoss(DS, width, N, **options).to(dtype)


def batch(dtype=torch.float64, seed=1, size=B, width=DT):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(size, DS, generator=g, dtype=torch.float64) + 0.5
    teacher = 2 * torch.randn(size, width, generator=g, dtype=torch.float64) - 1
    index = torch.randperm(N, generator=g)[:size]
    if size > 3:
        index[-1] = index[1]
    return student.to(dtype), teacher.to(dtype), index


@pytest.mark.parametrize("objective", ["nce", "infonce"])
@pytest.mark.parametrize("normalizer", ["first_batch", "none", 1.7])
@pytest.mark.parametrize("direction, keys", PAIRED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_step_is_the_formula(backend, direction, keys, normalizer, objective):
    criterion = make(
        backend=backend,
        direction=direction,
        keys=keys,
        normalizer=normalizer,
        objective=objective,
        learnable_temperature=True,
        learnable_offset=objective == "nce",
    )
    expected = check(criterion, *batch(), formula=DifferenceStep)
    if normalizer == "first_batch" and objective == "nce":
        for slot, side in enumerate(("student", "teacher")):
            if side in expected.log_zbar:
                torch.testing.assert_close(criterion.log_zbar[slot], expected.log_zbar[side])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"negatives": "all"},
        {"negatives": "all", "keys": "live", "direction": "both"},
        {"anchors": None},
        {"self_pairs": True, "direction": "both", "anchors": None},
        {"self_pairs": True, "keys": "bank", "direction": "both", "anchors": None},
        {"standardize": False, "keys": "bank"},
        {"exclude_same_label": True, "direction": "both"},
        {"distinct": True},
        {"negative_sampling": "per_sample", "direction": "both"},
        {"negative_sampling": "per_sample", "keys": "bank", "distinct": True},
        {"negative_sampling": "per_sample", "exclusion": "draw", "exclude_same_label": True},
    ],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_options_are_the_formula(backend, options):
    labels = None
    if options.get("exclude_same_label"):
        labels = LABELS
        options = {**options, "labels": labels}
    check(make(backend=backend, **options), *batch(), labels, formula=DifferenceStep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_anchors_own_row_is_no_negative(backend):
    # The bank is the teacher's embeddings themselves: the anchors' rows have no direction.
    criterion = make(backend=backend, negatives="all", anchors=None)
    student, teacher, index = batch()
    criterion.fill(torch.arange(N), torch.randn(N, DT, dtype=torch.float64))
    with torch.no_grad():
        criterion.teacher_bank.rows[index] = criterion.teacher_head(teacher)
    check(criterion, student, teacher, index, formula=DifferenceStep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_identity_heads_of_one_width(backend):
    criterion = make(width=DS, head="identity", backend=backend)
    assert not list(criterion.parameters())
    check(criterion, *batch(width=DS), formula=DifferenceStep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_one_has_no_pair(backend):
    criterion = make(backend=backend)
    student, teacher, index = batch(size=1)
    loss = criterion(student.requires_grad_(), teacher, index)
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()
    assert not criterion.zbar_weight.any()
    assert torch.isfinite(criterion(*batch())) and criterion.zbar_weight.any()


def test_the_teachers_head_learns_through_anchors():
    for keys, learns in (("stop_gradient", False), ("live", True), ("bank", True)):
        criterion = make(keys=keys)
        criterion(*batch()).backward()
        weight = criterion.teacher_head.linear.weight
        assert weight.requires_grad == learns and (weight.grad is not None) == learns
        count = sum(len(group["params"]) for group in criterion.parameter_groups(0.1))
        assert count == (4 if learns else 2)


def test_defaults_are_those_of_the_study():
    criterion = CRCDLoss(64, 256, 20000)
    assert criterion.negatives == 16384 and criterion.anchors == 8
    assert criterion.temperature == 0.1 and criterion.teacher_bank.momentum == 0.5
    assert criterion.direction == "student" and criterion.keys == "stop_gradient"
    assert criterion.normalizer == "first_batch" and criterion.objective == "nce"
    assert criterion.negative_sampling == "shared" and not criterion.self_pairs
    assert criterion.student_bank is None and criterion.teacher_bank.dim == 128
    assert "anchors=8" in repr(criterion) and "self_pairs=False" in repr(criterion)


def test_diagnostics_look_at_the_directions():
    criterion = make()
    criterion(*batch())
    last, drawn = criterion._last, criterion._last.drawn[0]
    anchors, own = last.teacher[last.selected], last.index[last.selected]

    def seen(x):
        return torch.nn.functional.normalize(x[None] - anchors[:, None], dim=-1)

    u, v, w = seen(last.student), seen(last.teacher), seen(criterion.teacher_bank.rows[drawn])
    values = criterion.diagnostics()
    expected = float(u.var(1, correction=0).mean())
    assert values["relation_variance"] == pytest.approx(expected)
    expected = float(v.var(1, correction=0).mean())
    assert values["teacher_relation_variance"] == pytest.approx(expected)
    pairs = own[:, None] != last.index
    expected = float((u * v).sum(-1)[pairs].mean())
    assert values["positive_cosine"] == pytest.approx(expected)
    keep = pairs[:, :, None] & (last.index[:, None] != drawn) & (own[:, None, None] != drawn)
    expected = float(torch.einsum("abd,akd->abk", u, w)[keep].mean())
    assert values["negative_cosine"] == pytest.approx(expected)


def test_large_first_batch_normaliser_is_taken_in_pieces(monkeypatch):
    from crrcd_ext.modules import normalizer

    for sampling in ("shared", "per_sample"):
        whole = make(negative_sampling=sampling)
        pieces = copy.deepcopy(whole)
        whole(*batch())
        with monkeypatch.context() as patch:
            patch.setattr(normalizer, "_CHUNK_ELEMENTS", 1)
            pieces(*batch())
        torch.testing.assert_close(pieces.log_zbar, whole.log_zbar)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    size, width = 60, 8
    criterion = CRCDLoss(width, width, size, negatives=32, embedding_dim=16)
    teacher = torch.randn(size, width)
    student = teacher @ torch.randn(width, width)
    criterion.fill(torch.arange(size), teacher)
    optimizer = torch.optim.Adam(criterion.parameter_groups(0.1))
    losses = []
    for _ in range(150):
        index = torch.randperm(size)[:20]
        loss = criterion(student[index], teacher[index], index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    values = criterion.diagnostics()
    assert sum(losses[-10:]) / 10 < 0.7 * values["no_information_loss"] < sum(losses[:10]) / 10
    assert values["positive_cosine"] > values["negative_cosine"] + 0.3


@pytest.mark.parametrize(
    "options, text",
    [
        (
            {"keys": "bank", "direction": "teacher"},
            "direction: expected 'student' or 'both' for keys='bank'.*got 'teacher'",
        ),
        (
            {"head": "identity"},
            r"head: expected 'linear' for features of different width \(5 and 7\), got 'identity'",
        ),
        ({"anchors": 0}, "anchors: expected a positive integer, got 0"),
        (
            {"exclusion": "draw"},
            "exclusion: expected 'mask' for negative_sampling='shared', got 'draw'",
        ),
    ],
    ids=lambda o: None if isinstance(o, str) else " ".join(o),
)
def test_bad_constructor_arguments(options, text):
    with pytest.raises(ValueError, match="crrcd_ext.CRCDLoss: " + text):
        make(**options)
