"""What the losses have around their passes: positives, the mean, the bank's update."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from crrcd_ext._schema import wide_dtype
from crrcd_ext.triton.bank_update import bank_update_
from crrcd_ext.triton.passes import INFONCE, NCE


def number(x: Tensor, device: torch.device) -> Tensor:
    """A number on the device, wherever it comes from: filled in, as a copy from the host waits."""
    if x.device == device:
        return x
    return torch.full((), x.item(), dtype=x.dtype, device=device)


def weights_of(weights: Tensor | None, reduction: str, query: Tensor, *shape: int) -> Tensor | None:
    """Weights of that shape in the wide dtype, or None where the losses' sum is enough."""
    wide = wide_dtype(query.dtype)
    if weights is None:
        return query.new_ones(shape, dtype=wide) if reduction == "none" else None
    return weights.to(wide).expand(shape).contiguous()


class Negatives(Protocol):
    """Passes over the negatives, which leave the gradients of a sum over the pairs that count, by
    their weights if they have any."""

    loss: Tensor
    """After a run for NCE: the sum over negatives and pairs; with weights that of each pair, or
    query, without its weight."""

    def normaliser(self) -> Tensor:
        """Of each pair, the logarithm of the sum of exp of its negatives' logits, in float64; -inf
        where there is none."""

    def run(self, mode: int, normaliser: Tensor | None = None) -> None:
        """All that is wanted; for INFONCE with the logarithms of the whole normaliser."""


def contrast(
    objective: str,
    negatives: Negatives,
    cosine: Tensor,
    scale: Tensor,
    offset: Tensor,
    pairs: Tensor,
    gradients: bool,
    weights: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its sum's slopes by the positive logits, and what makes sums to what is wanted.

    ``cosine``: of the positives; ``gradients``: whether any but the positives' own is wanted;
    ``weights``: of the pairs, or queries, where the losses are wanted one by one.
    """
    wide = cosine.dtype
    positive = scale.to(wide) * cosine - offset.to(wide)
    if objective == "nce":
        negatives.run(NCE)
        loss = torch.nn.functional.softplus(-positive, threshold=200.0)
        slope = -torch.sigmoid(-positive)
        loss = loss.masked_fill(~pairs, 0)
        if weights is None:
            loss = loss.sum()
        elif negatives.loss.dim() < loss.dim():  # of a query, whose pairs have one weight
            loss = loss.sum(0)
        loss = loss + negatives.loss
    else:
        whole = torch.logaddexp(negatives.normaliser(), positive.double())
        if gradients:
            negatives.run(INFONCE, whole)
        slope = torch.expm1(positive - whole).to(wide)
        loss = (whole - positive).masked_fill(~pairs, 0)
        if weights is None:
            loss = loss.sum()
    slope = slope.masked_fill(~pairs, 0)
    if weights is not None:
        loss, slope = loss * weights, slope * weights
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        mean = 1 / pairs.sum().clamp(min=1).to(wide)
        return loss * mean, slope, mean
    return loss, slope, torch.ones_like(scale, dtype=wide)


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
