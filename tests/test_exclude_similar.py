"""exclude_similar: negatives that the teacher sees as the query are none, in all three losses."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers import losses
from helpers.cases import BACKENDS
from helpers.loss_formula import DifferenceStep, InstanceStep, Step, check

from crrcd_ext import CRDLoss, CRRCDLoss
from crrcd_ext.modules import diagnostics

FORMULAS = {"crrcd": Step, "crcd": DifferenceStep, "crd": InstanceStep}
PER_SAMPLE = {"negative_sampling": "per_sample"}


def make(kind, **options):
    options = {"exclude_similar": 0.2, "bank_dtype": torch.float64, **options}
    if kind == "crrcd":
        options = {"init": "gaussian", **options}
    criterion = losses.make(kind=kind, **options).double()
    g = torch.Generator().manual_seed(3)
    teacher = torch.randn(losses.N, losses.DT, generator=g, dtype=torch.float64)
    criterion.fill(torch.arange(losses.N), teacher)
    return criterion


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind, options",
    [
        *((kind, {"objective": "infonce"}) for kind in losses.KINDS),
        *((kind, {"direction": "both"}) for kind in losses.KINDS),
        *((kind, {"keys": "live", "direction": "both"}) for kind in losses.KINDS),
        *((kind, {"keys": "bank", "negatives": "all"}) for kind in losses.KINDS),
        *((kind, {"negatives": "all", "direction": "both"}) for kind in losses.KINDS),
        *((kind, {"exclude_same_label": True}) for kind in losses.KINDS),
        *((kind, {"capacity": 12, "negatives": 9}) for kind in losses.KINDS),
        *((kind, {"capacity": 60, "negatives": "all"}) for kind in losses.KINDS),
        *((kind, {"capacity": 12, "negatives": 9, "keys": "live"}) for kind in losses.KINDS),
        *((kind, PER_SAMPLE) for kind in ("crcd", "crd")),
        *((kind, {**PER_SAMPLE, "distinct": True}) for kind in ("crcd", "crd")),
        *((kind, {**PER_SAMPLE, "exclusion": "draw"}) for kind in ("crcd", "crd")),
        *((kind, {**PER_SAMPLE, "direction": "both"}) for kind in ("crcd", "crd")),
    ],
    ids=lambda o: o if isinstance(o, str) else " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_step_is_the_formula(backend, kind, options):
    labels = None
    if options.get("exclude_same_label"):
        labels = torch.arange(losses.N) % 3
        options = {**options, "labels": labels}
    criterion = make(kind, backend=backend, **{"direction": "student", **options})
    expected = check(criterion, *losses.batch(1, torch.float64), labels, formula=FORMULAS[kind])
    assert expected.similar > 0
    if criterion.objective == "nce":
        for slot, side in enumerate(("student", "teacher")):
            if side in expected.log_zbar:
                torch.testing.assert_close(criterion.log_zbar[slot], expected.log_zbar[side])


@pytest.mark.parametrize("shape", ["shared", "per sample"])
def test_given_negatives_are_masked_too(shape):
    criterion = make("crd", direction="student")
    size = (losses.K,) if shape == "shared" else (losses.B, losses.K)
    given = torch.randint(losses.N, size)
    batch = losses.batch(1, torch.float64)
    assert check(criterion, *batch, formula=InstanceStep, given=given).similar > 0


def test_a_copy_of_a_picture_is_no_negative():
    # Rows 0 and 1 are one picture, of which the student learns 0: by default 1 pushes it away.
    teacher = torch.eye(4)[[0, 0, 1, 2]]
    found = []
    for threshold in (None, 0.5):
        criterion = CRDLoss(
            4, 4, 4, negatives="all", head="identity", standardize=False, direction="student",
            normalizer="none", exclude_similar=threshold,
        )  # fmt: skip
        criterion.fill(torch.arange(4), teacher)
        loss = criterion(teacher[:1], teacher[:1], torch.tensor([0]))
        found.append(float(loss))
    scale, softplus = 1 / 0.07, torch.nn.functional.softplus
    others = float(softplus(torch.tensor(-scale)) + 2 * softplus(torch.tensor(0.0)))
    assert found[1] == pytest.approx(others, abs=1e-5)
    assert found[0] == pytest.approx(others + scale, rel=1e-5)


def test_a_threshold_of_one_masks_nothing_but_rounding():
    batch = losses.batch(1, torch.float64)
    for kind in losses.KINDS:
        plain = make(kind, exclude_similar=None, direction="student")
        masked = make(kind, exclude_similar=1.0, direction="student")
        assert torch.equal(plain(*batch), masked(*batch))


@pytest.mark.parametrize("direction", ["student", "both"])
@pytest.mark.parametrize("kind", losses.KINDS)
def test_share_of_masked_negatives(kind, direction):
    criterion = make(kind, exclude_similar=0.1, direction=direction, momentum=1.0)
    banks = [bank for bank in criterion._banks if bank is not None]
    drawn = [bank.draw(losses.K) for bank in banks]
    criterion(*losses.batch(1, torch.float64))
    values = criterion.diagnostics()
    e_t = criterion._last.teacher
    shares = [float((e_t @ criterion.teacher_bank.rows[d].T > 0.1).double().mean()) for d in drawn]
    assert 0.1 < values["similar_share"] < 0.9
    assert values["similar_share"] == pytest.approx(sum(shares) / len(shares))
    assert values["masked_steps"] == 0
    assert "similar_share" not in make_plain(kind).diagnostics()


def make_plain(kind):
    criterion = make(kind, exclude_similar=None)
    criterion(*losses.batch(1, torch.float64))
    return criterion


@pytest.mark.parametrize("negatives", [17, 32, "all"])
@pytest.mark.parametrize("objective", ["nce", "infonce"])
@pytest.mark.parametrize("kind", losses.KINDS)
def test_a_step_without_any_negative_is_defined_counted_and_said_once(kind, objective, negatives):
    options = {"negatives": negatives, "objective": objective, "direction": "student"}
    criterion = make(kind, exclude_similar=-0.9999999, normalizer=2.0, **options)
    criterion.teacher_bank.rows.fill_(8**-0.5)
    criterion.teacher_head.linear.weight.data.zero_()
    criterion.teacher_head.linear.bias.data.fill_(1.0)
    student, teacher, index = losses.batch(1, torch.float64)
    student.requires_grad_()
    loss = criterion(student, teacher, index)
    assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()
    if objective == "infonce":
        assert loss == 0
    elif kind == "crd":
        count = losses.N if negatives == "all" else negatives
        beta = math.log(count) + math.log(2.0)
        cosine = (criterion._last.student * criterion._last.teacher).sum(1)
        expected = torch.nn.functional.softplus(beta - cosine / criterion.temperature).mean()
        torch.testing.assert_close(loss, expected)
    criterion.eval()
    criterion(student, teacher, index)
    criterion.train()
    criterion(student, teacher, index)
    with pytest.warns(UserWarning, match="has masked every negative in 2 of 2 steps") as caught:
        values = criterion.diagnostics()
    assert sum("masked every" in str(w.message) for w in caught) == 1
    assert values["masked_steps"] == 2 and values["similar_share"] == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*masked every")
        criterion.diagnostics()


@pytest.mark.parametrize("alike", [slice(0, 32), slice(32, 40), slice(0, 39)])
def test_a_step_with_some_negatives_left_is_not_counted(alike):
    teacher = torch.eye(4)[[0]].repeat(40, 1)
    teacher[alike] = torch.eye(4)[1]
    criterion = CRDLoss(
        4, 4, 40, negatives="all", head="identity", standardize=False, direction="student",
        exclude_similar=0.5,
    )  # fmt: skip
    criterion.fill(torch.arange(40), teacher)
    index = torch.arange(40)[alike][:3]
    criterion(torch.randn(3, 4), teacher[index], index)
    assert criterion.masked_steps == 0
    assert criterion.diagnostics()["similar_share"] == len(teacher[alike]) / 40


def test_such_a_step_gives_no_zbar():
    criterion = make("crd", exclude_similar=-0.9999999, direction="student")
    rows = criterion.teacher_bank.rows.clone()
    linear = criterion.teacher_head.linear
    weight = linear.weight.data.clone()
    criterion.teacher_bank.rows.fill_(8**-0.5)
    linear.weight.data.zero_()
    linear.bias.data.fill_(1.0)
    assert criterion(*losses.batch(1, torch.float64)).isfinite()
    assert not criterion.zbar_weight.any() and not criterion._knows_zbar(0)
    criterion.teacher_bank.rows.copy_(rows)
    linear.weight.data.copy_(weight)
    criterion.exclude_similar = 0.5
    criterion(*losses.batch(2, torch.float64))
    assert criterion.zbar_weight.tolist() == [1, 0] and criterion._knows_zbar(0)


def test_a_skipped_step_is_not_counted():
    criterion = make("crd", exclude_similar=-0.9999999, direction="student", nonfinite="skip")
    criterion.teacher_bank.rows.fill_(8**-0.5)
    criterion.teacher_head.linear.weight.data.zero_()
    criterion.teacher_head.linear.bias.data.fill_(1.0)
    student, teacher, index = losses.batch(1, torch.float64)
    criterion(torch.full_like(student, torch.nan), teacher, index)
    assert criterion.masked_steps == 0
    criterion(student, teacher, index)
    assert criterion.masked_steps == 1


@pytest.mark.parametrize("kind", losses.KINDS)
def test_checkpoints_with_and_without_it_load_into_each_other(kind):
    with_it, plain = make(kind), make(kind, exclude_similar=None)
    with_it.masked_steps.fill_(5)
    state = copy.deepcopy(with_it.state_dict())
    plain.load_state_dict(state)
    assert "masked_steps" in state  # the caller's own is left as it is
    other = make(kind)
    other.load_state_dict(state)
    assert other.masked_steps == 5
    other.load_state_dict(plain.state_dict())
    assert other.masked_steps == 0
    twin = copy.deepcopy(with_it)
    batch = losses.batch(1, torch.float64)
    assert torch.equal(twin(*batch), with_it(*batch))


@pytest.mark.parametrize("value", [-1, 1.0001, -2, math.nan, math.inf, True, "0.5"])
@pytest.mark.parametrize("kind", losses.KINDS)
def test_thresholds_out_of_range(kind, value):
    text = r"exclude_similar: expected a number in \(-1, 1\], got "
    with pytest.raises(ValueError, match=text):
        losses.make(kind=kind, exclude_similar=value)


@pytest.mark.parametrize("kind", losses.KINDS)
def test_what_has_no_teachers_bank_is_refused(kind):
    text = "exclude_similar: expected None for direction='teacher', without a teacher's bank, got"
    with pytest.raises(ValueError, match=text):
        losses.make(kind=kind, exclude_similar=0.5, direction="teacher")
    text = "exclude_similar: expected None with capacity and direction='both', or direction='stud"
    with pytest.raises(ValueError, match=text):
        losses.make(kind=kind, exclude_similar=0.5, direction="both", capacity=40)


def test_compiled_step_is_the_eager_one():
    eager = make("crrcd", normalizer=1.5)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in range(2):
        batch = losses.batch(step, torch.float64)
        torch.testing.assert_close(run(*batch), eager(*batch))
    assert losses.same_state(eager, compiled)


def test_it_helps_to_find_the_class_in_a_bank_of_copies():
    """Of a data set of 8 things seen 16 times, 15 of 127 negatives are no negatives at all."""
    torch.manual_seed(0)
    labels = torch.arange(128) % 8
    teacher = 3 * torch.randn(8, 32)[labels] + torch.randn(128, 32)
    found = []
    for threshold in (None, 0.5):
        torch.manual_seed(1)
        criterion = CRRCDLoss(16, 32, 128, negatives="all", exclude_similar=threshold)
        student = torch.nn.Linear(32, 16)
        criterion.fill(torch.arange(128), teacher)
        groups = [{"params": student.parameters(), "lr": 0.05}]
        groups += criterion.parameter_groups(0.05)
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        for _ in range(60):
            index = torch.randperm(128)[:32]
            loss = criterion(student(teacher[index]), teacher[index], index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        values = criterion.diagnostics()
        assert not diagnostics.is_constant(values, 128)
        with torch.no_grad():
            e = criterion.student_head(student(teacher))
        same = labels[:, None] == labels
        found.append(float((e @ e.T)[same].mean()))
    assert found[1] > found[0]
