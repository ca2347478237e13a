"""`python -m bench relation_nce`: the fused operator against plain PyTorch, in time and memory."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from bench import machine
from bench.baselines import BASELINES, CHUNKS, OPERATOR, Step, make_step
from bench.measure import Copy, MatrixProduct, interleave, time_once
from bench.memory import peak_extra_memory
from bench.problem import GRADIENTS, Problem, Shape, make_problem
from bench.table import markdown_table, megabytes, milliseconds, terminal_table

BASE = Shape()
# Every other shape: one size at a time around BASE, then corners and the module's own default.
TABLE = [
    *(replace(BASE, keys=keys) for keys in (256, 1024, 4096, 16384, 65536, 131072)),
    *(replace(BASE, anchors=anchors) for anchors in (16, 256)),
    *(replace(BASE, queries=queries) for queries in (16, 256)),
    *(replace(BASE, anchors=both, queries=both) for both in (16, 256)),
    *(replace(BASE, hidden=hidden) for hidden in (32, 512)),
    *(replace(BASE, relation=relation) for relation in (32, 512)),
    *(replace(BASE, hidden=both, relation=both) for both in (32, 512)),
    replace(BASE, anchors=8, queries=128, keys=16384),
    replace(BASE, anchors=16, queries=16, keys=256, hidden=32, relation=32),
]
# The rivals of the requirement. Chunks that run their backward at once are a further one: faster,
# but for a loss at the end of a graph only, and not for InfoNCE.
USUAL = ("eager", "torch.compile", "chunks + checkpoint", "compiled chunks + checkpoint")
# Gradients may differ by this much (relative L2) before a comparison of times means nothing.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
MM = "torch.mm"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _difference(gradients: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Largest relative L2 distance of a gradient."""
    return max(
        float((gradients[name] - truth[name]).norm() / truth[name].norm().clamp_min(1e-30))
        for name in truth
    )


class ChunkChoice:
    """The fastest chunk length of each chunked baseline, tried once for sizes that share it."""

    def __init__(self, candidates: tuple[int, ...] = CHUNKS, keys: int = 4096) -> None:
        self.candidates = tuple(candidates)
        self.keys = keys
        self.known: dict[tuple[object, ...], int] = {}

    def __call__(self, shape: Shape, name: str, dtype: str, grads: str) -> int:
        sample = replace(shape, keys=min(shape.keys, self.keys))
        key = (sample, name, dtype, grads)
        if key not in self.known:
            problem = make_problem(sample, grads)
            candidates = self.candidates
            if BASELINES[name][1] and len(candidates) > 2:
                candidates = candidates[1:4:2]  # each is compiled anew, which takes its time
            candidates = [c for c in candidates if c <= sample.keys] or [sample.keys]
            if len(candidates) == 1:
                return candidates[0]
            seconds = {}
            for chunk in candidates:
                step = make_step(problem, name, dtype, chunk=chunk)
                step()
                seconds[chunk] = min(time_once(step) for _ in range(2))
            self.known[key] = min(seconds, key=seconds.__getitem__)
        return self.known[key]


def _warm(problem: Problem, steps: dict[str, Step], dtype: str) -> dict[str, float]:
    """Run each step once and return how far its gradients lie from the first step's."""
    differences: dict[str, float] = {}
    truth: dict[str, torch.Tensor] | None = None
    for name, step in steps.items():
        step()
        gradients = problem.gradients()
        truth = truth or gradients
        differences[name] = _difference(gradients, truth)
        if not differences[name] <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"{name} and {next(iter(steps))} disagree at {problem.shape}, {dtype}: gradients "
                f"differ by {differences[name]:.1e}, allowed {TOLERANCE[dtype]:.0e}"
            )
    return differences


def run_case(
    shape: Shape,
    dtype: str,
    grads: str,
    variants: list[str],
    *,
    backend: str = "cpu",
    repeats: int = 7,
    budget: float = 60.0,
    memory: bool = True,
    choose_chunk: ChunkChoice | None = None,
) -> dict[str, object]:
    """Times, memory and agreement of the variants at one shape, as a dictionary for JSON."""
    choose_chunk = choose_chunk or ChunkChoice()
    torch._dynamo.reset()  # each shape is compiled for itself, as in a training run of that shape
    problem = make_problem(shape, grads)
    results: dict[str, dict[str, object]] = {name: {} for name in variants}
    steps: dict[str, Step] = {}
    for name in variants:
        style = BASELINES[name][0] if name != OPERATOR else "operator"
        if style == "whole" and shape.eager_bytes() > 0.7 * machine.available_bytes():
            results[name]["skipped"] = f"needs about {shape.eager_bytes() / 1e9:.0f} GB"
            continue
        chunk = 512
        if style in ("checkpoint", "backward"):
            chunk = results[name]["chunk"] = choose_chunk(shape, name, dtype, grads)
        steps[name] = make_step(problem, name, dtype, backend, chunk)
    differences = _warm(problem, steps, dtype)

    product_ = MatrixProduct(dtype)
    product_()
    timings = interleave({**steps, MM: product_}, repeats, budget)
    copy = Copy()
    copy()
    bandwidth = copy.bytes / min(time_once(copy) for _ in range(3))
    operations = shape.nominal_operations(grads)
    for name in steps:
        timing = timings[name]
        # Rate over rate, round by round: (operations/time) / (mm operations/mm time).
        fraction = operations / product_.operations / timing.ratio_to(timings[MM])
        results[name] |= {
            "seconds": timing.seconds,
            "median_s": timing.median,
            "min_s": timing.minimum,
            "mm_fraction": fraction,
            "difference": differences[name],
        }
        if OPERATOR in timings:
            results[name]["times_operator"] = timing.ratio_to(timings[OPERATOR])
    del problem, steps
    if memory:
        for name in variants:
            if "skipped" not in results[name]:
                results[name]["peak_bytes"] = peak_extra_memory(
                    shape, name, dtype, grads, backend, results[name].get("chunk", 512)
                )
    return {
        "shape": shape.as_dict(),
        "dtype": dtype,
        "grads": grads,
        "nominal_operations": operations,
        "mm_gflops": product_.operations / timings[MM].median / 1e9,
        "copy_gb_s": bandwidth / 1e9,
        "rounds": len(timings[MM].seconds),
        "variants": results,
    }


def best_baseline(case: dict, among: tuple[str, ...] | None = None) -> tuple[str, float] | None:
    """The fastest baseline of a case, and how many times longer than the operator it took."""
    times = {
        name: result["times_operator"]
        for name, result in case["variants"].items()
        if name != OPERATOR and "times_operator" in result and (among is None or name in among)
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


CASE_HEADER = ["", "median ms", "min ms", "x operator", "x torch.mm", "peak MB", "chunk", "differs"]


def case_rows(case: dict) -> list[list[str]]:
    """One row per variant of a case."""
    rows = []
    for name, result in case["variants"].items():
        if "skipped" in result:
            rows.append([name, result["skipped"], *[""] * (len(CASE_HEADER) - 2)])
            continue
        rows.append(
            [
                name,
                milliseconds(result["median_s"]),
                milliseconds(result["min_s"]),
                f"{result['times_operator']:.2f}" if "times_operator" in result else "",
                f"{result['mm_fraction']:.2f}",
                megabytes(result["peak_bytes"]) if "peak_bytes" in result else "",
                str(result.get("chunk", "")),
                f"{result['difference']:.0e}" if result["difference"] else "",
            ]
        )
    return rows


def case_title(case: dict) -> str:
    return (
        f"{case['dtype']}, gradients: {case['grads']}, {Shape(**case['shape'])}   "
        f"(torch.mm {case['mm_gflops']:.0f} GFLOP/s, copy {case['copy_gb_s']:.1f} GB/s, "
        f"{case['rounds']} rounds)"
    )


SUMMARY_HEADER = [
    *("A", "B", "K", "H", "R", "ms", "x torch.mm", "peak MB"),
    *("best usual", "x", "best of all", "x"),
]
SIZES = ("anchors", "queries", "keys", "hidden", "relation")


def summary_rows(cases: list[dict]) -> list[list[str]]:
    """One row per case: the operator, then the best baseline and its time over the operator's."""
    rows = []
    for case in cases:
        operator = case["variants"].get(OPERATOR)
        if operator is None:
            continue
        row = [str(case["shape"][name]) for name in SIZES]
        row += [milliseconds(operator["median_s"]), f"{operator['mm_fraction']:.2f}"]
        row.append(megabytes(operator["peak_bytes"]) if "peak_bytes" in operator else "")
        for among in (USUAL, None):
            best = best_baseline(case, among)
            row += [best[0], f"{best[1]:.2f}"] if best else ["", ""]
        rows.append(row)
    return rows


def summaries(cases: list[dict]) -> dict[str, list[list[str]]]:
    """Rows of the summary under a title for each dtype and set of gradients."""
    groups: dict[str, list[dict]] = {}
    for case in cases:
        groups.setdefault(f"{case['dtype']}, gradients: {case['grads']}", []).append(case)
    return {title: rows for title, members in groups.items() if (rows := summary_rows(members))}


MEMORY_HEADER = ["dtype", "grads", "A", "B", "K", "H", "R", "peak MB"]


def memory_rows(entries: list[dict]) -> list[list[str]]:
    return [
        [e["dtype"], e["grads"], *(str(e["shape"][n]) for n in SIZES), megabytes(e["peak_bytes"])]
        for e in entries
    ]


NOTES = """\
x operator: median over rounds of this variant's time over the operator's in the same round.
x torch.mm: nominal rate, (6 A K H R + 6 A B K R)/time for all gradients and
(2 A K H R + 4 A B K R)/time for the query's alone, over the rate of torch.mm on 2048 x 2048
matrices of that dtype in the same round. peak MB: highest resident memory of one step above that
before it, gradients included, from a fresh process. differs: largest relative L2 distance of a
gradient from the operator's. best usual: among eager, torch.compile and checkpointed chunks,
compiled or not; best of all: with chunks whose backward runs at once, too. bfloat16: float32
tensors under torch.autocast, for every variant."""


def write_report(output: Path, about: dict, cases: list[dict], memory_only: list[dict]) -> None:
    """relation_nce.json and relation_nce.md in the folder `output`."""
    document = {"about": about, "cases": cases, "memory_only": memory_only}
    (output / "relation_nce.json").write_text(json.dumps(document, indent=1) + "\n")
    parts = ["# relation_nce", "\n".join(f"- {line}" for line in machine.headline(about)), NOTES]
    for title, rows in summaries(cases).items():
        parts += [f"## Summary: {title}", markdown_table(SUMMARY_HEADER, rows)]
    if memory_only:
        parts += ["## Memory of the operator alone"]
        parts += [markdown_table(MEMORY_HEADER, memory_rows(memory_only))]
    for case in cases:
        parts += [f"## {case_title(case)}", markdown_table(CASE_HEADER, case_rows(case))]
    (output / "relation_nce.md").write_text("\n\n".join(parts) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = {"type": int, "nargs": "+"}
    parser.add_argument("--keys", default=[1024, 4096, 16384], **size, help="negatives, K")
    parser.add_argument("--anchors", default=[BASE.anchors], **size, help="A")
    parser.add_argument("--queries", default=[BASE.queries], **size, help="B")
    parser.add_argument("--hidden", default=[BASE.hidden], **size, help="H")
    parser.add_argument("--relation", default=[BASE.relation], **size, help="R")
    parser.add_argument("--bank-dim", default=[BASE.bank_dim], **size, help="D")
    parser.add_argument("--rows", type=int, default=BASE.rows, help="rows of the bank, N")
    parser.add_argument(
        "--shapes", choices=["table"], help="a table of shapes, not the sizes above"
    )
    dtypes = list(TOLERANCE)
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--grads", nargs="+", choices=list(GRADIENTS), default=list(GRADIENTS))
    variants = [OPERATOR, *BASELINES]
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=variants,
        default=variants,
        metavar="NAME",
        help="which to run, of: " + ", ".join(variants),
    )
    parser.add_argument("--backend", default="cpu", help="backend of the operator")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, in each of which all run")
    parser.add_argument(
        "--budget",
        type=float,
        default=60.0,
        help="seconds of a shape after which no new round is begun (after three)",
    )
    parser.add_argument("--threads", type=int, help="threads, for all of them (default: torch's)")
    parser.add_argument(
        "--chunks",
        type=int,
        nargs="+",
        default=list(CHUNKS),
        help="chunk lengths that are tried for the chunked baselines; one is not tried but taken",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument(
        "--memory-keys",
        type=int,
        nargs="*",
        default=[16384, 1_000_000],
        help="numbers of keys at which the operator's memory alone is measured",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench"), help="folder of the results"
    )


def main(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    sizes = (options.anchors, options.queries, options.keys, options.hidden, options.relation)
    shapes = [Shape(*size, rows=options.rows) for size in product(*sizes, options.bank_dim)]
    memory = not options.no_memory
    if options.shapes == "table":
        shapes, memory = [replace(shape, rows=options.rows) for shape in TABLE], False
    about = machine.describe()
    print("\n".join(machine.headline(about)))

    choose_chunk = ChunkChoice(options.chunks)
    cases: list[dict] = []
    memory_only: list[dict] = []
    todo = list(product(options.dtype, options.grads, shapes))
    for number, (dtype, grads, shape) in enumerate(todo, 1):
        _say(f"[{number}/{len(todo)}] {dtype}, gradients: {grads}, {shape}")
        case = run_case(
            shape,
            dtype,
            grads,
            options.variants,
            backend=options.backend,
            repeats=options.repeats,
            budget=options.budget,
            memory=memory,
            choose_chunk=choose_chunk,
        )
        cases.append(case)
        print(f"\n{case_title(case)}\n{terminal_table(CASE_HEADER, case_rows(case))}", flush=True)
        write_report(options.output, about, cases, memory_only)
    if memory and OPERATOR in options.variants:
        base = replace(shapes[0], keys=1)
        for dtype, grads, keys in product(options.dtype, options.grads, options.memory_keys):
            shape = replace(base, keys=keys)
            _say(f"memory of the operator alone: {dtype}, gradients: {grads}, K={keys}")
            peak = peak_extra_memory(shape, OPERATOR, dtype, grads, options.backend)
            entry = {"shape": shape.as_dict(), "dtype": dtype, "grads": grads, "peak_bytes": peak}
            memory_only.append(entry)
    write_report(options.output, about, cases, memory_only)
    for title, rows in summaries(cases).items():
        print(f"\nSummary: {title}\n{terminal_table(SUMMARY_HEADER, rows)}")
    if memory_only:
        print("\nMemory of the operator alone")
        print(terminal_table(MEMORY_HEADER, memory_rows(memory_only)))
    print("\n" + NOTES)
    from bench.plot import draw_over_keys

    written = [options.output / "relation_nce.json", options.output / "relation_nce.md"]
    written += draw_over_keys(cases, about, options.output)
    print("\nwritten: " + ", ".join(str(path) for path in written))
    return 0
