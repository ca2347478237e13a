"""Cross-resolution relational contrastive distillation as a loss module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crrcd_ext import functional
from crrcd_ext.modules import _checks, cosines
from crrcd_ext.modules.base import ContrastiveLoss
from crrcd_ext.modules.relation import FeatureRelation, check_start
from crrcd_ext.modules.step import Side, Step


class CRRCDLoss(ContrastiveLoss):
    r"""Relational contrastive distillation, from a frozen teacher to a low-resolution student.

    Embedding heads turn teacher and student features into unit rows e^t, e^s. For A anchors a of
    the batch and every sample b, two feature relation modules give the teacher-space relation and
    the cross-resolution one, which are contrasted against K rows m_n of a memory bank (Zhang, Ge,
    Shi, Zeng, arXiv 2409.02555)::

        v^t_ab = F^t(e^t_a, e^t_b)        v^ts_ab = F^ts(e^t_a, e^s_b)
        l_ab   = softplus(-(<v^ts_ab, v^t_ab>/tau - beta))
                 + sum_n softplus(<v^ts_ab, F^t(e^t_a, m_n)>/tau - beta)
        L      = mean of l_ab over the pairs a != b,          beta = log K + log Zbar

    Nothing of size anchors x negatives is stored, and the bank is updated at the end of the same
    pass.

    Args:
        student_dim, teacher_dim: Ds, Dt, widths of the features.
        num_samples: N, size of the data set; ids are 0 ... N - 1. With ``capacity`` it may be None:
            any id of 0 or more.
        negatives: K, bank rows drawn anew for each step (with replacement), or "all" for the whole
            bank.
        embedding_dim: D, the width of the embeddings.
        hidden_dim, relation_dim: H, R of the relation modules (default: 2 D and D, which keep all
            of a difference).
        init: start of the relation modules, as of :class:`FeatureRelation`: "mirrored", with which
            F^t and F^ts start as one, the difference relation, or "gaussian", two independent draws
            (the default up to version 0.1, with H = R = 128), which may learn late or not at all.
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
        normalizer: "first_batch" (Zbar = mean exp(<u, v>/tau) over the first training batch that
            has a pair, CRD's constant, kept in the state_dict; each direction waits for its own),
            "moving_average" (Zbar follows the training batches), "none" (beta = 0), or a number,
            Zbar. "infonce" does not depend on it.
        normalizer_momentum: in [0, 1), the part of it that a moving average keeps in each step. The
            average is one of log Zbar, which is what beta is made of: of Zbar itself one batch with
            a few large cosines would rule for long. It is corrected for its start as Adam's are,
            so that the first batch gives all of the first value. A batch takes part in the value
            that it is judged by, with at most 1,024 of its negatives. Of a step's time that was 3 %
            more for ``CRRCDLoss``, 34 % for ``CRDLoss`` and 130 % for ``CRCDLoss`` (one CPU core,
            B = 64, K = 4,096, direction "student").
        distinct: draw negatives without replacement (see :meth:`MemoryBank.sample`).
        capacity: C, for a queue of the newest C embeddings instead of one row for each sample
            (:class:`MemoryQueue`); ``momentum`` does not apply, ``negatives`` counts up to C, and
            keys="bank" is refused. A step with an empty queue has no negatives and gives no Zbar.
        objective: "nce" or "infonce" (cross-entropy of the positive among 1 + K).
        head: "linear" or "identity" (embedding_dim is ignored then).
        standardize: standardise features in front of the heads: the student's by the batch (running
            statistics in eval mode), the teacher's by the statistics that :meth:`fill` sets, or all
            batches seen so far without it.
        self_pairs: keep the pairs a = b.
        exclude_same_label: a negative of the query's class is none; needs ``labels``. Negative
            labels mean unknown.
        exclude_similar: a threshold in (-1, 1]: a negative is none where the cosine of its teacher
            embedding with the query's is above it, so that without labels most images of the
            query's own class are not pushed away. None: all negatives stay. Direction "teacher"
            keeps no embeddings of the teacher and refuses it, and so do queues (``capacity``) of
            students ("both").
        labels: int64 [N], the data set's labels; :meth:`fill` may set them later.
        learnable_temperature: 1/tau = exp(``log_scale``), a parameter.
        max_scale: the bound of a learned 1/tau (100 is CLIP's), or None. ``log_scale`` may lie a
            step of the optimizer above its logarithm; the scale does not, and the gradient there is
            the one that leads back, or zero.
        learnable_offset: beta + ``offset``, a parameter that starts at 0 ("nce" only).
        bank_dtype: storage type of the banks.
        nonfinite: "error" raises on features that are not finite or so large that their variance
            overflows, which running statistics would keep; "skip" returns a zero loss, with zero
            gradients, leaves banks, samplers and statistics alone and counts
            ``skipped_steps``.
        check_every: how many training steps after one another the loss looks by itself at whether
            it has collapsed, as :meth:`diagnostics` does, and warns once; None: never.
        seed: of banks and samplers; parameters come from PyTorch's global generator.
        backend: as for :func:`crrcd_ext.functional.relation_nce`.

    Raises:
        TypeError, ValueError: for arguments out of their range.

    Everything that a run needs to go on is in the state_dict, and going on is exact.
    """

    NAME = "CRRCDLoss"
    OPERATOR = staticmethod(functional.relation_nce)
    COSINES = staticmethod(cosines.of_relation)

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int | None,
        *,
        negatives: int | str = 16384,
        embedding_dim: int = 128,
        hidden_dim: int | None = None,
        relation_dim: int | None = None,
        init: str = "mirrored",
        temperature: float = 0.1,
        momentum: float = 0.5,
        direction: str = "student",
        keys: str = "stop_gradient",
        anchors: int | None = 8,
        distinct: bool = False,
        capacity: int | None = None,
        normalizer: str | float = "first_batch",
        normalizer_momentum: float = 0.99,
        objective: str = "nce",
        head: str = "linear",
        standardize: bool = True,
        self_pairs: bool = False,
        exclude_same_label: bool = False,
        exclude_similar: float | None = None,
        labels: Tensor | None = None,
        learnable_temperature: bool = False,
        max_scale: float | None = 100.0,
        learnable_offset: bool = False,
        bank_dtype: torch.dtype = torch.float32,
        nonfinite: str = "error",
        check_every: int | None = 100,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        for name, value in (("hidden_dim", hidden_dim), ("relation_dim", relation_dim)):
            if value is not None:
                _checks.positive_int(self.NAME, name, value)
        check_start(self.NAME, init, 2 if hidden_dim is None else hidden_dim)
        super().__init__(
            student_dim,
            teacher_dim,
            num_samples,
            negatives=negatives,
            embedding_dim=embedding_dim,
            temperature=temperature,
            momentum=momentum,
            direction=direction,
            keys=keys,
            anchors=anchors,
            distinct=distinct,
            capacity=capacity,
            normalizer=normalizer,
            normalizer_momentum=normalizer_momentum,
            objective=objective,
            head=head,
            standardize=standardize,
            self_pairs=self_pairs,
            exclude_same_label=exclude_same_label,
            exclude_similar=exclude_similar,
            labels=labels,
            learnable_temperature=learnable_temperature,
            max_scale=max_scale,
            learnable_offset=learnable_offset,
            bank_dtype=bank_dtype,
            nonfinite=nonfinite,
            check_every=check_every,
            seed=seed,
            backend=backend,
        )
        student_width, teacher_width = self.student_head.out_dim, self.teacher_head.out_dim
        width = max(student_width, teacher_width)
        relations = {
            "hidden_dim": 2 * width if hidden_dim is None else hidden_dim,
            "relation_dim": width if relation_dim is None else relation_dim,
            "init": init,
            "backend": backend,
        }
        self.teacher_relation = FeatureRelation(teacher_width, **relations)
        self.cross_relation = FeatureRelation(teacher_width, student_width, **relations)
        if init == "mirrored":
            self._start_alike()
        if not self._teacher_learns():
            self.teacher_relation.requires_grad_(False)

    @torch.no_grad()
    def _start_alike(self) -> None:
        """F^t is what F^ts makes of teacher embeddings, so that both start with one space.

        Two draws would see different things: nothing would lead the student into the teacher's
        space, and the first batch's Zbar, taken from relations that are strangers to each other,
        would leave the critic where it tells nothing apart.
        """
        teacher, cross = self.teacher_relation, self.cross_relation
        for weight in (teacher.anchor_weight, teacher.sample_weight):
            weight.copy_(cross.anchor_weight)
        teacher.weight.copy_(cross.weight)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # Before anything is copied: these sizes had other defaults once.
        loaded = state_dict.get(prefix + "cross_relation.weight")
        own = self.cross_relation.weight.shape
        if loaded is not None and loaded.shape != own:
            sizes = "relation_dim={}, hidden_dim={}"
            raise RuntimeError(
                f"crrcd_ext.{self.NAME}: {prefix}cross_relation: expected "
                f"{sizes.format(*own)}, got {sizes.format(*loaded.shape)} in the checkpoint; build "
                "the module with these (128 and 128 were the defaults up to version 0.1)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _sides(self, step: Step) -> list[Side]:
        f_ts, f_t = self.cross_relation, self.teacher_relation
        anchors = self._anchors(step)
        cross_anchor = f_ts.project_anchor(anchors["anchor"])
        v_ts = f_ts.relate(cross_anchor, f_ts.project_sample(step.student))
        own_rows = step.own_rows[0]
        with self._teacher_gradient():
            teacher_anchor = f_t.project_anchor(anchors["anchor"])
            v_t = v_own = None
            if own_rows is None or self.student_bank is not None:
                v_t = f_t.relate(teacher_anchor, f_t.project_sample(step.teacher))
            if own_rows is not None:
                v_own = f_t.relate(teacher_anchor, f_t.project_sample(own_rows))

        sides = []
        if self.teacher_bank is not None:
            keys = {**anchors, **self._keys(0, step), **self._weights(f_t)}
            keys.update(query=v_ts, positive=v_t if v_own is None else v_own)
            sides.append(Side(0, self.teacher_bank, {**keys, "anchor": teacher_anchor}))
        if self.student_bank is not None:
            keys = {**anchors, **self._keys(1, step), **self._weights(f_ts)}
            keys.update(query=v_t, positive=v_ts)
            sides.append(Side(1, self.student_bank, {**keys, "anchor": cross_anchor}))
        return sides

    def _weights(self, module: FeatureRelation) -> dict[str, Tensor]:
        """The second layer of the module that relates the negatives, and Wb."""
        weights = {
            "weight": module.weight,
            "bias": module.bias,
            "key_weight": module.sample_weight,
        }
        if module is self.teacher_relation and not self._teacher_learns():
            return {name: x.detach() for name, x in weights.items()}
        return weights

    def _relations(self, step: Step) -> tuple[Tensor, Tensor]:
        anchor = self._anchors(step)["anchor"]
        return self.cross_relation(anchor, step.student), self.teacher_relation(
            anchor, step.teacher
        )

    def _parts(self) -> tuple[nn.Module, ...]:
        return self.student_head, self.teacher_head, self.cross_relation, self.teacher_relation

    def _dtype(self, student: Tensor) -> torch.dtype:
        return self.cross_relation.weight.dtype

    def _shown(self) -> dict[str, Any]:
        return {**super()._shown(), "anchors": self.anchors, "self_pairs": self.self_pairs}
