"""Training itself: every method learns, resuming is exact, trouble is told."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import idx_files

from crrcd_train import checkpoint, config, data, interrupt, loop, methods, runs
from crrcd_train.errors import Interrupted, UserError

SMALL = [
    "data.validation=50",
    "data.labels=100",
    "data.shift=2",
    "teacher.model=cnn3",
    "teacher.width=4",
    "teacher.optim.epochs=6",
    "teacher.optim.batch_size=32",
    "student.width=4",
    "optim.epochs=3",
    "optim.batch_size=32",
    *(f"{name}.negatives=32" for name in config.CONTRASTIVE),
    *(f"{name}.embedding_dim=16" for name in config.CONTRASTIVE),
    "crrcd.hidden_dim=16",
    "crrcd.relation_dim=16",
    "crrcd.anchors=4",
    "data.cache=table",
    "run.validate_every=1",
    "run.checkpoint_seconds=0",
    "run.tensorboard=false",
    "run.progress=false",
    "run.threads=1",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return idx_files.write(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def base(files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("data")
    return [*SMALL, f"data.source={files}", f"data.root={root}"]


@pytest.fixture(scope="module")
def images(base: list[str]) -> data.Images:
    return data.load(config.load(None, base).data)


@pytest.fixture(scope="module")
def teacher(base: list[str], images: data.Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teacher")
    result = runs.train_teacher(config.load(None, base), images, folder)
    assert result["test"] > 30  # chance is 10
    return folder


@pytest.fixture
def settings(base: list[str], teacher: Path) -> Any:
    def make(*overrides: str) -> config.Config:
        return config.load(None, [*base, f"teacher.checkpoint={teacher}", *overrides])

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    calls = iter(range(10**6))
    monkeypatch.setattr(interrupt, "requested", lambda: next(calls) >= steps)


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, through nested containers."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return same and one.flatten().view(torch.uint8).equal(other.flatten().view(torch.uint8))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other or (one != one and other != other)


def without_times(state: dict) -> dict:
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in state["history"]]
    return {k: v for k, v in state.items() if k not in ("seconds", "config")} | {"history": history}


@pytest.mark.parametrize("method", config.METHODS)
def test_every_method_trains(
    method: str, settings: Any, images: data.Images, tmp_path: Path
) -> None:
    chosen = settings(f"run.method={method}")
    result = runs.train_student(chosen, images, tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    if "shuffled" not in method:
        assert float(rows[-1]["ce"]) < float(rows[0]["ce"])
    assert result["validation"] == float(rows[-1]["validation"])
    assert result["method"] == method and "test" in result
    parts = config.terms(method) | {"ce"}
    assert parts == {name for name in ("ce", "kd", *config.CONTRASTIVE) if name in rows[0]}
    for name in parts & config.CONTRASTIVE.keys():
        assert float(rows[-1][f"{name}_relation_variance"]) > 1e-3
        assert float(rows[-1][f"{name}_no_information_loss"]) > 0


def test_zero_stands_for_what_the_losses_write_none() -> None:
    table = config.Config().crrcd
    assert table.hidden_dim == table.relation_dim == table.exclude_similar == 0
    sizes = {"student_dim": 6, "teacher_dim": 9, "num_samples": 40, "negatives": 8}
    found = methods.make_criterion("CRRCDLoss", "crrcd", table, embedding_dim=5, **sizes)
    assert found.cross_relation.weight.shape == (5, 10) and found.exclude_similar is None
    assert found.cross_relation.init == "mirrored"
    assert found.max_scale == 100 and found.check_every is None
    table.exclude_similar, table.hidden_dim, table.init = 0.5, 7, "gaussian"
    table.max_scale = 0
    found = methods.make_criterion("CRRCDLoss", "crrcd", table, embedding_dim=5, **sizes)
    assert found.cross_relation.weight.shape == (5, 7) and found.exclude_similar == 0.5
    assert found.cross_relation.init == "gaussian" and found.max_scale is None
    table.exclude_similar = 1.5
    with pytest.raises(
        UserError, match=r"config table crrcd: .*exclude_similar: expected a number"
    ):
        methods.make_criterion("CRRCDLoss", "crrcd", table, **sizes)


@pytest.mark.parametrize(
    "overrides",
    [
        ["run.method=kd+crrcd"],
        ["run.method=crrcd", "data.cache=live", "crrcd.direction=both", "crrcd.keys=live"],
        ["run.method=crrcd", "optim.schedule=cosine", "crrcd.exclude_same_label=true"],
        ["run.method=ce", "optim.schedule=step", "optim.clip_norm=1", "optim.label_smoothing=0.1"],
        ["run.method=kd", "optim.schedule=constant", "kd.schedule=ramp-down"],
        ["run.method=crrcd", "run.amp=bfloat16", "crrcd.schedule=ramp-up"],
        ["run.method=kd", "run.amp=float16"],
        ["run.method=ce", "student.model=timm:mobilenetv3_small_050"],
        ["run.method=kd+crcd", "distill.layers=3"],
        ["run.method=crrcd", "crrcd.exclude_similar=0.5", "crrcd.init=gaussian"],
        ["run.method=crd", "distill.hard_negatives=true"],
    ],
    ids=lambda overrides: " ".join(o.split(".")[-1] for o in overrides),
)
def test_resuming_is_exact(
    overrides: list[str],
    settings: Any,
    images: data.Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = settings(*overrides)
    whole = runs.train_student(chosen, images, tmp_path / "whole")
    # Within the first epoch, then at the end of the second one, or in it.
    for steps in (2, 7):
        interrupt_after(monkeypatch, steps)
        with pytest.raises(Interrupted):
            runs.train_student(chosen, images, tmp_path / "parts", resume=True)
        torch.rand(7)  # another process would have another state
        monkeypatch.undo()
        assert not (tmp_path / "parts" / runs.RESULT).exists()
    parts = runs.train_student(chosen, images, tmp_path / "parts", resume=True)
    one, other = (
        without_times(checkpoint.load(tmp_path / name / checkpoint.FILE))
        for name in ("whole", "parts")
    )
    for key in one:
        assert equal(one[key], other[key]), key
    assert parts["test"] == whole["test"]


def test_teacher_resumes_exactly(
    base: list[str], images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config.load(None, base)
    runs.train_teacher(chosen, images, tmp_path / "whole")
    interrupt_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        runs.train_teacher(chosen, images, tmp_path / "parts")
    monkeypatch.undo()
    runs.train_teacher(chosen, images, tmp_path / "parts", resume=True)
    one, other = (
        without_times(checkpoint.load(tmp_path / name / checkpoint.FILE))
        for name in ("whole", "parts")
    )
    assert equal(one, other)


def test_damaged_checkpoint_goes_on_from_the_previous_one(
    settings: Any, images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings("run.method=crrcd")
    whole = runs.train_student(chosen, images, tmp_path / "whole")
    interrupt_after(monkeypatch, 8)  # two epochs of four batches are saved, and the third begun
    with pytest.raises(Interrupted):
        runs.train_student(chosen, images, tmp_path / "parts")
    monkeypatch.undo()
    path = tmp_path / "parts" / checkpoint.FILE
    path.write_bytes(path.read_bytes()[:-50])
    said: list[str] = []
    parts = runs.train_student(chosen, images, tmp_path / "parts", resume=True, say=said.append)
    assert any("is damaged" in line and "previous" in line for line in said)
    assert parts["validation"] == whole["validation"]
    weights = [
        checkpoint.load(tmp_path / name / checkpoint.FILE)["modules"] for name in ("whole", "parts")
    ]
    assert equal(*weights)


def test_finished_runs_are_read_not_repeated(
    settings: Any, images: data.Images, tmp_path: Path
) -> None:
    chosen = settings("run.method=ce", "optim.epochs=1")
    first = runs.train_student(chosen, images, tmp_path)
    assert runs.train_student(chosen, None, tmp_path, resume=True) == first  # type: ignore[arg-type]
    with pytest.raises(UserError, match="already holds a run; give --resume"):
        runs.train_student(chosen, images, tmp_path)
    with pytest.raises(UserError, match=r"holds a run with other settings \(optim.lr: 0.1 -> 0.2"):
        other = settings("run.method=ce", "optim.epochs=1", "optim.lr=0.2")
        runs.train_student(other, images, tmp_path, resume=True)


def test_a_setting_newer_than_the_run_had_its_default(
    settings: Any, images: data.Images, tmp_path: Path
) -> None:
    chosen = settings("run.method=crd", "optim.epochs=1")
    first = runs.train_student(chosen, images, tmp_path)
    del first["config"]["distill"]
    runs.write_json(tmp_path / runs.RESULT, first)
    assert runs.train_student(chosen, images, tmp_path, resume=True) == first
    other = settings("run.method=crd", "optim.epochs=1", "distill.layers=2")
    with pytest.raises(UserError, match=r"other settings \(distill.layers: 1 -> 2\)"):
        runs.train_student(other, images, tmp_path, resume=True)


def test_resuming_with_other_settings_is_refused(
    settings: Any, images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        runs.train_student(settings("run.method=ce"), images, tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"other settings \(optim.epochs: 3 -> 4\)"):
        runs.train_student(
            settings("run.method=ce", "optim.epochs=4"), images, tmp_path, resume=True
        )


def test_divergence_is_told(settings: Any, images: data.Images, tmp_path: Path) -> None:
    chosen = settings("run.method=ce", "optim.lr=1e30")
    with pytest.raises(UserError, match=r"the loss became (nan|inf) in epoch 1; lower"):
        runs.train_student(chosen, images, tmp_path)


def test_wrong_options_of_the_loss_are_told(
    settings: Any, images: data.Images, tmp_path: Path
) -> None:
    chosen = settings("run.method=crrcd", "crrcd.negatives=5000")
    with pytest.raises(UserError, match=r"config table crrcd: .*negatives"):
        runs.train_student(chosen, images, tmp_path)


def test_teacher_is_needed_and_checked(
    base: list[str], settings: Any, images: data.Images, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="method kd needs a teacher"):
        runs.train_student(config.load(None, [*base, "run.method=kd"]), images, tmp_path / "a")
    chosen = settings("run.method=kd", f"teacher.checkpoint={tmp_path / 'none.pt'}")
    with pytest.raises(UserError, match="no usable checkpoint"):
        runs.train_student(chosen, images, tmp_path / "b")
    runs.train_student(settings("run.method=ce", "optim.epochs=1"), images, tmp_path / "c")
    chosen = settings("run.method=kd", f"teacher.checkpoint={tmp_path / 'c'}")
    with pytest.raises(UserError, match="holds a student, not a teacher"):
        runs.train_student(chosen, images, tmp_path / "d")


def test_teacher_table_is_kept_checked_and_shared(
    settings: Any, images: data.Images, teacher: Path, tmp_path: Path
) -> None:
    chosen = settings("run.method=kd", "run.seed=5", "optim.epochs=1")
    runs.train_student(chosen, images, tmp_path / "a")
    tables = teacher / runs.TABLES
    newest = max(tables.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    count = len(list(tables.iterdir()))
    newest.write_bytes(b"damaged")
    said: list[str] = []
    runs.train_student(chosen, images, tmp_path / "b", say=said.append)
    assert any("is made anew" in line for line in said)
    assert checkpoint.load(newest)["logits"].shape == (18, 100, 10)
    assert len([p for p in tables.iterdir() if "previous" not in p.name]) == count


def test_control_shows_every_teacher_row_another_images_student_row(
    settings: Any, images: data.Images
) -> None:
    chosen = settings("run.method=crrcd-shuffled")
    task = task_of(chosen, images)
    seen: list[Any] = []
    (criterion,) = task.criteria
    forward = criterion.forward

    def record(*arguments: Any) -> Any:
        seen.extend(arguments)
        return forward(*arguments)

    criterion.forward = record
    (rows, views), *_ = loop.epoch_batches(task.count, 20, task.variants, 0, 0)
    task.loss(rows, views, 0.0)
    batch = task.views.batch(rows, views)
    # the teacher's side is that of the method itself: its rows under their own ids
    student, teacher_rows, index = seen
    assert torch.equal(teacher_rows, batch.features) and torch.equal(index, rows)
    task.model.train()
    own = task.model.features(batch.student)
    torch.testing.assert_close(student[1:], own[:-1])
    torch.testing.assert_close(student[0], own[-1])
    assert rows.unique().numel() == 20


def task_of(chosen: config.Config, images: data.Images) -> methods.StudentTask:
    device = torch.device("cpu")
    parts = data.split(chosen.data, images.train_labels, 10, chosen.run.seed)
    teacher, outputs = runs._teacher_for(chosen, images, parts, device, print)
    return methods.StudentTask(chosen, images, device, parts, teacher, outputs)


@pytest.mark.parametrize("name", config.CONTRASTIVE)
def test_stages_meet_in_losses_of_their_own(name: str, settings: Any, images: data.Images) -> None:
    task = task_of(settings(f"run.method={name}", "distill.layers=3", f"{name}.weight=6"), images)
    assert [c.student_head.in_dim for c in task.criteria] == [4, 8, 16]
    (rows, views), *_ = loop.epoch_batches(task.count, 20, task.variants, 0, 0)
    batch = task.views.batch(rows, views)
    twins = copy.deepcopy(task.criteria)
    stages = task.model.stage_features(batch.student, 3)
    seen = batch.features.split([4, 8, 16], 1)
    expected = [c(s, t, rows) for c, s, t in zip(twins, stages, seen, strict=True)]
    torch.testing.assert_close(task.loss(rows, views, 0.0)[name], 2 * sum(expected))
    assert len({round(value.item(), 6) for value in expected}) == 3
    columns = task.diagnostics()
    assert columns[f"{name}_loss"] == pytest.approx(expected[2].item())
    assert columns[f"{name}_2_before_last_loss"] == pytest.approx(expected[0].item())


@pytest.mark.parametrize("name", ["crd", "crcd"])
def test_hard_negatives_are_the_nearest_of_other_classes(
    name: str, settings: Any, images: data.Images
) -> None:
    chosen = settings(f"run.method={name}", "distill.hard_negatives=true", f"{name}.negatives=20")
    task = task_of(chosen, images)
    seen: list[Any] = []
    (criterion,) = task.criteria
    criterion.register_forward_pre_hook(
        lambda _, given, options: seen.append(options["negative_index"]), with_kwargs=True
    )
    (rows, views), *_ = loop.epoch_batches(task.count, 20, task.variants, 0, 0)
    task.loss(rows, views, 0.0)
    features = task.views.features().double()
    features = torch.nn.functional.normalize(features - features.mean(0))
    labels = task.views.labels
    for row, negatives in zip(rows.tolist(), seen[0], strict=True):
        nearest = []
        for other in set(labels.tolist()) - {int(labels[row])}:
            members = [n for n in range(len(labels)) if labels[n] == other]
            members.sort(key=lambda n: -float(features[n] @ features[row]))
            nearest.append(members[:3])
        # Twenty of nine classes: the two nearest of each, and two of the third ones.
        wanted = {n for found in nearest for n in found[:2]}
        assert wanted == set(negatives[:18].tolist())
        assert set(negatives[18:].tolist()) < {found[2] for found in nearest}


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["run.method=crrcd"], "distill.hard_negatives: for crd and crcd"),
        (["run.method=crd", "crd.keys=live"], 'and keys other than "live"'),
        (["run.method=crd", "crd.negatives=95"], "are 11 of each other class, of which the"),
        (["run.method=crd", "crd.negatives=all"], "with a number of negatives"),
    ],
)
def test_hard_negatives_that_cannot_be(
    overrides: list[str], text: str, settings: Any, images: data.Images
) -> None:
    with pytest.raises(UserError, match=text):
        task_of(settings("distill.hard_negatives=true", *overrides), images)


def test_kd_loss() -> None:
    student, teacher = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5).double()
    p, q = (torch.softmax(x / 4, 1) for x in (teacher, student))
    expected = 16 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(methods.kd_loss(student, teacher, 4.0), expected.float())


def test_unknown_device() -> None:
    with pytest.raises(UserError, match=r"run.device: 'tpu' cannot be used"):
        methods.pick_device("tpu")
