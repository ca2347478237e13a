"""LFW and TinyFace: what lies in their folders, and the evaluation of embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from crrcd_train import face_sets
from crrcd_train.errors import UserError


def _touch(root: Path, *names: str) -> None:
    """Nothing here opens a picture."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def lfw(tmp_path: Path) -> Path:
    """Ann with two pictures, Bob with one, Cyd with twelve, and both lists of pairs."""
    root = tmp_path / "lfw"
    for person, count in (("Ann_Lee", 2), ("Bob", 1), ("Cyd", 12)):
        _touch(root, *(f"{person}/{person}_{i:04d}.jpg" for i in range(1, count + 1)))
    folds = [
        "Ann_Lee\t1\t2\nCyd\t1\t12\nAnn_Lee\t1\tBob\t1\nBob\t1\tCyd\t3\n",
        "Cyd\t3\t12\nCyd\t2\t4\nBob\t1\tCyd\t5\nAnn_Lee\t2\tCyd\t6\n",
    ]
    (root / "pairs.txt").write_text("2\t2\n" + "".join(folds))
    (root / "pairsDevTest.txt").write_text("2\n" + folds[1])
    return root


def test_lfw_people(lfw: Path) -> None:
    people = face_sets.lfw(lfw)
    assert people.persons == ["Ann_Lee", "Bob", "Cyd"]
    assert people.labels.bincount().tolist() == [2, 1, 12]
    often = face_sets.lfw(lfw, least=2)
    assert often.persons == ["Ann_Lee", "Cyd"]
    assert often.labels.tolist() == [0] * 2 + [1] * 12
    assert often.files[2] == lfw / "Cyd" / "Cyd_0001.jpg" and often.names[2] == "Cyd/Cyd_0001.jpg"
    with pytest.raises(UserError, match=r"nobody has 13 pictures"):
        face_sets.lfw(lfw, least=13)
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        face_sets.lfw(lfw / "nowhere")


def test_lfw_pairs(lfw: Path) -> None:
    pairs = face_sets.lfw_pairs(lfw)
    files = [[pairs.files[row].stem for row in side.tolist()] for side in (pairs.left, pairs.right)]
    assert list(zip(*files, strict=True)) == [
        ("Ann_Lee_0001", "Ann_Lee_0002"),
        ("Cyd_0001", "Cyd_0012"),
        ("Ann_Lee_0001", "Bob_0001"),
        ("Bob_0001", "Cyd_0003"),
        ("Cyd_0003", "Cyd_0012"),
        ("Cyd_0002", "Cyd_0004"),
        ("Bob_0001", "Cyd_0005"),
        ("Ann_Lee_0002", "Cyd_0006"),
    ]
    assert pairs.same.tolist() == [True, True, False, False] * 2
    assert pairs.fold.tolist() == [0] * 4 + [1] * 4
    assert len(set(pairs.files)) == len(pairs.files) == 10
    assert pairs.left.dtype == pairs.right.dtype == pairs.fold.dtype == torch.int64
    assert all(path.exists() for path in pairs.files)
    single = face_sets.lfw_pairs(lfw, "pairsDevTest.txt")
    assert single.same.tolist() == [True, True, False, False] and not single.fold.any()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, r"pairs.txt cannot be read"),
        ("", r"pairs.txt, line 1: expected the numbers of folds and pairs, got ''"),
        ("ten\t1\n", r"line 1: expected the numbers"),
        ("1\t1\nCyd\t1\t2\n", r"expected 1 x 2 x 1 pairs after line 1, found 1"),
        ("1\nCyd\t1\t2\nCyd\t1\t2\n", r"line 3: expected person, i, other, j with tabs"),
        ("1\nCyd\t1\tBob\t1\nCyd\t1\t2\n", r"line 2: expected person, i, j with tabs"),
        ("1\nCyd\t1\t2\nAnn_Lee\t3\tCyd\t2\n", r"line 3: no file .*Ann_Lee_0003.jpg"),
    ],
)
def test_lfw_pairs_with_mistakes(lfw: Path, content: str | None, text: str) -> None:
    if content is None:
        (lfw / "pairs.txt").unlink()
    else:
        (lfw / "pairs.txt").write_text(content)
    with pytest.raises(UserError, match=text) as caught:
        face_sets.lfw_pairs(lfw)
    assert "\n" not in str(caught.value)


@pytest.fixture
def tinyface(tmp_path: Path) -> Path:
    root = tmp_path / "tinyface"
    _touch(root / "Training_Set", "1/a.jpg", "1/b.jpg", "4/a.jpg")
    _touch(root / "Testing_Set" / "Gallery_Match", "20_1.jpg", "3_1.jpg", "3_2.jpg", "7_1.jpg")
    _touch(root / "Testing_Set" / "Probe", "20_2.jpg", "3_3.jpg", "20_3.jpg")
    _touch(root / "Testing_Set" / "Gallery_Distractor", "0001.jpg", "0002.jpg")
    (root / "Testing_Set" / "probe_img_ID_pairs.mat").touch()
    return root


def test_tinyface(tinyface: Path) -> None:
    found = face_sets.tinyface(tinyface)
    assert found.gallery.persons == found.probes.persons == ["3", "7", "20"]
    for people, expected in (
        (found.gallery, {"3_1.jpg": 0, "3_2.jpg": 0, "7_1.jpg": 1, "20_1.jpg": 2}),
        (found.probes, {"3_3.jpg": 0, "20_2.jpg": 2, "20_3.jpg": 2}),
    ):
        assert dict(zip(people.names, people.labels.tolist(), strict=True)) == expected
    assert found.probes.files[0] == tinyface / "Testing_Set" / "Probe" / "20_2.jpg"
    assert [path.name for path in found.distractors] == ["0001.jpg", "0002.jpg"]
    assert found.training.persons == ["1", "4"] and found.training.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("remove", "add", "text"),
    [
        ("Testing_Set/Gallery_Match/7_1.jpg", "Testing_Set/Probe/7_2.jpg", r"7_2.jpg: no picture"),
        ("", "Testing_Set/Probe/x.jpg", r"x.jpg: expected a name <person>_<n>.jpg"),
        ("", "Testing_Set/Gallery_Match/3.jpg", r"3.jpg: expected a name <person>_<n>.jpg"),
    ],
)
def test_tinyface_with_mistakes(tinyface: Path, remove: str, add: str, text: str) -> None:
    if remove:
        (tinyface / remove).unlink()
    _touch(tinyface, add)
    with pytest.raises(UserError, match=text):
        face_sets.tinyface(tinyface)


@pytest.mark.parametrize("name", ["Gallery_Match", "Probe", "Gallery_Distractor"])
def test_tinyface_without_a_folder(tinyface: Path, name: str) -> None:
    (tinyface / "Testing_Set" / name).rename(tinyface / "elsewhere")
    with pytest.raises(UserError, match=rf"no folder .*{name}"):
        face_sets.tinyface(tinyface)


def _with_cosines(cosines: list[float]) -> tuple[Tensor, Tensor]:
    """Pairs of vectors of different lengths with these cosines."""
    cosine = torch.tensor(cosines, dtype=torch.float64)
    left = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(len(cosines), 2)
    return left, 3 * torch.stack([cosine, (1 - cosine.square()).sqrt()], 1)


def test_verification_takes_the_threshold_of_the_other_folds() -> None:
    cosines = [0.9, 0.8, 0.3, 0.1, 0.7, 0.35, 0.4, 0.0, 0.6, 0.9, 0.2, 0.5]
    same = torch.tensor([True, True, False, False] * 3)
    fold = torch.arange(12) // 4
    found = face_sets.verify_pairs(*_with_cosines(cosines), same, fold)
    # Folds 1 and 2 err once between 0.5 and 0.6, folds 0 and 2 not at all; folds 0 and 1 err once
    # above 0.3 or above 0.4, and the lower is taken.
    torch.testing.assert_close(
        torch.tensor(found.thresholds), torch.tensor([0.55, 0.55, (0.3 + 0.35) / 2])
    )
    assert found.folds == [100.0, 75.0, 75.0]
    assert found.accuracy == pytest.approx(250 / 3)
    # Deviations 50/3, -25/3 and -25/3, of three folds.
    assert found.standard_error == pytest.approx((3750 / 9 / 2 / 3) ** 0.5)


def test_verification_of_ten_folds_agrees_with_a_search() -> None:
    generator = torch.Generator().manual_seed(0)
    same = torch.arange(200) % 20 < 10
    fold = torch.arange(200) // 20
    left = torch.randn(200, 8, generator=generator)
    right = torch.randn(200, 8, generator=generator) + 0.7 * left * same[:, None]
    found = face_sets.verify_pairs(left, right, same, fold)
    cosines = [
        float(a.double() @ b.double() / a.double().norm() / b.double().norm())
        for a, b in zip(left, right, strict=True)
    ]

    def correct(threshold: float, rows: list[int]) -> int:
        return sum((cosines[row] > threshold) == bool(same[row]) for row in rows)

    for number, threshold in enumerate(found.thresholds):
        others = [row for row in range(200) if row // 20 != number]
        best = max(correct(cut, others) for cut in [-2.0, *cosines])
        assert correct(threshold, others) == best
        own = list(range(20 * number, 20 * number + 20))
        assert found.folds[number] == pytest.approx(5 * correct(threshold, own))
    assert 60 < found.accuracy < 95


def test_verification_where_all_or_none_are_best_accepted() -> None:
    # On fold 1 everything is the same person's, on fold 0 nothing is.
    same, fold = torch.tensor([False, False, True, True]), torch.tensor([0, 0, 1, 1])
    found = face_sets.verify_pairs(*_with_cosines([0.1, 0.5, 0.2, 0.5]), same, fold)
    assert found.folds == [0.0, 0.0]


def test_verification_with_mistakes() -> None:
    left, right = _with_cosines([0.1, 0.2])
    same, fold = torch.tensor([True, False]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"verify_pairs: expected two folds or more, got 1"):
        face_sets.verify_pairs(left, right, same, fold * 0)
    with pytest.raises(ValueError, match=r"verify_pairs: embeddings are not finite"):
        face_sets.verify_pairs(left, right * torch.nan, same, fold)


def _at(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_identification_ranks_pictures() -> None:
    gallery, persons = _at(0, 80, 10, 11, 12, 13), torch.tensor([0, 0, 1, 1, 1, 1])
    probes, labels = 5 * _at(2, 60, 30, 9), torch.tensor([0, 0, 0, 1])
    found = face_sets.identify(probes, gallery, torch.empty(0, 2), labels, persons)
    # The third probe is behind person 1's four pictures: fifth, though of the second person.
    assert (found.rank1, found.rank5, found.rank20) == (75.0, 100.0, 100.0)
    distractors = torch.cat([_at(31), _at(5) * 7, _at(*[170.0] * 30)])
    found = face_sets.identify(probes, gallery, distractors, labels, persons)
    assert (found.rank1, found.rank5, found.rank20) == (75.0, 75.0, 100.0)
    crowd = _at(*[30.0] * 16)  # with person 1's pictures 20 are ahead of the third probe's
    found = face_sets.identify(probes, gallery, crowd, labels, persons)
    assert (found.rank1, found.rank5, found.rank20) == (75.0, 75.0, 75.0)


def test_identification_of_many_agrees_with_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(30, 6, generator=generator)
    persons, labels = torch.arange(60) % 30, torch.randint(30, (600,), generator=generator)
    gallery, probes = (
        centers[rows] + 0.8 * torch.randn(len(rows), 6, generator=generator)
        for rows in (persons, labels)
    )
    distractors = torch.randn(200, 6, generator=generator)
    found = face_sets.identify(probes, gallery, distractors, labels, persons)
    entries = torch.nn.functional.normalize(torch.cat([gallery, distractors]))
    order = (probes @ entries.T).argsort(1, descending=True)
    hits = torch.cat([persons, torch.full((200,), -1)])[order] == labels[:, None]
    for k, value in ((1, found.rank1), (5, found.rank5), (20, found.rank20)):
        assert value == pytest.approx(100 * float(hits[:, :k].any(1).double().mean()))
    assert 5 < found.rank1 < found.rank5 < found.rank20 < 100


def test_equal_scores_do_not_identify() -> None:
    same = torch.ones(3, 2)
    found = face_sets.identify(same, same, same[:0], torch.arange(3), torch.arange(3))
    assert (found.rank1, found.rank5) == (0.0, 100.0)
    apart = _at(0, 45, 90)
    found = face_sets.identify(apart, apart, apart[:1], torch.arange(3), torch.arange(3))
    assert found.rank1 == pytest.approx(200 / 3)


def test_identification_with_mistakes() -> None:
    vectors, labels = _at(0, 45, 90), torch.arange(3)
    with pytest.raises(ValueError, match=r"identify: a probe's person is not in the gallery"):
        face_sets.identify(vectors, vectors[:2], vectors[2:], labels, labels[:2])
    with pytest.raises(ValueError, match=r"identify: embeddings are not finite"):
        face_sets.identify(vectors, vectors, vectors * torch.inf, labels, labels)
