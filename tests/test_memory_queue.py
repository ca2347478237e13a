"""MemoryQueue, and the losses with a capacity: order, masks, the empty queue, resume."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.cases import BACKENDS, unit_rows
from helpers.loss_formula import DifferenceStep, InstanceStep, Step, check
from helpers.losses import DS, DT, KINDS, B, K, N, batch, make, same_state
from helpers.sampling import chi_square_is_plausible

from crrcd_ext import CRDLoss, MemoryQueue

FORMULA = {"crrcd": Step, "crcd": DifferenceStep, "crd": InstanceStep}
C = 21


def pushed(queue, sizes, seed=0):
    """Push batches of these sizes, ids counted up, and return all (ids, unit values)."""
    g, first, every = torch.Generator().manual_seed(seed), 0, []
    for size in sizes:
        value = torch.randn(size, queue.dim, generator=g, dtype=torch.float64)
        index = torch.arange(first, first + size)
        queue.update_(index, value)
        every.append((index, unit_rows(value)))
        first += size
    return torch.cat([i for i, _ in every]), torch.cat([v for _, v in every])


@pytest.mark.parametrize("sizes", [[3], [5], [3, 3], [2, 0, 4, 1], [7], [3, 12], [5, 5], [6, 1, 9]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_in_first_out(backend, sizes):
    queue = MemoryQueue(5, 4, dtype=torch.float64, backend=backend)
    start = queue.rows.clone()
    ids, values = pushed(queue, sizes)
    held = {int(i): v for i, v in list(zip(ids, values, strict=True))[-5:]}
    assert int(queue.pushed) == sum(sizes)
    for place in range(5):
        if place >= len(ids):
            assert int(queue.ids[place]) == -1 and torch.equal(queue.rows[place], start[place])
        else:
            newest = max(i for i in range(len(ids)) if i % 5 == place)
            assert int(queue.ids[place]) == newest and newest in held
            torch.testing.assert_close(queue.rows[place], held[newest])


def test_a_row_is_written_as_it_is():
    queue = MemoryQueue(4, 3, normalize=False)
    values = torch.randn(2, 3) * 10
    queue.fill(torch.tensor([9, 9]), values)
    assert torch.equal(queue.rows[:2], values) and queue.ids.tolist() == [9, 9, -1, -1]
    assert "capacity=4, dim=3, dtype=float32, normalize=False" in repr(queue)


def test_draws_are_uniform_over_what_was_written():
    queue = MemoryQueue(50, 2)
    pushed(queue, [20])
    counts = torch.cat([queue.sample(1000, queries=3).flatten() for _ in range(10)])
    counts = counts.bincount(minlength=50).double()
    assert not counts[20:].any() and chi_square_is_plausible(counts[:20])
    assert queue.draw(None).tolist() == [i % 20 for i in range(50)]
    pushed(queue, [70])
    counts = queue.sample(50_000).bincount(minlength=50).double()
    assert chi_square_is_plausible(counts)
    assert torch.equal(queue.draw(None), torch.arange(50))


@pytest.mark.parametrize(
    "index, value, error, text",
    [
        ([0, -1], torch.ones(2, 2), IndexError, "index: expected values of 0 or more, got -1"),
        ([0, 1], torch.ones(2, 3), ValueError, r"value: expected shape \[\*, 2\], got \[2, 3\]"),
        ([0], torch.ones(2, 2), ValueError, r"index: expected shape \[2\], got \[1\]"),
        ([0.0, 1.0], torch.ones(2, 2), TypeError, "index: expected an integer dtype"),
    ],
)
def test_bad_rows_change_nothing(index, value, error, text):
    queue = MemoryQueue(4, 2)
    before = copy.deepcopy(queue.state_dict())
    with pytest.raises(error, match="crrcd_ext.MemoryQueue.update_: " + text):
        queue.update_(torch.tensor(index), value)
    assert all(torch.equal(v, before[k]) for k, v in queue.state_dict().items())


def test_capacity_is_checked():
    with pytest.raises(ValueError, match="MemoryQueue: capacity: expected a positive integer"):
        MemoryQueue(0, 2)


# ---------------------------------------------------------------------- the losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keys": "live"},
        {"negatives": "all"},
        {"exclude_same_label": True},
        {"exclude_same_label": True, "keys": "live", "negatives": "all"},
    ],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()) or "default",
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_step_of_a_filling_queue_is_the_formula(backend, kind, options):
    labels = torch.arange(N) % 3 if "exclude_same_label" in options else None
    criterion = make(
        kind=kind,
        backend=backend,
        direction="both",
        normalizer=2.0,
        capacity=C,
        bank_dtype=torch.float64,
        labels=labels,
        **options,
    ).double()
    criterion.fill(torch.arange(N), torch.randn(N, DT))  # the statistics
    for bank in criterion._banks:
        bank.clear()
    for step in range(4):  # empty, partly filled, filled
        check(criterion, *batch(step, torch.float64), labels, formula=FORMULA[kind])
    ids = torch.cat([batch(step)[2] for step in range(4)])
    for bank in criterion._banks:
        assert int(bank.pushed) == 4 * B
        assert bank.ids.tolist() == [int(ids[p + C if p + C < 4 * B else p]) for p in range(C)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_queue_known_to_be_full_is_read_as_it_lies(monkeypatch, kind):
    criterion = make(kind=kind, capacity=C, negatives="all", direction="both", normalizer=2.0)
    for step in range(2):
        criterion(*batch(step))
    assert not criterion.teacher_bank.full and criterion._last.drawn[0] is not None
    criterion(*batch(2))  # 24 pushed into 21 rows
    known, unknown = (
        copy.deepcopy(criterion),
        make(kind=kind, capacity=C, negatives="all", direction="both", normalizer=2.0),
    )
    unknown.load_state_dict(criterion.state_dict())
    for bank in unknown._banks:
        assert bank.full
        # As under torch.compile, where the host cannot count.
        monkeypatch.setattr(bank, "_known_rows", lambda: 0)
    losses = [loss(*batch(3)) for loss in (known, unknown)]
    assert known._last.drawn[0] is None and unknown._last.drawn[0].tolist() == list(range(C))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    known.teacher_bank.clear()
    assert not known.teacher_bank.full and known.teacher_bank.is_empty()


@pytest.mark.parametrize("kind", ["crcd", "crd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_negatives_of_their_own(backend, kind):
    criterion = make(
        kind=kind,
        backend=backend,
        capacity=C,
        negative_sampling="per_sample",
        normalizer=2.0,
        bank_dtype=torch.float64,
        standardize=False,
    ).double()
    for step in range(3):
        check(criterion, *batch(step, torch.float64), formula=FORMULA[kind])
        assert criterion._last.drawn[0].shape == (B, K)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_batch_with_negatives_gives_zbar(kind):
    criterion = make(kind=kind, capacity=C, direction="both")
    criterion(*batch(0))
    assert not criterion.zbar_weight.any()
    twin = copy.deepcopy(criterion)
    criterion(*batch(1))
    assert criterion.zbar_weight.tolist() == [1, 1]
    zbar = criterion.log_zbar.clone()
    criterion(*batch(2))
    assert torch.equal(criterion.log_zbar, zbar)
    # A queue that the host takes for started, and whose first batch was skipped, gives none.
    for bank in twin._banks:
        bank.pushed.zero_()
    twin(*batch(1))
    assert not twin.zbar_weight.any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_queue_pulls_only(kind):
    criterion = make(kind=kind, capacity=C, objective="infonce")
    student, teacher, index = batch(0)
    assert criterion(student, teacher, index).item() == pytest.approx(0, abs=1e-6)
    assert criterion(student, teacher, (index + 1) % N).item() > 0.1


def test_samples_without_number():
    criterion = make(kind="crd", num_samples=None, capacity=C)
    student, teacher, index = batch(0)
    index = index + 10**12
    for _ in range(2):
        assert torch.isfinite(criterion(student, teacher, index))
    assert criterion.teacher_bank.ids[:B].tolist() == index.tolist()
    with pytest.raises(IndexError, match="index: expected values of 0 or more, got -3"):
        criterion(student, teacher, index.clone().fill_(-3))


def test_fill_keeps_the_last():
    features = torch.randn(N, DT)
    criterion = make(kind="crd", capacity=C)
    assert criterion.fill(torch.arange(N), features) == C
    expected = criterion.teacher_head(features)
    for place in range(C):
        sample = max(i for i in range(N) if i % C == place)
        assert int(criterion.teacher_bank.ids[place]) == sample
        torch.testing.assert_close(criterion.teacher_bank.rows[place], expected[sample])
    assert make(kind="crd", capacity=2 * N).fill(torch.arange(N), features) == N


@pytest.mark.parametrize("size", [B, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_skip_leaves_the_queue_alone(kind, size):
    options = {"kind": kind, "capacity": C, "direction": "both", "nonfinite": "skip"}
    criterion, twin = make(**options), make(**options)
    for _ in range(2):
        before = copy.deepcopy(criterion.state_dict())
        student, teacher, index = batch(5, size=size)
        student[0, 0] = torch.nan
        assert criterion(student, teacher, index).item() == 0
        after = criterion.state_dict()
        assert all(k == "skipped_steps" or torch.equal(v, before[k]) for k, v in after.items())
        good = batch(1, size=size)
        assert torch.equal(criterion(*good), twin(*good))


@pytest.mark.parametrize("done", [0, 1, 3])  # before the first rows, before Zbar, after it
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_and_copies_are_bit_for_bit(backend, kind, done):
    options = {"kind": kind, "capacity": C, "direction": "both", "backend": backend}
    criterion = make(**options)
    for step in range(done):
        criterion(*batch(step, size=5 + 3 * step))
    other = make(seed=1, **options)
    other.load_state_dict(criterion.state_dict())
    twins = [other, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    for step in range(3, 6):
        loss = criterion(*batch(step))
        for twin in twins:
            assert torch.equal(twin(*batch(step)), loss) and same_state(twin, criterion)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_reads_the_device(kind):
    with torch.device("meta"):
        criterion = make(kind=kind, capacity=C, direction="both", normalizer=2.0)
        student = torch.randn(B, DS, requires_grad=True)
        index = torch.zeros(B, dtype=torch.int64)
        criterion(student, torch.randn(B, DT), index).backward()
    assert student.grad.shape == student.shape


def test_compiles_from_the_empty_queue_on():
    torch._dynamo.reset()
    criterion = make(kind="crd", capacity=C, direction="student", nonfinite="skip")
    eager = copy.deepcopy(criterion)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for step in range(3):
        torch.testing.assert_close(compiled(*batch(step)), eager(*batch(step)))
    assert criterion._known_zbar.value[0]
    for name, buffer in criterion.state_dict().items():
        torch.testing.assert_close(buffer, eager.state_dict()[name], msg=name)


def test_casting_keeps_ids():
    criterion = make(kind="crd", capacity=C)
    criterion(*batch(0))
    ids = criterion.teacher_bank.ids.clone()
    criterion.to(torch.bfloat16)
    assert torch.equal(criterion.teacher_bank.ids, ids)
    assert torch.isfinite(criterion(*batch(1, torch.bfloat16)))


@pytest.mark.parametrize("kind", KINDS)
def test_diagnostics(kind):
    criterion = make(kind=kind, capacity=C)
    for step in range(2):
        criterion(*batch(step))
        values = criterion.diagnostics()
    assert -1 <= values["negative_cosine"] <= 1
    assert "capacity=21" in repr(criterion)


def test_a_queue_of_another_capacity_is_refused():
    criterion, other = make(kind="crd", capacity=C), make(kind="crd", capacity=C + 1)
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(RuntimeError, match=r"teacher_bank\.rows: expected 21 rows of width 8, got"):
        criterion.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*teacher_bank\.ids"):
        make(kind="crd", capacity=N).load_state_dict(make(kind="crd").state_dict())
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


@pytest.mark.parametrize(
    "options, text",
    [
        ({"capacity": 0}, "capacity: expected a positive integer, got 0"),
        ({"capacity": 16}, "negatives: expected at most capacity = 16, or 'all'.*got 17"),
        ({"keys": "bank"}, "keys: expected 'stop_gradient' or 'live' with capacity.*got 'bank'"),
        (
            {"exclusion": "draw", "negative_sampling": "per_sample"},
            "exclusion: expected 'mask' with capacity, got 'draw'",
        ),
        ({"distinct": True}, "distinct: expected False with capacity.*got True"),
        (
            {"num_samples": None, "exclude_same_label": True},
            "num_samples: expected a positive integer for labels, got None",
        ),
        (
            {"num_samples": None, "capacity": None},
            "num_samples: expected a positive integer, got None",
        ),
    ],
    ids=lambda o: None if isinstance(o, str) else " ".join(o),
)
def test_bad_constructor_arguments(options, text):
    with pytest.raises(ValueError, match="crrcd_ext.CRDLoss: " + text):
        CRDLoss(DS, DT, **{"num_samples": N, "negatives": K, "capacity": C, **options})


MINED = {
    "default": {},
    "live": {"keys": "live", "direction": "both"},
    "labels": {"exclude_same_label": True, "direction": "both"},
    "similar": {"exclude_similar": 0.3, "exclude_same_label": True, "direction": "student"},
}


@pytest.mark.parametrize(
    "kind, name, own",
    [
        *((kind, name, False) for kind in KINDS for name in MINED),
        *((kind, name, True) for kind in ("crcd", "crd") for name in MINED if name != "live"),
    ],
)
def test_mined_rows_of_a_queue(kind, name, own):
    options = MINED[name]
    labels = torch.arange(N) % 3 if "exclude_same_label" in options else None
    criterion = make(
        kind=kind, capacity=C, normalizer=2.0, bank_dtype=torch.float64, labels=labels, **options
    ).double()
    criterion.fill(torch.arange(N), torch.randn(N, DT))  # the statistics
    for bank in criterion._banks:
        if bank is not None:
            bank.clear()
    g = torch.Generator().manual_seed(0)
    for step in range(5):
        values = batch(step, torch.float64)
        written = min(step * B, C)
        if written == 0:
            criterion(*values)
            continue
        given = torch.randint(written, (B, K) if own else (K,), generator=g)
        check(criterion, *values, labels, formula=FORMULA[kind], given=given)
        assert torch.equal(criterion._last.drawn[0], given)


@pytest.mark.parametrize("direction", ["student", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_mined_rows_have_to_be_written(kind, direction):
    criterion = make(kind=kind, capacity=C, direction=direction)

    def refused(row, count):
        before = copy.deepcopy(criterion.state_dict())
        text = rf"negative_index: expected rows in \[0, {count}\), which the queue .*, got {row}"
        with pytest.raises(IndexError, match=text):
            criterion(*batch(9), negative_index=torch.full((K,), row))
        assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())

    refused(0, 0)
    criterion(*batch(0))
    for row in (-1, B, C):
        refused(row, B)
    criterion(*batch(1), negative_index=torch.full((K,), B - 1))
    criterion(*batch(2)), criterion(*batch(3))
    refused(C, C)
    assert criterion(*batch(4), negative_index=torch.full((K,), C - 1)).isfinite()
    # fill gives rows to the teacher's queue alone.
    criterion = make(kind=kind, capacity=C, direction=direction)
    criterion.fill(torch.arange(N), torch.randn(N, DT))
    if direction == "both":
        refused(0, 0)
    else:
        criterion(*batch(0), negative_index=torch.full((K,), C - 1))


def test_mined_rows_of_a_compiled_step_are_asserted():
    torch._dynamo.reset()
    criterion = make(kind="crd", capacity=C, normalizer=2.0)
    criterion(*batch(0))
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    compiled(*batch(1), negative_index=torch.arange(K) % B)
    with pytest.raises(RuntimeError, match="negative_index: expected rows of the queue that are"):
        compiled(*batch(2), negative_index=torch.full((K,), 2 * B))
