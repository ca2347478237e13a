"""What the problems of instance_nce and difference_nce have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch

from bench import suite
from bench.report import Benchmark

NEGATIVES = ("shared", "own")
OBJECTIVES = ("nce", "infonce")
DTYPES = ("float32", "bfloat16")
SCALE = 10.0


@dataclass
class Problem:
    """Unit rows, and a bank that does not learn; query and positive want gradients."""

    query: torch.Tensor  # [B, D]
    positive: torch.Tensor  # [B, D]
    bank: torch.Tensor  # [N, D] in its storage type
    index: torch.Tensor  # [K] or [B, K] rows of the bank, drawn with replacement
    offset: float
    anchor: torch.Tensor | None = None  # [A, D], of the bank's kind: no gradient

    scale = SCALE

    def clear_gradients(self) -> None:
        self.query.grad = self.positive.grad = None

    def gradients(self) -> dict[str, torch.Tensor]:
        return {
            "query": self.query.grad.detach().clone(),
            "positive": self.positive.grad.detach().clone(),
        }


def unit_rows(count: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)


def make_bank(rows: int, dim: int, dtype: str, generator: torch.Generator) -> torch.Tensor:
    """Unit rows, made in pieces: a large bank in half precision needs no float32 copy."""
    bank = torch.empty(rows, dim, dtype=getattr(torch, dtype))
    for piece in bank.split(1 << 16):
        piece.copy_(unit_rows(len(piece), dim, generator))
    return bank


def make_problem(shape, negatives: str, dtype: str, anchors: int | None = None) -> Problem:
    """`shape` has queries, keys, dim and rows; Zbar of the offset is that of random unit rows."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    size = (shape.keys,) if negatives == "shared" else (shape.queries, shape.keys)
    spread = SCALE**2 / (2 * shape.dim)  # log of mean exp(SCALE x), x of variance 1 / D
    return Problem(
        query=unit_rows(shape.queries, shape.dim, generator).requires_grad_(),
        positive=unit_rows(shape.queries, shape.dim, generator).requires_grad_(),
        bank=make_bank(shape.rows, shape.dim, dtype, generator),
        index=torch.randint(shape.rows, size, generator=generator),
        offset=float(torch.tensor(float(shape.keys)).log()) + spread,
        anchor=None if anchors is None else unit_rows(anchors, shape.dim, generator),
    )


@dataclass(frozen=True)
class Case(suite.Case):
    """A shape, whose negatives they are, the objective and the storage type of the bank."""

    negatives: str
    objective: str
    dtype: str

    tolerance = 1e-3
    # whose negatives -> baselines
    baselines_of: ClassVar[Mapping[str, Mapping[str, tuple[str, bool]]]]

    @property
    def baselines(self) -> Mapping[str, tuple[str, bool]]:
        return self.baselines_of[self.negatives]

    @property
    def label(self) -> str:
        whose = "shared negatives" if self.negatives == "shared" else "negatives of each query"
        return f"{whose}, {self.objective}, {self.dtype} bank of {self.shape.rows:,} rows"

    @property
    def stem(self) -> str:
        options = f"{self.negatives}-{self.objective}-{self.dtype}-{self.shape.rows}"
        return f"{self.command}-{options}"

    @property
    def sizes(self) -> str:
        return f"B={self.shape.queries} D={self.shape.dim}"

    @property
    def heading(self) -> str:
        return f"{self.command}, {self.label}\n{self.sizes}"


def add_arguments(
    parser: argparse.ArgumentParser, shared: list[int], own: list[int], rows: list[int]
) -> None:
    """Sizes and options that both commands take."""
    size = {"type": int, "nargs": "+"}
    parser.add_argument("--queries", type=int, default=64, help="B")
    parser.add_argument("--dim", type=int, default=128, help="D")
    parser.add_argument("--rows", default=rows, **size, help="rows of the bank, N")
    parser.add_argument("--keys", default=shared, **size, help="shared negatives, K")
    parser.add_argument(
        "--own-keys", default=own, **size, help="negatives, K, where each query has its own"
    )
    for name, choices in (("negatives", NEGATIVES), ("objective", OBJECTIVES)):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=list(choices))
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="storage of the bank"
    )
    suite.add_run_arguments(parser)
    suite.add_patience_argument(parser)


def run(
    benchmark: Benchmark, options: argparse.Namespace, shape_of: Callable[[int, int], Any]
) -> int:
    """Every combination of the options; `shape_of` makes a shape of K and N."""

    def case(keys: int, rows: int, *kind: str) -> suite.Case:
        return benchmark.case(shape_of(keys, rows), *kind)

    counts = {"shared": options.keys, "own": options.own_keys}
    kinds = list(product(options.rows, options.negatives, options.objective, options.dtype))
    cases = [case(keys, *kind) for kind in kinds for keys in sorted(counts[kind[1]])]
    alone = [
        case(keys, options.rows[0], *kind)
        for kind in product(["shared"], options.objective, options.dtype)
        for keys in options.memory_keys
    ]
    return suite.run(benchmark, cases, alone, options, suite.Patience(options.patience))
