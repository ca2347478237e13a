"""Tensors of the device itself, through the public functions and modules.

What the operators compute there is tested by the operators' tests, see helpers/on_device.py. The
same code runs on the CPU, so that it is right before there is a GPU.
"""

from __future__ import annotations

import pytest
import torch
from helpers import on_device
from helpers.cases import (
    BACKENDS,
    assert_close,
    cast,
    make,
    make_difference,
    make_instance,
    moved,
    run,
)
from helpers.cases import truth as truth_of
from helpers.on_device import ON_DEVICE, placed

import crrcd_ext
from crrcd_ext import _backend, functional

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
OPERATORS = {
    "relation_nce": lambda **o: make(5, 6, 40, ids=True, **o),
    "difference_nce": lambda **o: make_difference(5, 6, 40, ids=True, **o),
    "instance_nce": lambda **o: make_instance(6, 40, ids=True, **o),
}
each_device = pytest.mark.parametrize("device", DEVICES)
each_operator = pytest.mark.parametrize("operator", OPERATORS)


def back(result: dict) -> dict:
    return {k: v.cpu() for k, v in result.items()}


@each_device
@each_operator
@pytest.mark.parametrize("objective", ["nce", "infonce"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operators_on_tensors_of_the_device(device, operator, objective, dtype):
    case = cast(OPERATORS[operator](objective=objective), dtype)
    got = run(moved(case, device), "auto")
    assert got["loss"].device.type == device
    assert all(got[k].device.type == device for k in got)
    tolerance = {torch.float64: 1e-10, torch.float32: 5e-5}.get(dtype, 5e-2)
    assert_close(back(got), truth_of(case), tolerance, run(case, "reference"))


@each_device
def test_auto_takes_the_devices_own_kernels(device):
    for operator in OPERATORS:
        chosen = _backend.resolve(operator, None, torch.device(device))
        able = device in BACKENDS or f"on_{device}" in ON_DEVICE
        assert chosen == (device if able else "reference")


@each_device
@each_operator
def test_autocast(device, operator):
    case = cast(OPERATORS[operator](), torch.float32)
    expected = run(moved(cast(case, torch.bfloat16), device), "auto", wanted=("query",))
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run(moved(case, device), "auto", wanted=("query",))
    assert_close(back(got), back(expected), 2e-2)


@each_device
def test_update(device):
    bank = torch.nn.functional.normalize(torch.randn(30, 7), dim=1)
    index, value = torch.tensor([3, 9, 3]), torch.randn(3, 7)
    expected, got = bank.clone(), bank.to(device, copy=True)
    functional.bank_update_(expected, index, value, momentum=0.5, backend="reference")
    functional.bank_update_(got, index.to(device), value.to(device), momentum=0.5)
    torch.testing.assert_close(got.cpu(), expected)


@each_device
@pytest.mark.parametrize("kind", ["CRRCDLoss", "CRCDLoss", "CRDLoss"])
def test_training_steps(device, kind):
    """Two steps of a loss on the device give what the CPU's reference gives."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(6, width, generator=generator) for width in (5, 7))
    index = torch.arange(6)
    losses = {}
    for place, backend in (("cpu", "reference"), (device, "auto")):
        torch.manual_seed(0)
        criterion = getattr(crrcd_ext, kind)(
            5, 7, 40, embedding_dim=8, negatives=12, backend=backend
        ).to(place)
        inputs = student.to(place, copy=True).requires_grad_(), teacher.to(place), index.to(place)
        losses[backend] = []
        for _ in range(2):
            loss = criterion(*inputs)
            loss.backward()
            losses[backend].append(float(loss.detach()))
        assert inputs[0].grad.isfinite().all() and inputs[0].grad.device.type == place
    assert losses["auto"] == pytest.approx(losses["reference"], rel=1e-4)


@pytest.mark.skipif(not ON_DEVICE, reason="no GPU with a backend of its own")
class TestGpu:
    @each_operator
    def test_a_stream_of_the_callers(self, operator):
        case = moved(cast(OPERATORS[operator](), torch.float32), "cuda")
        expected = run(case, "auto", wanted=("query",))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = run(case, "auto", wanted=("query",))
        stream.synchronize()
        assert_close(back(got), back(expected), 1e-5)

    @pytest.mark.parametrize("index", ["own", "shared"])
    def test_nothing_waits_for_the_device(self, index):
        case = moved(cast(make_instance(6, 40, index=index), torch.float32), "cuda")
        run(case, "cuda", wanted=("query",))
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(case, "cuda", wanted=("query",))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("index", ["own", "shared"])
    def test_a_graph_can_be_captured(self, index):
        case = moved(cast(make_instance(6, 40, index=index), torch.float32), "cuda")
        expected = functional.instance_nce(**case, backend="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = functional.instance_nce(**case, backend="cuda")
        case["query"].neg_()
        graph.replay()
        assert not torch.equal(loss, expected)
        torch.testing.assert_close(loss, functional.instance_nce(**case, backend="cuda"))

    def test_tensors_on_two_devices_are_refused(self):
        case = cast(make_instance(), torch.float32)
        case["query"] = case["query"].cuda()
        with pytest.raises(ValueError, match=r"crrcd_ext\.instance_nce: .*: expected"):
            functional.instance_nce(**case)


# --------------------------------------------------------------------- the way to the device itself


@pytest.fixture(scope="module")
def through():
    """Backend "on_test": the CPU's kernels reached as a device's are."""
    if "cpu" not in BACKENDS:
        pytest.skip("no compiled backend")
    on_device.register("on_test", "cpu", "cpu")
    yield "on_test"
    del _backend.COMPILED["on_test"]


def test_a_placed_tensor_is_the_same_view():
    memory = torch.arange(60.0)
    for view in (memory, memory[3:], memory.view(6, 10).T[2:, ::2], memory[:1].expand(4, 5)):
        copy = placed(view, "cpu")
        assert torch.equal(copy, view) and copy.stride() == view.stride()
        assert copy.data_ptr() != view.data_ptr()
        size = copy.element_size()
        assert copy.storage_offset() == view.data_ptr() % on_device.PLACE // size
    assert placed(memory[:0], "cpu").shape == (0,)


@each_operator
def test_operators_through_a_device(through, operator):
    case = OPERATORS[operator]()
    expected, got = (run(case, backend) for backend in ("cpu", through))
    assert_close(got, expected, 1e-13)  # elsewhere in memory sums may be taken in another order


def test_what_the_device_changed_comes_back(through):
    case = make_instance(index="shared")
    case["update"] = (torch.tensor([3, 1]), torch.randn(2, 8).double(), 0.5)
    banks = []
    for backend in ("cpu", through):
        wide = torch.full((13, 11), -7.0).double()
        wide[:, 1:9] = case["bank"]
        version = wide._version
        functional.instance_nce(**{**case, "bank": wide[:, 1:9]}, backend=backend)
        assert wide._version > version
        banks.append(wide)
    assert torch.equal(*banks)
    assert not torch.equal(banks[0][:, 1:9], case["bank"])
