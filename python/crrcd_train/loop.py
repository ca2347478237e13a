"""The loop: batches, schedule, logs, checkpoints. What is trained is a `Task`'s business."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from . import checkpoint, interrupt
from .config import CONTRASTIVE, Config, Optim, differences, from_dict, terms, to_dict
from .errors import Interrupted, UserError
from .views import Variants

METRICS = "metrics.csv"


class Task(Protocol):
    """What the loop needs to know of a thing that is trained."""

    kind: str
    device: torch.device
    count: int  # training samples
    variants: Variants

    def modules(self) -> dict[str, nn.Module]:
        """All that a checkpoint must hold."""

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]: ...

    def loss(self, rows: Tensor, variants: Tensor, progress: float) -> dict[str, Tensor]:
        """Loss terms of a batch, already weighted; their sum is minimised."""

    def validate(self) -> float:
        """Accuracy in percent on the validation images."""

    def diagnostics(self) -> dict[str, float]: ...


class Watcher:
    """Told how training goes; the base class is silent."""

    def start(self, label: str, total: int, done: int) -> None:
        """Steps in all, and done in an earlier session."""

    def step(self, count: int) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def schedule(optimizer: torch.optim.Optimizer, optim: Optim, steps: int) -> Any:
    rates = [group["lr"] for group in optimizer.param_groups]
    if optim.schedule == "onecycle":
        # A share outside (1, steps - 1) of the steps would divide by zero in a short run.
        warm_up = 0.5 if steps > 1 else 0.75
        if steps > 3:
            warm_up = min(max(optim.warm_up, 1.5 / steps), 1 - 1.5 / steps)
        return lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps + 1, pct_start=warm_up)
    if optim.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if optim.schedule == "step":
        milestones = [round(share * steps) for share in optim.milestones]
        return lr_scheduler.MultiStepLR(optimizer, milestones, optim.gamma)
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def epoch_batches(
    count: int, batch_size: int, variants: Variants, seed: int, epoch: int
) -> list[tuple[Tensor, Tensor]]:
    """Rows and variants of each batch: a pure function of its arguments, so resuming is exact."""
    generator = torch.Generator().manual_seed((seed << 24) + epoch)
    order = torch.randperm(count, generator=generator)
    views = variants.draw(count, generator)
    batches = list(zip(order.split(batch_size), views.split(batch_size), strict=True))
    if len(batches) > 1 and len(batches[-1][0]) == 1:
        batches.pop()  # batch normalisation needs two
    return batches


class Session:
    """One training run of `task` in the folder `output`, from its start or its checkpoint."""

    def __init__(
        self,
        task: Task,
        config: Config,
        optim: Optim,
        output: Path,
        resume: bool,
        watcher: Watcher,
        say: Callable[[str], None] = print,
    ) -> None:
        self.task, self.config, self.optim, self.output = task, config, optim, output
        self.watcher, self.say = watcher, say
        self.path = output / checkpoint.FILE
        self.per_epoch = len(
            epoch_batches(task.count, optim.batch_size, task.variants, config.run.seed, 0)
        )
        self.steps = self.per_epoch * optim.epochs
        groups = task.parameter_groups(optim.lr, optim.weight_decay)
        self.optimizer = torch.optim.SGD(
            groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov
        )
        self.schedule = schedule(self.optimizer, optim, self.steps)
        device = task.device.type
        self.amp = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            config.run.amp
        ]
        self.scaler = torch.amp.GradScaler(device, enabled=self.amp is torch.float16)
        self.step, self.seconds = 0, 0.0
        self.sums: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        if resume and checkpoint.exists(self.path):
            try:
                state = checkpoint.load(self.path, say)
            except UserError as error:
                raise UserError(f"{error}; start over with --fresh") from None
            self._restore(state)

    def run(self) -> list[dict[str, Any]]:
        """Trains to the end and returns one row of metrics for each epoch.

        Raises:
            Interrupted: stopped on request; the checkpoint is written.
            UserError: the loss is not finite, or the disk is full.
        """
        task, run = self.task, self.config.run
        board = _tensorboard(self.output, self.step) if run.tensorboard else None
        self._write_metrics()
        self.watcher.start(task.kind, self.steps, self.step)
        saved = started = time.monotonic()
        before = self.seconds
        try:
            for epoch in range(self.step // self.per_epoch, self.optim.epochs):
                batches = epoch_batches(
                    task.count, self.optim.batch_size, task.variants, run.seed, epoch
                )
                for module in task.modules().values():
                    module.train()
                for rows, variants in batches[self.step - epoch * self.per_epoch :]:
                    self._train(rows, variants)
                    self.watcher.step(1)
                    self.seconds = before + time.monotonic() - started
                    # At the last step of an epoch the epoch is closed first.
                    if interrupt.requested() and self.step < (epoch + 1) * self.per_epoch:
                        self._stop()
                row = self._close_epoch(epoch)
                self.seconds = row["seconds"] = round(before + time.monotonic() - started, 3)
                self.history.append(row)
                self._write_metrics()
                self.watcher.epoch(row)
                if board is not None:
                    for key, value in row.items():
                        if key not in ("epoch", "step"):
                            board.add_scalar(key, value, self.step)
                if self.step == self.steps or time.monotonic() - saved > run.checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
                if interrupt.requested() and self.step < self.steps:
                    self._stop()
        finally:
            self.watcher.close()
            if board is not None:
                board.close()
        return self.history

    def _train(self, rows: Tensor, variants: Tensor) -> None:
        device = self.task.device.type
        with torch.autocast(device, dtype=self.amp, enabled=self.amp is not None):
            terms = self.task.loss(rows, variants, self.step / self.steps)
            total = sum(terms.values())
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        if self.optim.clip_norm:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        for name, term in {"loss": total, **terms}.items():
            # Summed where they are: the host waits for the device once an epoch.
            self.sums[name] = self.sums.get(name, 0.0) + term.detach().double()
        self.step += 1

    def _close_epoch(self, epoch: int) -> dict[str, Any]:
        row: dict[str, Any] = {"epoch": epoch + 1, "step": self.step}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row.update({name: float(value) / self.per_epoch for name, value in self.sums.items()})
        self.sums = {}
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"{self.output}: the loss became {row['loss']} in epoch {epoch + 1}; "
                "lower the learning rate (--set optim.lr=...) or the loss weights"
            )
        last = epoch + 1 == self.optim.epochs
        if last or (epoch + 1) % self.config.run.validate_every == 0:
            for module in self.task.modules().values():
                module.eval()
            row["validation"] = self.task.validate()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                row.update(self.task.diagnostics())
            for warning in caught:
                self.say(f"{self.output}, epoch {epoch + 1}: warning: {warning.message}")
        return row

    def _stop(self) -> None:
        self._save()
        raise Interrupted(f"{self.output}: stopped at step {self.step} of {self.steps}")

    def _save(self) -> None:
        state = {
            "kind": self.task.kind,
            "config": to_dict(self.config),
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds,
            "sums": dict(self.sums),
            "history": self.history,
            "modules": {name: m.state_dict() for name, m in self.task.modules().items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
        }
        if self.task.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.task.device)
        checkpoint.save(self.path, state)

    def _restore(self, state: dict[str, Any]) -> None:
        """Everything a step depends on; the order of the batches follows from the step."""
        changed = settings_changed(state["config"], self.config, self.task.kind)
        if state["kind"] != self.task.kind or changed:
            what = changed[0] if changed else f"{state['kind']} -> {self.task.kind}"
            raise UserError(
                f"{self.output} holds a run with other settings ({what}); "
                "choose another --output or give --fresh"
            )
        for name, module in self.task.modules().items():
            module.load_state_dict(state["modules"][name])
            module.to(self.task.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.sums = {name: value.to(self.task.device) for name, value in state["sums"].items()}
        self.history = state["history"]
        torch.set_rng_state(state["random"])
        if self.task.device.type == "cuda" and "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"], self.task.device)
        if 0 < self.step < self.steps:
            self.say(f"{self.output}: going on at step {self.step} of {self.steps}")

    def _write_metrics(self) -> None:
        columns: dict[str, None] = {}
        for row in self.history:
            columns.update(dict.fromkeys(row))
        temporary = self.output / f".{METRICS}.{os.getpid()}"
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(self.history)
        os.replace(temporary, self.output / METRICS)


# Settings that do not change what is computed.
_MAY_CHANGE = (
    "study.",
    "data.root",
    "data.source",
    "data.system_folder",
    "data.download_seconds",
    "run.checkpoint_seconds",
    "run.progress",
    "run.tensorboard",
    "run.test",
    "run.threads",
    "teacher.checkpoint",
)

_STUDENTS_ONLY = (
    "data.cache",
    "data.labels",
    "data.student_size",
    "data.subset",
    "student.",
    "optim.",
    "kd.",
    *(f"{name}." for name in CONTRASTIVE),
    "run.method",
)


def settings_changed(old: dict[str, Any], config: Config, kind: str) -> list[str]:
    """`key: old -> new` for each setting that makes another run of it."""
    ignored = _MAY_CHANGE
    method = config.run.method
    used = terms(method)
    if kind == "teacher":
        ignored += _STUDENTS_ONLY
    else:
        ignored += tuple(f"{name}." for name in ("kd", *CONTRASTIVE) if name not in used)
        ignored += ("teacher.", "data.cache") if method == "ce" else ()
        ignored += () if used & CONTRASTIVE.keys() else ("distill.",)
    with contextlib.suppress(UserError):
        old = to_dict(from_dict(old))  # a setting newer than the run had its default in it
    lines = differences(old, to_dict(config))
    return [line for line in lines if not line.startswith(ignored)]


def _tensorboard(output: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(output / "tensorboard"), purge_step=step + 1 if step else None)
