"""`python -m bench instance_nce`: CRD's operator against plain PyTorch, in time and memory."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from bench import embeddings, suite
from bench.embeddings import Problem
from bench.measure import (
    EXP,
    MM,
    ROW_COPIES,
    ROWS,
    Exponentials,
    Limit,
    MatrixProduct,
    Meter,
    RowCopies,
    RowSums,
)
from bench.report import Benchmark
from bench.steps import EXCLUDING, OPERATOR, SIMILAR, Step, as_step, in_pieces

BASELINES: dict[str, tuple[str, bool]] = {
    "public way": ("public", False),
    "compiled public way": ("public", True),
    "eager": ("whole", False),
    "torch.compile": ("whole", True),
    "chunks + checkpoint": ("checkpoint", False),
    "compiled chunks + checkpoint": ("checkpoint", True),
}


@dataclass(frozen=True)
class Shape:
    """B queries, K negatives (each, or together), a bank of N rows x D."""

    queries: int = 64
    keys: int = 4096
    dim: int = 128
    rows: int = 50_000

    def __str__(self) -> str:
        return f"B={self.queries} K={self.keys} D={self.dim} N={self.rows}"


def public_loss(
    query: torch.Tensor,
    positive: torch.Tensor,
    bank: torch.Tensor,
    index: torch.Tensor,
    scale: float,
    offset: float,
    objective: str,
) -> torch.Tensor:
    """Everything for every query in one tensor: positive in column 0, K negatives behind it."""
    batch, dim = query.shape
    rows = bank.index_select(0, index.reshape(-1)).view(batch, -1, dim).to(query.dtype)
    candidates = torch.cat([positive[:, None], rows], 1)
    score = torch.bmm(candidates, query[:, :, None]).squeeze(2).mul(scale).exp()
    if objective == "infonce":
        return (score.sum(1).log() - score[:, 0].log()).mean()
    noise = torch.tensor(offset).exp()
    of_positive = (score[:, 0] / (score[:, 0] + noise)).log()
    of_negatives = (noise / (score[:, 1:] + noise)).log()
    return -(of_positive.sum() + of_negatives.sum()) / batch


def negatives_part(
    query: torch.Tensor,
    bank: torch.Tensor,
    index: torch.Tensor,
    scale: float,
    offset: float,
    objective: str,
) -> torch.Tensor:
    """[B]: sum of softplus over the negatives `index`, or their logsumexp."""
    rows = bank[index].to(query.dtype)
    if index.dim() == 1:
        logits = (scale * query) @ rows.T - offset
    else:
        logits = torch.bmm(rows, scale * query[:, :, None]).squeeze(2) - offset
    return F.softplus(logits).sum(1) if objective == "nce" else logits.logsumexp(1)


def finish(problem: Problem, objective: str, negatives: torch.Tensor) -> torch.Tensor:
    """The loss from what negatives_part made of all negatives."""
    logits = problem.scale * (problem.query * problem.positive).sum(1) - problem.offset
    if objective == "nce":
        return (negatives + F.softplus(-logits)).mean()
    return (torch.logaddexp(negatives, logits) - logits).mean()


def baseline_step(problem: Problem, name: str, objective: str, chunk: int) -> Step:
    style, compiled = BASELINES[name]
    function = public_loss if style == "public" else negatives_part
    if compiled:
        function = torch.compile(function, dynamic=False, fullgraph=True)
    critic = (problem.scale, problem.offset, objective)
    if style == "public":
        index = problem.index.expand(len(problem.query), -1)
        inputs = (problem.query, problem.positive, problem.bank, index, *critic)
        return as_step(problem, partial(function, *inputs))
    loss = in_pieces(
        style,
        problem.index.split(problem.index.shape[-1] if style == "whole" else chunk, dim=-1),
        lambda index: function(problem.query, problem.bank, index, *critic),
        torch.add if objective == "nce" else torch.logaddexp,
        partial(finish, problem, objective),
    )
    return as_step(problem, loss)


def operator_step(problem: Problem, objective: str, backend: str, excluding: bool) -> Step:
    from crrcd_ext import functional

    def loss() -> torch.Tensor:
        negatives = problem.bank, problem.index
        excluded = None
        if excluding:  # by the teacher's embeddings, which the bank has too
            excluded = functional.similar_mask(
                problem.positive, *negatives, threshold=SIMILAR, backend=backend
            )
        return functional.instance_nce(
            problem.query,
            problem.positive,
            *negatives,
            scale=problem.scale,
            offset=problem.offset,
            excluded=excluded,
            objective=objective,
            backend=backend,
        )

    return as_step(problem, loss)


@dataclass(frozen=True)
class Case(embeddings.Case):
    """A shape, whose negatives they are, the objective and the storage type of the bank."""

    shape: Shape

    command = "instance_nce"
    shape_type = Shape
    baselines_of = dict.fromkeys(embeddings.NEGATIVES, BASELINES)

    def tiny(self) -> Case:
        return replace(self, shape=replace(self.shape, queries=3, keys=8, rows=16))

    def make_problem(self) -> Problem:
        return embeddings.make_problem(self.shape, self.negatives, self.dtype)

    def make_step(self, problem: Problem, name: str, backend: str, chunk: int) -> Step:
        if name in (OPERATOR, EXCLUDING):
            return operator_step(problem, self.objective, backend, name == EXCLUDING)
        return baseline_step(problem, name, self.objective, chunk)

    def needed_bytes(self, name: str) -> int:
        style, shape = self.style(name), self.shape
        logits = 4 * shape.queries * shape.keys
        if style == "public":
            return 2 * logits * shape.dim + 4 * logits
        if style == "whole":
            own = self.negatives == "own"
            return 4 * shape.keys * shape.dim * (shape.queries if own else 1) + 3 * logits
        return 0

    def limits(self, problem: Problem) -> dict[Limit, tuple[Meter, float]]:
        logits = self.shape.queries * self.shape.keys
        sums, copies = (kind(problem.bank, problem.index) for kind in (RowSums, RowCopies))
        return {
            MM: (MatrixProduct("float32"), 4.0 * logits * self.shape.dim),
            EXP: (Exponentials(), float(logits)),
            ROWS: (sums, sums.amount),
            ROW_COPIES: (copies, copies.amount),
        }


NOTES = """\
One step: forward and backward to query and positive; the bank has no gradient. x operator: median
over rounds of this variant's time over the operator's in the same round. The other x are fractions
of limits measured in the same rounds. x torch.mm: 4 B K D operations/time over the rate of torch.mm
on 2048 x 2048 float32 matrices. x torch.exp: B K exponentials/time over the rate of torch.exp on
numbers that stay in cache. x row sums: bytes of the rows that the index names (K, or B K where each
query has its own)/time over the rate at which torch.nn.functional.embedding_bag sums the same rows
in the same order, which only reads. x row copies: the same over the rate of torch.index_select of
these rows into a buffer that stays in cache. Above 1: fewer bytes were read, each row once for
several queries. peak MB: highest resident memory of one step above that before it, gradients
included, from a fresh process. differs: largest relative L2 distance of a gradient from the
operator's. public way: positive and negatives gathered into [B, K + 1, D], batched product,
exp and log, as in the public code of CRD; eager: gathered rows once (shared: one product of
matrices), softplus or logsumexp. crrcd_ext with similar_mask: negatives above a cosine of 0.2 with
the positive, one of a hundred, are found and left out."""

BENCHMARK = Benchmark(
    name="instance_nce",
    case=Case,
    notes=NOTES,
    sizes={"B": "queries", "K": "keys", "D": "dim", "N": "rows"},
    limits=(MM, EXP, ROWS, ROW_COPIES),
    rivals={"public": ("public way",), "best of all": None},
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    embeddings.add_arguments(
        parser,
        shared=[1024, 4096, 16384, 65536, 262_144, 1_000_000],
        own=[1024, 4096, 16384],
        rows=[50_000, 2_000_000],
    )
    suite.add_variant_arguments(parser, [OPERATOR, EXCLUDING, *BASELINES])


def main(options: argparse.Namespace) -> int:
    return embeddings.run(
        BENCHMARK,
        options,
        lambda keys, rows: Shape(options.queries, keys, options.dim, rows),
    )
