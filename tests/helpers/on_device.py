"""The GPU's backends for tensors on the CPU, so that the operators' own tests run on them.

Backend "on_cuda" (and so on for each backend of CUDA tensors that can run here) copies what it is
given to the device with its strides, calls the operator there, and copies back the results and what
the operator changed. Tests that hand over tensors of the device: tests/test_device.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from crrcd_ext import _backend, _schema

PLACE = 256  # bytes; where a tensor starts within so many stays as it is, for aligned accesses


def placed(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on the device: same strides, same alignment, the same memory between its rows."""
    if x.numel() == 0:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
    reach = 1 + sum((size - 1) * step for size, step in zip(x.size(), x.stride(), strict=True))
    before = x.data_ptr() % PLACE // x.element_size()
    memory = torch.empty(before + reach, dtype=x.dtype, device=device)
    memory[before:] = x.as_strided((reach,), (1,), x.storage_offset())
    return memory.as_strided(x.size(), x.stride(), before)


def _through(operator: Callable, device: torch.device | str) -> Callable:
    """An operator for tensors on the CPU that runs on the device."""
    arguments = operator.default._schema.arguments
    changed = [n for n, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]

    def run(*given):
        there = [placed(a, device) if isinstance(a, torch.Tensor) else a for a in given]
        results = operator(*there)
        for number in changed:
            given[number].copy_(there[number])
        if isinstance(results, torch.Tensor):
            return results.cpu()
        return None if results is None else tuple(result.cpu() for result in results)

    return run


def register(name: str, backend: str, device: torch.device | str) -> None:
    """Adds backend `name`: `backend` on the device, for tensors on the CPU."""
    kernels = _backend.COMPILED[backend]
    namespace = "crrcd_" + name.replace(" ", "_")
    library = torch.library.Library(namespace, "DEF")
    LIBRARIES.append(library)
    for schema in _schema.SCHEMAS:
        library.define(schema)
        operator = schema.split("(")[0]
        run = _through(getattr(getattr(torch.ops, kernels.library), operator), device)
        library.impl(operator, run, "CPU")
    _backend.COMPILED[name] = _backend.Compiled("cpu", namespace)


def native(backend: str) -> tuple[str, str]:
    """The backend for tensors that are where it computes, and where that is. What is too large to
    be copied at every call is made there."""
    if backend not in ON_DEVICE:
        return backend, "cpu"
    own = backend.removeprefix("on_")
    return own, _backend.COMPILED[own].device


LIBRARIES: list[torch.library.Library] = []  # they live as long
ON_DEVICE = []
"""To be added to the backends of tests of operators that have kernels there."""
for _name, _reason in _backend.available_backends().items():
    if _reason is None and _name in _backend.COMPILED:
        _device = _backend.COMPILED[_name].device
        if _device != "cpu":
            register(f"on_{_name}", _name, _device)
            ON_DEVICE.append(f"on_{_name}")
