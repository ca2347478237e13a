"""What operators need of a GPU by their plan, as data, and the time that a model makes of it.

`python -m bench static` prints every case of CASES. To add an operator:

1. write a function that returns a :class:`Work` for a shape, as `instance_own` does: bytes that go
   to and from device memory by the plan and the least that they could be (each input once, each
   output once), operations on tensor cores by operand type and the least number of them, ordinary
   multiply-adds, those in double precision (additions too) and special functions, all counted for
   every thread that computes them, and the launches, which tests/test_launches.py counts;
2. name in `main_loops` the kernels that do the bulk, each with the work that its main loop shares
   out: `tensor_operations` or `multiply_adds`, or, where the loop does more of these than the
   formula has, `passes`, how often a warp goes through it. The instructions of that loop in the
   compiled kernel then give the time that issuing them takes, and that of shared memory. `stops`
   finds the way that a turn of a loop with rare branches takes, see `sass.turn`;
3. add the shapes to CASES, kernels with dynamic shared memory to DYNAMIC_SHARED, and files whose
   names begin otherwise than those there to SOURCES.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench import sass
from bench.sass import Counts, Kernel, Name
from crrcd_ext import _plan

ISSUE = 4  # instructions of warps, a clock and multiprocessor
SPECIAL = 16  # special functions, a clock and multiprocessor
LAUNCH = 4e-6  # seconds of the host for each kernel, PyTorch's or ours, outside of a CUDA graph


@dataclass(frozen=True)
class Gpu:
    """What the maker states, of one chip, at the clock that its rates are stated for."""

    name: str
    arch: str
    multiprocessors: int
    gigahertz: float
    bandwidth: float  # GB/s
    tensor: Mapping[str, float]  # operand type -> TFLOP/s, dense, sums in fp32
    mma_sync: float = 1  # what mma.sync, by which our kernels multiply, reaches of these rates
    assumed: bool = False  # whether nobody here knows of a measurement of that
    multiply_adds: int = 128  # fp32, a clock and multiprocessor
    doubles: int = 2  # multiply-adds of fp64, without tensor cores

    @property
    def clocks(self) -> float:
        """Of all multiprocessors, a second."""
        return self.multiprocessors * self.gigahertz * 1e9


# Hopper's peak is wgmma's; mma.sync is known to reach about 63 % of it. On B200 the peak is that of
# tcgen05, and what mma.sync reaches is an assumption: no more a clock than on Ampere, 2,048
# operations a multiprocessor of 8,192. Elsewhere mma.sync is the way to tensor cores. An H200 can
# run at 1.98 GHz, but not with its tensor cores at work.
HOPPER = {"bf16": 989, "fp16": 989, "tf32": 495}
GPUS = (
    Gpu(
        "A100",
        "sm_80",
        108,
        1.41,
        2039,
        {"bf16": 312, "fp16": 312, "tf32": 156},
        multiply_adds=64,
        doubles=32,
    ),
    Gpu("H100", "sm_90", 132, 1.83, 3350, HOPPER, 0.63, doubles=64),
    Gpu("H200", "sm_90", 132, 1.83, 4800, HOPPER, 0.63, doubles=64),
    Gpu(
        "B200",
        "sm_100",
        148,
        1.85,
        8000,
        {"bf16": 2250, "fp16": 2250, "tf32": 1100},
        0.25,
        assumed=True,
        doubles=64,
    ),
    Gpu("RTX 4090", "sm_89", 128, 2.52, 1008, {"bf16": 165, "fp16": 165, "tf32": 82.6}),
    Gpu("RTX 5090", "sm_120", 170, 2.41, 1792, {"bf16": 210, "fp16": 210, "tf32": 105}),
)


@dataclass(frozen=True)
class Launches:
    """Of kernels, for one call of the operator without its backward pass: PyTorch's and ours."""

    torch: int = 0
    own: int = 0

    @property
    def seconds(self) -> float:
        return LAUNCH * (self.torch + self.own)


@dataclass(frozen=True)
class MainLoop:
    """Work of the kernel whose readable name the expression finds. Its main loop (`sass.main_loop`)
    counts whole, as often as it takes for the operations, or `passes` times. special: so often the
    innermost loop with the most special functions instead. stops: so often the way by them
    (`sass.turn`) through the tile loop, or `within`, through the longest loop in that; tensor
    operations that this leaves are made in the main loop, which lies on the way. copied: bytes to
    shared memory beside that."""

    kernel: str
    tensor_operations: float = 0
    multiply_adds: float = 0
    passes: float = 0
    special: bool = False
    stops: tuple[Mapping[str, int], ...] = ()
    within: bool = False
    copied: float = 0


@dataclass(frozen=True)
class Work:
    """What a call needs, see above."""

    bytes: float
    least_bytes: float
    tensor: Mapping[str, float] = field(default_factory=dict)
    least_tensor: float = 0
    multiply_adds: float = 0
    doubles: float = 0
    special: float = 0
    launches: Launches = Launches()
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
INSTANCE_LAUNCHES = Launches(torch=6, own=3)


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
        doubles=3 * entries,  # loss and scalars of each lane, a turn of 32 entries
        special=entries * 32 * SOFTPLUS_SPECIAL,
        launches=INSTANCE_LAUNCHES,
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
        doubles=3 * 256 * tiles * -(-K // 64),  # of each thread, a tile
        special=B * K * SOFTPLUS_SPECIAL,
        launches=INSTANCE_LAUNCHES,
        main_loops=(MainLoop(rf"shared_tiles<float, {storage}, kNce>", multiply_adds=products),),
    )


# ---------------------------------------------------------------------------------------------
# similar_mask. csrc/cuda/similar.cuh

SIMILAR_LAUNCHES = Launches(own=1)


def similar_own(B: int, K: int, D: int, N: int, storage: str) -> Work:
    """Each query's own rows: a warp for 32 of them, four at a time."""
    entries, row = B * K, D * BYTES[storage]
    ends = B * D * 4 + entries * 8 + entries / 8  # query; index; bits
    named = N * -math.expm1(-entries / N)  # rows that are drawn at all
    return Work(
        bytes=entries * row + ends,
        least_bytes=named * row + ends,
        multiply_adds=entries * D,
        launches=SIMILAR_LAUNCHES,
        main_loops=(
            MainLoop(rf"similar_own<float, {storage}>", passes=entries / 4 * math.ceil(D / 128)),
        ),
    )


def similar_shared(B: int, K: int, D: int, storage: str) -> Work:
    """All rows of a bank: tiles of 64 queries x 64 rows; blocks of the same rows run side by side,
    so that a row comes from device memory once."""
    moved = K * D * BYTES[storage] + B * D * 4 + B * K / 8  # rows; query; bits
    products = 64 * -(-B // 64) * K * D
    return Work(
        bytes=moved,
        least_bytes=moved,
        multiply_adds=products,
        launches=SIMILAR_LAUNCHES,
        main_loops=(MainLoop(rf"similar_shared<float, {storage}>", multiply_adds=products),),
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


def key_stops() -> tuple[Mapping[str, int], ...]:
    """What a warp of the keys' pass, which comes first, does with 16 keys and an anchor: hid, its
    product with both halves of W'W, norms by them, the logits, their weights, what norms add, the
    gradient of hid in two halves, and its sums, one for each 8 columns. Of the products' loops a
    turn."""
    product = {"tensor_core": 8, "ldmatrix": 5}
    stops = [{"shared_stores": 8, "shared_loads": 8}, product, product]
    stops += [{"multiply_add": 12, "shared_loads": 2}] * 16
    stops += [product, *[{"special": 8}] * 8, {"global_loads": 64}, product, product]
    stops += [{"shared_loads": 2}, {"shared_stores": 1}] * 16
    return tuple(stops)


def relation_launches(A: int, segments: int, anchor_parts: int, live: bool) -> Launches:
    """Of operands that are kept as they are, without bias, masks and an index, where what blocks
    and chunks add up is more than one part. at::addbmm makes a product for each anchor."""
    if not live:
        return Launches(torch=60, own=2 * segments)
    return Launches(torch=92 + A + segments * (1 + (anchor_parts > 1)), own=4 * segments)


def relation(gpu: Gpu, K: int, live: bool, A: int = 64) -> Work:
    """relation_nce, B = 64, H = R = 128, everything in bfloat16, keys are rows. Memory: inputs
    and outputs once; keys as prepared, norms, partial sums and what else the plan keeps, once
    written and once by each pass read, but sums over segments once in all and prepared keys once in
    all, since the L2 cache holds a segment; torch's own steps on [A, B, H], of which each fits the
    cache, are left out. Tensor cores: for live keys W'W hid, of which norms come too where a block
    has all hidden units, else W hid; the logits twice, the gradients by them of keys and queries, a
    triangle for W'W's; without, W hid, the logits, the gradient of the queries. Fp64: the product
    Q W, W'W, and the sums of threads. Issue and shared memory: turns of the loops of the logits
    and, where norms come of W'W, of the keys, where no key is left out, without the logarithm of
    every second turn; of the other passes, live, the loop of their products only, and what the
    keys' pass copies for them."""
    B = 64
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
    norms = not live or not made["keys"]["first"]
    pair, least_pair = H * R * norms + of_queries, H * H + of_queries
    doubles = A * B * H * R + 4 * A * K  # Q W; four sums of a thread, every second turn
    segments, anchor_parts = -(-K // made["segment"]), 1
    loops = [
        MainLoop(
            r"relation_logits<kBF16, kNce, 4>",
            passes=A * K / 16,
            stops=logit_stops(logits["stages"], norms=norms),
        )
    ]
    if live:
        outputs = 2 * (K * H + A * H + R * H)
        keys, weight = made["keys"], made["weight"]
        doubles += R * H * H
        anchor_parts = keys["anchor_parts"]
        memory += outputs + 4 * A * K * (2 + 2)  # 1 / |w| and c, for one pass each
        memory += 2 * 4 * keys["anchor_parts"] * K * H + 2 * 4 * keys["key_parts"] * A * H
        memory += 2 * 4 * K * H + 2 * 4 * weight["chunks"] * H * H  # the keys' sum, G's gradient
        least += outputs
        gram = sum(16 * (row + 16) for row in range(0, H, 16))  # rows of 16 up to the diagonal
        of_keys = H * H + 2 * B * H
        pair, least_pair = pair + of_keys + gram, least_pair + B * H + H * (H + 1) // 2
        # QW's piece for a tile and an anchor, or where nothing stays that twice and W'W's two
        pieces = 1 if keys["resident"] else 4
        turns = {} if norms else {"passes": A * K / 16, "stops": key_stops(), "within": True}
        loops += [
            MainLoop(
                rf"relation_keys<kBF16, kNce, {keys['warps']}>",
                2 * A * K * of_keys,
                copied=pieces * 64 * 256 * A * K / keys["keys_of_a_tile"],
                **turns,
            ),
            MainLoop(r"relation_gram<kBF16>", 2 * A * K * gram),
        ]
    return Work(
        bytes=memory,
        least_bytes=least,
        tensor={"bf16": 2 * A * K * pair},
        least_tensor=2 * A * K * least_pair,
        doubles=doubles,
        special=2 * A * B * K * (2 if live else 1),
        launches=relation_launches(A, segments, anchor_parts, live),
        main_loops=tuple(loops),
        pairs=A * K,
        work_bytes=made["work_bytes"],
    )


# ---------------------------------------------------------------------------------------------
# difference_nce, gradient of the query, NCE, shared negatives. csrc/cuda/difference.cuh

LOGIT_MULTIPLY_ADDS, LOGIT_SPECIAL = 20, 2  # of law of cosines, softplus and sums, of a logit
DIFFERENCE_LAUNCHES = {"float": Launches(torch=106, own=5), "bf16": Launches(torch=115, own=5)}


def difference_shared(gpu: Gpu, K: int, operands: str) -> Work:
    """difference_nce, A = B = 64, D = 128, shared negatives: a block compares all anchors and
    queries with tiles of 32 keys, whose rows come from device memory once; its sums, and a bit of
    every (anchor, key), are written once and read once. At full precision a distance takes a
    subtraction and a multiply-add a column, from two-byte rows it is a product on tensor cores;
    weights times rows are multiply-adds in both. Fp64: the sums of threads. Issue and shared
    memory: the loop over the logits only."""
    A = B = 64
    D, row = 128, 128 * BYTES[operands]
    tiles = -(-K // 32)
    chunks = min(2 * gpu.multiprocessors, tiles)
    ends = (A + 3 * B) * row + K * 8  # anchor; query, positive, gradient; index
    kept = chunks * 4 * (B * D + 2 * A * B) + 8 * K
    distances = (A + B) * K * D
    tensor = {} if operands == "float" else {operands: 2 * distances}
    precision = {"float": "kF32", "bf16": "kBF16"}[operands]
    logits = MainLoop(  # 8 warps, each key
        f"difference_tiles<{precision}, false, kNce>", passes=8 * K, special=True
    )
    return Work(
        bytes=K * row + ends + 2 * kept,
        least_bytes=K * row + ends,
        tensor=tensor,
        least_tensor=sum(tensor.values()),
        multiply_adds=(0 if tensor else 2 * distances)
        + B * K * D
        + A * B * K * LOGIT_MULTIPLY_ADDS,
        doubles=2 * 256 * tiles,  # of each thread, a tile
        special=A * B * K * LOGIT_SPECIAL,
        launches=DIFFERENCE_LAUNCHES[operands],
        main_loops=(logits,),
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
        case
        for storage in ("float", "bf16")
        for case in (
            Case(
                "similar_mask",
                f"own, B=64 K=16384 D=128 N=2,000,000, {storage} bank",
                similar_own(64, 16384, 128, 2_000_000, storage),
            ),
            Case(
                "similar_mask",
                f"all rows, B=256 N=65536 D=128, {storage} bank",
                similar_shared(256, 65536, 128, storage),
            ),
        )
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
            f"bf16, A={A} B=64 H=R=128 K={K}, "
            + ("all gradients" if live else "gradient of the query"),
            functools.partial(relation, K=K, live=live, A=A),
        )
        for A, K, live in (
            (8, 16384, False),
            (64, 16384, False),
            (64, 16384, True),
            (64, 131072, False),
            (64, 131072, True),
        )
    ),
]


# ---------------------------------------------------------------------------------------------
# Files of csrc/cuda

SOURCES = {
    "relation": "relation_nce",
    "difference": "difference_nce",
    "instance": "instance_nce",
    "similar": "similar_mask",
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
        arch = f"sm_{sass.generation(arch)}"
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


def code_for(gpu: Gpu, kernels: Iterable[Kernel]) -> str:
    """The architecture of a build whose code stands for what runs on the GPU: the newest that is
    not newer; "" where there is none. A GPU runs the code of an older one of its own major version
    as it is, and of other ones what the driver makes of it."""
    archs = {k.arch for k in kernels if sass.generation(k.arch) <= sass.generation(gpu.arch)}
    return max(archs, key=sass.generation, default="")


def runs_as_it_is(gpu: Gpu, kernels: Iterable[Kernel]) -> bool:
    """Whether the GPU runs that code itself."""
    arch = code_for(gpu, kernels)
    return bool(arch) and sass.generation(arch) // 10 == sass.generation(gpu.arch) // 10


def issued(part: MainLoop, arch: str, kernels: Iterable[Kernel]) -> list[tuple[float, Counts]]:
    """How often warps go through which code; empty where the build has no such kernel, or none
    with that loop."""
    kernel = next(
        (k for k in kernels if k.arch == arch and re.search(part.kernel, str(k.name))), None
    )
    if kernel is None or kernel.loop is None:
        return []
    if part.special:
        return [(part.passes, kernel.special_loop)]
    whole = kernel.loop
    if part.stops:
        loop = kernel.inner_loop if part.within else kernel.tile_loop
        way = loop and sass.turn(loop, part.stops)
        if way is None:
            return []
        left = max(part.tensor_operations - part.passes * way.tensor_operations, 0)
        rest = [(left / whole.tensor_operations, whole)] if left else []
        return [(part.passes, way), *rest]
    if part.multiply_adds:
        return [(part.multiply_adds / (32 * whole.multiply_add), whole)]
    return [(part.passes or part.tensor_operations / whole.tensor_operations, whole)]


def loop_clocks(
    parts: Sequence[MainLoop], gpu: Gpu, kernels: Iterable[Kernel]
) -> dict[str, float] | None:
    """Clocks, of all multiprocessors together, in which main loops issue their instructions and
    in which their shared memory is at work; None where a loop is not known."""
    arch = code_for(gpu, kernels)
    found = [issued(part, arch, kernels) for part in parts]
    if not found or not all(found):
        return None
    all_code = [turns for of_part in found for turns in of_part]
    return {
        "issue": sum(passes * code.instructions for passes, code in all_code) / ISSUE,
        "shared": sum(passes * code.shared_clocks for passes, code in all_code)
        + sum(part.copied for part in parts) / sass.SHARED_BYTES,
    }


def clocks_a_pair(work: Work, gpu: Gpu, kernels: Iterable[Kernel]) -> dict[str, float] | None:
    """Clocks of a multiprocessor for each pair of the first main loop."""
    clocks = loop_clocks(work.main_loops[:1], gpu, kernels) if work.pairs else None
    return clocks and {name: count / work.pairs for name, count in clocks.items()}


def seconds(work: Work, gpu: Gpu, kernels: Iterable[Kernel]) -> dict[str, float | None]:
    """Time of each limit of the GPU alone. Its kernels take their maximum at least, by the model,
    and their sum where none overlaps another."""
    loops = loop_clocks(work.main_loops, gpu, kernels)
    rates = {kind: gpu.mma_sync * rate * 1e12 for kind, rate in gpu.tensor.items()}
    return {
        "memory": work.bytes / (gpu.bandwidth * 1e9),
        "tensor": sum(count / rates[kind] for kind, count in work.tensor.items()),
        "fp32": work.multiply_adds / (gpu.multiply_adds * gpu.clocks),
        "fp64": work.doubles / (gpu.doubles * gpu.clocks),
        "special": work.special / (SPECIAL * gpu.clocks),
        "issue": loops and loops["issue"] / gpu.clocks,
        "shared": loops and loops["shared"] / gpu.clocks,
    }


def assumptions() -> list[str]:
    """What cases that follow a plan take for granted, and a line for each GPU."""
    lines = [" ".join(case.__doc__.split()) for case in (relation, difference_shared)]
    lines.append(
        f"All GPUs: {SPECIAL} special functions, {ISSUE} instructions and {sass.SHARED_BYTES} "
        f"bytes of shared memory a clock and multiprocessor; {LAUNCH * 1e6:g} us of the host a "
        "launch"
    )
    for gpu in GPUS:
        rates = ", ".join(f"{kind} {rate:,g}" for kind, rate in gpu.tensor.items())
        assumed = " (an assumption)" if gpu.assumed else ""
        lines.append(
            f"{gpu.name} ({gpu.arch}): {gpu.multiprocessors} multiprocessors at "
            f"{gpu.gigahertz} GHz, {gpu.bandwidth:,.0f} GB/s, tensor cores {rates} TFLOP/s, of "
            f"which mma.sync reaches {gpu.mma_sync:.0%}{assumed}; {gpu.multiply_adds} fp32 and "
            f"{gpu.doubles} fp64 multiply-adds a clock and multiprocessor"
        )
    return lines
