"""What a number must carry to be believed: command, machine, date, versions."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def available_bytes(device: str = "cpu") -> int:
    """Memory that can be had without swapping; on a GPU its own."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return int(_memory_gib() * 2**30)


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + (" with changes" if dirty.stdout.strip() else "")


def _native() -> dict[str, object]:
    try:
        from crrcd_ext import _C
    except ImportError:
        return {"compiled": False}
    return {"compiled": True, "isa": _C.isa_active(), "build": _C.build_info()}


def describe(device: str = "cpu") -> dict[str, object]:
    """Everything about this run that is not a measurement."""
    gpu = torch.device(device).type == "cuda"
    return {
        "command": "python -m bench " + shlex.join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_gib(), 1),
        "device": torch.cuda.get_device_name(device) if gpu else device,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "crrcd_ext": _native(),
    }


def headline(about: dict[str, object]) -> list[str]:
    """The same in two lines for a person."""
    native = about["crrcd_ext"]
    device = "" if about["device"] == "cpu" else f"{about['device']}; "
    path = f"instruction set {native['isa']}" if native["compiled"] else "not compiled"
    return [
        f"{about['command']}   ({about['date']}, commit {about['commit'] or 'unknown'})",
        f"{device}{about['cpu']}, {about['cores']} cores, {about['threads']} threads, "
        f"{about['memory_gib']} GiB; torch {about['torch']}, crrcd_ext {path}",
    ]
