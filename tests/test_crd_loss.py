"""CRDLoss against the formula in float64, and what is its own."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.cases import BACKENDS
from helpers.loss_formula import InstanceStep, check

from crrcd_ext import CRDLoss

B, DS, DT, N, K = 6, 5, 7, 20, 9
LABELS = torch.arange(N) % 3
PAIRED = [(d, k) for d in ("student", "teacher", "both") for k in ("stop_gradient", "live", "bank")]
PAIRED.remove(("teacher", "bank"))


def make(dtype=torch.float64, seed=0, width=DT, **options):
    torch.manual_seed(seed)
    options = {"negatives": K, "embedding_dim": 6, "bank_dtype": dtype, **options}
    return CRDLoss(DS, width, N, **options).to(dtype)


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
    expected = check(criterion, *batch(), formula=InstanceStep)
    if normalizer == "first_batch" and objective == "nce":
        for slot, side in enumerate(("student", "teacher")):
            if side in expected.log_zbar:
                torch.testing.assert_close(criterion.log_zbar[slot], expected.log_zbar[side])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"negatives": "all"},
        {"negatives": "all", "keys": "live"},
        {"standardize": False, "keys": "bank"},
        {"momentum": 0.9, "temperature": 0.5},
        {"exclude_same_label": True},
        {"exclude_same_label": True, "keys": "live"},
        {"distinct": True},
        {"negative_sampling": "per_sample"},
        {"negative_sampling": "per_sample", "keys": "bank", "distinct": True},
        {"negative_sampling": "per_sample", "exclude_same_label": True},
        {"negative_sampling": "per_sample", "exclusion": "draw"},
        {"negative_sampling": "per_sample", "exclusion": "draw", "exclude_same_label": True},
    ],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_options_are_the_formula(backend, options):
    labels = None
    if options.get("exclude_same_label"):
        labels = LABELS
        options = {**options, "labels": labels}
    check(make(backend=backend, **options), *batch(), labels, formula=InstanceStep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_identity_heads_of_one_width(backend):
    criterion = make(width=DS, head="identity", backend=backend)
    assert not list(criterion.parameters())
    check(criterion, *batch(width=DS), formula=InstanceStep)
    criterion = make(torch.float32, width=DS, head="identity", backend=backend)
    assert criterion(*batch(torch.bfloat16, width=DS)).dtype == torch.float32
    assert criterion(*batch(torch.float64, width=DS)).dtype == torch.float64


@pytest.mark.parametrize("exclude_same_label", [False, True])
def test_drawing_around_the_excluded_leaves_exactly_k(exclude_same_label):
    criterion = make(
        negative_sampling="per_sample",
        exclusion="draw",
        distinct=True,
        exclude_same_label=exclude_same_label,
        labels=LABELS,
    )
    criterion(*batch())
    index = criterion._last.index
    for drawn in criterion._last.drawn:
        assert drawn.shape == (B, K)
        assert (drawn != index[:, None]).all()
        assert all(len(set(row)) == K for row in drawn.tolist())
        if exclude_same_label:
            assert (LABELS[drawn] != LABELS[index][:, None]).all()
    teacher, student = criterion._last.drawn
    assert not torch.equal(teacher, student)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_one_has_a_pair(backend):
    criterion = make(backend=backend)
    student, teacher, index = batch(size=1)
    loss = criterion(student.requires_grad_(), teacher, index)
    loss.backward()
    assert loss.item() > 0 and float(student.grad.norm()) > 0
    assert criterion.zbar_weight.all()


def test_what_the_teachers_head_learns():
    learning = {
        ("stop_gradient", "both"): False,
        ("live", "student"): True,
        ("live", "teacher"): True,
        ("bank", "student"): False,
        ("bank", "both"): True,
    }
    for (keys, direction), learns in learning.items():
        criterion = make(keys=keys, direction=direction)
        criterion(*batch()).backward()
        weight = criterion.teacher_head.linear.weight
        assert weight.requires_grad == learns and (weight.grad is not None) == learns
        assert float(criterion.student_head.linear.weight.grad.norm()) > 0
        count = sum(len(group["params"]) for group in criterion.parameter_groups(0.1))
        assert count == (4 if learns else 2)


def test_defaults():
    criterion = CRDLoss(64, 256, 20000)
    assert criterion.negatives == 16384 and criterion.temperature == 0.07
    assert criterion.direction == "both" and criterion.keys == "stop_gradient"
    assert criterion.normalizer == "first_batch" and criterion.objective == "nce"
    assert criterion.negative_sampling == "shared" and criterion.exclusion == "mask"
    assert criterion.teacher_bank.dim == criterion.student_bank.dim == 128
    assert criterion.teacher_bank.momentum == 0.5
    names = {name for name in criterion.state_dict() if "head" not in name}
    assert names == {
        *("log_zbar", "zbar_weight", "seed", "step", "skipped_steps"),
        *(
            f"{bank}.{b}"
            for bank in ("teacher_bank", "student_bank")
            for b in ("rows", "seed", "step")
        ),
    }


def test_diagnostics_look_at_the_embeddings():
    criterion = make(direction="student")
    loss = criterion(*batch())
    last, drawn = criterion._last, criterion._last.drawn[0]
    rows = criterion.teacher_bank.rows
    values = criterion.diagnostics()
    assert values["loss"] == float(loss.detach())
    e_s, e_t = last.student, last.teacher
    assert values["relation_variance"] == pytest.approx(float(e_s.var(0, correction=0).mean()))
    expected = float(e_t.var(0, correction=0).mean())
    assert values["teacher_relation_variance"] == pytest.approx(expected)
    s = torch.linalg.svdvals(e_s - e_s.mean(0))
    p = s / s.sum()
    assert values["effective_rank"] == pytest.approx(float(torch.special.entr(p).sum().exp()))
    assert values["positive_cosine"] == pytest.approx(float((e_s * e_t).sum(1).mean()))
    keep = last.index[:, None] != drawn
    assert values["negative_cosine"] == pytest.approx(float((e_s @ rows[drawn].T)[keep].mean()))


def test_collapsed_embeddings_warn():
    criterion = make(
        torch.float32,
        direction="student",
        standardize=False,
        temperature=50.0,
        negative_sampling="per_sample",
        exclusion="draw",
    )
    with torch.no_grad():
        criterion.student_head.linear.weight.zero_()
        criterion.student_head.linear.bias.fill_(1.0)
    criterion(*batch(torch.float32))
    with pytest.warns(
        UserWarning, match="CRDLoss: .*student's embeddings hardly differ.*collapsed"
    ):
        criterion.diagnostics()


def test_large_first_batch_normaliser_is_taken_in_pieces(monkeypatch):
    from crrcd_ext.modules import normalizer, step

    for sampling in ("shared", "per_sample"):
        whole = make(negative_sampling=sampling)
        pieces = copy.deepcopy(whole)
        whole(*batch())
        with monkeypatch.context() as patch:
            patch.setattr(normalizer, "_CHUNK_ELEMENTS", 1)
            pieces(*batch())
        torch.testing.assert_close(pieces.log_zbar, whole.log_zbar)
        few = make(negative_sampling=sampling)
        with monkeypatch.context() as patch:
            patch.setattr(step, "MAX_NEGATIVES", 4)
            few(*batch())
        assert not torch.equal(few.log_zbar, whole.log_zbar)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    size, width = 60, 8
    criterion = CRDLoss(width, width, size, negatives=32, embedding_dim=16)
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
        (
            {"negative_sampling": "own"},
            "negative_sampling: expected one of 'shared', 'per_sample', got 'own'",
        ),
        ({"exclusion": "none"}, "exclusion: expected one of 'mask', 'draw', got 'none'"),
        (
            {"exclusion": "draw"},
            "exclusion: expected 'mask' for negative_sampling='shared', got 'draw'",
        ),
        (
            {"negative_sampling": "per_sample", "negatives": "all"},
            "negative_sampling: expected 'shared' for negatives='all', got 'per_sample'",
        ),
        (
            {"negative_sampling": "per_sample", "keys": "live"},
            "negative_sampling: expected 'shared' for keys='live'.*got 'per_sample'",
        ),
        ({"negatives": N + 1}, "negatives: expected at most num_samples = 20, or 'all'.*got 21"),
        (
            {
                "negative_sampling": "per_sample",
                "exclusion": "draw",
                "distinct": True,
                "negatives": N,
            },
            "negatives: expected at most 19, the samples beside a query's own, got 20",
        ),
        (
            {
                "negative_sampling": "per_sample",
                "exclusion": "draw",
                "exclude_same_label": True,
                "labels": torch.full((N,), 3),
            },
            "labels: expected at least two classes for exclusion='draw', got one class",
        ),
        (
            {
                "negative_sampling": "per_sample",
                "exclusion": "draw",
                "distinct": True,
                "negatives": 14,
                "exclude_same_label": True,
                "labels": LABELS,
            },
            "negatives: expected at most 13, the samples outside of the largest class, got 14",
        ),
    ],
    ids=lambda o: None if isinstance(o, str) else " ".join(o),
)
def test_bad_constructor_arguments(options, text):
    with pytest.raises(ValueError, match="crrcd_ext.CRDLoss: " + text):
        make(**options)


def drawing(**options):
    options = {"negatives": 13, "exclude_same_label": True, "distinct": True, **options}
    return make(negative_sampling="per_sample", exclusion="draw", **options)


def test_one_sample_has_no_other():
    with pytest.raises(ValueError, match="negatives: expected at most 0, the samples beside"):
        CRDLoss(DS, DT, 1, negatives=1, negative_sampling="per_sample", exclusion="draw")


@pytest.mark.parametrize("labels", [torch.zeros(N), LABELS.clamp(max=1)], ids=["one", "largest"])
def test_labels_that_leave_too_little_are_refused_by_fill_and_load(labels):
    labels = labels.long()
    criterion, features = drawing(), torch.randn(N, DT, dtype=torch.float64)
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(ValueError, match=r"CRDLoss\.fill: (labels|negatives): expected at"):
        criterion.fill(torch.arange(N), features, labels)
    other = make(exclude_same_label=True, labels=labels)
    with pytest.raises(ValueError, match=r"CRDLoss: (labels|negatives): expected at"):
        criterion.load_state_dict(other.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    criterion.fill(torch.arange(N), features, LABELS)
    check(criterion, *batch(), LABELS, formula=InstanceStep)


def test_labels_of_the_call_that_leave_too_little_change_nothing():
    # Class 0 has 7 of the 20 rows; a query said to be of it, whose own row is not, leaves 12.
    criterion = drawing(labels=LABELS)
    student, teacher, index = batch()
    before = copy.deepcopy(criterion.state_dict())
    wrong = torch.zeros(B, dtype=torch.int64)
    text = "classes: expected at least 13 rows outside of a query's class, got 12"
    with pytest.raises(ValueError, match=text):
        criterion(student, teacher, index, labels=wrong)
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


def test_labels_come_back_with_the_state():
    criterion = drawing(labels=LABELS)
    criterion(*batch())
    other = drawing()
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other(*batch(seed=2)), criterion(*batch(seed=2)))
    assert set(criterion.state_dict()) == set(drawing().state_dict())
