"""How a variant computes its loss, goes through the negatives, and becomes a step to be timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint

Loss = Callable[[], torch.Tensor]
Step = Callable[[], torch.Tensor]

OPERATOR = "crrcd_ext"
EXCLUDING = f"{OPERATOR} with similar_mask"
"""The operator without negatives that are similar to their query, which it finds first."""
SIMILAR = 0.2
"""Cosine above which they are: one of a hundred random rows of 128 columns."""
CHUNKS = (64, 128, 256, 512, 1024)


class Problem(Protocol):
    """The tensors of a case; a step leaves its gradients in them."""

    def clear_gradients(self) -> None: ...

    def gradients(self) -> dict[str, torch.Tensor]: ...


def in_pieces(
    style: str,
    pieces: Sequence[torch.Tensor],
    part: Callable[[torch.Tensor], torch.Tensor],
    merge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    finish: Callable[[torch.Tensor], torch.Tensor],
) -> Loss:
    """A loss over pieces of the negatives' index: finish(merge(part(piece), ...)).

    "whole" expects one piece; "checkpoint" recomputes each piece in the backward pass.
    """
    if style == "whole":
        return lambda: finish(part(pieces[0]))

    def again(piece: torch.Tensor) -> torch.Tensor:
        return checkpoint(part, piece, use_reentrant=False, preserve_rng_state=False)

    return lambda: finish(reduce(merge, map(again, pieces)))


def as_step(
    problem: Problem, loss: Loss, context: Callable[[], AbstractContextManager] = nullcontext
) -> Step:
    """Forward pass in `context`, backward pass outside of it; returns the loss."""

    def step() -> torch.Tensor:
        problem.clear_gradients()
        with context():
            value = loss()
        value.backward()
        return value.detach()

    return step
