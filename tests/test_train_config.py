"""Settings: every mistake is one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from crrcd_train import config
from crrcd_train.errors import UserError

FILES = sorted((Path(__file__).parents[1] / "python" / "studies").glob("*.toml"))
STUDIES = [path for path in FILES if path.stem != "faces"]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optim.lrr=1", "unknown config key optim.lrr; did you mean optim.lr?"),
        ("optm.lr=1", "unknown config key optm; did you mean optim?"),
        ("crrcd.negative=8", "unknown config key crrcd.negative; did you mean crrcd.negatives?"),
        ("teacher.optim.epoch=1", "did you mean teacher.optim.epochs?"),
        ("kd.zzz=1", "known here: weight, temperature, schedule"),
        ("optim.lr=fast", 'config key optim.lr: expected float, got "fast"'),
        ("optim.lr=0", "config key optim.lr: expected more than 0, got 0"),
        ("data.labels=-1", "config key data.labels: expected 0 or more, got -1"),
        ("data.labels=true", "config key data.labels: expected int, got true"),
        ("data.flip=1", "config key data.flip: expected bool, got 1"),
        ("optim.schedule=cosin", "got 'cosin'; did you mean 'cosine'?"),
        ("run.method=crrd", "config key run.method: expected one of ce, kd, crrcd"),
        ("study.methods=['ce', 'crrdc']", "config key study.methods: expected one of"),
        ("study.seeds=[]", "methods, seeds and sizes each need one entry"),
        ("study.seeds=[0.5]", "config key study.seeds: expected int, got 0.5"),
        ("crrcd.negatives=some", 'crrcd.negatives: expected a number or "all"'),
        ("optim=3", "config key optim: expected a table, got 3"),
        ("optim.lr.x=3", "config key optim.lr.x: optim.lr has no keys of its own"),
        ("optim.lr", "--set optim.lr: expected key=value"),
    ],
)
def test_mistakes_are_named(override: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load(None, [override])
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_are_read_and_overridden(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(
        "[optim]\nlr = 1\n[teacher.optim]\nepochs = 2\n"
        '[study]\nmethods = ["ce", "few"]\n[study.variants.few]\nset = { "crrcd.negatives" = 16 }\n'
    )
    read = config.load(file, ["kd.weight=2", "crrcd.negatives=all", "data.name=cifar10"])
    assert read.optim.lr == 1.0 and isinstance(read.optim.lr, float)
    assert read.teacher.optim.epochs == 2
    assert read.teacher.optim.lr == config.Config().teacher.optim.lr  # not Optim's own default
    assert read.kd.weight == 2.0
    assert read.crrcd.negatives == "all"
    assert read.data.name == "cifar10"
    assert read.study.variants["few"].set == {"crrcd.negatives": 16}
    assert config.from_dict(config.to_dict(read)) == read


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[optim", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        (b"[optim]\nlearning_rate = 1\n", "unknown config key optim.learning_rate"),
        (b"optim = 1\n", "config key optim: expected a table, got 1"),
        (b"[study.variants.a]\nmethod = 'kdd'\n", "study.variants.a.method: expected one of"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, text: str) -> None:
    file = tmp_path / "study.toml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=text.replace("[", r"\[")):
        config.load(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        config.load(tmp_path / "none.toml")


def test_copies_with_values_leave_the_original() -> None:
    original = config.Config()
    changed = config.with_values(original, {"optim.lr": 0.5, "run.method": "kd"})
    assert (changed.optim.lr, changed.run.method) == (0.5, "kd")
    assert original == config.Config()
    lines = config.differences(config.to_dict(original), config.to_dict(changed))
    assert lines == ["optim.lr: 0.1 -> 0.5", "run.method: 'crrcd' -> 'kd'"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path: Path, tmp_path: Path) -> None:
    from crrcd_train import data, models, study

    read = config.load(path)
    assert read.data.name in data.NAMES
    for network in (read.teacher, read.student):
        models.build(network.model, 1, 2, network.width, network.stem_stride)
    jobs = study.jobs(read, tmp_path)
    assert {job.size for job in jobs} == set(read.study.sizes)
    assert {job.label for job in jobs} == set(read.study.methods)
    assert {job.seed for job in jobs} == set(read.study.seeds)
    assert len({job.output for job in jobs}) == len(jobs)
    assert read.study.baseline in read.study.methods
    assert read.study.highlight in read.study.methods


def test_the_shipped_study_of_faces_is_valid() -> None:
    from crrcd_train import faces

    (path,) = set(FILES) - set(STUDIES)
    read = config.load(path, (), faces.FacesConfig)
    assert set(read.faces.rivals) < set(read.faces.methods)
    method, own = faces.resolve(read, "crd, as published")
    assert (method, own.crd.temperature, read.crd.temperature) == ("crd", 0.07, 0.1)
    assert (own.crd.exclude_similar, read.crd.exclude_similar) == (0.0, 0.5)


def test_settings_of_one_method_and_size(tmp_path: Path) -> None:
    from crrcd_train import study

    read = config.load(
        None,
        [
            "study.methods=['ce', 'few']",
            "study.seeds=[3]",
            "study.variants={few = {method = 'crrcd', sizes = [7], set = {crrcd.negatives = 9}}}",
            "study.size_overrides={14 = {student.width = 5}}",
        ],
    )
    jobs = {(job.label, job.size): job.config for job in study.jobs(read, tmp_path)}
    assert set(jobs) == {("ce", 7), ("ce", 14), ("few", 7)}
    assert jobs["few", 7].run.method == "crrcd" and jobs["few", 7].crrcd.negatives == 9
    assert jobs["ce", 7].student.width == read.student.width
    assert jobs["ce", 14].student.width == 5 and jobs["ce", 14].data.student_size == 14
    assert all(job.run.seed == 3 for job in jobs.values())
