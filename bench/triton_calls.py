"""Calls of the operators at the size that their Triton kernels are looked at: A = B = 64, 16,384
negatives, widths of 128, with ids and an index, as the losses call them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crrcd_ext import triton
from crrcd_ext._schema import wide_dtype, words_of

A = B = 64
K = 16384
WIDTH = 128
ROWS = 20_000

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
TYPES |= {"float": torch.float32, "double": torch.float64}
"""What operands are, and how they are multiplied."""


@dataclass(frozen=True)
class Call:
    """One operator with its gradients and objective, in one type."""

    operator: str
    types: str
    gradients: str
    objective: str
    run: Callable[[], object]

    def __str__(self) -> str:
        return " ".join((self.operator, self.types, self.gradients, self.objective))


def calls() -> Iterator[Call]:
    """All that this Triton takes; their kernels are launched when ``run`` is called."""
    for types, dtype in TYPES.items():
        if dtype not in triton.lacks():
            yield from _of(types)


def _of(types: str) -> Iterator[Call]:
    dtype = TYPES[types]

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    def drawn(*shape: int) -> Tensor:
        return torch.randint(ROWS, shape)

    def call(operator: str, gradients: str, objective: str, *arguments) -> Call:
        def run() -> object:
            torch.set_float32_matmul_precision("high" if types == "tf32" else "highest")
            module = importlib.import_module(f"crrcd_ext.triton.{operator.rstrip('_')}")
            return getattr(module, operator)(*arguments)

        return Call(operator, types, gradients, objective, run)

    pairs, vectors, bank = tensor(A, B, WIDTH), tensor(B, WIDTH), tensor(ROWS, WIDTH)
    wide = vectors.to(wide_dtype(dtype))  # as similar_mask comes to the operator
    weight, bias = tensor(WIDTH, WIDTH), tensor(WIDTH)
    critic = torch.tensor(10.0), torch.tensor(math.log(K))
    shared, own, ids = drawn(K), drawn(B, K), drawn(B)
    masks = ids, ids, None, None, None, None
    excluding = *masks[:-1], torch.randint(2**31, (B, words_of(K)), dtype=torch.int32)
    for objective in ("nce", "infonce"):
        for gradients, need in (("query", 1), ("all", 0b111111111)):
            yield call(
                "relation_nce", gradients, objective, pairs, pairs, vectors, bank, weight,
                bias if gradients == "all" else None, *critic, shared, weight, *masks,
                False, objective, None, "mean", need,
            )  # fmt: skip
        for gradients, need in (("query", 1), ("all", 0b111111)):
            for negatives, index in (("", shared), (" own", own)):
                yield call(
                    "difference_nce", gradients + negatives, objective, vectors, vectors, vectors,
                    bank, *critic, index, *masks, False, 0.0, objective, None, "mean", need,
                )  # fmt: skip
        for gradients, need in (("query", 1), ("all", 0b11111)):
            for negatives, index in (("", shared), (" own", own)):
                yield call(
                    "instance_nce", gradients + negatives, objective, vectors, vectors, bank,
                    *critic, index, *masks[1:], objective, None, "mean", need,
                )  # fmt: skip
    # kernels that read bits of what is excluded
    yield call(
        "relation_nce", "all excluded", "nce", pairs, pairs, vectors, bank, weight, bias,
        *critic, shared, weight, *excluding, False, "nce", None, "mean", 0b111111111,
    )  # fmt: skip
    yield call(
        "difference_nce", "all own excluded", "nce", vectors, vectors, vectors, bank, *critic,
        own, *excluding, False, 0.0, "nce", None, "mean", 0b111111,
    )  # fmt: skip
    for negatives, index in (("", shared), (" own", own)):
        yield call(
            "instance_nce", f"all{negatives} excluded", "nce", vectors, vectors, bank, *critic,
            index, *excluding[1:], "nce", None, "mean", 0b11111,
        )  # fmt: skip
    # kernels that weigh
    weights = torch.rand(A, B, dtype=torch.float64)
    yield call(
        "relation_nce", "all weighted", "nce", pairs, pairs, vectors, bank, weight, bias,
        *critic, shared, weight, *masks, False, "nce", weights, "mean", 0b111111111,
    )  # fmt: skip
    yield call(
        "difference_nce", "all weighted", "nce", vectors, vectors, vectors, bank, *critic,
        shared, *masks, False, 0.0, "nce", weights[0], "mean", 0b111111,
    )  # fmt: skip
    yield call(
        "instance_nce", "all weighted", "nce", vectors, vectors, bank, *critic,
        shared, *masks[1:], "nce", weights[0], "mean", 0b11111,
    )  # fmt: skip
    for negatives, index in (("", None), ("own", own)):
        yield call("similar_mask", negatives, "", wide, bank, index, 0.5)
    yield call("relation", "", "", vectors, vectors, weight, bias)
    yield call("bank_update_", "", "", bank, ids, vectors, 0.5, True)
