"""Where images come from, how they are split, augmented and reduced."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import idx_files
from PIL import Image
from torchvision.datasets import cifar, stl10, svhn

from crrcd_train import data, fetch, models, views
from crrcd_train.config import Data
from crrcd_train.errors import UserError


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return idx_files.write(tmp_path / "files")


@pytest.fixture
def published(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the small files for the published ones."""
    sums = {}
    for name in fetch.FASHION_MNIST:
        content = gzip.decompress((files / f"{name}.gz").read_bytes())
        sums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fetch, "FASHION_MNIST", sums)


@pytest.fixture
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object) -> None:
        raise fetch._Unavailable("no network")

    monkeypatch.setattr(fetch, "_torchvision", unreachable)


def settings(tmp_path: Path, **values: object) -> Data:
    values = {"root": str(tmp_path / "data"), "system_folder": str(tmp_path / "absent"), **values}
    return Data(**values)


def test_local_folder(tmp_path: Path, files: Path) -> None:
    images = data.load(settings(tmp_path, source=str(files)))
    assert images.train.shape == (400, 1, 28, 28) and images.train.dtype == torch.uint8
    assert images.test.shape == (100, 1, 28, 28)
    assert images.train_labels.tolist() == [i % 10 for i in range(400)]
    assert images.classes[9] == "Ankle boot"


@pytest.mark.usefixtures("published", "no_torchvision")
def test_installed_package_is_used_without_a_network(tmp_path: Path, files: Path) -> None:
    said: list[str] = []
    options = settings(tmp_path, system_folder=str(files))
    images = data.load(options, said.append)
    assert len(images.train) == 400
    assert [line.split(" trying ")[1] for line in said[:2]] == ["torchvision", str(files)]
    shutil.rmtree(files)  # the second call needs no source any more
    assert len(data.load(options).train) == 400


@pytest.mark.usefixtures("published", "no_torchvision")
def test_package_is_fetched_with_apt(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    # The first download fails as on a machine without package lists, until "update" was run.
    (tools / "apt-get").write_text(
        f"""#!/bin/sh
case "$*" in
  *update) touch {tmp_path}/updated ;;
  *download*) [ -e {tmp_path}/updated ] || {{ echo "E: Unable to locate package"; exit 100; }}
     touch dataset-fashion-mnist_1_all.deb ;;
esac
"""
    )
    (tools / "dpkg-deb").write_text(
        f'#!/bin/sh\nmkdir -p "$3/usr/share/datasets"\n'
        f'cp -r {files} "$3/usr/share/datasets/fashion-mnist"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert len(data.load(settings(tmp_path)).train) == 400
    assert (tmp_path / "updated").exists()
    left = [path.name for path in (tmp_path / "data").iterdir()]
    assert left == ["FashionMNIST"]


@pytest.mark.usefixtures("no_torchvision")
def test_no_source_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: None)
    with pytest.raises(UserError) as caught:
        data.load(settings(tmp_path), lambda text: None)
    text = str(caught.value)
    for part in ("torchvision: no network", "no such folder", "no apt-get here", "data.source="):
        assert part in text
    assert "\n" not in text


def test_a_hanging_download_is_given_up() -> None:
    with pytest.raises(fetch._Unavailable, match="no end after 1 s"):
        fetch._call(["sleep", "30"], 1)


@pytest.mark.usefixtures("published", "no_torchvision")
def test_damaged_files_are_refused(tmp_path: Path, files: Path) -> None:
    options = settings(tmp_path, system_folder=str(files))
    data.load(options, lambda text: None)
    path = tmp_path / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte is damaged .*delete it"):
        data.load(options)


@pytest.mark.usefixtures("published", "no_torchvision")
def test_damaged_archive_is_not_installed(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: None)
    path = files / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.gz is damaged"):
        data.load(settings(tmp_path, system_folder=str(files)), lambda text: None)
    idx_files.write(files, train=410)  # whole, but not what was published
    with pytest.raises(UserError, match="does not have the published contents"):
        data.load(settings(tmp_path, system_folder=str(files)), lambda text: None)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("missing", "t10k-labels-idx1-ubyte.gz is missing"),
        ("packed", "is damaged"),
        ("content", "is damaged"),
    ],
)
def test_local_folder_with_damage(tmp_path: Path, files: Path, damage: str, text: str) -> None:
    path = files / "t10k-labels-idx1-ubyte.gz"
    if damage == "missing":
        path.unlink()
    elif damage == "packed":
        path.write_bytes(b"no archive")
    else:
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-3]))
    with pytest.raises(UserError, match=text) as caught:
        data.load(settings(tmp_path, source=str(files)))
    assert "\n" not in str(caught.value)


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        data.load(settings(tmp_path, source=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"data.root: no folder"):
        data.load(Data(name="folder", root=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="expected one of fashion-mnist"):
        data.load(Data(name="mnist"))


def test_other_data_sets_say_when_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], seconds: int, folder: Path | None = None) -> None:
        assert command[3:] == ["CIFAR10", str(tmp_path / "c")]
        raise fetch._Unavailable("no network")

    monkeypatch.setattr(fetch, "_call", fail)
    with pytest.raises(UserError, match=r"CIFAR10 could not be downloaded to .*: no network"):
        data.load(Data(name="cifar10", root=str(tmp_path / "c")), lambda text: None)


@pytest.fixture
def any_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision asks whether a file is there, not whether it is the published one."""
    for module in (cifar, stl10, svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


def _cifar(root: Path, name: str) -> tuple[np.ndarray, list[int]]:
    """Pickles of CIFAR-10 or CIFAR-100: pixels of all parts [N, 3, 32, 32], test last; labels."""
    random = np.random.default_rng(0)
    if name == "cifar10":
        folder, parts = root / "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)]
        test, meta, labels_key, names_key = "test_batch", "batches.meta", "labels", "label_names"
    else:
        folder, parts = root / "cifar-100-python", ["train"]
        test, meta, labels_key, names_key = "test", "meta", "fine_labels", "fine_label_names"
    folder.mkdir(parents=True)
    classes = int(name.removeprefix("cifar"))
    pixels, labels = [], []
    for part in (*parts, test):
        pixels.append(random.integers(0, 256, (4, 3072), dtype=np.uint8))
        labels += random.integers(0, classes, 4).tolist()
        content = {"data": pixels[-1], labels_key: labels[-4:], "coarse_labels": [0] * 4}
        (folder / part).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class {i}" for i in range(classes)]
    (folder / meta).write_bytes(pickle.dumps({names_key: names}, protocol=2))
    return np.concatenate(pixels).reshape(-1, 3, 32, 32), labels


@pytest.mark.usefixtures("any_sums")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path: Path, name: str) -> None:
    pixels, labels = _cifar(tmp_path, name)
    images = data.load(Data(name=name, root=str(tmp_path)))
    assert torch.equal(torch.cat([images.train, images.test]), torch.from_numpy(pixels))
    assert images.train_labels.tolist() + images.test_labels.tolist() == labels
    assert len(images.test) == 4 and images.train_labels.dtype == torch.int64
    assert images.classes == [f"class {i}" for i in range(int(name.removeprefix("cifar")))]
    small = data.load(Data(name=name, root=str(tmp_path), image_size=16))
    assert small.train.shape == (len(pixels) - 4, 3, 16, 16) and small.train.dtype == torch.uint8


@pytest.mark.usefixtures("any_sums")
def test_svhn(tmp_path: Path) -> None:
    from scipy.io import savemat

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    digits = np.array([1, 9, 10, 2, 10, 3], dtype=np.uint8)  # 10 is the digit 0
    for part, rows in (("train", slice(4)), ("test", slice(4, 6))):
        content = {"X": pixels[rows].transpose(2, 3, 1, 0), "y": digits[rows, None]}
        savemat(tmp_path / f"{part}_32x32.mat", content)
    images = data.load(Data(name="svhn", root=str(tmp_path)))
    assert torch.equal(torch.cat([images.train, images.test]), torch.from_numpy(pixels))
    assert images.train_labels.tolist() == [1, 9, 0, 2] and images.test_labels.tolist() == [0, 3]
    assert images.classes == [str(i) for i in range(10)]


@pytest.mark.usefixtures("any_sums")
def test_stl10(tmp_path: Path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 96, 96), dtype=np.uint8)
    columns_first = pixels.transpose(0, 1, 3, 2)
    for part, rows in (("train", slice(3)), ("test", slice(3, 5)), ("unlabeled", slice(5, 7))):
        (folder / f"{part}_X.bin").write_bytes(columns_first[rows].tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 10, 4]))
    (folder / "test_y.bin").write_bytes(bytes([2, 1]))
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    images = data.load(Data(name="stl10", root=str(tmp_path)))
    assert torch.equal(torch.cat([images.train, images.test]), torch.from_numpy(pixels[:5]))
    assert images.train_labels.tolist() == [0, 9, 3] and images.test_labels.tolist() == [1, 0]
    assert images.train_labels.dtype == torch.int64
    assert images.classes == names


def test_files_that_stay_other_than_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cifar(tmp_path, "cifar10")
    monkeypatch.setattr(fetch, "_call", lambda command, seconds, folder=None: None)
    with pytest.raises(UserError, match=r"data set CIFAR10 in .*corrupted.*; delete it"):
        data.load(Data(name="cifar10", root=str(tmp_path)), lambda text: None)


WNIDS = ["n02", "n01", "n03"]


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    """The archive's layout with three classes of two images, one of them grey, and three to test.

    Every image has one colour: 40 more for each class, 10 more for each image of it.
    """
    root = tmp_path / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
        for i in range(2):
            level = 40 * label + 10 * i
            image = Image.new("L" if i else "RGB", (64, 64), level if i else (level,) * 3)
            image.save(folder / f"{wnid}_{i}.JPEG")
    (root / "val" / "images").mkdir(parents=True)
    annotations = ""
    for i, label in enumerate([1, 2, 0]):
        image = Image.new("RGB", (64, 64), (40 * label + 5,) * 3)
        image.save(root / "val" / "images" / f"val_{i}.JPEG")
        annotations += f"val_{i}.JPEG\t{WNIDS[label]}\t0\t32\t44\t62\n"
    (root / "val" / "val_annotations.txt").write_text(annotations)
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("n00\tentity\nn01\tcat, true cat\nn02\tdog\n")
    return root


def test_tiny_imagenet(tiny_imagenet: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    images = data.load(Data(name="tiny-imagenet", root=str(tiny_imagenet.parent)), said.append)
    assert images.train.shape == (6, 3, 64, 64) and images.train.dtype == torch.uint8
    assert images.train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.train[:, 1, 5, 7].tolist() == [0, 10, 40, 50, 80, 90]
    assert images.test_labels.tolist() == [1, 2, 0]
    assert images.test[:, 2, 60, 3].tolist() == [45, 85, 5]
    assert images.classes == ["dog", "cat, true cat", "n03"]
    folders = [tiny_imagenet / part for part in ("train", "val")]
    assert said == [f"reading {n} images from {f}" for n, f in zip((6, 3), folders, strict=True)]
    assert "image/s" not in capfd.readouterr().err  # no terminal looks on
    inside = data.load(Data(name="tiny-imagenet", root=str(tiny_imagenet)), lambda text: None)
    assert torch.equal(inside.train, images.train)


@pytest.mark.parametrize(
    ("path", "content", "text"),
    [
        ("wnids.txt", None, r"no file .*wnids.txt; .*tiny-imagenet-200.zip"),
        ("words.txt", None, r"no file .*words.txt; .*tiny-imagenet-200.zip"),
        ("val/val_annotations.txt", None, r"no file .*val_annotations.txt; "),
        ("words.txt", b"\xff", r"words.txt is damaged \(.*utf-8"),
        ("val/val_annotations.txt", b"", r"val_annotations.txt is damaged \(it is empty"),
        (
            "val/val_annotations.txt",
            b"val_0.JPEG\n",
            r"expected file, tab, class, got 'val_0.JPEG'",
        ),
        ("val/val_annotations.txt", b"val_0.JPEG\tn09\n", r"val_0.JPEG is of class n09, unknown"),
        ("val/images/val_1.JPEG", None, r"data file .*val_1.JPEG is missing"),
        ("val/images/val_1.JPEG", b"no image", r"image .*val_1.JPEG is damaged or none"),
        ("wnids.txt", b"n01\nn02\nn03\nn04\n", r"no file .*train/n04/images/\*.JPEG"),
    ],
)
def test_tiny_imagenet_with_damage(
    tiny_imagenet: Path, path: str, content: bytes | None, text: str
) -> None:
    if content is None:
        (tiny_imagenet / path).unlink()
    else:
        (tiny_imagenet / path).write_bytes(content)
    with pytest.raises(UserError, match=text) as caught:
        data.load(Data(name="tiny-imagenet", root=str(tiny_imagenet)), lambda text: None)
    assert "\n" not in str(caught.value)


def test_half_an_image_is_named(tiny_imagenet: Path) -> None:
    path = tiny_imagenet / "train" / "n03" / "images" / "n03_1.JPEG"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"n03_1.JPEG is damaged or none \(image file is truncated"):
        data.load(Data(name="tiny-imagenet", root=str(tiny_imagenet)), lambda text: None)


@pytest.mark.parametrize("progress", [True, False])
def test_reading_shows_progress_on_a_terminal(
    tiny_imagenet: Path, progress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)
    options = Data(name="tiny-imagenet", root=str(tiny_imagenet))
    data.load(options, lambda text: None, progress)
    assert ("6/6" in shown.getvalue()) == progress


def test_image_folder(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    options = Data(name="folder", root=str(tmp_path), image_size=16, validation=1)
    images = data.load(options, lambda text: None)
    assert images.train.shape == (6, 3, 16, 16) and images.test.shape == (4, 3, 16, 16)
    assert images.classes == ["cat", "dog"] and images.test_labels.tolist() == [0, 0, 1, 1]
    whole = data.load(
        Data(name="folder", root=str(tmp_path / "train"), image_size=16, student_size=4)
    )
    assert (len(whole.train), len(whole.test)) == (5, 1)
    with pytest.raises(UserError, match=r"data.image_size: give"):
        data.load(Data(name="folder", root=str(tmp_path)))
    (tmp_path / "test" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1.png is damaged"):
        data.load(options, lambda text: None)
    said = []
    options.damaged = "skip"
    images = data.load(options, said.append)
    assert (len(images.train), len(images.test)) == (6, 3)
    assert images.test_labels.tolist() == [0, 0, 1]
    assert "1 of 4 pictures skipped as damaged: dog/1.png" in said
    for path in (tmp_path / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"every picture in .*test is damaged"):
        data.load(options, lambda text: None)


def test_split() -> None:
    labels = torch.arange(1000) % 10
    labels[:50] = 0
    options = Data(validation=200, labels=100)
    first, again, other = (data.split(options, labels, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(first.student, again.student)
    assert not torch.equal(first.student, other.student)
    assert torch.equal(first.validation, other.validation)
    assert len(first.validation) == 200 and len(first.teacher) == 800
    assert labels[first.student].bincount().tolist() == [10] * 10
    together = torch.cat([first.validation, first.teacher])
    assert together.unique().numel() == 1000
    assert torch.isin(first.student, first.teacher).all()
    fixed = [
        data.split(Data(validation=200, labels=100, subset="fixed"), labels, 10, s).student
        for s in (0, 1)
    ]
    assert torch.equal(*fixed)
    whole = data.split(Data(validation=200, labels=0), labels, 10, 0)
    assert torch.equal(whole.student, whole.teacher)
    with pytest.raises(UserError, match=r"data.labels: 900 is more than the 800"):
        data.split(Data(validation=200, labels=900), labels, 10, 0)
    with pytest.raises(UserError, match=r"data.validation: 1000 leaves none"):
        data.split(Data(validation=1000), labels, 10, 0)


def test_split_when_a_class_runs_out() -> None:
    labels = torch.tensor([0] * 95 + [1] * 5)
    chosen = data.split(Data(validation=1, labels=40), labels, 2, 0).student
    assert len(chosen) == 40
    assert labels[chosen].bincount()[1] >= 4


def test_resize() -> None:
    images = torch.randint(0, 256, (3, 2, 28, 28), dtype=torch.uint8)
    area = data.resize(images.float(), 7, "area")
    blocks = images.float().view(3, 2, 7, 4, 7, 4).mean((3, 5))
    torch.testing.assert_close(area, blocks)
    assert data.resize(images, 7, "area").dtype == torch.uint8
    flat = torch.full((1, 1, 28, 28), 9.0)
    torch.testing.assert_close(data.resize(flat, 14, "bicubic"), torch.full((1, 1, 14, 14), 9.0))
    assert data.resize(images, 28, "area") is images
    with pytest.raises(UserError, match=r"data.student_size: 32 is larger"):
        _check_size(student_size=32)
    with pytest.raises(UserError, match=r"data.shift: 28 is not smaller"):
        _check_size(shift=28)


def _check_size(**values: int) -> None:
    images = data.Images(*(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(2)) * 2, [])
    data.check_sizes(Data(**values), images)


def test_normalizer() -> None:
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    values = data.Normalizer.of(images)(images)
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_variants() -> None:
    options = Data(shift=4, shift_step=2)
    variants = views.Variants.of(options)
    assert len(variants) == 50
    assert variants.offsets[0].tolist() == [0, 0] and not variants.flips[0]
    image = torch.arange(28 * 28.0).view(1, 1, 28, 28)
    for number in range(50):
        seen = variants.apply(image, torch.tensor([number]))[0, 0]
        dy, dx = variants.offsets[number].tolist()
        expected = torch.zeros(28, 28)
        for y in range(28):
            for x in range(28):
                if 0 <= y - dy < 28 and 0 <= x - dx < 28:
                    expected[y, x] = image[0, 0, y - dy, x - dx]
        # The picture is moved, then mirrored as a whole with what the move left blank.
        torch.testing.assert_close(seen, expected.flip(1) if variants.flips[number] else expected)
    assert len(views.Variants.of(Data(shift=0, flip=False))) == 1


@pytest.mark.parametrize("layers", [1, 3])
def test_table_and_live_views_agree(layers: int) -> None:
    options = Data(shift=2, shift_step=2, student_size=7)
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(20)
    torch.manual_seed(0)
    teacher = models.build("resnet8", 1, 10, 4, 2).eval()
    normalize, device = data.Normalizer.of(images), torch.device("cpu")
    outputs = views.teacher_table(options, images, normalize, teacher, device, layers)
    table = views.Table(options, images, labels, normalize, outputs, device)
    live = views.Live(options, images, labels, normalize, teacher, device, layers)
    rows = torch.randint(20, (64,))
    variants = torch.arange(64) % len(table.variants)
    for name in ("student", "labels", "rows", "features", "logits"):
        one, other = (getattr(v.batch(rows, variants), name) for v in (table, live))
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(table.features(), live.features())
    stages = teacher.stage_features(normalize(images), layers)
    torch.testing.assert_close(table.features(), torch.cat(stages, 1))
    plain = live.batch(torch.arange(20), torch.zeros(20, dtype=torch.int64))
    expected = normalize(data.resize(images.float(), 7, "area"))
    torch.testing.assert_close(plain.student, expected)


def test_table_is_made_where_it_pays() -> None:
    assert views.wants_table(Data(), 1000, 128, 10, epochs=120)
    assert not views.wants_table(Data(), 1000, 128, 10, epochs=20)  # fewer passes without it
    assert not views.wants_table(Data(), 50000, 128, 10, epochs=120)  # too large
    assert views.wants_table(Data(cache="table"), 50000, 128, 10, epochs=1)
    assert not views.wants_table(Data(cache="live"), 10, 1, 10, epochs=1000)


@pytest.mark.parametrize(
    ("name", "widths"), [("cnn3", [8, 16, 32]), ("resnet8", [8, 16, 32]), ("resnet20", [8, 16, 32])]
)
def test_stages(name: str, widths: list[int]) -> None:
    model = models.build(name, 1, 5, 8).eval()
    images = torch.randn(3, 1, 16, 16)
    every, last = model.stage_features(images, 3), model.stage_features(images, 2)
    assert [stage.shape[1] for stage in every] == model.widths(3) == widths
    assert model.widths(2) == widths[1:] and model.widths(1) == widths[2:]
    assert torch.equal(every[-1], model.features(images))
    assert torch.equal(model.stage_features(images, 1)[0], every[-1])
    assert all(map(torch.equal, every[1:], last))
    # What enters the layers after a stage is what was pooled.
    inputs: list[torch.Tensor] = []
    position = model.stages[0][0] + 1
    model.backbone[position].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(images)
    torch.testing.assert_close(every[0], inputs[0].mean((2, 3)))
    with pytest.raises(UserError, match=r"distill.layers: 4 stages, but a network has 3"):
        model.widths(4)


def test_networks_of_unknown_stages() -> None:
    model = models.build("torchvision:resnet18", 1, 5, 8)
    assert model.widths(1) == [512]
    with pytest.raises(UserError, match=r"distill.layers: 2 stages, but a network has none"):
        model.widths(2)


@pytest.mark.parametrize(
    "name", ["cnn3", "resnet14", "torchvision:mobilenet_v2", "timm:mobilenetv3_small_050"]
)
def test_models(name: str) -> None:
    model = models.build(name, 1, 5, 8).eval()
    images = torch.randn(2, 1, 32, 32)
    features = model.features(images)
    assert features.shape == (2, model.feature_dim)
    assert torch.equal(model(images), model.classifier(features))
    assert model(images).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnet9", "the depth is 6 n"),
        ("vgg", "unknown model 'vgg'; known: cnn3"),
        ("torchvision:nothing", "torchvision:nothing: unknown"),
        ("timm:nothing", "timm:nothing"),
    ],
)
def test_unknown_models(name: str, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        models.build(name, 1, 5, 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("width", [4, 8, 32])
def test_few_channels_do_not_lie_last_in_strided_shortcuts(width):
    """Where torch 2.14.1 writes beyond the end of a gradient."""
    network = models.build("resnet8", 3, 10, width)
    seen = []

    def note(module, inputs):
        if module.kernel_size == (1, 1) and module.in_channels < models.FEW:
            assert module.stride == (2, 2)
            seen.append(inputs[0].is_contiguous())

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(note)
    images = torch.randn(5, 3, 12, 12)
    given = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(given), network(images))
    assert seen == [True] * len(seen) and len(seen) == {4: 4, 8: 2, 32: 0}[width]
