"""Cross-resolution relational contrastive distillation as a loss module."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crrcd_ext import functional
from crrcd_ext.modules import _checks, _counter, diagnostics, filling
from crrcd_ext.modules._buffers import KeepsBufferDtype
from crrcd_ext.modules.bank import MemoryBank
from crrcd_ext.modules.diagnostics import Step
from crrcd_ext.modules.heads import EmbeddingHead
from crrcd_ext.modules.normalizer import log_mean_exp_logit
from crrcd_ext.modules.relation import FeatureRelation

NAME = "CRRCDLoss"
SKIP_HINT = "; nonfinite='skip' skips such a step"
_UNLABELLED = torch.iinfo(torch.int64).min


class _Side(NamedTuple):
    """One direction of the loss: its slot of log Zbar, its bank, the rows drawn from it (or None),
    what the bank is to be updated with, and the arguments of relation_nce."""

    slot: int
    bank: MemoryBank
    drawn: Tensor | None
    value: Tensor
    arguments: dict[str, Any]


class CRRCDLoss(KeepsBufferDtype):
    r"""Relational contrastive distillation, from a frozen teacher to a low-resolution student.

    Embedding heads turn teacher and student features into unit rows e^t, e^s. For A anchors a of
    the batch and every sample b, two feature relation modules give the teacher-space relation and
    the cross-resolution one, which are contrasted against K rows m_n of a memory bank (Zhang, Ge,
    Shi, Zeng, arXiv 2409.02555)::

        v^t_ab = F^t(e^t_a, e^t_b)        v^ts_ab = F^ts(e^t_a, e^s_b)
        l_ab   = softplus(-(<v^ts_ab, v^t_ab>/tau - beta)) + sum_n softplus(<v^ts_ab, F^t(e^t_a,
        m_n)>/tau - beta) L      = mean of l_ab over the pairs a != b,          beta = log K + log
        Zbar

    Nothing of size anchors x negatives is stored, and the bank is updated at the end of the same
    pass.

    Args:
        student_dim, teacher_dim: Ds, Dt, widths of the features.
        num_samples: N, size of the data set; ids are 0 ... N - 1.
        negatives: K, bank rows drawn anew for each step (with replacement), or "all" for the whole
            bank.
        embedding_dim, hidden_dim, relation_dim: D, H, R.
        temperature: tau.
        momentum: of the bank's rows.
        direction: "student" as above; "teacher" swaps the roles: query v^t, positive v^ts,
            negatives F^ts(e^t_a, m^s_n) from a bank of student embeddings; "both" adds the two.
        keys: "stop_gradient": no gradient through F^t and the teacher's head, which stay as
            initialised, so only the query has a gradient; fill the bank first (:meth:`fill`).
            "live": the teacher's bank holds backbone features, which the current head embeds, with
            gradient. "bank": the positive is made from the bank's own row, before its update; F^t
            and the teacher's head learn. In the "teacher" direction positives and bank are the
            student's embeddings whatever ``keys``, or nothing would reach the student.
        anchors: A, chosen anew in each batch; None takes all B.
        normalizer: "first_batch" (Zbar = mean exp(<u, v>/tau) over the first training batch, CRD's
            constant, kept in the state_dict), "none" (beta = 0), or a number, Zbar. "infonce" does
            not depend on it.
        objective: "nce" or "infonce" (cross-entropy of the positive among 1 + K).
        head: "linear" or "identity" (embedding_dim is ignored then).
        standardize: standardise features in front of the heads: the student's by the batch (running
            statistics in eval mode), the teacher's by the statistics that :meth:`fill` sets, or all
            batches seen so far without it.
        self_pairs: keep the pairs a = b.
        exclude_same_label: a negative of the query's class is none; needs ``labels``. Negative
            labels mean unknown.
        labels: int64 [N], the data set's labels; :meth:`fill` may set them later.
        learnable_temperature: 1/tau = exp(``log_scale``), a parameter.
        learnable_offset: beta + ``offset``, a parameter that starts at 0 ("nce" only).
        bank_dtype: storage type of the banks.
        nonfinite: "error" raises on features that are not finite; "skip" returns a zero loss, with
            zero gradients, leaves banks, samplers and statistics alone and counts
            ``skipped_steps``.
        seed: of banks and samplers; parameters come from PyTorch's global generator.
        backend: as for :func:`crrcd_ext.functional.relation_nce`.

    Raises:
        TypeError, ValueError: for arguments out of their range.

    Everything that a run needs to go on is in the state_dict, and going on is exact.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int,
        *,
        negatives: int | str = 16384,
        embedding_dim: int = 128,
        hidden_dim: int = 128,
        relation_dim: int = 128,
        temperature: float = 0.1,
        momentum: float = 0.5,
        direction: str = "student",
        keys: str = "stop_gradient",
        anchors: int | None = 8,
        normalizer: str | float = "first_batch",
        objective: str = "nce",
        head: str = "linear",
        standardize: bool = True,
        self_pairs: bool = False,
        exclude_same_label: bool = False,
        labels: Tensor | None = None,
        learnable_temperature: bool = False,
        learnable_offset: bool = False,
        bank_dtype: torch.dtype = torch.float32,
        nonfinite: str = "error",
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("student_dim", student_dim),
            ("teacher_dim", teacher_dim),
            ("num_samples", num_samples),
            ("embedding_dim", embedding_dim),
            ("hidden_dim", hidden_dim),
            ("relation_dim", relation_dim),
        ):
            _checks.positive_int(NAME, name, value)
        if anchors is not None:
            _checks.positive_int(NAME, "anchors", anchors)
        _checks.choice(NAME, "direction", direction, ("student", "teacher", "both"))
        _checks.choice(NAME, "keys", keys, ("stop_gradient", "live", "bank"))
        _checks.choice(NAME, "objective", objective, ("nce", "infonce"))
        _checks.choice(NAME, "head", head, ("linear", "identity"))
        _checks.choice(NAME, "nonfinite", nonfinite, ("error", "skip"))
        _check_negatives(negatives, num_samples)
        _check_positive(NAME, "temperature", temperature)
        if isinstance(normalizer, str):
            _checks.choice(NAME, "normalizer", normalizer, ("first_batch", "none"))
        else:
            _check_positive(NAME, "normalizer", normalizer)
        if learnable_offset and objective == "infonce":
            raise ValueError(
                f"crrcd_ext.{NAME}: learnable_offset: expected objective 'nce', got 'infonce', "
                "whose loss does not depend on an offset"
            )

        self.num_samples = num_samples
        self.negatives = negatives
        self.temperature = float(temperature)
        self.direction = direction
        self.keys = keys
        self.anchors = anchors
        self.normalizer = normalizer
        self.objective = objective
        self.self_pairs = bool(self_pairs)
        self.exclude_same_label = bool(exclude_same_label)
        self.nonfinite = nonfinite
        self.backend = backend

        # The student's features move while it learns, so its running statistics have to forget.
        self.student_head = EmbeddingHead(student_dim, embedding_dim, head, standardize, floor=0.1)
        self.teacher_head = EmbeddingHead(teacher_dim, embedding_dim, head, standardize)
        student_width, teacher_width = self.student_head.out_dim, self.teacher_head.out_dim
        relations = {"hidden_dim": hidden_dim, "relation_dim": relation_dim, "backend": backend}
        self.teacher_relation = FeatureRelation(teacher_width, **relations)
        self.cross_relation = FeatureRelation(teacher_width, student_width, **relations)
        if keys == "stop_gradient":
            self.teacher_head.requires_grad_(False)
            self.teacher_relation.requires_grad_(False)

        bank = {"dtype": bank_dtype, "momentum": momentum, "backend": backend}
        live = keys == "live"
        self.teacher_bank = (
            MemoryBank(
                num_samples,
                teacher_dim if live else teacher_width,
                normalize=not live,
                seed=seed,
                **bank,
            )
            if direction != "teacher"
            else None
        )
        self.student_bank = (
            MemoryBank(num_samples, student_width, seed=seed + 1, **bank)
            if direction != "student"
            else None
        )

        scale = torch.tensor(-math.log(self.temperature))
        self.log_scale = nn.Parameter(scale) if learnable_temperature else None
        self.offset = nn.Parameter(torch.zeros(())) if learnable_offset else None

        self.register_buffer("log_zbar", torch.full((2,), -torch.inf, dtype=torch.float64))
        self.register_buffer("seed", torch.tensor(int(seed) + 2, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("labels", None)
        self.labelled = False
        if self.exclude_same_label:
            self.labels = torch.full((num_samples,), -1, dtype=torch.int64)
        if labels is not None:
            device = labels.device if isinstance(labels, Tensor) else torch.device("cpu")
            labels = _checks.integers(NAME, "labels", labels, num_samples, device)
            if self.exclude_same_label:
                self.labels.copy_(labels)
                self.labelled = True
        # Host-side copy of "log_zbar is there", so that no step has to ask the device.
        self._normalized = False
        self._last: Step | None = None
        self._warned: set[str] = set()

    @property
    def num_negatives(self) -> int:
        """K: the number of candidates drawn for a step, N for "all"."""
        return self.num_samples if self.negatives == "all" else self.negatives

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
        dtype = self.cross_relation.weight.dtype
        if size == 0:
            return student_features.sum().to(torch.promote_types(dtype, torch.float32))
        student, teacher, finite = self._screen(student_features, teacher_features.detach())

        learns = self.keys != "stop_gradient" and torch.is_grad_enabled()
        teacher_statistics = self._teacher_statistics(teacher, update)
        by_batch = self.training and size > 1
        student_statistics = None
        if self.student_head.standardize is not None and update and size > 1:
            student_statistics = self.student_head.standardize.merged(student.detach())
        with torch.set_grad_enabled(learns):
            e_t = self.teacher_head(teacher, teacher_statistics).to(dtype)
        e_s = self.student_head(student, batch=by_batch).to(dtype)

        selected = self._select_anchors(size)
        anchor_id, e_a = index, e_t
        if selected is not None:
            anchor_id, e_a = index.index_select(0, selected), e_t.index_select(0, selected)
        masks = {"anchor_id": anchor_id, "query_id": index, "self_pairs": self.self_pairs}
        if query_label is not None:
            masks |= {"query_label": query_label, "key_label": self.labels}

        f_ts, f_t = self.cross_relation, self.teacher_relation
        cross_anchor = f_ts.project_anchor(e_a)
        v_ts = f_ts.relate(cross_anchor, f_ts.project_sample(e_s))
        own_rows = None
        if self.keys == "bank" and self.teacher_bank is not None:
            own_rows = self.teacher_bank.rows.index_select(0, index).to(dtype)
        with torch.set_grad_enabled(learns):
            teacher_anchor = f_t.project_anchor(e_a)
            v_t = v_own = None
            if own_rows is None or self.direction == "both":
                v_t = f_t.relate(teacher_anchor, f_t.project_sample(e_t))
            if own_rows is not None:
                v_own = f_t.relate(teacher_anchor, f_t.project_sample(own_rows))

        sides = []
        if self.teacher_bank is not None:
            keys, drawn = self._teacher_keys(masks, teacher_statistics, dtype)
            keys |= {"query": v_ts, "positive": v_t if v_own is None else v_own}
            keys["anchor"] = teacher_anchor
            value = teacher if self.keys == "live" else e_t.detach()
            sides.append(_Side(0, self.teacher_bank, drawn, value, keys))
        if self.student_bank is not None:
            keys, drawn = self._student_keys(masks)
            keys |= {"query": v_t, "positive": v_ts, "anchor": cross_anchor}
            sides.append(_Side(1, self.student_bank, drawn, e_s.detach(), keys))

        before = []
        if update and finite is not None:
            before = [side.bank.rows.index_select(0, index) for side in sides]
        log_zbar = {}
        parts = [self._contrast(side, index, update, log_zbar) for side in sides]
        loss = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if finite is not None:
            loss = torch.where(finite, loss, torch.zeros_like(loss))
        if update:
            statistics = (teacher_statistics, student_statistics)
            self._commit(finite, statistics, log_zbar)
            for side, rows in zip(sides, before, strict=False):
                bank = side.bank.rows
                bank.index_copy_(0, index, torch.where(finite, bank.index_select(0, index), rows))
        self._last = Step(
            loss.detach(),
            e_t.detach(),
            e_s.detach(),
            index,
            query_label,
            selected,
            own_rows,
            tuple(side.drawn for side in sides),
        )
        return loss

    def _check_batch(
        self, student: Tensor, teacher: Tensor, index: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The ids as int64 and, for ``exclude_same_label``, the queries' labels, checked."""
        device = self.step.device
        _checks.features(NAME, "student_features", student, self.student_head.in_dim, device)
        _checks.features(NAME, "teacher_features", teacher, self.teacher_head.in_dim, device)
        size = student.shape[0]
        if teacher.shape[0] != size:
            expected = f"{size} rows as student_features"
            _checks.fail(ValueError, NAME, "teacher_features", expected, teacher.shape[0])
        index = _checks.integers(NAME, "index", index, size, device)
        _checks.in_range(NAME, "index", index, self.num_samples)
        if labels is not None:
            labels = _checks.integers(NAME, "labels", labels, size, device)
        if not self.exclude_same_label:
            return index, None
        if not self.labelled:
            raise ValueError(
                f"crrcd_ext.{NAME}: labels: expected the data set's labels, int64 "
                f"[{self.num_samples}], for exclude_same_label=True, got None; give them to the "
                "constructor or to fill(...)"
            )
        labels = self.labels.index_select(0, index) if labels is None else labels
        # A query of unknown class must not match rows of unknown class.
        return index, labels.masked_fill(labels < 0, _UNLABELLED)

    def _screen(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The features, zeroed in a step to skip; for "skip" whether all are finite (bool [])."""
        if self.nonfinite == "error":
            _checks.finite(NAME, "student_features", student, SKIP_HINT)
            _checks.finite(NAME, "teacher_features", teacher, SKIP_HINT)
            return student, teacher, None
        finite = torch.isfinite(student.detach()).all() & torch.isfinite(teacher).all()
        zero = student.new_zeros(())
        return torch.where(finite, student, zero), torch.where(finite, teacher, zero), finite

    def _teacher_statistics(self, teacher: Tensor, update: bool):
        standardize = self.teacher_head.standardize
        if standardize is None or standardize.fixed:
            return None
        return standardize.merged(teacher) if update else None

    def _select_anchors(self, size: int) -> Tensor | None:
        """int64 [A], this step's anchors among the batch's rows; None for all."""
        if self.anchors is None or self.anchors >= size:
            return None
        return _counter.distinct_index(self.seed, self.step, self.anchors, size)

    def _draw(self, bank: MemoryBank) -> Tensor | None:
        """int64 [K], the rows of this step's negatives; None for the whole bank."""
        return None if self.negatives == "all" else bank.draw(self.negatives)

    def _teacher_keys(self, masks: dict, statistics, dtype) -> tuple[dict, Tensor | None]:
        """The negatives F^t(e^t_a, m_n) as arguments of relation_nce, and the rows drawn."""
        f_t = self.teacher_relation
        drawn = self._draw(self.teacher_bank)
        rows = self.teacher_bank.rows
        weight, bias, key_weight = f_t.weight, f_t.bias, f_t.sample_weight
        if self.keys == "stop_gradient":
            weight, bias, key_weight = weight.detach(), bias.detach(), key_weight.detach()
        keys = {"weight": weight, "bias": bias, "key_weight": key_weight, **masks}
        if self.keys != "live":
            return {**keys, "bank": rows, "index": drawn}, drawn
        if drawn is not None:
            rows = rows.index_select(0, drawn)
            keys["key_id"] = drawn
            if "key_label" in masks:
                keys["key_label"] = self.labels.index_select(0, drawn)
        return {**keys, "bank": self.teacher_head(rows, statistics).to(dtype)}, drawn

    def _student_keys(self, masks: dict) -> tuple[dict, Tensor | None]:
        """The negatives F^ts(e^t_a, m^s_n) as arguments of relation_nce, and the rows drawn."""
        f_ts = self.cross_relation
        drawn = self._draw(self.student_bank)
        weights = {"weight": f_ts.weight, "bias": f_ts.bias, "key_weight": f_ts.sample_weight}
        return {**weights, "bank": self.student_bank.rows, "index": drawn, **masks}, drawn

    def _contrast(self, side: _Side, index: Tensor, update: bool, log_zbar: dict) -> Tensor:
        """One direction's loss and its bank's update; a new log Zbar goes into ``log_zbar``."""
        bank = side.bank
        arguments = {**side.arguments, "scale": self.scale(), "backend": self.backend}
        offset = self._offset(side.slot, index, arguments, log_zbar)
        arguments |= {"offset": offset, "objective": self.objective}
        # Live keys are embedded copies of rows: their bank has to be updated on its own.
        fused = arguments["bank"] is bank.rows
        if update and fused:
            arguments["update"] = (index, side.value, bank.momentum, bank.normalize)
        loss = functional.relation_nce(**arguments)
        if update and not fused:
            bank.update_(index, side.value)
        return loss

    def scale(self) -> Tensor | float:
        """1/tau, as a scalar tensor when it is learned."""
        return 1 / self.temperature if self.log_scale is None else self.log_scale.exp()

    def _offset(self, slot: int, index: Tensor, arguments: dict, log_zbar: dict) -> Tensor | float:
        """beta; where this batch has to give Zbar, its logarithm goes into ``log_zbar``."""
        if self.objective == "infonce" or self.normalizer == "none":
            beta = 0.0
        elif self.normalizer != "first_batch":
            beta = math.log(self.num_negatives) + math.log(self.normalizer)
        elif self._normalized:
            beta = self.log_zbar[slot] + math.log(self.num_negatives)
        elif len(index) == 1 and not self.self_pairs:
            beta = 0.0
        else:
            fresh = log_mean_exp_logit(**arguments).to(torch.float64)
            log_zbar[slot] = fresh
            # Without a pair there is no mean, and a loss that does not depend on it.
            beta = torch.where(fresh.isfinite(), fresh, 0.0) + math.log(self.num_negatives)
        return beta if self.offset is None else beta + self.offset

    @torch.no_grad()
    def _commit(self, finite: Tensor | None, statistics, log_zbar: dict) -> None:
        """Store what a step changes beside the banks' rows; nothing, in a step to skip."""
        changes = []
        for head, merged in zip((self.teacher_head, self.student_head), statistics, strict=True):
            if merged is not None:
                changes += zip(head.standardize.statistics, merged, strict=True)
        for counter in (self, self.teacher_bank, self.student_bank):
            if counter is not None:
                changes.append((counter.step, counter.step + 1))
        for buffer, value in changes:
            buffer.copy_(value if finite is None else torch.where(finite, value, buffer))
        if finite is not None:
            self.skipped_steps.add_(~finite)
        if log_zbar:
            self._commit_normalizer(finite, log_zbar)

    def _commit_normalizer(self, finite: Tensor | None, log_zbar: dict) -> None:
        usable = torch.stack(list(log_zbar.values())).isfinite().all()
        if finite is not None:
            usable = usable & finite
        if torch.compiler.is_compiling():
            # A graph cannot leave this to the next batch: the flag is a constant of it.
            torch._assert_async(
                usable,
                f"crrcd_ext.{NAME}: normalizer: expected a first batch of finite features that "
                "has a pair",
            )
            usable = True
        # The one moment when the host waits: the first training batch of a run.
        if bool(usable):
            for slot, value in log_zbar.items():
                self.log_zbar[slot].copy_(value)
            self._normalized = True

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
        rest = [
            p
            for module in (
                self.student_head,
                self.teacher_head,
                self.cross_relation,
                self.teacher_relation,
            )
            for p in module.parameters()
            if p.requires_grad
        ]
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
            (doubled for "both"); ``relation_variance`` of v^ts over b and
            ``teacher_relation_variance`` of v^t, means over dimensions; ``effective_rank`` of v^ts;
            ``positive_cosine`` and ``negative_cosine`` (of at most 256 negatives); ``temperature``;
            ``offset``, which is beta; ``skipped_steps``. Relations are recomputed with the
            parameters as they are now. Cosines are NaN where no pair is kept.

        Warns (UserWarning), once each, when the relation has collapsed to a constant or when the
        loss seems to be solved by telling fresh rows from stale ones.

        Raises:
            RuntimeError: before the first step.
        """
        if self._last is None:
            raise RuntimeError(f"crrcd_ext.{NAME}.diagnostics: expected a step before, got none")
        values = diagnostics.measure(self, self._last)
        if diagnostics.is_constant(values, self.cross_relation.weight.shape[0]):
            self._warn("constant", diagnostics.CONSTANT_RELATION, values)
        if diagnostics.is_shortcut(values):
            self._warn("shortcut", diagnostics.FRESHNESS_SHORTCUT, values)
        return values

    def current_offset(self) -> float:
        """beta, for "both" the mean of the two; NaN before the first batch has given Zbar."""
        if self.objective == "infonce" or self.normalizer == "none":
            beta = 0.0
        elif self.normalizer == "first_batch":
            banks = (self.teacher_bank, self.student_bank)
            used = [
                z for z, bank in zip(self.log_zbar.tolist(), banks, strict=True) if bank is not None
            ]
            beta = math.log(self.num_negatives) + sum(used) / len(used)
        else:
            beta = math.log(self.num_negatives) + math.log(self.normalizer)
        return beta if self.offset is None else beta + float(self.offset)

    def _warn(self, name: str, text: str, values: dict[str, float]) -> None:
        if name not in self._warned:
            self._warned.add(name)
            # Past this method, diagnostics and its no_grad wrapper: the caller's line.
            warnings.warn(text.format(**values), UserWarning, stacklevel=4)

    def extra_repr(self) -> str:
        shown = {
            "student_dim": self.student_head.in_dim,
            "teacher_dim": self.teacher_head.in_dim,
            "num_samples": self.num_samples,
            "negatives": self.negatives,
            "temperature": self.temperature,
            "direction": self.direction,
            "keys": self.keys,
            "anchors": self.anchors,
            "normalizer": self.normalizer,
            "objective": self.objective,
            "self_pairs": self.self_pairs,
            "exclude_same_label": self.exclude_same_label,
            "learnable_temperature": self.log_scale is not None,
            "learnable_offset": self.offset is not None,
            "nonfinite": self.nonfinite,
            "backend": self.backend,
        }
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    # ------------------------------------------------------------------ saving

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # Before anything of this module is copied, its banks included, which load after it.
        for name in ("teacher_bank", "student_bank"):
            bank = getattr(self, name)
            if bank is not None:
                bank.check_size(state_dict, f"{prefix}{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        log_zbar = state_dict.get(prefix + "log_zbar")
        if log_zbar is not None:
            self._normalized = bool(log_zbar.isfinite().any())
        labels = state_dict.get(prefix + "labels")
        if labels is not None and self.labels is not None:
            self.labelled = bool((labels >= 0).any())

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry the state of the run, not the tensors of its last batch.
        return {**self.__dict__, "_last": None}


def _check_negatives(value: object, num_samples: int) -> None:
    if value == "all":
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _checks.fail(ValueError, NAME, "negatives", "a positive integer or 'all'", repr(value))
    if value > num_samples:
        expected = f"at most num_samples = {num_samples}, or 'all' for the whole bank"
        _checks.fail(ValueError, NAME, "negatives", expected, value)


def _check_positive(where: str, argument: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        _checks.fail(ValueError, where, argument, "a positive number", repr(value))
