"""crrcd-train sweep: a study whose variants differ in one number."""

from pathlib import Path

import numpy as np
import pytest
from helpers import idx_files

from crrcd_train import config, runs, sweep
from crrcd_train.__main__ import main
from crrcd_train.errors import UserError

image = pytest.importorskip("PIL.Image")

TEACHER = """
import numpy as np

def embed(images):
    small = [np.asarray(i.convert("L").resize((4, 4)), dtype=np.float32) for i in images]
    return np.stack([s.ravel() for s in small]) - 100
"""


def test_every_point_is_a_variant_with_one_number_changed():
    read = config.load(
        None,
        ['sweep.methods=["crd","crrcd-difference"]', 'sweep.negatives=[8,"all"]'],
        sweep.FacesSweep,
    )
    study = read.expanded()
    # "all" is the setting as it is, and 0.1 too: one run for both.
    points = 2 * (2 + len(read.sweep.temperature) - 2)
    assert len(study.faces.variants) == points
    assert study.faces.methods[0] == "cosine"
    assert set(study.faces.methods[1:]) == {"crd", "crrcd-difference", *study.faces.variants}
    assert len(study.faces.methods) == 1 + 2 + points
    variant = study.faces.variants["crrcd-difference negatives=8"]
    assert (variant.method, variant.set) == ("crrcd-difference", {"difference.negatives": 8})
    other = config.load(None, ["crcd.temperature=0.05"], sweep.ClassificationSweep).expanded()
    assert other.study.methods[0] == "ce"
    assert other.study.variants["crcd temperature=0.02"].set == {"crcd.temperature": 0.02}
    assert "crcd temperature=0.05" not in other.study.variants
    assert other.study.variants["crcd temperature=0.1"].set == {"crcd.temperature": 0.1}


def test_a_point_that_a_size_changes_is_a_run_of_its_own():
    read = config.load(None, ['sweep.methods=["crd"]'], sweep.FacesSweep)
    assert read.label("crd", "temperature", 0.1) == "crd"
    read.size_overrides = {"8": {"crd.temperature": 0.2}}
    assert read.label("crd", "temperature", 0.1) == "crd temperature=0.1"
    assert read.label("crd", "negatives", "all") == "crd"
    other = config.load(None, [], sweep.ClassificationSweep)
    other.study.size_overrides = {"7": {"crd": {"negatives": 64}}}
    assert other.label("crd", "negatives", 512) == "crd negatives=512"


@pytest.mark.parametrize(
    "change",
    [
        'sweep.methods=["kd"]',
        'sweep.negatives=["some"]',
        "sweep.negatives=[0]",
        "sweep.temperature=[0.0]",
    ],
)
@pytest.mark.parametrize("kind", sweep.KINDS.values())
def test_points_that_make_no_sense(kind, change):
    with pytest.raises(UserError, match="sweep"):
        config.load(None, [change], kind)


def test_a_sweep_of_faces(tmp_path: Path, capsys):
    (tmp_path / "net.py").write_text(TEACHER)
    random = np.random.default_rng(0)
    for number in range(16):
        path = tmp_path / "people" / f"p{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(random.integers(0, 255, (20, 20), dtype=np.uint8)).save(path)
    arguments = [
        *("sweep", "faces", "--output", str(tmp_path / "out"), "--set"),
        *(f"faces.root={tmp_path / 'people'}", f"faces.teacher={tmp_path / 'net.py'}:embed"),
        *(f"faces.cache={tmp_path / 'cache'}", "faces.probes=2", "faces.splits=2"),
        *("faces.workers=1", "faces.progress=false", "optim.steps=12", "pixels.shift=0"),
        *('sweep.methods=["crd"]', 'sweep.negatives=[2,"all"]', "sweep.temperature=[0.1]"),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("| crd |") == 3 and "| cosine |" in said
    out = tmp_path / "out"
    assert {path.name for path in (out / "report").iterdir()} == {
        *("table.md", "sweep.png", "report.html")
    }
    made = out / "8x8" / "n2" / "split000" / "crd negatives=2.json"
    result = runs.read_json(made)
    assert result["settings"]["crd"]["negatives"] == 2 and result["step_ms"] > 0
    before = made.stat().st_mtime_ns
    assert main(arguments) == 0  # goes on, which here is nothing
    assert made.stat().st_mtime_ns == before
    assert "results are there already" in capsys.readouterr().out


def test_a_sweep_of_classification(tmp_path: Path, capsys):
    files = idx_files.write(tmp_path / "files", train=120, test=40)
    arguments = [
        *("sweep", "classification", "--output", str(tmp_path / "out"), "--set"),
        *(f"data.source={files}", f"data.root={tmp_path / 'data'}", "data.validation=20"),
        *("data.labels=60", "teacher.model=cnn3", "teacher.width=4", "teacher.optim.epochs=1"),
        *("student.width=4", "optim.epochs=1", "study.seeds=[0, 1]", "study.workers=1"),
        *('sweep.methods=["crcd"]', 'sweep.negatives=[16,"all"]', "sweep.temperature=[0.1]"),
        "crcd.negatives=32",
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("| crcd |") == 3 and "| ce |" in said
    out = tmp_path / "out"
    assert {path.name for path in (out / "report").iterdir()} == {
        *("table.md", "sweep.png", "report.html")
    }
    result = runs.read_result(out / "7x7" / "crcd negatives=16" / "seed1")
    assert result["config"]["crcd"]["negatives"] == 16
