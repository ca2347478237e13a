"""Many small runs on all cores: worker processes of one thread each, one bar, one way to stop."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

import torch

from . import interrupt
from .errors import Interrupted, UserError
from .loop import Watcher
from .meter import meter
from .progress import say


class Job(Protocol):
    """What the pool needs to know of a run; it is pickled on its way to a worker."""

    @property
    def title(self) -> str: ...


AnyJob = TypeVar("AnyJob", bound=Job)
Say = Callable[[str], None]
Work = Callable[[Any, Watcher, Say], dict[str, Any]]
"""A function of a module (so that a worker can import it): job, watcher, say -> result."""


def run(
    jobs: Sequence[AnyJob],
    work: Work,
    *,
    workers: int,
    progress: bool,
    done: Callable[[AnyJob, dict[str, Any]], None],
    remedy: str,
    name: str = "runs",
    unit: str = "step",
) -> None:
    """Calls `work` on every job in at most `workers` processes.

    The first failure stops the others after the step in hand and is raised; what had finished
    stays finished.

    Args:
        done: called here, with the result, as soon as a job has finished.
        remedy: what to try when a worker dies for lack of memory.
        name, unit: what the bar calls the jobs and their steps.

    Raises:
        Interrupted: asked to stop.
        UserError: a worker died, or what `work` raised.
    """
    context = multiprocessing.get_context("spawn")
    messages, stop = context.Queue(), context.Event()
    bar = meter(f"0 of {len(jobs)} {name}", unit, enabled=progress)
    totals: dict[str, int] = {}
    workers = min(workers, len(jobs))
    with (
        ProcessPoolExecutor(workers, context, _start_worker, (messages, stop)) as executor,
        bar,
    ):
        futures: dict[Future, AnyJob] = {executor.submit(_call, work, job): job for job in jobs}
        left = set(futures)
        failure: BaseException | None = None
        finished = 0
        while left:
            ended, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
            _drain(messages, bar, totals, len(jobs))
            for future in ended:
                if future.cancelled():
                    continue
                error = future.exception()
                if error is None:
                    finished += 1
                    bar.set_description(f"{finished} of {len(jobs)} {name}", refresh=False)
                    try:
                        done(futures[future], future.result())
                    except Exception as raised:  # a full disk, say: no work beyond that
                        error = raised
                failure = failure or error
            if (failure is not None or interrupt.requested()) and not stop.is_set():
                stop.set()
                for future in left:
                    future.cancel()
    if isinstance(failure, BrokenProcessPool):
        raise UserError(
            "a worker process died (out of memory?); run the same command again to go on, "
            f"{remedy} if it happens again"
        )
    if failure is not None:
        raise failure
    if interrupt.requested():
        raise Interrupted(f"stopped with {finished} of {len(jobs)} runs finished")


def _drain(messages: Any, bar: Any, totals: dict[str, int], count: int) -> None:
    while True:
        try:
            kind, title, value = messages.get_nowait()
        except queue.Empty:
            break
        if kind == "say":
            say(value)
        elif kind == "start":
            totals[title] = value
            # Runs that have not begun are expected to be as long as those that have.
            bar.total = round(sum(totals.values()) / len(totals) * count)
        else:
            bar.update(value)
    bar.refresh()


class _Report(Watcher):
    """Sends steps to the parent, a few times a second."""

    def __init__(self, messages: Any, title: str) -> None:
        self.messages, self.title = messages, title
        self.count, self.sent = 0, time.monotonic()

    def start(self, label: str, total: int, done: int) -> None:
        self.messages.put(("start", self.title, total - done))

    def step(self, count: int) -> None:
        self.count += count
        if time.monotonic() - self.sent > 0.3:
            self.close()

    def close(self) -> None:
        self.messages.put(("step", self.title, self.count))
        self.count, self.sent = 0, time.monotonic()


class Part(Watcher):
    """One of several things that a job trains: its steps go to the job's bar."""

    def __init__(self, job: Watcher) -> None:
        self.job = job

    def step(self, count: int) -> None:
        self.job.step(count)


_messages: Any = None


def _start_worker(messages: Any, stop: Any) -> None:
    global _messages
    interrupt.follow_parent(stop)
    torch.set_num_threads(1)
    _messages = messages


def _call(work: Work, job: Job) -> dict[str, Any]:
    return work(
        job,
        _Report(_messages, job.title),
        lambda text: _messages.put(("say", job.title, text)),
    )
