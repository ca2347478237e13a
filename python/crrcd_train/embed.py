"""Your pictures, your teacher: a low-resolution student whose embeddings fit the teacher's gallery.

`fit` leaves two files in its folder: STUDENT, the trained network, and GALLERY, the teacher's
embeddings of every picture. `Matcher` reads both and finds small pictures in the gallery.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import checkpoint, embedders, methods, page, people, pictures, retrieval, runs, students
from .config import CRCD, to_dict
from .data import SPLIT_SEED, resize
from .errors import UserError, writable_folder
from .loop import Watcher

STUDENT = "student.pt"
GALLERY = "gallery.pt"
RESULT = "embed.json"
IN_GALLERY_SPACE = ("cosine", "rkd", "crd", "crcd", "crrcd-difference")
"""Terms whose students are compared with the gallery by cosine."""


@dataclass
class Embed:
    pictures: str = ""  # the folder; root/<class>/<picture> gives classes, anything else none
    teacher: str = ""  # "module:function", "file.py:function" or "dlib"
    size: int = 8  # pixels a side that the student sees
    method: str = "crrcd-difference"  # terms joined by +, see students.TERMS
    damaged: Literal["error", "skip"] = "error"  # pictures that cannot be read
    held_out: float = 0.2  # share of the pictures that the student is judged on, not trained
    seed: int = 0
    device: str = "auto"
    cache: str = ""  # the teacher's embeddings; empty: in the output folder
    workers: int = 2  # processes, for dlib only
    progress: bool = True


@dataclass
class EmbedConfig(students.Students):
    optim: students.StudentOptim = field(
        default_factory=lambda: students.StudentOptim(steps=1000, batch_size=64)
    )
    difference: CRCD = field(
        default_factory=lambda: CRCD(negatives=16384, head="identity", standardize=False)
    )
    embed: Embed = field(default_factory=Embed)

    def check(self) -> None:
        super().check()
        wanted = self.embed
        self.more_than_zero(("embed.size", "embed.workers"))
        if not wanted.teacher:
            raise UserError("embed: name the teacher with --teacher module:function")
        if not wanted.pictures:
            raise UserError("embed: name the folder of pictures")
        if not 0 < wanted.held_out < 1:
            raise UserError(
                f"config key embed.held_out: expected between 0 and 1, got {wanted.held_out}"
            )
        if wanted.size > self.pixels.canvas:
            raise UserError(
                f"config key embed.size: {wanted.size} is larger than pixels.canvas, "
                f"{self.pixels.canvas}"
            )
        for term in students.terms(wanted.method):
            if term not in IN_GALLERY_SPACE:
                raise UserError(
                    f"embed: method {wanted.method!r} does not give embeddings in the gallery's "
                    f"space; expected {', '.join(IN_GALLERY_SPACE)}, joined by +"
                )


def fit(
    config: EmbedConfig,
    output: Path,
    *,
    fresh: bool = False,
    command: str = "",
    watcher: Watcher | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Embeds the pictures, trains the student, judges it on the pictures held out.

    Returns:
        What stands in RESULT: "own" is the percentage of small held-out pictures whose nearest
        large held-out picture is themselves, "classes" of those whose nearest training picture is
        of their class; each for "student" and "teacher", which is shown the small picture scaled
        up.

    Raises:
        UserError: pictures, teacher or settings that cannot be used; another student in `output`.
        Interrupted: stopped on request; embeddings made until then are kept.
    """
    started = time.monotonic()
    wanted = config.embed
    device = methods.pick_device(wanted.device)
    writable_folder(output)
    if (output / STUDENT).exists() and not fresh:
        raise UserError(
            f"{output} holds a student; give --fresh to replace it, or another --output"
        )
    found = _pictures(Path(wanted.pictures))
    cache = Path(wanted.cache) if wanted.cache else output / "embeddings"
    chosen = {"workers": wanted.workers, "progress": wanted.progress, "say": say}
    total = len(found)
    if wanted.damaged == "skip":
        found = found.keep(torch.tensor(pictures.readable(found.files, found.names, say)))
    count = len(found)
    held = max(1, round(wanted.held_out * count))
    if count - held < 2:
        raise UserError(f"{wanted.pictures}: {count} pictures are too few to train and to judge on")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    apart, trained_on = order[:held].sort().values, order[held:].sort().values
    large = embedders.embed(
        embedders.Pictures(found.files, found.names), wanted.teacher, cache, fresh=fresh, **chosen
    )
    some = found.keep(apart)
    scaled = embedders.embed(
        embedders.Pictures(some.files, some.names, wanted.size),
        wanted.teacher,
        cache,
        fresh=fresh,
        **chosen,
    )
    canvases = torch.stack(
        [students.on_canvas(pictures.open_image(f), config.pixels) for f in found.files]
    )
    made = students.train(
        students.Views(canvases[trained_on], wanted.size, config.pixels),
        large.vectors[trained_on],
        None,
        config,
        wanted.method,
        seed=wanted.seed,
        device=device,
        watcher=watcher,
    )
    probes = students.Views(canvases[apart], wanted.size, config.pixels).plain(torch.arange(held))
    center = large.vectors[trained_on].mean(0)
    gallery = students.space(large.vectors, center)
    by = {
        "student": made.student.embed(probes),
        "teacher": students.space(scaled.vectors, center),
    }
    result: dict[str, Any] = {
        "command": command,
        "date": date.today().isoformat(),
        "pictures": count,
        "damaged": total - count,
        "held_out": held,
        "teacher": large.identity,
        "width": large.vectors.shape[1],
        "own": {
            name: retrieval.recall_at_1(
                rows @ gallery[apart].T, torch.arange(held), torch.arange(held)
            )
            for name, rows in by.items()
        },
        "cosine": {name: float((rows * gallery[apart]).sum(1).mean()) for name, rows in by.items()},
        "history": made.history,
        "versions": runs.versions(),
        "config": to_dict(config),
    }
    if len(found.persons) > 1:
        result["classes"] = {
            name: retrieval.recall_at_1(
                rows @ gallery[trained_on].T, found.labels[apart], found.labels[trained_on]
            )
            for name, rows in by.items()
        }
    checkpoint.save(
        output / GALLERY,
        {
            "identity": large.identity,
            "vectors": large.vectors,
            "names": found.names,
            "labels": found.labels,
            "classes": found.persons,
        },
    )
    state = students.state(made.student, config, wanted.method)
    checkpoint.save(output / STUDENT, {"identity": large.identity, "student": state})
    for name in (GALLERY, STUDENT):
        checkpoint.previous(output / name).unlink(missing_ok=True)
    result["seconds"] = round(time.monotonic() - started, 1)
    runs.write_json(output / RESULT, result)
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown of what `fit` returned."""
    size = result["config"]["embed"]["size"]
    head = ["embedding of a held-out picture", "cosine to the teacher's", "finds itself, %"]
    if "classes" in result:
        head.append("nearest is of its class, %")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, text in (
        ("teacher", f"teacher, {size} x {size} scaled up"),
        ("student", f"student, {size} x {size}"),
    ):
        row = [text, f"{result['cosine'][name]:.3f}", f"{result['own'][name]:.1f}"]
        if "classes" in result:
            row.append(f"{result['classes'][name]:.1f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def report(output: Path, result: dict[str, Any]) -> Path:
    """One HTML file with the table, the course of training and every setting."""
    from . import figures

    method = result["config"]["embed"]["method"]
    drawn = figures.course({method: result["history"]}, "loss", "step")
    picture = output / "training.png"
    drawn.savefig(picture)
    figures.plt.close(drawn)
    skipped = f" ({result['damaged']} damaged ones left out)" if result["damaged"] else ""
    facts = (
        f"{result['pictures']} pictures{skipped}, {result['held_out']} of them held out; "
        f"embeddings of {result['width']} numbers by {result['teacher'].split()[0]}; "
        f"{result['date']}, {result['seconds']:.0f} s."
    )
    title = output.resolve().name
    body = (
        f"<h1>{html.escape(title)}: a student for your teacher</h1><p>{html.escape(facts)}</p>"
        f"<div class='wide'>{page.table(table(result))}</div>"
        + page.figure(picture, "Training", "Mean loss of the steps between two points.")
        + page.provenance(result["command"], result["config"], result["versions"])
    )
    path = output / "report.html"
    path.write_text(page.document(title, body), encoding="utf-8")
    return path


@dataclass
class Match:
    """A gallery picture, its class ("" without classes) and the cosine to the probe."""

    name: str
    label: str
    cosine: float


class Matcher:
    """A trained student and a gallery of the same teacher.

    Args:
        folder: what `fit` wrote.
        gallery: another gallery file; default: the folder's own.

    Raises:
        UserError: a file is missing or damaged, or the gallery is another teacher's.
    """

    def __init__(self, folder: str | Path, gallery: str | Path | None = None) -> None:
        stored = checkpoint.load(Path(folder) / STUDENT)
        path = Path(gallery) if gallery else Path(folder) / GALLERY
        entries = checkpoint.load(path)
        if entries.get("identity") != stored["identity"]:
            raise UserError(
                f"gallery {path} was embedded by another teacher ({entries.get('identity')}) than "
                f"the student's ({stored['identity']}): embed the gallery again with that one"
            )
        self.student = students.restore(stored["student"])
        self.pixels = students.Pixels(**stored["student"]["pixels"])
        self.names, self.labels = entries["names"], entries["labels"]
        self.classes = entries["classes"]
        self.gallery = students.space(entries["vectors"], self.student.center)

    def embed(self, images: list) -> Tensor:
        """Unit rows [N, D] of PIL images; those of another size are brought to the student's."""
        size = self.student.size
        small = []
        for image in images:
            if image.size == (size, size):
                small.append(students.as_bytes(image, self.pixels).float())
            else:
                canvas = students.on_canvas(image, self.pixels)
                small.append(resize(canvas[None].float(), size, self.pixels.resize)[0])
        return self.student.embed(torch.stack(small))

    def __call__(self, images: list, count: int = 3) -> list[list[Match]]:
        """The `count` nearest gallery pictures of each image, nearest first."""
        scores = self.embed(images) @ self.gallery.T
        top = scores.topk(min(count, len(self.gallery)))
        return [
            [
                Match(self.names[at], self.classes[int(self.labels[at])], float(value))
                for value, at in zip(values, places.tolist(), strict=True)
            ]
            for values, places in zip(top.values, top.indices, strict=True)
        ]


def _pictures(root: Path) -> people.People:
    """Classes where every picture lies in a folder of its own class, else one without a name."""
    every = people.pictures(root)
    if all(len(path.relative_to(root).parts) == 2 for path in every.files):
        return people.folder(root)
    return every
