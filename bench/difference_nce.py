"""`python -m bench difference_nce`: CRCD's operator against plain PyTorch, in time and memory."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F

from bench import embeddings, suite
from bench.embeddings import Problem
from bench.measure import EXP, MM, ROWS, Exponentials, Limit, MatrixProduct, Meter, RowSums
from bench.report import Benchmark
from bench.steps import OPERATOR, Step, as_step, in_pieces

BASELINES: dict[str, tuple[str, bool]] = {
    "public way": ("public", False),
    "vectors": ("vectors", False),
    "eager": ("whole", False),
    "torch.compile": ("whole", True),
    "chunks + checkpoint": ("checkpoint", False),
    "compiled chunks + checkpoint": ("checkpoint", True),
}


@dataclass(frozen=True)
class Shape:
    """A anchors, B queries, K negatives (each query's, or shared), a bank of N rows x D."""

    anchors: int = 64
    queries: int = 64
    keys: int = 4096
    dim: int = 128
    rows: int = 50_000

    def __str__(self) -> str:
        return f"A={self.anchors} B={self.queries} K={self.keys} D={self.dim} N={self.rows}"


def kept_pairs(anchors: int, queries: int) -> torch.Tensor:
    """[A, B]: one over the number of pairs; 0 where a sample would be paired with itself."""
    kept = torch.ones(anchors, queries)
    if anchors == queries:
        kept.fill_diagonal_(0)
    return kept / kept.sum().clamp_min(1)


def vectors_loss(
    query: torch.Tensor,
    positive: torch.Tensor,
    anchor: torch.Tensor,
    bank: torch.Tensor,
    index: torch.Tensor,
    pairs: torch.Tensor,
    scale: float,
    offset: float,
    objective: str,
) -> torch.Tensor:
    """All relation vectors in memory; `index` [B, K] for every query's own, [K] for shared."""
    dim = query.shape[1]
    seen_from = anchor[:, None]
    relation = F.normalize(query - seen_from, dim=2)  # [A, B, D]
    wanted = F.normalize(positive - seen_from, dim=2)
    rows = bank.index_select(0, index.reshape(-1)).view(*index.shape, dim).to(query.dtype)
    if index.dim() == 2:
        others = F.normalize(rows - anchor[:, None, None], dim=3)  # [A, B, K, D]
        score = torch.einsum("abkd,abd->abk", others, relation).mul(scale).exp()
    else:
        others = F.normalize(rows - seen_from, dim=2)  # [A, K, D]
        score = torch.bmm(relation, others.transpose(1, 2)).mul(scale).exp()
    of_wanted = (relation * wanted).sum(2).mul(scale).exp()
    if objective == "infonce":
        return (pairs * ((score.sum(2) + of_wanted).log() - of_wanted.log())).sum()
    noise = torch.tensor(offset).exp()
    terms = (of_wanted / (of_wanted + noise)).log() + (noise / (score + noise)).log().sum(2)
    return -(pairs * terms).sum()


def negatives_part(
    query: torch.Tensor,
    anchor: torch.Tensor,
    bank: torch.Tensor,
    index: torch.Tensor,
    scale: float,
    offset: float,
    objective: str,
) -> torch.Tensor:
    """[A, B]: sum of softplus over the negatives `index`, or their logsumexp, from scalar products.

    <q - a, m - a> = <q, m> - <q, a> - <a, m> + <a, a>, and the squares of the norms likewise.
    """
    with torch.no_grad():
        rows = bank[index].to(query.dtype)  # [K, D] or [B, K, D]
        square = anchor.square().sum(1)[:, None]  # [A, 1]
        seen = torch.einsum("ad,...kd->a...k", anchor, rows)  # [A, K] or [A, B, K]
        shift = seen - (square if index.dim() == 1 else square[..., None])
        # |m - a|^2 = |m|^2 - <a, m> - (<a, m> - |a|^2)
        inverse = (rows.square().sum(-1) - seen - shift).clamp_min(1e-12).rsqrt_()
        if index.dim() == 1:
            shift, inverse = shift[:, None], inverse[:, None]  # [A, 1, K]
    if index.dim() == 1:
        products = query @ rows.T  # [B, K]
    else:
        products = torch.bmm(rows, query[:, :, None]).squeeze(2)
    of_query = anchor @ query.T  # [A, B]
    length = (query.square().sum(1) - 2 * of_query + square).clamp_min(1e-12).rsqrt()
    # (<q, m> - <q, a> - shift) / (|q - a| |m - a|)
    numerator = (products - shift) - of_query[..., None]
    logits = numerator * inverse * (scale * length)[..., None] - offset
    return F.softplus(logits).sum(2) if objective == "nce" else logits.logsumexp(2)


def finish(problem: Problem, pairs: torch.Tensor, objective: str, negatives: torch.Tensor):
    """The loss from what negatives_part made of all negatives."""
    seen_from = problem.anchor[:, None]
    relation = F.normalize(problem.query - seen_from, dim=2)
    wanted = F.normalize(problem.positive - seen_from, dim=2)
    logits = problem.scale * (relation * wanted).sum(2) - problem.offset
    if objective == "nce":
        return (pairs * (negatives + F.softplus(-logits))).sum()
    return (pairs * (torch.logaddexp(negatives, logits) - logits)).sum()


def baseline_step(problem: Problem, name: str, objective: str, chunk: int) -> Step:
    style, compiled = BASELINES[name]
    function = torch.compile(negatives_part, dynamic=False, fullgraph=True)
    function = function if compiled else negatives_part
    critic = (problem.scale, problem.offset, objective)
    queries = len(problem.query)
    pairs = kept_pairs(len(problem.anchor), queries)
    if style in ("public", "vectors"):
        index = problem.index.expand(queries, -1) if style == "public" else problem.index
        inputs = (problem.query, problem.positive, problem.anchor, problem.bank, index, pairs)
        return as_step(problem, partial(vectors_loss, *inputs, *critic))
    loss = in_pieces(
        style,
        problem.index.split(problem.index.shape[-1] if style == "whole" else chunk, dim=-1),
        lambda index: function(problem.query, problem.anchor, problem.bank, index, *critic),
        torch.add if objective == "nce" else torch.logaddexp,
        partial(finish, problem, pairs, objective),
    )
    return as_step(problem, loss)


def operator_step(problem: Problem, objective: str, backend: str) -> Step:
    from crrcd_ext import functional

    return as_step(
        problem,
        lambda: functional.difference_nce(
            problem.query,
            problem.positive,
            problem.anchor,
            problem.bank,
            problem.index,
            scale=problem.scale,
            offset=problem.offset,
            objective=objective,
            backend=backend,
        ),
    )


@dataclass(frozen=True)
class Case(embeddings.Case):
    """A shape, whose negatives they are, the objective and the storage type of the bank."""

    shape: Shape

    command = "difference_nce"
    shape_type = Shape
    baselines_of = MappingProxyType(
        {
            "shared": BASELINES,
            # Vectors of every query's own negatives are the public way.
            "own": {name: how for name, how in BASELINES.items() if name != "vectors"},
        }
    )

    @property
    def sizes(self) -> str:
        return f"A={self.shape.anchors} {super().sizes}"

    def tiny(self) -> Case:
        return replace(self, shape=replace(self.shape, anchors=2, queries=3, keys=8, rows=16))

    def make_problem(self) -> Problem:
        return embeddings.make_problem(
            self.shape, self.negatives, self.dtype, anchors=self.shape.anchors
        )

    def make_step(self, problem: Problem, name: str, backend: str, chunk: int) -> Step:
        if name == OPERATOR:
            return operator_step(problem, self.objective, backend)
        return baseline_step(problem, name, self.objective, chunk)

    def needed_bytes(self, name: str) -> int:
        style, shape = self.style(name), self.shape
        vectors = 4 * shape.anchors * shape.keys * shape.dim
        logits = 4 * shape.anchors * shape.queries * shape.keys
        if style == "public":
            return 2 * vectors * shape.queries + 4 * logits
        if style == "vectors":
            return 2 * vectors + 4 * logits
        return 5 * logits if style == "whole" else 0

    def limits(self, problem: Problem) -> dict[Limit, tuple[Meter, float]]:
        shape = self.shape
        logits = shape.queries * shape.keys
        seen = shape.anchors * shape.keys * (shape.queries if self.negatives == "own" else 1)
        sums = RowSums(problem.bank, problem.index)
        return {
            MM: (MatrixProduct("float32"), 4.0 * logits * shape.dim + 2.0 * seen * shape.dim),
            EXP: (Exponentials(), float(shape.anchors * logits)),
            ROWS: (sums, sums.amount),
        }


NOTES = """\
One step: forward and backward to query and positive; anchors and bank have no gradient. x operator:
median over rounds of this variant's time over the operator's in the same round. The other x are
fractions of limits measured in the same rounds. x torch.mm: (4 B K D + 2 A K D)/time, or (4 B K D +
2 A B K D)/time where each query has its own, the products of the form by scalar products, over the
rate of torch.mm on 2048 x 2048 float32 matrices. x torch.exp: A B K exponentials/time over the rate
of torch.exp on numbers that stay in cache; above 1: the exponentials are made faster than torch.exp
makes them. x row sums: bytes of the rows that the index names/time over the rate at which
torch.nn.functional.embedding_bag sums the same rows in the same order, which only reads. peak MB:
highest resident memory of one step above that before it, gradients included, from a fresh process.
differs: largest relative L2 distance of a gradient from the operator's. public way: every relation
of every query, [A, B, K, D], as in the public code of CRCD; vectors: [A, K, D] for shared
negatives; eager, compiled or in chunks: matrices of scalar products, no difference formed."""

BENCHMARK = Benchmark(
    name="difference_nce",
    case=Case,
    notes=NOTES,
    sizes={"A": "anchors", "B": "queries", "K": "keys", "D": "dim", "N": "rows"},
    limits=(MM, EXP, ROWS),
    rivals={"public": ("public way",), "Gram, eager": ("eager",), "best of all": None},
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    embeddings.add_arguments(
        parser,
        shared=[1024, 4096, 16384, 65536, 262_144, 1_000_000],
        own=[500, 4096, 16384],
        rows=[50_000],
    )
    parser.add_argument("--anchors", type=int, default=64, help="A")
    suite.add_variant_arguments(parser, [OPERATOR, *BASELINES])


def main(options: argparse.Namespace) -> int:
    return embeddings.run(
        BENCHMARK,
        options,
        lambda keys, rows: Shape(options.anchors, options.queries, keys, options.dim, rows),
    )
