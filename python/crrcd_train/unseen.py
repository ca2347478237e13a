"""Classes that neither teacher nor student were trained on: does their geometry carry over?

Some classes of a labelled data set are held out. The teacher learns the others at full resolution;
students see them at a few pixels a side, with few labels or none, and are then asked for nearest
neighbours among test images of the held-out classes: small ones among small ones, and small ones
among the teacher's embeddings of large ones.
"""

from __future__ import annotations

import functools
import html
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from . import data, interrupt, methods, page, pool, retrieval, runs, students
from .config import CRCD, CRD, CRRCD, Config, Data, Teacher, to_dict
from .errors import UserError, writable_folder
from .loop import Watcher
from .progress import Bar, say
from .report import Made, spread

SUMMARY = "unseen.json"
MEASURES = {
    "low_recall": "small among small: recall@1, %",
    "low_auc": "AUC, %",
    "high_recall": "small among large: recall@1, %",
    "high_auc": "AUC, %",
}


@dataclass
class Unseen:
    classes: int = 3  # held out in each split
    splits: int = 5  # choices of the held-out classes
    first_split: int = 0
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    size: int = 7  # pixels a side that students see
    labelled: int = 700  # images of the known classes with labels
    unlabelled: int = 8000  # and without
    probes: int = 1500  # test images of held-out classes asked about; the others are the gallery
    methods: list[str] = field(
        default_factory=lambda: [
            *("ce", "kd", "cosine", "crd", "crcd", "crrcd", "crrcd-difference"),
            *("ce+cosine", "ce+crrcd-difference", "kd+cosine", "kd+crd", "kd+crcd", "kd+crrcd"),
            "kd+crrcd-difference",
        ]
    )
    rivals: list[str] = field(default_factory=lambda: ["ce", "kd", "cosine"])
    workers: int = 2
    progress: bool = True


@dataclass
class UnseenConfig(students.Students):
    data: Data = field(default_factory=lambda: Data(shift=2, shift_step=1, labels=0))
    teacher: Teacher = field(default_factory=lambda: Teacher(width=24))
    pixels: students.Pixels = field(
        default_factory=lambda: students.Pixels(canvas=28, grey=True, shift=2, shift_step=1)
    )
    optim: students.StudentOptim = field(
        default_factory=lambda: students.StudentOptim(lr=0.05, batch_size=128, steps=500)
    )
    # Not all of some thousand images: K of each step that keeps it within a tenth of a second.
    crd: CRD = field(default_factory=lambda: replace(students.Students().crd, negatives=2048))
    crcd: CRCD = field(default_factory=lambda: replace(students.Students().crcd, negatives=500))
    difference: CRCD = field(
        default_factory=lambda: replace(students.Students().difference, negatives=2048)
    )
    crrcd: CRRCD = field(default_factory=lambda: replace(students.Students().crrcd, negatives=2048))
    unseen: Unseen = field(default_factory=Unseen)

    def check(self) -> None:
        super().check()
        wanted = self.unseen
        self.more_than_zero(
            f"unseen.{key}"
            for key in ("classes", "splits", "size", "labelled", "probes", "workers")
        )
        if not (wanted.methods and wanted.seeds):
            raise UserError("config key unseen: methods and seeds each need one entry or more")
        for method in (*wanted.methods, *wanted.rivals):
            students.terms(method)


@dataclass
class Job:
    """All methods of one class split and seed."""

    split: int
    seed: int
    methods: list[str]
    config: UnseenConfig
    output: Path

    @property
    def folder(self) -> Path:
        return self.output / f"split{self.split}" / f"seed{self.seed}"

    @property
    def title(self) -> str:
        return f"split {self.split}  seed {self.seed}"


def held_out(classes: int, count: int, split: int) -> list[int]:
    """Numbers of the held-out classes of a split, drawn by it."""
    generator = torch.Generator().manual_seed(data.SPLIT_SEED + split)
    return sorted(torch.randperm(classes, generator=generator)[:count].tolist())


def run(config: UnseenConfig, output: Path, *, fresh: bool = False, command: str = "") -> None:
    """Trains the teachers and runs what is left of the study in `output`.

    Raises:
        Interrupted: asked to stop; finished runs are kept.
        UserError: bad settings, missing data, another settings' runs.
    """
    started = time.monotonic()
    writable_folder(output)
    wanted = config.unseen
    splits = range(wanted.first_split, wanted.first_split + wanted.splits)
    if fresh:
        for split in splits:
            shutil.rmtree(output / f"split{split}", ignore_errors=True)
        (output / SUMMARY).unlink(missing_ok=True)
    todo = [Job(split, seed, [], config, output) for split in splits for seed in wanted.seeds]
    for job in todo:
        job.methods = [m for m in wanted.methods if finished(job.folder, m, config) is None]
    pending = [job for job in todo if job.methods]
    with interrupt.on_signals():
        if pending:
            images = data.load(config.data, say)
            _check_sizes(config, images)
            for split in splits:
                _teacher(config, images, output, split)
            pool.run(
                pending,
                _work,
                workers=wanted.workers,
                progress=wanted.progress,
                done=lambda job, result: say(f"{job.title}: {len(job.methods)} methods"),
                remedy="with --set unseen.workers=1",
            )
    earlier = runs.read_json(output / SUMMARY) or {"seconds": 0.0}
    runs.write_json(
        output / SUMMARY,
        {
            "command": command,
            "date": date.today().isoformat(),
            "seconds": round(earlier["seconds"] + time.monotonic() - started, 1),
            "versions": runs.versions(),
            "config": to_dict(config),
        },
    )


def _check_sizes(config: UnseenConfig, images: data.Images) -> None:
    wanted, classes = config.unseen, len(images.classes)
    if wanted.classes > classes - 2:
        raise UserError(
            f"config key unseen.classes: {wanted.classes} of {classes} leaves fewer than two"
        )
    if wanted.size > images.train.shape[-1]:
        raise UserError(
            f"config key unseen.size: {wanted.size} is larger than the images' "
            f"{images.train.shape[-1]} pixels"
        )


def used_settings(config: UnseenConfig, method: str) -> dict[str, Any]:
    """What a result depends on, beside split and seed."""
    stored = to_dict(config)
    names = ("data", "teacher", "pixels", "student", "optim", *students.tables(method))
    found = {name: dict(stored[name]) for name in names}
    for name in ("root", "source", "system_folder", "download_seconds"):
        found["data"].pop(name)
    keys = ("classes", "size", "labelled", "unlabelled", "probes")
    found["unseen"] = {key: stored["unseen"][key] for key in keys}
    return found


def finished(folder: Path, method: str, config: UnseenConfig) -> dict[str, Any] | None:
    """The result of a method, None where there is none.

    Raises:
        UserError: it was made with other settings.
    """
    return runs.unchanged(folder / f"{method}.json", used_settings(config, method))


def _known(config: UnseenConfig, images: data.Images, split: int) -> tuple[data.Images, list[int]]:
    """The images of the known classes, numbered anew, and the numbers of the held-out ones."""
    out = held_out(len(images.classes), config.unseen.classes, split)
    kept = [number for number in range(len(images.classes)) if number not in out]
    renumber = torch.full((len(images.classes),), -1)
    renumber[kept] = torch.arange(len(kept))
    train = renumber[images.train_labels] >= 0
    test = renumber[images.test_labels] >= 0
    return (
        data.Images(
            images.train[train],
            renumber[images.train_labels[train]],
            images.test[test],
            renumber[images.test_labels[test]],
            [images.classes[number] for number in kept],
        ),
        out,
    )


def _teacher_config(config: UnseenConfig) -> Config:
    found = Config(data=config.data, teacher=config.teacher)
    found.run.tensorboard = False
    found.run.progress = config.unseen.progress
    return found


def _teacher(config: UnseenConfig, images: data.Images, output: Path, split: int) -> None:
    known, out = _known(config, images, split)
    result = runs.train_teacher(
        _teacher_config(config),
        known,
        output / f"split{split}" / "teacher",
        resume=True,
        watcher=Bar(f"teacher {split}", config.unseen.progress),
        say=say,
    )
    names = ", ".join(images.classes[number] for number in out)
    say(f"split {split}, without {names}: teacher {result['test']:.2f} % on the known classes")


@functools.lru_cache(maxsize=1)
def _images(key: str) -> data.Images:
    return data.load(Data(**json.loads(key)), lambda text: None)


def _work(job: Job, watcher: Watcher, say: Callable[[str], None]) -> dict[str, Any]:
    config, wanted = job.config, job.config.unseen
    images = _images(json.dumps(asdict(config.data), sort_keys=True))
    known, out = _known(config, images, job.split)
    folder = job.output / f"split{job.split}" / "teacher"
    teacher, _, _ = runs.load_model(folder, known, torch.device("cpu"), say)
    parts = data.split(config.data, known.train_labels, len(known.classes), job.seed)
    normalize = data.Normalizer.of(known.train[parts.teacher])
    # The first rows of a random order are labelled, the next ones are not.
    generator = torch.Generator().manual_seed(job.seed)
    order = parts.teacher[torch.randperm(len(parts.teacher), generator=generator)]
    if wanted.labelled + wanted.unlabelled > len(order):
        raise UserError(
            f"unseen: {wanted.labelled} labelled and {wanted.unlabelled} unlabelled images are "
            f"asked for, {len(order)} are there"
        )
    rows = order[: wanted.labelled + wanted.unlabelled]
    labels = known.train_labels[rows].clone()
    labels[wanted.labelled :] = -1
    logits, vectors = methods.predict(teacher, normalize(known.train[rows]))
    # Test images of the held-out classes, in an order of their own.
    asked = torch.isin(images.test_labels, torch.tensor(out)).nonzero().flatten()
    asked = asked[torch.randperm(len(asked), generator=torch.Generator().manual_seed(job.split))]
    if wanted.probes >= len(asked):
        raise UserError(f"unseen.probes: {wanted.probes} leaves no gallery of {len(asked)} images")
    test_labels = images.test_labels[asked]
    large = methods.predict(teacher, normalize(images.test[asked]))[1]
    small = students.Views(images.test[asked], wanted.size, config.pixels).plain(
        torch.arange(len(asked))
    )
    views = students.Views(known.train[rows], wanted.size, config.pixels)
    few = students.Views(known.train[rows[: wanted.labelled]], wanted.size, config.pixels)
    job.folder.mkdir(parents=True, exist_ok=True)
    watcher.start(job.title, config.optim.steps * len(job.methods), 0)
    for method in job.methods:
        only = method == "ce"  # unlabelled images would be wasted steps
        trained = students.train(
            few if only else views,
            vectors[: wanted.labelled] if only else vectors,
            labels[: wanted.labelled] if only else labels,
            config,
            method,
            seed=job.seed,
            logits=None if only else logits,
            watcher=pool.Part(watcher),
        )
        embedded = trained.student.embed(small)
        result: dict[str, Any] = {"method": method, "split": job.split, "seed": job.seed}
        mine, gallery = embedded[: wanted.probes], embedded[wanted.probes :]
        found = {"low": mine @ gallery.T}
        if not set(students.terms(method)) <= {"ce", "kd"}:
            entries = students.space(large, trained.student.center)[wanted.probes :]
            found["high"] = students.score(trained, method, small[: wanted.probes], entries)
        for name, scores in found.items():
            got = retrieval.evaluate(
                scores, test_labels[: wanted.probes], test_labels[wanted.probes :]
            )
            result[f"{name}_recall"], result[f"{name}_auc"] = got.rank1, got.auc
        result["step_ms"] = round(trained.step_ms, 3)
        result["held_out"] = [images.classes[number] for number in out]
        result["settings"] = used_settings(config, method)
        runs.write_json(job.folder / f"{method}.json", result)
    watcher.close()
    return {}


def report(output: Path, say: Callable[[str], None] = print) -> Made:
    """Table, paired differences and one HTML page in `output`/report.

    Raises:
        UserError: no study there, or no result in it.
    """
    from . import config as settings
    from . import figures

    record = runs.read_json(output / SUMMARY)
    if record is None:
        raise UserError(f"{output} holds no study ({SUMMARY} is missing or damaged)")
    config = settings.from_dict(record["config"], UnseenConfig)
    wanted = config.unseen
    found: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    for method in wanted.methods:
        for split in range(wanted.first_split, wanted.first_split + wanted.splits):
            for seed in wanted.seeds:
                result = runs.read_json(output / f"split{split}" / f"seed{seed}" / f"{method}.json")
                if result is not None:
                    found.setdefault(method, {})[split, seed] = result
    if not found:
        raise UserError(f"{output}: no result of this study is there")
    say("report: drawing")
    head = ["method", *MEASURES.values(), "runs"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method, mine in found.items():
        cells = [
            spread([r[key] for r in mine.values()]) if all(key in r for r in mine.values()) else ""
            for key in MEASURES
        ]
        lines.append("| " + " | ".join([method, *cells, str(len(mine))]) + " |")
    head = ["difference", *MEASURES.values(), "class splits in which recall@1 gains (low, high)"]
    gains = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in found:
        for rival in wanted.rivals:
            if rival in found and method not in wanted.rivals[: wanted.rivals.index(rival) + 1]:
                gains.append(_paired(found, method, rival))
    folder = writable_folder(output / "report")
    text = "\n".join(lines) + "\n\n" + "\n".join(gains)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    panels = {
        title.partition(":")[0]: {
            method: [r[key] for r in mine.values() if key in r] for method, mine in found.items()
        }
        for key, title in MEASURES.items()
        if key.endswith("recall")
    }
    drawn = figures.by_method(
        panels, list(found), "recall@1, %", "Held-out classes: runs, mean and standard deviation"
    )
    picture = folder / "recall.png"
    drawn.savefig(picture)
    figures.plt.close(drawn)
    title = output.resolve().name
    facts = (
        f"{config.data.name}, {record['date']}: {wanted.splits} choices of {wanted.classes} "
        f"classes that neither teacher nor student saw, {len(wanted.seeds)} seeds each. Students "
        f"of {wanted.size} x {wanted.size} pixels saw {wanted.labelled} images of the other "
        f"classes with labels (used by ce only) and {wanted.unlabelled} without. {wanted.probes} "
        "test images of the held-out classes look for neighbours among the others. Whole study: "
        f"{record['seconds'] / 60:.1f} min on "
        f"{record['versions'].get('processor', 'this machine')}."
    )
    body = (
        f"<h1>{html.escape(title)}: classes never seen</h1><p>{html.escape(facts)}</p>"
        f"<div class='wide'>{page.table(chr(10).join(lines))}</div>"
        "<h2>Paired differences</h2>"
        f"<div class='wide'>{page.table(chr(10).join(gains))}</div>"
        "<p class='note'>± is the standard deviation over runs. Differences are paired; the "
        "standard error in brackets is over class splits, seeds averaged, since runs of a split "
        "share teacher and classes.</p>"
        + page.figure(picture, "Recall@1", "Every run a dot.")
        + page.provenance(record["command"], record["config"], record["versions"])
    )
    path = folder / "report.html"
    path.write_text(page.document(title, body), encoding="utf-8")
    return Made(text, path, [picture])


def _paired(
    found: dict[str, dict[tuple[int, int], dict[str, Any]]], method: str, rival: str
) -> str:
    both = sorted(found[method].keys() & found[rival].keys())
    cells, wins = [], []
    for key in MEASURES:
        by_split: dict[int, list[float]] = {}
        for run in both:
            mine, theirs = found[method][run], found[rival][run]
            if key in mine and key in theirs:
                by_split.setdefault(run[0], []).append(mine[key] - theirs[key])
        means = [statistics.mean(values) for values in by_split.values()]
        if not means:
            cells.append("")
        else:
            error = f" ({statistics.stdev(means) / math.sqrt(len(means)):.2f})" if means[1:] else ""
            cells.append(f"{statistics.mean(means):+.2f}{error}")
        if key.endswith("recall"):
            gained = sum(mean > 0 for mean in means)
            wins.append(f"{gained} of {len(means)}" if means else "–")
    return "| " + " | ".join([f"{method} - {rival}", *cells, ", ".join(wins)]) + " |"
