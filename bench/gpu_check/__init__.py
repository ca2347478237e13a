"""`python -m bench gpu_check`: is it right and how fast, on the GPU of this machine, in 8 minutes.

Uses the Python that starts it, installs nothing, needs no network. Stages stand in `stages.py`, by
their worth, each under a limit of its own; the report is written after every one of them.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from bench.gpu_check import device, dry_run
from bench.gpu_check.report import Report, failures
from bench.gpu_check.stage import LEAST, Stage, run_stage
from bench.gpu_check.stages import plan
from bench.suite import say

MINUTES = 8.0


def usable(stages: Sequence[dict]) -> dict[str, str | None]:
    """What stages have found to work, "cuda" and "triton", and why not; until the stage "module"
    has ended, nothing is known to."""
    unknown = "the stage 'module' has not found kernels that run"
    found: dict[str, str | None] = dict.fromkeys(("cpu", "cuda", "triton"), unknown)
    for stage in stages:
        for job in stage["jobs"]:
            for row in job["rows"]:
                if row.get("kind") == "backend":
                    found[row["backend"]] = None if row["ok"] else str(row["why"])
    return found


def run(stages: Sequence[Stage], report: Report, seconds: float) -> int:
    """All stages in ``seconds`` together; a failing one does not keep the next from running."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, stop)
    try:
        with report.log.open("ab") as log:
            run_all(stages, report, seconds, log)
    except KeyboardInterrupt as error:
        report.write(f"stopped by {str(error) or 'the keyboard'}")
        return 1
    report.write("finished")
    wrong = failures(report.stages)
    say(f"{len(wrong)} failures; report: {report.markdown}")
    return int(bool(wrong))


def run_all(stages: Sequence[Stage], report: Report, seconds: float, log: IO[bytes]) -> None:
    began = time.monotonic()
    for number, stage in enumerate(stages, 1):
        left = seconds - (time.monotonic() - began)
        if left < LEAST:
            why = f"left out: {left:.0f} s are left"
            jobs = [{"name": job.name, "status": why, "rows": []} for job in stage.jobs]
            report.add({"name": stage.name, "limit": 0, "seconds": 0, "jobs": jobs})
            continue
        limit = min(stage.seconds, left)
        say(f"[{number}/{len(stages)}] {stage.name}: {limit:.0f} s of {left:.0f} s left")
        done = run_stage(stage, limit, log, usable(report.stages), report.goes_on)
        report.add(done)
        for failure in failures([done]):
            say(f"  WRONG  {failure['what']}\n         {failure['command']}")
        states = ", ".join(f"{job['name']}: {job['status']}" for job in done["jobs"])
        say(f"  {done['seconds']:.0f} s; {states}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together")
    parser.add_argument(
        "--output", type=Path, default=Path("bench/results"), help="folder of the report, 3 files"
    )
    parser.add_argument(
        "--stages", nargs="+", metavar="NAME", help="only those whose names begin so"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="without a GPU: everything that needs none (module, collection, scripts, sizes)",
    )
    parser.set_defaults(threads=None)


def main(options: argparse.Namespace) -> int:
    if not options.minutes > 0:
        raise ValueError(f"--minutes: expected a positive number, got {options.minutes}")
    stages = dry_run.plan() if options.dry_run else plan()
    if options.stages:
        known = [stage.name for stage in stages]
        wanted = tuple(options.stages)
        if unknown := [w for w in wanted if not any(name.startswith(w) for name in known)]:
            raise ValueError(f"--stages: expected some of {', '.join(known)}, got {unknown[0]}")
        # Whatever else is wanted, kernels have to be found first.
        stages = [s for s in stages if s.name.startswith((*wanted, "module"))]
    if not options.dry_run:
        problem = device.problem()
        if problem is not None:
            raise RuntimeError(f"gpu_check: {problem}; --dry-run does what needs no GPU")
    name = "gpu_check_dry_run" if options.dry_run else "gpu_check"
    report = Report(options.output.resolve(), device.about(), name)
    return run(stages, report, options.minutes * 60)


if __name__ == "__main__":
    sys.exit("start it as: python -m bench gpu_check")
