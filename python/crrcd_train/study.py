"""A whole grid from one file: the teacher once, then methods x seeds x sizes, then the report.

Runs are independent and small, so they go to worker processes of one thread each. Finished runs
are skipped, interrupted ones go on from their checkpoints: calling a study again completes it.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, data, interrupt, methods, pool, runs
from .config import CONTRASTIVE, Config, Data, flatten, terms, to_dict, with_values
from .errors import Interrupted, writable_folder
from .loop import Watcher
from .progress import Bar, say

TEACHER = "teacher"
SUMMARY = "study.json"


@dataclass
class Job:
    """One student run of a study; `label` is the method's or the variant's name."""

    label: str
    size: int
    seed: int
    config: Config
    output: Path

    @property
    def title(self) -> str:
        return f"{self.size} x {self.size}  {self.label}  seed {self.seed}"


def jobs(config: Config, output: Path) -> list[Job]:
    """All student runs, those with most work first so that the workers finish together."""
    found = []
    for size in config.study.sizes:
        for seed in config.study.seeds:
            for label in config.study.methods:
                variant = config.study.variants.get(label)
                if variant and variant.sizes and size not in variant.sizes:
                    continue
                values: dict[str, Any] = {
                    **flatten(config.study.size_overrides.get(str(size), {})),
                    **(flatten(variant.set) if variant else {}),
                    "run.method": variant.method if variant else label,
                    "run.seed": seed,
                    "data.student_size": size,
                    "teacher.checkpoint": config.teacher.checkpoint
                    or str(output / TEACHER / checkpoint.FILE),
                }
                folder = output / f"{size}x{size}" / label / f"seed{seed}"
                found.append(Job(label, size, seed, with_values(config, values), folder))
    found.sort(key=lambda job: not terms(job.config.run.method) & CONTRASTIVE.keys())
    return found


def run(config: Config, output: Path, *, fresh: bool = False, command: str = "") -> None:
    """Runs what is left of the study in `output` and records what was done in SUMMARY.

    Raises:
        Interrupted: asked to stop; all work until then is kept.
        UserError: bad settings, missing data, unwritable folder.
    """
    started = time.monotonic()
    writable_folder(output)
    todo = jobs(config, output)
    if fresh:
        for folder in [output / TEACHER, *(job.output for job in todo)]:
            runs.clear(folder)
        shutil.rmtree(output / TEACHER / runs.TABLES, ignore_errors=True)
        (output / SUMMARY).unlink(missing_ok=True)
    pending = [job for job in todo if runs.finished(job.output, job.config) is None]
    if len(pending) < len(todo):
        say(f"{len(todo) - len(pending)} of {len(todo)} runs are finished already")
    if not pending and (output / SUMMARY).exists():
        return
    try:
        with interrupt.on_signals():
            _complete(config, output, todo, pending)
    finally:
        _record(config, output, todo, command, time.monotonic() - started)


def _complete(config: Config, output: Path, todo: list[Job], pending: list[Job]) -> None:
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    needs_teacher = any(methods.uses_teacher(job.config.run.method) for job in todo)
    if needs_teacher and config.teacher.checkpoint:
        runs.teacher_checkpoint(config)  # said before a data set is downloaded
    images = data.load(config.data, say, config.run.progress)
    if needs_teacher and not config.teacher.checkpoint:
        result = runs.train_teacher(
            with_values(config, {"run.seed": 0}),
            images,
            output / TEACHER,
            resume=True,
            watcher=Bar("teacher", config.run.progress),
            say=say,
        )
        say(_line("teacher", result))
    if pending:
        _prepare_tables(pending, images)
        pool.run(
            pending,
            _work,
            workers=config.study.workers,
            progress=config.run.progress,
            done=lambda job, result: say(_line(job.title, result)),
            remedy="with --set study.workers=1",
        )


def _record(config: Config, output: Path, todo: list[Job], command: str, seconds: float) -> None:
    """Keeps what the report needs, adding up the time of all sessions that did any work."""
    try:
        earlier = json.loads((output / SUMMARY).read_text(encoding="utf-8"))["seconds"]
    except (OSError, ValueError, KeyError):
        earlier = 0.0
    runs.write_json(
        output / SUMMARY,
        {
            "command": command,
            "date": date.today().isoformat(),
            "seconds": round(earlier + seconds, 1),
            "versions": runs.versions(),
            "runs": [
                {
                    "label": job.label,
                    "size": job.size,
                    "seed": job.seed,
                    "folder": str(job.output.relative_to(output)),
                }
                for job in todo
            ],
            "config": to_dict(config),
        },
    )


def _line(title: str, result: dict[str, Any]) -> str:
    text = f"{title}: validation {result['validation']:.2f} %"
    if "test" in result:
        text += f", test {result['test']:.2f} %"
    return f"{text}  ({result['seconds']:.0f} s)"


def _prepare_tables(pending: list[Job], images: data.Images) -> None:
    """Teacher tables are made here, with all threads, once for all runs that share one."""
    seen = set()
    for job in pending:
        table = job.seed, methods.layers(job.config), _images_key(job)
        if not methods.uses_teacher(job.config.run.method) or table in seen:
            continue
        if interrupt.requested():
            raise Interrupted("stopped before the runs began")
        if not seen:
            say("teacher: outputs for the students' images")
        seen.add(table)
        runs.prepare_teacher_table(job.config, images, say)


def _images_key(job: Job) -> str:
    """The settings of a job's images as JSON, without what another size of the student changes."""
    return json.dumps({**vars(job.config.data), "student_size": 1}, sort_keys=True)


@functools.lru_cache(maxsize=1)
def _images(key: str) -> data.Images:
    """A worker reads a data set once, not for every job."""
    return data.load(Data(**json.loads(key)), lambda text: None, progress=False)


def _work(job: Job, watcher: Watcher, say: Callable[[str], None]) -> dict[str, Any]:
    images = _images(_images_key(job))
    return runs.train_student(job.config, images, job.output, resume=True, watcher=watcher, say=say)
