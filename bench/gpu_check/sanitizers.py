"""A tool of compute-sanitizer over small calls of every operator; what it finds comes as rows.

Only the package's kernels are looked at: torch's own would take most of the time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable

from bench.gpu_check.rows import emit
from bench.gpu_check.stage import ROOT

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
MARK = "========= "
FOUND = re.compile(
    r"(Invalid|Uninitialized|Out-of-range|Misaligned|Race|Error|Warning|Barrier|Divergent"
    r"|Program hit|Potential|Target application terminated|Internal)"
)
SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (\d+) (errors?|hazards?)")
MOST = 10
"""Findings that get a row of their own."""


def command(tool: str) -> list[str]:
    options = ["--error-exitcode", "9", "--kernel-name", "kns=crrcd", "--report-api-errors", "no"]
    calls = [sys.executable, "-m", "bench.gpu_check.small_calls"]
    return ["compute-sanitizer", *options, "--print-limit", str(MOST), "--tool", tool, *calls]


def tell(tool: str, lines: Iterable[str]) -> None:
    """Rows of what the tool prints between its marks."""
    shown, again = 0, " ".join(command(tool))
    for line in lines:
        print(line, end="" if line.endswith("\n") else "\n", flush=True)
        text = line.strip().removeprefix(MARK.strip()).strip()
        if not line.startswith(MARK.strip()):
            continue
        summary = SUMMARY.search(text)
        if summary:
            right = summary.group(2) == "0"
            emit(kind="sanitizer", tool=tool, what=text, ok=right, command=again)
        elif FOUND.match(text) and shown < MOST:
            shown += 1
            emit(kind="sanitizer", tool=tool, what=text[:200], ok=False, command=again)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", choices=TOOLS, required=True)
    options = parser.parse_args()
    with subprocess.Popen(
        command(options.tool), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        tell(options.tool, process.stdout)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
