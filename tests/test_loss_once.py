"""A step that would be run twice, or whose changes would be lost, is refused before it begins."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.losses import DS, DT, KINDS, B, N, batch, make, same_state
from torch import nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from crrcd_ext.compat import repdistiller

REFUSED = r"crrcd_ext\.{}: update: expected a step outside of a backward pass, got one within: run"


def backward(criterion, run):
    student, teacher, index = batch(1)
    student.requires_grad_()
    loss = run(criterion, student, teacher, index)
    loss.backward()
    gradients = [p.grad.clone() for p in criterion.parameters() if p.grad is not None]
    return loss.detach(), [student.grad, *gradients]


def whole(criterion, *values, **options):
    return criterion(*values, **options)


def within(criterion, *values, **options):
    """The criterion as a part of what is checkpointed."""
    return 2 * criterion(values[0] * 3, *values[1:], **options).square()


# ---------------------------------------------------------------------- checkpoint


@pytest.mark.parametrize("part", [whole, within])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_a_checkpoint_repeats_is_refused(kind, use_reentrant, part):
    criterion = make(kind=kind, direction="both", keys="bank")
    criterion(*batch(0))
    expected = copy.deepcopy(criterion)
    part(expected, *batch(1))

    def run(criterion, *values):
        return checkpoint(part, criterion, *values, use_reentrant=use_reentrant)

    with pytest.raises(RuntimeError, match=REFUSED.format(criterion.NAME)):
        backward(criterion, run)
    # The first run was a step like any other; the second has changed nothing.
    assert same_state(criterion, expected)


def test_a_micro_batch_that_a_checkpoint_repeats_is_refused():
    criterion, expected = make(kind="crd"), make(kind="crd")

    def run(criterion, *values):
        options = {"use_reentrant": False}
        return checkpoint(lambda *x: whole(criterion, *x, update="later"), *values, **options)

    with pytest.raises(RuntimeError, match=REFUSED.format("CRDLoss")):
        backward(criterion, run)
    expected(*batch(1))
    criterion.commit()
    assert same_state(criterion, expected)


@pytest.mark.parametrize("part", [whole, within])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_repeats_what_changes_nothing(kind, use_reentrant, part):
    criterion = make(kind=kind, direction="both", keys="live")
    criterion(*batch(0))
    twin = copy.deepcopy(criterion)

    def run(criterion, *values):
        options = {"use_reentrant": use_reentrant}
        return checkpoint(lambda *x: part(criterion, *x, update=False), *values, **options)

    loss, gradients = backward(criterion, run)
    expected, those = backward(twin, lambda *x: part(*x, update=False))
    assert torch.equal(loss, expected) and same_state(criterion, twin)
    assert all(torch.equal(a, b) for a, b in zip(gradients, those, strict=True))


def test_a_compiled_step_that_a_checkpoint_repeats_is_refused():
    torch._dynamo.reset()
    criterion = make(normalizer=2.0)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=REFUSED.format("CRRCDLoss")):
        backward(compiled, lambda c, *x: checkpoint(c, *x, use_reentrant=False))
    assert int(criterion.step) == 1


@pytest.mark.parametrize("kind", ["CRDLoss", "CRCDLoss"])
def test_the_public_codes_losses_refuse_it_too(kind):
    opt = SimpleNamespace(s_dim=DS, t_dim=DT, feat_dim=8, n_data=N, nce_k=4, nce_t=0.1, nce_m=0.5)
    criterion = getattr(repdistiller, kind)(opt)

    def run(criterion, *values):
        return checkpoint(criterion, *values, use_reentrant=False).sum()

    with pytest.raises(RuntimeError, match=REFUSED.format(f"compat.repdistiller.{kind}")):
        backward(criterion, run)
    assert int(criterion.contrast.step) == 1


def test_a_student_may_be_checkpointed():
    body, criterion = nn.Linear(DS, DS), make()
    twin = copy.deepcopy(criterion)
    loss, gradients = backward(
        criterion, lambda c, s, *rest: c(checkpoint(body, s, use_reentrant=False), *rest)
    )
    expected, those = backward(twin, lambda c, s, *rest: c(body(s), *rest))
    assert torch.equal(loss, expected) and same_state(criterion, twin)
    assert all(torch.equal(a, b) for a, b in zip(gradients, those, strict=True))


# ---------------------------------------------------------------------- several processes, replicas


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(DS, DS)
        self.criterion = make()

    def forward(self, student, *rest, **options):
        return self.criterion(self.body(student), *rest, **options)


def ignoring(model):
    names = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model)


def own_buffers(model):
    return DistributedDataParallel(model, broadcast_buffers=False)


def apart(model):
    body, criterion = DistributedDataParallel(model.body), own_buffers(model.criterion)
    return lambda student, *rest: criterion(body(student), *rest)


def on_rank(rank, folder):
    """What each of two processes sees, of ids that no other has; written to ``folder``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    student, teacher, _ = batch(rank)
    index = torch.arange(B) + 20 * rank
    seen = {}
    for wrap in (own_buffers, ignoring, apart):
        model = Model()
        start = model.criterion.teacher_bank.rows.clone()
        step = wrap(model)
        for _ in range(2):
            step(student, teacher, index).backward()
        changed = (model.criterion.teacher_bank.rows != start).any(1).nonzero().flatten()
        gradient = model.criterion.cross_relation.weight.grad
        seen[wrap.__name__] = changed.tolist(), gradient
    model = Model()
    before = {n: b.clone() for n, b in model.criterion.named_buffers()}
    wrapped = DistributedDataParallel(model)
    for update in (True, None):
        try:
            wrapped(student, teacher, index, update=update)
        except RuntimeError as error:
            seen["refused"] = str(error)
    wrapped(student, teacher, index, update=False).backward()
    seen["unchanged"] = all(torch.equal(b, before[n]) for n, b in model.criterion.named_buffers())
    torch.save(seen, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_ranks_keep_their_banks_or_are_told(tmp_path):
    spawn(on_rank, (str(tmp_path),), nprocs=2)
    of_ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for way in ("own_buffers", "ignoring", "apart"):
        for rank, seen in enumerate(of_ranks):
            assert seen[way][0] == [row + 20 * rank for row in range(B)], (way, rank)
        assert torch.equal(of_ranks[0][way][1], of_ranks[1][way][1]), way
    for seen in of_ranks:
        assert "CRRCDLoss: expected buffers that are a process's own" in seen["refused"]
        assert "broadcast_buffers=False" in seen["refused"] and seen["unchanged"]


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_of_data_parallel_are_refused(kind):
    criterion = make(kind=kind)
    replica = criterion._replicate_for_data_parallel()
    for name, parameter in criterion.named_parameters(recurse=False):
        setattr(replica, name, parameter)
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(RuntimeError, match="got a replica of DataParallel, whose banks"):
        replica(*batch(0))
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    assert torch.isfinite(replica(*batch(0), update=False))
