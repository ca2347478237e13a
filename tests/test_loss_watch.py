"""The losses look at their own steps, and warn without a call of diagnostics."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers.losses import KINDS, batch, make, same_state

from crrcd_ext.modules import diagnostics

COLLAPSED = "collapsed to a constant"
VALUES = diagnostics.Look.values


def collapsed(kind="crrcd", **options):
    """A loss whose critic sees next to nothing, and whose student always says the same."""
    options = {"objective": "infonce", "temperature": 100.0, **options}
    # Of so many samples hardly one is drawn as its own negative.
    criterion = make(kind=kind, num_samples=4000, direction="both", **options)
    with torch.no_grad():
        criterion.student_head.linear.weight.mul_(1e-4)
        criterion.student_head.linear.bias.fill_(1.0)
    return criterion


def messages(criterion, steps, values=None):
    """What training steps say, {step: texts}."""
    said = {}
    for step in range(1, steps + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            criterion(*(batch(step) if values is None else values))
        if caught:
            assert all(w.filename == __file__ for w in caught)
            said[step] = [str(w.message) for w in caught]
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_collapsed_steps_warn_once(kind):
    criterion = collapsed(kind)
    said = messages(criterion, 100)
    assert list(said) == [100] and len(said[100]) == 1
    assert (
        COLLAPSED in said[100][0] and "at step 100, as in every look since step 1" in said[100][0]
    )
    assert not messages(criterion, 100)
    # And diagnostics has nothing new to say.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert criterion.diagnostics()["flat_steps"] == 199


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_loss_says_nothing_and_looks_change_nothing(kind):
    quiet, watched = make(kind=kind, check_every=None), make(kind=kind, check_every=1)
    for step in range(12):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(watched(*batch(step)), quiet(*batch(step)))
    assert same_state(quiet, watched)
    assert not any("check" in name or "look" in name for name in watched.state_dict())


def test_no_looks_are_made_without_check_every():
    criterion = collapsed(check_every=None)
    assert not messages(criterion, 101) and criterion._flat is None
    criterion.check_every = 5
    assert list(messages(criterion, 10)) == [5]


def test_evaluation_is_no_training_step(monkeypatch):
    criterion = collapsed(check_every=1)
    criterion(*batch(0))
    monkeypatch.setattr(diagnostics, "look", None)
    criterion(*batch(0), update=False)
    criterion.eval()(*batch(0))


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "often"])
def test_check_every_is_checked(value):
    with pytest.raises(ValueError, match=r"CRRCDLoss: check_every: expected a positive integer"):
        make(check_every=value)


def with_variance(monkeypatch, variances):
    """Looks see a relation of these variances, one after another, and a loss that tells nothing."""
    of = iter(variances)

    def values(self, criterion):
        seen = VALUES(self, criterion)
        variance = next(of)
        level = seen["no_information_loss"]
        return {**seen, "relation_variance": variance, "loss": level}

    monkeypatch.setattr(diagnostics.Look, "values", values)


def test_a_late_start_that_grows_is_no_collapse(monkeypatch):
    with_variance(monkeypatch, [1e-7, 1e-6, 1e-5, 1.0])
    assert not messages(make(check_every=50), 150)
    with_variance(monkeypatch, [1e-6, 1e-6, 1.5e-6, 1e-2])
    assert list(messages(make(check_every=50), 150)) == [100]


def test_resumed_runs_and_copies_go_on_with_their_looks():
    whole = collapsed(check_every=50)
    messages(whole, 40)
    resumed = collapsed(check_every=50)
    resumed.load_state_dict(whole.state_dict())
    assert resumed._flat == whole._flat
    twin = copy.deepcopy(whole)
    assert list(messages(whole, 60)) == [60]
    assert list(messages(twin, 60)) == [60]
    (text,) = messages(resumed, 100)[100]
    assert "at step 140, as in every look since step 1:" in text


def test_a_single_sample_is_not_looked_at():
    criterion = make(kind="crd", objective="infonce", temperature=100.0, check_every=3)
    student, teacher, index = batch(0)
    one = student[:1], teacher[:1], index[:1]
    assert not messages(criterion, 7, one) and criterion._since_look is None
    assert not messages(criterion, 1) and criterion._since_look == 1
    assert not messages(criterion, 7, one) and criterion._flat is None


def test_a_step_to_skip_is_not_looked_at():
    criterion = collapsed(nonfinite="skip", check_every=100)
    student, teacher, index = batch(0)
    messages(criterion, 99)
    flat = criterion._flat
    assert not messages(criterion, 1, (student * torch.nan, teacher, index))
    assert criterion._flat == flat and flat is not None


def test_numbers_that_have_not_come_are_read_later(monkeypatch):
    """As on a GPU: a step asks whether they are there, and goes on where they are not."""
    ready, waited = [], []

    def synchronize():
        ready.append(1)
        waited.append(1)

    event = SimpleNamespace(query=lambda: bool(ready), synchronize=synchronize)
    real = diagnostics.look

    def look(*arguments, **options):
        return real(*arguments, **options)._replace(copied=event)

    monkeypatch.setattr(diagnostics, "look", look)
    criterion = collapsed(check_every=100)
    assert not messages(criterion, 100)
    ready.append(1)
    said = messages(criterion, 1)
    assert list(said) == [1] and "at step 100, as in every look since step 100" in said[1][0]
    assert not waited
    ready.clear()
    messages(criterion, 99)
    last = criterion._look
    assert last is not None and copy.deepcopy(criterion)._look is None
    criterion.diagnostics()
    assert waited and criterion._look is None and criterion._flat is not None


def test_a_loss_that_is_not_finite_is_named():
    criterion = make(check_every=10, learnable_temperature=True)
    messages(criterion, 5)
    with torch.no_grad():
        criterion.log_scale.fill_(torch.nan)
    said = messages(criterion, 30)
    assert list(said) == [5] and len(said[5]) == 1
    assert "the loss is nan at step 10, though features are checked" in said[5][0]


def test_steps_without_negatives_are_named():
    criterion = make(exclude_similar=-0.999, check_every=10)
    said = messages(criterion, 20)
    assert list(said) == [10] and "has masked every negative in 10 of 10 steps" in said[10][0]


def test_compiled_steps_do_not_look_and_are_not_compiled_anew():
    torch._dynamo.reset()
    criterion = collapsed(check_every=2)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    compiled(*batch(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert not messages(compiled, 5)
    assert criterion._since_look is None
