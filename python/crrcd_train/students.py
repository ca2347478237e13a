"""Low-resolution students that are trained, without labels, into the space of a given teacher.

A gallery of the teacher's embeddings stays valid for them: a student's embedding of a small image
is compared with the teacher's embeddings of large ones. Nothing here knows what a face is.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import interrupt
from .config import CRCD, CRD, CRRCD, KD, Contrastive, Optim, Settings
from .config import Student as Network
from .data import resize
from .errors import Interrupted, UserError
from .loop import Watcher, schedule
from .methods import kd_loss, make_criterion
from .models import build
from .views import Variants


@dataclass
class Pixels:
    """What a student is shown of a picture."""

    canvas: int = 112  # pictures are brought to this many pixels a side before all else
    fit: Literal["whole", "crop"] = "whole"  # whole: squeezed into a square; crop: its middle
    grey: bool = False  # one channel
    flip: bool = True  # horizontal flips
    shift: int = 4  # largest shift, in pixels of the canvas
    shift_step: int = 2  # distance between neighbouring shifts
    resize: Literal["area", "bicubic"] = "area"  # how the student's images are made
    cache_megabytes: int = 512  # all shifts are made beforehand where they fit in this


@dataclass
class StudentOptim:
    lr: float = 0.05  # the largest of a one-cycle schedule
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    batch_size: int = 32
    steps: int = 200
    warm_up: float = 0.25  # share of the steps until the largest rate


@dataclass
class Cosine:
    weight: float = 20.0


@dataclass
class RKD:
    distance: float = 25.0  # weights as in the paper's settings for metric learning
    angle: float = 50.0


@dataclass
class Ridge:
    alpha: float = 100.0  # penalty of squared coefficients, for standardised pixels


@dataclass
class Students(Settings):
    """Settings of a student and of every objective; the root of others' settings."""

    pixels: Pixels = field(default_factory=Pixels)
    student: Network = field(default_factory=lambda: Network(width=24))
    optim: StudentOptim = field(default_factory=StudentOptim)
    cosine: Cosine = field(default_factory=Cosine)
    rkd: RKD = field(default_factory=RKD)
    ridge: Ridge = field(default_factory=Ridge)
    kd: KD = field(default_factory=KD)
    crd: CRD = field(default_factory=lambda: CRD(**_SAME_SPACE))
    crcd: CRCD = field(
        default_factory=lambda: CRCD(
            **_SAME_SPACE, direction="both", keys="bank", anchors=0, **_CRCD_PAPER
        )
    )
    difference: CRCD = field(default_factory=lambda: CRCD(**_SAME_SPACE))
    crrcd: CRRCD = field(default_factory=lambda: CRRCD(**_SAME_SPACE))

    def check(self) -> None:
        self.more_than_zero(
            ("pixels.canvas", "pixels.shift_step", "student.width", "student.stem_stride")
        )
        self.more_than_zero(f"optim.{key}" for key in ("lr", "batch_size", "steps"))
        super().check()
        if self.pixels.shift >= self.pixels.canvas:
            raise UserError(
                f"config key pixels.shift: {self.pixels.shift} is not smaller than "
                f"pixels.canvas, {self.pixels.canvas}"
            )


# Heads are the identity: the student is to reach the teacher's own space.
_SAME_SPACE: dict[str, Any] = {"negatives": "all", "head": "identity", "standardize": False}
_CRCD_PAPER: dict[str, Any] = {"temperature": 0.05}

TERMS = {
    "cosine": "1 - cosine of student and teacher",
    "rkd": "relational KD: distances and angles within the batch",
    "crd": "CRDLoss",
    "crcd": "CRCDLoss as the public code sets it",
    "crrcd": "CRRCDLoss: relations by a learned module",
    "crrcd-difference": "CRCDLoss with the defaults of CRRCD: relations by difference",
    "ce": "cross-entropy with labels",
    "kd": "KD with the teacher's logits",
}
"""What a student can be trained with, alone or joined by "+"."""
LOSSES = {
    "crd": ("CRDLoss", "crd"),
    "crcd": ("CRCDLoss", "crcd"),
    "crrcd": ("CRRCDLoss", "crrcd"),
    "crrcd-difference": ("CRCDLoss", "difference"),
}
"""Terms that are a loss of crrcd_ext: its class and its table of settings."""


def terms(method: str) -> list[str]:
    """The terms of a method; raises UserError for an unknown one."""
    found = method.split("+")
    for term in found:
        if term not in TERMS:
            raise UserError(f"unknown method {method!r}: expected {', '.join(TERMS)}, joined by +")
    if sum(term in LOSSES for term in found) > 1:
        raise UserError(f"method {method!r}: at most one of {', '.join(LOSSES)}")
    return found


def tables(method: str) -> list[str]:
    """Names of the settings' tables that a method reads, beside pixels, student and optim."""
    own = [LOSSES[term][1] if term in LOSSES else term for term in method.split("+")]
    return [name for name in own if hasattr(Students(), name)]


def as_bytes(image: Any, pixels: Pixels) -> Tensor:
    """A PIL image as bytes [C, height, width]."""
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(image.convert("L" if pixels.grey else "RGB"))


def on_canvas(image: Any, pixels: Pixels) -> Tensor:
    """A PIL image as bytes [C, canvas, canvas]."""
    from PIL import Image

    if pixels.fit == "crop":
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        image = image.crop((left, top, left + edge, top + edge))
    whole = image.convert("L" if pixels.grey else "RGB")
    edge = pixels.canvas
    return as_bytes(whole.resize((edge, edge), Image.Resampling.BICUBIC), pixels)


class Views:
    """A student's images of canvases uint8 [N, C, canvas, canvas], in every variant.

    The variants are made together, when the first is wanted, where they fit in
    pixels.cache_megabytes, else when a batch asks for them.
    """

    def __init__(self, canvases: Tensor, size: int, pixels: Pixels) -> None:
        self.canvases, self.size, self.pixels = canvases, size, replace(pixels)
        self.variants = Variants.of(pixels, padding="replicate")

    def __len__(self) -> int:
        return len(self.canvases)

    @functools.cached_property
    def table(self) -> Tensor | None:
        """Every variant of every image [V, N, C, size, size], None where that is too much."""
        count, channels = self.canvases.shape[:2]
        bytes_needed = 4 * len(self.variants) * count * channels * self.size**2
        return self._every() if bytes_needed <= self.pixels.cache_megabytes * 2**20 else None

    def keep(self, rows: Tensor) -> Views:
        """The views of some of the images; a table of all is not made again."""
        found = Views(self.canvases[rows], self.size, self.pixels)
        if self.table is not None:
            found.table = self.table[:, rows]
        return found

    def _every(self) -> Tensor:
        every = torch.arange(len(self))
        return torch.stack([self._make(every, v) for v in range(len(self.variants))])

    def _make(self, rows: Tensor, variant: int | Tensor) -> Tensor:
        chosen = torch.as_tensor(variant).expand(len(rows))
        parts = [
            resize(
                self.variants.apply(self.canvases[some].float(), which),
                self.size,
                self.pixels.resize,
            )
            for some, which in zip(rows.split(256), chosen.split(256), strict=True)
        ]
        return torch.cat(parts)

    def batch(self, rows: Tensor, variants: Tensor) -> Tensor:
        """Float [B, C, size, size] in [0, 255]."""
        if self.table is not None:
            return self.table[variants, rows]
        return self._make(rows, variants)

    def plain(self, rows: Tensor) -> Tensor:
        return self._make(rows, 0)

    def all(self) -> Tensor:
        """Every variant of every image [V, N, C, size, size]; for closed forms on small sets."""
        return self._every() if self.table is None else self.table


class Student(nn.Module):
    """Embeddings [B, D] in the teacher's space of images [B, C, s, s] with values in [0, 255].

    The teacher's space is its embeddings less `center`, its mean over the training images.
    """

    def __init__(
        self, network: Network, channels: int, size: int, center: Tensor, mean: float, std: float
    ) -> None:
        super().__init__()
        self.size = size
        self.network = build(
            network.model, channels, len(center), network.width, network.stem_stride
        )
        self.register_buffer("center", center.float())
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.float() - self.mean) / self.std)

    @torch.no_grad()
    def embed(self, images: Tensor, chunk: int = 512) -> Tensor:
        """Unit rows on the CPU, in evaluation mode."""
        was_training = self.training
        self.eval()
        device = self.center.device
        parts = [F.normalize(self(part.to(device))).cpu() for part in images.split(chunk)]
        self.train(was_training)
        return torch.cat(parts)


def space(vectors: Tensor, center: Tensor) -> Tensor:
    """The teacher's embeddings [N, D] as unit rows of its centred space."""
    return F.normalize(vectors.float() - center)


def state(student: Student, settings: Students, method: str) -> dict[str, Any]:
    """Everything that `restore` needs, of tensors, numbers and texts."""
    first = next(student.network.parameters())
    return {
        "network": vars(settings.student),
        "pixels": vars(settings.pixels),
        "method": method,
        "channels": first.shape[1],
        "size": student.size,
        "weights": student.state_dict(),
    }


def restore(stored: dict[str, Any]) -> Student:
    """The student of a `state`, in evaluation mode."""
    network = Network(**stored["network"])
    center = torch.zeros_like(stored["weights"]["center"])
    student = Student(network, stored["channels"], stored["size"], center, 0.0, 1.0)
    student.load_state_dict(stored["weights"])
    return student.eval()


@dataclass
class Trained:
    student: Student
    criterion: nn.Module | None
    classifier: nn.Module | None
    history: list[dict[str, float]]
    step_ms: float
    """Mean time of a step, without the first ones."""
    warnings: list[str]
    """What the loss found wrong with the course of training."""


LOGGED = 10
"""Points of a run at which the loss and its diagnostics are kept."""


def train(
    views: Views,
    vectors: Tensor,
    labels: Tensor | None,
    settings: Students,
    method: str,
    *,
    seed: int,
    logits: Tensor | None = None,
    device: torch.device | None = None,
    watcher: Watcher | None = None,
) -> Trained:
    """Trains a student on `views` [N] to embed as the teacher did: vectors [N, D].

    The result is a function of the arguments alone, for one thread.

    Args:
        labels: int64 [N], only for the term "ce"; -1 where a sample has none.
        logits: the teacher's [N, classes], only for the term "kd".

    Raises:
        UserError: settings that a loss refuses, vectors or a loss that are not finite.
        Interrupted: stopped on request.
    """
    device = device or torch.device("cpu")
    watcher = watcher or Watcher()
    parts, optim, count = terms(method), settings.optim, len(views)
    center = vectors.mean(0)
    targets = space(vectors, center).to(device)
    if not torch.isfinite(targets).all():
        raise UserError(
            f"{method}: the loss cannot be finite, the teacher's embeddings have a NaN or an "
            "infinity"
        )
    torch.manual_seed(seed)
    plain = views.plain(torch.arange(min(count, 4096)))
    student = Student(
        settings.student,
        plain.shape[1],
        views.size,
        center,
        float(plain.mean()),
        max(float(plain.std()), 1e-3),
    ).to(device)
    groups: list[dict[str, Any]] = [{"params": list(student.parameters()), "lr": optim.lr}]
    classifier = criterion = None
    for part, given, what in (("ce", labels, "labels"), ("kd", logits, "a teacher's logits")):
        if part in parts and given is None:
            raise UserError(f"method {method} needs {what}")
    if "ce" in parts or "kd" in parts:
        classes = logits.shape[1] if "kd" in parts else int(labels.max()) + 1
        classifier = nn.Linear(len(center), classes).to(device)
        groups.append({"params": list(classifier.parameters()), "lr": optim.lr})
        labels = None if labels is None else labels.to(device)
        logits = None if logits is None else logits.to(device)
    name = next((part for part in parts if part in LOSSES), "")
    if name:
        table = getattr(settings, LOSSES[name][1])
        criterion = _criterion(name, table, count, seed, len(center))
        criterion.to(device)
        criterion.fill(torch.arange(count, device=device), targets)
        groups += criterion.parameter_groups(optim.lr, optim.weight_decay, table.lr_factor)
    optimizer = torch.optim.SGD(
        groups,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
    )
    rate = schedule(optimizer, Optim(lr=optim.lr, warm_up=optim.warm_up), optim.steps)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(count, min(optim.batch_size, count), generator)
    every = max(1, optim.steps // LOGGED)
    history, found, total = [], [], torch.zeros((), device=device)
    watcher.start(method, optim.steps, 0)
    warm, started = min(10, optim.steps - 1), time.monotonic()
    for step in range(1, optim.steps + 1):
        if step == warm + 1:
            started = time.monotonic()
        if interrupt.requested():
            raise Interrupted(f"{method}: stopped at step {step - 1} of {optim.steps}")
        rows = next(batches)
        images = views.batch(rows, views.variants.draw(len(rows), generator)).to(device)
        rows = rows.to(device)
        embedded, target = student(images), targets[rows]
        loss = torch.zeros((), device=device)
        for part in parts:
            if part == "cosine":
                loss = loss + settings.cosine.weight * cosine_loss(embedded, target)
            elif part == "rkd":
                loss = loss + rkd_loss(embedded, target, settings.rkd.distance, settings.rkd.angle)
            elif part == "ce":
                known = labels[rows]
                of_all = F.cross_entropy(
                    classifier(embedded), known, ignore_index=-1, reduction="sum"
                )
                loss = loss + of_all / (known >= 0).sum().clamp(min=1)
            elif part == "kd":
                loss = loss + settings.kd.weight * kd_loss(
                    classifier(embedded), logits[rows], settings.kd.temperature
                )
            else:
                try:
                    loss = loss + table.weight * criterion(embedded, target, rows)
                except (ValueError, RuntimeError) as error:
                    if not torch.isfinite(embedded).all():
                        raise _diverged(method, float("nan"), step) from None
                    raise UserError(f"config table {LOSSES[part][1]}: {error}") from None
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
        total += loss.detach()
        watcher.step(1)
        if step % every == 0 or step == optim.steps:
            row = {
                "step": step,
                "loss": float(total) / (step - (history or [{"step": 0}])[-1]["step"]),
            }
            if criterion is not None:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UserWarning)
                    try:
                        diagnosed = criterion.diagnostics()
                    except torch.linalg.LinAlgError:  # relations are not finite after this step
                        raise _diverged(method, float("nan"), step + 1) from None
                row.update({f"{name}_{key}": value for key, value in diagnosed.items()})
                found += [str(warning.message) for warning in caught]
            history.append(row)
            total.zero_()
            if not math.isfinite(row["loss"]):
                raise _diverged(method, row["loss"], step)
    watcher.close()
    step_ms = 1e3 * (time.monotonic() - started) / (optim.steps - warm)
    return Trained(student.eval(), criterion, classifier, history, step_ms, found)


def _diverged(method: str, value: float, step: int) -> UserError:
    return UserError(
        f"{method}: the loss became {value} before step {step}; lower the learning rate "
        "(--set optim.lr=...) or the loss weights"
    )


def _criterion(term: str, table: Contrastive, count: int, seed: int, width: int) -> nn.Module:
    own: dict[str, Any] = {}
    if table.head == "identity":
        own["embedding_dim"] = width
    if isinstance(table.negatives, int):
        own["negatives"] = min(table.negatives, count)
    return make_criterion(
        *LOSSES[term],
        table,
        student_dim=width,
        teacher_dim=width,
        num_samples=count,
        seed=seed,
        **own,
    )


def _batches(count: int, size: int, generator: torch.Generator) -> Any:
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // size * size].split(size)


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine over rows [B, D]: half the squared distance of unit rows."""
    return (1 - F.cosine_similarity(student, teacher)).mean()


def rkd_loss(student: Tensor, teacher: Tensor, distance: float, angle: float) -> Tensor:
    """Huber losses of normalised distances and of angles within the batch, unit rows of [B, D].

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, equations 3 to 8.
    """
    student, teacher = F.normalize(student), F.normalize(teacher)
    loss = torch.zeros((), device=student.device)
    if distance:
        d_s, d_t = (F.pdist(rows) for rows in (student, teacher))
        loss = loss + distance * F.smooth_l1_loss(d_s / d_s.mean(), d_t / d_t.mean())
    if angle:
        loss = loss + angle * F.smooth_l1_loss(_angles(student), _angles(teacher))
    return loss


def _angles(rows: Tensor) -> Tensor:
    """Cosines of the angles at b between a and c: [B, B, B] as (b, a, c)."""
    direction = F.normalize(rows[None] - rows[:, None], dim=2)
    return direction @ direction.transpose(1, 2)


ANCHORS = 256
"""Gallery entries, at most, whose relations to a probe are compared."""


def score(trained: Trained, method: str, images: Tensor, gallery: Tensor) -> Tensor:
    """Similarities [P, G] of images [P, C, s, s] and rows of the teacher's space [G, D].

    Cosines; for the learned relations of "crrcd" the mean cosine of a probe's and a gallery
    entry's relation to the first ANCHORS gallery entries. "ce" alone scores classes:
    log-probabilities [P, classes].
    """
    student, parts = trained.student, terms(method)
    device = student.center.device
    with torch.no_grad():
        if parts == ["ce"]:
            logits = trained.classifier(student(images.to(device)))
            return torch.log_softmax(logits.double(), 1).cpu()
        embedded = student.embed(images)
        if "crrcd" not in parts:
            return embedded @ gallery.T
        anchors = gallery[:ANCHORS]
        from_probe = trained.criterion.cross_relation(anchors, embedded)
        from_gallery = trained.criterion.teacher_relation(anchors, gallery)
        # (anchor, sample, R): an anchor's relation to itself says nothing.
        shares = torch.ones(len(anchors), len(gallery)).fill_diagonal_(0)
        shares /= shares.sum(0).clamp(min=1)
        return torch.einsum("apr,agr,ag->pg", from_probe, from_gallery, shares)


def ridge(views: Views, vectors: Tensor, alpha: float) -> Any:
    """Linear regression from standardised pixels, every variant a sample, to the teacher's space.

    Returns a function of images [P, C, s, s] that gives unit rows [P, D].
    """
    from sklearn.linear_model import Ridge as Regression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images = views.all()
    targets = space(vectors, vectors.mean(0))
    inputs = images.flatten(2).flatten(0, 1).double().numpy()
    model = make_pipeline(StandardScaler(), Regression(alpha=alpha))
    model.fit(inputs, targets.repeat(len(images), 1).double().numpy())

    def embed(images: Tensor) -> Tensor:
        return F.normalize(
            torch.from_numpy(model.predict(images.flatten(1).double().numpy())).float()
        )

    return embed
