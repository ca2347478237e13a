"""Data sets as tensors in memory, their splits, and the student's low resolution.

Everything is an unsigned-byte tensor [N, C, H, W] until a batch is made: small enough to keep,
and cheap to share between the processes of a study.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fetch, pictures
from .config import Data
from .errors import UserError
from .meter import meter

SPLIT_SEED = 20240905  # the validation images are the same in every run of a data set
NAMES = ("fashion-mnist", "cifar10", "cifar100", "svhn", "stl10", "tiny-imagenet", "folder")


@dataclass
class Images:
    """One data set: images uint8 [N, C, H, W] at the teacher's resolution, labels int64 [N]."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: list[str]


@dataclass
class Split:
    """Rows of the training images: for the teacher, for choosing settings, for one student."""

    teacher: Tensor
    validation: Tensor
    student: Tensor


def load(data: Data, say: fetch.Say = print, progress: bool = True) -> Images:
    """Fetches (when needed), checks and reads the data set `data.name`.

    Args:
        progress: a bar on the terminal while many image files are read.

    Raises:
        UserError: unknown name, missing or damaged files, no source within reach.
    """
    readers: dict[str, Callable[[Data, fetch.Say], Images]] = {
        "fashion-mnist": _fashion_mnist,
        "tiny-imagenet": functools.partial(_tiny_imagenet, progress=progress),
        "folder": functools.partial(_folder, progress=progress),
        **dict.fromkeys(("cifar10", "cifar100", "svhn", "stl10"), _torchvision),
    }
    if data.name not in readers:
        raise UserError(f"data.name: expected one of {', '.join(NAMES)}, got {data.name!r}")
    try:
        images = readers[data.name](data, say)
    except ModuleNotFoundError as error:
        raise UserError(
            f"data set {data.name} needs {error.name}: pip install 'crrcd_ext[train]'"
        ) from None
    if data.name != "folder" and data.image_size:
        images.train = resize(images.train, data.image_size, data.resize)
        images.test = resize(images.test, data.image_size, data.resize)
    check_sizes(data, images)
    return images


def check_sizes(data: Data, images: Images) -> None:
    """Raises UserError where sizes of the settings and the images contradict each other."""
    edge = images.train.shape[-1]
    if data.student_size > edge:
        raise UserError(
            f"data.student_size: {data.student_size} is larger than the images' {edge} pixels"
        )
    if data.shift >= edge:
        raise UserError(f"data.shift: {data.shift} is not smaller than the images' {edge} pixels")


def split(data: Data, labels: Tensor, classes: int, seed: int) -> Split:
    """Divides the training images [N] with labels int64 [N].

    The validation images depend on the data set alone. The student's `data.labels` images are
    drawn from the rest, equally many of each class, by `seed` (or the same for all seeds with
    data.subset = "fixed").

    Raises:
        UserError: more validation images or labelled images than there are.
    """
    total = len(labels)
    if data.validation >= total:
        raise UserError(f"data.validation: {data.validation} leaves none of {total} images")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(SPLIT_SEED))
    validation, rest = order[: data.validation].sort().values, order[data.validation :]
    teacher = rest.sort().values
    if data.labels == 0:
        return Split(teacher, validation, teacher)
    if data.labels > len(rest):
        raise UserError(f"data.labels: {data.labels} is more than the {len(rest)} images there are")
    generator = torch.Generator().manual_seed(seed if data.subset == "by-seed" else SPLIT_SEED)
    rest = rest[torch.randperm(len(rest), generator=generator)]
    # Rank of each image within its class; taking the lowest ranks first balances the classes, and
    # goes on with what is there once a small class is used up.
    one_hot = F.one_hot(labels[rest], classes)
    rank = (one_hot.cumsum(0) * one_hot).sum(1)
    chosen = rest[torch.argsort(rank, stable=True)[: data.labels]]
    return Split(teacher, validation, chosen.sort().values)


def resize(images: Tensor, size: int, mode: str) -> Tensor:
    """Images [N, C, H, W], bytes or floats, at `size` x `size`; "area" or "bicubic" with filter.

    The student's images are made with this from the teacher's. Bytes stay bytes (rounded).
    """
    if images.shape[-1] == size and images.shape[-2] == size:
        return images
    values = images.float()
    if mode == "area":
        values = F.interpolate(values, (size, size), mode="area")
    else:
        values = F.interpolate(values, (size, size), mode="bicubic", antialias=True)
    if images.dtype == torch.uint8:
        return values.round().clamp(0, 255).to(torch.uint8)
    return values


@dataclass
class Normalizer:
    """Scales bytes to zero mean and unit variance per channel, as counted at full resolution."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Tensor) -> Normalizer:
        # Counted over integers, hence the same on every machine and for any number of threads.
        channels = images.transpose(0, 1).flatten(1)
        levels = torch.arange(256, dtype=torch.float64)
        counts = torch.stack([torch.bincount(c, minlength=256) for c in channels]).double()
        counts /= counts.sum(1, keepdim=True)
        mean = counts @ levels
        std = (counts @ levels.square() - mean.square()).clamp(min=1e-6).sqrt()
        return cls(mean.float()[:, None, None], std.float()[:, None, None])

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return (images.float() - mean) / std


def _fashion_mnist(data: Data, say: fetch.Say) -> Images:
    root = fetch.fashion_mnist(data, say)
    from torchvision.datasets import FashionMNIST

    try:
        train = FashionMNIST(str(root), train=True)
        test = FashionMNIST(str(root), train=False)
        for part in (train, test):
            if len(part.data) != len(part.targets) or len(part.data) == 0:
                raise ValueError(f"{len(part.data)} images and {len(part.targets)} labels")
    except Exception as error:  # the idx reader raises whatever its bytes lead it to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data file in {root / 'FashionMNIST' / 'raw'} is damaged ({reason}); "
            "delete the folder and run again"
        ) from None
    return Images(
        train.data[:, None],
        train.targets.long(),
        test.data[:, None],
        test.targets.long(),
        list(FashionMNIST.classes),
    )


def _torchvision(data: Data, say: fetch.Say) -> Images:
    from torchvision import datasets

    name, splits = {
        "cifar10": ("CIFAR10", ()),
        "cifar100": ("CIFAR100", ()),
        "svhn": ("SVHN", ("train", "test")),
        "stl10": ("STL10", ("train", "test")),
    }[data.name]
    kind = getattr(datasets, name)

    def parts() -> list:
        if splits:
            return [kind(data.root, split=part) for part in splits]
        return [kind(data.root, train=part) for part in (True, False)]

    try:
        found = parts()
    except RuntimeError:  # torchvision: "Dataset not found or corrupted"
        fetch.writable_folder(Path(data.root))
        say(f"{name}: downloading to {data.root}")
        fetch.torchvision_download(name, Path(data.root), data.download_seconds, splits)
        try:
            found = parts()
        except RuntimeError as error:
            raise UserError(f"data set {name} in {data.root}: {error}; delete it") from None
    pixels, labels = [], []
    for part in found:
        values = torch.as_tensor(part.data)
        pixels.append(values.permute(0, 3, 1, 2).contiguous() if not splits else values)
        labels.append(torch.as_tensor(part.labels if splits else part.targets).long())
    names = getattr(found[0], "classes", None) or [str(i) for i in range(10)]
    return Images(pixels[0], labels[0], pixels[1], labels[1], list(names))


def _tiny_imagenet(data: Data, say: fetch.Say, progress: bool) -> Images:
    """The archive's own folders; test images are those of `val`, as those of `test` have no labels.

    Le and Yang, "Tiny ImageNet Visual Recognition Challenge", 2015.
    """
    root = Path(data.root)
    if not (root / "wnids.txt").exists():
        root = root / "tiny-imagenet-200"
    wnids = [fields[0] for fields in _rows(root / "wnids.txt")]
    names = {fields[0]: fields[-1] for fields in _rows(root / "words.txt")}
    number = {wnid: label for label, wnid in enumerate(wnids)}
    annotations = root / "val" / "val_annotations.txt"
    test_files, test_labels = [], []
    for fields in _rows(annotations):
        if len(fields) < 2:
            raise UserError(f"{annotations}: expected file, tab, class, got {fields[0]!r}")
        if fields[1] not in number:
            raise UserError(
                f"{annotations}: {fields[0]} is of class {fields[1]}, unknown to wnids.txt"
            )
        test_files.append(root / "val" / "images" / fields[0])
        test_labels.append(number[fields[1]])
    files, labels = [], []
    for wnid in wnids:
        folder = root / "train" / wnid / "images"
        found = sorted(folder.glob("*.JPEG"))
        if not found:
            raise UserError(f"data.root: no file {folder}/*.JPEG")
        files += found
        labels += [number[wnid]] * len(found)
    train, test = (
        _read(paths, 64, root / part, say, progress)
        for part, paths in (("train", files), ("val", test_files))
    )
    classes = [names.get(wnid, wnid) for wnid in wnids]
    return Images(train, torch.tensor(labels), test, torch.tensor(test_labels), classes)


def _rows(path: Path) -> list[list[str]]:
    """The fields, separated by tabs, of every line of one of Tiny ImageNet's lists."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"data.root: no file {path}; it is in the published archive tiny-imagenet-200.zip "
            "(course CS231n, Stanford), which has to be unpacked there"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data file {path} is damaged ({error})") from None
    if not lines:
        raise UserError(f"data file {path} is damaged (it is empty)")
    return [line.split("\t") for line in lines]


def _read(files: list[Path], size: int, folder: Path, say: fetch.Say, progress: bool) -> Tensor:
    """Bytes [N, 3, size, size]: shorter edges are brought to `size`, then the middle is cut out."""
    from torchvision import transforms

    say(f"reading {len(files)} images from {folder}")
    fit = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    pixels = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for row, path in enumerate(meter(folder.name, "image", enabled=progress, items=files)):
        if not path.exists():
            raise UserError(f"data file {path} is missing")
        image = fit(pictures.open_image(path).convert("RGB"))
        pixels[row] = transforms.functional.pil_to_tensor(image)
    return pixels


def _folder(data: Data, say: fetch.Say, progress: bool) -> Images:
    """root/train/<class>/* and root/test/<class>/*; without these two, root/<class>/* cut 4 : 1."""
    from torchvision.datasets import ImageFolder

    root = Path(data.root)
    if not root.is_dir():
        raise UserError(f"data.root: no folder {root}")
    if not data.image_size:
        raise UserError('data.image_size: give the teacher\'s image size for data.name = "folder"')

    def images(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
        try:
            found = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise UserError(f"data.root: {str(error).splitlines()[0]}") from None
        files, labels = [Path(path) for path, _ in found.samples], found.targets
        if data.damaged == "skip":
            names = [str(path.relative_to(folder)) for path in files]
            rows = pictures.readable(files, names, say)
            files, labels = [files[row] for row in rows], [labels[row] for row in rows]
            if not files:
                raise UserError(f"data.root: every picture in {folder} is damaged")
        pixels = _read(files, data.image_size, folder, say, progress)
        return pixels, torch.tensor(labels), found.classes

    if (root / "train").is_dir() and (root / "test").is_dir():
        train, train_labels, classes = images(root / "train")
        test, test_labels, test_classes = images(root / "test")
        if test_classes != classes:
            raise UserError(f"data.root: {root}/train and {root}/test hold different classes")
        return Images(train, train_labels, test, test_labels, classes)
    pixels, labels, classes = images(root)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    cut = max(1, len(labels) // 5)
    test, train = order[:cut], order[cut:]
    return Images(pixels[train], labels[train], pixels[test], labels[test], classes)
