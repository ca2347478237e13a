"""Captured graphs, streams of the caller's and reduce-overhead: the same results as without."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator

import torch

import crrcd_ext
from bench.gpu_check import correctness
from bench.gpu_check.rows import emit
from bench.gpu_check.times import first_line, graph_of, is_lost
from crrcd_ext import functional

OPERATORS = ("relation_nce", "difference_nce", "instance_nce")


def step_of(operator: str, backend: str) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """A step that leaves the query's gradient in it, and the query."""
    case = correctness.Case(operator, "f32", "query", "nce", "shared")
    given = correctness.on(correctness.inputs(case, small=False), "cuda", torch.float32)
    query = given["query"] = given["query"].requires_grad_()

    def step() -> torch.Tensor:
        query.grad = None
        loss = getattr(functional, operator)(**given, backend=backend)
        loss.backward()
        return loss.detach()

    return step, query


def same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Largest relative distance."""
    return max(float((g - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True))


def results(step: Callable[[], torch.Tensor], query: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return step().clone(), query.grad.clone()


def captured(operator: str, backend: str) -> float:
    """Replayed with another query than it was captured with."""
    step, query = step_of(operator, backend)
    graph, loss = graph_of(step)
    gradient = query.grad
    with torch.no_grad():
        query.copy_(query.roll(1, -1))
    graph.replay()
    got = loss.clone(), gradient.clone()
    return same(got, results(step, query))


def on_a_stream(operator: str, backend: str) -> float:
    step, query = step_of(operator, backend)
    expected = results(step, query)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = results(step, query)
    torch.cuda.current_stream().wait_stream(stream)
    return same(got, expected)


def on_two_streams(operator: str, backend: str) -> float:
    """Two steps at a time, again and again: work space of one must not be the other's."""
    steps = [step_of(operator, backend) for _ in range(2)]
    expected = [results(*step) for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    worst = 0.0
    for _ in range(10):
        got = []
        for stream, step in zip(streams, steps, strict=True):
            with torch.cuda.stream(stream):
                got.append(results(*step))
        torch.cuda.synchronize()
        worst = max(worst, *(same(g, e) for g, e in zip(got, expected, strict=True)))
    return worst


def reduce_overhead(kind: str, backend: str) -> float:
    """A loss module with its heads, compiled to graphs, against itself: ten steps of training."""
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        arguments = {"embedding_dim": 64, "negatives": 4096, "backend": backend}
        criterion = getattr(crrcd_ext, kind)(64, 128, 20_000, **arguments).cuda()
        student = torch.nn.Linear(32, 64).cuda()
        optimizer = torch.optim.SGD([*student.parameters(), *criterion.parameters()], lr=0.01)
        generator = torch.Generator("cuda").manual_seed(0)
        module = torch.compile(criterion, mode="reduce-overhead") if compiled else criterion
        taken = []
        for _ in range(10):
            x, t = (torch.randn(64, n, device="cuda", generator=generator) for n in (32, 128))
            index = torch.randperm(20_000, device="cuda", generator=generator)[:64]
            loss = module(student(x), t, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            taken.append(loss.detach().clone())
        losses.append(torch.stack(taken))
    return same((losses[1],), (losses[0],))


def skipped() -> int:
    """Graphs that Inductor was asked for and did not make, since it was asked last."""
    return torch._dynamo.utils.counters["inductor"].pop("cudagraph_skips", 0)


def checks(backend: str) -> Iterator[tuple[str, Callable[[], float], float]]:
    """Name, function that measures a distance, the distance that is allowed."""
    for operator in OPERATORS:
        yield f"{operator}, captured and replayed", lambda o=operator: captured(o, backend), 1e-6
        yield f"{operator}, on a side stream", lambda o=operator: on_a_stream(o, backend), 1e-6
        yield f"{operator}, on two streams", lambda o=operator: on_two_streams(o, backend), 1e-6
    for kind in ("CRDLoss", "CRCDLoss", "CRRCDLoss"):
        yield f"{kind}, reduce-overhead", lambda k=kind: reduce_overhead(k, backend), 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--only", default="", help="beginning of a name")
    parser.add_argument("--first", type=int, default=0, help="number of the first check")
    options = parser.parse_args()
    base = [sys.executable, "-m", "bench.gpu_check.graphs", "--backend", options.backend]
    for number, (name, measure, allowed) in enumerate(checks(options.backend)):
        if not name.startswith(options.only) or number < options.first:
            continue
        row: dict[str, object] = {"kind": "graphs and streams", "backend": options.backend}
        row |= {"what": name, "command": " ".join([*base, "--only", f"'{name}'"])}
        try:
            distance = measure()
            emit(**row, differs=distance, skipped=skipped(), ok=distance <= allowed)
        except Exception as error:
            emit(**row, note=first_line(error), ok=False)
            if is_lost("cuda"):
                os.execv(sys.executable, [*base, "--first", str(number + 1)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
