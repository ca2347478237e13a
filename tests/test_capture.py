"""What a captured CUDA graph would keep by mistake is refused; capture itself: test_device.py.

Where there is no GPU, operands that claim to be on one are checked, and torch's question whether
something is captured is answered by the test.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers.cases import cast, make, make_difference, make_instance
from torch._subclasses import FakeTensorMode

import crrcd_ext
from crrcd_ext import _check, functional
from crrcd_ext.compat import repdistiller
from crrcd_ext.modules import _buffers, _checks, queue, step

OPERATORS = {
    "relation_nce": make,
    "difference_nce": make_difference,
    "instance_nce": make_instance,
}
NUMBERS = ("scale", "offset")


@pytest.fixture
def captured(monkeypatch):
    """Something is captured on every GPU, and there is one."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.parametrize("argument", NUMBERS)
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton", "reference"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_number_on_the_cpu_is_refused(captured, operator, backend, argument):
    case = cast(OPERATORS[operator](), torch.float32)
    number = case[argument]
    with FakeTensorMode():
        there = {
            k: torch.empty(v.shape, dtype=v.dtype, device="cuda")
            if isinstance(v, torch.Tensor)
            else v
            for k, v in case.items()
        }
    message = (
        rf"crrcd_ext\.{operator}: {argument}: expected a tensor on cuda:0, or a number, while a "
        "CUDA graph is captured, got a tensor on cpu"
    )
    with pytest.raises(ValueError, match=message):
        getattr(functional, operator)(**{**there, argument: number}, backend=backend)


def test_numbers_and_tensors_of_the_device_are_taken(captured):
    there = SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True)
    with FakeTensorMode():
        on_device = torch.empty((), device="cuda")
    for x in (2, 2.0, on_device):
        _check.check_scalar("instance_nce", "scale", x, there)


def test_outside_of_a_graph_a_number_on_the_cpu_is_taken(captured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    there = SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True)
    _check.check_scalar("instance_nce", "scale", torch.tensor(2.0), there)


@pytest.mark.parametrize("operator", OPERATORS)
def test_nobody_asks_for_operands_on_the_cpu(monkeypatch, operator):
    def asked():
        raise AssertionError("asked whether a graph is captured")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    getattr(functional, operator)(**OPERATORS[operator](), backend="reference")


# ------------------------------------------------------------------------------------- the modules


@pytest.fixture
def modules_captured(monkeypatch):
    """Begins the capture: for modules on the CPU, as if they were on a GPU."""

    def begin():
        for module in (_buffers, _checks, queue, step):
            monkeypatch.setattr(module, "capturing", lambda _: True)

    return begin


def batch() -> tuple:
    generator = torch.Generator().manual_seed(5)
    features = (torch.randn(6, width, generator=generator) for width in (5, 7))
    return *features, torch.arange(6)


@pytest.mark.parametrize("options", [{}, {"direction": "both"}, {"capacity": 10}], ids=str)
@pytest.mark.parametrize("kind", ["CRRCDLoss", "CRCDLoss", "CRDLoss"])
def test_zbar_has_to_be_there_before_capture(modules_captured, kind, options):
    make_loss = getattr(crrcd_ext, kind)
    criterion = make_loss(5, 7, 40, embedding_dim=8, negatives=4, backend="reference", **options)
    modules_captured()
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    message = (
        rf"crrcd_ext\.{kind}: normalizer: expected a training step, whose batch gives Zbar, before "
        "a CUDA graph is captured, got none"
    )
    for training in (True, False):
        with pytest.raises(RuntimeError, match=message):
            criterion.train(training)(*batch())
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


@pytest.mark.parametrize("normalizer", ["first_batch", "none", 0.5])
def test_a_step_may_be_captured_once_zbar_is_known(modules_captured, normalizer):
    criterion = crrcd_ext.CRDLoss(
        5, 7, 40, embedding_dim=8, negatives=4, normalizer=normalizer, backend="reference"
    )
    if normalizer == "first_batch":
        criterion(*batch())
    modules_captured()
    assert criterion(*batch()).isfinite()


@pytest.mark.parametrize("kind", ["CRDLoss", "CRCDLoss"])
def test_the_public_codes_constants_have_to_be_there_before_capture(modules_captured, kind):
    opt = SimpleNamespace(s_dim=5, t_dim=7, feat_dim=8, n_data=40, nce_k=4, nce_t=0.1, nce_m=0.5)
    criterion = getattr(repdistiller, kind)(opt)
    modules_captured()
    message = (
        rf"repdistiller\.{kind}: f_s, f_t: expected a step, whose batch gives the normalising "
        "constants, before a CUDA graph is captured, got none"
    )
    with pytest.raises(RuntimeError, match=message):
        criterion(*batch())
    assert criterion.contrast.normalized == (False, False)


def test_a_micro_batch_is_not_captured(modules_captured):
    criterion = crrcd_ext.CRDLoss(5, 7, 40, embedding_dim=8, negatives=4, normalizer="none")
    modules_captured()
    message = "CRDLoss: update: expected a step, or none, while a CUDA graph is captured, got 'la"
    with pytest.raises(RuntimeError, match=message):
        criterion(*batch(), update="later")
    assert criterion._waiting is None


def test_a_queue_does_not_count_what_is_only_captured(modules_captured):
    bank = crrcd_ext.MemoryQueue(8, 3)
    bank.update_(torch.arange(4), torch.randn(4, 3))
    modules_captured()
    bank.update_(torch.arange(4), torch.randn(4, 3))
    assert not bank.full


def test_a_table_of_classes_stays_where_it_is():
    table = crrcd_ext.ClassTable(torch.tensor([2, 0, 1, 0]))
    places = [x.data_ptr() for x in table.buffers()]
    table.set_(torch.tensor([0, 1, 1, 2]))
    assert [x.data_ptr() for x in table.buffers()] == places
    assert table.label.tolist() == [0, 1, 1, 2] and table.order.tolist() == [0, 1, 2, 3]
    table.set_(torch.tensor([1, 0]))
    assert table.label.tolist() == [0, 1] and table.place.tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["CRRCDLoss", "CRCDLoss", "CRDLoss"])
@pytest.mark.parametrize("learnable", [False, True])
def test_modules_hand_over_numbers_or_tensors_of_their_device(monkeypatch, kind, learnable):
    """A tensor of another device would keep torch.compile from making CUDA graphs."""
    make_loss = getattr(crrcd_ext, kind)
    criterion = make_loss(
        5,
        7,
        40,
        embedding_dim=8,
        negatives=4,
        learnable_temperature=learnable,
        learnable_offset=learnable,
        backend="reference",
    )
    criterion(*batch())
    handed = {}

    def operator(**arguments):
        handed.update(arguments)
        raise StopIteration

    monkeypatch.setattr(make_loss, "OPERATOR", staticmethod(operator))
    criterion.to("meta")  # to no CPU, and to a device that is everywhere
    with pytest.raises(StopIteration):
        criterion(*(x.to("meta") for x in batch()))
    for argument in NUMBERS:
        x = handed[argument]
        assert not isinstance(x, torch.Tensor) or x.device == handed["query"].device
