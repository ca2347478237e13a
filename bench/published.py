"""Training steps of the published losses in eager PyTorch, in the manner of their public code.

CRD and CRCD contrast each network's embeddings with the other's memory and gather everything a
query meets; InfoNCE with a queue is a product of matrices and a cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

EPS = 1e-7  # in the logarithms
DIFFERENCE_EPS = 1e-6  # on every component of a difference


def embed(head: torch.nn.Linear, features: torch.Tensor) -> torch.Tensor:
    embedding = head(features)
    return embedding / embedding.square().sum(1, keepdim=True).sqrt()


def instance_scores(
    embedding: torch.Tensor, memory: torch.Tensor, ids: torch.Tensor, candidates: torch.Tensor
) -> torch.Tensor:
    """[B, K + 1]: cosines of an embedding and its candidates, which are gathered."""
    batch, dim = embedding.shape
    rows = memory.index_select(0, candidates.view(-1)).view(batch, -1, dim)
    return torch.bmm(rows, embedding[:, :, None]).squeeze(2)


def difference_scores(
    embedding: torch.Tensor, memory: torch.Tensor, ids: torch.Tensor, candidates: torch.Tensor
) -> torch.Tensor:
    """[B A, K + 1]: cosines of directions from the anchors, which are the batch's memory rows."""
    batch, dim = embedding.shape
    anchors = memory.index_select(0, ids)
    relation = F.normalize(embedding[:, None] - anchors + DIFFERENCE_EPS, dim=2)  # [B, A, D]
    rows = memory.index_select(0, candidates.view(-1)).view(batch, 1, -1, dim)
    others = F.normalize(rows - anchors[:, None] + DIFFERENCE_EPS, dim=3)  # [B, A, K + 1, D]
    return torch.bmm(others.flatten(0, 1), relation.view(-1, dim, 1)).squeeze(2)


def nce(scores: torch.Tensor, temperature: float, constant: torch.Tensor, rows: int):
    """Mean over queries of the positive's (column 0) and the negatives' log probabilities."""
    likelihood = scores.div(temperature).exp() / constant
    noise = (scores.shape[1] - 1) / rows
    positive, negatives = likelihood[:, 0], likelihood[:, 1:]
    of_positive = (positive / (positive + noise + EPS)).log()
    of_negatives = (noise / (negatives + noise + EPS)).log()
    return -(of_positive.sum() + of_negatives.sum()) / len(scores)


@torch.no_grad()
def update_(memory: torch.Tensor, ids: torch.Tensor, value: torch.Tensor, momentum: float) -> None:
    rows = momentum * memory.index_select(0, ids) + (1 - momentum) * value
    memory.index_copy_(0, ids, rows / rows.square().sum(1, keepdim=True).sqrt())


class TwoSided:
    """CRD with `instance_scores`, CRCD with `difference_scores`; constants of the first batch."""

    def __init__(
        self,
        scores: Callable[..., torch.Tensor],
        heads: tuple[torch.nn.Linear, torch.nn.Linear],
        memories: tuple[torch.Tensor, torch.Tensor],
        temperature: float,
        momentum: float,
        compiled: bool,
    ) -> None:
        self.scores = scores
        self.student_head, self.teacher_head = heads
        self.student_memory, self.teacher_memory = memories
        self.temperature = temperature
        self.momentum = momentum
        self.constants: list[torch.Tensor] | None = None

        def side(embedding, memory, ids, candidates, constant):
            found = scores(embedding, memory, ids, candidates)
            return nce(found, temperature, constant, len(memory))

        self.side = torch.compile(side, dynamic=False, fullgraph=True) if compiled else side

    def __call__(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        ids: torch.Tensor,
        candidates: torch.Tensor,
    ) -> torch.Tensor:
        of_student = embed(self.student_head, student)
        of_teacher = embed(self.teacher_head, teacher)
        sides = ((of_student, self.teacher_memory), (of_teacher, self.student_memory))
        if self.constants is None:
            with torch.no_grad():
                self.constants = [
                    self.scores(query, memory, ids, candidates)
                    .div(self.temperature)
                    .exp()
                    .mean()
                    .mul(len(memory))
                    for query, memory in sides
                ]
        loss = sum(
            self.side(query, memory, ids, candidates, constant)
            for (query, memory), constant in zip(sides, self.constants, strict=True)
        )
        update_(self.student_memory, ids, of_student, self.momentum)
        update_(self.teacher_memory, ids, of_teacher, self.momentum)
        return loss


class Queue:
    """InfoNCE of student embeddings against the teacher's, with K rows of a queue as negatives.

    :meth:`enqueue`, after the backward pass, puts the teacher's embeddings in place of the oldest
    rows: sooner, autograd would need a copy of the queue.
    """

    def __init__(
        self,
        heads: tuple[torch.nn.Linear, torch.nn.Linear],
        queue: torch.Tensor,
        temperature: float,
        compiled: bool,
    ) -> None:
        self.student_head, self.teacher_head = heads
        self.queue = queue

        def loss(query, positive, queue):
            own = (query * positive).sum(1, keepdim=True)
            logits = torch.cat([own, query @ queue.T], 1) / temperature
            return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))

        self.loss = torch.compile(loss, dynamic=False, fullgraph=True) if compiled else loss

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        query = embed(self.student_head, student)
        with torch.no_grad():
            positive = embed(self.teacher_head, teacher)
        self.value = positive
        return self.loss(query, positive, self.queue)

    def enqueue(self) -> None:
        self.queue[: len(self.value)] = self.value
