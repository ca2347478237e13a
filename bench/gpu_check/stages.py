"""What is checked, in the order of its worth, and how long each may take."""

from __future__ import annotations

import os
import sys

from bench.gpu_check import module, sanitizers
from bench.gpu_check.stage import Job, Stage
from crrcd_ext._backend import OPERATORS

PYTHON = sys.executable
OPERATOR_TESTS = [f"tests/test_{name.rstrip('_')}.py" for name in OPERATORS]
BUILD_SECONDS = 90
"""For a build with all cores, where no module fits; it takes 40 more to try what was built."""


def script(name: str, *arguments: str) -> list[str]:
    return [PYTHON, "-m", f"bench.gpu_check.{name}", *arguments]


def environment() -> dict[str, str]:
    """Of all jobs: Triton's kernels that were brought along, and what others must not decide."""
    found = {"CRRCD_BACKEND": "", "CRRCD_TRITON_CONFIGS": "0", "CUDA_MODULE_LOADING": "LAZY"}
    found |= {"CRRCD_CHECK_PID": str(os.getpid()), "TRITON_INTERPRET": "0"}
    if module.UNPACKED.is_dir():
        found["TRITON_CACHE_DIR"] = str(module.UNPACKED)
    return found


def tests(*words: str, processes: int = 14) -> list[str]:
    plugin = ["-p", "bench.gpu_check.pytest_rows", "-p", "no:cacheprovider"]
    count = str(min(processes, os.cpu_count() or 1))
    return [PYTHON, "-m", "pytest", "-q", "--tb=short", *plugin, "-n", count, *words]


def job(name: str, command: list[str], *needs: str, **more: str) -> Job:
    return Job(name, command, environment() | more, needs)


def plan() -> list[Stage]:
    """All stages. Without a build they need 435 s, and the benchmarks get what is left."""
    module.unpack()
    # Many processes share the processors.
    alone = {"OMP_NUM_THREADS": "1"}
    uncached = alone | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    no_emulator = alone | {"CRRCD_EMULATOR": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    rivals = script("times", "--warm", "--variant", "torch.compile")
    return [
        Stage("device", 20, [job("versions and ceilings", script("device"))]),
        Stage(
            "module",
            30 + BUILD_SECONDS + 40,
            [
                job("module", script("module", "--seconds", str(BUILD_SECONDS))),
                job("Triton", script("module", "--backend", "triton")),
            ],
        ),
        Stage(
            "correctness",
            60,
            [
                job(f"{operator}, {backend}", command, backend, **alone)
                for backend in ("cuda", "triton")
                for operator in OPERATORS
                for command in [script("correctness", "--operator", operator, "--backend", backend)]
            ]
            # Meanwhile, on idle cores: what the times would wait for.
            + [job("rivals compiled", rivals, TORCHINDUCTOR_COMPILE_THREADS="4")],
        ),
        Stage("times", 90, [job("headline times", script("times"))]),
        Stage(
            "tests",
            75,
            [
                job(
                    "operators' tests",
                    tests(*OPERATOR_TESTS, "-k", "on_cuda"),
                    "cuda",
                    **no_emulator,
                )
            ],
        ),
        Stage(
            "sanitizers",
            75,
            [
                job(
                    tool,
                    script("sanitizers", "--tool", tool),
                    *("cuda", "compute-sanitizer"),
                    **(uncached if tool in ("memcheck", "initcheck") else alone),
                )
                for tool in sanitizers.TOOLS
            ],
        ),
        Stage("counters", 45, [job("ncu", script("counters"), "cuda", "ncu")]),
        Stage(
            "graphs",
            60,
            [
                job("graphs and streams", script("graphs"), "cuda"),
                job(
                    "tensors of the device",
                    tests("tests/test_device.py", processes=2),
                    **no_emulator,
                ),
                job(
                    "Triton's tests, a sample",
                    tests(*OPERATOR_TESTS, "-k", "on_triton", processes=10),
                    "triton",
                    **no_emulator,
                ),
            ],
        ),
        Stage("benchmarks", 3600, [job("cases", script("benchmarks"), "cuda")], open_ended=True),
    ]
