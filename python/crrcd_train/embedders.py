"""Teachers that turn images into embeddings, and their embeddings on the disk.

A teacher is a name: "dlib", the face embedding of dlib (King, 2017, a ResNet with 128 outputs), or
"module:function", a function of the user's: a list of PIL images in, an array [N, D] out.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, interrupt, pool
from .errors import Interrupted, UserError, writable_folder
from .loop import Watcher
from .meter import meter
from .pictures import open_image

CHUNK = 20
"""Images that a worker embeds at a time; what is lost when the work is stopped."""


class Embedder(Protocol):
    """A teacher in memory."""

    identity: str
    """Changes when the outputs would."""

    def __call__(self, images: list, pixels: list | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings float32 [N, D] of PIL images, and bool [N]: whether a face was detected.

        Args:
            pixels: the same pictures in a worse state, which are embedded in the place of `images`;
                where faces lie is still taken from `images`.
        """


class DlibFaces:
    """dlib's detector, five landmarks, an aligned cut of 150 x 150 pixels, its embedding [128].

    The weights lie in the package face_recognition_models, which cannot be imported where
    setuptools has no pkg_resources any more; its files are only looked up.

    Raises:
        UserError: a package or a file is missing.
    """

    FILES = ("shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat")
    CUT = 150

    def __init__(self) -> None:
        try:
            import dlib
        except ImportError as error:
            raise UserError(no_dlib(str(error))) from None
        landmarks, weights = (
            package_file("face_recognition_models", f"models/{name}") for name in self.FILES
        )
        self._dlib = dlib
        self._detect = dlib.get_frontal_face_detector()
        self._landmarks = dlib.shape_predictor(str(landmarks))
        self._network = dlib.face_recognition_model_v1(str(weights))
        self.identity = f"dlib {weights.name} {weights.stat().st_size}"

    def __call__(self, images: list, pixels: list | None = None) -> tuple[np.ndarray, np.ndarray]:
        cuts, detected = [], []
        for image, shown in zip(images, pixels or images, strict=True):
            array = np.asarray(image.convert("RGB"))
            # Twice the size: faces of a picture of 92 x 112 are near the detector's smallest.
            faces = self._detect(array, 1)
            detected.append(bool(faces))
            if faces:
                largest = max(faces, key=lambda box: box.area())
                shape = self._landmarks(array, largest)
                source = np.asarray(shown.convert("RGB"))
                cuts.append(self._dlib.get_face_chip(source, shape, size=self.CUT, padding=0.25))
            else:
                cuts.append(np.asarray(_centred(shown.convert("RGB"), self.CUT)))
        vectors = [np.asarray(self._network.compute_face_descriptor(cut)) for cut in cuts]
        return np.stack(vectors).astype(np.float32), np.array(detected)


class UserFunction:
    """A function of the user's behind "module:function" or "file.py:function".

    Raises:
        UserError: no such module or function; at a call: what it returned is no [N, D] of numbers.
    """

    def __init__(self, name: str) -> None:
        module, _, attribute = name.rpartition(":")
        if not module or not attribute:
            raise UserError(f"teacher {name!r}: expected dlib, module:function or file.py:function")
        self.name = name
        try:
            found = _import(module)
        except (ImportError, OSError, SyntaxError) as error:
            raise UserError(f"teacher {name}: {module} cannot be imported ({error})") from None
        if not hasattr(found, attribute):
            raise UserError(f"teacher {name}: {module} has no {attribute}")
        self.function = getattr(found, attribute)
        if not callable(self.function):
            raise UserError(f"teacher {name}: {attribute} is a {type(self.function).__name__}")
        try:
            source = inspect.getsource(found)
        except (OSError, TypeError):
            source = ""
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        self.identity = f"{name} {digest}"

    def __call__(self, images: list, pixels: list | None = None) -> tuple[np.ndarray, np.ndarray]:
        made = self.function(pixels or images)
        if isinstance(made, Tensor):
            made = made.detach().float().cpu().numpy()
        try:
            array = np.asarray(made, dtype=np.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"teacher {self.name}: expected an array [{len(images)}, D] of numbers, got rows "
                f"of different widths or something else ({str(error).splitlines()[0]})"
            ) from None
        if array.ndim != 2 or len(array) != len(images) or not array.shape[1]:
            raise UserError(
                f"teacher {self.name}: expected an array [{len(images)}, D], "
                f"got {list(array.shape)}"
            )
        return array, np.ones(len(array), dtype=bool)


@functools.lru_cache(maxsize=2)
def build(name: str) -> Embedder:
    """The teacher called `name`; raises UserError where it cannot be had."""
    return DlibFaces() if name == "dlib" else UserFunction(name)


def no_dlib(reason: str) -> str:
    return (
        f"the faces' teacher needs dlib ({reason}): pip install 'crrcd_ext[faces]'. Where the "
        f"package dlib-bin has no wheel for this platform (here: Python "
        f"{sys.version_info.major}.{sys.version_info.minor}, {platform.system()} "
        f"{platform.machine()}), 'make study' runs the Fashion-MNIST study instead, "
        "which needs no face embedding"
    )


def package_file(package: str, path: str) -> Path:
    """A file inside an installed package, which is not imported.

    Raises:
        UserError: the package is not installed or has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"package {package} is not installed: pip install 'crrcd_ext[faces]'")
    found = Path(spec.submodule_search_locations[0]) / path
    if not found.exists():
        raise UserError(f"package {package} has no {path}; install it again")
    return found


@dataclass
class Embeddings:
    """vectors float32 [N, D]; detected bool [N]; identity of the teacher."""

    vectors: Tensor
    detected: Tensor
    identity: str


@dataclass
class Pictures:
    """Images by name, opened where they are needed.

    Attributes:
        through: where positive, the teacher is shown the image reduced to this many pixels a side
            and scaled up again.
    """

    files: list[Path]
    names: list[str]
    through: int = 0

    def digest(self) -> str:
        """Of the files' contents and of what is done to them.

        Raises:
            UserError: a file cannot be read.
        """
        found = hashlib.sha256(str(self.through).encode())
        for path in self.files:
            try:
                found.update(hashlib.sha256(path.read_bytes()).digest())
            except OSError as error:
                raise UserError(f"image {path} cannot be read ({error.strerror})") from None
        return found.hexdigest()


def embed(
    pictures: Pictures,
    teacher: str,
    cache: Path,
    *,
    workers: int = 1,
    progress: bool = True,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Embeddings:
    """Every picture's embedding, from `cache` where it lies there, else made and kept there.

    The file in `cache` is named after the teacher and the pictures' contents. It is written whole
    or not at all, every few seconds, so that an interrupted call's work is not done again.

    Args:
        workers: processes; only for dlib, a user's function is called in this one.
        fresh: make all embeddings anew.

    Raises:
        UserError: the teacher or an image cannot be used, or the teacher's answer cannot.
        Interrupted: stopped on request; what was made is kept.
    """
    identity = build(teacher).identity
    key = hashlib.sha256(f"{identity} {pictures.digest()}".encode()).hexdigest()[:16]
    path = writable_folder(cache) / f"embeddings-{key}.pt"
    if fresh:
        forget(path)
    store = _Store(path, len(pictures.files), identity, say)
    rows = store.missing()
    jobs = [
        _Chunk(teacher, part, [pictures.files[row] for row in part], pictures.through)
        for part in (rows[at : at + CHUNK] for at in range(0, len(rows), CHUNK))
    ]
    if not jobs:
        return store.whole()

    def done(job: _Chunk, result: dict[str, Any]) -> None:
        store.add(job.rows, result["vectors"], result["detected"], pictures.names)

    try:
        if teacher == "dlib" and workers > 1:
            pool.run(
                jobs,
                _embed_chunk,
                workers=workers,
                progress=progress,
                done=done,
                remedy="with fewer workers",
                unit="image",
                name="teacher's embeddings",
            )
        else:
            _one_after_another(jobs, progress, done)
    finally:
        store.save()
    return store.whole()


def forget(path: Path) -> None:
    for file in (path, checkpoint.previous(path)):
        file.unlink(missing_ok=True)


@dataclass
class _Chunk:
    teacher: str
    rows: list[int]
    files: list[Path]
    through: int

    @property
    def title(self) -> str:
        return f"images {self.rows[0]} to {self.rows[-1]}"


def _embed_chunk(job: _Chunk, watcher: Watcher, say: Callable[[str], None]) -> dict[str, Any]:
    embedder = build(job.teacher)
    watcher.start(job.title, len(job.rows), 0)
    parts = []
    # dlib takes one after the other anyway; a user's function gets them together.
    size = 1 if job.teacher == "dlib" else len(job.files)
    for at in range(0, len(job.files), size):
        if interrupt.requested():
            raise Interrupted("stopped while the teacher's embeddings were made")
        images = [open_image(path) for path in job.files[at : at + size]]
        shown = [through(image, job.through) for image in images] if job.through else None
        parts.append(embedder(images, shown))
        watcher.step(len(images))
    watcher.close()
    return {
        "vectors": np.concatenate([vectors for vectors, _ in parts]),
        "detected": np.concatenate([detected for _, detected in parts]),
    }


def _one_after_another(
    jobs: list[_Chunk], progress: bool, done: Callable[[_Chunk, dict[str, Any]], None]
) -> None:
    total = sum(len(job.rows) for job in jobs)
    with meter("teacher's embeddings", "image", enabled=progress, total=total) as bar:
        for job in jobs:
            done(job, _embed_chunk(job, Watcher(), print))
            bar.update(len(job.rows))


class _Store:
    """Embeddings of N pictures, as far as they are made, in one file."""

    SECONDS = 5.0

    def __init__(self, path: Path, count: int, identity: str, say: Callable[[str], None]) -> None:
        self.path, self.identity = path, identity
        self.vectors = torch.empty(count, 0)
        self.detected, self.made = torch.zeros(2, count, dtype=torch.bool)
        self.saved, self.changed = time.monotonic(), False
        if not checkpoint.exists(path):
            return
        try:
            state = checkpoint.load(path, say)
        except UserError as error:
            say(f"{error}: the embeddings are made anew")
            return
        self.vectors, self.detected, self.made = (
            state[key] for key in ("vectors", "detected", "made")
        )

    def missing(self) -> list[int]:
        return (~self.made).nonzero().flatten().tolist()

    def add(
        self, rows: list[int], vectors: np.ndarray, detected: np.ndarray, names: list[str]
    ) -> None:
        width = self.vectors.shape[1]
        if width and vectors.shape[1] != width:
            raise UserError(
                f"teacher {self.identity.split()[0]}: {names[rows[0]]} has an embedding of "
                f"{vectors.shape[1]} numbers, earlier images have {width}"
            )
        broken = ~np.isfinite(vectors).all(1)
        if broken.any():
            raise UserError(
                f"teacher {self.identity.split()[0]}: the embedding of "
                f"{names[rows[int(broken.argmax())]]} has a NaN or an infinity"
            )
        if not width:
            self.vectors = torch.zeros(len(self.made), vectors.shape[1])
        self.vectors[rows] = torch.from_numpy(vectors)
        self.detected[rows] = torch.from_numpy(detected)
        self.made[rows] = True
        self.changed = True
        if time.monotonic() - self.saved > self.SECONDS:
            self.save()

    def save(self) -> None:
        if not self.changed:
            return
        names = ("vectors", "detected", "made", "identity")
        checkpoint.save(self.path, {name: getattr(self, name) for name in names})
        self.saved, self.changed = time.monotonic(), False
        if self.made.all():
            checkpoint.previous(self.path).unlink(missing_ok=True)

    def whole(self) -> Embeddings:
        return Embeddings(self.vectors, self.detected, self.identity)


def through(image: Any, size: int) -> Any:
    """`image` reduced to `size` x `size` pixels (areas) and scaled up again (bicubic)."""
    from PIL import Image

    if image.mode in ("1", "P"):  # of which Pillow only picks pixels
        image = image.convert("RGB")
    small = image.resize((size, size), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def _centred(image: Any, size: int) -> Any:
    from PIL import Image

    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def _import(module: str) -> Any:
    if not module.endswith(".py"):
        sys.path.insert(0, "")  # as `python -m` does: the user's module lies beside the command
        try:
            return importlib.import_module(module)
        finally:
            sys.path.remove("")
    path = Path(module)
    if not path.exists():
        raise OSError("no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
