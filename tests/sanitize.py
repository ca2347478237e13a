"""The backends' tests under AddressSanitizer and UBSan: `make sanitize`, or this file.

    python tests/sanitize.py [kernels] [cpu] [wide] [--share 1] [--pytest="-v"]

kernels: the CUDA kernels and their host entries on the emulator of tests/simt, without its checker,
         whose place the sanitizers take. First, planted bugs must be reported.
cpu:     the CPU backend, compiled anew into build/sanitize beside a copy of the package.
wide:    the same with AVX-512 and tile registers emulated (tests/simd/wide.h), once for each
         instruction set that has them, whatever this processor has.

Of the tests a share is run, always the same, so that it takes minutes; --share 1 runs all. The
first report ends the run. It is followed by the Python stack, whose test it belongs to.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from simt import build

ROOT = build.ROOT
FOLDER = ROOT / "build" / "sanitize"
WIDE_SETS = ("amx_bf16", "avx512_bf16", "avx512")
WIDE_FLAGS = (
    f"-Wno-psabi -mavx2 -mfma -mbmi -mbmi2 -DCRRCD_EMULATE_WIDE -include {ROOT}/tests/simd/wide.h"
)
OPERATORS = ("relation", "relation_nce", "difference_nce", "instance_nce", "bank_update")
OPERATOR_TESTS = [f"tests/test_{name}.py" for name in (*OPERATORS, "views")]

# Budgets of a few roundings are the release's: without its optimisation sums are rounded otherwise.
ROUNDED_OTHERWISE = "near_the_null_space"

# What each planted bug of tests/simt/kernels/planted.cu must be called.
PLANTED = {
    "global_row_out_of_bounds": "heap-buffer-overflow",
    "shared_out_of_bounds": "use-after-poison",
    "array_out_of_bounds": "out of bounds for type",
}
CALL_PLANTED = """
import sys
import torch
from simt import build
library = build.load_kernels(build.HERE / "kernels" / "planted.cu", checked=False)
tensors = torch.ones(64), torch.ones(64)
library.call(f"run_{sys.argv[1]}", 0, *tensors)
print("the correct twin ran", flush=True)
library.call(f"run_{sys.argv[1]}", 1, *tensors)
"""


def environment(**more: str) -> dict[str, str]:
    """Variables of a process that loads sanitized libraries into a Python that is not."""
    # Without the C++ library in front the sanitizer finds no function that throws.
    names = ("libasan.so", "libstdc++.so")
    paths = [
        subprocess.run(
            [build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in names
    ]
    options = "abort_on_error=1:print_stacktrace=1"
    return os.environ | {
        "LD_PRELOAD": " ".join(paths),
        # Python keeps memory to the end; both libraries have what csrc/*.cpp defines. Kernels run
        # on the emulator's stacks, which the fake ones of use-after-return cannot follow.
        "ASAN_OPTIONS": f"{options}:detect_leaks=0:detect_odr_violation=0"
        ":detect_stack_use_after_return=0:allocator_may_return_null=1:quarantine_size_mb=64",
        "UBSAN_OPTIONS": options,
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "tests"))),
        **more,
    }


def run_pytest(arguments: list[str], variables: dict[str, str]) -> int:
    # Reports go past Python's stderr: pytest must leave the file descriptor alone.
    command = [sys.executable, "-m", "pytest", "-p", "sanitize", "-q", "-x", "--capture=sys"]
    return subprocess.run([*command, *arguments], env=variables, cwd=ROOT).returncode


def pytest_addoption(parser) -> None:
    """This file is a plugin of that pytest."""
    parser.addoption("--share", type=float, default=1.0)
    parser.addoption("--package", type=Path, default=ROOT / "crrcd_ext")


def pytest_sessionstart(session) -> None:
    import crrcd_ext

    wanted = session.config.getoption("--package")
    if Path(crrcd_ext.__file__).parent != wanted:
        raise RuntimeError(f"sanitize: {crrcd_ext.__file__} was imported, not that of {wanted}")


def pytest_collection_modifyitems(config, items: list) -> None:
    drawn = random.Random(0)
    items[:] = [item for item in items if drawn.random() < config.getoption("--share")]


def run_kernels(arguments: list[str]) -> int:
    variables = environment(CRRCD_SIMT_SANITIZE="1")
    for name, words in PLANTED.items():
        done = subprocess.run(
            [sys.executable, "-c", CALL_PLANTED, name],
            env=variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if words not in done.stderr or "the correct twin ran" not in done.stdout:
            print(done.stdout, done.stderr, file=sys.stderr)
            print(f"sanitize: the planted bug {name} is not reported as '{words}'", file=sys.stderr)
            return 1
    print(f"sanitize: {len(PLANTED)} planted bugs are reported", flush=True)
    status = run_pytest([*OPERATOR_TESTS, "-k", "simt", *arguments], variables)
    return status or run_pytest(["tests/test_cuda_kernels.py", *arguments], variables)


def build_module(folder: Path, flags: str = "") -> Path:
    """Compiles crrcd_ext._C and copies the package to it; returns where that lies."""
    library = folder / "lib"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(library)]
    subprocess.run(
        [*command, "--build-temp", str(folder / "objects")],
        env=os.environ | {"CRRCD_SANITIZE": "1", "CRRCD_CUDA": "0", "CFLAGS": flags},
        cwd=ROOT,
        check=True,
    )
    shutil.copytree(
        ROOT / "crrcd_ext",
        library / "crrcd_ext",
        ignore=shutil.ignore_patterns("_C*", "__pycache__"),
        dirs_exist_ok=True,
    )
    return library


def run_module(library: Path, tests: list[str], arguments: list[str], **variables: str) -> int:
    path = " ".join(str(p.relative_to(ROOT)) for p in (library, ROOT, ROOT / "python"))
    arguments = ["-k", f"cpu and not {ROUNDED_OTHERWISE}", "-o", f"pythonpath={path}", *arguments]
    arguments += ["--package", str(library / "crrcd_ext")]
    return run_pytest([*tests, *arguments], environment(CRRCD_SIMT_SANITIZE="1", **variables))


def run_cpu(arguments: list[str]) -> int:
    return run_module(build_module(FOLDER / "cpu"), OPERATOR_TESTS, arguments)


def run_wide(arguments: list[str]) -> int:
    library = build_module(FOLDER / "wide", WIDE_FLAGS)
    for isa in WIDE_SETS:
        print(f"sanitize: wide: {isa}", flush=True)
        if status := run_module(library, OPERATOR_TESTS, arguments, CRRCD_CPU_ISA=isa):
            return status
    return 0


PARTS = {"kernels": run_kernels, "cpu": run_cpu, "wide": run_wide}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="of kernels, cpu, wide; default: all")
    parser.add_argument("--share", type=float, default=0.25, help="of the tests")
    parser.add_argument("--pytest", default="", metavar="ARGUMENTS", help="more for pytest")
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"expected {' or '.join(PARTS)}, got {unknown[0]}")
    for part in options.parts or PARTS:
        began = time.monotonic()
        try:
            more = ["--share", str(options.share), *shlex.split(options.pytest)]
            status = PARTS[part](more)
        except (build.BuildError, subprocess.CalledProcessError) as error:
            print(f"sanitize: {error}", file=sys.stderr)
            return 1
        print(f"sanitize: {part}: {time.monotonic() - began:.0f} s, status {status}", flush=True)
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
