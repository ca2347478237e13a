"""What the contrastive losses share: a step from features to a loss, and all that a run keeps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crrcd_ext.modules import _checks, _counter, diagnostics, filling
from crrcd_ext.modules.bank import MemoryBank
from crrcd_ext.modules.cosines import Cosines
from crrcd_ext.modules.critic import Critic
from crrcd_ext.modules.heads import EmbeddingHead, Statistics
from crrcd_ext.modules.normalizer import log_mean_exp_logit

SKIP_HINT = "; nonfinite='skip' skips such a step"
_UNLABELLED = torch.iinfo(torch.int64).min


class Step(NamedTuple):
    """A batch as the relations see it. What there is of banks comes in pairs: teacher's, student's.

    ``teacher`` and ``student`` [B, D] are the embeddings, ``selected`` the anchors' positions (None
    for all), ``own_rows`` the samples' rows of the banks for keys="bank", ``drawn`` the rows of the
    negatives (None for the whole bank), ``statistics`` the teacher's in this step (None for the
    running ones). What a step leaves behind for :meth:`ContrastiveLoss.diagnostics` has its loss.
    """

    teacher: Tensor
    student: Tensor
    index: Tensor
    query_label: Tensor | None
    selected: Tensor | None
    own_rows: tuple[Tensor | None, Tensor | None]
    drawn: tuple[Tensor | None, Tensor | None]
    statistics: Statistics | None
    loss: Tensor | None = None


class Side(NamedTuple):
    """A direction of the loss: its slot (0 for "student", 1 for "teacher"), its bank, and the
    operator's tensors."""

    slot: int
    bank: MemoryBank
    arguments: dict[str, Any]


class ContrastiveLoss(Critic):
    """Base of the losses: heads, banks, directions, masks, normaliser, commit, saving.

    A subclass says what its relation is: ``OPERATOR`` and ``COSINES``, the function of
    :mod:`crrcd_ext.functional` and its twin in :mod:`crrcd_ext.modules.cosines`; :meth:`_sides`,
    their tensors for each direction; :meth:`_relations`, what :meth:`diagnostics` looks at.
    ``VECTORS`` names these in its warnings.
    """

    NAME = "ContrastiveLoss"
    OPERATOR: Callable[..., Tensor]
    COSINES: Callable[..., Cosines]
    VECTORS = "relation vectors"

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int,
        *,
        negatives: int | str,
        embedding_dim: int,
        temperature: float,
        momentum: float,
        direction: str,
        keys: str,
        normalizer: str | float,
        objective: str,
        head: str,
        standardize: bool,
        exclude_same_label: bool,
        labels: Tensor | None,
        learnable_temperature: bool,
        learnable_offset: bool,
        bank_dtype: torch.dtype,
        nonfinite: str,
        seed: int,
        backend: str | None,
        anchors: int | None = None,
        self_pairs: bool = False,
    ) -> None:
        for name, value in (
            ("student_dim", student_dim),
            ("teacher_dim", teacher_dim),
            ("num_samples", num_samples),
            ("embedding_dim", embedding_dim),
        ):
            _checks.positive_int(self.NAME, name, value)
        if anchors is not None:
            _checks.positive_int(self.NAME, "anchors", anchors)
        _checks.choice(self.NAME, "direction", direction, ("student", "teacher", "both"))
        _checks.choice(self.NAME, "keys", keys, ("stop_gradient", "live", "bank"))
        _checks.choice(self.NAME, "head", head, ("linear", "identity"))
        _checks.choice(self.NAME, "nonfinite", nonfinite, ("error", "skip"))
        _checks.negatives(self.NAME, negatives, num_samples)
        super().__init__(
            temperature, normalizer, objective, learnable_temperature, learnable_offset
        )
        self.num_samples = num_samples
        self.negatives = negatives
        self.direction = direction
        self.keys = keys
        self.anchors = anchors
        self.self_pairs = bool(self_pairs)
        self.exclude_same_label = bool(exclude_same_label)
        self.nonfinite = nonfinite
        self.backend = backend

        # The student's features move while it learns, so its running statistics have to forget.
        self.student_head = EmbeddingHead(student_dim, embedding_dim, head, standardize, floor=0.1)
        self.teacher_head = EmbeddingHead(teacher_dim, embedding_dim, head, standardize)
        if not self._teacher_learns():
            self.teacher_head.requires_grad_(False)

        live = keys == "live"
        bank = {"dtype": bank_dtype, "momentum": momentum, "backend": backend}
        width = teacher_dim if live else self.teacher_head.out_dim
        self.teacher_bank = self.student_bank = None
        if direction != "teacher":
            self.teacher_bank = MemoryBank(
                num_samples, width, normalize=not live, seed=seed, **bank
            )
        if direction != "student":
            width = self.student_head.out_dim
            self.student_bank = MemoryBank(num_samples, width, seed=seed + 1, **bank)

        self.register_buffer("seed", torch.tensor(int(seed) + 2, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("labels", None)
        self.labelled = False
        if self.exclude_same_label:
            self.labels = torch.full((num_samples,), -1, dtype=torch.int64)
        if labels is not None:
            device = labels.device if isinstance(labels, Tensor) else torch.device("cpu")
            labels = _checks.integers(self.NAME, "labels", labels, num_samples, device)
            if self.exclude_same_label:
                self.labels.copy_(labels)
                self.labelled = True
        self._last: Step | None = None
        self._warned: set[str] = set()

    @property
    def num_negatives(self) -> int:
        """K: the number of candidates drawn for a step, N for "all"."""
        return self.num_samples if self.negatives == "all" else self.negatives

    @property
    def _banks(self) -> tuple[MemoryBank | None, MemoryBank | None]:
        """The bank of each direction, in the order of the slots."""
        return self.teacher_bank, self.student_bank

    # ------------------------------------------------------------------ what a subclass says

    def _sides(self, step: Step) -> list[Side]:
        """The directions of the loss: queries, positives and negatives of ``step``."""
        raise NotImplementedError

    def _relations(self, step: Step) -> tuple[Tensor, Tensor]:
        """[A, B, R], the vectors to look at: the student's and the teacher's."""
        raise NotImplementedError

    def _parts(self) -> tuple[nn.Module, ...]:
        """The modules whose parameters :meth:`parameter_groups` gives."""
        return self.student_head, self.teacher_head

    def _dtype(self, student: Tensor) -> torch.dtype:
        """The embeddings' dtype, from the student's embeddings [B, D] as the head leaves them."""
        linear = self.student_head.linear
        return student.dtype if linear is None else linear.weight.dtype

    def _teacher_learns(self) -> bool:
        """Whether the teacher's side gets a gradient."""
        return self.keys != "stop_gradient"

    def _has_pair(self, size: int) -> bool:
        """Whether a batch of ``size`` may have a pair."""
        return size > 1 or self.self_pairs

    # ------------------------------------------------------------------ the step

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        index: Tensor,
        *,
        labels: Tensor | None = None,
        update: bool | None = None,
    ) -> Tensor:
        """The loss of one batch, and the update of the banks.

        Args:
            student_features: [B, Ds], floating; gets the gradient.
            teacher_features: [B, Dt], floating; taken as constants.
            index: int64 [B], the samples' ids in the data set.
            labels: int64 [B], the queries' classes for ``exclude_same_label`` (default: those of
                the data set).
            update: whether the step changes banks, samplers, statistics and Zbar; default: in
                training mode. Without it every buffer stays as it is.

        Returns:
            0-dim loss: float32, or float64 for a float64 module. 0, with zero gradients, when no
            pair is left, as for a batch of one with self pairs off, or for an empty batch.

        Raises:
            ValueError: widths, shapes, devices, features that are not finite, labels that are
                missing.
            TypeError: dtypes. IndexError: an id outside of [0, N).
            Nothing has changed then. On a GPU and under torch.compile values are asserted on the
            device instead.
        """
        update = self.training if update is None else bool(update)
        index, query_label = self._check_batch(student_features, teacher_features, index, labels)
        size = len(index)
        if size == 0:
            dtype = torch.promote_types(self._dtype(student_features), torch.float32)
            return student_features.sum().to(dtype)
        student, teacher, finite = self._screen(student_features, teacher_features.detach())

        teacher_statistics = self._teacher_statistics(teacher, update)
        student_statistics = None
        if self.student_head.standardize is not None and update and size > 1:
            student_statistics = self.student_head.standardize.merged(student.detach())
        e_s = self.student_head(student, batch=self.training and size > 1)
        dtype = self._dtype(e_s)
        e_s = e_s.to(dtype)
        with self._teacher_gradient():
            e_t = self.teacher_head(teacher, teacher_statistics).to(dtype)

        step = Step(
            teacher=e_t,
            student=e_s,
            index=index,
            query_label=query_label,
            selected=self._select_anchors(size),
            own_rows=tuple(self._own_rows(bank, index, dtype) for bank in self._banks),
            drawn=tuple(self._draw(bank) for bank in self._banks),
            statistics=teacher_statistics,
        )
        values = (teacher if self.keys == "live" else e_t.detach(), e_s.detach())
        sides = self._sides(step)
        before = []
        if update and finite is not None:
            before = [side.bank.rows.index_select(0, index) for side in sides]
        log_zbar: dict[int, Tensor] = {}
        parts = []
        for side in sides:
            change = (index, values[side.slot]) if update else None
            parts.append(self._contrast(side, size, change, log_zbar))
        loss = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if finite is not None:
            loss = torch.where(finite, loss, torch.zeros_like(loss))
        if update:
            self._commit(finite, (teacher_statistics, student_statistics), log_zbar)
            for side, rows in zip(sides, before, strict=False):
                bank = side.bank.rows
                bank.index_copy_(0, index, torch.where(finite, bank.index_select(0, index), rows))
            # They are the running ones by now.
            step = step._replace(statistics=None)
        self._last = step._replace(teacher=e_t.detach(), student=e_s.detach(), loss=loss.detach())
        return loss

    def _check_batch(
        self, student: Tensor, teacher: Tensor, index: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The ids as int64 and, for ``exclude_same_label``, the queries' labels, checked."""
        name, device = self.NAME, self.step.device
        _checks.features(name, "student_features", student, self.student_head.in_dim, device)
        _checks.features(name, "teacher_features", teacher, self.teacher_head.in_dim, device)
        size = student.shape[0]
        if teacher.shape[0] != size:
            expected = f"{size} rows as student_features"
            _checks.fail(ValueError, name, "teacher_features", expected, teacher.shape[0])
        index = _checks.integers(name, "index", index, size, device)
        _checks.in_range(name, "index", index, self.num_samples)
        if labels is not None:
            labels = _checks.integers(name, "labels", labels, size, device)
        if not self.exclude_same_label:
            return index, None
        if not self.labelled:
            raise ValueError(
                f"crrcd_ext.{name}: labels: expected the data set's labels, int64 "
                f"[{self.num_samples}], for exclude_same_label=True, got None; give them to the "
                "constructor or to fill(...)"
            )
        labels = self.labels.index_select(0, index) if labels is None else labels
        # A query of unknown class must not match rows of unknown class.
        return index, labels.masked_fill(labels < 0, _UNLABELLED)

    def _screen(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The features, zeroed in a step to skip; for "skip" whether all are finite (bool [])."""
        if self.nonfinite == "error":
            _checks.finite(self.NAME, "student_features", student, SKIP_HINT)
            _checks.finite(self.NAME, "teacher_features", teacher, SKIP_HINT)
            return student, teacher, None
        finite = torch.isfinite(student.detach()).all() & torch.isfinite(teacher).all()
        zero = student.new_zeros(())
        return torch.where(finite, student, zero), torch.where(finite, teacher, zero), finite

    def _teacher_gradient(self) -> torch.set_grad_enabled:
        """Context of what is computed on the teacher's side."""
        return torch.set_grad_enabled(self._teacher_learns() and torch.is_grad_enabled())

    def _teacher_statistics(self, teacher: Tensor, update: bool) -> Statistics | None:
        standardize = self.teacher_head.standardize
        if standardize is None or standardize.fixed:
            return None
        return standardize.merged(teacher) if update else None

    def _select_anchors(self, size: int) -> Tensor | None:
        """int64 [A], this step's anchors among the batch's rows; None for all."""
        if self.anchors is None or self.anchors >= size:
            return None
        return _counter.distinct_index(self.seed, self.step, self.anchors, size)

    def _own_rows(self, bank: MemoryBank | None, index: Tensor, dtype) -> Tensor | None:
        if bank is None or self.keys != "bank":
            return None
        return bank.rows.index_select(0, index).to(dtype)

    def _draw(self, bank: MemoryBank | None) -> Tensor | None:
        """int64 [K], the rows of this step's negatives; None for the whole bank."""
        return None if bank is None or self.negatives == "all" else bank.draw(self.negatives)

    def _anchors(self, step: Step) -> dict[str, Any]:
        """The anchors' embeddings, and what tells self pairs from others."""
        anchor, anchor_id = step.teacher, step.index
        if step.selected is not None:
            anchor = anchor.index_select(0, step.selected)
            anchor_id = anchor_id.index_select(0, step.selected)
        return {"anchor": anchor, "anchor_id": anchor_id, "self_pairs": self.self_pairs}

    def _keys(self, slot: int, step: Step) -> dict[str, Any]:
        """The negatives of a direction as the operators take them: rows of a bank, and masks."""
        rows, drawn, key_id, key_label = self._banks[slot].rows, step.drawn[slot], None, None
        if step.query_label is not None:
            key_label = self.labels
        if slot == 0 and self.keys == "live":
            if drawn is not None:
                rows = rows.index_select(0, drawn)
                key_id = drawn
                key_label = None if key_label is None else key_label.index_select(0, drawn)
            rows, drawn = self.teacher_head(rows, step.statistics).to(step.teacher.dtype), None
        return {
            "bank": rows,
            "index": drawn,
            "query_id": step.index,
            "key_id": key_id,
            "query_label": step.query_label,
            "key_label": key_label,
        }

    def _contrast(
        self, side: Side, size: int, change: tuple[Tensor, Tensor] | None, log_zbar: dict
    ) -> Tensor:
        """One direction's loss and its bank's update; a new log Zbar goes into ``log_zbar``."""
        bank = side.bank
        # Live keys are embedded copies of rows: their bank has to be updated on its own.
        fused = change is not None and side.arguments["bank"] is bank.rows
        loss = type(self).OPERATOR(
            **side.arguments,
            scale=self.scale(),
            offset=self._offset(side, size, log_zbar),
            objective=self.objective,
            update=(*change, bank.momentum, bank.normalize) if fused else None,
            backend=self.backend,
        )
        if change is not None and not fused:
            bank.update_(*change)
        return loss

    def _offset(self, side: Side, size: int, log_zbar: dict) -> Tensor | float:
        """beta; where this batch has to give Zbar, its logarithm goes into ``log_zbar``."""
        if not self._awaits_zbar():
            return self._beta(self.log_zbar[side.slot])
        if not self._has_pair(size):
            return self._beta(0.0)
        query = side.arguments["query"]
        with torch.autocast(query.device.type, enabled=False), torch.no_grad():
            fresh = log_mean_exp_logit(self._cosines(side), self.scale()).to(torch.float64)
        log_zbar[side.slot] = fresh
        # Without a pair there is no mean, and a loss that does not depend on it.
        return self._beta(torch.where(fresh.isfinite(), fresh, 0.0))

    def _cosines(self, side: Side) -> Cosines:
        return type(self).COSINES(**side.arguments, backend=self.backend)

    @torch.no_grad()
    def _commit(self, finite: Tensor | None, statistics, log_zbar: dict) -> None:
        """Store what a step changes beside the banks' rows; nothing, in a step to skip."""
        changes = []
        for head, merged in zip((self.teacher_head, self.student_head), statistics, strict=True):
            if merged is not None:
                changes += zip(head.standardize.statistics, merged, strict=True)
        for counter in (self, *self._banks):
            if counter is not None:
                changes.append((counter.step, counter.step + 1))
        for buffer, value in changes:
            buffer.copy_(value if finite is None else torch.where(finite, value, buffer))
        if finite is not None:
            self.skipped_steps.add_(~finite)
        if log_zbar:
            self._commit_normalizer(finite, log_zbar)

    # ------------------------------------------------------------------ before training

    @torch.no_grad()
    def fill(
        self,
        loader_or_index: Iterable | Tensor,
        features: Tensor | None = None,
        labels: Tensor | None = None,
        encoder: Callable[[Any], Tensor] | None = None,
        *,
        statistics: bool = True,
    ) -> int:
        """Start the teacher's side from the teacher: standardiser, then bank rows.

        The standardiser's mean and variance become those of the features, for good.
        ``fill(index, features)`` takes int64 [M] ids and their teacher features [M, Dt].
        ``fill(loader)`` takes pairs (features, index), ``fill(loader, encoder=teacher)`` pairs
        (images, index), in one pass; images are moved to the module's device, an encoder module
        runs in eval mode, and the features wait in host memory for the statistics. To fill in
        pieces, call the first form, with ``statistics=False`` for all pieces but the first.

        Args:
            labels: with an index int64 [M], beside it; with a loader int64 [N], of the data set.
                Kept for ``exclude_same_label``.
            statistics: False leaves the standardiser as it is.

        Returns:
            The number of different rows written (0 where ``direction="teacher"`` has no teacher
            bank).

        Raises:
            TypeError, ValueError, IndexError: as :meth:`forward`, before anything is changed.
        """
        return filling.fill(self, loader_or_index, features, labels, encoder, statistics)

    def parameter_groups(
        self, lr: float, weight_decay: float = 0.0, factor: float = 0.1
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: heads and relations at ``lr * factor``, if trained.

        At the student's own learning rate the relation tends to collapse to a constant. Temperature
        and offset, where they are learned, form a second group without weight decay.
        """
        scalars = [p for p in (self.log_scale, self.offset) if p is not None and p.requires_grad]
        rest = [p for part in self._parts() for p in part.parameters() if p.requires_grad]
        groups = [(rest, weight_decay), (scalars, 0.0)]
        return [
            {"params": params, "lr": lr * factor, "weight_decay": decay}
            for params, decay in groups
            if params
        ]

    # ------------------------------------------------------------------ looking at it

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """What the last step looked like; waits for the device, which no step does on its own.

        Returns:
            ``loss``; ``no_information_loss``, the least loss of a critic that tells nothing apart
            (doubled for "both"); ``relation_variance`` of the student's relation vectors over b and
            ``teacher_relation_variance`` of the teacher's, means over dimensions;
            ``effective_rank`` of the student's; ``positive_cosine`` and ``negative_cosine`` (of at
            most 256 negatives); ``temperature``; ``offset``, which is beta; ``skipped_steps``.
            Relations are recomputed with the parameters as they are now. Cosines are NaN where no
            pair is kept.

        Warns (UserWarning), once each, when the relation has collapsed to a constant or when the
        loss seems to be solved by telling fresh rows from stale ones.

        Raises:
            RuntimeError: before the first step.
        """
        if self._last is None:
            raise RuntimeError(
                f"crrcd_ext.{self.NAME}.diagnostics: expected a step before, got none"
            )
        values, width = diagnostics.measure(self, self._last)
        if diagnostics.is_constant(values, width):
            self._warn("constant", diagnostics.CONSTANT_RELATION, values)
        if diagnostics.is_shortcut(values):
            self._warn("shortcut", diagnostics.FRESHNESS_SHORTCUT, values)
        return values

    def current_offset(self) -> float:
        """beta, for "both" the mean of the two; NaN before the first batch has given Zbar."""
        pairs = zip(self.log_zbar.tolist(), self._banks, strict=True)
        used = [z for z, bank in pairs if bank is not None]
        return float(self._beta(sum(used) / len(used)))

    def _warn(self, name: str, text: str, values: dict[str, float]) -> None:
        if name not in self._warned:
            self._warned.add(name)
            text = text.format(name=self.NAME, vectors=self.VECTORS, **values)
            # Past this method, diagnostics and its no_grad wrapper: the caller's line.
            warnings.warn(text, UserWarning, stacklevel=4)

    def _shown(self) -> dict[str, Any]:
        """What repr shows."""
        return {
            "student_dim": self.student_head.in_dim,
            "teacher_dim": self.teacher_head.in_dim,
            "num_samples": self.num_samples,
            "negatives": self.negatives,
            "temperature": self.temperature,
            "direction": self.direction,
            "keys": self.keys,
            "normalizer": self.normalizer,
            "objective": self.objective,
            "exclude_same_label": self.exclude_same_label,
            "learnable_temperature": self.log_scale is not None,
            "learnable_offset": self.offset is not None,
            "nonfinite": self.nonfinite,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._shown().items())

    # ------------------------------------------------------------------ saving

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # Before anything of this module is copied, its banks included, which load after it.
        for name in ("teacher_bank", "student_bank"):
            bank = getattr(self, name)
            if bank is not None:
                bank.check_size(state_dict, f"{prefix}{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        labels = state_dict.get(prefix + "labels")
        if labels is not None and self.labels is not None:
            self.labelled = bool((labels >= 0).any())

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry the state of the run, not the tensors of its last batch.
        return {**self.__dict__, "_last": None}
