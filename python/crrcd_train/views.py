"""What the student and the teacher see of a batch: augmentation, down-sampling, teacher outputs.

Augmentation is a finite set of variants (each shift with and without the mirror image), and a batch
is rows and variant numbers. That makes it a pure function of the step, and lets a small training
set be passed through the teacher once per variant beforehand: `Table` then serves student images
and teacher outputs by indexing. `Live` computes the same numbers on the fly, for sets where a table
would not fit or not pay.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Data
from .data import Normalizer, resize
from .models import Classifier


class Shifts(Protocol):
    """Settings that say which variants there are."""

    flip: bool
    shift: int
    shift_step: int


@dataclass
class Variants:
    """All augmentations: offsets int64 [V, 2] in pixels (down, right), flips bool [V].

    Variant 0 is the image as it is. Pixels that move in from outside are zero, or with
    `padding` = "replicate" those of the edge.
    """

    offsets: Tensor
    flips: Tensor
    padding: Literal["constant", "replicate"] = "constant"

    @classmethod
    def of(cls, data: Shifts, padding: Literal["constant", "replicate"] = "constant") -> Variants:
        steps = data.shift // data.shift_step
        positions = [i * data.shift_step for i in range(-steps, steps + 1)]
        rows = [
            (dy, dx, flip)
            for flip in ((False, True) if data.flip else (False,))
            for dy in positions
            for dx in positions
        ]
        rows.sort(key=lambda row: (row[2], abs(row[0]) + abs(row[1])))
        table = torch.tensor(rows, dtype=torch.int64)
        return cls(table[:, :2], table[:, 2].bool(), padding)

    def __len__(self) -> int:
        return len(self.flips)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self), (count,), generator=generator)

    def apply(self, images: Tensor, variants: Tensor) -> Tensor:
        """Image b of [B, C, H, W] in its variant b."""
        reach = int(self.offsets.abs().max())
        height, width = images.shape[-2:]
        padded = F.pad(images, (reach,) * 4, mode=self.padding)
        offsets = self.offsets[variants]
        down = torch.arange(height) + reach - offsets[:, :1]
        right = torch.arange(width) + reach - offsets[:, 1:]
        right = torch.where(self.flips[variants][:, None], right.flip(1), right)
        down, right = down.to(images.device), right.to(images.device)
        batch = torch.arange(len(images), device=images.device)
        # Advanced indices around the channel slice put it last.
        return padded[batch[:, None, None], :, down[:, :, None], right[:, None, :]].permute(
            0, 3, 1, 2
        )


@dataclass
class Batch:
    """student [B, C, s, s] normalised; rows int64 [B] within the student's training set."""

    student: Tensor
    labels: Tensor
    rows: Tensor
    features: Tensor | None  # teacher's [B, Dt]
    logits: Tensor | None  # teacher's [B, classes]


class Live:
    """Batches computed when asked for; `teacher` None leaves features and logits out."""

    def __init__(
        self,
        data: Data,
        images: Tensor,
        labels: Tensor,
        normalize: Normalizer,
        teacher: Classifier | None,
        device: torch.device,
        layers: int = 1,
    ) -> None:
        self.data, self.normalize, self.teacher, self.device = data, normalize, teacher, device
        self.layers = layers
        self.images, self.labels = images, labels
        self.variants = Variants.of(data)

    def batch(self, rows: Tensor, variants: Tensor) -> Batch:
        images = self.variants.apply(self.images[rows], variants).to(self.device)
        features = logits = None
        if self.teacher is not None:
            features, logits = teacher_outputs(self.teacher, self.normalize(images), self.layers)
        return Batch(
            self.normalize(resize(images.float(), self.data.student_size, self.data.resize)),
            self.labels[rows].to(self.device),
            rows.to(self.device),
            features,
            logits,
        )

    def features(self) -> Tensor:
        """Teacher features [N, Dt] of the images as they are."""
        plain = [self.batch(rows, torch.zeros_like(rows)) for rows in chunks(len(self.labels))]
        return torch.cat([batch.features for batch in plain])


class Table:
    """Batches looked up: every variant of every image was made and shown to the teacher before.

    Args:
        outputs: teacher features [V, N, Dt] and logits [V, N, classes] as `teacher_table` makes
            them, or None.
    """

    def __init__(
        self,
        data: Data,
        images: Tensor,
        labels: Tensor,
        normalize: Normalizer,
        outputs: tuple[Tensor, Tensor] | None,
        device: torch.device,
    ) -> None:
        self.variants = Variants.of(data)
        every = torch.arange(len(labels))
        small = [
            normalize(
                resize(
                    self.variants.apply(images, torch.full_like(every, variant)).float(),
                    data.student_size,
                    data.resize,
                )
            )
            for variant in range(len(self.variants))
        ]
        self.student = torch.stack(small).to(device)
        self.labels = labels.to(device)
        self.outputs = None if outputs is None else tuple(part.to(device) for part in outputs)

    def batch(self, rows: Tensor, variants: Tensor) -> Batch:
        at = (variants.to(self.labels.device), rows.to(self.labels.device))
        features, logits = (None, None) if self.outputs is None else (p[at] for p in self.outputs)
        return Batch(self.student[at], self.labels[at[1]], at[1], features, logits)

    def features(self) -> Tensor:
        return self.outputs[0][0]


def chunks(total: int, size: int = 500) -> list[Tensor]:
    return list(torch.arange(total).split(size))


@torch.no_grad()
def teacher_outputs(teacher: Classifier, images: Tensor, layers: int = 1) -> tuple[Tensor, Tensor]:
    """Features of the last `layers` stages side by side, and logits."""
    features = teacher.stage_features(images, layers)
    return torch.cat(features, 1), teacher.classifier(features[-1])


@torch.no_grad()
def teacher_table(
    data: Data,
    images: Tensor,
    normalize: Normalizer,
    teacher: Classifier,
    device: torch.device,
    layers: int = 1,
) -> tuple[Tensor, Tensor]:
    """Teacher features [V, N, Dt] and logits [V, N, classes] of every variant of images [N, ...].

    One pass of V * N images, instead of one for every epoch of every student.
    """
    variants = Variants.of(data)
    features, logits = [], []
    for variant in range(len(variants)):
        for rows in chunks(len(images)):
            view = variants.apply(images[rows], torch.full_like(rows, variant)).to(device)
            out = teacher_outputs(teacher, normalize(view), layers)
            features.append(out[0].float().cpu())
            logits.append(out[1].float().cpu())
    shape = (len(variants), len(images), -1)
    return torch.cat(features).view(shape), torch.cat(logits).view(shape)


def wants_table(data: Data, rows: int, feature_dim: int, classes: int, epochs: int) -> bool:
    """Whether a table fits data.cache_megabytes and costs less than `epochs` passes."""
    if data.cache != "auto":
        return data.cache == "table"
    count = len(Variants.of(data))
    # Student images are counted with three channels.
    numbers = count * rows * (feature_dim + classes + 3 * data.student_size**2)
    return count < epochs and 4 * numbers <= data.cache_megabytes * 2**20


def table_key(data: Data, rows: Tensor, teacher_digest: str, layers: int = 1) -> str:
    """Names what a teacher table depends on: the teacher, its stages, the images, the variants."""
    parts = (data.name, data.image_size, data.resize, data.flip, data.shift, data.shift_step)
    digest = hashlib.sha256(repr((parts, teacher_digest, layers)).encode())
    digest.update(rows.numpy().tobytes())
    return digest.hexdigest()[:16]
