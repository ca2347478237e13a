"""Headline times: by events, by replays of a graph, and of the host alone, with rivals in turn."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch

from bench import difference_nce, instance_nce, relation_nce
from bench.gpu_check.rows import emit
from bench.measure import time_once
from bench.problem import Shape
from bench.steps import OPERATOR, Problem, Step
from bench.suite import Case, difference

SECONDS = 0.2
"""Of repeats of one variant, at most, each way of timing."""
VARIANTS = {
    "cuda": (OPERATOR, "cuda"),
    "triton": (OPERATOR, "triton"),
    "eager": ("eager", ""),
    "torch.compile": ("torch.compile", ""),
}
"""What is timed: a variant of the benchmarks, and the operator's backend."""


def headline(small: bool = False) -> dict[str, Case]:
    """Cases by name, the most telling first."""
    keys, rows = (64, 100) if small else (16_384, 100_000)
    large = 100 if small else 2_000_000
    queue = 64 if small else 65_536

    def relation(dtype: str, gradients: str, anchors: int) -> Case:
        shape = Shape(anchors=anchors, keys=keys, rows=rows)
        return relation_nce.Case(shape, dtype, gradients)

    def instance(negatives: str, objective: str, dtype: str, *shape: int) -> Case:
        return instance_nce.Case(instance_nce.Shape(*shape), negatives, objective, dtype)

    difference_shape = difference_nce.Shape(keys=keys, rows=rows)
    return {
        "relation_nce bf16, query, A=64": relation("bfloat16", "query", 64),
        "relation_nce bf16, query, A=8": relation("bfloat16", "query", 8),
        "relation_nce bf16, all, A=64": relation("bfloat16", "all", 64),
        "InfoNCE, shared, float32": instance(
            "shared", "infonce", "float32", 256, queue, 128, queue
        ),
        "CRD, 2M rows of float32": instance("own", "nce", "float32", 64, keys, 128, large),
        "CRD, 2M rows of bf16": instance("own", "nce", "bfloat16", 64, keys, 128, large),
        "difference_nce, shared": difference_nce.Case(difference_shape, "shared", "nce", "float32"),
        "relation_nce float32, query, A=64": relation("float32", "query", 64),
        "InfoNCE, shared, bf16 bank": instance(
            "shared", "infonce", "bfloat16", 256, queue, 128, queue
        ),
        "relation_nce bf16, all, A=8": relation("bfloat16", "all", 8),
    }


def repeats(run: Callable[[], object], device: str, seconds: float) -> list[float]:
    """Seconds of each of some runs, 3 to 50."""
    found = [time_once(run, device)]
    end = time.perf_counter() + seconds
    while len(found) < 3 or (len(found) < 50 and time.perf_counter() < end):
        found.append(time_once(run, device))
    return found


def host_seconds(step: Step, device: str) -> float:
    """What the host does until everything is launched, with nothing before it in the queue."""
    found = []
    for _ in range(20):
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def graph_of(step: Step) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """The step, captured, forward and backward, and the loss that a replay leaves."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph, loss


def is_lost(device: str) -> bool:
    """Whether the device's context is gone, after a trap or an access out of bounds."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class Turn:
    """A case that is being timed: its problem, and the gradients of the first variant."""

    def __init__(self, name: str, case: Case, device: str) -> None:
        self.name, self.case, self.device = name, case, device
        self.first: dict[str, torch.Tensor] | None = None

    @functools.cached_property
    def problem(self) -> Problem:
        with torch.device(self.device):
            return self.case.make_problem()

    def step(self, variant: str) -> Step:
        name, backend = VARIANTS[variant]
        with torch.device(self.device):
            return self.case.make_step(self.problem, name, backend or "reference", 512)

    def row(self, variant: str) -> dict[str, object]:
        row: dict[str, object] = {"case": self.name, "variant": variant}
        cuda = torch.device(self.device).type == "cuda"
        try:
            step = self.step(variant)
            step()
            gradients = self.problem.gradients()
            if self.first is None and variant == "torch.compile":
                self.step("eager")()
                self.first = self.problem.gradients()
            self.first = self.first or gradients
            differs = difference(gradients, self.first)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            found = repeats(step, self.device, SECONDS)
            row |= {"ms": statistics.median(found) * 1e3, "min ms": min(found) * 1e3}
            if cuda:
                row["peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
            row["host ms"] = host_seconds(step, self.device) * 1e3
            if cuda:
                row["graph ms"] = self.replayed(step)
            row |= {"differs": differs, "ok": differs <= self.case.tolerance}
        except torch.OutOfMemoryError:
            row |= {"ok": None, "note": "out of memory"}
        except Exception as error:
            row |= {"ok": False, "note": first_line(error)}
        if "problem" in self.__dict__:
            self.problem.clear_gradients()
        return row

    def replayed(self, step: Step) -> float | str:
        """Milliseconds of a replay, or why the step cannot be captured."""
        try:
            graph, _ = graph_of(step)
        except RuntimeError as error:
            with suppress(RuntimeError):
                torch.cuda.synchronize()
            return first_line(error)
        return statistics.median(repeats(graph.replay, self.device, SECONDS)) * 1e3


def emit_row(row: dict[str, object], device: str) -> None:
    words = [sys.executable, "-m", "bench.gpu_check.times", "--device", device]
    words += ["--case", f"'{row['case']}'", "--variant", str(row["variant"])]
    emit(kind="time", **row, command=" ".join(words))


def turns(found: dict[str, Case], device: str) -> Iterator[Turn]:
    for name, case in found.items():
        torch._dynamo.reset()
        yield Turn(name, case, device)
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", nargs="+", help="beginnings of names")
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--small", action="store_true", help="sizes for a look at this script")
    parser.add_argument(
        "--warm", action="store_true", help="only compile, so that it is done when times are taken"
    )
    parser.add_argument("--skip", type=int, default=0, help="rows that are known already")
    parser.add_argument("--once", action="store_true", help="one step each, for a profiler")
    options = parser.parse_args()
    found = headline(options.small)
    wanted = tuple(options.case or [""])
    found = {name: case for name, case in found.items() if name.startswith(wanted)}
    if options.warm:
        for turn in turns(found, options.device):
            for variant in options.variant:
                turn.step(variant)()
        return 0
    if options.once:
        for turn in turns(found, options.device):
            for variant in options.variant:
                step = turn.step(variant)
                step()
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                step()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
        return 0
    # Compiling takes long: whatever needs it comes after all that does not.
    slow = [v for v in options.variant if v == "torch.compile"]
    number = 0
    for variants in ([v for v in options.variant if v not in slow], slow):
        for turn in turns(found, options.device):
            for variant in variants:
                number += 1
                if number <= options.skip:
                    continue
                row = turn.row(variant)
                emit_row(row, options.device)
                if row["ok"] is False and is_lost(options.device):
                    again = [word for word in sys.argv[1:] if word != "--skip"]
                    again = again[:-1] if options.skip else again
                    words = ["-m", "bench.gpu_check.times", *again, "--skip", str(number)]
                    os.execv(sys.executable, [sys.executable, *words])
    return 0


if __name__ == "__main__":
    sys.exit(main())
