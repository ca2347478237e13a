"""The study of faces as a user meets it: results, report, going on, mistakes."""

from __future__ import annotations

import base64
import html.parser
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from crrcd_train import checkpoint, config, embedders, faces, faces_report, people, students
from crrcd_train.__main__ import main
from crrcd_train.loop import Watcher
from crrcd_train.report import Made

ROOT = Path(__file__).parents[1]
METHODS = ["teacher", "ridge", "cosine", "crd", "crrcd-difference", "crrcd", "few", "ce"]
STUDY = """
size_overrides = { 6 = { "student.width" = 5 } }
[pixels]
canvas = 24
shift = 2
[student]
width = 4
[optim]
steps = 4
[crrcd]
hidden_dim = 8
relation_dim = 8
[faces]
methods = ["teacher", "ridge", "cosine", "crd", "crrcd-difference", "crrcd", "few", "ce"]
per_person = [1, 2]
sizes = [6]
probes = 2
splits = 2
workers = 1
progress = false
[faces.variants.few]
method = "cosine"
set = { "optim.steps" = 2 }
"""
TEACHER = """
from pathlib import Path
import numpy as np


def embed(images):
    with Path(__file__).with_suffix(".log").open("a") as log:
        log.write(f"{len(images)}\\n")
    small = [im.convert("RGB").resize((3, 3)) for im in images]
    return np.stack([np.asarray(im, dtype=float).ravel() / 255 for im in small])
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 3 persons x 4 pictures, a teacher and the settings of a study."""
    folder = tmp_path_factory.mktemp("faces")
    generator = np.random.default_rng(0)
    for person in ("Ann", "Bob", "Cyd"):
        (folder / "people" / person).mkdir(parents=True)
        coarse = np.kron(generator.integers(0, 256, (4, 4, 3)), np.ones((6, 6, 1)))
        for i in range(1, 5):
            pixels = np.clip(coarse + generator.normal(0, 30, (24, 24, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "people" / person / f"{i}.png")
    (folder / "own.py").write_text(TEACHER)
    (folder / "study.toml").write_text(STUDY)
    return folder


def arguments(place: Path, output: Path, *values: str, cache: Path | None = None) -> list[str]:
    given = [
        f"faces.root={place / 'people'}",
        f"faces.teacher={place / 'own.py'}:embed",
        f"faces.cache={cache or place / 'cache'}",
    ]
    return ["faces", str(place / "study.toml"), "--set", *given, *values, "--output", str(output)]


@pytest.fixture(scope="module")
def study(place: Path) -> Path:
    """The whole study, made once."""
    torch.set_num_threads(1)
    assert main(arguments(place, place / "study")) == 0
    return place / "study"


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what comes before it: it takes longer than all else."""
    monkeypatch.setattr(faces_report, "make", lambda *a, **b: Made("", Path("none"), []))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits one after the other: a worker takes seconds to start."""

    def run(jobs: list, work: Callable, *, done: Callable, **options: object) -> None:
        for job in jobs:
            done(job, work(job, Watcher(), print))

    monkeypatch.setattr(faces.pool, "run", run)


def results(output: Path) -> dict[str, dict]:
    return {
        str(path.relative_to(output)): json.loads(path.read_text())
        for path in sorted(output.glob("*x*/n*/split*/*.json"))
    }


def times(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.glob("*x*/n*/split*/*.json")}


def one_line(capsys: pytest.CaptureFixture, *texts: str) -> None:
    errors = capsys.readouterr().err
    assert errors.startswith("crrcd-train: error: ") and errors.count("\n") == 1, errors
    for text in texts:
        assert text in errors


# ------------------------------------------------------------------ results


def test_every_result_is_there(study: Path, place: Path) -> None:
    found = results(study)
    assert sorted(found) == sorted(
        f"6x6/n{n}/split00{split}/{method}.json"
        for n in (1, 2)
        for split in (0, 1)
        for method in METHODS
    )
    for name, result in found.items():
        assert (result["size"], result["enrolled"]) == (6, int(name[5]))
        assert result["split"] == int(name[14]) and f"/{result['method']}.json" in name
        assert len(result["roc"]) == 71 and 0 <= result["rank1"] <= 100
        # Pictures are only drawn of the first split.
        assert (study / name).with_suffix(".pt").exists() == (result["split"] == 0)
    record = json.loads((study / faces.SUMMARY).read_text())
    assert (record["pictures"], record["persons"], record["undetected"]) == (12, 3, [])
    assert record["seconds"] > 0 and record["command"].startswith("crrcd-train faces ")
    # Once for the large pictures, once for those of 6 x 6.
    assert (place / "own.log").read_text() == "12\n12\n"


def _split(place: Path, number: int) -> tuple[people.People, Tensor, Tensor]:
    found = people.folder(place / "people")
    return found, *people.split(found, 2, 2, number)


def _pixels(image: Image.Image) -> Tensor:
    small = np.asarray(image.convert("RGB").resize((3, 3)), dtype=np.float32)
    return torch.from_numpy(small).flatten() / 255


def test_the_teacher_sees_small_probes_and_large_entries(study: Path, place: Path) -> None:
    found, gallery, probes = _split(place, 0)
    large = torch.stack([_pixels(Image.open(found.files[row])) for row in gallery])
    small = []
    for row in probes.tolist():
        image = Image.open(found.files[row]).resize((6, 6), Image.Resampling.BOX)
        small.append(_pixels(image.resize((24, 24), Image.Resampling.BICUBIC)))
    center = large.mean(0)
    expected = F.normalize(torch.stack(small) - center) @ F.normalize(large - center).T
    kept = checkpoint.load(study / "6x6" / "n2" / "split000" / "teacher.pt")
    assert torch.equal(kept["gallery"], gallery) and torch.equal(kept["probes"], probes)
    torch.testing.assert_close(kept["scores"], expected)
    right = (found.labels[gallery][expected.argmax(1)] == found.labels[probes]).double().mean()
    result = results(study)["6x6/n2/split000/teacher.json"]
    assert result["rank1"] == pytest.approx(100 * float(right))


@pytest.mark.parametrize("method", ["cosine", "few", "crrcd"])
def test_students_are_those_of_students_train(method: str, study: Path, place: Path) -> None:
    found, gallery, probes = _split(place, 0)
    own = config.load(None, ["student.width=5", "optim.steps=4"], faces.FacesConfig)
    own.optim.steps = 2 if method == "few" else 4
    own.crrcd.hidden_dim = own.crrcd.relation_dim = 8
    own.pixels.canvas, own.pixels.shift = 24, 2
    assert own.pixels.grey
    canvases = torch.stack(
        [students.on_canvas(Image.open(path), own.pixels) for path in found.files]
    )
    vectors = torch.stack([_pixels(Image.open(found.files[row])) for row in gallery])
    views = students.Views(canvases[gallery], 6, own.pixels)
    kind = "cosine" if method == "few" else method
    trained = students.train(views, vectors, None, own, kind, seed=0)
    images = students.Views(canvases[probes], 6, own.pixels).plain(torch.arange(6))
    entries = students.space(vectors, vectors.mean(0))
    kept = checkpoint.load(study / "6x6" / "n2" / "split000" / f"{method}.pt")
    torch.testing.assert_close(
        kept["scores"], students.score(trained, kind, images, entries).detach()
    )
    torch.testing.assert_close(kept["embedded"], trained.student.embed(images))
    # The student is kept whole.
    assert torch.equal(students.restore(kept["student"]).embed(images), kept["embedded"])


def test_variants_have_settings_of_their_own(study: Path) -> None:
    found = results(study)
    for method, steps in (("cosine", 4), ("few", 2)):
        result = found[f"6x6/n1/split001/{method}.json"]
        assert result["settings"]["optim"]["steps"] == steps
        assert result["history"][-1]["step"] == steps
        assert result["settings"]["student"]["width"] == 5  # of size_overrides
        assert "cosine" in result["settings"] and "crd" not in result["settings"]
    assert "optim" not in found["6x6/n1/split001/ridge.json"]["settings"]


# ------------------------------------------------------------------ the report


class _Page(html.parser.HTMLParser):
    """Embedded pictures, cells of tables, and what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[bytes] = []
        self.outside: list[str | None] = []
        self.rows: list[list[str]] = []
        self.cell = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        self.cell = tag in ("td", "th")
        if self.cell:
            self.rows[-1].append("")
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data"):
                kind = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", value or "")
                if kind:
                    self.images.append(base64.b64decode(kind[2]))
                else:
                    self.outside.append(value)

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data


def test_report(study: Path) -> None:
    report = study / "report"
    drawn = sorted(report.glob("*.png"))
    assert {path.stem for path in drawn} == {
        *("rank1-6", "tar-6", "roc", "diagnostics", "tsne", "cosines")
    }
    persons = sorted((report / "people").iterdir())
    assert [path.name for path in persons] == ["Ann.jpg", "Bob.jpg", "Cyd.jpg"]
    text = (report / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert sorted(page.images) == sorted(path.read_bytes() for path in [*drawn, *persons])
    assert page.outside == [] and "url(" not in text and "@import" not in text
    assert "<script" not in text and "<link" not in text

    table = (report / "table.md").read_text().strip().split("\n\n")
    lines = [line for part in table for line in part.splitlines() if not line.startswith("|---")]
    assert page.rows == [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    shown = [faces_report.NAMES.get(method, method) for method in METHODS]
    assert [row[1] for row in page.rows[1 : 1 + len(METHODS)]] == shown
    found = results(study)
    ranks, tars = (
        [found[f"6x6/n2/split00{s}/ridge.json"][key] for s in (0, 1)] for key in ("rank1", "tar")
    )
    cells = [f"{statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}" for v in (ranks, tars)]
    assert page.rows[2][2] == " / ".join(cells)
    differences = {row[1]: row[2:] for row in page.rows[2 + len(METHODS) :]}
    assert next(iter(differences)) == "cosine regression - CRD" and len(differences) == 9
    one, other = (
        [found[f"6x6/n1/split00{s}/{method}.json"]["rank1"] for s in (0, 1)]
        for method in ("crrcd", "crd")
    )
    mean = statistics.mean(a - b for a, b in zip(one, other, strict=True))
    assert differences["CRRCD, FRM - CRD"][1].startswith(f"{mean:+.2f} (")
    assert "not comparable" in differences["cross-entropy with labels - CRD"][0]
    for part in ("No face was detected on 0 pictures", "faces.probes = 2", "torch: "):
        assert part in text


# ------------------------------------------------------------------ going on


def test_again_and_with_other_settings(
    study: Path, place: Path, capsys: pytest.CaptureFixture
) -> None:
    before, log = times(study), (place / "own.log").read_text()
    (study / "report" / "report.html").unlink()
    assert main(arguments(place, study)) == 0
    assert "32 of 32 results are there already" in capsys.readouterr().out
    assert times(study) == before and (place / "own.log").read_text() == log
    assert (study / "report" / "report.html").exists()

    for value, text in (
        ("optim.lr=0.1", "cosine.json was made with other settings (optim.lr: 0.05 -> 0.1)"),
        ("crd.temperature=0.2", "crd.json was made with other settings (crd.temperature: 0.1 ->"),
        ("faces.variants.few.set={'optim.steps'=3}", "few.json was made with other settings (opt"),
    ):
        assert main(arguments(place, study, value)) == 2
        one_line(capsys, text, "choose another --output or give --fresh")
    (place / "other.py").write_text(TEACHER + "# Another one.\n")
    assert main(arguments(place, study, f"faces.teacher={place}/other.py:embed")) == 2
    one_line(capsys, "teacher.json was made with other settings (teacher.identity: ")
    assert times(study) == before


def test_fresh_makes_all_results_anew(
    place: Path,
    tmp_path: Path,
    no_report: None,
    in_process: None,
    capsys: pytest.CaptureFixture,
) -> None:
    given = arguments(place, tmp_path / "out", 'faces.methods=["ridge","few"]')
    assert main(given) == 0
    before, log = times(tmp_path / "out"), (place / "own.log").read_text()
    assert main(given) == 0
    assert times(tmp_path / "out") == before and len(before) == 8
    assert "8 of 8 results are there already" in capsys.readouterr().out
    assert main([*given, "--fresh", "--set", "optim.lr=0.1"]) == 0
    assert "are there already" not in capsys.readouterr().out
    after = times(tmp_path / "out")
    assert after.keys() == before.keys() and all(after[path] > before[path] for path in after)
    assert results(tmp_path / "out")["6x6/n1/split000/few.json"]["settings"]["optim"]["lr"] == 0.1
    assert (place / "own.log").read_text() == log  # embeddings are still those


def test_an_interrupted_study_keeps_what_was_finished(
    place: Path, tmp_path: Path, no_report: None, in_process: None, capsys: pytest.CaptureFixture
) -> None:
    values = ["faces.methods=['ridge','cosine']", "faces.per_person=[2]", "faces.splits=1"]
    long = arguments(place, tmp_path / "out", *values, "optim.steps=1000000")
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-m", "crrcd_train", *long],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    split = tmp_path / "out" / "6x6" / "n2" / "split000"
    try:
        limit = time.monotonic() + 120
        while not (split / "ridge.json").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < limit, "nothing was finished"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # workers too, as at a terminal
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "Traceback" not in errors
    assert re.search(r"cosine: stopped at step \d+ of 1000000; run the same command again", errors)
    assert [path.name for path in sorted(split.glob("*.json"))] == ["ridge.json"]

    before = (split / "ridge.json").stat().st_mtime_ns
    assert main(arguments(place, tmp_path / "out", *values)) == 0
    assert "1 of 2 results are there already" in capsys.readouterr().out
    assert (split / "ridge.json").stat().st_mtime_ns == before
    assert json.loads((split / "cosine.json").read_text())["history"][-1]["step"] == 4


# ------------------------------------------------------------------ pictures without a face


class Undetecting:
    """A teacher that finds no face on Bob's second picture and on Cyd's first one."""

    identity = "undetecting 1"

    def __call__(self, images: list, pixels: list | None = None) -> tuple[np.ndarray, np.ndarray]:
        detected = np.ones(len(images), dtype=bool)
        detected[[5, 8]] = False
        return np.stack([_pixels(image).numpy() for image in pixels or images]), detected


@pytest.fixture
def undetecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedders, "build", lambda name: Undetecting())


FEW = ["faces.methods=['teacher','ridge']", "faces.splits=1", "faces.per_person=[2]"]


def test_undetected_pictures_are_used_centred(
    undetecting: None,
    place: Path,
    tmp_path: Path,
    no_report: None,
    in_process: None,
    capsys: pytest.CaptureFixture,
) -> None:
    assert main(arguments(place, tmp_path / "out", *FEW, cache=tmp_path / "cache")) == 0
    printed = capsys.readouterr().out
    assert "no face was detected on 2, used centred: Bob/2.png, Cyd/1.png\n" in printed
    record = json.loads((tmp_path / "out" / faces.SUMMARY).read_text())
    assert record["undetected"] == ["Bob/2.png", "Cyd/1.png"]
    kept = checkpoint.load(tmp_path / "out" / "6x6" / "n2" / "split000" / "ridge.pt")
    assert sorted([*kept["gallery"].tolist(), *kept["probes"].tolist()]) == list(range(12))


def test_undetected_pictures_are_skipped(
    undetecting: None, place: Path, tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture
) -> None:
    given = [*FEW, "faces.undetected=skip"]
    few = arguments(place, tmp_path / "out", *given, cache=tmp_path / "cache")
    assert main(few) == 2
    one_line(capsys, "2 enrolled pictures and 2 probes", "of Bob (3), Cyd (3)")
    few = arguments(place, tmp_path / "out", *given, "faces.probes=1", cache=tmp_path / "cache")
    assert main(few) == 0
    printed = capsys.readouterr().out
    assert "no face was detected on 2, skipped: Bob/2.png, Cyd/1.png\n" in printed
    own = faces.material(
        config.load(None, ["pixels.canvas=24"], faces.FacesConfig), tmp_path / "out"
    )
    assert len(own.people) == 10 and own.people.persons == ["Ann", "Bob", "Cyd"]
    assert not {"Bob/2.png", "Cyd/1.png"} & set(own.people.names)
    for row, path in enumerate(own.people.files):
        torch.testing.assert_close(own.vectors[row], _pixels(Image.open(path)))
    assert own.canvases.shape == (10, 1, 24, 24) and own.small["6"].shape == (10, 27)
    text = (tmp_path / "out" / "report" / "report.html").read_text()
    assert "No face was detected on 2 pictures, which were left out: Bob/2.png, Cyd/1.png" in text
    # Baseline and highlight were not among the methods: their pictures are left out.
    drawn = {path.name for path in (tmp_path / "out" / "report").glob("*.png")}
    assert drawn == {"rank1-6.png", "tar-6.png", "roc.png"}
    (tmp_path / "out" / "report" / "report.html").unlink()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report" / "report.html").read_text() == text
    capsys.readouterr()
    assert main([*few[:-2], "--set", "faces.undetected=centred", *few[-2:]]) == 2
    one_line(capsys, "teacher.json was made with other settings (faces.undetected: 'skip' -> ")


def test_damaged_pictures_stop_or_are_skipped(
    place: Path, tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(place / "people", tmp_path / "people")
    cut = tmp_path / "people" / "Bob" / "2.png"
    cut.write_bytes(cut.read_bytes()[:40])
    given = [*FEW, f"faces.root={tmp_path / 'people'}", "faces.probes=1"]
    assert main(arguments(place, tmp_path / "out", *given, cache=tmp_path / "cache")) == 2
    one_line(capsys, "2.png is damaged or none")
    given.append("faces.damaged=skip")
    assert main(arguments(place, tmp_path / "out", *given, cache=tmp_path / "cache")) == 0
    printed = capsys.readouterr().out
    assert "1 of 12 pictures skipped as damaged: Bob/2.png\n" in printed
    record = json.loads((tmp_path / "out" / faces.SUMMARY).read_text())
    assert (record["pictures"], record["damaged"]) == (11, 1)
    own = faces.material(
        config.load(None, ["pixels.canvas=24"], faces.FacesConfig), tmp_path / "out"
    )
    assert len(own.people) == 11 and "Bob/2.png" not in own.people.names
    for row, path in enumerate(own.people.files):
        torch.testing.assert_close(own.vectors[row], _pixels(Image.open(path)))
    text = (tmp_path / "out" / "report" / "report.html").read_text()
    assert "11 pictures of 3 persons (1 damaged ones left out)" in text


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("faces.probes=3", "2 enrolled pictures and 3 probes a person are asked for, fewer are th"),
        ("faces.root={place}/nowhere", "no folder "),
        ("faces.root={place}/single", "two persons or more are needed, found Ann"),
        ("faces.teacher={place}/own.py:none", "own.py has no none"),
        ("faces.methods=['cosin']", "config key faces.methods: unknown method 'cosin'"),
        ("faces.methods=['crd+crcd']", "config key faces.methods: method 'crd+crcd': at most one"),
        ("faces.methods=['../few']", "'../few' cannot name a file"),
        ("faces.methods=[]", "config key faces.methods: needs one entry or more"),
        ("faces.sizes=[6,32]", "config key faces.sizes: 32 is larger than pixels.canvas, 24"),
        ("faces.per_person=[0]", "config key faces.per_person: expected 1 or more"),
        ("faces.splits=0", "config key faces.splits: expected more than 0, got 0"),
        ("faces.undetected=drop", "expected one of centred, skip, got 'drop'"),
        ("pixels.shift=24", "pixels.shift: 24 is not smaller than pixels.canvas, 24"),
        ("faces.variant=1", "unknown config key faces.variant; did you mean faces.variants?"),
    ],
)
def test_mistakes_are_one_line_before_the_work(
    value: str, text: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    single = place / "single" / "Ann"
    single.mkdir(parents=True, exist_ok=True)
    for i in range(4):
        (single / f"{i}.png").touch()
    cache = tmp_path / "cache"
    given = arguments(place, tmp_path / "out", value.format(place=place), cache=cache)
    assert main(given) == 2
    one_line(capsys, text)
    assert not list(cache.glob("embeddings*"))


def test_help_lists_faces(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n    faces +small faces against a gallery of large ones", printed)
    assert "crrcd-train faces --output runs/faces" in printed
    with pytest.raises(SystemExit) as stop:
        main(["faces", "--help"])
    assert stop.value.code == 0 and "--fresh" in capsys.readouterr().out
