"""Hardware counters of five kernels, by ncu, of the headline cases."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Iterator

from bench.gpu_check.rows import emit
from bench.gpu_check.stage import ROOT

KERNELS = ("relation_logits", "relation_keys", "shared_tiles", "own_entries", "difference_tiles")
CASES = ("relation_nce bf16, all, A=64", "InfoNCE, shared, float32", "CRD, 2M rows of float32")
CASES += ("difference_nce, shared",)
SECTIONS = ("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats")
UNABLE = re.compile(r"LibraryNotLoaded|ERR_NVGPUCTRPERM|Failed to initialize the profiler")
"""What ncu says where it cannot read counters."""


def command(case: str) -> list[str]:
    return [
        "ncu",
        *("--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"),
        *("--kernel-name", "regex:" + "|".join(KERNELS), "--launch-count", "5", "--csv"),
        *("--set", "basic", *(word for name in SECTIONS for word in ("--section", name))),
        *(sys.executable, "-m", "bench.gpu_check.times", "--once", "--variant", "cuda"),
        *("--case", case),
    ]


SHOWN = {
    "Duration": "duration",
    "Compute (SM) Throughput": "compute %",
    "Memory Throughput": "memory %",
    "DRAM Throughput": "DRAM %",
    "L1/TEX Cache Throughput": "L1, shared %",
    "Issue Slots Busy": "issue %",
    "Executed Ipc Active": "IPC",
    "Achieved Occupancy": "occupancy %",
    "Registers Per Thread": "registers",
    "Grid Size": "blocks",
    "SM Frequency": "clock",
}
"""Of ncu's names what the report has in its table; all of them stand in the log."""


def short(name: str) -> str:
    """A kernel's name without its namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|crrcd::|cuda::|^void ", "", name)
    depth = 0
    for place in range(len(name) - 1, -1, -1):
        depth += (name[place] == ")") - (name[place] == "(")
        if depth == 0:
            return name[: place if name.endswith(")") else None][:90]
    return name[:90]


def parsed(text: str) -> Iterator[dict[str, object]]:
    """A row for each launch, from the comma-separated lines among ncu's output."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, object]] = {}
    for cells in csv.DictReader(io.StringIO("\n".join(lines))):
        row = launches.setdefault(cells["ID"], {"kernel": short(cells["Kernel Name"])})
        name = SHOWN.get(cells["Metric Name"])
        if name is None or name in row:
            continue
        unit = cells["Metric Unit"]
        row[name] = cells["Metric Value"] + (
            f" {unit}" if unit not in ("", "%", "inst/cycle") else ""
        )
    yield from launches.values()


def main() -> int:
    worst = 0
    for case in CASES:
        done = subprocess.run(command(case), cwd=ROOT, capture_output=True, text=True)
        print(done.stdout + done.stderr, flush=True)
        found = list(parsed(done.stdout))
        for row in found:
            emit(kind="counters", case=case, **row)
        unable = UNABLE.search(done.stdout + done.stderr)
        if unable:
            emit(kind="counters", case=case, kernel=f"ncu cannot run here: {unable[0]}", ok=None)
            return 0
        worst = worst or done.returncode or int(not found)
    return worst


if __name__ == "__main__":
    sys.exit(main())
