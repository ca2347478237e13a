"""crrcd-train study unseen: held-out classes, their teachers, students and neighbours."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crrcd_train import config, data, runs, unseen
from crrcd_train.__main__ import main
from crrcd_train.errors import UserError

image = pytest.importorskip("PIL.Image")
METHODS = '["ce","kd","cosine","crrcd","kd+crrcd-difference"]'


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    random = np.random.default_rng(0)
    for number in range(150):
        path = tmp_path / "images" / f"class{number % 5}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 60, (12, 12, 3)) + 40 * (number % 5)
        image.fromarray(pixels.astype(np.uint8)).save(path)
    return [
        *("study", "unseen", "--output", str(tmp_path / "out"), "--set", "data.name=folder"),
        *(f"data.root={tmp_path / 'images'}", "data.image_size=12", "data.validation=10"),
        *("teacher.width=4", "teacher.optim.epochs=1", "teacher.stem_stride=1", "student.width=4"),
        *("pixels.canvas=12", "unseen.classes=2", "unseen.splits=2", "unseen.seeds=[0]"),
        *("unseen.size=6", "unseen.labelled=12", "unseen.unlabelled=20", "unseen.probes=5"),
        *("unseen.workers=1", "unseen.progress=false", "optim.steps=4", "optim.lr=0.001"),
        f"unseen.methods={METHODS}",
    ]


def test_end_to_end_and_going_on(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    assert "split 1, without class" in said and "| kd+crrcd-difference - cosine |" in said
    result = runs.read_json(out / "split0" / "seed0" / "kd+crrcd-difference.json")
    assert all(0 <= result[key] <= 100 for key in unseen.MEASURES)
    assert len(result["held_out"]) == 2 and result["settings"]["kd"]["weight"] == 3.0
    # Cross-entropy alone is not in the teacher's space.
    assert "high_recall" not in runs.read_json(out / "split0" / "seed0" / "ce.json")
    before = {path: path.stat().st_mtime_ns for path in out.glob("split*/seed*/*.json")}
    assert len(before) == 10
    (out / "split1" / "seed0" / "crrcd.json").unlink()
    assert main(arguments) == 0
    after = {path: path.stat().st_mtime_ns for path in out.glob("split*/seed*/*.json")}
    changed = {path.name for path in before if after[path] != before[path]}
    assert changed == {"crrcd.json"}
    assert main(["report", str(out)]) == 0
    assert "classes never seen" in (out / "report" / "report.html").read_text()
    capsys.readouterr()
    assert main([*arguments, "kd.weight=2.0"]) == 2
    assert "kd.weight: 3.0 -> 2.0" in capsys.readouterr().err


def test_no_student_or_teacher_sees_a_held_out_class():
    labels = torch.arange(40) % 8
    images = data.Images(
        labels.view(-1, 1, 1, 1).byte(),
        labels,
        labels.view(-1, 1, 1, 1).byte(),
        labels,
        list("abcdefgh"),
    )
    read = config.load(None, ["unseen.classes=3"], unseen.UnseenConfig)
    seen = set()
    for split in range(20):
        known, out = unseen._known(read, images, split)
        assert len(out) == 3 and not set(out) & set(known.train.flatten().tolist())
        assert len(known.train) == 25 and known.train_labels.unique().tolist() == [0, 1, 2, 3, 4]
        names = [known.classes[label] for label in known.test_labels]
        assert names == [images.classes[value] for value in known.test.flatten().tolist()]
        seen.update(out)
    assert seen == set(range(8))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("unseen.classes=4", "leaves fewer than two"),
        ("unseen.size=20", "larger than the images' 12 pixels"),
        ("unseen.unlabelled=500", "are asked for"),
        ("unseen.probes=500", "leaves no gallery"),
        ('unseen.methods=["none"]', "unknown method"),
        ("unseen.labelled=0", "expected more than 0"),
    ],
)
def test_settings_that_make_no_sense(arguments, change, told, capsys):
    assert main([*arguments, change]) == 2
    assert told in capsys.readouterr().err


def test_no_study_to_report(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        unseen.report(tmp_path)
