"""What the losses have around their passes: positives, the mean, the bank's update."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext._schema import wide_dtype
from crrcd_ext.triton.bank_update import bank_update_


def contrast(
    objective: str, positive: Tensor, negatives: Tensor, pairs: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the loss over the pairs that count, and its slope by the positive logits.

    ``negatives``: their part of the sum, or the logarithms of InfoNCE's whole normaliser.
    """
    if objective == "nce":
        loss = torch.nn.functional.softplus(-positive, threshold=200.0)
        slope = -torch.sigmoid(-positive)
        total = loss.masked_fill(~pairs, 0).sum() + negatives
    else:
        slope = torch.expm1(positive - negatives)
        total = (negatives - positive).masked_fill(~pairs, 0).sum()
    return total, slope.masked_fill(~pairs, 0)


def results(
    query: Tensor, loss: Tensor, need: int, inputs: tuple[Tensor | None, ...], found: tuple
) -> tuple[Tensor, ...]:
    """The operator's outputs: the gradients that are wanted, in their inputs' dtypes and places."""
    gradients = []
    for bit, (x, gradient) in enumerate(zip(inputs, found, strict=True)):
        like = query if x is None else x
        if not need & 1 << bit:
            gradients.append(like.new_empty((0,)))
        else:
            # A copy where two gradients would share memory, which an operator's outputs may not.
            gradients.append(gradient.to(like).reshape(like.shape).contiguous())
    return loss.to(wide_dtype(query.dtype)), *gradients


def update(bank: Tensor, arguments: tuple) -> None:
    """Commits the update that an operator ending in an underscore has for its last arguments."""
    if arguments:
        bank_update_(bank, *arguments)
