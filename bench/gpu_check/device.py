"""First stage: versions, the GPU, who else is on it, and what the machine can do at most."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys

import torch

from bench import machine
from bench.gpu_check.rows import emit
from bench.measure import Copy, MatrixProduct, interleave


def nvidia_smi(query: str, fields: str) -> list[list[str]]:
    """Lines of `nvidia-smi --query-...`, nothing where there is no such program."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-{query}={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]


def problem() -> str | None:
    """Why nothing can be checked on this machine, or None. Asked without making a CUDA context."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if torch.cuda.is_available():
        return None
    found = nvidia_smi("gpu", "name,driver_version")
    if not found:
        return "torch sees no GPU here, nor does nvidia-smi"
    name, driver = found[0][:2]
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use the {name}: its driver, "
        f"{driver}, is too old, or CUDA_VISIBLE_DEVICES="
        f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')!r} hides it"
    )


def about() -> dict[str, object]:
    found = nvidia_smi("gpu", "name")
    return machine.describe("cpu") | {"device": found[0][0] if found else "no GPU"}


def others() -> list[str]:
    """Processes on the GPU that do not belong to this check, with what memory they hold."""
    mine = {os.environ.get("CRRCD_CHECK_PID", ""), str(os.getpid())}
    listed = nvidia_smi("compute-apps", "pid,process_name,used_memory")
    return [
        f"{', '.join(name)} (process {pid}, {memory})"
        for pid, *name, memory in listed
        if pid not in mine
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _program(name: str, *arguments: str) -> str:
    if shutil.which(name) is None:
        return "absent"
    done = subprocess.run([name, *arguments], capture_output=True, text=True, timeout=20)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return next((x for x in reversed(lines) if "elease" in x or "ersion" in x), "present")


def versions() -> None:
    emit(kind="version", what="python", version=sys.version.split()[0])
    for package in ("torch", "triton", "numpy", "pytest", "pytest-xdist", "hypothesis", "ninja"):
        emit(kind="version", what=package, version=_version(package))
    emit(kind="version", what="CUDA of torch", version=str(torch.version.cuda))
    for program in ("nvcc", "compute-sanitizer", "ncu"):
        emit(kind="version", what=program, version=_program(program, "--version"))


def gpu() -> None:
    busy = others()  # before this process is one of them
    properties = torch.cuda.get_device_properties(0)
    found = {
        "name": properties.name,
        "architecture": "sm_{}{}".format(*torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory, GB": round(properties.total_memory / 1e9, 1),
        "L2, MB": round(properties.L2_cache_size / 1e6, 1),
    }
    names = ("driver_version", "clocks.max.sm", "clocks.sm", "temperature.gpu", "power.draw")
    listed = nvidia_smi("gpu", ",".join(names))
    found |= dict(zip(names, listed[0], strict=False)) if listed else {}
    for what, value in found.items():
        emit(kind="gpu", what=what, value=value)
    emit(
        kind="gpu",
        what="other processes",
        value="; ".join(busy) if busy else "none",
        ok=not busy,
        command="nvidia-smi",
    )


def ceilings(device: str, size: int, megabytes: int) -> None:
    """GB/s of a copy (read and written), TFLOP/s of products of two square matrices."""
    for name in ("copy", "bfloat16", "tf32", "float32"):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        with torch.device(device):
            kind = "float32" if name == "tf32" else name
            meter = Copy(megabytes) if name == "copy" else MatrixProduct(kind, size)
        meter()
        timing = interleave({name: meter}, 10, 1.0, device)[name]
        rate = meter.amount / timing.median
        if name == "copy":
            emit(kind="ceiling", what="copy, read + written", rate=rate / 1e9, unit="GB/s")
        else:
            what = f"product of {size} x {size}, {name}"
            emit(kind="ceiling", what=what, rate=rate / 1e12, unit="TFLOP/s")
        del meter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--megabytes", type=int, default=4096)
    options = parser.parse_args()
    versions()
    if torch.device(options.device).type == "cuda":
        gpu()
    ceilings(options.device, options.size, options.megabytes)


if __name__ == "__main__":
    main()
