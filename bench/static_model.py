"""What operators need of a GPU by their plan, as data, and the time that a model makes of it.

`python -m bench static` prints every case of CASES. To add an operator:

1. write a function that returns a :class:`Work` for a shape, as `instance_own` does: bytes that go
   to and from device memory by the plan and the least that they could be (each input once, each
   output once), operations on tensor cores by operand type and the least number of them, ordinary
   multiply-adds and special functions, both counted for every thread that computes them;
2. name in `main_loops` the kernels that do the bulk, each with the work that its main loop shares
   out: `tensor_operations` or `multiply_adds`, or, where the loop does more of these than the
   formula has, `passes`, how often a warp goes through it. The instructions of that loop in the
   compiled kernel then give the time that issuing them takes;
3. add the shapes to CASES, kernels with dynamic shared memory to DYNAMIC_SHARED, and files whose
   names begin otherwise than those there to SOURCES.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from bench.sass import Kernel, Name

ISSUE = 4  # instructions of warps, a clock and multiprocessor
SPECIAL = 16  # special functions, a clock and multiprocessor


@dataclass(frozen=True)
class Gpu:
    """What the maker states, of one chip."""

    name: str
    arch: str
    multiprocessors: int
    gigahertz: float
    bandwidth: float  # GB/s
    tensor: Mapping[str, float]  # operand type -> TFLOP/s, dense
    multiply_adds: int = 128  # fp32, a clock and multiprocessor


GPUS = (
    Gpu("A100", "sm_80", 108, 1.41, 2039, {"bf16": 312, "fp16": 312, "tf32": 156}, 64),
    Gpu("H100", "sm_90a", 132, 1.83, 3350, {"bf16": 989, "fp16": 989, "tf32": 495}),
    Gpu("B200", "sm_100a", 148, 1.85, 8000, {"bf16": 2250, "fp16": 2250, "tf32": 1100}),
)


@dataclass(frozen=True)
class MainLoop:
    """Work of the kernel whose readable name the expression finds; one of the three is given."""

    kernel: str
    tensor_operations: float = 0
    multiply_adds: float = 0
    passes: float = 0


@dataclass(frozen=True)
class Work:
    """What a call needs, see above."""

    bytes: float
    least_bytes: float
    tensor: Mapping[str, float] = field(default_factory=dict)
    least_tensor: float = 0
    multiply_adds: float = 0
    special: float = 0
    main_loops: tuple[MainLoop, ...] = ()


@dataclass(frozen=True)
class Case:
    operator: str
    label: str
    work: Work


# ---------------------------------------------------------------------------------------------
# instance_nce, gradient of the query, NCE. csrc/cuda/instance.cuh

# Of exp, log1p and the division, in fp32 as nvcc compiles them.
SOFTPLUS_MULTIPLY_ADDS, SOFTPLUS_SPECIAL = 20, 2
BYTES = {"float": 4, "bf16": 2, "fp16": 2}


def instance_own(B: int, K: int, D: int, N: int, storage: str) -> Work:
    """Each query's own negatives: a warp for an entry, whose row is read once for logit and
    gradient, from device memory whenever it is named; all lanes compute the softplus."""
    entries, row = B * K, D * BYTES[storage]
    ends = 3 * B * D * 4 + entries * 8  # query, positive, gradient; index
    named = N * -math.expm1(-entries / N)  # rows that are drawn at all
    return Work(
        bytes=entries * row + ends,
        least_bytes=named * row + ends,
        multiply_adds=entries * (2 * D + 32 * SOFTPLUS_MULTIPLY_ADDS),
        special=entries * 32 * SOFTPLUS_SPECIAL,
        main_loops=(MainLoop(rf"own_entries<float, {storage}, 32, 4, kNce>", passes=entries / 4),),
    )


def instance_shared(B: int, K: int, D: int, N: int, storage: str) -> Work:
    """Shared negatives: two products on tiles of 64 queries x 64 rows; a row is read once for all
    queries of a tile."""
    tiles = -(-B // 64)
    row = D * BYTES[storage]
    ends = 3 * B * D * 4 + K * 8
    products = 2 * (64 * tiles) * K * D
    return Work(
        bytes=tiles * K * row + ends,
        least_bytes=N * -math.expm1(-K / N) * row + ends,
        multiply_adds=products + B * K * SOFTPLUS_MULTIPLY_ADDS,
        special=B * K * SOFTPLUS_SPECIAL,
        main_loops=(MainLoop(rf"shared_tiles<float, {storage}, kNce>", multiply_adds=products),),
    )


CASES: list[Case] = [
    *(
        Case("instance_nce", f"own, B=64 K=16384 D=128 N=2,000,000, {storage} bank", work)
        for storage in ("float", "bf16")
        for work in [instance_own(64, 16384, 128, 2_000_000, storage)]
    ),
    *(
        Case("instance_nce", f"shared, B=64 K=65536 D=128 N=2,000,000, {storage} bank", work)
        for storage in ("float", "bf16")
        for work in [instance_shared(64, 65536, 128, 2_000_000, storage)]
    ),
]


# ---------------------------------------------------------------------------------------------
# Files of csrc/cuda

SOURCES = {
    "relation": "relation_nce",
    "difference": "difference_nce",
    "instance": "instance_nce",
    "bank_update": "bank_update_",
}
"""What the name of a file begins with -> the operator of its kernels; the longest one counts."""


# ---------------------------------------------------------------------------------------------
# What a launch adds to the shared memory that stands in the compiled kernel


def _tile_memory(name: Name) -> int:
    size = {"float": 4, "double": 8}[name.types[0]]
    return 2 * 64 * 68 * size + 64 * size + 24 * 8


DYNAMIC_SHARED: dict[str, Callable[[Name], int]] = {"shared_tiles": _tile_memory}
"""Kernel -> bytes for its template arguments."""


# ---------------------------------------------------------------------------------------------
# The model


def issue_seconds(work: Work, gpu: Gpu, kernels: Iterable[Kernel]) -> float | None:
    """Time to issue the instructions of the main loops; None where a loop is not known."""
    kernels = [kernel for kernel in kernels if kernel.arch == gpu.arch and kernel.loop]
    instructions = 0.0
    for part in work.main_loops:
        loop = next((k.loop for k in kernels if re.search(part.kernel, str(k.name))), None)
        if loop is None:
            return None
        passes = part.passes
        if part.tensor_operations:
            passes = part.tensor_operations / loop.tensor_operations
        elif part.multiply_adds:
            passes = part.multiply_adds / (32 * loop.multiply_add)
        instructions += passes * loop.instructions
    return instructions / (ISSUE * gpu.multiprocessors * gpu.gigahertz * 1e9)


def seconds(work: Work, gpu: Gpu, kernels: Iterable[Kernel]) -> dict[str, float | None]:
    """Time of each limit alone. The call takes their maximum at least, by the model, and their sum
    where none overlaps another."""
    clocks = gpu.multiprocessors * gpu.gigahertz * 1e9
    return {
        "memory": work.bytes / (gpu.bandwidth * 1e9),
        "tensor": sum(count / (gpu.tensor[kind] * 1e12) for kind, count in work.tensor.items()),
        "multiply-add": work.multiply_adds / (gpu.multiply_adds * clocks),
        "special": work.special / (SPECIAL * clocks),
        "issue": issue_seconds(work, gpu, kernels),
    }


def assumptions() -> list[str]:
    """One line for each GPU."""
    lines = []
    for gpu in GPUS:
        rates = ", ".join(f"{kind} {rate:,.0f}" for kind, rate in gpu.tensor.items())
        lines.append(
            f"{gpu.name} ({gpu.arch}): {gpu.multiprocessors} multiprocessors at "
            f"{gpu.gigahertz} GHz, {gpu.bandwidth:,.0f} GB/s, tensor cores {rates} TFLOP/s, "
            f"{gpu.multiply_adds} fp32 multiply-adds, {SPECIAL} special functions and {ISSUE} "
            "instructions a clock and multiprocessor"
        )
    return lines
