"""Students in a teacher's space: losses against loops, training, scores, what is stored."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from crrcd_train import checkpoint, interrupt, students
from crrcd_train.errors import Interrupted, UserError

PERSONS, EACH, WIDTH = 4, 3, 6


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def settings(grey: bool = True, **optim: float) -> students.Students:
    found = students.Students()
    found.pixels = students.Pixels(canvas=16, grey=grey, shift=2, shift_step=2)
    found.student.width = 4
    found.crrcd.hidden_dim = found.crrcd.relation_dim = 8
    for name, value in {"steps": 30, "batch_size": 8, "lr": 0.02, **optim}.items():
        setattr(found.optim, name, value)
    return found


def canvases(channels: int = 1, count: int = PERSONS * EACH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    return (255 * F.interpolate(coarse, 16)).to(torch.uint8)


def toy(channels: int = 1, size: int = 8) -> tuple[students.Views, Tensor, Tensor]:
    """Views, embeddings that are a linear map of what is seen, and persons."""
    images = canvases(channels)
    small = F.avg_pool2d(images.float(), 4).flatten(1) / 255
    weights = torch.randn(small.shape[1], WIDTH, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(PERSONS).repeat_interleave(EACH)
    views = students.Views(images, size, settings(channels == 1).pixels)
    return views, small @ weights, labels


# ------------------------------------------------------------------ losses


def test_cosine_loss() -> None:
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    teacher = torch.tensor([[5.0, 0.0], [1.0, 1.0], [4.0, 0.0]])
    found = students.cosine_loss(student, teacher)
    assert float(found) == pytest.approx((0 + (1 - math.sqrt(0.5)) + 2) / 3)


def _huber(x: float, y: float) -> float:
    return 0.5 * (x - y) ** 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def _distances(rows: Tensor) -> dict[tuple[int, int], float]:
    """Of every pair, over their mean."""
    found = {
        (i, j): float((rows[i] - rows[j]).norm())
        for i in range(len(rows))
        for j in range(len(rows))
        if i != j
    }
    mean = sum(found.values()) / len(found)
    return {pair: value / mean for pair, value in found.items()}


def _angle(rows: Tensor, i: int, j: int, k: int) -> float:
    """The cosine of the angle at j between i and k."""
    one, other = rows[i] - rows[j], rows[k] - rows[j]
    return float(one @ other / one.norm() / other.norm())


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 0.0), (0.0, 50.0), (2.0, 3.0)])
def test_rkd_loss_is_the_papers(distance: float, angle: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    # Three almost equal rows: one distance is far longer than the mean, Huber's linear part.
    teacher[:4] = teacher[0] + 0.02 * teacher[:4]
    s, t = F.normalize(student), F.normalize(teacher)
    d_s, d_t = _distances(s), _distances(t)
    assert max(abs(d_s[pair] - d_t[pair]) for pair in d_s) > 1
    by_distance = sum(_huber(d_s[pair], d_t[pair]) for pair in d_s) / len(d_s)
    by_angle = 0.0
    for i in range(5):
        for j in range(5):
            for k in range(5):
                if i != j and j != k and i != k:
                    by_angle += _huber(_angle(s, i, j, k), _angle(t, i, j, k))
    by_angle /= 5**3  # the mean runs over all of b, a, c; where two are one nothing differs
    found = students.rkd_loss(student, teacher, distance, angle)
    assert float(found) == pytest.approx(distance * by_distance + angle * by_angle, rel=1e-6)


def test_rkd_loss_knows_no_rotation_and_no_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, basis = torch.randn(7, 5, generator=generator), torch.randn(5, 5, generator=generator)
    rotation = torch.linalg.qr(basis).Q
    for student in (teacher, 3 * teacher, teacher @ rotation):
        assert float(students.rkd_loss(student, teacher, 25.0, 50.0)) < 1e-7
    other = teacher.clone()
    other[0] *= -1
    assert float(students.rkd_loss(other, teacher, 25.0, 50.0)) > 0.1


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", ["area", "bicubic"])
def test_views_table_equals_live(channels: int, resize: str) -> None:
    pixels = settings().pixels
    pixels.resize = resize
    table = students.Views(canvases(channels), 5, pixels)
    pixels.cache_megabytes = 0
    live = students.Views(canvases(channels), 5, pixels)
    assert table.table is not None and live.table is None
    rows = torch.arange(12).repeat(len(table.variants))
    variants = torch.arange(len(table.variants)).repeat_interleave(12)
    assert len(table.variants) == 18
    assert torch.equal(table.batch(rows, variants), live.batch(rows, variants))
    assert torch.equal(table.all(), live.all()) and table.all().shape == (18, 12, channels, 5, 5)
    assert torch.equal(table.plain(torch.tensor([3])), live.all()[0, 3:4])
    assert 0 <= float(live.all().min()) < float(live.all().max()) <= 255 or resize == "bicubic"


@pytest.mark.parametrize("megabytes", [0, 512])
def test_views_of_some_of_the_images(megabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = settings().pixels
    pixels.cache_megabytes = megabytes
    every, rows = students.Views(canvases(), 5, pixels), torch.tensor([7, 2, 2, 11])
    expected, plain = every.all()[:, rows], every.plain(rows)
    if megabytes:  # looked up, not made again
        monkeypatch.setattr(students.Views, "_make", None)
    some = every.keep(rows)
    assert len(some) == 4 and torch.equal(some.all(), expected)
    assert torch.equal(plain, expected[0])


def test_plain_views_need_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(students.Views, "_every", None)
    views = students.Views(canvases(), 8, settings().pixels)
    assert torch.equal(views.plain(torch.arange(12)), F.avg_pool2d(canvases().float(), 2))


def test_views_shift_and_mirror() -> None:
    images = canvases()
    views = students.Views(images, 8, settings().pixels)
    small = F.avg_pool2d(images.float(), 2)
    assert torch.equal(views.plain(torch.arange(12)), small)
    # Two pixels of the canvas are one of the student's; what moves in is the edge's.
    down = torch.cat([small[:, :, :1], small[:, :, :-1]], 2)
    assert any(torch.equal(variant, down) for variant in views.all())
    assert any(torch.equal(variant, small.flip(3)) for variant in views.all())


def test_canvases_of_pictures() -> None:
    colours = np.zeros((20, 40, 3), dtype=np.uint8)
    colours[:, 10:30] = (255, 0, 0)  # the middle square
    image = Image.fromarray(colours)
    whole = students.on_canvas(image, students.Pixels(canvas=8))
    assert whole.shape == (3, 8, 8) and whole.dtype == torch.uint8
    assert int(whole[0, 4, 0]) == 0 and int(whole[0, 4, 4]) == 255
    crop = students.on_canvas(image, students.Pixels(canvas=8, fit="crop"))
    assert (crop[0] == 255).all() and not crop[1:].any()
    grey = students.on_canvas(image, students.Pixels(canvas=8, fit="crop", grey=True))
    assert grey.shape == (1, 8, 8) and (grey == 76).all()


# ------------------------------------------------------------------ training


def logits_of(method: str, labels: Tensor) -> Tensor | None:
    return 4.0 * F.one_hot(labels).float() if method == "kd" else None


@pytest.mark.parametrize("method", students.TERMS)
def test_every_method_learns(method: str) -> None:
    views, vectors, labels = toy()
    own = settings(steps=60)
    given = labels if method == "ce" else None
    trained = students.train(
        views, vectors, given, own, method, seed=0, logits=logits_of(method, labels)
    )
    losses = [row["loss"] for row in trained.history]
    assert losses[-1] < 0.93 * losses[0]
    assert trained.history[-1]["step"] == 60 and len(losses) == students.LOGGED
    assert not trained.student.training
    assert (trained.classifier is None) == (method not in ("ce", "kd"))
    assert (trained.criterion is None) == (method not in students.LOSSES)
    if trained.criterion is not None:
        assert f"{method}_no_information_loss" in trained.history[0]
    if method in ("cosine", "crd", "crrcd-difference"):
        embedded = trained.student.embed(views.plain(torch.arange(12)))
        targets = students.space(vectors, vectors.mean(0))
        assert float((embedded * targets).sum(1).mean()) > 0.5


@pytest.mark.parametrize("method", ["cosine+rkd", "crrcd", "crd+ce"])
def test_same_arguments_give_the_same_weights(method: str) -> None:
    views, vectors, labels = toy()

    def weights(seed: int) -> Tensor:
        torch.rand(seed + 1)  # the global generator's state is not an argument
        trained = students.train(views, vectors, labels, settings(steps=4), method, seed=seed)
        return torch.cat([p.detach().flatten() for p in trained.student.parameters()])

    first = weights(0)
    assert torch.equal(first, weights(0)) and not torch.equal(first, weights(1))


def test_terms_add_up() -> None:
    """Before the first step, the loss of a sum is the sum of the losses."""
    views, vectors, labels = toy()

    def first(method: str, **weights: float) -> float:
        own = settings(steps=1)
        own.cosine.weight = weights.get("cosine", own.cosine.weight)
        own.crd.weight = weights.get("crd", own.crd.weight)
        return students.train(views, vectors, labels, own, method, seed=0).history[0]["loss"]

    cosine, rkd, crd = first("cosine"), first("rkd"), first("crd")
    assert first("cosine+rkd+crd") == pytest.approx(cosine + rkd + crd, rel=1e-5)
    assert first("cosine", cosine=40.0) == pytest.approx(2 * cosine, rel=1e-5)
    assert first("crd", crd=3.0) == pytest.approx(3 * crd, rel=1e-5)


def test_training_stops_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    views, vectors, _ = toy()
    asked = iter([False, False, True])
    monkeypatch.setattr(interrupt, "requested", lambda: next(asked))
    with pytest.raises(Interrupted, match=r"cosine: stopped at step 2 of 30"):
        students.train(views, vectors, None, settings(), "cosine", seed=0)


# ------------------------------------------------------------------ mistakes


def test_labels_are_needed_for_cross_entropy() -> None:
    views, vectors, _ = toy()
    with pytest.raises(UserError, match=r"method cosine\+ce needs labels"):
        students.train(views, vectors, None, settings(), "cosine+ce", seed=0)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("cosin", r"unknown method 'cosin': expected cosine, rkd, .*, joined by \+"),
        ("cosine+", r"unknown method 'cosine\+'"),
        ("crd+cosine+crrcd", r"at most one of crd, crcd, crrcd, crrcd-difference"),
    ],
)
def test_methods_that_there_are_not(method: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        students.terms(method)
    views, vectors, labels = toy()
    with pytest.raises(UserError, match=text):
        students.train(views, vectors, labels, settings(), method, seed=0)


def test_tables_of_a_method() -> None:
    assert students.tables("cosine+rkd+crrcd-difference") == ["cosine", "rkd", "difference"]
    assert students.tables("ce") == []
    assert students.tables("ce+crcd") == ["crcd"]


@pytest.mark.parametrize(
    ("method", "table", "key", "value"),
    [
        ("crd", "crd", "temperature", 0.0),
        ("crcd", "crcd", "momentum", 2.0),
        ("crrcd", "crrcd", "direction", "sideways"),
        ("crrcd-difference", "difference", "normalizer", "none of these"),
        ("cosine+crd", "crd", "backend", "abacus"),  # only noticed at the first step
    ],
)
def test_settings_that_a_loss_refuses(method: str, table: str, key: str, value: object) -> None:
    views, vectors, _ = toy()
    own = settings()
    setattr(getattr(own, table), key, value)
    with pytest.raises(UserError, match=rf"^config table {table}: .*{key}: expected .* got"):
        students.train(views, vectors, None, own, method, seed=0)


def test_more_negatives_than_pictures_are_all_of_them() -> None:
    views, vectors, _ = toy()
    own = settings(steps=2)
    own.crd.negatives = 5000
    trained = students.train(views, vectors, None, own, "crd", seed=0)
    assert trained.criterion.negatives == 12


@pytest.mark.parametrize("method", students.TERMS)
def test_losses_that_are_not_finite(method: str) -> None:
    views, vectors, labels = toy()
    logits = logits_of(method, labels)
    broken = vectors.clone()
    broken[3, 2] = math.nan
    with pytest.raises(UserError, match=rf"^{method}: the loss cannot be finite, the teacher's"):
        students.train(views, broken, labels, settings(), method, seed=0, logits=logits)
    with pytest.raises(
        UserError, match=rf"^{method}: the loss became .* step \d; lower the learning rate"
    ):
        diverging = settings(lr=1e30, steps=15)
        students.train(views, vectors, labels, diverging, method, seed=0, logits=logits)


def test_ce_counts_labelled_samples_only_and_kd_needs_logits() -> None:
    views, vectors, labels = toy()
    few = labels.clone()
    few[1::3] = -1
    trained = students.train(views, vectors, few, settings(steps=30), "ce", seed=0)
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    none = torch.full_like(labels, -1)
    none[0] = 1  # two classes, one label: most batches of two have none and add nothing
    rare = students.train(views, vectors, none, settings(steps=6, batch_size=2), "ce", seed=0)
    assert min(row["loss"] for row in rare.history) == 0.0
    with pytest.raises(UserError, match="method kd needs a teacher's logits"):
        students.train(views, vectors, labels, settings(), "kd", seed=0)


# ------------------------------------------------------------------ scores and states


def test_score_is_the_cosine() -> None:
    views, vectors, _ = toy()
    trained = students.train(views, vectors, None, settings(steps=2), "cosine", seed=0)
    images = views.plain(torch.arange(5))
    gallery = students.space(vectors, vectors.mean(0))
    found = students.score(trained, "cosine", images, gallery)
    assert found.shape == (5, 12)
    expected = F.cosine_similarity(trained.student(images)[:, None], gallery, dim=2).detach()
    torch.testing.assert_close(found, expected)


def test_score_of_cross_entropy_is_the_classes() -> None:
    views, vectors, labels = toy()
    images = views.plain(torch.arange(12))
    gallery = students.space(vectors, vectors.mean(0))
    trained = students.train(views, vectors, labels, settings(), "ce", seed=0)
    found = students.score(trained, "ce", images, gallery)
    logits = trained.classifier(trained.student(images)).double().detach()
    assert found.shape == (12, PERSONS)
    torch.testing.assert_close(found, logits - logits.logsumexp(1, keepdim=True))
    both = students.train(views, vectors, labels, settings(steps=2), "cosine+ce", seed=0)
    assert students.score(both, "cosine+ce", images, gallery).shape == (12, 12)


def test_score_by_learned_relations_is_the_loop() -> None:
    views, vectors, _ = toy()
    trained = students.train(views, vectors, None, settings(steps=5), "crrcd", seed=0)
    images = views.plain(torch.tensor([7, 2, 4]))
    gallery = students.space(vectors, vectors.mean(0))
    found = students.score(trained, "crrcd", images, gallery)
    embedded, criterion = trained.student.embed(images), trained.criterion
    for p in range(3):
        for g in range(12):
            cosines = []
            for a in range(12):
                if a != g:
                    anchor = gallery[a : a + 1]
                    asked = criterion.cross_relation(anchor, embedded[p : p + 1]).flatten()
                    entry = criterion.teacher_relation(anchor, gallery[g : g + 1]).flatten()
                    cosines.append(float(F.cosine_similarity(asked, entry, dim=0).detach()))
            assert float(found[p, g]) == pytest.approx(sum(cosines) / 11, abs=1e-5)


def test_ridge_reproduces_a_linear_map() -> None:
    """Pictures of 4 x 4 pixels that are a linear map of unit rows around zero."""
    generator = torch.Generator().manual_seed(3)
    rows = F.normalize(torch.randn(30, WIDTH, generator=generator))
    weights = torch.randn(WIDTH, 16, generator=generator)

    def shown(rows: Tensor) -> Tensor:
        return (128 + 20 * rows @ weights).view(-1, 1, 4, 4)

    known = torch.cat([rows[:20], -rows[:20]])
    views = students.Views(shown(known), 4, students.Pixels(canvas=4, flip=False, shift=0))
    embed = students.ridge(views, known, 1e-6)
    torch.testing.assert_close(embed(shown(rows[20:])), rows[20:], atol=1e-4, rtol=0)


def test_ridge_is_the_closed_form() -> None:
    """Every variant is a sample, pixels are standardised, the intercept is free."""
    views, vectors, _ = toy(channels=3, size=2)
    x = views.all().flatten(2).flatten(0, 1).double()
    y = students.space(vectors, vectors.mean(0)).repeat(len(views.variants), 1).double()
    mean, std = x.mean(0), x.std(0, unbiased=False)
    x = (x - mean) / std
    beta = torch.linalg.solve(
        x.T @ x + 30 * torch.eye(12, dtype=torch.float64), x.T @ (y - y.mean(0))
    )
    images = views.plain(torch.arange(12))
    expected = F.normalize((images.flatten(1).double() - mean) / std @ beta + y.mean(0)).float()
    torch.testing.assert_close(students.ridge(views, vectors, 30.0)(images), expected)
    other = students.ridge(views, vectors, 3.0)(images)
    assert float((other - expected).abs().max()) > 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_states_are_restored(channels: int, tmp_path: Path) -> None:
    views, vectors, _ = toy(channels)
    own = settings(channels == 1, steps=5)
    own.student.stem_stride = 2
    trained = students.train(views, vectors, None, own, "cosine", seed=0)
    path = tmp_path / "student.pt"
    checkpoint.save(path, students.state(trained.student, own, "cosine"))
    stored = checkpoint.load(path)
    assert stored["channels"] == channels and stored["size"] == 8 and stored["method"] == "cosine"
    assert students.Pixels(**stored["pixels"]) == own.pixels
    restored = students.restore(stored)
    assert not restored.training
    images = views.plain(torch.arange(12))
    embedded = trained.student.embed(images)
    assert torch.equal(restored.embed(images), embedded)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(12))
    torch.testing.assert_close(restored.embed(images, chunk=5), embedded)
    assert torch.equal(restored.center, vectors.mean(0))


def test_embedding_leaves_training_mode_as_it_was() -> None:
    views, vectors, _ = toy()
    student = students.train(views, vectors, None, settings(steps=1), "cosine", seed=0).student
    images = views.plain(torch.arange(12))
    plain = student.embed(images)
    student.train()
    assert torch.equal(student.embed(images), plain) and student.training
