"""Published sets of face pictures that are got by hand, and how they are evaluated.

LFW: Huang, Ramesh, Berg, Learned-Miller, "Labeled Faces in the Wild: A Database for Studying Face
Recognition in Unconstrained Environments", 2007. TinyFace: Cheng, Zhu, Gong, "Low-Resolution Face
Recognition", ACCV 2018. Nothing is downloaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .people import People, folder, pictures


@dataclass
class Pairs:
    """Pairs of files: rows left and right int64 [P] of files, same bool [P], fold int64 [P]."""

    files: list[Path]
    left: Tensor
    right: Tensor
    same: Tensor
    fold: Tensor


@dataclass
class TinyFace:
    """Persons to train on, and the test: gallery and probes number their persons alike."""

    training: People
    gallery: People
    probes: People
    distractors: list[Path]


def lfw(root: Path, least: int = 1) -> People:
    """root/<person>/<person>_0001.jpg, of the persons with at least `least` pictures.

    Raises:
        UserError: no such folder, no picture in it, or nobody has so many.
    """
    people = folder(root)
    enough = torch.bincount(people.labels) >= least
    if not enough.any():
        raise UserError(f"{root}: nobody has {least} pictures")
    kept = people.keep(enough[people.labels].nonzero().flatten())
    number = enough.cumsum(0) - 1
    persons = [people.persons[person] for person in enough.nonzero().flatten().tolist()]
    return People(kept.files, kept.names, number[kept.labels], persons)


def lfw_pairs(root: Path, name: str = "pairs.txt") -> Pairs:
    """The pairs of root/`name`, in the format of pairs.txt and of pairsDevTest.txt.

    The first line is "folds, tab, n", or n alone for one fold. Each fold has n lines "person, i, j"
    of the same person's pictures i and j, then n lines "person, i, other, j".

    Raises:
        UserError: no such file, a line of another form, or a picture that is not in root.
    """
    path = root / name
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    counts = re.fullmatch(r"(?:(\d+)\t)?(\d+)", head.strip())
    if counts is None:
        raise UserError(f"{path}, line 1: expected the numbers of folds and pairs, got {head!r}")
    folds, pairs = int(counts[1] or 1), int(counts[2])
    if len(lines) != 2 * folds * pairs:
        raise UserError(
            f"{path}: expected {folds} x 2 x {pairs} pairs after line 1, found {len(lines)}"
        )
    rows: dict[Path, int] = {}

    def row(number: int, person: str, picture: str) -> int:
        file = root / person / f"{person}_{int(picture):04d}.jpg"
        if file not in rows and not file.exists():
            raise UserError(f"{path}, line {number}: no file {file}")
        return rows.setdefault(file, len(rows))

    # Within a fold the pairs of the same person come first.
    fold = torch.arange(len(lines)) // (2 * pairs)
    same = torch.arange(len(lines)) % (2 * pairs) < pairs
    left, right = [], []
    for number, (line, alike) in enumerate(zip(lines, same.tolist(), strict=True), start=2):
        form = r"([^\t]+)\t(\d+)\t(\d+)" if alike else r"([^\t]+)\t(\d+)\t([^\t]+)\t(\d+)"
        fields = re.fullmatch(form, line.strip())
        if fields is None:
            kind = "person, i, j" if alike else "person, i, other, j"
            raise UserError(f"{path}, line {number}: expected {kind} with tabs, got {line!r}")
        person, first, *other, second = fields.groups()
        left.append(row(number, person, first))
        right.append(row(number, other[0] if other else person, second))
    return Pairs(list(rows), torch.tensor(left), torch.tensor(right), same, fold)


def tinyface(root: Path) -> TinyFace:
    """The archive's Training_Set/<person>/* and, below Testing_Set, Gallery_Match, Probe and
    Gallery_Distractor. Who is on a test picture is taken from its name, <person>_<n>.jpg.

    Raises:
        UserError: a folder without pictures, a name of another form, or a probe of somebody who
            is not in the gallery.
    """
    test = root / "Testing_Set"
    matches, asked = (pictures(test / name) for name in ("Gallery_Match", "Probe"))
    persons = sorted({_person(path) for path in matches.files}, key=int)
    number = {person: label for label, person in enumerate(persons)}

    def named(found: People) -> People:
        labels = []
        for path in found.files:
            if _person(path) not in number:
                raise UserError(f"{path}: no picture of person {_person(path)} in Gallery_Match")
            labels.append(number[_person(path)])
        return People(found.files, found.names, torch.tensor(labels), persons)

    distractors = pictures(test / "Gallery_Distractor").files
    return TinyFace(folder(root / "Training_Set"), named(matches), named(asked), distractors)


def _person(path: Path) -> str:
    found = re.fullmatch(r"(\d+)_\d+", path.stem)
    if found is None:
        raise UserError(f"{path}: expected a name <person>_<n>{path.suffix} of numbers")
    return found[1]


@dataclass
class Verification:
    """Accuracy over folds: mean in percent, its standard error, the folds' own and thresholds."""

    accuracy: float
    standard_error: float
    folds: list[float]
    thresholds: list[float]


def verify_pairs(
    left_vectors: Tensor, right_vectors: Tensor, same: Tensor, fold: Tensor
) -> Verification:
    """LFW's protocol for pairs of embeddings [P, D] with same bool [P] and fold int64 [P].

    A pair is accepted where its cosine exceeds a threshold; each fold is judged with the one that
    is most accurate on all other folds. The standard error is the paper's: the folds' deviation
    (n - 1) over the root of their number.

    Raises:
        ValueError: embeddings that are not finite, or fewer than two folds.
    """
    scores = F.cosine_similarity(left_vectors.double(), right_vectors.double())
    if not torch.isfinite(scores).all():
        raise ValueError("verify_pairs: embeddings are not finite")
    numbers = fold.unique().tolist()
    if len(numbers) < 2:
        raise ValueError(f"verify_pairs: expected two folds or more, got {len(numbers)}")
    accuracies, thresholds = [], []
    for number in numbers:
        held_out = fold == number
        threshold = _threshold(scores[~held_out], same[~held_out])
        right = (scores[held_out] > threshold) == same[held_out]
        accuracies.append(100.0 * float(right.double().mean()))
        thresholds.append(threshold)
    shares = torch.tensor(accuracies, dtype=torch.float64)
    error = float(shares.std() / len(numbers) ** 0.5)
    return Verification(float(shares.mean()), error, accuracies, thresholds)


def _threshold(scores: Tensor, same: Tensor) -> float:
    """The most accurate one, halfway between neighbouring scores; the lowest of several."""
    values = scores.unique()
    cuts = torch.cat([values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:]])
    correct = ((scores > cuts[:, None]) == same).sum(1)
    return float(cuts[correct.argmax()])


@dataclass
class Identification:
    """Probes, in percent, with a picture of their person among the best 1, 5, 20 of the gallery."""

    rank1: float
    rank5: float
    rank20: float


def identify(
    probe_vectors: Tensor,
    gallery_vectors: Tensor,
    distractor_vectors: Tensor,
    probe_labels: Tensor,
    gallery_labels: Tensor,
) -> Identification:
    """Ranks of probes [P, D] in a gallery [G, D] with distractors [M, D], by cosine.

    TinyFace's cumulative matching characteristic: pictures are ranked, not persons, and the best
    one of the probe's person counts. Equal scores count against it.

    Args:
        probe_labels, gallery_labels: int64 [P] and [G], the persons.

    Raises:
        ValueError: embeddings that are not finite, or a probe of somebody not in the gallery.
    """
    if not torch.isin(probe_labels, gallery_labels).all():
        raise ValueError("identify: a probe's person is not in the gallery")
    entries = F.normalize(torch.cat([gallery_vectors, distractor_vectors]))
    persons = torch.cat([gallery_labels, gallery_labels.new_full((len(distractor_vectors),), -1)])
    ahead = []
    # A few probes at a time: TinyFace's distractors are 150,000.
    for probes, labels in zip(
        F.normalize(probe_vectors).split(256), probe_labels.split(256), strict=True
    ):
        scores = probes @ entries.T
        if not torch.isfinite(scores).all():
            raise ValueError("identify: embeddings are not finite")
        own = labels[:, None] == persons
        best = scores.where(own, -torch.inf).amax(1, keepdim=True)
        ahead.append(((scores >= best) & ~own).sum(1))
    places = torch.cat(ahead)
    return Identification(*(100.0 * float((places < k).double().mean()) for k in (1, 5, 20)))
