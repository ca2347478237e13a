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
    for name in ("anchors", "hidden_dim", "relation_dim", "exclude_similar", "max_scale"):
        if name in options:
            options[name] = options[name] or None
    options["bank_dtype"] = getattr(torch, options["bank_dtype"])
    options["backend"] = options["backend"] or None
    options["check_every"] = None  # the loops look themselves, and record what they find
    try:
        return getattr(crrcd_ext, kind)(**{**options, **arguments})
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"config table {table_name}: {error}") from None


def layers(config: Config) -> int:
    """How many stages of the networks meet in the loss of crrcd_ext."""
    return config.distill.layers if terms(config.run.method) & CONTRASTIVE.keys() else 1


def hard_negatives(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """int64 [N, count]: the rows of other classes that are most like a row, nearest ones first.

    Likeness is the cosine of features [N, D], centred; every other class gives as many, to one.

    Raises:
        UserError: a class has too few rows for that.
    """
    classes = int(labels.max()) + 1
    each = -(-count // max(1, classes - 1))
    rows = [(labels == number).nonzero().flatten() for number in range(classes)]
    fewest = min(map(len, rows))
    if classes < 2 or each > fewest:
        raise UserError(
            f"config key distill.hard_negatives: {count} negatives are {each} of each other class, "
            f"of which the smallest has {fewest} images"
        )
    unit = F.normalize(features - features.mean(0))
    found = torch.empty(len(unit), each, classes, dtype=torch.int64, device=unit.device)
    for number, members in enumerate(rows):
        nearest = (unit @ unit[members].T).topk(each).indices
        found[:, :, number] = members[nearest]
    others = torch.arange(classes - 1, device=unit.device).repeat(len(unit), 1)
    others += others >= labels[:, None]
    return found.gather(2, others[:, None].expand(-1, each, -1)).flatten(1)[:, :count]


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
        self.layers = layers(config)
        if outputs is not None or not needs_teacher:
            self.views: Table | Live = Table(data, *chosen, self.normalize, outputs, device)
        else:
            self.views = Live(data, *chosen, self.normalize, teacher, device, self.layers)
        self.variants = self.views.variants
        torch.manual_seed(run.seed)
        self.model = build_student(config, images).to(device)
        # At most one kind of loss of crrcd_ext, its name and its table of settings; one for each
        # of the stages that meet.
        self.criteria = nn.ModuleList()
        self.hard: Tensor | None = None
        self.name = next((name for name in CONTRASTIVE if name in self.terms), "")
        if self.name:
            assert teacher is not None
            self.settings = getattr(config, self.name)
            self.widths = teacher.widths(self.layers)
            labels = chosen[1].to(device)
            stages = self.views.features().split(self.widths, 1)
            for width, features in zip(self.model.widths(self.layers), stages, strict=True):
                criterion = make_criterion(
                    CONTRASTIVE[self.name],
                    self.name,
                    self.settings,
                    student_dim=width,
                    teacher_dim=features.shape[1],
                    num_samples=self.count,
                    seed=run.seed,
                ).to(device)
                criterion.fill(
                    torch.arange(self.count, device=device),
                    features,
                    labels=labels if self.settings.exclude_same_label else None,
                )
                self.criteria.append(criterion)
            if config.distill.hard_negatives:
                if (
                    self.name == "crrcd"
                    or self.settings.keys == "live"
                    or self.settings.negatives == "all"
                ):
                    raise UserError(
                        "config key distill.hard_negatives: for crd and crcd, with a number of "
                        'negatives and keys other than "live"'
                    )
                self.hard = hard_negatives(stages[-1], labels, self.criteria[-1].num_negatives)
        edge, mode = data.student_size, data.resize
        self._validate = _Validation(
            prepared(images.train[parts.validation], self.normalize, edge, mode),
            images.train_labels[parts.validation],
            device,
        )

    def modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"model": self.model}
        for before, criterion in enumerate(reversed(self.criteria)):
            found["criterion" + (f"_{before}_before_last" if before else "")] = criterion
        return found

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        groups = [{"params": list(self.model.parameters()), "lr": lr, "weight_decay": weight_decay}]
        for criterion in self.criteria:
            groups += criterion.parameter_groups(lr, weight_decay, self.settings.lr_factor)
        return groups

    def loss(self, rows: Tensor, variants: Tensor, progress: float) -> dict[str, Tensor]:
        config = self.config
        batch = self.views.batch(rows, variants)
        stages = self.model.stage_features(batch.student, self.layers)
        logits = self.model.classifier(stages[-1])
        smoothing = config.optim.label_smoothing
        losses = {"ce": F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)}
        if "kd" in self.terms:
            weight = config.kd.weight * weight_factor(config.kd.schedule, progress)
            losses["kd"] = weight * kd_loss(
                self._matched(logits), batch.logits, config.kd.temperature
            )
        if self.criteria:
            weight = self.settings.weight * weight_factor(self.settings.schedule, progress)
            options = {"labels": batch.labels} if self.settings.exclude_same_label else {}
            if self.hard is not None:
                options["negative_index"] = self.hard[batch.rows]
            targets = batch.features.split(self.widths, 1)
            losses[self.name] = (weight / self.layers) * sum(
                criterion(self._matched(stage), target, batch.rows, **options)
                for criterion, stage, target in zip(self.criteria, stages, targets, strict=True)
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
        found = {}
        for before, criterion in enumerate(reversed(self.criteria)):
            prefix = self.name + (f"_{before}_before_last" if before else "")
            for key, value in criterion.diagnostics().items():
                found[f"{prefix}_{key}"] = value
        return found


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
