"""One step of a contrastive loss: from features to a scalar, and what it leaves changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crrcd_ext import functional
from crrcd_ext._check import check_weights
from crrcd_ext.modules import _checks, _counter
from crrcd_ext.modules.bank import Change, MemoryBank
from crrcd_ext.modules.cosines import Cosines
from crrcd_ext.modules.critic import Critic
from crrcd_ext.modules.heads import Statistics
from crrcd_ext.modules.normalizer import log_mean_exp_logit

SKIP_HINT = "; nonfinite='skip' skips such a step"
_UNLABELLED = torch.iinfo(torch.int64).min


class Step(NamedTuple):
    """A batch as the relations see it. What there is of banks comes in pairs: teacher's, student's.

    ``teacher`` and ``student`` [B, D] are the embeddings, ``selected`` the anchors' positions (None
    for all), ``own_rows`` the samples' rows of the banks for keys="bank", ``drawn`` the rows of the
    negatives (None for the whole bank), ``statistics`` the teacher's in this step (None for the
    running ones). What a step leaves behind for :meth:`ContrastiveLoss.diagnostics` has its loss,
    with the weights and the reduction that made it.
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
    weights: Tensor | None = None
    reduction: str = "mean"


class Side(NamedTuple):
    """A direction of the loss: its slot (0 for "student", 1 for "teacher"), its bank, and the
    operator's tensors."""

    slot: int
    bank: MemoryBank
    arguments: dict[str, Any]


class ContrastiveStep(Critic):
    """The step of :class:`crrcd_ext.modules.base.ContrastiveLoss`, which has what it works with."""

    OPERATOR: Callable[..., Tensor]
    COSINES: Callable[..., Cosines]
    PER_QUERY = False
    """Whether the operator takes negatives of each query's own, int64 [B, K]."""

    @property
    def num_negatives(self) -> int:
        """K: the number of candidates drawn for a step, for "all" that of the bank's rows."""
        if self.negatives != "all":
            return self.negatives
        return self.num_samples if self.capacity is None else self.capacity

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
        negative_index: Tensor | None = None,
        update: bool | None = None,
        weights: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss of one batch, and the update of the banks.

        Args:
            student_features: [B, Ds], floating; gets the gradient.
            teacher_features: [B, Dt], floating; taken as constants.
            index: int64 [B], the samples' ids in the data set.
            labels: int64 [B], the queries' classes for ``exclude_same_label`` (default: those of
                the data set).
            negative_index: int64 [K], or [B, K] for CRD and CRCD unless keys="live": the ids of
                the samples to take as negatives instead of drawn ones, K = ``negatives``; not with
                negatives="all" or ``capacity``. Masks apply to them too.
            update: whether the step changes banks, samplers, statistics and Zbar; default: in
                training mode. Without it every buffer stays as it is.
            weights: [B], floating: what each sample's losses are multiplied with, as query of its
                pairs; finite, without a gradient. The number of pairs that a mean divides by, the
                banks and Zbar do not know them.
            reduction: "mean" over the pairs, their "sum", or "none": [B], for each sample the sum
                over its pairs, one for each anchor that is not itself (CRD: its one pair). Where a
                gradient is wanted, "none" needs keys="stop_gradient" (CRD takes "bank" too), of
                CRRCD direction="student", as what makes the student's negatives learns, and no
                learned temperature or offset: "sum" and "mean" with weights do without these.

        Returns:
            0-dim loss, or [B] for "none": float32, or float64 for a float64 module. 0, with zero
            gradients, when no pair is left, as for a batch of one with self pairs off, or for an
            empty batch.

        Raises:
            ValueError: widths, shapes, devices, features that are not finite, labels that are
                missing.
            ValueError: weights or reduction as described above.
            TypeError: dtypes. IndexError: an id outside of [0, N).
            Nothing has changed then. On a GPU and under torch.compile values are asserted on the
            device instead.
        """
        update = self.training if update is None else bool(update)
        index, query_label = self._check_batch(student_features, teacher_features, index, labels)
        size = len(index)
        _checks.choice(self.NAME, "reduction", reduction, ("mean", "sum", "none"))
        check_weights(self.NAME, weights, ("B",), {"B": size}, student_features)
        if negative_index is not None:
            negative_index = self._check_negative_index(negative_index, size)
        if size == 0:
            dtype = torch.promote_types(self._dtype(student_features), torch.float32)
            return student_features.sum(-1 if reduction == "none" else None).to(dtype)
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

        chosen = {
            "index": index,
            "query_label": query_label,
            "selected": self._select_anchors(size),
            "own_rows": tuple(self._own_rows(bank, index, dtype) for bank in self._banks),
            "drawn": tuple(
                self._draw(bank, index, query_label, negative_index) for bank in self._banks
            ),
        }
        step = Step(e_t, e_s, **chosen, statistics=teacher_statistics)
        values = (teacher if self.keys == "live" else e_t.detach(), e_s.detach())
        sides = self._sides(step)
        if reduction == "none":
            self._check_unreduced(sides)
        changes: list[Change | None] = [None] * len(sides)
        before = []
        if update:
            changes = [side.bank.change(index, values[side.slot]) for side in sides]
        if update and finite is not None:
            before = [
                side.bank.rows[change[0]] for side, change in zip(sides, changes, strict=True)
            ]
        log_zbar: dict[int, Tensor] = {}
        parts = [
            self._contrast(side, size, change, log_zbar, weights, reduction)
            for side, change in zip(sides, changes, strict=True)
        ]
        loss = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if finite is not None:
            loss = torch.where(finite, loss, torch.zeros_like(loss))
        if update:
            self._commit(finite, (teacher_statistics, student_statistics), log_zbar)
            if self.masked_steps is not None:
                nothing_left = self._nothing_left(sides)
                self.masked_steps.add_(nothing_left if finite is None else nothing_left & finite)
            if finite is not None:
                for side, change, rows in zip(sides, changes, before, strict=True):
                    bank, written = side.bank.rows, change[0]
                    bank.index_copy_(0, written, torch.where(finite, bank[written], rows))
            for side in sides:
                side.bank.record_(index, finite)
        # The statistics are the running ones by now. torch 2.6 traces no _replace.
        embeddings = e_t.detach(), e_s.detach()
        kept = None if weights is None else weights.clone()
        result = {"loss": loss.detach(), "weights": kept, "reduction": reduction}
        self._last = Step(*embeddings, **chosen, statistics=None, **result)
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

    def _check_negative_index(self, given: object, size: int) -> Tensor:
        """``given`` as int64 [K] or [B, K], checked."""
        name, argument, count = self.NAME, "negative_index", self.num_negatives
        refused = ""
        if self.negatives == "all":
            refused = "negatives='all'"
        elif self.capacity is not None:
            refused = f"capacity={self.capacity}"
        if refused:
            _checks.fail(ValueError, name, argument, f"None with {refused}", "a value")
        shapes = [(count,)]
        if self.PER_QUERY and self.keys != "live":
            shapes.append((size, count))
        expected = " or ".join(str(list(shape)) for shape in shapes)
        if not isinstance(given, Tensor):
            got = type(given).__name__
            _checks.fail(TypeError, name, argument, f"an int64 tensor {expected}", got)
        if tuple(given.shape) not in shapes:
            _checks.fail(ValueError, name, argument, f"shape {expected}", list(given.shape))
        flat = given.reshape(-1)
        flat = _checks.integers(name, argument, flat, flat.numel(), self.step.device)
        _checks.in_range(name, argument, flat, self.num_samples)
        return flat.view(given.shape)

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

    def _draw(
        self,
        bank: MemoryBank | None,
        index: Tensor,
        label: Tensor | None,
        given: Tensor | None = None,
    ) -> Tensor | None:
        """int64 [K] or [B, K], the rows of this step's negatives; None for the whole bank."""
        if bank is None:
            return None
        if given is not None:
            return given
        if self.negatives == "all":
            return None if bank.full else bank.draw(None)
        if self.negative_sampling == "shared" and not self.distinct:
            return bank.draw(self.negatives)
        options: dict[str, Any] = {"distinct": True} if self.distinct else {}
        if self.exclusion == "draw":
            options["exclude"] = index
            if self.class_table is not None:
                options.update(labels=label, classes=self.class_table)
        elif self.negative_sampling == "per_sample":
            options["queries"] = len(index)
        return bank.draw(self.negatives, **options)

    def _anchors(self, step: Step) -> dict[str, Any]:
        """The anchors' embeddings, and what tells self pairs from others."""
        anchor, anchor_id = step.teacher, step.index
        if step.selected is not None:
            anchor = anchor.index_select(0, step.selected)
            anchor_id = anchor_id.index_select(0, step.selected)
        return {"anchor": anchor, "anchor_id": anchor_id, "self_pairs": self.self_pairs}

    def _keys(self, slot: int, step: Step) -> dict[str, Any]:
        """The negatives of a direction as the operators take them: rows of a bank, and masks."""
        bank, drawn = self._banks[slot], step.drawn[slot]
        rows = bank.rows
        key_id, query_label, key_label = bank.masks(step.index, step.query_label, self.labels)
        if slot == 0 and self.keys == "live":
            if drawn is not None:
                rows = rows.index_select(0, drawn)
                key_id = drawn if key_id is None else key_id.index_select(0, drawn)
                key_label = None if key_label is None else key_label.index_select(0, drawn)
            rows, drawn = self.teacher_head(rows, step.statistics).to(step.teacher.dtype), None
        return {
            "bank": rows,
            "index": drawn,
            "query_id": step.index,
            "key_id": key_id,
            "query_label": query_label,
            "key_label": key_label,
            "excluded": self._similar(slot, step, rows, drawn),
        }

    @torch.no_grad()
    def _similar(self, slot: int, step: Step, rows: Tensor, drawn: Tensor | None) -> Tensor | None:
        """The bits of the negatives that ``exclude_similar`` leaves out, by the teacher's eyes."""
        if self.exclude_similar is None:
            return None
        if slot == 1:
            # Of the student's negatives, the same samples' rows of the teacher's bank.
            rows = self.teacher_bank.rows
            if self.keys == "live":
                rows = rows if drawn is None else rows.index_select(0, drawn)
                rows, drawn = self.teacher_head(rows, step.statistics).to(step.teacher.dtype), None
        threshold = self.exclude_similar
        return functional.similar_mask(
            step.teacher.detach(), rows.detach(), drawn, threshold=threshold, backend=self.backend
        )

    def _nothing_left(self, sides: list[Side]) -> Tensor:
        """Whether ``exclude_similar`` masks every negative of the step, bool []."""
        words, rest = divmod(self.num_negatives, 32)
        masked = []
        for side in sides:
            mask = side.arguments["excluded"]
            masked += [(mask[:, :words] == -1).all(), (mask[:, words:] == (1 << rest) - 1).all()]
        return torch.stack(masked).all()

    def _check_unreduced(self, sides: list[Side]) -> None:
        """Refuses reduction="none" where something that all losses share gets a gradient."""
        if not torch.is_grad_enabled():
            return
        shared = [("learnable_temperature", self.log_scale), ("learnable_offset", self.offset)]
        for side in sides:
            shared += [(f"keys={self.keys!r}", side.arguments["bank"])]
            anchor = side.arguments.get("anchor")
            shared += [(f"keys={self.keys!r}, direction={self.direction!r}", anchor)]
            shared += [(f"direction={self.direction!r}", side.arguments.get("weight"))]
        for option, x in shared:
            if x is not None and x.requires_grad:
                expected = f"'mean' or 'sum', which take weights, with {option}"
                _checks.fail(ValueError, self.NAME, "reduction", expected, "'none'")

    def _contrast(
        self,
        side: Side,
        size: int,
        change: Change | None,
        log_zbar: dict,
        weights: Tensor | None,
        reduction: str,
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
            weights=weights,
            reduction=reduction,
            update=change if fused else None,
            backend=self.backend,
        )
        if change is not None and not fused:
            bank.apply_(change)
        return loss if loss.dim() < 2 else loss.sum(0)  # a sample's pairs, over the anchors

    def _offset(self, side: Side, size: int, log_zbar: dict) -> Tensor | float:
        """beta; where this batch has to give Zbar, its logarithm goes into ``log_zbar``."""
        if not self._awaits_zbar():
            return self._beta(self.log_zbar[side.slot])
        expected = "a training step, whose batch gives Zbar,"
        _checks.before_capture(self.NAME, "normalizer", expected, self.step.device)
        if not self._has_pair(size) or not side.bank.started:
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
