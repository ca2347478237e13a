"""CRRCDLoss.diagnostics: the numbers, and the warnings that name a collapse."""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch

from crrcd_ext import CRRCDLoss
from crrcd_ext.modules import diagnostics

DS, DT, N, K, B = 6, 10, 300, 40, 8
NAMES = {
    "step",
    "loss",
    "no_information_loss",
    "relation_variance",
    "teacher_relation_variance",
    "effective_rank",
    "positive_cosine",
    "negative_cosine",
    "flat_steps",
    "variance_growth",
    "temperature",
    "offset",
    "skipped_steps",
}


def make(**options):
    torch.manual_seed(0)
    options = {
        "negatives": K,
        "embedding_dim": 8,
        "hidden_dim": 16,
        "relation_dim": 8,
        "anchors": 4,
        **options,
    }
    return CRRCDLoss(DS, DT, N, **options)


def batch(seed=1):
    g = torch.Generator().manual_seed(seed)
    index = torch.randperm(N, generator=g)[:B]
    return torch.randn(B, DS, generator=g), torch.randn(B, DT, generator=g), index


@pytest.mark.parametrize("negatives", [K, "all"])
@pytest.mark.parametrize("keys", ["stop_gradient", "live", "bank"])
@pytest.mark.parametrize("direction", ["student", "teacher", "both"])
def test_numbers(direction, keys, negatives):
    criterion = make(direction=direction, keys=keys, negatives=negatives)
    loss = criterion(*batch())
    before = copy.deepcopy(criterion.state_dict())
    values = criterion.diagnostics()
    assert set(values) == NAMES and all(type(v) is float for v in values.values())
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    assert values["loss"] == float(loss.detach())
    count = N if negatives == "all" else K
    level = math.log(1 + count) + count * math.log(1 + 1 / count)
    assert values["no_information_loss"] == pytest.approx(level * (2 if direction == "both" else 1))
    assert values["temperature"] == pytest.approx(0.1)
    z = criterion.log_zbar[criterion.zbar_weight > 0].mean()
    assert values["offset"] == pytest.approx(math.log(count) + float(z))

    # Relations by hand; the step did not change a parameter.
    e_t, e_s = criterion._last.teacher, criterion._last.student
    anchors = criterion._last.selected
    with torch.no_grad():
        v_ts = criterion.cross_relation(e_t[anchors], e_s)
        v_t = criterion.teacher_relation(e_t[anchors], e_t)
    variance = ((v_ts - v_ts.mean(1, keepdim=True)) ** 2).mean()
    assert values["relation_variance"] == pytest.approx(float(variance), rel=1e-5)
    assert 0 < values["relation_variance"] <= 1 / 8
    centred = (v_ts - v_ts.mean(1, keepdim=True)).reshape(-1, 8)
    s = torch.linalg.svdvals(centred)
    p = s / s.sum()
    assert values["effective_rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)
    if keys != "bank" or direction == "teacher":
        keep = torch.ones(4, B, dtype=torch.bool)
        keep[torch.arange(4), anchors] = False
        cosine = float((v_ts * v_t).sum(-1)[keep].mean())
        assert values["positive_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert -1 <= values["negative_cosine"] <= 1


def test_negative_cosine_is_that_of_the_drawn_rows():
    criterion = make()
    drawn = criterion.teacher_bank.draw(K)
    criterion(*batch())
    last = criterion._last
    with torch.no_grad():
        v_ts = criterion.cross_relation(last.teacher[last.selected], last.student)
        v_n = criterion.teacher_relation(
            last.teacher[last.selected], criterion.teacher_bank.rows[drawn]
        )
    cosine = torch.einsum("abr,anr->abn", v_ts, v_n)
    keep = (last.index[last.selected][:, None] != last.index)[:, :, None]
    keep = keep & (last.index[:, None] != drawn)
    values = criterion.diagnostics()
    assert values["negative_cosine"] == pytest.approx(float(cosine[keep].mean()), abs=1e-5)


@pytest.mark.parametrize("objective, extra", [("nce", True), ("infonce", False)])
@pytest.mark.parametrize("k", [1, 100, 16384])
def test_no_information_loss_is_the_best_of_a_constant_critic(objective, extra, k):
    def loss(score):  # of a critic that gives every candidate `score`
        if objective == "infonce":
            return math.log(1 + k)
        return math.log1p(math.exp(-score)) + k * math.log1p(math.exp(score))

    best = min(loss(-math.log(k) + d / 100) for d in range(-300, 301))
    value = diagnostics.no_information_loss(k, objective)
    assert value == pytest.approx(best, rel=1e-6)
    assert (value > math.log(1 + k) + 0.5) == extra


def test_effective_rank():
    assert diagnostics.effective_rank(torch.ones(2, 5, 3)) == 0
    g = torch.Generator().manual_seed(0)
    line = torch.randn(1, 500, 1, generator=g) * torch.tensor([1.0, 2.0, -1.0])
    assert diagnostics.effective_rank(line) == pytest.approx(1, abs=1e-4)
    full = torch.randn(1, 5000, 3, generator=g)
    assert diagnostics.effective_rank(full) == pytest.approx(3, abs=1e-2)


def test_before_the_first_step():
    with pytest.raises(RuntimeError, match=r"CRRCDLoss\.diagnostics: expected a step before"):
        make().diagnostics()


def test_learned_temperature_and_offset_are_shown():
    criterion = make(learnable_temperature=True, learnable_offset=True, normalizer="none")
    criterion(*batch())
    with torch.no_grad():
        criterion.log_scale.fill_(math.log(4))
        criterion.offset.fill_(0.75)
    values = criterion.diagnostics()
    assert values["temperature"] == pytest.approx(0.25)
    assert values["offset"] == pytest.approx(0.75)
    assert make(normalizer=3.0).current_offset() == pytest.approx(math.log(3 * K))


def test_batch_of_one_has_no_cosine():
    criterion = make()
    student, teacher, index = batch()
    criterion(student[:1], teacher[:1], index[:1])
    values = criterion.diagnostics()
    assert values["loss"] == 0 and math.isnan(values["positive_cosine"])
    assert values["relation_variance"] == 0


def collapse(criterion):
    """An output bias that dominates, as default linear layers end up with."""
    with torch.no_grad():
        for module in (criterion.cross_relation, criterion.teacher_relation):
            module.weight.mul_(1e-3)
            module.bias.fill_(1.0)


@pytest.mark.parametrize("objective", ["nce", "infonce"])
@pytest.mark.parametrize("direction", ["student", "teacher", "both"])
def test_a_constant_relation_warns_once(direction, objective):
    criterion = make(direction=direction, objective=objective)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(*batch())
        criterion.diagnostics()
        criterion.load_state_dict(make(direction=direction, objective=objective).state_dict())
        collapse(criterion)
        criterion(*batch())
    with pytest.warns(UserWarning, match="collapsed to a constant.*parameter_groups") as caught:
        values = criterion.diagnostics()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert values["relation_variance"] < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(*batch(2))
        criterion.diagnostics()


def looks(criterion, *variances, every=20):
    """What diagnostics says of a student whose relation has these variances, step by step."""
    found = []
    student, teacher, index = batch()
    for n, variance in enumerate(variances, 1):
        criterion(student, teacher, index)
        criterion.step.fill_(n * every)
        with torch.no_grad():
            # An embedding that hardly differs between samples, and the loss that goes with it.
            same = criterion._last.student.mean(0)
            spread = criterion._last.student - same
            criterion._last = criterion._last._replace(student=same + variance**0.5 * spread)
        level = diagnostics.no_information_loss(K, "nce")
        criterion._last = criterion._last._replace(loss=torch.tensor(level))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append((criterion.diagnostics(), [str(w.message) for w in caught]))
    return found


def test_a_flat_start_is_late_until_it_lasts():
    found = looks(make(), *[1e-4] * 7)
    assert [bool(said) for _, said in found] == [False] * 4 + [True] + [False] * 2
    (text,) = found[4][1]
    assert "at step 100, as in every look since step 20" in text
    assert [values["flat_steps"] for values, _ in found] == [20.0 * n for n in range(7)]
    assert found[0][0]["variance_growth"] == 1
    assert found[1][0]["variance_growth"] == pytest.approx(1, rel=0.2)


def test_a_resumed_run_goes_on_with_its_looks():
    criterion = make()
    looks(criterion, 1e-4, 2e-4)
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed._flat == criterion._flat == (20.0, pytest.approx(criterion._flat.variance))
    assert resumed._looked == criterion._looked > 0
    # Of a state that says nothing of looks, as an older one, they begin anew.
    resumed.load_state_dict(dict(criterion.state_dict()))
    assert resumed._flat is None and resumed._looked == 0


def test_a_flat_start_that_grows_is_no_collapse():
    found = looks(make(), 1e-6, 1e-6, 1e-6, 1e-6, 4e-6, 1e-5, 1.0)
    assert not any(said for _, said in found)
    assert [values["flat_steps"] > 0 for values, _ in found] == [False, *[True] * 5, False]
    assert found[4][0]["variance_growth"] == pytest.approx(4, rel=0.2)
    # A look that is not flat ends the stretch: a later one starts at itself.
    criterion = make()
    found = looks(criterion, 1e-4, 1.0, 1e-4, every=60)
    assert [values["flat_steps"] for values, _ in found] == [0.0, 0.0, 0.0]
    assert [bool(said) for _, said in found] == [False, False, True]


def test_a_low_variance_that_carries_information_does_not_warn():
    low = {"loss": 3.0, "no_information_loss": 5.0, "relation_variance": 1e-6}
    assert not diagnostics.is_constant(low, 128)
    assert diagnostics.is_constant({**low, "loss": 4.98}, 128)
    assert not diagnostics.is_constant({**low, "loss": 4.98, "relation_variance": 2e-3}, 128)
    # 1 / 1024 is all that unit vectors of 1,024 dimensions can vary in each.
    assert not diagnostics.is_constant({**low, "loss": 4.98, "relation_variance": 9e-4}, 1024)


def test_the_freshness_shortcut_warns_once(monkeypatch):
    criterion = make()
    criterion(*batch())
    # A bank of rows opposite to what the relation makes of live ones.
    module = criterion.teacher_relation
    with torch.no_grad():
        criterion.cross_relation.weight.zero_()
        criterion.cross_relation.bias.fill_(1.0)
        module.anchor_weight.zero_()
        module.hidden_bias.zero_()
        module.bias.fill_(1.0)
        module.sample_weight.zero_()
        module.sample_weight[:, 0] = -10.0
        module.weight.fill_(-1.0)
        criterion.teacher_bank.rows.zero_()
        criterion.teacher_bank.rows[:, 0] = 1.0
    last = criterion._last
    teacher = torch.zeros_like(last.teacher)
    teacher[:, 0] = -1.0
    criterion._last = last._replace(teacher=teacher)
    with pytest.warns(UserWarning, match="fresh rows from the bank's stale ones.*fill") as caught:
        values = criterion.diagnostics()
    assert values["positive_cosine"] > 0.9 and values["negative_cosine"] < -0.5
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.diagnostics()
