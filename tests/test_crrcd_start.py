"""How CRRCDLoss starts: as one space for teacher and student, which no seed leads to a collapse."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from crrcd_ext import CRRCDLoss
from crrcd_ext.modules import diagnostics
from crrcd_ext.modules.normalizer import log_mean_exp_logit

N, CLASSES, D = 128, 16, 64


def make(student_dim=D, teacher_dim=D, **options):
    return CRRCDLoss(student_dim, teacher_dim, N, **{"negatives": 64, **options})


class Run:
    """A small student, trained by the loss alone to see what the teacher saw.

    Its features start as those of networks do: much that is common to all samples, and little that
    is not.
    """

    def __init__(self, seed, **options):
        torch.manual_seed(seed)
        self.criterion = make(D, D, **options)
        labels = torch.arange(N) % CLASSES
        self.teacher = torch.randn(CLASSES, D)[labels] + torch.randn(N, D)
        self.inputs = self.teacher @ torch.randn(D, 12) / 6 + 0.3 * torch.randn(N, 12)
        self.student = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, D))
        nn.init.normal_(self.student[2].bias, std=2)
        self.criterion.fill(torch.arange(N), self.teacher)
        groups = [{"params": self.student.parameters(), "lr": 0.05}]
        groups += self.criterion.parameter_groups(0.05)
        self.optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)

    def step(self):
        index = torch.randperm(N)[:32]
        loss = 4 * self.criterion(self.student(self.inputs[index]), self.teacher[index], index)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def looks(self, steps=40, every=10):
        """What diagnostics says every ten steps."""
        found = []
        for step in range(1, steps + 1):
            self.step()
            if step % every == 0:
                found.append(self.criterion.diagnostics())
        return found


# The student is to reach the teacher's own space: nothing is standardised and no head in between.
SAME_SPACE = {"head": "identity", "standardize": False, "negatives": "all"}
OLD = {"init": "gaussian", "hidden_dim": 128, "relation_dim": 128}


@pytest.mark.parametrize("options", [SAME_SPACE, {}], ids=["same space", "defaults"])
def test_no_seed_of_thirty_collapses(options):
    for seed in range(30):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            looks = Run(seed, **options).looks()
        for values in looks[1:]:
            assert values["relation_variance"] > diagnostics.variance_floor(D), (seed, values)
        last = looks[-1]
        assert last["flat_steps"] == 0 and last["loss"] < 0.85 * last["no_information_loss"], seed
        assert last["positive_cosine"] > last["negative_cosine"] + 0.1, seed


def test_the_old_start_is_late_and_no_collapse():
    for seed in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            looks = Run(seed, **SAME_SPACE, **OLD).looks()
        # This is where the other start is above the floor, or the test above could not fail.
        assert looks[1]["relation_variance"] < diagnostics.variance_floor(128)
        assert looks[-1]["variance_growth"] > 1


def offsets(**options):
    """log Zbar of a first batch, and what a student would give that had reached its teacher."""
    run = Run(0, **options)
    index = torch.arange(0, N, 4)
    run.criterion(run.student(run.inputs[index]), run.teacher[index], index)
    last = run.criterion._last
    assert last.loss.isfinite()
    (side,) = run.criterion._sides(last._replace(student=last.teacher[:, : last.student.shape[1]]))
    side.arguments["query"] = side.arguments["positive"]
    there = log_mean_exp_logit(run.criterion._cosines(side), run.criterion.scale(), N)
    return float(run.criterion.log_zbar[0]), float(there)


def test_the_first_batch_gives_the_zbar_of_the_teachers_space():
    # Then the student needs no other beta on its way than the one that it starts with. Of two
    # independent draws the relations are strangers: Zbar is that of chance, and beta holds the
    # student where it tells nothing apart.
    start, there = offsets()
    assert abs(start - there) < 2
    start, there = offsets(**OLD)
    assert there - start > 4


@pytest.mark.parametrize("head", ["linear", "identity"])
def test_both_modules_start_as_one(head):
    criterion = make(16, 16, embedding_dim=8, head=head)
    width = 8 if head == "linear" else 16
    cross, teacher = criterion.cross_relation, criterion.teacher_relation
    assert cross.weight.shape == (width, 2 * width)
    for ours, theirs in zip(cross.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    assert all(p.requires_grad for p in cross.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("student_dim", [3, 5, 9])
def test_of_other_widths_the_student_counts_as_padded(student_dim):
    criterion = make(student_dim, 5, head="identity").double()
    width = max(student_dim, 5)
    assert criterion.cross_relation.weight.shape == (width, 2 * width)
    anchor, sample = (torch.randn(n, 5, dtype=torch.float64) for n in (4, 6))
    shown = torch.zeros(6, student_dim, dtype=torch.float64)
    common = min(student_dim, 5)
    shown[:, :common] = sample[:, :common]
    cut = sample.clone()
    cut[:, common:] = 0
    torch.testing.assert_close(
        criterion.cross_relation(anchor, shown), criterion.teacher_relation(anchor, cut)
    )


def test_a_gaussian_start_repeats_the_draws_of_version_0_1():
    torch.manual_seed(3)
    criterion = make(4, 5, embedding_dim=6, hidden_dim=7, relation_dim=8, init="gaussian")
    torch.manual_seed(3)
    expected = [nn.Linear(4, 6).weight, nn.Linear(5, 6).weight]
    for _ in range(2):
        expected += [torch.empty(7, 6).normal_(), torch.empty(7, 6).normal_()]
        expected.append(torch.empty(8, 7).normal_(std=math.sqrt(2 / 7)))
    teacher, cross = criterion.teacher_relation, criterion.cross_relation
    got = [criterion.student_head.linear.weight, criterion.teacher_head.linear.weight]
    for module in (teacher, cross):
        got += [module.anchor_weight, module.sample_weight, module.weight]
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_the_old_start_goes_on_or_names_its_sizes():
    old = make(**OLD)
    run = Run(0, **OLD)
    for _ in range(3):
        run.step()
    state = copy.deepcopy(run.criterion.state_dict())
    assert state.keys() == old.state_dict().keys()
    new = make(hidden_dim=128, relation_dim=128)
    new.load_state_dict(state)
    batch = run.student(run.inputs[:8]), run.teacher[:8], torch.arange(8)
    assert torch.equal(new(*batch), run.criterion(*batch))
    new = make()
    before = copy.deepcopy(new.state_dict())
    text = r"expected relation_dim=128, hidden_dim=256, got relation_dim=128, hidden_dim=128 in the"
    with pytest.raises(RuntimeError, match=text):
        new.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in new.state_dict().items())


def test_start_errors():
    with pytest.raises(ValueError, match="CRRCDLoss: init: expected one of 'mirrored', 'gaussian'"):
        make(init="orthogonal")
    with pytest.raises(ValueError, match=r"CRRCDLoss: hidden_dim: expected 2 or more .*'gaussian'"):
        make(hidden_dim=1)
