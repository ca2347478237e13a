"""Whether an installation computes: every operator and loss, by every backend that needs no GPU,
against the reference.

    CRRCD_EMULATOR=1 TRITON_INTERPRET=1 python tests/smoke.py

Backends are the CPU's kernels, the CUDA kernels on the emulator of tests/simt, which is compiled if
need be, and the Triton kernels in Triton's interpreter. Forward and gradients; one loss under
torch.compile(fullgraph=True). tests/versions.py runs this for each release of torch and Python; the
tests have the rest.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable

import torch
from helpers import cases, emulated, interpreted, losses  # noqa: F401 (mends the interpreter)

import crrcd_ext
from crrcd_ext import _backend, functional, triton

LEFT_OUT = {"simt": emulated.missing, "triton": triton.why_not()}
BACKENDS = ("cpu", *(name for name, reason in LEFT_OUT.items() if reason is None))


def relation(backend: str, dtype: torch.dtype) -> dict:
    case = cases.make()
    named = {"anchor": case["anchor"], "sample": case["anchor"][:3] + 0.5}
    named |= {"weight": case["weight"], "bias": case["bias"]}
    leaves = {k: x.to(dtype).requires_grad_() for k, x in named.items()}
    result = functional.relation(**leaves, backend=backend)
    factor = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).reshape(result.shape)
    gradients = torch.autograd.grad((result * factor).sum(), list(leaves.values()))
    return {"loss": result.detach(), **dict(zip(leaves, gradients, strict=True))}


def loss(make: Callable[..., dict], **options) -> Callable[[str, torch.dtype], dict]:
    return lambda backend, dtype: cases.run(cases.cast(make(**options), dtype), backend)


def bank_update(backend: str, dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(0)
    bank, value = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 3))
    bank = bank.to(dtype)
    index = torch.tensor([3, 1, 3])
    functional.bank_update_(bank, index, value.to(dtype), momentum=0.5, backend=backend)
    return {"loss": bank}


OPERATORS = {
    "relation": relation,
    "relation_nce": loss(cases.make, ids=True),
    "relation_nce infonce": loss(cases.make, labels=True, objective="infonce", key_weight=False),
    "difference_nce": loss(cases.make_difference, index="shared", ids=True),
    "difference_nce own": loss(cases.make_difference, index="own", objective="infonce"),
    "instance_nce": loss(cases.make_instance, index="shared", labels=True),
    "instance_nce own": loss(cases.make_instance, index="own", objective="infonce"),
    "bank_update_": bank_update,
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def check_operator(name: str, backend: str) -> None:
    call = OPERATORS[name]
    for dtype, tolerance in TOLERANCE.items():
        if dtype in _backend.COMPILED[backend].lacks:
            continue
        plain = call("reference", dtype)
        cases.assert_close(call(backend, dtype), call("reference", torch.float64), tolerance, plain)


def step(kind: str, backend: str, compiled: bool = False) -> dict:
    """A step of a loss: its value, the gradients, the bank after it."""
    criterion = losses.make(kind=kind, backend=backend)
    call = torch.compile(criterion, fullgraph=True) if compiled else criterion
    student, teacher, index = losses.batch(0)
    student.requires_grad_()
    value = call(student, teacher, index)
    value.backward()
    found = {"loss": value.detach(), "student": student.grad}
    found |= {name: p.grad for name, p in criterion.named_parameters() if p.grad is not None}
    buffers = dict(criterion.named_buffers())
    return found | {name: x for name, x in buffers.items() if name.endswith("rows")}


def check_loss(kind: str, backend: str, compiled: bool = False) -> None:
    cases.assert_close(step(kind, backend, compiled), step(kind, "reference"), 1e-5)


def checks() -> list[tuple[str, Callable[[], None]]]:
    found = []
    for backend in BACKENDS:
        for name in OPERATORS:
            found.append((f"{name} on {backend}", lambda n=name, b=backend: check_operator(n, b)))
        for kind in losses.KINDS:
            found.append((f"{kind} on {backend}", lambda k=kind, b=backend: check_loss(k, b)))
    return [*found, ("crrcd compiled", lambda: check_loss("crrcd", "cpu", compiled=True))]


def main() -> int:
    torch.set_num_threads(1)
    began = time.monotonic()
    print(
        f"crrcd_ext {crrcd_ext.__version__} in {crrcd_ext.__path__[0]}, torch {torch.__version__}"
    )
    for name, reason in LEFT_OUT.items():
        if reason is not None:
            print(f"left out: {name}: {reason}")
    if "simt" in BACKENDS:
        emulated.library("simt")
        print(f"emulator: {time.monotonic() - began:.1f} s", flush=True)
    failed = []
    for name, check in checks():
        began = time.monotonic()
        try:
            check()
        except Exception as error:  # what it is goes into the table
            first = (str(error).strip() or "no message").splitlines()[0]
            failed.append(f"error: {name}: {type(error).__name__}: {first}")
            print(failed[-1], flush=True)
            traceback.print_exc()
        else:
            print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    print(f"{len(failed)} of {len(checks())} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
