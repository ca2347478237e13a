"""Times of steps that take turns in one process, and what the machine can do meanwhile."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.nn.functional import embedding_bag


@dataclass
class Timing:
    """Seconds of every repeat of one variant, in the order in which they were taken."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    def ratio_to(self, other: Timing) -> float:
        """Median of the ratios round by round, in which a drift of the machine's speed cancels."""
        return statistics.median(
            mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)
        )


def wait_for(device: str) -> None:
    """Until all that was asked of the device is done; the CPU does it at once."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_once(step: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of a step. On a GPU between two events of the current stream, before which nothing
    waits: the host's time is in it as far as the device waits for it, and that of a
    synchronisation is not."""
    if torch.device(device).type == "cuda":
        wait_for(device)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        step()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) * 1e-3
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def interleave(
    steps: Mapping[str, Callable[[], object]],
    repeats: int,
    budget: float = float("inf"),
    device: str = "cpu",
) -> dict[str, Timing]:
    """Run the steps in turn, `repeats` rounds, and return each one's times.

    Each round starts one step later than the last, so that none always runs after the same
    neighbour. After `budget` seconds no new round is begun, but three rounds are always made
    (fewer if `repeats` is smaller). The steps must have been warmed up.
    """
    names = list(steps)
    timings = {name: Timing() for name in names}
    began = time.perf_counter()
    gc.collect()
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        for round_number in range(repeats):
            if round_number >= 3 and time.perf_counter() - began > budget:
                break
            turn = round_number % len(names)
            for name in names[turn:] + names[:turn]:
                timings[name].seconds.append(time_once(steps[name], device))
    finally:
        if gc_was_on:
            gc.enable()
    return timings


class Meter(Protocol):
    """Something that can be timed and does `amount` of the work that a limit counts.

    Made within `with torch.device(...)`, it works there.
    """

    amount: float

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class Limit:
    """A rate measured in the run that bounds a step's time, and what it is called."""

    key: str
    label: str
    rate_field: str
    unit: str
    digits: int
    needed_field: str


MM = Limit("mm", "torch.mm", "mm_gflops", "GFLOP/s", 0, "nominal_operations")
ROWS = Limit("rows", "row sums", "rows_gb_s", "GB/s", 1, "row_bytes")
ROW_COPIES = Limit("row_copies", "row copies", "row_copies_gb_s", "GB/s", 1, "row_bytes")
EXP = Limit("exp", "torch.exp", "exp_g_s", "G/s", 1, "exponentials")


class MatrixProduct:
    """torch.mm of two square matrices: the rate that the nominal rate is compared with."""

    def __init__(self, dtype: str, size: int = 2048) -> None:
        generator = torch.Generator(torch.get_default_device()).manual_seed(0)
        kind = getattr(torch, dtype)
        self.left, self.right = (
            torch.randn(size, size, generator=generator).to(kind) for _ in range(2)
        )
        self.out = torch.empty(size, size, dtype=kind)
        self.amount = 2.0 * size**3

    def __call__(self) -> None:
        torch.mm(self.left, self.right, out=self.out)


class Copy:
    """Copy of a tensor too large for any cache; `amount` counts bytes read and bytes written."""

    def __init__(self, megabytes: int = 256) -> None:
        self.source = torch.ones(megabytes * 2**20 // 4)
        self.target = torch.zeros_like(self.source)
        self.amount = 2.0 * self.source.nbytes

    def __call__(self) -> None:
        self.target.copy_(self.source)


class RowSums:
    """Reads the rows of a bank that an index names, in its order, and keeps only sums of 256.

    torch.nn.functional.embedding_bag: nothing of any size is written, so that its rate is that of
    reading rows. `amount` counts bytes read.
    """

    def __init__(self, bank: torch.Tensor, index: torch.Tensor, length: int = 256) -> None:
        self.bank = bank
        self.index = index.reshape(-1)
        self.starts = torch.arange(0, len(self.index), length, device=index.device)
        self.amount = float(len(self.index) * bank.shape[1] * bank.element_size())

    def __call__(self) -> None:
        embedding_bag(self.index, self.bank, self.starts, mode="sum")


class RowCopies:
    """torch.index_select of the same rows, 2048 at a time into one buffer that stays in cache.

    What a gather by PyTorch's own means reaches; `amount` counts bytes read alone.
    """

    def __init__(self, bank: torch.Tensor, index: torch.Tensor, length: int = 2048) -> None:
        self.bank = bank
        self.pieces = index.reshape(-1).split(length)
        self.buffer = torch.empty(length, bank.shape[1], dtype=bank.dtype, device=bank.device)
        self.amount = float(index.numel() * bank.shape[1] * bank.element_size())

    def __call__(self) -> None:
        for piece in self.pieces:
            torch.index_select(self.bank, 0, piece, out=self.buffer[: len(piece)])


class Exponentials:
    """torch.exp of float32 numbers that stay in cache; `amount` counts numbers.

    Whatever the loss, each of its logits takes one exponential at least.
    """

    def __init__(self, length: int = 2**17, times: int = 32) -> None:
        self.source = torch.linspace(-8, 8, length)
        self.out = torch.empty_like(self.source)
        self.times = times
        self.amount = float(length * times)

    def __call__(self) -> None:
        for _ in range(self.times):
            torch.exp(self.source, out=self.out)
