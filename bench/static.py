"""`python -m bench static`: resources, instructions and modelled times of the GPU kernels."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import ahead_of_time, report, sass, static_model, static_triton, suite
from bench.sass import Counts, Kernel
from bench.table import markdown_table, terminal_table
from crrcd_ext import triton


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor; all have 65,536 registers."""

    threads: int
    blocks: int
    shared: int  # bytes


_LARGE, _SMALL = 228 * 1024, 100 * 1024
LIMITS = {
    80: Limits(2048, 32, 164 * 1024),
    86: Limits(1536, 16, _SMALL),
    87: Limits(1536, 16, 164 * 1024),
    89: Limits(1536, 24, _SMALL),
    90: Limits(2048, 32, _LARGE),
    100: Limits(2048, 32, _LARGE),
    103: Limits(2048, 32, _LARGE),
    120: Limits(1536, 24, _SMALL),
    121: Limits(1536, 24, _SMALL),
}


def blocks_per_multiprocessor(arch: str, registers: int, threads: int, shared: int) -> int | None:
    """Blocks of `threads` threads that one multiprocessor holds; None for an unknown one."""
    limits = LIMITS.get(sass.generation(arch))
    if limits is None:
        return None
    warps = -(-threads // 32)
    # Registers are given to warps in units of 256, by four partitions of the multiprocessor. A
    # block whose warps do not fit when they are counted by fours is not started at all.
    of_warp = -(-registers * 32 // 256) * 256
    starts = of_warp * (-(-warps // 4) * 4) <= 65536
    by_registers = 4 * (16384 // of_warp) // warps if starts else 0
    by_shared = limits.shared // (-(-shared // 128) * 128 + sass.SYSTEM_SHARED)
    return min(limits.blocks, limits.threads // (32 * warps), by_registers, by_shared)


def operator_of(source: str) -> str:
    """The operator that a file of csrc/cuda belongs to; "" for one that SOURCES does not know."""
    known = [name for name in static_model.SOURCES if f"{source}_".startswith(f"{name}_")]
    return static_model.SOURCES[max(known, key=len)] if known else ""


def describe(kernel: Kernel) -> dict[str, object]:
    """A kernel for JSON."""
    name, use = kernel.name, kernel.resources
    dynamic = static_model.DYNAMIC_SHARED.get(name.kernel, lambda *_: 0)(name, kernel.arch)
    threads = use.max_threads or 1024
    return {
        "arch": kernel.arch,
        "operator": operator_of(name.source),
        "source": name.source,
        "kernel": name.kernel,
        "types": list(name.types),
        "variant": list(name.variant),
        "name": str(name),
        "symbol": kernel.symbol,
        "resources": asdict(use) | {"dynamic_shared": dynamic},
        "blocks_per_multiprocessor": blocks_per_multiprocessor(
            kernel.arch, use.registers, threads, use.shared + dynamic
        ),
        "counts": asdict(kernel.counts),
        "main_loop": kernel.loop and asdict(kernel.loop) | {"contains": kernel.loop_contains},
    }


HEADER = ["kernel", "regs", "stack", "spill", "shared", "threads", "blocks", "MMA", "LDSM"]
HEADER += ["LDGSTS", "LDG", "STG", "atomics", "BAR", "loop", "MMA", "FMA", "MUFU", "LDS"]

NOTES = """\
regs: registers of a thread. stack: bytes of a thread's stack, which holds spilled registers; spill:
loads and stores of it. shared: bytes, static + dynamic. threads: most of a block, by the source
(blank: 1024). blocks: that many such blocks at once on a multiprocessor. MMA: tensor-core
instructions; LDSM: ldmatrix; LDGSTS: cp.async; LDG, STG: loads and stores of device memory, bits of
a thread x how many; atomics: RED and ATOM; BAR: barriers of a block. All count what stands in the
kernel, not what is run. loop: instructions in the main loop, each branch once, and of those tensor
core, multiply-adds, special functions, loads of shared memory; the main loop is the one with the
most tensor-core work, or the innermost with the most multiply-adds; +: it has loops within it."""

MODEL_HEADER = ["GPU", "MB", "x least", "memory", "tensor", "fp32", "fp64", "special"]
MODEL_HEADER += ["issue", "shared", "bound by", "most ms", "sum ms", "launches", "host ms"]
MODEL_HEADER += ["call ms", "a pair", "work MB"]
MODEL_NOTES = """\
Model, not measured. MB: to and from device memory by the plan; x least: over each input once and
each output once, as GFLOP on tensor cores over the least that the formula needs. Then the time of
each limit of the GPU alone, in microseconds. tensor: at the rate of mma.sync. issue, shared:
instructions and shared memory of the main loops as compiled, every branch of them taken, but the
usual way where a case says so (~: of code for another generation than the GPU's, which has none in
this build; blank: there is no such code). Shared memory counts by the width of ldmatrix, loads,
stores and cp.async: lanes that read one address take less, bank conflicts more. bound by: the
longest, after "host" where the launches take longer. most: the longest of the GPU's limits, if all
overlap; sum: if none does. launches: of PyTorch's kernels + ours, backward pass included; host:
their time. call: at least the longer of most and host, at most one after the other; as a CUDA graph
it is the GPU's time alone. a pair: clocks of issue/shared memory of a multiprocessor for each
(anchor, key) in the main loop of the logits. work MB: work space by the plan."""


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{bits}x{number}" for bits, number in sorted(counts.items(), reverse=True))


def _number(value: int) -> str:
    return str(value) if value else ""


def row(kernel: Kernel) -> list[str]:
    about, use, counts = describe(kernel), kernel.resources, kernel.counts
    dynamic = about["resources"]["dynamic_shared"]
    loop = kernel.loop or Counts()
    blocks = about["blocks_per_multiprocessor"]
    return [
        f"{kernel.name}",
        str(use.registers),
        str(use.stack + use.local),
        str(counts.local),
        f"{use.shared}+{dynamic}" if dynamic else str(use.shared),
        str(use.max_threads or ""),
        "" if blocks is None else str(blocks),
        *map(_number, (counts.tensor_core, counts.ldmatrix, counts.async_copy)),
        _widths(counts.global_loads),
        _widths(counts.global_stores),
        *map(_number, (counts.atomic, counts.barrier)),
        (str(loop.instructions) + ("+" if kernel.loop_contains else "")) if kernel.loop else "",
        *map(_number, (loop.tensor_core, loop.multiply_add, loop.special)),
        _number(sum(loop.shared_loads.values())),
    ]


def tables(kernels: Sequence[Kernel]) -> dict[str, list[list[str]]]:
    """Rows of one table for each architecture and operator."""
    found: dict[str, list[list[str]]] = {}
    for kernel in sorted(kernels, key=lambda k: (sass.generation(k.arch), k.name.source, k.symbol)):
        operator = operator_of(kernel.name.source) or kernel.name.source
        found.setdefault(f"{kernel.arch}, {operator}", []).append(row(kernel))
    return {title: sorted(rows) for title, rows in found.items()}


def modelled(kernels: Sequence[Kernel]) -> list[dict[str, object]]:
    """Every case of the operators that have kernels here, on every GPU of the model."""
    operators = {operator_of(kernel.name.source) for kernel in kernels}
    results = []
    for case in static_model.CASES:
        if case.operator not in operators:
            continue
        for gpu in static_model.GPUS:
            work = case.on(gpu)
            times = static_model.seconds(work, gpu, kernels)
            known = {name: time for name, time in times.items() if time is not None}
            longest = max(known, key=known.get)
            host = work.launches.seconds
            results.append(
                {
                    "operator": case.operator,
                    "case": case.label,
                    "gpu": gpu.name,
                    "measured": False,
                    "code": static_model.code_for(gpu, kernels),
                    "own_code": static_model.runs_as_it_is(gpu, kernels),
                    "work": asdict(work),
                    "clocks_a_pair": static_model.clocks_a_pair(work, gpu, kernels),
                    "seconds": times,
                    "bound_by": longest,
                    "most_s": known[longest],
                    "sum_s": sum(known.values()),
                    "host_s": host,
                    "call_s": [max(known[longest], host), known[longest] + host],
                }
            )
    return results


def _ratio(value: float, least: float) -> str:
    return f"{value / least:.2f}" if least else ""


def _microseconds(result: dict, name: str) -> str:
    time = result["seconds"][name]
    if not time:
        return ""
    other = name in ("issue", "shared") and not result["own_code"]
    return ("~" if other else "") + f"{time * 1e6:,.1f}"


def model_row(result: dict) -> list[str]:
    work, pair = result["work"], result["clocks_a_pair"]
    host_longer = result["host_s"] > result["most_s"]
    least, most = (f"{time * 1e3:.3f}" for time in result["call_s"])
    return [
        result["gpu"],
        f"{work['bytes'] / 1e6:,.1f}",
        _ratio(work["bytes"], work["least_bytes"]),
        *(_microseconds(result, name) for name in result["seconds"]),
        ("host, " if host_longer else "") + result["bound_by"],
        f"{result['most_s'] * 1e3:.3f}",
        f"{result['sum_s'] * 1e3:.3f}",
        f"{work['launches']['torch']} + {work['launches']['own']}",
        f"{result['host_s'] * 1e3:.3f}",
        f"{least}-{most}",
        f"{pair['issue']:.1f}/{pair['shared']:.1f}" if pair else "",
        f"{work['work_bytes'] / 1e6:,.1f}" if work["work_bytes"] else "",
    ]


def model_tables(results: Sequence[dict]) -> dict[str, list[list[str]]]:
    """Rows of one table for each case, a GPU a row."""
    found: dict[str, list[list[str]]] = {}
    for result in results:
        work, title = result["work"], f"{result['operator']}, {result['case']}"
        if tensor := sum(work["tensor"].values()):
            ratio = _ratio(tensor, work["least_tensor"])
            title += f": {tensor / 1e9:,.1f} GFLOP on tensor cores, {ratio} x least"
        found.setdefault(title, []).append(model_row(result))
    return found


def module_with_kernels() -> Path:
    """The compiled module of this installation, if it has CUDA kernels."""
    try:
        from crrcd_ext import _C
    except ImportError as error:
        raise RuntimeError(f"crrcd_ext._C is not built ({error}): run `pip install .`") from error
    if not _C.build_info()["cuda"]:
        raise RuntimeError(
            "this build has no CUDA kernels (CRRCD_CUDA=1 pip install . makes one that has)"
        )
    return Path(_C.__file__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=["cuda", "triton"],
        default="cuda",
        help="kernels of the compiled module, or Triton's, compiled for the purpose",
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="SM",
        help="architectures, as sm_90, of Triton gfx942 too (default: all there are)",
    )
    parser.add_argument(
        "--kernel",
        default="",
        metavar="EXPRESSION",
        help="regular expression that finds 'FILE KERNEL<ARGUMENTS>' of those wanted, or the name "
        "of a kernel in Triton",
    )
    parser.add_argument(
        "--call",
        default="",
        metavar="EXPRESSION",
        help="of Triton: regular expression that finds 'OPERATOR TYPE GRADIENTS OBJECTIVE'",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench"), help="folder of the results"
    )
    parser.set_defaults(threads=None)


def _archs(options: argparse.Namespace, present: Sequence[str]) -> Sequence[str]:
    """Those that are wanted, after a look at the expressions too."""
    archs = options.arch or present
    if absent := [arch for arch in archs if arch not in present]:
        raise ValueError(f"--arch: expected some of {', '.join(present)}, got {absent[0]}")
    for name in ("kernel", "call"):
        expression = getattr(options, name)
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"--{name}: {expression!r} is no expression: {error}") from error
    return archs


def main_of_triton(options: argparse.Namespace) -> int:
    if (reason := triton.missing()) is not None:
        raise RuntimeError(reason)
    archs = _archs(options, list(ahead_of_time.MULTIPROCESSORS))
    about = suite.begin(options)
    found, failures, moved, parts = [], [], {}, [static_triton.NOTES]
    for arch in archs:
        of_arch = list(static_triton.rows(arch, failures, options.call, options.kernel))
        if not of_arch and not failures:
            expressions = f"{options.call!r}, {options.kernel!r}"
            raise ValueError(f"--call, --kernel: {expressions} find no kernel")
        found += of_arch
        rows = [row.cells() for row in of_arch]
        print(f"\n{arch}\n{terminal_table(static_triton.HEADER, rows)}", flush=True)
        parts += [f"## {arch}", markdown_table(static_triton.HEADER, rows)]
        moved[arch] = static_triton.traffic(arch, options.call)
        calls = [[call, f"{count / 1e6:.1f}"] for call, count in moved[arch].items()]
        print("\n" + terminal_table(["call", "traffic"], calls), flush=True)
        parts.append(markdown_table(["call", "traffic"], calls))
    print("\n" + static_triton.NOTES)
    document = static_triton.document(found, failures, moved)
    paths = report.write_files("static_triton", options.output, about, document, parts)
    print("\nwritten: " + ", ".join(map(str, paths)))
    for failure in failures:
        print(f"bench: static: {failure}", file=sys.stderr)
    return int(bool(failures))


def main(options: argparse.Namespace) -> int:
    if options.backend == "triton":
        return main_of_triton(options)
    module = module_with_kernels()
    archs = _archs(options, sass.architectures(module))
    about = suite.begin(options)
    kernels = sass.kernels(module, archs, options.kernel)
    if not kernels:
        raise ValueError(f"--kernel: {options.kernel!r} finds none of the kernels")
    parts = [NOTES]
    for title, rows in tables(kernels).items():
        print(f"\n{title}\n{terminal_table(HEADER, rows)}", flush=True)
        parts += [f"## {title}", markdown_table(HEADER, rows)]
    print("\n" + NOTES)
    results = modelled(kernels)
    if results:
        print("\nModel, not measured", flush=True)
        parts.append("## Model, not measured")
        for title, rows in model_tables(results).items():
            print(f"\n{title}\n{terminal_table(MODEL_HEADER, rows)}", flush=True)
            parts += [f"### {title}", markdown_table(MODEL_HEADER, rows)]
        stated = static_model.assumptions()
        print(f"\n{MODEL_NOTES}\n" + "\n".join(stated))
        parts += [MODEL_NOTES, "\n".join(f"- {line}" for line in stated)]
    document = {"kernels": [describe(kernel) for kernel in kernels], "model": results}
    document["assumptions"] = static_model.assumptions()
    paths = report.write_files("static", options.output, about, document, parts)
    print("\nwritten: " + ", ".join(map(str, paths)))
    return 0
