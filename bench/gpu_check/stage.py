"""Stages of the check: commands under a limit, ended with all that they started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from bench.gpu_check import rows

ROOT = Path(__file__).resolve().parents[2]
GRACE = 2.0
"""Seconds between asking a process to end and ending it: pytest prints its summary in them."""
LOGGED, CUT = 1_000_000, b"\n[...]\n"
"""Bytes of a job's output in the log, from its beginning and its end."""
LEAST = 5.0
"""Seconds without which a stage is not begun."""


@dataclass(frozen=True)
class Job:
    """A command of a stage. ``needs``: a program beside Python, or what an earlier stage found to
    be usable ("cuda", "triton"); a job whose needs are not met is left out and says so."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()


@dataclass(frozen=True)
class Stage:
    """Jobs that run side by side, or one after the other, and the seconds that they have.
    ``open_ended``: one that is never through, so that it is no failure to be cut off."""

    name: str
    seconds: float
    jobs: Sequence[Job]
    together: bool = True
    open_ended: bool = False


class Running:
    """A job that has been started, in a process group of its own."""

    def __init__(self, job: Job, folder: Path, log: IO[bytes]) -> None:
        self.job, self.log, self.began = job, log, time.monotonic()
        stem = "".join(c if c.isalnum() else "-" for c in job.name)
        self.rows, self.output = folder / f"{stem}.jsonl", folder / f"{stem}.txt"
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            **job.environment,
            rows.VARIABLE: str(self.rows),
        }
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                job.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def result(self, cut: str = "") -> dict[str, object]:
        """``cut``: why the job was ended before it had ended."""
        code = self.process.returncode
        text = self.output.read_bytes()
        self.log.write(f"\n===== {self.job.name}: {' '.join(self.job.command)}\n".encode())
        self.log.write(
            text if len(text) <= LOGGED else text[: LOGGED // 2] + CUT + text[-LOGGED // 2 :]
        )
        self.log.flush()
        status = cut or ("done" if code == 0 else f"FAILED, status {code}")
        return {
            "name": self.job.name,
            "status": status,
            "seconds": round(time.monotonic() - self.began, 1),
            "cut": bool(cut),
            "command": " ".join(self.job.command),
            "last_lines": text.decode(errors="replace").splitlines()[-15:],
            "rows": rows.read(self.rows),
        }


def lacking(job: Job, usable: Mapping[str, str | None]) -> str | None:
    """Why a job cannot run, or None. ``usable``: reasons against what stages have looked for."""
    for need in job.needs:
        if need in usable:
            if usable[need] is not None:
                return usable[need]
        elif shutil.which(need) is None:
            return f"{need} is not installed"
    return None


def run_stage(
    stage: Stage,
    limit: float,
    log: IO[bytes],
    usable: Mapping[str, str | None],
    heard: Callable[[dict], None] = lambda _: None,
) -> dict[str, object]:
    """Runs a stage; after ``limit`` seconds what still runs is ended. ``heard`` is told now and
    then, and before it ends, what is known so far."""
    began = time.monotonic()
    results: list[dict] = []
    waiting = []
    for job in stage.jobs:
        reason = lacking(job, usable)
        if reason is None:
            waiting.append(job)
        else:
            results.append({"name": job.name, "status": f"left out: {reason}", "rows": []})
    running: list[Running] = []

    def state(**more: object) -> dict[str, object]:
        known = {"name": stage.name, "limit": round(limit, 1), "open_ended": stage.open_ended}
        known |= {"seconds": round(time.monotonic() - began, 1), "jobs": results}
        return known | more

    told, cut = began, "cut off at its limit"
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and (stage.together or not running):
                    running.append(Running(waiting.pop(0), Path(folder), log))
                left = limit - (time.monotonic() - began)
                if left <= GRACE:
                    break
                with suppress(subprocess.TimeoutExpired):
                    running[0].process.wait(min(0.2, left - GRACE))
                for job in [r for r in running if r.process.poll() is not None]:
                    running.remove(job)
                    job.signal(signal.SIGKILL)  # what it has left behind
                    results.append(job.result())
                if time.monotonic() - told > 3:
                    told = time.monotonic()
                    partial = [
                        {"name": r.job.name, "status": "running", "rows": rows.read(r.rows)}
                        for r in running
                    ]
                    heard(state(jobs=[*results, *partial]))
        except KeyboardInterrupt:
            cut = "stopped"
            raise
        finally:
            for job in running:
                job.signal(signal.SIGINT)
            end = time.monotonic() + GRACE
            for job in running:
                with suppress(subprocess.TimeoutExpired):
                    job.process.wait(max(0.0, end - time.monotonic()))
                job.signal(signal.SIGKILL)
                job.process.wait()
                results.append(job.result(cut))
            for job in waiting:
                results.append({"name": job.name, "status": "left out: no time", "rows": []})
            heard(state())
    return state()
