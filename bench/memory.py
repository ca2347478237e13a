"""Peak extra memory of one step, each measured in a fresh process of its own."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bench.suite import Case


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory needs Linux")


def peak_extra_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """How far the resident set rises above its size before `step`, at its highest; on a GPU, what
    PyTorch has allocated there.

    The kernel's high-water mark is reset right before. The gradients that the step leaves count.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(AttributeError):  # another C library than glibc
        # Hand freed blocks back, or the step would reuse them unseen.
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def measure_here(case: Case, name: str, backend: str, chunk: int, device: str = "cpu") -> int:
    """Body of the fresh process: warm up without touching what is measured, then measure."""
    there = torch.device(device)
    if not case.compiled(name):
        # Libraries load code and thread pools at their first call; a small problem brings them in.
        tiny = case.tiny()
        with there:
            warm_up = tiny.make_step(tiny.make_problem(), name, backend, 8)
        warm_up()
    with there:
        problem = case.make_problem()
        step = case.make_step(problem, name, backend, chunk)
    if case.compiled(name):
        step()  # the compilation itself is not to be counted
        problem.clear_gradients()
    return peak_extra_bytes(step, device)


def peak_extra_memory(
    case: Case, name: str, backend: str = "cpu", chunk: int = 512, device: str = "cpu"
) -> int:
    """Bytes of memory that one step of `name` needs beyond its inputs, from a fresh process."""
    request = {
        "command": case.command,
        "case": case.as_dict(),
        "name": name,
        "backend": backend,
        "chunk": chunk,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    # Without a fixed threshold glibc keeps freed blocks of up to 32 MB for later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(request)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parent.parent,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"measuring the memory of {name} at {case} failed: {last[0]}")
    return int(done.stdout.strip().splitlines()[-1])


def _main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request.pop("threads"))
    command = importlib.import_module(f"bench.{request.pop('command')}")
    print(measure_here(command.Case.from_dict(request.pop("case")), **request))


if __name__ == "__main__":
    _main()
