"""Tensors of the device itself, through the public functions and modules.

What the operators compute there is tested by the operators' tests, see helpers/on_device.py. The
same code runs on the CPU, so that it is right before there is a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

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
from helpers.process import python

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
each_loss = pytest.mark.parametrize("kind", ["CRRCDLoss", "CRCDLoss", "CRDLoss"])


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
@each_loss
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


@pytest.fixture(params=["cuda", "triton"])
def kernels(request) -> str:
    """A backend with kernels for the GPU."""
    if f"on_{request.param}" not in ON_DEVICE:
        pytest.skip(f"backend {request.param!r} cannot run here")
    return request.param


def captured(step: Callable[[], tuple]) -> tuple[torch.cuda.CUDAGraph, tuple]:
    """What a step leaves, and the graph that makes it anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are loaded, and libraries take their memory
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


# Of 13 rows the 13th: the case, the argument that names it, and what stderr says.
OUTSIDE = {
    "relation_nce": ("make()", "index", "relation_nce: index"),
    "difference_nce shared": ("make_difference(index='shared')", "index", "difference_nce: index"),
    "difference_nce own": ("make_difference()", "index", "difference_nce: index"),
    "instance_nce shared": ("make_instance(index='shared')", "index", "instance_nce: index"),
    "instance_nce own": ("make_instance()", "index", "instance_nce: index"),
    "instance_nce wide": ("make_instance(D=4100)", "index", "instance_nce: index"),
    "an update": ("make_instance()", "update", r"(bank_update_: index|instance_nce: update index)"),
}
SCRIPT = """
import sys
import torch
from crrcd_ext import functional
from helpers.cases import cast, make, make_difference, make_instance

case = cast({case}, torch.float32)
case = {{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.items()}}
bank, wrong = case["bank"], {wrong!r}
if wrong == "update":
    index = torch.tensor([3, 13], device="cuda")
    case["update"] = index, torch.ones(2, bank.shape[1], device="cuda"), 0.5
elif wrong:
    case[wrong] = case[wrong].clone()
    case[wrong][(-1,) * case[wrong].dim()] = 13
else:
    torch._assert_async(torch.zeros(1, device="cuda"), "somebody else's")
try:
    loss = functional.{operator}(**case, backend={backend!r})
    torch.cuda.synchronize()
    print("returned", float(loss))
except RuntimeError as error:
    print("raised", error)
try:
    print("the bank is there", float(bank.sum()))
except RuntimeError:
    print("the bank is lost")
torch.cuda.synchronize()
"""


@pytest.mark.skipif(not ON_DEVICE, reason="no GPU with a backend of its own")
class TestGpu:
    @pytest.mark.parametrize("what", OUTSIDE)
    def test_a_row_outside_of_the_bank_ends_the_process(self, kernels, what):
        """No loss comes back. What users see: CUDA's text of an assertion, and torch's error."""
        case, wrong, text = OUTSIDE[what]
        operator = "instance_nce" if wrong == "update" else what.split()[0]
        names = {"case": case, "wrong": wrong, "operator": operator}
        done = python(SCRIPT.format(**names, backend=kernels))
        assert done.returncode != 0 and "returned" not in done.stdout, done
        assert "raised" in done.stdout and "device-side assert" in done.stdout, done
        assert "the bank is lost" in done.stdout, done
        message = rf"crrcd_ext\.{text}: expected rows of the bank in \[0, (N|13)\)"
        assert re.search(message, done.stderr), done

    def test_the_errors_of_others_are_not_taken_for_ours(self, kernels):
        names = {"case": "make_instance()", "wrong": "", "operator": "instance_nce"}
        done = python(SCRIPT.format(**names, backend=kernels))
        assert "somebody else's" in done.stderr, done
        assert "raised" in done.stdout and "returned" not in done.stdout, done
        if "crrcd_ext: kernel" in done.stdout:
            assert "something earlier has failed" in done.stdout, done

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

    @each_operator
    @pytest.mark.parametrize("objective", ["nce", "infonce"])
    def test_nothing_waits_for_the_device(self, kernels, operator, objective):
        case = moved(cast(OPERATORS[operator](objective=objective), torch.float32), "cuda")
        run(case, kernels)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(case, kernels)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @each_operator
    @pytest.mark.parametrize("objective", ["nce", "infonce"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_graph_can_be_captured(self, kernels, operator, objective, dtype):
        """Replayed, it sees other operands, another scale and another offset."""
        case = moved(cast(OPERATORS[operator](objective=objective), dtype), "cuda")
        function = getattr(functional, operator)
        leaves = [case[k].requires_grad_() for k in ("query", "scale", "offset")]

        def step() -> tuple:
            loss = function(**case, backend=kernels)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        graph, results = captured(step)
        graph.replay()
        before = [x.clone() for x in results]
        with torch.no_grad():
            case["query"].neg_()
            case["scale"].mul_(0.5)
            case["offset"].add_(1)
        graph.replay()
        torch.testing.assert_close(results, step())
        assert not torch.equal(results[0], before[0])

    @each_operator
    @pytest.mark.parametrize("argument", ["scale", "offset"])
    def test_a_number_on_the_cpu_is_refused_while_a_graph_is_captured(
        self, kernels, operator, argument
    ):
        case = moved(cast(OPERATORS[operator](), torch.float32), "cuda")
        case[argument] = case[argument].cpu()
        function = getattr(functional, operator)
        function(**case, backend=kernels)
        message = rf"crrcd_ext\.{operator}: {argument}: expected a tensor on cuda:0, or a number"
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(ValueError, match=message):
            function(**case, backend=kernels)
        number = float(case[argument])
        graph, (loss,) = captured(
            lambda: (function(**{**case, argument: number}, backend=kernels),)
        )
        graph.replay()
        torch.testing.assert_close(loss, function(**case, backend=kernels))

    @each_loss
    @pytest.mark.parametrize("options", [{}, {"capacity": 20}], ids=str)
    def test_replayed_steps_are_eager_steps(self, kernels, kind, options):
        """Bank, sampler and statistics go on from replay to replay as from step to step."""
        torch.manual_seed(0)
        batches = [(torch.randn(6, 5), torch.randn(6, 7), torch.randint(40, (6,))) for _ in "123"]
        inputs = tuple(x.cuda() for x in batches[0])
        torch.manual_seed(1)
        made = getattr(crrcd_ext, kind)
        replayed = made(5, 7, 40, embedding_dim=8, negatives=12, backend=kernels, **options).cuda()
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="Zbar"):
            replayed(*inputs)
        replayed(*inputs)  # gives Zbar
        graph, (loss,) = captured(lambda: (replayed(*inputs).detach(),))
        eager = made(5, 7, 40, embedding_dim=8, negatives=12, backend=kernels, **options).cuda()
        eager.load_state_dict(replayed.state_dict())
        for batch in batches:
            for static, x in zip(inputs, batch, strict=True):
                static.copy_(x)
            graph.replay()
            torch.testing.assert_close(loss, eager(*inputs).detach())
        there = eager.state_dict()
        for name, x in replayed.state_dict().items():
            torch.testing.assert_close(x, there[name], msg=name)

    def test_the_recipe_of_a_step_in_a_graph(self):
        recipes = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
        scripts = re.findall(r"```python\n(.*?)```", recipes.read_text(), re.DOTALL)
        (script,) = (text for text in scripts if text.startswith("# graph.py"))
        done = python(script)
        assert done.returncode == 0, done
        first, last = (float(line) for line in done.stdout.split())
        assert 0 < last < first

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
