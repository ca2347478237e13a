"""Complementary relation contrastive distillation, by differences, as a loss module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crrcd_ext import functional, reference
from crrcd_ext.modules import cosines
from crrcd_ext.modules.embedding import EmbeddingLoss
from crrcd_ext.modules.step import Step


class CRCDLoss(EmbeddingLoss):
    """Relations by normalised difference: where the student sees a sample from the teacher's ones.

    Embedding heads turn teacher and student features into unit rows e^t, e^s of one space. For A
    anchors e^t_a of the batch and every sample b, the directions from the anchor are contrasted
    against those to K rows m_n of a memory bank (Zhu et al., CVPR 2021)::

        v_a(x) = (x - e^t_a) / |x - e^t_a|
        l_ab   = softplus(-(<v_a(e^s_b), v_a(e^t_b)>/tau - beta))
                 + sum_n softplus(<v_a(e^s_b), v_a(m_n)>/tau - beta)
        L      = mean of l_ab over the pairs a != b,          beta = log K + log Zbar

    in direction "student", with the teacher's bank; "teacher" swaps the roles of e^s and e^t, with
    a bank of student embeddings and the same anchors; "both" adds the two. There are no relation
    parameters, and a negative that is the anchor's own row has no direction and is left out.

    The defaults are those of :class:`CRRCDLoss`, which did well for this relation too. The public
    code of CRCD differs: it takes temperature=0.05, negatives=500, negative_sampling="per_sample",
    anchors=None, direction="both", keys="bank", standardize=False, heads at the student's own
    learning rate (factor=1 in :meth:`parameter_groups`), a random bank (no :meth:`fill`), and, for
    which there is no option here, the bank's rows as anchors.

    Args:
        keys: "stop_gradient": the teacher's head stays as initialised and gets no gradient. "live":
            the teacher's bank holds backbone features, which the current head embeds, with
            gradient. "bank": the positive is the sample's own row of the bank, before its update;
            direction "teacher" alone is refused then, since nothing would reach the student.
        anchors: A, chosen anew in each batch; None takes all B.
        negative_sampling: "shared": K rows for the whole batch, which makes the pass one matrix
            product; "per_sample": K rows for each query, int64 [B, K]. Both are drawn anew in each
            step, on the bank's device, uniformly and with replacement; what a query meets has
            the same distribution.
        exclusion: "mask" leaves a query's own row, and with ``exclude_same_label`` its class, out
            of the K rows drawn; "draw" never draws them, so that exactly K negatives remain (needs
            "per_sample"): from the other N - 1 rows, or those of other and of unknown class.
        distinct: without replacement: K different rows (see :meth:`MemoryBank.sample`).
            The row of an anchor may be among them, and is masked.
        self_pairs: keep the pairs a = b that have a direction, as with keys="bank".
        The others are those of :class:`CRRCDLoss`. Embeddings share one space: head="identity"
        needs features of one width.

    Raises:
        TypeError, ValueError: for arguments out of their range.
    """

    NAME = "CRCDLoss"
    OPERATOR = staticmethod(functional.difference_nce)
    COSINES = staticmethod(cosines.of_difference)

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int | None,
        *,
        negatives: int | str = 16384,
        embedding_dim: int = 128,
        temperature: float = 0.1,
        momentum: float = 0.5,
        direction: str = "student",
        keys: str = "stop_gradient",
        anchors: int | None = 8,
        negative_sampling: str = "shared",
        exclusion: str = "mask",
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
            negative_sampling=negative_sampling,
            exclusion=exclusion,
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

    def _seen_from(self, step: Step) -> dict[str, Any]:
        return self._anchors(step)

    def _relations(self, step: Step) -> tuple[Tensor, Tensor]:
        anchors = self._anchors(step)
        student, _ = reference.directions(step.student, anchors["anchor"], 0.0)
        teacher, _ = reference.directions(step.teacher, anchors["anchor"], 0.0)
        if step.anchors is not None:
            # One embedded apart has a direction from itself, made of rounding alone.
            others = anchors["anchor_id"][:, None] != step.index
            teacher = teacher * others[..., None]
        return student, teacher

    def _shown(self) -> dict[str, Any]:
        return {**super()._shown(), "anchors": self.anchors, "self_pairs": self.self_pairs}
