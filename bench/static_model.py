"""What operators need of a GPU by their plan, as data, and the time that a model makes of it.

`python -m bench static` prints every case of CASES. To add an operator:

1. write a function that returns a :class:`Work` for a shape, as `instance_own` does: bytes that go
   to and from device memory by the plan and the least that they could be (each input once, each
   output once), operations on tensor cores by operand type and the least number of them, ordinary
   multiply-adds and special functions, both counted for every thread that computes them;
2. name in `main_loops` the kernels that do the bulk, each with the work that its main loop shares
   out: `tensor_operations` or `multiply_adds`, or, where the loop does more of these than the
   formula has, `passes`, how often a warp goes through it. The instructions of that loop in the
   compiled kernel then give the time that issuing them takes. `stops` finds the way that a turn
   of a loop with rare branches takes, see `sass.turn`;
3. add the shapes to CASES, kernels with dynamic shared memory to DYNAMIC_SHARED, and files whose
   names begin otherwise than those there to SOURCES.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from bench import sass
from bench.sass import Kernel, Name
from crrcd_ext import _plan

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
    """Work of the kernel whose readable name the expression finds; one of the three is given.
    stops: what a turn of the tile loop comes by (`sass.turn`), else the whole main loop counts."""

    kernel: str
    tensor_operations: float = 0
    multiply_adds: float = 0
    passes: float = 0
    stops: tuple[Mapping[str, int], ...] = ()


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
    pairs: float = 0  # (anchor, key) of the first main loop
    work_bytes: int = 0  # work space by the plan


@dataclass(frozen=True)
class Case:
    operator: str
    label: str
    work: Work | Callable[[Gpu], Work]  # a function where the plan is the GPU's

    def on(self, gpu: Gpu) -> Work:
        return self.work if isinstance(self.work, Work) else self.work(gpu)


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


# ---------------------------------------------------------------------------------------------
# relation_nce, NCE, bfloat16, one panel of queries, H = R = 128. csrc/cuda/relation_logits.cuh


def logit_stops(stages: int, norms: bool) -> tuple[Mapping[str, int], ...]:
    """What a warp does for a tile of 16 keys without masks and biases: fetching the next tile (at
    the end where there is one buffer), making hid, for norms W hid in two halves, the logits, their
    weights, the gradient of the queries."""
    fetch = ({"async_copy": 8},)
    product, squares = {"tensor_core": 64, "ldmatrix": 40}, {"multiply_add": 32}
    body = ({"shared_stores": 8, "shared_loads": 8},)
    body += (product, squares, product, squares) if norms else ()
    body += (product, {"special": 64}, {"tensor_core": 64, "ldmatrix": 36})
    return fetch + body if stages == 2 else body + fetch


def relation(gpu: Gpu, K: int, live: bool) -> Work:
    """relation_nce, A = B = 64, H = R = 128, everything in bfloat16, keys are rows. Memory: inputs
    and outputs once; keys as prepared, norms, partial sums and what else the plan keeps, once
    written and once by each pass read, but sums over segments once in all and prepared keys once in
    all, since the L2 cache holds a segment; torch's own steps on [A, B, H], of which each fits the
    cache, are left out. Tensor cores: for live keys W'W hid, of which norms come too, the logits
    twice, the gradients by them of keys and queries, a triangle for W'W's; else W hid, the logits,
    the gradient of the queries. Issue: turns of the logits' loop where no key is left out, without
    the logarithm of every second turn; of the other passes, live, the loop of their products
    only."""
    A = B = 64
    H = R = 128
    gradients = _plan.GRADIENTS if live else ("query",)
    sizes = {"anchors": A, "queries": B, "keys": K, "hidden": H, "relation_dim": R}
    made = _plan.plan(gpu.arch, **sizes, gradients=gradients)
    logits = made["logits"]
    least = 2 * (
        K * H + A * H + R * H + 3 * A * B * R
    )  # bank, anchors, W; query, positive, d query
    memory = least + 2 * 2 * K * H + 2 * 2 * A * B * H + 2 * 4 * logits["chunks"] * A * B * H
    of_queries = 2 * B * H
    pair, least_pair = (0 if live else H * R) + of_queries, H * H + of_queries
    loops = [
        MainLoop(
            r"relation_logits<kBF16, kNce, 4>",
            passes=A * K / 16,
            stops=logit_stops(logits["stages"], norms=not live),
        )
    ]
    if live:
        outputs = 2 * (K * H + A * H + R * H)
        keys, weight = made["keys"], made["weight"]
        memory += outputs + 4 * A * K * (2 + 2)  # 1 / |w| and c, for one pass each
        memory += 2 * 4 * keys["anchor_parts"] * K * H + 2 * 4 * keys["key_parts"] * A * H
        memory += 2 * 4 * K * H + 2 * 4 * weight["chunks"] * H * H  # the keys' sum, G's gradient
        least += outputs
        gram = sum(16 * (row + 16) for row in range(0, H, 16))  # rows of 16 up to the diagonal
        of_keys = H * H + 2 * B * H
        pair, least_pair = pair + of_keys + gram, least_pair + B * H + H * (H + 1) // 2
        loops += [
            MainLoop(rf"relation_keys<kBF16, kNce, {keys['warps']}>", 2 * A * K * of_keys),
            MainLoop(r"relation_gram<kBF16>", 2 * A * K * gram),
        ]
    return Work(
        bytes=memory,
        least_bytes=least,
        tensor={"bf16": 2 * A * K * pair},
        least_tensor=2 * A * K * least_pair,
        special=2 * A * B * K * (2 if live else 1),
        main_loops=tuple(loops),
        pairs=A * K,
        work_bytes=made["work_bytes"],
    )


# ---------------------------------------------------------------------------------------------
# difference_nce, gradient of the query, NCE, shared negatives. csrc/cuda/difference.cuh

LOGIT_MULTIPLY_ADDS, LOGIT_SPECIAL = 20, 2  # of law of cosines, softplus and sums, of a logit


def difference_shared(gpu: Gpu, K: int, operands: str) -> Work:
    """difference_nce, A = B = 64, D = 128, shared negatives: a block compares all anchors and
    queries with tiles of 32 keys, whose rows come from device memory once; its sums, and a bit of
    every (anchor, key), are written once and read once. At full precision a distance takes a
    subtraction and a multiply-add a column, from two-byte rows it is a product on tensor cores;
    weights times rows are multiply-adds in both. Issue: the loop over the logits only, at full
    precision; with products on tensor cores that is not what counts as the main loop."""
    A = B = 64
    D, row = 128, 128 * BYTES[operands]
    tiles = -(-K // 32)
    chunks = min(2 * gpu.multiprocessors, tiles)
    ends = (A + 3 * B) * row + K * 8  # anchor; query, positive, gradient; index
    kept = chunks * 4 * (B * D + 2 * A * B) + 8 * K
    distances = (A + B) * K * D
    tensor = {} if operands == "float" else {operands: 2 * distances}
    logits = MainLoop("difference_tiles<kF32, false, kNce>", passes=8 * K)  # 8 warps, each key
    return Work(
        bytes=K * row + ends + 2 * kept,
        least_bytes=K * row + ends,
        tensor=tensor,
        least_tensor=sum(tensor.values()),
        multiply_adds=(0 if tensor else 2 * distances)
        + B * K * D
        + A * B * K * LOGIT_MULTIPLY_ADDS,
        special=A * B * K * LOGIT_SPECIAL,
        main_loops=() if tensor else (logits,),
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
    *(
        Case(
            "difference_nce",
            f"shared, A=B=64 K=16384 D=128, {operands}, gradient of the query",
            functools.partial(difference_shared, K=16384, operands=operands),
        )
        for operands in ("float", "bf16")
    ),
    *(
        Case(
            "relation_nce",
            f"bf16, A=B=64 H=R=128 K={K}, {'all gradients' if live else 'gradient of the query'}",
            functools.partial(relation, K=K, live=live),
        )
        for K in (16384, 131072)
        for live in (False, True)
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


def _tile_memory(name: Name, arch: str) -> int:
    size = {"float": 4, "double": 8}[name.types[0]]
    return 2 * 64 * 68 * size + 64 * size + 24 * 8


def _difference_tile(name: Name, arch: str) -> int:
    return 88064 if name.arguments[0] == "kF64" else 80000  # checked where the tile is declared


def _planned(part: str) -> Callable[[Name, str], int]:
    """Of the pass by the plan for A = B = 64, H = R = 128, K = 16384, all gradients."""

    def memory(name: Name, arch: str) -> int:
        sizes = {"anchors": 64, "queries": 64, "keys": 16384, "hidden": 128, "relation_dim": 128}
        if name.arguments[0] != "kBF16" or arch not in _plan.GPUS:
            return 0
        made = _plan.plan(arch, **sizes, gradients=_plan.GRADIENTS)[part]
        usual = len(name.arguments) < 3 or name.arguments[2] == str(made["warps"])
        return made["shared_bytes"] if usual else 0

    return memory


DYNAMIC_SHARED: dict[str, Callable[[Name, str], int]] = {
    "shared_tiles": _tile_memory,
    "difference_tiles": _difference_tile,
    "relation_logits": _planned("logits"),
    "relation_keys": _planned("keys"),
    "relation_gram": _planned("weight"),
}
"""Kernel -> bytes for its template arguments on an architecture; 0 where they are not known."""


# ---------------------------------------------------------------------------------------------
# The model


def instructions(part: MainLoop, arch: str, kernels: Iterable[Kernel]) -> float | None:
    """Instructions of warps that a main loop issues; None where it is not known."""
    kernel = next(
        (k for k in kernels if k.arch == arch and re.search(part.kernel, str(k.name))), None
    )
    if kernel is None or kernel.loop is None:
        return None
    loop = kernel.loop
    if part.stops:
        loop = kernel.tile_loop and sass.turn(kernel.tile_loop, part.stops)
        if loop is None:
            return None
    passes = part.passes
    if part.tensor_operations:
        passes = part.tensor_operations / loop.tensor_operations
    elif part.multiply_adds:
        passes = part.multiply_adds / (32 * loop.multiply_add)
    return passes * loop.instructions


def issue_seconds(work: Work, gpu: Gpu, kernels: Iterable[Kernel]) -> float | None:
    """Time to issue the instructions of the main loops; None where a loop is not known."""
    parts = [instructions(part, gpu.arch, kernels) for part in work.main_loops]
    if not parts or None in parts:
        return None
    return sum(parts) / (ISSUE * gpu.multiprocessors * gpu.gigahertz * 1e9)


def clocks_a_pair(work: Work, gpu: Gpu, kernels: Iterable[Kernel]) -> float | None:
    """Issue clocks of a multiprocessor for each pair of the first main loop."""
    issued = instructions(work.main_loops[0], gpu.arch, kernels) if work.pairs else None
    return issued and issued / (ISSUE * work.pairs)


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
    """What cases that follow a plan take for granted, and a line for each GPU."""
    lines = [" ".join(case.__doc__.split()) for case in (relation, difference_shared)]
    for gpu in GPUS:
        rates = ", ".join(f"{kind} {rate:,.0f}" for kind, rate in gpu.tensor.items())
        lines.append(
            f"{gpu.name} ({gpu.arch}): {gpu.multiprocessors} multiprocessors at "
            f"{gpu.gigahertz} GHz, {gpu.bandwidth:,.0f} GB/s, tensor cores {rates} TFLOP/s, "
            f"{gpu.multiply_adds} fp32 multiply-adds, {SPECIAL} special functions and {ISSUE} "
            "instructions a clock and multiprocessor"
        )
    return lines
