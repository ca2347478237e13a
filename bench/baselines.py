"""What a competent user writes in plain PyTorch, and the operator, as steps that can be timed.

A step is one forward and one backward pass that leaves the gradients asked for in the leaves of a
Problem. Every baseline computes the same loss and exactly the same gradients as the operator, in
the fastest of the ways that were tried:

- bank rows are gathered and projected once, not once per anchor;
- logits come from one batched product and are divided by the norms afterwards, which beats
  normalising the relation vectors first (the logits are the smaller tensor);
- in-place operations where autograd permits them;
- with stop-gradient keys no graph is recorded on the key side;
- under bf16 autocast eager code casts the anchors too, so that its largest tensor, [A, K, H], is
  bf16; compiled code fuses that cast and is slower with it, so there it is left out;
- chunk lengths are tried beforehand and the fastest is kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F

from bench.problem import Problem
from bench.steps import EXCLUDING, OPERATOR, SIMILAR, Step, as_step, in_pieces

# name -> (how the keys are gone through, compiled). "checkpoint" recomputes a chunk in the backward
# pass; "backward" runs each chunk's backward at once, which a loss that is a sum over keys permits.
BASELINES: dict[str, tuple[str, bool]] = {
    "eager": ("whole", False),
    "torch.compile": ("whole", True),
    "chunks + checkpoint": ("checkpoint", False),
    "compiled chunks + checkpoint": ("checkpoint", True),
    "chunks + backward": ("backward", False),
    "compiled chunks + backward": ("backward", True),
}


def negatives_loss(
    query: torch.Tensor,
    anchor: torch.Tensor,
    bank: torch.Tensor,
    index: torch.Tensor,
    key_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    pair_weight: torch.Tensor,
    scale: float,
    offset: float,
    live_keys: bool,
    cast_anchor: bool,
) -> torch.Tensor:
    """Weighted sum over pairs of sum_n softplus(scale <q, v(a, m_n)> - offset)."""
    with nullcontext() if live_keys else torch.no_grad():
        keys = F.linear(bank.index_select(0, index), key_weight)  # [K, H]
        if cast_anchor:
            anchor = anchor.to(keys.dtype)
        hidden = (anchor[:, None] - keys).relu_()  # [A, K, H]
        relation = F.linear(hidden, weight, bias)  # [A, K, R], not yet of unit length
        norm = torch.linalg.vector_norm(relation, dim=-1).clamp_min(1e-12)  # [A, K]
    logits = torch.bmm(scale * query, relation.transpose(1, 2)) / norm[:, None]  # [A, B, K]
    return (pair_weight * F.softplus(logits - offset).sum(-1)).sum()


def positives_loss(problem: Problem) -> torch.Tensor:
    logits = problem.scale * (problem.query * problem.positive).sum(-1) - problem.offset
    return (problem.pair_weight * F.softplus(-logits)).sum()


def _autocast(dtype: str, device: str) -> AbstractContextManager:
    return torch.autocast(device, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def baseline_step(problem: Problem, name: str, dtype: str, chunk: int = 512) -> Step:
    """A step of the baseline `name`, `chunk` keys at a time where it goes by chunks."""
    style, compiled = BASELINES[name]
    function = negatives_loss
    if compiled:
        function = torch.compile(negatives_loss, dynamic=False, fullgraph=True)
    pieces = problem.index.split(problem.shape.keys if style == "whole" else chunk)

    def loss_of(index: torch.Tensor) -> torch.Tensor:
        return function(
            problem.query,
            problem.anchor,
            problem.bank,
            index,
            problem.key_weight,
            problem.weight,
            problem.bias,
            problem.pair_weight,
            problem.scale,
            problem.offset,
            live_keys=problem.grads == "all",
            cast_anchor=not compiled,
        )

    autocast = partial(_autocast, dtype, problem.query.device.type)
    if style != "backward":

        def finish(negatives: torch.Tensor) -> torch.Tensor:
            return positives_loss(problem) + negatives

        return as_step(problem, in_pieces(style, pieces, loss_of, torch.add, finish), autocast)

    def at_once() -> torch.Tensor:
        problem.clear_gradients()
        with autocast():
            loss = positives_loss(problem)
        loss.backward()
        total = loss.detach()
        for piece in pieces:
            with autocast():
                loss = loss_of(piece)
            loss.backward()
            total = total + loss.detach()
        return total

    return at_once


def operator_step(
    problem: Problem, dtype: str, backend: str = "cpu", excluding: bool = False
) -> Step:
    """A step of crrcd_ext.functional.relation_nce, under the same autocast as the baselines;
    ``excluding``: without negatives that are similar to rows that stand for the queries."""
    from crrcd_ext import functional

    seen = problem.bank[: problem.query.shape[1]]

    def loss() -> torch.Tensor:
        excluded = None
        if excluding:
            excluded = functional.similar_mask(
                seen, problem.bank, problem.index, threshold=SIMILAR, backend=backend
            )
        return functional.relation_nce(
            problem.query,
            problem.positive,
            problem.anchor,
            problem.bank,
            problem.weight,
            problem.bias,
            scale=problem.scale,
            offset=problem.offset,
            index=problem.index,
            key_weight=problem.key_weight,
            excluded=excluded,
            backend=backend,
        )

    return as_step(problem, loss, partial(_autocast, dtype, problem.query.device.type))


def make_step(
    problem: Problem, name: str, dtype: str, backend: str = "cpu", chunk: int = 512
) -> Step:
    if name in (OPERATOR, EXCLUDING):
        return operator_step(problem, dtype, backend, name == EXCLUDING)
    return baseline_step(problem, name, dtype, chunk)
