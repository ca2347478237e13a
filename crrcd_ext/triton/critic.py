"""What the losses have around their passes: positives, pairs, the mean, the bank's update."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext._check import check_range
from crrcd_ext._schema import wide_dtype
from crrcd_ext.triton.bank_update import bank_update_


def check_rows(name: str, index: Tensor | None, bank: Tensor) -> None:
    """An index outside of the bank: IndexError on the CPU, an assertion of the device elsewhere."""
    if index is None or index.numel() == 0:
        return
    if index.device.type == "cpu":
        check_range(name, "index", index, bank)
    else:
        inside = (index >= 0) & (index < len(bank))
        torch._assert_async(inside.all(), f"crrcd_ext.{name}: a row outside of the bank")


def kept_pairs(
    anchors: int, query: Tensor, anchor_id: Tensor | None, query_id: Tensor | None, self_pairs: bool
) -> Tensor:
    """bool [A, B]; see reference.kept_pairs."""
    queries, device = query.shape[-2], query.device
    if not self_pairs and anchor_id is not None and query_id is not None:
        return anchor_id[:, None] != query_id[None]
    if not self_pairs and anchor_id is None and query_id is None and anchors == queries:
        return ~torch.eye(anchors, dtype=torch.bool, device=device)
    return torch.ones(anchors, queries, dtype=torch.bool, device=device)


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
