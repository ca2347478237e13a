"""Fills Triton's cache for a GPU that is not here with the kernels that the check launches.

Host functions run on the CPU as on that GPU; each launch compiles its kernel as Triton would there
and leaves it in TRITON_CACHE_DIR. What they return means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from unittest import mock

import torch

from bench import ahead_of_time
from bench.gpu_check import correctness, times
from bench.gpu_check.rows import emit
from crrcd_ext import _backend, _schema
from crrcd_ext.triton import register


class Driver:
    """All that Triton asks of a driver before it launches."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiling(kernel, grid, chosen, *arguments, **constants) -> None:
    """In the place of launch.run: the kernel, and what Triton compiles to start it with."""
    from triton.backends.nvidia.driver import CudaLauncher

    from crrcd_ext.triton import launch

    if 0 not in grid:
        made = kernel.warmup(*arguments, grid=grid, **constants, **launch.options(chosen))
        CudaLauncher(made.src, made.metadata)


@contextlib.contextmanager
def without_driver() -> Iterator[None]:
    """Triton's modules for the host are linked against an empty libcuda, and not loaded."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaUtils
    from triton.runtime import build

    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/libcuda.so.1"
        options = ["-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null"]
        subprocess.run(["cc", *options, "-o", library], check=True)
        with (
            mock.patch.object(knobs.nvidia, "libcuda_path", folder),
            mock.patch.object(build, "_load_module_from_path", lambda *_: mock.MagicMock()),
        ):
            CudaUtils()
            yield


def warm(arch: str) -> int:
    """How many calls were made."""
    from triton.runtime import driver

    from crrcd_ext.triton import launch

    library = torch.library.Library("crrcd_warm", "DEF")
    for schema in _schema.SCHEMAS:
        library.define(schema)
    for operator, of in register.MODULES.items():
        library.impl(operator, register.entry(operator, of), "CPU")
    _backend.COMPILED["warm"] = _backend.Compiled("cpu", "crrcd_warm")
    driver.set_active(Driver(arch))
    calls = 0
    with (
        without_driver(),
        ahead_of_time.recording(arch),
        mock.patch.object(launch, "run", compiling),
    ):
        found = [c for o in correctness.OPERATORS for c in correctness.all_cases(o)]
        for case in found:
            dtype, products = correctness.PRECISIONS[case.precision]
            torch.set_float32_matmul_precision(products)
            for small in (True, False):
                given = correctness.on(correctness.inputs(case, small), "cpu", dtype)
                correctness.call(case, given, "warm")
                calls += 1
        torch.set_float32_matmul_precision("highest")
        with mock.patch.dict(times.VARIANTS, triton=(times.OPERATOR, "warm")):
            for turn in times.turns(times.headline(), "cpu"):
                turn.step("triton")()
                calls += 1
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args()
    began = time.monotonic()
    calls = warm(options.arch)
    emit(kind="Triton's cache", calls=calls, s=round(time.monotonic() - began, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
