"""Every operator against float64, at sizes of several waves of blocks, and twenty times alike.

One process has one operator on one backend. Memory that operators get is full of NaN. Errors are
relative L2 distances from the reference in float64 on the same (rounded) inputs; beside them stands
what plain PyTorch misses by in the same precision.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from bench.gpu_check.rows import emit
from bench.gpu_check.stage import ROOT
from bench.gpu_check.times import first_line, is_lost

# Without it cuBLAS refuses to be asked for the same bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(ROOT / "tests"))
from helpers import cases  # of the tests
from helpers.on_device import placed

from crrcd_ext import functional
from crrcd_ext._backend import OPERATORS

PRECISIONS = {
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "f32": (torch.float32, "highest"),
    "f64": (torch.float64, "highest"),
}
"""Type of the operands, and torch's setting for products of float32."""
TINY = {"bf16": 2.0**-7, "fp16": 2.0**-9, "tf32": 2.0**-8, "f32": 1e-5, "f64": 1e-11}
"""A result may miss by this and twice what plain PyTorch misses by."""
EXACT = 1e-12
"""Where no bit may differ."""
QUERY = ("query",)
SIMILAR = 1.5
"""Threshold of similar_mask, which some products are equal to."""
REPEATS = 20


@dataclass(frozen=True)
class Case:
    """One call: what it is given, in float64 on the CPU, and which gradients are wanted."""

    operator: str
    precision: str
    gradients: str = ""
    objective: str = ""
    negatives: str = ""
    masks: str = ""

    def __str__(self) -> str:
        words = self.operator, self.precision, self.gradients, self.objective, self.negatives
        words += (self.masks,)
        return " ".join(word for word in words if word)


def all_cases(operator: str) -> Iterator[Case]:
    for precision in PRECISIONS:
        if operator == "bank_update_":
            yield Case(operator, precision)
            continue
        if operator == "similar_mask":
            for negatives in ("shared", "own"):
                yield Case(operator, precision, negatives=negatives)
            continue
        for gradients in ("query", "all"):
            if operator == "relation":
                yield Case(operator, precision, gradients)
                continue
            kinds = ("shared",) if operator == "relation_nce" else ("shared", "own")
            for objective, negatives in product(("nce", "infonce"), kinds):
                yield Case(operator, precision, gradients, objective, negatives)
                if gradients == "all" and objective == "nce" and precision in ("bf16", "f32"):
                    yield Case(operator, precision, gradients, objective, negatives, "excluded")


def inputs(case: Case, small: bool) -> dict:
    """Keyword arguments. Sizes are no multiples of a tile; the large ones are several waves of
    blocks on 132 multiprocessors."""
    given = operands(case, small)
    if case.masks == "excluded":
        negatives = given["index"].shape[-1]
        g = torch.Generator().manual_seed(1)
        drawn = torch.rand(given["query"].shape[-2], negatives, generator=g) < 0.3
        given["excluded"] = functional.pack_bits(drawn)
    return given


def operands(case: Case, small: bool) -> dict:
    common = {"ids": True, "labels": True, "scale": 10.0}
    if case.operator == "relation_nce":
        sizes = (4, 6, 70, 24, 20, 18, 50) if small else (24, 80, 6007, 128, 128, 128, 9001)
        return cases.make(*sizes, objective=case.objective, offset=8.7, **common)
    if case.operator == "difference_nce":
        if case.negatives == "own":
            sizes = (4, 6, 40, 20, 50) if small else (16, 70, 501, 128, 9001)
        else:
            sizes = (4, 6, 70, 20, 50) if small else (40, 80, 6007, 128, 9001)
        options = {"index": case.negatives, "objective": case.objective, "offset": 8.7}
        return cases.make_difference(*sizes, **options, **common)
    if case.operator == "instance_nce":
        if case.negatives == "own":
            sizes = (6, 40, 20, 50) if small else (200, 2003, 128, 9001)
        else:
            sizes = (6, 70, 20, 50) if small else (300, 20011, 128, 30011)
        options = {"index": case.negatives, "objective": case.objective, "offset": 8.7}
        return cases.make_instance(*sizes, **options, **common)
    g = torch.Generator().manual_seed(0)
    if case.operator == "similar_mask":
        if case.negatives == "own":
            B, K, D, N = (6, 40, 20, 50) if small else (200, 2003, 128, 9001)
        else:
            B, K, D, N = (6, 70, 20, 50) if small else (300, 20011, 128, 30011)

        def integers(most: int, *shape: int) -> Tensor:
            return torch.randint(-most, most + 1, shape, generator=g).double()

        # Exact in float32, whatever the order of sums, and not in tf32.
        return {
            "query": integers(2**13 - 1, B, D) / 2**13,
            "bank": integers(7, N, D) / 8,
            "index": torch.randint(N, (B, K) if case.negatives == "own" else (K,), generator=g),
        }

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    if case.operator == "relation":
        A, M, H, R = (3, 5, 12, 10) if small else (40, 130, 128, 128)
        return {
            "anchor": normal(A, H),
            "sample": normal(M, H),
            "weight": normal(R, H) / H**0.5,
            "bias": 0.1 * normal(R),
        }
    N, B, D = (20, 9, 12) if small else (5003, 700, 130)
    return {
        "bank": cases.unit_rows(normal(N, D)),
        "index": torch.randint(N, (B,), generator=g),  # some rows several times
        "value": normal(B, D),
    }


def on(given: dict, device: str, dtype: torch.dtype) -> dict:
    """Operands in their type, on the device with their strides; so are temperature and offset."""
    there = cases.cast(given, dtype)
    return {k: placed(v, device) if isinstance(v, Tensor) else v for k, v in there.items()}


def call(case: Case, given: dict, backend: str) -> dict[str, Tensor]:
    """Results by name: the value, and gradients of 0.7 times it."""
    if case.operator == "bank_update_":
        bank = given["bank"].clone()
        rest = {k: v for k, v in given.items() if k != "bank"}
        functional.bank_update_(bank, **rest, momentum=0.5, backend=backend)
        return {"bank": bank}
    if case.operator == "similar_mask":
        bits = functional.similar_mask(**given, threshold=SIMILAR, backend=backend)
        return {"bits": functional.unpack_bits(bits, given["index"].shape[-1]).double()}
    if case.operator == "relation":
        wanted = list(given) if case.gradients == "all" else ["sample"]
        leaves = {k: given[k].detach().clone().requires_grad_() for k in wanted}
        made = functional.relation(**{**given, **leaves}, backend=backend)
        weights = torch.linspace(-1, 1, made.numel(), device=made.device, dtype=made.dtype)
        gradients = torch.autograd.grad(made, list(leaves.values()), weights.view_as(made))
        return {"relation": made.detach(), **dict(zip(leaves, gradients, strict=True))}
    wanted = cases.DIFFERENTIABLE if case.gradients == "all" else QUERY
    return cases.run(given, backend, wanted=wanted)


def poison(device: str) -> None:
    """Fills memory that the allocator hands out next with NaN."""
    if torch.device(device).type != "cuda":
        return
    torch.cuda.empty_cache()  # or smaller blocks, full of results, would be handed out first
    # Ten processes do so at a time.
    most = torch.cuda.get_device_properties(device).total_memory // 256
    held = [torch.full((most,), 255, dtype=torch.uint8, device=device) for _ in range(4)]
    for size in (1 << 9, 1 << 13, 1 << 17, 1 << 19):
        held += [torch.full((size,), 255, dtype=torch.uint8, device=device) for _ in range(32)]
    del held


def errors(got: dict, true: dict) -> dict[str, float]:
    """As the tests measure: what cancels is measured against 1 or the largest gradient."""
    gradients = [float(x.double().norm()) for k, x in true.items() if k != "loss"]
    largest = max(gradients, default=0.0)
    floors = {k: 1.0 if k in ("scale", "offset") else 1e-3 * largest for k in true}
    found = {k: cases.distance(got[k], true[k], floors[k]) for k in true}
    return {k: float("inf") if x != x else x for k, x in found.items()}


def repeated(case: Case, given: dict, backend: str, times: int) -> tuple[dict, int]:
    """The first results, and how many of the others are not the same to the bit."""
    first, other = call(case, given, backend), 0
    for _ in range(times):
        again = call(case, given, backend)
        other += any(not torch.equal(first[k], again[k]) for k in first)
    return first, other


def check(case: Case, backend: str, device: str, small: bool) -> dict[str, object]:
    """A row of the report."""
    dtype, products = PRECISIONS[case.precision]
    torch.set_float32_matmul_precision("highest")
    given = inputs(case, small)
    low = on(given, device, dtype)
    true = call(case, on(low, device, torch.float64), "reference")
    torch.set_float32_matmul_precision(products)
    plain = errors(call(case, low, "reference"), true)
    poison(device)
    got = errors(call(case, low, backend), true)
    # Sums into the bank's gradient have one order under this setting alone.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        first, different = repeated(case, low, backend, 3 if small else REPEATS)
    finally:
        torch.use_deterministic_algorithms(False)
    again = errors(first, true)
    got = {k: max(got[k], again[k]) for k in got}
    usual = {k: x if x < 1 else 0.0 for k, x in plain.items()}  # fp16 of plain PyTorch overflows
    tiny = EXACT if case.operator == "similar_mask" else TINY[case.precision]
    allowed = {k: 2 * usual[k] + tiny for k in got}
    worst = max(got, key=lambda k: got[k] / allowed[k])
    return {
        "ok": got[worst] <= allowed[worst] and different == 0,
        "worst": worst,
        "error": got[worst],
        "allowed": allowed[worst],
        "plain": plain[worst],
        "not repeated": f"{different} of {3 if small else REPEATS}",
    }


def run(
    found: list[Case], backend: str, device: str, small: bool, again: Callable[[int], str]
) -> int | None:
    """Rows of all cases; the number of the case at which the device was lost, if it was."""
    for number, case in enumerate(found):
        began = time.perf_counter()
        row: dict[str, object] = {"kind": "correctness", "backend": backend, "case": str(case)}
        lost = False
        try:
            row |= check(case, backend, device, small)
        except torch.OutOfMemoryError as error:
            row |= {"ok": None, "worst": f"out of memory: {str(error).splitlines()[0]}"}
        except Exception as error:
            row |= {"ok": False, "worst": first_line(error)}
            lost = is_lost(device)
        emit(**row, s=round(time.perf_counter() - began, 2), command=again(number))
        if lost:
            return number
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operator", choices=OPERATORS, required=True)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a look at this script")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="number of the only case")
    options = parser.parse_args()
    found = list(all_cases(options.operator))
    words = [sys.executable, "-m", "bench.gpu_check.correctness", "--operator", options.operator]
    words += ["--backend", options.backend, "--device", options.device]
    words += ["--small"] if options.small else []
    start = options.first if options.only is None else options.only
    end = len(found) if options.only is None else options.only + 1
    found = [c for c in found if options.backend != "cpu" or c.precision != "fp16"]
    lost = run(
        found[start:end],
        options.backend,
        options.device,
        options.small,
        lambda number: " ".join([*words, "--only", str(start + number)]),
    )
    if lost is not None and start + lost + 1 < end and options.only is None:
        # Nothing more can be done on the device in this process.
        os.execv(sys.executable, [*words, "--first", str(start + lost + 1)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
