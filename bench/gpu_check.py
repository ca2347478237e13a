"""`python -m bench gpu_check`: build, tests, sanitizers, ceilings and benchmarks on this GPU."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from json import loads
from pathlib import Path

import torch

from bench import report, suite
from bench.measure import Copy, MatrixProduct, interleave
from bench.steps import OPERATOR
from bench.table import markdown_table, milliseconds, terminal_table

ROOT = Path(__file__).resolve().parent.parent
OPERATOR_TESTS = [
    f"tests/test_{operator}.py"
    for operator in ("relation", "relation_nce", "difference_nce", "instance_nce", "bank_update")
]
# What compute-sanitizer, which is slow, looks at.
SMALL_TEST = "tests/test_device.py::test_operators_on_tensors_of_the_device"


@dataclass(frozen=True)
class Step:
    """A command, and the program beside Python that it needs: without it the step is left out."""

    name: str
    command: Sequence[str]
    tool: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    result: str = ""  # the file of a benchmark, without its ending
    backend: str = "cuda"  # that it measures


def architecture(capability: tuple[int, int]) -> str:
    """TORCH_CUDA_ARCH_LIST of a device, with what its generation alone has from Hopper on."""
    return f"{capability[0]}.{capability[1]}" + ("a" if capability[0] >= 9 else "")


def benchmarks(device: str, output: Path) -> list[Step]:
    """Each operator against eager, torch.compile and checkpointed chunks, then a module's step,
    then the Triton operators."""
    usual = ["eager", "torch.compile", "chunks + checkpoint", "compiled chunks + checkpoint"]
    sizes = {
        "relation_nce": ["--keys", "4096", "16384", "65536", "--memory-keys", "16384", "1000000"],
        "instance_nce": ["--rows", "2000000", "--keys", "16384", "262144", "--own-keys", "16384"],
        "difference_nce": ["--keys", "16384", "262144", "--own-keys", "4096"],
    }
    commands = {
        name: [*more, "--variants", OPERATOR, *usual, "--chunks", "1024", "4096"]
        for name, more in sizes.items()
    } | {"module_step": []}
    shared = ["--device", device, "--repeats", "20", "--budget", "20", "--output", str(output)]
    python = [sys.executable, "-m", "bench"]
    ours = ["--backend", "triton", "--variants", OPERATOR]
    return [
        Step(f"bench {name}", [*python, name, *more, *shared], result=name)
        for name, more in commands.items()
    ] + [
        Step(
            f"bench {name}, triton",
            [*python, name, *more, *shared[:-1], str(output / "triton"), *ours],
            result=f"triton/{name}",
            backend="triton",
        )
        for name, more in sizes.items()
    ]


def steps(device: str, arch: str, output: Path) -> list[Step]:
    """Everything, in order. Ceilings are measured between the tests and the benchmarks."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q"]
    small = [*pytest, "-p", "no:cacheprovider", SMALL_TEST, "-k", "cuda"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    check = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    return [
        Step(
            "build",
            [python, "setup.py", "-q", "build_ext", "--inplace"],
            tool="nvcc",
            environment={"CRRCD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch},
        ),
        Step("kernels", [python, "-m", "bench", "static", "--output", str(output)]),
        Step("operators", [*pytest, *OPERATOR_TESTS, "-k", "on_cuda or on_triton"]),
        Step("tensors of the device", [*pytest, "tests/test_device.py"]),
        Step("memcheck", [*check, "memcheck", *small], "compute-sanitizer", uncached),
        Step("racecheck", [*check, "racecheck", *small], "compute-sanitizer"),
        *benchmarks(device, output),
    ]


def missing(plan: Sequence[Step]) -> list[str]:
    """What the commands name and this source tree lacks."""
    from bench.__main__ import make_parser

    found = []
    for step in plan:
        words = list(step.command)
        for word in words:
            file, _, function = word.partition("::")
            if not re.fullmatch(r"(tests/)?\w+\.py", file):
                continue
            path = ROOT / file
            if not path.exists():
                found.append(f"{step.name}: no file {file}")
            elif function and f"def {function}(" not in path.read_text():
                found.append(f"{step.name}: {file} has no {function}")
        if words[1:3] == ["-m", "bench"]:
            said = StringIO()
            try:
                with redirect_stderr(said):
                    make_parser().parse_args(words[3:])
            except SystemExit:
                found.append(f"{step.name}: {said.getvalue().strip().splitlines()[-1]}")
    return found


def has(tool: str) -> bool:
    """Whether a program can be started; nvcc may lie in the toolkit that torch has found."""
    if tool == "nvcc":
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME and (Path(CUDA_HOME) / "bin" / "nvcc").exists():
            return True
    return not tool or shutil.which(tool) is not None


def ceilings(device: str, *, size: int = 8192, megabytes: int = 1024) -> dict[str, float]:
    """GB/s of a copy (read and written), GFLOP/s of matrix products."""
    before = torch.get_float32_matmul_precision()
    with torch.device(device):
        meters: dict[str, Callable[[], None]] = {"copy": Copy(megabytes)}
        exact, low = MatrixProduct("float32", size), MatrixProduct("bfloat16", size)

    def product(meter: MatrixProduct, precision: str) -> Callable[[], None]:
        def run() -> None:
            torch.set_float32_matmul_precision(precision)
            meter()

        return run

    meters |= {"float32": product(exact, "highest"), "tf32": product(exact, "high")}
    meters |= {"bfloat16": low}
    amounts = {"copy": meters["copy"].amount, **dict.fromkeys(meters.keys() - {"copy"}, low.amount)}
    try:
        for meter in meters.values():
            meter()
        timings = interleave(meters, 10, 20.0, device)
    finally:
        torch.set_float32_matmul_precision(before)
    return {name: amounts[name] / timings[name].median / 1e9 for name in meters}


HEADER = ["case", "ms", "x copy", "x matrix product"]
HEADER += ["eager", "compile", "chunks", "triton", "peak MB"]
NOTES = """\
x copy: bytes of the rows that the index names/time over the measured copy; x matrix product:
nominal operations/time over the measured product of the operands' type. eager, compile, chunks:
their time over the operator's (the faster chunks with checkpoints); triton: that of the Triton
operator over that of the CUDA one. Benchmarks' own reports lie beside this one and say more."""


def _times(variants: Mapping[str, Mapping], names: Sequence[str]) -> str:
    known = [variants[name] for name in names if name in variants]
    found = [variant["times_operator"] for variant in known if "times_operator" in variant]
    return f"{min(found):.2f}" if found else ""


def title(name: str, case: Mapping) -> str:
    """Operator, options and sizes of one case of a benchmark's JSON."""
    options = [str(v) for k, v in case.items() if k in ("negatives", "objective", "dtype", "grads")]
    sizes = " ".join(f"{key}={value}" for key, value in case["shape"].items())
    return ", ".join([name, *options, sizes])


def seconds_of(case: Mapping) -> float | None:
    """The operator's median, where it was run."""
    return case.get("variants", {}).get(OPERATOR, {}).get("median_s")


def case_row(
    name: str, case: Mapping, limits: Mapping[str, float], triton: Mapping[str, float]
) -> list[str] | None:
    """One case of a benchmark's JSON; None where the operator was not run. ``triton``: seconds of
    the Triton operator by title."""
    seconds = seconds_of(case)
    if seconds is None:
        return None
    variants = case["variants"]
    operator = variants[OPERATOR]
    # Operands are float32, the bank's type apart, but where relation_nce is under autocast.
    kind = case["dtype"] if name == "relation_nce" else "float32"
    label = title(name, case)

    def fraction(amount: str, limit: str) -> str:
        return f"{case[amount] / seconds / 1e9 / limits[limit]:.2f}" if amount in case else ""

    return [
        label,
        milliseconds(seconds),
        fraction("row_bytes", "copy"),
        fraction("nominal_operations", kind),
        _times(variants, ["eager"]),
        _times(variants, ["torch.compile"]),
        _times(variants, ["chunks + checkpoint", "compiled chunks + checkpoint"]),
        f"{triton[label] / seconds:.2f}" if label in triton else "",
        f"{operator['peak_bytes'] / 1e6:,.1f}" if "peak_bytes" in operator else "",
    ]


def run_step(step: Step) -> dict[str, object]:
    """Runs a command with its output on the terminal; what became of it."""
    if not has(step.tool):
        return {"name": step.name, "status": f"left out: {step.tool} is not installed"}
    suite.say(f"gpu-check: {step.name}")
    began = time.monotonic()
    done = subprocess.run(step.command, cwd=ROOT, env=os.environ | dict(step.environment))
    return {
        "name": step.name,
        "status": "done" if done.returncode == 0 else f"FAILED, status {done.returncode}",
        "seconds": round(time.monotonic() - began, 1),
        "command": " ".join(step.command),
    }


def run(plan: Sequence[Step], options: argparse.Namespace, **sizes: int) -> int:
    """All steps, whatever becomes of those before, and the report."""
    about = suite.begin(options)
    before = [step for step in plan if not step.result]
    done = [run_step(step) for step in before]
    limits = ceilings(options.device, **sizes)
    cases, triton = {}, {}
    for step in plan:
        if not step.result:
            continue
        done.append(run_step(step))
        if done[-1]["status"] != "done":
            continue
        found = loads((options.output / f"{step.result}.json").read_text())["cases"]
        if step.backend == "triton":
            times = {title(step.result.split("/")[1], case): seconds_of(case) for case in found}
            triton |= {label: seconds for label, seconds in times.items() if seconds is not None}
        else:
            cases[step.result] = found
    made = (case_row(name, c, limits, triton) for name, found in cases.items() for c in found)
    rows = [row for row in made if row is not None]
    table_of_steps = [[s["name"], str(s["status"]), str(s.get("seconds", ""))] for s in done]
    table_of_limits = [
        [f"{name}", f"{rate:,.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"]
        for name, rate in limits.items()
    ]
    parts = []
    for heading, header, lines in (
        ("Steps", ["step", "status", "s"], table_of_steps),
        ("Ceilings", ["measured", "rate"], table_of_limits),
        ("Operators", HEADER, rows),
    ):
        print(f"\n{heading}\n{terminal_table(header, lines)}")
        parts += [f"## {heading}", markdown_table(header, lines)]
    document = {"steps": done, "ceilings": limits, "benchmarks": cases, "triton_seconds": triton}
    paths = report.write_files("gpu_check", options.output, about, document, [*parts, NOTES])
    print(f"\n{NOTES}\n\nwritten: " + ", ".join(map(str, paths)))
    return int(any(str(s["status"]).startswith("FAILED") for s in done))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", help="the GPU")
    parser.add_argument(
        "--output", type=Path, default=Path("bench/results/gpu"), help="folder of the report"
    )
    parser.set_defaults(threads=None)


def main(options: argparse.Namespace) -> int:
    options.output = options.output.resolve()
    present = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(options.device) if present else (8, 0)
    plan = steps(options.device, architecture(capability), options.output)
    if lacking := missing(plan):
        raise RuntimeError("; ".join(lacking))
    if not present:
        tools = {step.tool: has(step.tool) for step in plan if step.tool}
        state = ", ".join(f"{t} {'is' if there else 'is not'} there" for t, there in tools.items())
        print(
            f"gpu-check: torch sees no GPU here, nothing was run; all that the {len(plan)} steps "
            f"start exists ({state})"
        )
        return 0
    return run(plan, options)
