"""`python -m bench overhead`: what a call of a Triton operator costs before its kernels run."""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from bench import machine
from bench.table import terminal_table

STUBBED = "stubbed"
"""The Triton operators on the CPU, whose launches do nothing."""

NOTES = """\
Host time of one forward call that keeps gradients, launches left out: the operator's own small
tensor operations and allocations are in both columns (on sizes that take the CPU no time, as a GPU
would do them later). bare: the host function called from a plain
torch.autograd.Function; functional: the public function, with its checks, choice of a backend,
casts and dispatcher. Medians of single calls, one thread, in turns.
"""


class _Bare(torch.autograd.Function):
    """What one would write around a host function without a library."""

    @staticmethod
    def forward(ctx, function: Callable, *arguments):
        loss, *gradients = function(*arguments)
        ctx.save_for_backward(*gradients)
        return loss


@contextmanager
def stubbed() -> Iterator[None]:
    """The backend STUBBED for the length of a block."""
    from crrcd_ext import _backend
    from crrcd_ext.triton import INTERPRETED, launch, register

    library = torch.library.Library("crrcd_triton", "IMPL")
    if not INTERPRETED:
        for operator, module in register.MODULES.items():
            library.impl(operator, register.entry(operator, module), "CPU")
    _backend.COMPILED[STUBBED] = _backend.Compiled("cpu", "crrcd_triton")
    try:
        with mock.patch.object(launch, "run", lambda *arguments, **constants: None):
            yield
    finally:
        del _backend.COMPILED[STUBBED]


def inputs(operator: str, batch: int, keys: int, dim: int) -> dict:
    """Keyword arguments of the public function; queries want a gradient."""
    g = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(shape, generator=g), dim=-1)

    case = {
        "query": unit(batch, dim),
        "positive": unit(batch, dim),
        "bank": unit(2 * keys, dim),
        "index": torch.randint(2 * keys, (keys,), generator=g),
        "scale": torch.tensor(14.0),
        "offset": torch.tensor(5.0),
    }
    if operator != "instance_nce":
        case["anchor"] = unit(batch, dim)
    if operator == "relation_nce":
        case["query"], case["positive"] = unit(batch, batch, dim), unit(batch, batch, dim)
        case["weight"], case["bias"] = unit(dim, dim), torch.zeros(dim)
    case["query"].requires_grad_()
    return case


def recorded(operator: str, case: dict) -> tuple:
    """The arguments with which the public function calls the operator."""
    from crrcd_ext import autograd, functional

    seen = []

    def loss(formula, arguments, bank, update, library):
        seen.append(arguments)
        return bank.new_zeros(())

    with mock.patch.object(autograd, "loss", loss):
        getattr(functional, operator)(**case, backend=STUBBED)
    (arguments,) = seen
    return (*arguments, 1)  # the query's bit of need


def in_turns(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds):
        for place, function in enumerate(functions):
            begin = time.perf_counter()
            function()
            if turn >= rounds // 10:
                times[place].append(time.perf_counter() - begin)
    return [statistics.median(t) for t in times]


def measure(operator: str, rounds: int, batch: int, keys: int, dim: int) -> tuple[float, float]:
    """Seconds of (bare, functional)."""
    from crrcd_ext import functional
    from crrcd_ext.triton import register

    case = inputs(operator, batch, keys, dim)
    module = importlib.import_module(f"crrcd_ext.triton.{register.MODULES[operator]}")
    host, arguments = getattr(module, operator), recorded(operator, case)
    public = getattr(functional, operator)
    bare, whole = in_turns(
        [lambda: _Bare.apply(host, *arguments), lambda: public(**case, backend=STUBBED)], rounds
    )
    return bare, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=1000, help="calls of each")
    parser.add_argument("--batch", type=int, default=4, help="A = B")
    parser.add_argument("--keys", type=int, default=64, help="K")
    parser.add_argument("--dim", type=int, default=16, help="D = H = R")


def main(options: argparse.Namespace) -> int:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        with stubbed():
            for operator in ("relation_nce", "difference_nce", "instance_nce"):
                bare, whole = measure(
                    operator, options.rounds, options.batch, options.keys, options.dim
                )
                rows.append(
                    [operator, f"{bare * 1e6:.0f}", f"{whole * 1e6:.0f}", f"{whole / bare:.2f}"]
                )
    finally:
        torch.set_num_threads(threads)
    print("\n".join(machine.headline(machine.describe())))
    print(terminal_table(["operator", "bare, us", "functional, us", "x"], rows))
    print(f"\n{NOTES}", end="")
    return 0
