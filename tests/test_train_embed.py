"""crrcd-train embed and match: a student for any pictures and any teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crrcd_train import checkpoint, config, embed
from crrcd_train.__main__ import main
from crrcd_train.errors import UserError

image = pytest.importorskip("PIL.Image")

TEACHER = """
import numpy as np

PLAN = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)


def embed(images):
    # Means of the quarters, mixed: something that a few pictures can teach.
    small = [np.asarray(i.convert("L").resize((2, 2), 4), dtype=np.float32) for i in images]
    return np.stack([s.ravel() for s in small]) @ PLAN


def other(images):
    return embed(images)[:, ::-1].copy()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(TEACHER)
    random = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "photos" / f"class{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        image.fromarray(pixels).save(path)
    return tmp_path


def arguments(place: Path, *more: str, teacher: str = "embed") -> list[str]:
    return [
        *("embed", str(place / "photos"), "--teacher", f"{place / 'net.py'}:{teacher}"),
        *("--output", str(place / "out"), "--set", "pixels.canvas=32", "pixels.shift=0"),
        *("pixels.flip=false", "optim.steps=150", "embed.progress=false", *more),
    ]


def test_a_student_comes_close_to_its_teacher(place, capsys):
    assert main(arguments(place, "embed.size=4", "pixels.grey=true")) == 0
    said = capsys.readouterr().out
    assert "student, 4 x 4" in said and "nearest is of its class" in said
    result = embed.runs.read_json(place / "out" / embed.RESULT)
    assert result["pictures"] == 40 and result["held_out"] == 8 and result["width"] == 6
    assert result["cosine"]["student"] > 0.3
    assert result["cosine"]["teacher"] > 0.95  # what it looks at is left by four pixels a side
    assert (place / "out" / "report.html").stat().st_size > 10_000
    again = arguments(place, "embed.size=4", "pixels.grey=true")
    assert main(again) == 2
    assert "holds a student; give --fresh" in capsys.readouterr().err


def test_classes_are_those_of_folders_one_deep(place):
    found = embed._pictures(place / "photos")
    assert found.persons == ["class0", "class1", "class2", "class3"]
    assert found.names[0] == "class0/0.png"
    image.new("L", (9, 9)).save(place / "photos" / "loose.png")
    found = embed._pictures(place / "photos")
    assert found.persons == [""] and len(found) == 41


def test_match_finds_small_pictures_of_any_size(place, capsys):
    assert main(arguments(place)) == 0
    matcher = embed.Matcher(place / "out")
    first = image.open(place / "photos" / "class1" / "1.png")
    exact = first.convert("RGB").resize((8, 8), image.Resampling.BOX)
    got = matcher.embed([first, exact])
    # The large picture is brought to the student's size by the same areas.
    assert torch.allclose(got[0], got[1], atol=0.05)
    assert torch.allclose(got.norm(dim=1), torch.ones(2), atol=1e-5)
    ((best, *others),) = matcher([exact], count=5)
    assert len(others) == 4 and best.cosine >= others[0].cosine and best.label.startswith("class")
    capsys.readouterr()
    exact.save(place / "small.png")
    assert main(["match", str(place / "out"), str(place / "small.png"), "--count", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_gallery_of_another_teacher_is_refused(place, capsys):
    assert main(arguments(place)) == 0
    other = [*arguments(place, teacher="other")]
    other[other.index(str(place / "out"))] = str(place / "other")
    assert main(other) == 0
    capsys.readouterr()
    small = str(place / "photos" / "class0" / "0.png")
    gallery = str(place / "other" / embed.GALLERY)
    assert main(["match", str(place / "out"), small, "--gallery", gallery]) == 2
    assert "was embedded by another teacher" in capsys.readouterr().err
    assert main(["match", str(place / "nowhere"), small]) == 2
    assert main(["match", str(place / "out"), small, "--count", "0"]) == 2


def test_an_interrupted_run_leaves_no_student_and_keeps_embeddings(place, monkeypatch, capsys):
    def stop(*args, **options):
        raise embed.students.Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(embed.students, "train", stop)
        assert main(arguments(place)) == 130
    out = place / "out"
    assert not (out / embed.STUDENT).exists() and not (out / embed.GALLERY).exists()
    assert len(list((out / "embeddings").glob("*.pt"))) == 2
    calls = []
    monkeypatch.setattr(embed.embedders, "_embed_chunk", lambda *args: calls.append(args) or 1 / 0)
    assert main(arguments(place)) == 0 and not calls
    assert checkpoint.load(out / embed.GALLERY)["vectors"].shape == (40, 6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("embed.held_out=1.5", "expected between 0 and 1"),
        ("embed.size=64", "larger than pixels.canvas"),
        ("embed.method=crrcd", "does not give embeddings in the gallery's space"),
        ("embed.method=nothing", "unknown method"),
        ("embed.size=0", "expected more than 0"),
    ],
)
def test_settings_that_make_no_sense(place, change, told, capsys):
    assert main(arguments(place, change)) == 2
    assert told in capsys.readouterr().err
    assert not (place / "out" / embed.STUDENT).exists()


def test_too_few_pictures(place, tmp_path):
    for path in sorted((place / "photos").rglob("*.png"))[2:]:
        path.unlink()
    read = config.load(
        None,
        [f"embed.pictures={place / 'photos'}", f"embed.teacher={place / 'net.py'}:embed"],
        embed.EmbedConfig,
    )
    with pytest.raises(UserError, match="too few"):
        embed.fit(read, tmp_path / "out")


def test_damaged_pictures_stop_or_are_skipped(place, capsys):
    cut = place / "photos" / "class1" / "1.png"
    cut.write_bytes(cut.read_bytes()[:40])
    assert main(arguments(place)) == 2
    assert "1.png is damaged or none" in capsys.readouterr().err
    assert main(arguments(place, "embed.damaged=skip")) == 0
    assert "1 of 40 pictures skipped as damaged: class1/1.png\n" in capsys.readouterr().out
    result = embed.runs.read_json(place / "out" / embed.RESULT)
    assert (result["pictures"], result["damaged"]) == (39, 1)
    assert "39 pictures (1 damaged ones left out)" in (place / "out" / "report.html").read_text()
