"""The losses behave as their buffers say: after averages, copies, exchanges and old checkpoints."""

from __future__ import annotations

import copy
import io
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers.losses import DS, DT, KINDS, B, K, N, batch, make, same_state
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from crrcd_ext import CRDLoss, MemoryBank, MemoryQueue
from crrcd_ext.compat import repdistiller
from crrcd_ext.modules import _buffers, _checks
from crrcd_ext.modules._buffers import HostCopy
from crrcd_ext.modules.heads import FIXED, Standardizer

C = 21


def features(seed=0):
    return torch.randn(N, DT, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def filled(**options):
    """A loss of two queues, of which the teacher's alone has rows."""
    criterion = make(capacity=C, direction="both", **options)
    criterion.fill(torch.arange(N), features())
    return criterion


def weights(criterion):
    return criterion.zbar_weight.tolist()


def old_format(state):
    """The state as version 0.1 wrote it."""
    state = {k: v.clone() for k, v in state.items()}
    for name in [k for k in state if k.endswith("zbar_weight")]:
        log = name.replace("zbar_weight", "log_zbar")
        state[log] = torch.where(state.pop(name) > 0, state[log], -torch.inf)
    for name in [k for k in state if k.endswith("standardize.count")]:
        state[name] = torch.where(state[name] >= FIXED, torch.inf, state[name])
    return state


# ------------------------------------------------------------------ each direction has its own Zbar


def test_a_queue_that_is_filled_on_one_side_only():
    torch.manual_seed(0)
    criterion = CRDLoss(4, 4, None, capacity=16, negatives=8)
    criterion.fill(torch.arange(32), torch.randn(32, 4))
    losses = [
        float(criterion(torch.randn(8, 4), torch.randn(8, 4), torch.arange(8)).detach())
        for _ in range(4)
    ]
    assert all(map(math.isfinite, losses)) and math.isfinite(criterion.diagnostics()["offset"])


@pytest.mark.parametrize("normalizer", ["first_batch", "moving_average"])
@pytest.mark.parametrize("nonfinite", ["error", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_direction_waits_for_its_own_first_batch(kind, nonfinite, normalizer):
    criterion = filled(kind=kind, nonfinite=nonfinite, normalizer=normalizer)
    if nonfinite == "skip":
        student, teacher, index = batch(9)
        teacher[0, 0] = torch.nan
        assert criterion(student, teacher, index).item() == 0 and weights(criterion) == [0, 0]
    assert math.isnan(criterion.current_offset())
    assert criterion(*batch(0)).isfinite()
    first = weights(criterion)
    assert first[0] > 0 and first[1] == 0
    offset = criterion.log_zbar[0] / criterion.zbar_weight[0] + math.log(K)
    assert criterion.current_offset() == criterion.diagnostics()["offset"] == float(offset)
    log_zbar = criterion.log_zbar.clone()
    assert criterion(*batch(1)).isfinite()
    assert weights(criterion)[1] > 0
    if normalizer == "first_batch":
        assert weights(criterion) == [1, 1] and criterion.log_zbar[0] == log_zbar[0]
        log_zbar = criterion.log_zbar.clone()
        criterion(*batch(2))
        assert torch.equal(criterion.log_zbar, log_zbar)


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_gets_what_a_loss_of_it_alone_gets(kind):
    criterion, alone = filled(kind=kind), make(kind=kind, capacity=C, direction="teacher")
    alone.fill(torch.arange(N), features())
    alone.student_bank.seed.copy_(criterion.student_bank.seed)
    alone.student_bank.rows.copy_(criterion.student_bank.rows)
    for step in range(3):
        criterion(*batch(step))
        alone(*batch(step))
    assert weights(alone) == [0, 1]
    torch.testing.assert_close(criterion.log_zbar[1], alone.log_zbar[1])


@pytest.mark.parametrize("form", ["new", "old"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_without_one_sides_value_waits_for_that_side(kind, form):
    criterion, other = filled(kind=kind), make(kind=kind, capacity=C, direction="both", seed=1)
    criterion(*batch(0))
    state = criterion.state_dict()
    other.load_state_dict(old_format(state) if form == "old" else state)
    assert same_state(criterion, other) and weights(other) == [1, 0]
    for step in range(1, 4):
        assert torch.equal(other(*batch(step)), criterion(*batch(step)))
    assert same_state(criterion, other) and weights(other) == [1, 1]


def test_what_an_old_run_spoiled_is_mended_by_its_next_batch():
    """Up to version 0.1 a run with one empty queue went on with -inf for its direction."""
    criterion = filled(kind="crd")
    for step in range(3):
        criterion(*batch(step))
    state = old_format(criterion.state_dict())
    state["log_zbar"][1] = -torch.inf
    criterion.load_state_dict(state)
    assert criterion(*batch(3)).isfinite() and weights(criterion) == [1, 1]


@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_each_direction_waits_in_a_compiled_step(nonfinite):
    torch._dynamo.reset()
    criterion = filled(kind="crd", nonfinite=nonfinite)
    eager = copy.deepcopy(criterion)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for step in range(3):
        torch.testing.assert_close(compiled(*batch(step)), eager(*batch(step)))
        torch.testing.assert_close(criterion.log_zbar, eager.log_zbar)
        assert weights(criterion) == weights(eager) == [1, min(step, 1)]


def test_a_compiled_step_of_a_copy_asks_its_buffers():
    """What the host of a copy believes is old: the device decides."""
    torch._dynamo.reset()
    criterion = make(kind="crd", direction="both")
    copied = copy.deepcopy(criterion)
    criterion(*batch(0))
    for own, other in zip(copied.buffers(), criterion.buffers(), strict=True):
        own.copy_(other)
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    for step in range(1, 3):
        torch.testing.assert_close(compiled(*batch(step)), criterion(*batch(step)))
        assert torch.equal(copied.log_zbar, criterion.log_zbar)


def test_no_capture_while_one_direction_waits(monkeypatch):
    criterion = filled(kind="crd")
    criterion(*batch(0))
    for module in (_buffers, _checks):
        monkeypatch.setattr(module, "capturing", lambda _: True)
    with pytest.raises(RuntimeError, match="normalizer: expected a training step, whose batch"):
        criterion(*batch(1))


# ------------------------------------------------------------------ averages


def average(first, *others, ema=False):
    averaged = AveragedModel(
        first, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.5) if ema else None
    )
    for other in (first, *others):
        averaged.update_parameters(other)
    return averaged.module


def assert_finite(module):
    for name, value in module.state_dict().items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("capacity", [None, C])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_before_and_after_knows_what_one_knows(kind, capacity, ema):
    options = {"kind": kind, "capacity": capacity, "direction": "both"}
    before = make(**options)
    after = copy.deepcopy(before)
    after.fill(torch.arange(N), features())
    for step in range(3):
        after(*batch(step))
    mixed = average(before, after, ema=ema)
    assert_finite(mixed)
    assert 0 < min(weights(mixed)) < 1
    torch.testing.assert_close(mixed.log_zbar / mixed.zbar_weight, after.log_zbar)
    assert mixed.current_offset() == pytest.approx(after.current_offset())
    mean = mixed.teacher_head.standardize.mean.clone()
    assert mixed.teacher_head.standardize.fixed
    other = make(seed=1, **options)
    other.load_state_dict(mixed.state_dict())
    for step in range(3, 6):
        loss = mixed(*batch(step))
        assert loss.isfinite() and torch.equal(loss, other(*batch(step)))
    assert same_state(mixed, other) and torch.equal(mixed.teacher_head.standardize.mean, mean)


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("normalizer", ["first_batch", "moving_average"])
@pytest.mark.parametrize("capacity", [None, C])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_a_state_with_itself_is_that_state(kind, capacity, normalizer, ema):
    options = {"capacity": capacity, "direction": "both", "normalizer": normalizer}
    criterion = make(kind=kind, **options)
    averaged = AveragedModel(criterion, use_buffers=True)
    if ema:
        averaged.multi_avg_fn = get_ema_multi_avg_fn(0.5)  # exact for the integers here
    if kind != "crd":  # or its statistics run on
        criterion.fill(torch.arange(N), features())
    for step in range(4):
        criterion(*batch(step))
    for _ in range(3):
        averaged.update_parameters(criterion)
    assert same_state(averaged.module, criterion)
    for step in range(4, 6):
        assert torch.equal(averaged.module(*batch(step)), criterion(*batch(step)))
    assert same_state(averaged.module, criterion)


def test_averages_of_ids_stay_inside():
    """Integers are averaged too: a sample that nobody asked for, but one of the data set."""
    labels = torch.arange(N) % 4
    options = {"exclude_same_label": True, "labels": labels, "capacity": C, "negatives": "all"}
    first = make(kind="crd", **options)
    second = copy.deepcopy(first)
    for step in range(4):
        second(*batch(step))
    mixed = average(first, second, second)
    mixed.teacher_bank.ids[0] = N + 7  # as a float32 average of large ids may round
    for step in range(3):
        assert mixed(*batch(step)).isfinite()


def test_a_copy_from_before_the_labels_has_the_same_buffers():
    options = {"negative_sampling": "per_sample", "exclusion": "draw", "exclude_same_label": True}
    criterion = make(kind="crd", **options)
    averaged = AveragedModel(criterion, use_buffers=True)
    labels = torch.arange(N) % 4
    criterion.fill(torch.arange(N), features(), labels=labels)
    averaged.update_parameters(criterion)
    for module in (averaged.module, average(make(kind="crd", **options), criterion, criterion)):
        other = make(kind="crd", seed=1, **options)
        other.load_state_dict(module.state_dict())
        assert torch.equal(module(*batch(0)), other(*batch(0)))
        drawn = module._last.drawn[0]
        assert not (module.labels[drawn] == module.labels[batch(0)[2]][:, None]).any()


# ------------------------------------------------------------------ exchanged and copied buffers


@pytest.mark.parametrize("capacity", [None, C])
@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_goes_by_the_buffers_it_is_given(kind, capacity):
    options = {"kind": kind, "capacity": capacity, "direction": "both"}
    trained, fresh = make(**options), make(**options)
    trained.fill(torch.arange(N), features())
    for step in range(3):
        trained(*batch(step))
    untrained = {k: v.clone() for k, v in make(**options).state_dict().items()}
    call, expected = torch.func.functional_call, trained(*batch(3), update=False)
    for module in (fresh, trained):
        got = call(module, trained.state_dict(), batch(3), {"update": False})
        assert torch.equal(got, expected)
        got = call(module, untrained, batch(3), {"update": False})
        assert torch.equal(got, make(**options)(*batch(3), update=False))


def replica(module):
    """What torch.nn.parallel.replicate makes on another GPU."""
    copies = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for own, other in copies.items():
        other._modules = {k: copies.get(m) for k, m in own._modules.items()}
        other._buffers = {k: None if b is None else b.clone() for k, b in own._buffers.items()}
        for name, parameter in own._parameters.items():
            setattr(other, name, None if parameter is None else parameter.clone())
    return copies[module]


@pytest.mark.parametrize("capacity", [None, C])
@pytest.mark.parametrize(
    "way", ["load", "assign", "to_empty", "copy_", "data", "replica", "pickle"]
)
def test_every_way_that_a_state_takes(way, capacity):
    options = {"capacity": capacity, "direction": "both", "negatives": "all"}
    options |= {"exclude_same_label": True}
    trained, other = make(**options), make(seed=1, **options)
    trained.fill(torch.arange(N), features(), labels=torch.arange(N) % 4)
    for step in range(4):
        trained(*batch(step))
    state = copy.deepcopy(trained.state_dict())
    if way == "to_empty":
        with torch.device("meta"):
            other = make(seed=1, **options)
        other = other.to_empty(device="cpu")
    if way in ("load", "to_empty", "assign"):
        other.load_state_dict(state, assign=way == "assign")
    elif way == "replica":
        other = replica(trained)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(trained))
    else:
        for name, tensor in (*other.named_parameters(), *other.named_buffers()):
            # A write through .data is seen in what a step changes, not in labels.
            target = tensor.data if way == "data" and name != "labels" else tensor.detach()
            target.copy_(state[name])
    update = way != "replica"  # what one changes would be thrown away
    for step in range(4, 7):
        losses = [module(*batch(step), update=update) for module in (other, trained)]
        assert torch.equal(*losses)
    assert other.labelled and other.teacher_head.standardize.fixed


@pytest.mark.parametrize("copied", [True, False])
def test_what_the_host_knows_lasts_until_somebody_writes(copied):
    asked = []

    def read(buffer):
        asked.append(len(buffer))
        return float(buffer.sum())

    buffer, known = torch.zeros(3), HostCopy(7.0)
    if copied:
        known = pickle.loads(pickle.dumps(copy.deepcopy(known)))
    assert known.of(torch.zeros(3, device="meta"), read) == 7.0 and not asked
    assert [known.of(buffer, read) for _ in range(3)] == [0, 0, 0] and len(asked) == 1
    buffer.detach().add_(1)
    assert [known.of(buffer, read) for _ in range(3)] == [3, 3, 3] and len(asked) == 2
    assert known.of(buffer.clone(), read) == 3 and len(asked) == 3
    buffer.add_(1)
    known.set(buffer, 6.0)
    assert known.of(buffer, read) == 6 and len(asked) == 3
    assert copy.deepcopy(known).of(buffer, read) == 6 and len(asked) == 4
    with torch.inference_mode():
        unversioned = torch.ones(3)
    assert known.of(unversioned, read) == 3 and known.of(unversioned, read) == 3
    assert len(asked) == 6


def test_a_scalar_on_the_cpu_is_always_read():
    known, buffer = HostCopy(False), torch.zeros(2)
    known.set(buffer, False)
    buffer.data.add_(1)
    assert known.of(buffer, lambda b: bool(b.all()))


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(_buffers, "capturing", lambda _: True)
    assert HostCopy(5).of(torch.zeros(3), lambda _: pytest.fail("read")) == 5


# ------------------------------------------------------------------ fixed statistics


def test_fixed_statistics_stay_whatever_the_host_believes():
    standardize = Standardizer(4)
    mean, variance = torch.tensor([0.0, 1.0, -3.0, 1e-30]), torch.tensor([0.0, 2.0, 1e-30, 7.0])
    standardize.set_(mean.double(), variance.double())
    merged = standardize.merged(torch.randn(8, 4) * 100)
    for got, expected in zip(merged, standardize.statistics, strict=True):
        assert torch.equal(got, expected)
    assert standardize.count == FIXED


@pytest.mark.parametrize("form", ["new", "old"])
def test_fixed_statistics_survive_saving_in_half(form):
    criterion, other = make(), make(seed=1)
    criterion.fill(torch.arange(N), features())
    state = criterion.state_dict()
    state = old_format(state) if form == "old" else state
    name = "teacher_head.standardize.count"
    state[name] = state[name].half()
    other.load_state_dict(state)
    assert other.teacher_head.standardize.count == FIXED and other.teacher_head.standardize.fixed


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("capacity", [None, C])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [0, 2])
def test_an_old_checkpoint_goes_on(kind, capacity, done):
    options = {"kind": kind, "capacity": capacity, "direction": "both"}
    criterion = make(**options)
    criterion.fill(torch.arange(N), features())
    for step in range(done):
        criterion(*batch(step))
    file = io.BytesIO()
    outer = nn.ModuleDict({"body": nn.Linear(2, 2), "loss": criterion})
    torch.save(old_format(outer.state_dict()), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    kept = {k: v.clone() for k, v in state.items()}
    other = nn.ModuleDict({"body": nn.Linear(2, 2), "loss": make(seed=1, **options)})
    other.load_state_dict(state)
    assert list(state) == list(kept) and all(torch.equal(state[k], kept[k]) for k in kept)
    assert same_state(outer, other)
    for step in range(done, done + 3):
        assert torch.equal(other["loss"](*batch(step)), criterion(*batch(step)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        *("log_zbar", "zbar_weight", "log_scale", "offset"),
        *("teacher_bank.rows", "student_bank.rows", "cross_relation.anchor_weight"),
        *("student_head.linear.bias", "teacher_head.standardize.mean"),
        *("student_head.standardize.variance", "student_head.standardize.count"),
    ],
)
def test_a_spoiled_state_is_refused_by_name(name, value):
    options = {"direction": "both", "learnable_temperature": True, "learnable_offset": True}
    criterion, other = make(**options), make(seed=1, **options)
    criterion(*batch(0))
    outer = nn.ModuleDict({"loss": other})
    state = {f"loss.{k}": v.clone() for k, v in criterion.state_dict().items()}
    state[f"loss.{name}"].view(-1)[-1] = value
    if name.endswith("count") and value == torch.inf:
        outer.load_state_dict(state)  # the mark of old checkpoints for fixed statistics
        return
    before = copy.deepcopy(outer.state_dict())
    text = rf"crrcd_ext.CRRCDLoss: loss.{name}: expected finite values, got 1 of \d+ not finite"
    with pytest.raises(RuntimeError, match=text):
        outer.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in outer.state_dict().items())
    del state[f"loss.{name}"]
    outer.load_state_dict(state, strict=False)
    assert outer["loss"](*batch(1)).isfinite()


@pytest.mark.parametrize("bank", [MemoryBank(5, 3), MemoryQueue(5, 3, dtype=torch.float16)])
def test_a_bank_refuses_a_spoiled_row(bank):
    state = copy.deepcopy(bank.state_dict())
    state["rows"][2, 1] = torch.nan
    with pytest.raises(RuntimeError, match="MemoryBank: rows: expected finite values, got 1 of 15"):
        bank.load_state_dict(state)


# ------------------------------------------------------------------ values whose squares overflow


@pytest.mark.parametrize("side, width", [("student", DS), ("teacher", DT)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_would_spoil_the_statistics_is_refused(kind, side, width):
    criterion = make(kind=kind)
    criterion(*batch(0))
    student, teacher, index = batch(1)
    before = copy.deepcopy(criterion.state_dict())
    {"student": student, "teacher": teacher}[side][3, 2] = 1e20
    text = (
        f"{side}_features: expected finite values of up to 2.6e\\+15, whose squares can be summed, "
        f"got 1 of {B * width} values larger, the first in row 3; nonfinite='skip' skips"
    )
    with pytest.raises(ValueError, match=text):
        criterion(student, teacher, index)
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    # They are good values where nothing is kept of them.
    assert criterion(student, teacher, index, update=False).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_value_that_would_spoil_the_statistics_is_skipped(dtype):
    criterion = make(nonfinite="skip")
    criterion(*batch(0))
    student, teacher, index = batch(1, dtype)
    before = copy.deepcopy(criterion.state_dict())
    student[3, 2] = 1e20 if dtype != torch.float64 else 1e200
    assert criterion(student, teacher, index).item() == 0
    after = criterion.state_dict()
    assert int(after.pop("skipped_steps")) == 1
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    student[3, 2] = 2e15
    criterion(student, teacher, index)
    assert_finite(criterion)


# ------------------------------------------------------------------ the public codes' losses

OPT = SimpleNamespace(s_dim=5, t_dim=7, feat_dim=8, n_data=40, nce_k=4, nce_t=0.1, nce_m=0.5)
COMPAT = [repdistiller.CRDLoss, repdistiller.CRCDLoss]


def public_batch(step):
    g = torch.Generator().manual_seed(step)
    index = torch.randperm(40, generator=g)[:6]
    candidates = torch.randint(40, (6, 5), generator=g)
    candidates[:, 0] = index
    return torch.randn(6, 5, generator=g), torch.randn(6, 7, generator=g), index, candidates


@pytest.mark.parametrize("loss", COMPAT)
def test_an_average_of_the_public_codes_constants(loss):
    before = loss(OPT)
    after = copy.deepcopy(before)
    after(*public_batch(0))
    mixed = average(before, after, after)
    for slot in range(2):
        torch.testing.assert_close(mixed.contrast.constant(slot), after.contrast.params[2 + slot])
    state = mixed.state_dict()
    torch.testing.assert_close(state["contrast.params"], after.contrast.params)
    other = loss(OPT)
    other.load_state_dict(state)
    torch.testing.assert_close(mixed(*public_batch(1)), other(*public_batch(1)))
    assert mixed.contrast.normalized == (True, True)
    itself = average(after, after, after)
    assert torch.equal(itself(*public_batch(1)), after(*public_batch(1)))


@pytest.mark.parametrize("loss", COMPAT)
def test_the_public_codes_losses_go_by_their_buffers(loss):
    torch.manual_seed(0)
    trained, fresh = loss(OPT), loss(OPT)
    untrained = copy.deepcopy(fresh)
    trained(*public_batch(0))
    given = {k: v.clone() for k, v in (*trained.named_parameters(), *trained.named_buffers())}
    got = torch.func.functional_call(fresh, given, public_batch(1))
    assert torch.equal(got, trained(*public_batch(1)))
    assert fresh.contrast.normalized == (False, False)
    assert torch.equal(fresh(*public_batch(2)), untrained(*public_batch(2)))
    # One side alone, as no original leaves it, waits for the other.
    state = trained.state_dict()
    state["contrast.params"][3] = -5
    fresh.load_state_dict(state)
    assert fresh.contrast.normalized == (True, False)
    z = fresh.contrast.params[2].clone()
    assert fresh(*public_batch(3)).isfinite()
    assert fresh.contrast.params[2] == z and fresh.contrast.params[3] > 0


@pytest.mark.parametrize("name", ["contrast.memory_v1", "embed_t.linear.weight"])
def test_a_spoiled_state_of_the_public_codes_losses_is_refused(name):
    criterion = repdistiller.CRDLoss(OPT)
    state = copy.deepcopy(criterion.state_dict())
    before = copy.deepcopy(state)
    state[name][1, 1] = torch.nan
    with pytest.raises(RuntimeError, match=f"CRDLoss: {name}: expected finite values, got 1 of"):
        criterion.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


def test_where_the_host_does_not_know_the_device_keeps_the_first_zbar(monkeypatch):
    torch.manual_seed(0)
    criterion = CRDLoss(4, 4, 32, negatives=8)
    first, second = (
        (torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) + start) for start in (0, 8)
    )
    criterion(*first)
    kept, same = criterion.log_zbar.clone(), copy.deepcopy(criterion)
    expected = same(*second)
    monkeypatch.setattr(type(criterion), "_knows_zbar", lambda self, slot: False)
    torch.testing.assert_close(criterion(*second), expected, rtol=0, atol=0)
    assert torch.equal(criterion.log_zbar, kept)
