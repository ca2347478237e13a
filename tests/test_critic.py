"""The critic of the losses: the bound of a learned temperature, Zbar as a moving average."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.losses import DS, DT, KINDS, B, K, N, batch, make, same_state

from crrcd_ext import CRDLoss
from crrcd_ext.modules import step as step_module
from crrcd_ext.modules.cosines import Cosines
from crrcd_ext.modules.normalizer import log_mean_exp_logit

# ---------------------------------------------------------------------- the bound of 1/tau


def at(log_scale, **options):
    criterion = make(kind="crd", learnable_temperature=True, direction="both", **options)
    with torch.no_grad():
        criterion.log_scale.fill_(log_scale)
    return criterion


def gradient(criterion, factor):
    """Of factor times the scale."""
    (found,) = torch.autograd.grad(factor * criterion.scale(), criterion.log_scale)
    return float(found)


@pytest.mark.parametrize("beyond", [0.0, 1e-6, 3.0])
def test_the_scale_is_bounded_and_its_gradient_leads_back(beyond):
    criterion = at(math.log(100) + beyond)
    assert float(criterion.scale().detach()) == pytest.approx(100, rel=1e-6)
    assert gradient(criterion, 1.0) == pytest.approx(100, rel=1e-6)
    assert gradient(criterion, -1.0) == 0
    inside = at(math.log(100) - 1e-3)
    for factor in (1.0, -1.0):
        assert gradient(inside, factor) == pytest.approx(factor * 99.9, rel=1e-4)
    free = at(math.log(100) + beyond, max_scale=None)
    assert gradient(free, -1.0) == pytest.approx(-100 * math.exp(beyond), rel=1e-5)


@pytest.mark.parametrize("target, ends", [(50.0, 50.0), (300.0, 100.0)])
@pytest.mark.parametrize("start", [0.0, 6.0])
def test_descent_ends_at_the_best_scale_that_is_allowed(start, target, ends):
    criterion = at(start)
    optimizer = torch.optim.SGD([criterion.log_scale], lr=0.02)
    steps = []
    for _ in range(600):
        optimizer.zero_grad()
        before = float(criterion.log_scale.detach())
        (criterion.scale().log() - math.log(target)).square().backward()
        optimizer.step()
        steps.append(float(criterion.log_scale.detach()) - before)
    assert float(criterion.scale().detach()) == pytest.approx(ends, rel=1e-3)
    bound = max(start, math.log(100))
    assert float(criterion.log_scale.detach()) <= bound + max(map(abs, steps))


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_share_one_gradient(kind):
    """What they give together decides, not each on its own."""
    options = {"kind": kind, "learnable_temperature": True, "direction": "both", "normalizer": 0.5}
    for seed in range(4):
        found = {}
        for bound in (100.0, None):
            criterion = make(seed=seed, max_scale=bound, **options)
            with torch.no_grad():
                criterion.log_scale.fill_(math.log(100))
            criterion(*batch(seed)).backward()
            found[bound] = float(criterion.log_scale.grad)
        assert found[100.0] == pytest.approx(max(0.0, found[None]), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_below_the_bound_does_not_know_of_it(kind):
    runs = [make(kind=kind, learnable_temperature=True, max_scale=m) for m in (100.0, None)]
    optimizers = [torch.optim.SGD(run.parameter_groups(0.5), lr=0.5) for run in runs]
    for step in range(4):
        losses = [run(*batch(step)) for run in runs]
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert same_state(*runs) and runs[0].log_scale != make(kind=kind).temperature


def test_diagnostics_show_the_temperature_that_is_used():
    criterion = at(7.0, max_scale=20.0)
    criterion(*batch(0))
    assert criterion.diagnostics()["temperature"] == pytest.approx(0.05)
    assert "max_scale=20.0" in repr(criterion)


def test_a_bound_below_the_start_is_refused():
    text = (
        r"CRDLoss: max_scale: expected 1/temperature = 200 or more, or None for no bound, got 100"
    )
    with pytest.raises(ValueError, match=text):
        CRDLoss(DS, DT, N, negatives=K, temperature=0.005, learnable_temperature=True)
    # A temperature that is not learned has no bound.
    CRDLoss(DS, DT, N, negatives=K, temperature=0.005)
    CRDLoss(DS, DT, N, negatives=K, temperature=0.005, learnable_temperature=True, max_scale=None)
    assert at(0.0, temperature=0.01).scale() == 1
    for bad in (0, -1.0, math.inf, "many", True):
        with pytest.raises(ValueError, match="max_scale: expected a positive number"):
            CRDLoss(DS, DT, N, negatives=K, max_scale=bad)


def test_the_bound_under_transforms_and_compile():
    torch._dynamo.reset()
    criterion = at(5.0)

    def scale(log_scale):
        return torch.func.functional_call(criterion, {"log_scale": log_scale}, (), strict=False)

    criterion.forward = lambda: criterion.scale()
    values = torch.tensor([1.0, 5.0])
    torch.testing.assert_close(torch.func.vmap(scale)(values), torch.tensor([math.e, 100.0]))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(scale))(values), torch.tensor([math.e, 100.0])
    )
    compiled = torch.compile(lambda: -criterion.scale(), fullgraph=True, backend="aot_eager")
    value = compiled()
    value.backward()
    assert value.item() == pytest.approx(-100) and criterion.log_scale.grad == 0


# ---------------------------------------------------------------------- a moving average


@pytest.fixture
def measured(monkeypatch):
    """log Zbar of the batches, in order, and whether it was asked for at all."""
    found = []

    def record(*arguments):
        found.append(log_mean_exp_logit(*arguments))
        return found[-1]

    monkeypatch.setattr(step_module, "log_mean_exp_logit", record)
    return found


def averaged(criterion, slot=0):
    return float(criterion.log_zbar[slot] / criterion.zbar_weight[slot])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("kind", KINDS)
def test_zbar_follows_the_batches(kind, momentum, measured):
    options = {"normalizer": "moving_average", "normalizer_momentum": momentum}
    criterion = make(kind=kind, direction="student", **options)
    for step in range(5):
        criterion(*batch(step))
        shares = torch.tensor([momentum ** (step - n) for n in range(step + 1)]).double()
        expected = (shares * torch.stack(measured)).sum() / shares.sum()
        assert averaged(criterion) == pytest.approx(float(expected), rel=1e-6)
        # The batch is judged by what it has part in.
        beta = float(expected) + math.log(K)
        assert criterion.diagnostics()["offset"] == pytest.approx(beta, rel=1e-6)
    assert len(measured) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_that_of_the_first_batch(kind):
    losses = [
        make(kind=kind, direction="both", normalizer=normalizer)(*batch(0))
        for normalizer in ("first_batch", "moving_average")
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_average(kind):
    options = {"kind": kind, "direction": "student"}
    criterion = make(normalizer="moving_average", normalizer_momentum=0.5, **options)
    criterion(*batch(0))
    before = copy.deepcopy(criterion)
    loss = criterion(*batch(1))
    fixed = make(normalizer=math.exp(averaged(criterion)), **options)
    fixed.load_state_dict(before.state_dict())
    torch.testing.assert_close(loss, fixed(*batch(1)))


def test_without_an_update_the_average_stays_and_is_not_measured(measured):
    criterion = make(normalizer="moving_average")
    criterion(*batch(0))
    before = copy.deepcopy(criterion.state_dict())
    count = len(measured)
    loss = criterion(*batch(1), update=False)
    criterion.eval()
    criterion(*batch(1))
    assert len(measured) == count and loss.isfinite()
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


def test_batches_without_a_pair_or_to_skip_leave_it():
    criterion = make(normalizer="moving_average", nonfinite="skip")
    criterion(*batch(0))
    zbar = criterion.log_zbar.clone(), criterion.zbar_weight.clone()
    criterion(*(x[:1] for x in batch(1)))
    student, teacher, _ = batch(1)
    criterion(student, teacher, torch.full((B,), 3))
    student[0, 0] = torch.nan
    criterion(student, teacher, torch.arange(B))
    assert torch.equal(criterion.log_zbar, zbar[0])
    assert torch.equal(criterion.zbar_weight, zbar[1])
    assert criterion(*batch(2)).isfinite() and criterion.zbar_weight[0] > zbar[1][0]


@pytest.mark.parametrize("learnable", [False, True])
def test_a_moving_average_compiles(learnable):
    torch._dynamo.reset()
    options = {"learnable_temperature": learnable, "nonfinite": "skip" if learnable else "error"}
    criterion = make(kind="crd", direction="both", normalizer="moving_average", **options)
    eager = copy.deepcopy(criterion)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for step in range(4):
        torch.testing.assert_close(compiled(*batch(step)), eager(*batch(step)))
        torch.testing.assert_close(criterion.log_zbar, eager.log_zbar)
        torch.testing.assert_close(criterion.zbar_weight, eager.zbar_weight)


def test_a_run_may_change_between_first_batch_and_moving_average():
    first, moving = make(), make(seed=1, normalizer="moving_average")
    first(*batch(0))
    moving.load_state_dict(first.state_dict())
    moving(*batch(1))
    assert moving.zbar_weight[0] == 1
    log_zbar = moving.log_zbar.clone()
    first.load_state_dict(moving.state_dict())
    first(*batch(2))
    assert torch.equal(first.log_zbar, log_zbar)


@pytest.mark.parametrize("value", [1.0, -0.1, math.nan, "half", None, True])
def test_a_bad_momentum_is_refused(value):
    text = r"CRDLoss: normalizer_momentum: expected a number in \[0, 1\), got"
    with pytest.raises(ValueError, match=text):
        CRDLoss(DS, DT, N, negatives=K, normalizer_momentum=value)


@pytest.mark.parametrize("shared", [True, False])
def test_some_negatives_stand_for_all(shared):
    """All negatives are alike: those looked at have to weigh what all weigh."""
    index = torch.arange(100) if shared else torch.arange(100).expand(3, -1)
    asked = []

    def negative(positions):
        asked.append(len(positions))
        cosine = torch.full((3, len(positions)), -0.5)
        return cosine, torch.ones_like(cosine, dtype=torch.bool)

    positive = torch.tensor([0.9, 1.0, 0.8])
    cosines = Cosines(positive, torch.ones(3, dtype=torch.bool), index, 1, negative)
    every = torch.cat([positive, torch.full((300,), -0.5)])
    expected = (every * 10).exp().mean().log()
    for limit in (1000, 100, 12, 4):
        asked.clear()
        torch.testing.assert_close(log_mean_exp_logit(cosines, 10.0, limit), expected)
        assert sum(asked) <= limit
