"""Micro-batches with update="later" and one commit() are one step with all their samples."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.losses import DS, DT, KINDS, B, N, batch, make, same_state

SIZES = (3, 4, 1)
PAIRED = [(d, k) for d in ("student", "teacher", "both") for k in ("stop_gradient", "live", "bank")]
PAIRED.remove(("teacher", "bank"))
LABELS = torch.arange(N) % 4


def made(**options):
    options = {"bank_dtype": torch.float64, **options}
    return make(**options).double()


def samples(step=1):
    student, teacher, index = batch(step, torch.float64)
    index[-1] = index[0]  # the last occurrence wins, whatever micro-batch it is in
    return student, teacher, index


def micro(values, sizes=SIZES):
    return zip(*(x.split(sizes) for x in values), strict=True)


def accumulated(criterion, values, sizes=SIZES):
    """Mean loss of the micro-batches, and the gradient of the student's features."""
    student = values[0].clone().requires_grad_()
    before = {n: b.clone() for n, b in criterion.named_buffers()}
    total = 0.0
    for part in micro((student, *values[1:]), sizes):
        loss = criterion(*part, update="later") * len(part[2]) / len(student)
        loss.backward()
        total += loss.detach()
    assert all(torch.equal(b, before[n]) for n, b in criterion.named_buffers())
    criterion.commit()
    return total, student.grad


def at_once(criterion, values):
    student = values[0].clone().requires_grad_()
    loss = criterion(student, *values[1:], update=True)
    loss.backward()
    return loss.detach(), student.grad


def assert_alike(parts, whole, gradients=True):
    close = {"rtol": 1e-12, "atol": 1e-13}
    for (name, b), c in zip(parts.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(b, c, **close, msg=name)
    for (name, p), q in zip(parts.named_parameters(), whole.named_parameters(), strict=True):
        if gradients:
            assert (p.grad is None) == (q[1].grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-10, atol=1e-12, msg=name)


def check(criterion, rounds=2, gradients=True, sizes=SIZES):
    """Steps in micro-batches against steps at once, the first of which gives Zbar."""
    for _ in range(2):  # of a queue, which begins empty, the second
        criterion(*batch(0, torch.float64), update=True)
    whole = copy.deepcopy(criterion)
    for step in range(1, 1 + rounds):
        for c in (criterion, whole):
            c.zero_grad(set_to_none=True)
        loss, gradient = accumulated(criterion, samples(step), sizes)
        expected, of_features = at_once(whole, samples(step))
        if gradients:
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradient, of_features, rtol=1e-10, atol=1e-13)
        assert_alike(criterion, whole, gradients)
    assert int(criterion.step) == 2 + rounds


@pytest.mark.parametrize("objective", ["nce", "infonce"])
@pytest.mark.parametrize("direction, keys", PAIRED)
def test_crd_is_one_large_batch(direction, keys, objective):
    learned = {"learnable_temperature": True, "learnable_offset": objective == "nce"}
    options = {"direction": direction, "keys": keys, "objective": objective, **learned}
    check(made(kind="crd", standardize=False, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"negatives": "all"},
        {"distinct": True},
        {"negative_sampling": "per_sample"},
        {"negative_sampling": "per_sample", "distinct": True},
        {"negative_sampling": "per_sample", "exclusion": "draw"},
        {
            "negative_sampling": "per_sample",
            "exclusion": "draw",
            "exclude_same_label": True,
            "labels": LABELS,
        },
        {"exclude_same_label": True, "labels": LABELS, "exclude_similar": 0.3},
        {"capacity": 20, "direction": "both"},
        {"capacity": 5, "negatives": 5, "direction": "both"},
        {"nonfinite": "skip"},
        {"momentum": 0.0},
    ],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items() if k != "labels"),
)
def test_crd_samples_and_masks_as_one_large_batch(options):
    check(made(kind="crd", standardize=False, **options))


def test_statistics_in_eval_mode_are_those_of_one_large_batch():
    criterion = made(kind="crd", direction="both")
    criterion.fill(torch.arange(N), torch.randn(N, DT))
    check(criterion.eval())


@pytest.mark.parametrize("direction, keys", PAIRED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_that_of_one_large_batch(kind, direction, keys):
    # Embeddings of the student while training are standardised by the micro-batch.
    standardize = direction == "student"
    criterion = made(kind=kind, direction=direction, keys=keys, standardize=standardize)
    if standardize and keys != "live":
        criterion.fill(torch.arange(N), torch.randn(N, DT))
    check(criterion, gradients=False)


@pytest.mark.parametrize("kind", KINDS)
def test_one_micro_batch_is_a_step(kind):
    criterion = made(kind=kind, direction="both", keys="live", nonfinite="skip")
    twin = copy.deepcopy(criterion)
    for step in range(3):
        values = batch(step, torch.float64)
        assert torch.equal(criterion(*values, update="later"), twin(*values))
        criterion.commit()
        assert same_state(criterion, twin)


@pytest.mark.parametrize("objective", ["nce", "infonce"])
@pytest.mark.parametrize("direction, keys", PAIRED)
@pytest.mark.parametrize("kind", ["crcd", "crrcd"])
def test_relations_with_the_batchs_anchors_are_those_of_one_large_batch(
    kind, direction, keys, objective
):
    options = {"direction": direction, "keys": keys, "objective": objective}
    criterion = made(kind=kind, standardize=False, learnable_temperature=True, **options)
    for _ in range(2):
        criterion(*samples(0), update=True)
    whole = copy.deepcopy(criterion)
    values = student, teacher, index = samples()
    expected, of_features = at_once(whole, values)
    chosen = whole._last.selected
    given = teacher[chosen], index[chosen]
    pairs = (given[1][:, None] != index).sum()
    criterion.zero_grad(set_to_none=True)
    student = student.clone().requires_grad_()
    total = 0.0
    for part in micro((student, teacher, index)):
        loss = criterion(*part, update="later", reduction="sum", anchors=given) / pairs
        loss.backward()
        total += loss.detach()
    criterion.commit()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(student.grad, of_features, rtol=1e-10, atol=1e-13)
    assert_alike(criterion, whole)


def test_zbar_is_the_first_micro_batchs():
    criterion = made(kind="crd")
    first, second = micro(samples(), (3, 5))
    twin = copy.deepcopy(criterion)
    twin(*first)
    criterion(*first, update="later"), criterion(*second, update="later")
    assert not criterion.zbar_weight.any()
    criterion.commit()
    assert torch.equal(criterion.log_zbar, twin.log_zbar)
    assert torch.equal(criterion.zbar_weight, twin.zbar_weight) and twin.zbar_weight.any()


def test_a_moving_average_follows_the_first_micro_batch():
    criterion = made(kind="crd", normalizer="moving_average")
    criterion(*samples(0))
    twin = copy.deepcopy(criterion)
    first, second = micro(samples(), (3, 5))
    twin(*first)
    criterion(*first, update="later"), criterion(*second, update="later")
    criterion.commit()
    assert torch.equal(criterion.log_zbar, twin.log_zbar)


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_to_skip_makes_a_step_to_skip(kind):
    criterion = made(kind=kind, direction="both", nonfinite="skip")
    criterion(*samples(0))
    before = copy.deepcopy(criterion.state_dict())
    student, teacher, index = samples()
    student[4, 1] = torch.nan
    for part in micro((student, teacher, index)):
        criterion(*part, update="later")
    criterion.commit()
    after = criterion.state_dict()
    assert int(after.pop("skipped_steps")) == 1
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_masked_steps_count_steps():
    criterion = made(exclude_similar=-0.999)
    for _ in range(2):
        accumulated(criterion, samples(), (4, 4))
    assert int(criterion.masked_steps) == 2 and int(criterion.step) == 2


# ---------------------------------------------------------------------- what goes wrong


def test_commit_without_micro_batches():
    criterion = make()
    text = r"CRRCDLoss.commit: expected micro-batches with update='later' before, got none"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=text):
            criterion.commit()
        criterion(*batch(0), update="later")
        criterion.commit()


def test_a_step_between_is_refused():
    criterion = make()
    criterion(*batch(0), update="later")
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(RuntimeError, match=rf"expected commit\(\) before the next step, got {B} s"):
        criterion(*batch(1))
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    criterion(*batch(1), update=False)
    criterion.commit()
    criterion(*batch(1))


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="CRRCDLoss: update: expected one of 'later', got 'soon'"):
        make()(*batch(0), update="soon")


def test_a_bad_micro_batch_does_not_wait():
    criterion, twin = make(), make()
    values = batch(0)
    for c in (criterion, twin):
        c(*values, update="later")
    with pytest.raises(ValueError, match="student_features: expected finite values"):
        criterion(values[0] * torch.nan, *values[1:], update="later")
    with pytest.raises(IndexError, match="index: expected values in"):
        criterion(*values[:2], values[2] + N, update="later")
    empty = torch.empty(0, DS), torch.empty(0, DT), torch.empty(0, dtype=torch.int64)
    criterion(*empty, update="later")
    criterion.commit(), twin.commit()
    assert same_state(criterion, twin)


def test_copies_wait_too_and_a_loaded_state_does_not():
    criterion = make()
    saved = copy.deepcopy(criterion.state_dict())
    criterion(*batch(0), update="later")
    assert list(criterion.state_dict()) == list(saved)
    twin = copy.deepcopy(criterion)
    criterion.commit(), twin.commit()
    assert same_state(criterion, twin)
    criterion(*batch(1), update="later")
    criterion.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="got none"):
        criterion.commit()


def test_only_ids_and_embeddings_wait():
    criterion = make(capacity=20)
    criterion(*batch(0), update="later")
    waiting = criterion._waiting
    assert waiting.values[1] is None and waiting.values[0].shape == (B, 8)
    assert waiting.teacher.mean.shape == (DT,) and waiting.student.mean.shape == (DS,)
    assert not any(x.requires_grad for x in waiting.values[:1])


def test_micro_batches_compile():
    torch._dynamo.reset()
    criterion = made(kind="crd", normalizer=2.0, direction="both")
    twin = copy.deepcopy(criterion)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for step in range(4):
        for part in micro(samples(step), (4, 4)):
            close = {"rtol": 1e-9, "atol": 1e-12}
            later = compiled(*part, update="later")
            torch.testing.assert_close(later, twin(*part, update="later"), **close)
        criterion.commit(), twin.commit()
    assert_alike(criterion, twin)
