"""Contrastive representation distillation as a loss module."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext import functional
from crrcd_ext.modules import cosines
from crrcd_ext.modules.embedding import EmbeddingLoss
from crrcd_ext.modules.step import Step


class CRDLoss(EmbeddingLoss):
    """Contrastive representation distillation: a sample's student and teacher embeddings meet.

    Embedding heads turn teacher and student features into unit rows e^t, e^s of one space, which
    are contrasted against K rows m_n of a memory bank (Tian, Krishnan, Isola, ICLR 2020)::

        l_b = softplus(-(<e^s_b, e^t_b>/tau - beta)) + sum_n softplus(<e^s_b, m_n>/tau - beta)
        L   = mean of l_b,          beta = log K + log Zbar

    in direction "student", with the teacher's bank; "teacher" swaps the roles: query e^t, positive
    e^s, negatives from a bank of student embeddings; "both" adds the two, as the paper does.

    The defaults are those of the paper and its public code (RepDistiller) with these exceptions,
    which did better or cost less: keys="stop_gradient" (theirs: keys="bank"), standardised features
    (standardize=False), one set of negatives for the batch (negative_sampling="per_sample"). Heads
    belong into the optimizer at a tenth of the student's learning rate, as
    :meth:`parameter_groups` gives them (factor=1 for theirs), and the bank starts from the teacher
    (:meth:`fill`; theirs starts random).

    Args:
        keys: "stop_gradient": the teacher's head stays as initialised and gets no gradient. "live":
            the teacher's bank holds backbone features, which the current head embeds, with
            gradient. "bank": the positive is the sample's own row of the bank, before its update;
            in "student" direction the teacher's head gets no gradient then, and direction "teacher"
            alone is refused, since nothing would reach the student.
        negative_sampling: "shared": K rows for the whole batch, which makes the pass one matrix
            product; "per_sample": K rows for each query, int64 [B, K]. Both are drawn anew in each
            step, on the bank's device, uniformly and with replacement; what a query meets has
            the same distribution.
        exclusion: "mask" leaves a query's own row, and with ``exclude_same_label`` its class, out
            of the K rows drawn; "draw" never draws them, so that exactly K negatives remain (needs
            "per_sample"): from the other N - 1 rows, or those of other and of unknown class.
        distinct: without replacement: K different rows (see :meth:`MemoryBank.sample`).
        The others are those of :class:`CRRCDLoss`. Embeddings share one space: head="identity"
        needs features of one width.

    Raises:
        TypeError, ValueError: for arguments out of their range.

    In :meth:`diagnostics` "relation" stands for the embeddings themselves: ``relation_variance``
    and ``effective_rank`` are those of e^s over the batch.
    """

    NAME = "CRDLoss"
    OPERATOR = staticmethod(functional.instance_nce)
    RELATES = False
    COSINES = staticmethod(cosines.of_instance)
    VECTORS = "student's embeddings"

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int | None,
        *,
        negatives: int | str = 16384,
        embedding_dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        direction: str = "both",
        keys: str = "stop_gradient",
        negative_sampling: str = "shared",
        exclusion: str = "mask",
        distinct: bool = False,
        capacity: int | None = None,
        normalizer: str | float = "first_batch",
        normalizer_momentum: float = 0.99,
        objective: str = "nce",
        head: str = "linear",
        standardize: bool = True,
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
            negative_sampling=negative_sampling,
            exclusion=exclusion,
            distinct=distinct,
            capacity=capacity,
            normalizer=normalizer,
            normalizer_momentum=normalizer_momentum,
            objective=objective,
            head=head,
            standardize=standardize,
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

    def _relations(self, step: Step) -> tuple[Tensor, Tensor]:
        return step.student[None], step.teacher[None]

    def _teacher_learns(self) -> bool:
        # Rows of the bank are no function of the head: for keys="bank" only its queries are.
        return self.keys == "live" or (self.keys == "bank" and self.direction == "both")

    def _has_pair(self, size: int, anchors: int) -> bool:
        return size > 0
