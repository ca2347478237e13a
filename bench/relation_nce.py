"""`python -m bench relation_nce`: the fused operator against plain PyTorch, in time and memory."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import product

from bench import suite
from bench.baselines import BASELINES, make_step
from bench.measure import MM, Limit, MatrixProduct, Meter
from bench.problem import GRADIENTS, Problem, Shape, make_problem
from bench.report import Benchmark
from bench.steps import EXCLUDING, Step

BASE = Shape()
# Every other shape: one size at a time around BASE, then corners and the module's own default.
TABLE = [
    *(replace(BASE, keys=keys) for keys in (256, 1024, 4096, 16384, 65536, 131072)),
    *(replace(BASE, anchors=anchors) for anchors in (16, 256)),
    *(replace(BASE, queries=queries) for queries in (16, 256)),
    *(replace(BASE, anchors=both, queries=both) for both in (16, 256)),
    *(replace(BASE, hidden=hidden) for hidden in (32, 512)),
    *(replace(BASE, relation=relation) for relation in (32, 512)),
    *(replace(BASE, hidden=both, relation=both) for both in (32, 512)),
    replace(BASE, anchors=8, queries=128, keys=16384),
    replace(BASE, anchors=16, queries=16, keys=256, hidden=32, relation=32),
]
# The rivals of the requirement. Chunks that run their backward at once are a further one: faster,
# but for a loss at the end of a graph only, and not for InfoNCE.
USUAL = ("eager", "torch.compile", "chunks + checkpoint", "compiled chunks + checkpoint")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}


@dataclass(frozen=True)
class Case(suite.Case):
    """A shape, the operands' dtype and the gradients that are wanted."""

    shape: Shape
    dtype: str
    grads: str

    command = "relation_nce"
    shape_type = Shape
    baselines = BASELINES

    @property
    def label(self) -> str:
        return f"{self.dtype}, gradients: {self.grads}"

    @property
    def stem(self) -> str:
        return f"relation_nce-{self.dtype}-{self.grads}"

    @property
    def heading(self) -> str:
        which = "stop-gradient keys (the query's gradient only)"
        which = "all gradients" if self.grads == "all" else which
        shape = self.shape
        return (
            f"relation_nce, {self.dtype}, {which}\n"
            f"A={shape.anchors} B={shape.queries} H={shape.hidden} R={shape.relation}"
        )

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def tiny(self) -> Case:
        return replace(self, shape=replace(self.shape, anchors=2, queries=3, keys=8, rows=16))

    def make_problem(self) -> Problem:
        return make_problem(self.shape, self.grads)

    def make_step(self, problem: Problem, name: str, backend: str, chunk: int) -> Step:
        return make_step(problem, name, self.dtype, backend, chunk)

    def needed_bytes(self, name: str) -> int:
        return self.shape.eager_bytes() if self.style(name) == "whole" else 0

    def limits(self, problem: Problem) -> dict[Limit, tuple[Meter, float]]:
        return {MM: (MatrixProduct(self.dtype), self.shape.nominal_operations(self.grads))}


NOTES = """\
x operator: median over rounds of this variant's time over the operator's in the same round.
x torch.mm: nominal rate, (6 A K H R + 6 A B K R)/time for all gradients and
(2 A K H R + 4 A B K R)/time for the query's alone, over the rate of torch.mm on 2048 x 2048
matrices of that dtype in the same round. peak MB: highest resident memory of one step above that
before it, gradients included, from a fresh process. differs: largest relative L2 distance of a
gradient from the operator's. best usual: among eager, torch.compile and checkpointed chunks,
compiled or not; best of all: with chunks whose backward runs at once, too. bfloat16: float32
tensors under torch.autocast, for every variant. crrcd_ext with similar_mask: negatives above a
cosine of 0.2 with rows that stand for the queries, one of a hundred, are found and left out."""

BENCHMARK = Benchmark(
    name="relation_nce",
    case=Case,
    notes=NOTES,
    sizes={"A": "anchors", "B": "queries", "K": "keys", "H": "hidden", "R": "relation"},
    limits=(MM,),
    rivals={"best usual": USUAL, "best of all": None},
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = {"type": int, "nargs": "+"}
    parser.add_argument("--keys", default=[1024, 4096, 16384], **size, help="negatives, K")
    parser.add_argument("--anchors", default=[BASE.anchors], **size, help="A")
    parser.add_argument("--queries", default=[BASE.queries], **size, help="B")
    parser.add_argument("--hidden", default=[BASE.hidden], **size, help="H")
    parser.add_argument("--relation", default=[BASE.relation], **size, help="R")
    parser.add_argument("--bank-dim", default=[BASE.bank_dim], **size, help="D")
    parser.add_argument("--rows", type=int, default=BASE.rows, help="rows of the bank, N")
    parser.add_argument(
        "--shapes", choices=["table"], help="a table of shapes, not the sizes above"
    )
    dtypes = list(TOLERANCE)
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--grads", nargs="+", choices=list(GRADIENTS), default=list(GRADIENTS))
    suite.add_run_arguments(parser, unit="a shape")
    suite.add_variant_arguments(parser, [suite.OPERATOR, EXCLUDING, *BASELINES])


def main(options: argparse.Namespace) -> int:
    sizes = (options.anchors, options.queries, options.keys, options.hidden, options.relation)
    shapes = [Shape(*size, rows=options.rows) for size in product(*sizes, options.bank_dim)]
    if options.shapes == "table":
        shapes = [replace(shape, rows=options.rows) for shape in TABLE]
        options.no_memory = True
    kinds = list(product(options.dtype, options.grads))
    cases = [Case(shape, *kind) for kind in kinds for shape in shapes]
    alone = [
        Case(replace(shapes[0], keys=keys), *kind) for kind in kinds for keys in options.memory_keys
    ]
    return suite.run(BENCHMARK, cases, alone, options)
