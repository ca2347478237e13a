"""CRRCDLoss against the formula in float64: loss, gradients, bank rows, normaliser."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.cases import BACKENDS
from helpers.loss_formula import check

from crrcd_ext import CRRCDLoss

DIRECTIONS = ["student", "teacher", "both"]
KEYS = ["stop_gradient", "live", "bank"]
NORMALIZERS = ["first_batch", "none", 1.7]
OBJECTIVES = ["nce", "infonce"]
B, DS, DT, N, K = 6, 5, 7, 20, 9


def make(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    options = {
        "negatives": K,
        "embedding_dim": 6,
        "hidden_dim": 8,
        "relation_dim": 6,
        # Two modules that differ, so that none can stand in for the other unseen.
        "init": "gaussian",
        "anchors": 3,
        "bank_dtype": torch.float64 if dtype == torch.float64 else torch.float32,
        **options,
    }
    return CRRCDLoss(DS, DT, N, **options).to(dtype)


def batch(dtype=torch.float64, seed=1, size=B, duplicate=True):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(size, DS, generator=g, dtype=torch.float64) + 0.5
    teacher = 2 * torch.randn(size, DT, generator=g, dtype=torch.float64) - 1
    index = torch.randperm(N, generator=g)[:size]
    if duplicate and size > 3:
        index[-1] = index[1]
    return student.to(dtype), teacher.to(dtype), index


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("direction", DIRECTIONS)
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
    with torch.no_grad():
        for p in (criterion.offset, criterion.cross_relation.bias, criterion.teacher_relation.bias):
            if p is not None:
                p.add_(torch.randn(p.shape, dtype=p.dtype), alpha=0.1)
    expected = check(criterion, *batch())
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
        {"negatives": "all", "keys": "bank", "direction": "both"},
        {"anchors": None},
        {"self_pairs": True},
        {"standardize": False},
        {"head": "identity"},
        {"head": "identity", "keys": "live"},
        {"head": "identity", "direction": "both", "standardize": False},
        {"momentum": 0.9, "temperature": 0.5},
        {"exclude_same_label": True},
        {"exclude_same_label": True, "keys": "live", "direction": "both"},
    ],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_options_are_the_formula(backend, options):
    labels = None
    if options.get("exclude_same_label"):
        labels = torch.arange(N) % 3
        options = {**options, "labels": labels}
    check(make(backend=backend, **options), *batch(), labels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", KEYS)
def test_after_fill_the_formula_uses_the_filled_statistics_and_rows(backend, keys):
    criterion = make(backend=backend, keys=keys, direction="both")
    features = torch.randn(N, DT, dtype=torch.float64) * 3 + 2
    assert criterion.fill(torch.arange(N), features) == N
    mean, variance = features.mean(0), features.var(0, correction=0)
    torch.testing.assert_close(criterion.teacher_head.standardize.mean, mean)
    torch.testing.assert_close(criterion.teacher_head.standardize.variance, variance)
    z = (features - mean) / torch.sqrt(variance + 1e-5)
    rows = torch.nn.functional.normalize(criterion.teacher_head.linear(z), dim=1)
    torch.testing.assert_close(
        criterion.teacher_bank.rows, (features if keys == "live" else rows).detach()
    )
    check(criterion, *batch())
    torch.testing.assert_close(criterion.teacher_head.standardize.mean, mean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_agrees_with_float64(backend):
    student, teacher, index = batch(torch.float32, duplicate=False)
    losses, grads = [], []
    for dtype in (torch.float64, torch.float32):
        criterion = make(backend=backend, direction="both", keys="bank", bank_dtype=torch.float32)
        criterion = criterion.to(torch.float32).to(dtype)
        s = student.to(dtype).requires_grad_()
        loss = criterion(s, teacher.to(dtype), index)
        loss.backward()
        losses.append(float(loss.detach()))
        grads.append(s.grad.double())
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 2e-5


def test_second_step_keeps_the_normaliser_and_moves_the_sampler():
    criterion = make()
    student, teacher, index = batch()
    first = criterion.teacher_bank.draw(K)
    anchors = criterion._select_anchors(B)
    criterion(student, teacher, index)
    z = criterion.log_zbar.clone()
    assert not torch.equal(first, criterion.teacher_bank.draw(K))
    assert not torch.equal(anchors, criterion._select_anchors(B))
    twin = copy.deepcopy(criterion)
    criterion(student, teacher, index)
    assert torch.equal(z, criterion.log_zbar)
    assert int(criterion.step) == int(criterion.teacher_bank.step) == 2
    # Another Zbar would be another loss.
    twin.log_zbar.add_(1)
    assert twin(student, teacher, index).item() != criterion._last.loss.item()


def test_anchors_are_distinct_and_change():
    criterion = make(anchors=4)
    seen = set()
    for _ in range(60):
        selected = criterion._select_anchors(10)
        assert len(set(selected.tolist())) == 4
        assert set(selected.tolist()) <= set(range(10))
        seen.update(selected.tolist())
        criterion.step.add_(1)
    assert seen == set(range(10))
    assert criterion._select_anchors(4) is None


def test_evaluation_changes_nothing_and_repeats():
    criterion = make(direction="both", keys="bank", nonfinite="skip")
    criterion(*batch())
    criterion.eval()
    before = copy.deepcopy(criterion.state_dict())
    losses = {criterion(*batch(seed=3)).item() for _ in range(2)}
    assert len(losses) == 1
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


def test_evaluation_before_training_stores_no_normaliser():
    criterion = make().eval()
    loss = criterion(*batch())
    assert torch.isfinite(loss)
    assert not criterion.zbar_weight.any()


def test_update_argument_overrides_the_mode():
    criterion = make()
    before = copy.deepcopy(criterion.state_dict())
    criterion(*batch(), update=False)
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    criterion.eval()
    criterion(*batch(), update=True)
    assert int(criterion.step) == 1
    assert not torch.equal(criterion.teacher_bank.rows, before["teacher_bank.rows"])


def test_stop_gradient_leaves_the_teacher_side_without_gradient():
    criterion = make(direction="both")
    criterion.requires_grad_(True)
    student, teacher, index = batch()
    teacher.requires_grad_()
    criterion(student, teacher, index).backward()
    for module in (criterion.teacher_head, criterion.teacher_relation):
        assert all(p.grad is None for p in module.parameters())
    assert teacher.grad is None
    assert all(float(p.grad.norm()) > 0 for p in criterion.cross_relation.parameters())


@pytest.mark.parametrize("keys", ["live", "bank"])
def test_trainable_keys_reach_the_teacher_side(keys):
    criterion = make(keys=keys)
    student, teacher, index = batch()
    criterion(student, teacher.requires_grad_(), index).backward()
    for module in (criterion.teacher_head, criterion.teacher_relation, criterion.student_head):
        # A bias in front of a batch standardisation of differences may cancel; the weights do not.
        assert all(float(p.grad.norm()) > 0 for n, p in module.named_parameters() if "weight" in n)
    assert teacher.grad is None


def test_live_rows_are_raw_features():
    criterion = make(keys="live")
    assert criterion.teacher_bank.dim == DT
    before = criterion.teacher_bank.rows.clone()
    student, teacher, index = batch(duplicate=False)
    criterion(student, teacher, index)
    expected = 0.5 * before[index] + 0.5 * teacher
    torch.testing.assert_close(criterion.teacher_bank.rows[index], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_batch_of_one_is_zero_with_zero_gradients(backend, direction):
    criterion = make(backend=backend, direction=direction)
    student, teacher, index = batch(size=1)
    student.requires_grad_()
    loss = criterion(student, teacher, index)
    loss.backward()
    assert loss.item() == 0
    assert float(student.grad.abs().max()) == 0
    assert int(criterion.step) == 1
    assert not criterion.zbar_weight.any()
    # The next batch gives Zbar.
    assert torch.isfinite(criterion(*batch()))
    assert criterion.zbar_weight.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_one_with_self_pairs(backend):
    criterion = make(backend=backend, self_pairs=True)
    student, teacher, index = batch(size=1)
    student.requires_grad_()
    loss = criterion(student, teacher, index)
    loss.backward()
    assert loss.item() > 0 and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_one_sample_repeated_has_no_pair(backend):
    criterion = make(backend=backend)
    student, teacher, _ = batch()
    loss = criterion(student.requires_grad_(), teacher, torch.full((B,), 3))
    loss.backward()
    assert loss.item() == 0
    assert not criterion.zbar_weight.any()
    assert torch.isfinite(criterion(*batch()))


def test_empty_batch_is_zero_and_changes_nothing():
    criterion = make()
    before = copy.deepcopy(criterion.state_dict())
    student = torch.empty(0, DS, dtype=torch.float64, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int64)
    loss = criterion(student, torch.empty(0, DT, dtype=torch.float64), empty)
    loss.backward()
    assert loss.item() == 0 and student.grad.shape == (0, DS)
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


def test_one_label_leaves_no_negative():
    labels = torch.zeros(N, dtype=torch.int64)
    criterion = make(
        exclude_same_label=True, labels=labels, normalizer="none", objective="infonce", anchors=None
    )
    assert criterion(*batch()).item() == pytest.approx(0, abs=1e-12)


def test_unknown_labels_are_excluded_from_nothing():
    labels = torch.full((N,), -1)
    options = {"normalizer": "none", "anchors": None}
    masked = make(exclude_same_label=True, labels=labels, **options)
    plain = make(**options)
    assert masked(*batch()).item() == pytest.approx(plain(*batch()).item(), rel=1e-12)


def test_query_labels_of_the_call_win():
    labels = torch.arange(N) % 3
    criterion = make(exclude_same_label=True, labels=labels, normalizer="none")
    other = copy.deepcopy(criterion)
    student, teacher, index = batch()
    same = criterion(student, teacher, index, labels=labels[index])
    assert torch.equal(same, copy.deepcopy(other)(student, teacher, index))
    changed = other(student, teacher, index, labels=(labels[index] + 1) % 3)
    assert changed.item() != same.item()


def test_labels_may_come_with_fill():
    labels = torch.arange(N) % 3
    features = torch.randn(N, DT, dtype=torch.float64)
    criterion = make(exclude_same_label=True)
    criterion.fill(torch.arange(N), features, labels)
    assert torch.equal(criterion.labels, labels)
    check(criterion, *batch(), labels)


@pytest.mark.parametrize("value", [0.05, 0.3])
def test_temperature_is_the_inverse_scale(value):
    fixed = make(temperature=value)
    learned = make(temperature=value, learnable_temperature=True)
    assert learned(*batch()).item() == pytest.approx(fixed(*batch()).item(), rel=1e-6)
    assert learned.log_scale.item() == pytest.approx(-math.log(value), rel=1e-6)


def test_student_standardiser_uses_the_batch_in_training_and_running_statistics_in_eval():
    criterion = make()
    student, teacher, index = batch(duplicate=False)
    criterion(student, teacher, index)
    running = criterion.student_head.standardize
    torch.testing.assert_close(running.mean, student.mean(0))
    torch.testing.assert_close(running.variance, student.var(0, correction=0))
    second = student * 3 + 1
    criterion(second, teacher, index)
    # Two batches of the same size: half and half, the spread of the means included.
    both = torch.cat([student, second])
    torch.testing.assert_close(running.mean, both.mean(0))
    torch.testing.assert_close(running.variance, both.var(0, correction=0))
    for _ in range(60):
        criterion(second, teacher, index)
    torch.testing.assert_close(running.mean, second.mean(0), rtol=0.02, atol=0.02)
    criterion.eval()
    z = (student - running.mean) / torch.sqrt(running.variance + 1e-5)
    e = torch.nn.functional.normalize(criterion.student_head.linear(z), dim=1)
    torch.testing.assert_close(criterion.student_head(student), e)


def test_teacher_standardiser_without_fill_averages_all_batches():
    criterion = make()
    seen = []
    for seed in range(4):
        student, teacher, index = batch(seed=seed)
        criterion(student, teacher * (seed + 1), index)
        seen.append(teacher * (seed + 1))
    seen = torch.cat(seen)
    running = criterion.teacher_head.standardize
    torch.testing.assert_close(running.mean, seen.mean(0))
    torch.testing.assert_close(running.variance, seen.var(0, correction=0))


def test_large_first_batch_normaliser_is_taken_in_pieces(monkeypatch):
    from crrcd_ext.modules import normalizer

    whole, pieces = make(), make()
    whole(*batch())
    monkeypatch.setattr(normalizer, "_CHUNK_ELEMENTS", 1)
    pieces(*batch())
    torch.testing.assert_close(pieces.log_zbar, whole.log_zbar)
    monkeypatch.setattr(normalizer, "MAX_NEGATIVES", 4)
    few = make()
    few(*batch())
    assert abs(float(few.log_zbar[0] - whole.log_zbar[0])) < 2


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    size, width = 60, 8
    criterion = CRRCDLoss(
        width, width, size, negatives=32, embedding_dim=16, hidden_dim=64, relation_dim=16
    )
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
