"""The launches that `python -m bench static` counts for a call, found in the code.

A call and its backward pass run on the emulation; torch's profiler says which operators of PyTorch
the host entry and the derivative call. Each that computes counts as one launch, as on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
import torch
from helpers import emulated
from helpers.cases import cast, make, make_difference, make_instance
from torch.profiler import ProfilerActivity, profile

from bench import static_model
from bench.static_model import Launches
from crrcd_ext import functional

if emulated.missing is not None:
    pytest.skip(emulated.missing, allow_module_level=True)

# Operators that launch nothing: they describe memory, allocate it or read it on the host.
QUIET = re.compile(
    "alias|as_strided|detach|empty(_like|_strided)?|expand(_as)?|item|narrow|permute|promote_types|"
    "resize_|resolve_conj|result_type|select|slice|squeeze|t|transpose|unsqueeze|view|"
    "_local_scalar_dense|_reshape_alias|_unsafe_view"
)
# Operators that are others, on every device, or none.
COMPOSITE = re.compile(
    "_to_copy|addbmm|clone|contiguous|full|log_sigmoid|masked_fill|matmul|ones|reshape|to|"
    "zeros(_like)?"
)


def launching(events: Iterable) -> list[str]:
    """Names of the operators that launch a kernel."""
    found = []
    for event in events:
        library, _, name = event.name.partition("::")
        if library != "aten" or COMPOSITE.fullmatch(name):
            found += launching(event.cpu_children)
        elif not QUIET.fullmatch(name) and not (event.input_shapes and 0 in event.input_shapes[0]):
            found.append(name)
    return found


def launches(operator, case: dict, wanted: tuple[str, ...]) -> Launches:
    leaves = {name: case[name].detach().clone().requires_grad_() for name in wanted}
    emulator = emulated.library("simt")
    emulator.launched()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        loss = operator(**{**case, **leaves}, backend="simt")
        torch.autograd.grad(loss, list(leaves.values()))
    of_torch = launching(e for e in profiled.events() if e.cpu_parent is None)
    return Launches(len(of_torch), len(emulator.launched()))


def settled(case: dict) -> dict:
    """Scalars as they are given usually."""
    return {**case, "scale": case["scale"].float(), "offset": case["offset"].float()}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("anchors, segment", [(1, 512), (1, 256), (3, 512)])
def test_relation_nce(anchors, segment, live):
    shape = {"A": anchors, "B": 64, "K": 512, "H": 16, "R": 16, "D": 16}
    case = make(**shape, index=False, bias=False, key_weight=False)
    wanted = ("query", "bank", "anchor", "weight") if live else ("query",)
    emulated.library("simt").set_segment(segment)
    try:
        found = launches(functional.relation_nce, settled(cast(case, torch.bfloat16)), wanted)
    finally:
        emulated.library("simt").set_segment(0)
    assert found == static_model.relation_launches(anchors, 512 // segment, 1, live)


@pytest.mark.parametrize("index", ["own", "shared"])
@pytest.mark.parametrize("bank", [torch.float32, torch.bfloat16])
def test_instance_nce(index, bank):
    case = settled(cast(make_instance(4, 600, 16, 700, index=index), torch.float32))
    case["bank"] = case["bank"].to(bank)
    found = launches(functional.instance_nce, case, ("query",))
    assert found == static_model.INSTANCE_LAUNCHES


@pytest.mark.parametrize("index", ["own", "shared", None])
@pytest.mark.parametrize("bank", [torch.float32, torch.bfloat16])
def test_similar_mask(index, bank):
    case = cast(make_instance(4, 600, 16, 700, index=index), torch.float32)
    operands = case["query"], case["bank"].to(bank), case["index"]
    emulator = emulated.library("simt")
    emulator.launched()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        functional.similar_mask(*operands, threshold=0.1, backend="simt")
    of_torch = launching(e for e in profiled.events() if e.cpu_parent is None)
    found = Launches(len(of_torch), len(emulator.launched()))
    assert found == static_model.SIMILAR_LAUNCHES


@pytest.mark.parametrize("operands", ["float", "bf16"])
def test_difference_nce(operands):
    dtype = {"float": torch.float32, "bf16": torch.bfloat16}[operands]
    case = settled(cast(make_difference(64, 64, 600, 16, 700, index="shared"), dtype))
    found = launches(functional.difference_nce, case, ("query",))
    assert found == static_model.DIFFERENCE_LAUNCHES[operands]
