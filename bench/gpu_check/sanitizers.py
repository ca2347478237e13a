"""A tool of compute-sanitizer over small calls of every operator; what it finds comes as rows.

Only the package's kernels are looked at, as torch's own would take most of the time; but initcheck
has to see who has written what they read.
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
UNABLE = re.compile(r"Device not supported|error 999|not supported on this|LibraryNotLoaded")
"""What a machine says on which the tool cannot run."""
MOST = 10
"""Findings that get a row of their own."""


def command(tool: str) -> list[str]:
    options = ["--error-exitcode", "9", "--report-api-errors", "no"]
    options += [] if tool == "initcheck" else ["--kernel-name", "kns=crrcd"]
    calls = [sys.executable, "-m", "bench.gpu_check.small_calls"]
    return ["compute-sanitizer", *options, "--print-limit", str(MOST), "--tool", tool, *calls]


def tell(tool: str, lines: Iterable[str]) -> bool:
    """Rows of what the tool prints between its marks; whether it can run here."""
    shown, again = 0, " ".join(command(tool))
    for line in lines:
        print(line, end="" if line.endswith("\n") else "\n", flush=True)
        text = line.strip().removeprefix(MARK.strip()).strip()
        if not line.startswith(MARK.strip()):
            continue
        if UNABLE.search(text):
            emit(kind="sanitizer", tool=tool, what=f"cannot run here: {text}", ok=None)
            return False
        summary = SUMMARY.search(text)
        if summary:
            right = summary.group(2) == "0"
            emit(kind="sanitizer", tool=tool, what=text, ok=right, command=again)
        elif FOUND.match(text) and shown < MOST:
            shown += 1
            emit(kind="sanitizer", tool=tool, what=text[:200], ok=False, command=again)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", choices=TOOLS, required=True)
    options = parser.parse_args()
    with subprocess.Popen(
        command(options.tool), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        unable = not tell(options.tool, process.stdout)
        if unable:
            process.kill()
    return 0 if unable else process.returncode


if __name__ == "__main__":
    sys.exit(main())
