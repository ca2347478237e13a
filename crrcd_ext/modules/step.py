"""One step of a contrastive loss: from features to a scalar, and what it leaves changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from crrcd_ext import functional
from crrcd_ext._check import capturing, check_weights
from crrcd_ext.modules import _checks, _counter, _once
from crrcd_ext.modules.accumulation import Waiting, joined, with_moments
from crrcd_ext.modules.bank import Change, MemoryBank
from crrcd_ext.modules.cosines import Cosines
from crrcd_ext.modules.critic import Critic, Zbar
from crrcd_ext.modules.heads import Statistics
from crrcd_ext.modules.normalizer import FOLLOWED_NEGATIVES, MAX_NEGATIVES, log_mean_exp_logit

SKIP_HINT = "; nonfinite='skip' skips such a step"
_UNLABELLED = torch.iinfo(torch.int64).min


class Step(NamedTuple):
    """A batch as the relations see it. What there is of banks comes in pairs: teacher's, student's.

    ``teacher`` and ``student`` [B, D] are the embeddings, ``selected`` the anchors' positions (None
    for all), ``anchors`` embeddings [A, D] and ids of others in their place, ``own_rows`` the
    samples' rows of the banks for keys="bank", ``drawn`` the rows of the negatives (None for the
    whole bank), ``statistics`` the teacher's in this step (None for the running ones). What a step
    leaves behind for :meth:`ContrastiveLoss.diagnostics` has its loss, with the weights and the
    reduction that made it.
    """

    teacher: Tensor
    student: Tensor
    index: Tensor
    query_label: Tensor | None
    selected: Tensor | None
    anchors: tuple[Tensor, Tensor] | None
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


class Stored(NamedTuple):
    """A bank, its update in a step and, where the step may be skipped, the rows before it."""

    bank: MemoryBank
    change: Change
    rows: Tensor | None


def _own_copy(function: FunctionType, name: str) -> FunctionType:
    """``function`` with a code object of its own, which tracebacks call ``name``."""
    code = function.__code__.replace(co_name=name)
    copied = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return update_wrapper(copied, function)


class ContrastiveStep(Critic):
    """The step of :class:`crrcd_ext.modules.base.ContrastiveLoss`, which has what it works with."""

    OPERATOR: Callable[..., Tensor]
    COSINES: Callable[..., Cosines]
    RELATES = True
    """Whether the loss is one of relations to anchors."""
    PER_QUERY = False
    """Whether the operator takes negatives of each query's own, int64 [B, K]."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" not in cls.__dict__:
            # torch.compile counts by code object how often it compiled anew, and stops at a limit:
            # losses of several kinds in one process shall not use up each other's.
            cls.forward = _own_copy(cls.forward, f"{cls.__name__}.forward")

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

    def _watch(self, finite: Tensor | None) -> None:
        """Now and then, look at what an updating step has left in ``_last``."""
        raise NotImplementedError

    def _has_pair(self, size: int, anchors: int) -> bool:
        """Whether a batch of ``size`` may have a pair, with so many ``anchors`` given."""
        return size > 0 and (size > 1 or anchors > 1 or self.self_pairs)

    # ------------------------------------------------------------------ the step

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        index: Tensor,
        *,
        labels: Tensor | None = None,
        negative_index: Tensor | None = None,
        update: bool | str | None = None,
        weights: Tensor | None = None,
        reduction: str = "mean",
        anchors: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The loss of one batch, and the update of the banks.

        Args:
            student_features: [B, Ds], floating; gets the gradient.
            teacher_features: [B, Dt], floating; taken as constants.
            index: int64 [B], the samples' ids in the data set.
            labels: int64 [B], the queries' classes for ``exclude_same_label`` (default: those of
                the data set).
            negative_index: int64 [K], or [B, K] for CRD and CRCD unless keys="live": the ids of
                the samples to take as negatives instead of drawn ones, K = ``negatives``; with
                ``capacity`` the rows of the queue that hold them (whose ids are the queue's
                ``ids``; for direction "both" of either queue), which have to be written by now.
                Not with negatives="all". Masks apply to them too.
            update: whether the step changes banks, samplers, statistics and Zbar; default: in
                training mode. Without it every buffer stays as it is. "later": as one of several
                micro-batches of a step, of whose changes :meth:`commit` makes one.
            weights: [B], floating: what each sample's losses are multiplied with, as query of its
                pairs; finite, without a gradient. The number of pairs that a mean divides by, the
                banks and Zbar do not know them.
            reduction: "mean" over the pairs, their "sum", or "none": [B], for each sample the sum
                over its pairs, one for each anchor that is not itself (CRD: its one pair). Where a
                gradient is wanted, "none" needs keys="stop_gradient" (CRD takes "bank" too), of
                CRRCD direction="student", as what makes the student's negatives learns, and no
                learned temperature or offset: "sum" and "mean" with weights do without these.
            anchors: teacher's features [A, Dt] and ids, int64 [A], of the samples to take as
                anchors instead of some of the batch; any number, of the batch or not. With those
                of the whole batch relations between its micro-batches are not lost. Not of CRD,
                which has none.

        Returns:
            0-dim loss, or [B] for "none": float32, or float64 for a float64 module. 0, with zero
            gradients for every parameter that has one otherwise, when no pair is left, as for a
            batch of one with self pairs off, or for an empty batch, which changes nothing either.

        Raises:
            ValueError: widths, shapes, devices, features that are not finite or, in an update of
                running statistics, beyond 2.6e15 (1e123 in float64), whose squares overflow;
                labels that are missing, weights or a reduction other than described above.
            TypeError: dtypes. IndexError: an id outside of [0, N), a row of the queue that is not
                written.
            RuntimeError: an update within a backward pass, where torch.utils.checkpoint runs what
                it holds again (without an update the second run repeats the first, as long as no
                step has come between them); in a process of several, within a
                DistributedDataParallel that broadcasts buffers, which would overwrite the banks;
                within DataParallel, which would lose them.
            Nothing has changed then. On a GPU and under torch.compile values are asserted on the
            device instead.
        """
        later = isinstance(update, str)
        if later:
            _checks.choice(self.NAME, "update", update, ("later",))
        update = (self.training if update is None else bool(update)) and not later
        index, query_label = self._check_batch(student_features, teacher_features, index, labels)
        size = len(index)
        _checks.choice(self.NAME, "reduction", reduction, functional.REDUCTIONS)
        check_weights(self.NAME, weights, ("B",), {"B": size}, student_features)
        if negative_index is not None:
            negative_index = self._check_negative_index(negative_index, size)
        if anchors is not None:
            anchors = self._check_anchors(anchors)
        # An empty batch goes the same way, so that the same parameters get a gradient, of zero.
        update, later = update and size > 0, later and size > 0
        if update or later:
            index = _once.check(self.NAME, self, self.step, index)
        if update:
            self._check_nothing_waits()
        if later and capturing(index.device):
            # A replay would compute the loss, and leave nothing for commit.
            expected = "a step, or none, while a CUDA graph is captured"
            _checks.fail(RuntimeError, self.NAME, "update", expected, "'later'")
        student, teacher, anchor, finite = self._screen(
            student_features,
            teacher_features.detach(),
            None if anchors is None else anchors[0].detach(),
            update or later,
        )

        waiting = self._waiting if later else None
        teacher_moments = student_moments = teacher_statistics = None
        if update or later:
            teacher_moments, student_moments = self._moments(waiting, teacher, student.detach())
        if teacher_moments is not None:
            teacher_statistics = self.teacher_head.standardize.taken_in(teacher_moments)
        e_s = self.student_head(student, batch=self.training and size > 1)
        dtype = self._dtype(e_s)
        e_s = e_s.to(dtype)
        with self._teacher_gradient():
            e_t = self.teacher_head(teacher, teacher_statistics).to(dtype)
            if anchors is not None:
                anchors = self.teacher_head(anchor, teacher_statistics).to(dtype), anchors[1]

        chosen = {
            "index": index,
            "query_label": query_label,
            "selected": None if anchors is not None else self._select_anchors(size),
            "anchors": anchors,
            "own_rows": tuple(self._own_rows(bank, index, dtype) for bank in self._banks),
            "drawn": tuple(
                self._draw(bank, index, query_label, negative_index, waiting)
                for bank in self._banks
            ),
        }
        step = Step(e_t, e_s, **chosen, statistics=teacher_statistics)
        values = (teacher if self.keys == "live" else e_t.detach(), e_s.detach())
        sides = self._sides(step)
        if reduction == "none":
            self._check_unreduced(sides)
        stored: list[Stored] = []
        if update:
            stored = [self._stored(side.bank, index, values[side.slot], finite) for side in sides]
        changes = [x.change for x in stored] if update else [None] * len(sides)
        scale = self.scale()
        zbar: dict[int, Zbar] = {}
        paired = self._has_pair(size, 0 if anchors is None else len(anchors[1]))
        parts = [
            self._contrast(side, paired, change, scale, zbar, update or later, weights, reduction)
            for side, change in zip(sides, changes, strict=True)
        ]
        loss = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if finite is not None:
            loss = torch.where(finite, loss, torch.zeros_like(loss))
        if update or later:
            to_keep = tuple(
                None if bank is None else value
                for bank, value in zip(self._banks, values, strict=True)
            )
            nothing_left = None if self.masked_steps is None else self._nothing_left(sides)
            done = Waiting(
                index, to_keep, teacher_moments, student_moments, zbar, finite, nothing_left
            )
            if later:
                self._waiting = joined(waiting, done)
            else:
                self._conclude(done, stored, teacher_statistics)
        if size > 0:
            # The statistics are the running ones by now. torch 2.6 traces no _replace.
            embeddings = e_t.detach(), e_s.detach()
            if anchors is not None:
                chosen["anchors"] = anchors[0].detach(), anchors[1]
            kept = None if weights is None else weights.clone()
            result = {"loss": loss.detach(), "weights": kept, "reduction": reduction}
            self._last = Step(*embeddings, **chosen, statistics=None, **result)
        if update and not torch.compiler.is_compiling():
            self._watch(finite)
        return loss

    @torch.no_grad()
    def commit(self) -> None:
        """Make one step of the micro-batches called with ``update="later"`` since the last one.

        Banks, samplers, statistics and counters are then as after one batch of all their samples,
        in their order. Until then only ids, embeddings (for keys="live" the teacher's features) and
        moments are kept, in no state_dict. What the losses of the micro-batches are to that of one
        batch:

        - All meet the same negatives, and the rows as they were before the step. CRD's mean over
          micro-batches, weighted by their sizes, is the loss of the one batch, and so are the
          gradients: without ``standardize``, or in eval mode, as the student's features are
          standardised by the micro-batch itself while training. (The teacher's by all before it,
          until :meth:`fill` fixes that.)
        - Relations (CRCD, CRRCD) are those between the samples of a micro-batch, which has its own
          anchors: the gradient is that of as many smaller batches. With ``anchors`` given, the same
          to each, it is that of the one batch, of losses with reduction="sum" divided by its number
          of pairs: A B, with self pairs off less the anchors that are in the batch.
        - Where Zbar is still to come, or follows the batches, each takes its own, and that of the
          first stays.
        - nonfinite="skip": one micro-batch to skip makes a step to skip.

        Raises:
            RuntimeError: no micro-batch waits; within a backward pass or a wrapper, as
                :meth:`forward`. Nothing has changed then.
        """
        waiting = self._waiting
        if waiting is None:
            raise RuntimeError(
                f"crrcd_ext.{self.NAME}.commit: expected micro-batches with update='later' before, "
                "got none"
            )
        index = _once.check(self.NAME, self, self.step, waiting.index)
        stored = [
            self._stored(bank, index, value, waiting.finite)
            for bank, value in zip(self._banks, waiting.values, strict=True)
            if bank is not None
        ]
        for bank, change, _ in stored:
            bank.apply_(change)
        self._waiting = None
        teacher, standardize = None, self.teacher_head.standardize
        if waiting.teacher is not None and not standardize.fixed:
            teacher = standardize.taken_in(waiting.teacher)
        self._conclude(waiting, stored, teacher)
        if not torch.compiler.is_compiling():
            self._watch(waiting.finite)

    def _check_nothing_waits(self) -> None:
        if self._waiting is not None:
            raise RuntimeError(
                f"crrcd_ext.{self.NAME}: update: expected commit() before the next step, got "
                f"{len(self._waiting.index)} samples of micro-batches that wait for it"
            )

    def _moments(
        self, waiting: Waiting | None, teacher: Tensor, student: Tensor
    ) -> tuple[Statistics | None, Statistics | None]:
        """What standardisers are to follow, with what waits."""
        before = (None, None) if waiting is None else (waiting.teacher, waiting.student)
        found: list[Statistics | None] = [None, None]
        standardize = self.teacher_head.standardize
        if standardize is not None and not standardize.fixed:
            found[0] = with_moments(before[0], teacher)
        if self.student_head.standardize is not None:
            found[1] = with_moments(before[1], student)
        return found[0], found[1]

    def _stored(self, bank: MemoryBank, index: Tensor, value: Tensor, finite) -> Stored:
        """The update of a bank, and in a step that may be skipped the rows as they are."""
        change = bank.change(index, value)
        return Stored(bank, change, None if finite is None else bank.rows[change[0]])

    @torch.no_grad()
    def _conclude(self, done: Waiting, stored: list[Stored], teacher: Statistics | None) -> None:
        """Keep what a step leaves behind, of which the banks have taken their ``stored`` updates
        and ``teacher`` are the teacher's statistics; or, in a step to skip, take these back."""
        finite, student = done.finite, None
        if done.student is not None and done.student.count > 1:
            student = self.student_head.standardize.taken_in(done.student)
        self._commit(finite, (teacher, student), done.zbar)
        if done.nothing_left is not None:
            masked = done.nothing_left
            self.masked_steps.add_(masked if finite is None else masked & finite)
        for bank, change, rows in stored:
            if finite is not None:
                now = bank.rows[change[0]]
                bank.rows.index_copy_(0, change[0], torch.where(finite, now, rows))
            bank.record_(done.index, finite)

    def _check_anchors(self, given: object) -> tuple[Tensor, Tensor]:
        """``given`` as features [A, Dt] and ids, int64 [A], checked."""
        name, device = self.NAME, self.step.device
        if not self.RELATES:
            _checks.fail(
                ValueError, name, "anchors", "None, since it relates no samples", "a value"
            )
        if not isinstance(given, tuple | list) or len(given) != 2:
            got = type(given).__name__
            _checks.fail(TypeError, name, "anchors", "(teacher's features, ids), two tensors", got)
        features, index = given
        _checks.features(name, "anchors[0]", features, self.teacher_head.in_dim, device)
        if len(features) == 0:
            _checks.fail(ValueError, name, "anchors[0]", "one row or more", 0)
        index = _checks.integers(name, "anchors[1]", index, len(features), device)
        _checks.in_range(name, "anchors[1]", index, self.num_samples)
        return features, index

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
        if self.negatives == "all":
            _checks.fail(ValueError, name, argument, "None with negatives='all'", "a value")
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
        if self.capacity is None:
            _checks.in_range(name, argument, flat, self.num_samples)
        else:
            for queue in self._banks:
                if queue is not None:
                    _checks.written(name, argument, flat, queue.pushed, self.capacity)
        return flat.view(given.shape)

    def _screen(
        self, student: Tensor, teacher: Tensor, anchor: Tensor | None, update: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The features, zeroed in a step to skip; for "skip" whether all are good (bool [])."""
        # Running statistics would keep a variance that has overflowed.
        squared = update and self.student_head.standardize is not None
        if self.nonfinite == "error":
            _checks.finite(self.NAME, "student_features", student, SKIP_HINT, squared)
            _checks.finite(self.NAME, "teacher_features", teacher, SKIP_HINT, squared)
            if anchor is not None:
                _checks.finite(self.NAME, "anchors[0]", anchor, SKIP_HINT)
            return student, teacher, anchor, None
        finite = _checks.all_finite(student.detach(), squared)
        finite = finite & _checks.all_finite(teacher, squared)
        zero = student.new_zeros(())
        if anchor is not None:
            finite = finite & _checks.all_finite(anchor, False)
            anchor = torch.where(finite, anchor, zero)
        student, teacher = torch.where(finite, student, zero), torch.where(finite, teacher, zero)
        return student, teacher, anchor, finite

    def _teacher_gradient(self) -> torch.set_grad_enabled:
        """Context of what is computed on the teacher's side."""
        return torch.set_grad_enabled(self._teacher_learns() and torch.is_grad_enabled())

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
        waiting: Waiting | None = None,
    ) -> Tensor | None:
        """int64 [K] or [B, K], the rows of this step's negatives; None for the whole bank.

        Negatives of each query's own are those that it has behind the queries that wait.
        """
        if bank is None:
            return None
        if given is not None:
            return given
        if self.negatives == "all":
            return None if bank.full else bank.draw(None)
        if self.negative_sampling == "shared" and not self.distinct:
            return bank.draw(self.negatives)
        options: dict[str, Any] = {"distinct": True} if self.distinct else {}
        ahead = 0 if waiting is None or self.negative_sampling == "shared" else len(waiting.index)
        if self.exclusion == "draw":
            options["exclude"] = pad(index, (ahead, 0))
            if self.class_table is not None:
                options.update(labels=pad(label, (ahead, 0), value=-1), classes=self.class_table)
        elif self.negative_sampling == "per_sample":
            options["queries"] = ahead + len(index)
        return bank.draw(self.negatives, **options)[ahead:]

    def _anchors(self, step: Step) -> dict[str, Any]:
        """The anchors' embeddings, and what tells self pairs from others."""
        anchor, anchor_id = (step.teacher, step.index) if step.anchors is None else step.anchors
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
        paired: bool,
        change: Change | None,
        scale: Tensor | float,
        zbar: dict[int, Zbar],
        follow: bool,
        weights: Tensor | None,
        reduction: str,
    ) -> Tensor:
        """One direction's loss and its bank's update; what becomes of Zbar goes into ``zbar``,
        which a moving average has to ``follow`` in a step."""
        bank = side.bank
        # Live keys are embedded copies of rows: their bank has to be updated on its own.
        fused = change is not None and side.arguments["bank"] is bank.rows
        loss = type(self).OPERATOR(
            **side.arguments,
            scale=scale,
            offset=self._offset(side, paired, follow, zbar),
            objective=self.objective,
            weights=weights,
            reduction=reduction,
            update=change if fused else None,
            backend=self.backend,
        )
        if change is not None and not fused:
            bank.apply_(change)
        return loss if loss.dim() < 2 else loss.sum(0)  # a sample's pairs, over the anchors

    def _offset(self, side: Side, paired: bool, follow: bool, zbar: dict) -> Tensor | float:
        """beta; where this batch has a part in Zbar, what becomes of that goes into ``zbar``.

        Each direction waits for its own first batch that has a pair and rows to compare it with.
        """
        if not self._measures_zbar():
            return self._beta(0.0)
        slot = side.slot
        known = self._knows_zbar(slot)
        follows = follow and self.normalizer == "moving_average"
        if known and not (follows and paired):
            return self._beta((self.log_zbar / self.zbar_weight)[slot])
        if not known:
            expected = "a training step, whose batch gives Zbar,"
            _checks.before_capture(self.NAME, "normalizer", expected, self.step.device)
            if not paired:
                return self._beta(0.0)  # of a loss that does not depend on it
        limit = MAX_NEGATIVES if self.normalizer == "first_batch" else FOLLOWED_NEGATIVES
        query = side.arguments["query"]
        with torch.autocast(query.device.type, enabled=False), torch.no_grad():
            fresh = log_mean_exp_logit(self._cosines(side), self.scale(), limit)
            zbar[slot] = self._blended(slot, fresh)
        return self._beta(zbar[slot].value())

    def _cosines(self, side: Side) -> Cosines:
        return type(self).COSINES(**side.arguments, backend=self.backend)

    @torch.no_grad()
    def _commit(self, finite: Tensor | None, statistics, zbar: dict[int, Zbar]) -> None:
        """Store what a step changes beside the banks' rows; nothing, in a step to skip."""
        changes = []
        for head, merged in zip((self.teacher_head, self.student_head), statistics, strict=True):
            if merged is not None:
                changes += zip(head.standardize.statistics, merged, strict=True)
        for counter in (self, *self._banks):
            if counter is not None:
                changes.append((counter.step, counter.step + 1))
        for slot, new in zbar.items():
            changes += zip(self._zbar(slot), new, strict=True)
        for buffer, value in changes:
            buffer.copy_(value if finite is None else torch.where(finite, value, buffer))
        if finite is not None:
            self.skipped_steps.add_(~finite)
        for head, merged in zip((self.teacher_head, self.student_head), statistics, strict=True):
            if merged is not None:
                head.standardize.note_merged()
        if zbar:
            self._note_zbar(finite, zbar)

    def _note_zbar(self, finite: Tensor | None, zbar: dict[int, Zbar]) -> None:
        """Let the host know which directions have Zbar; it waits until all have."""
        known = self._known_zbar.value
        if torch.compiler.is_compiling():
            # A graph cannot leave this to the next batch: what is known is a constant of it.
            for slot, new in zbar.items():
                if not known[slot] and self._banks[slot].started:
                    there = new.weight > 0
                    torch._assert_async(
                        there if finite is None else there & finite,
                        f"crrcd_ext.{self.NAME}: normalizer: expected a first batch of finite "
                        "features that has a pair",
                    )
                    known = tuple(k or i == slot for i, k in enumerate(known))
        if torch.compiler.is_compiling() or all(known[slot] for slot in zbar):
            self._known_zbar.set(self.zbar_weight, known)
        else:
            self._knows_zbar(0)
