"""The training objectives: cross-entropy, Hinton's KD, CRRCD, CRD, CRCD, KD with them, controls."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import CONTRASTIVE, Config, Contrastive, WeightSchedule, terms
from .data import Images, Normalizer, Split, resize, split
from .errors import UserError
from .models import Classifier, build
from .views import Live, Table, Variants


def uses_teacher(method: str) -> bool:
    return method != "ce"


def weight_factor(schedule: WeightSchedule, progress: float) -> float:
    """Factor of a loss weight at `progress` in [0, 1) of the training."""
    if schedule == "ramp-up":
        return progress
    if schedule == "ramp-down":
        return 1.0 - progress
    return 1.0


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch, logits [B, C].

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    return temperature**2 * F.kl_div(
        F.log_softmax(student.float() / temperature, dim=1),
        F.log_softmax(teacher.float() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def pick_device(name: str) -> torch.device:
    """Raises UserError for a device that this PyTorch cannot use."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"run.device: {name!r} cannot be used ({reason})") from None
    return device


class _Validation:
    """Accuracy on images that were prepared once."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.images, self.labels = images.to(device), labels.to(device)

    def __call__(self, model: Classifier) -> float:
        return accuracy(predict(model, self.images)[0], self.labels)


@torch.no_grad()
def predict(model: Classifier, images: Tensor, chunk: int = 500) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and features [N, D] of prepared images [N, ...], in evaluation mode."""
    was_training = model.training
    model.eval()
    logits, features = [], []
    for part in images.split(chunk):
        feature = model.features(part)
        features.append(feature.float())
        logits.append(model.classifier(feature).float())
    model.train(was_training)
    return torch.cat(logits), torch.cat(features)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows whose largest logit is at the label."""
    return 100.0 * float((logits.argmax(1) == labels).double().mean())


def prepared(images: Tensor, normalize: Normalizer, size: int, mode: str) -> Tensor:
    """Bytes [N, C, H, W] as a network is shown them at `size`."""
    return normalize(torch.cat([resize(part.float(), size, mode) for part in images.split(1000)]))


def make_criterion(
    kind: str, table_name: str, settings: Contrastive, **arguments: Any
) -> nn.Module:
    """The loss `kind` of crrcd_ext with a table of settings; `arguments` replace what stands there.

    Raises:
        UserError: the loss refuses them; names the table.
    """
    import crrcd_ext

    options = dict(vars(settings))
    for own in ("weight", "schedule", "lr_factor"):
        options.pop(own)
    if "anchors" in options:
        options["anchors"] = options["anchors"] or None
    options["bank_dtype"] = getattr(torch, options["bank_dtype"])
    options["backend"] = options["backend"] or None
    try:
        return getattr(crrcd_ext, kind)(**{**options, **arguments})
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"config table {table_name}: {error}") from None


class TeacherTask:
    """Cross-entropy on the teacher's share of the training images at full resolution."""

    kind = "teacher"

    def __init__(self, config: Config, images: Images, device: torch.device) -> None:
        self.config, self.device = config, device
        # The subset does not matter here: the teacher sees all but the validation images.
        parts: Split = split(config.data, images.train_labels, len(images.classes), 0)
        self.rows, self.images = parts.teacher, images
        self.count = len(parts.teacher)
        self.variants = Variants.of(config.data)
        self.normalize = Normalizer.of(images.train[parts.teacher])
        torch.manual_seed(config.run.seed)
        self.model = build_teacher(config, images).to(device)
        self._validate = _Validation(
            self.normalize(images.train[parts.validation]),
            images.train_labels[parts.validation],
            device,
        )

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "lr": lr, "weight_decay": weight_decay}]

    def loss(self, rows: Tensor, variants: Tensor, progress: float) -> dict[str, Tensor]:
        at = self.rows[rows]
        views = self.variants.apply(self.images.train[at], variants).to(self.device)
        labels = self.images.train_labels[at].to(self.device)
        logits = self.model(self.normalize(views))
        smoothing = self.config.teacher.optim.label_smoothing
        return {"ce": F.cross_entropy(logits, labels, label_smoothing=smoothing)}

    def validate(self) -> float:
        return self._validate(self.model)

    def diagnostics(self) -> dict[str, float]:
        return {}


class StudentTask:
    """One student: cross-entropy on its labelled images plus what the method adds.

    Args:
        teacher: needed unless the method is "ce".
        outputs: teacher table of the student's images (`views.teacher_table`), if one was made.
    """

    kind = "student"

    def __init__(
        self,
        config: Config,
        images: Images,
        device: torch.device,
        parts: Split,
        teacher: Classifier | None = None,
        outputs: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.config, self.device = config, device
        data, run = config.data, config.run
        self.terms, self.shuffled = terms(run.method), run.method.endswith("-shuffled")
        self.count = len(parts.student)
        self.normalize = Normalizer.of(images.train[parts.teacher])
        chosen = images.train[parts.student], images.train_labels[parts.student]
        needs_teacher = uses_teacher(run.method)
        if outputs is not None or not needs_teacher:
            self.views: Table | Live = Table(data, *chosen, self.normalize, outputs, device)
        else:
            self.views = Live(data, *chosen, self.normalize, teacher, device)
        self.variants = self.views.variants
        torch.manual_seed(run.seed)
        self.model = build_student(config, images).to(device)
        self.criterion: nn.Module | None = None
        # At most one loss of crrcd_ext: its name and its table of settings.
        self.name = next((name for name in CONTRASTIVE if name in self.terms), "")
        if self.name:
            self.settings = getattr(config, self.name)
            features = self.views.features()
            self.criterion = make_criterion(
                CONTRASTIVE[self.name],
                self.name,
                self.settings,
                student_dim=self.model.feature_dim,
                teacher_dim=features.shape[1],
                num_samples=self.count,
                seed=run.seed,
            ).to(device)
            rows = torch.arange(self.count, device=device)
            labels = chosen[1].to(device) if self.settings.exclude_same_label else None
            self.criterion.fill(rows, features, labels=labels)
        edge, mode = data.student_size, data.resize
        self._validate = _Validation(
            prepared(images.train[parts.validation], self.normalize, edge, mode),
            images.train_labels[parts.validation],
            device,
        )

    def modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"model": self.model}
        if self.criterion is not None:
            found["criterion"] = self.criterion
        return found

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        groups = [{"params": list(self.model.parameters()), "lr": lr, "weight_decay": weight_decay}]
        if self.criterion is not None:
            groups += self.criterion.parameter_groups(lr, weight_decay, self.settings.lr_factor)
        return groups

    def loss(self, rows: Tensor, variants: Tensor, progress: float) -> dict[str, Tensor]:
        config = self.config
        batch = self.views.batch(rows, variants)
        features = self.model.features(batch.student)
        logits = self.model.classifier(features)
        smoothing = config.optim.label_smoothing
        losses = {"ce": F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)}
        if "kd" in self.terms:
            weight = config.kd.weight * weight_factor(config.kd.schedule, progress)
            losses["kd"] = weight * kd_loss(
                self._matched(logits), batch.logits, config.kd.temperature
            )
        if self.criterion is not None:
            weight = self.settings.weight * weight_factor(self.settings.schedule, progress)
            labels = {"labels": batch.labels} if self.settings.exclude_same_label else {}
            losses[self.name] = weight * self.criterion(
                self._matched(features), batch.features, batch.rows, **labels
            )
        return losses

    def _matched(self, student: Tensor) -> Tensor:
        """Student rows in the order in which the teacher's meet them.

        The control gives each teacher row another image's student row, a new one in every epoch
        since batches are drawn anew: the loss has its usual size and nothing to teach. One wrong
        partner for good would be something to learn by heart, and harmful.
        """
        return student.roll(1, 0) if self.shuffled else student

    def validate(self) -> float:
        return self._validate(self.model)

    def diagnostics(self) -> dict[str, float]:
        if self.criterion is None:
            return {}
        return {f"{self.name}_{key}": v for key, v in self.criterion.diagnostics().items()}


def build_teacher(config: Config, images: Images) -> Classifier:
    teacher = config.teacher
    return build(
        teacher.model,
        images.train.shape[1],
        len(images.classes),
        teacher.width,
        teacher.stem_stride,
    )


def build_student(config: Config, images: Images) -> Classifier:
    student = config.student
    return build(
        student.model,
        images.train.shape[1],
        len(images.classes),
        student.width,
        student.stem_stride,
    )
