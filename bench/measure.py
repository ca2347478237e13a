"""Times of steps that take turns in one process, and what the machine can do meanwhile."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


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


def time_once(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def interleave(
    steps: Mapping[str, Callable[[], object]], repeats: int, budget: float = float("inf")
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
                timings[name].seconds.append(time_once(steps[name]))
    finally:
        if gc_was_on:
            gc.enable()
    return timings


class MatrixProduct:
    """torch.mm of two square matrices: the rate that the nominal rate is compared with."""

    def __init__(self, dtype: str, size: int = 2048) -> None:
        generator = torch.Generator().manual_seed(0)
        kind = getattr(torch, dtype)
        self.left, self.right = (
            torch.randn(size, size, generator=generator).to(kind) for _ in range(2)
        )
        self.out = torch.empty(size, size, dtype=kind)
        self.operations = 2.0 * size**3

    def __call__(self) -> None:
        torch.mm(self.left, self.right, out=self.out)


class Copy:
    """Copy of a tensor too large for any cache; `bytes` counts what is read and what is written."""

    def __init__(self, megabytes: int = 256) -> None:
        self.source = torch.ones(megabytes * 2**20 // 4)
        self.target = torch.zeros_like(self.source)
        self.bytes = 2.0 * self.source.nbytes

    def __call__(self) -> None:
        self.target.copy_(self.source)
