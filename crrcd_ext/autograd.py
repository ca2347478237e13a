"""Derivatives of the compiled operators.

relation_nce computes its gradients in the forward pass, because a loss that is a scalar needs nothing from backward
but one factor; relation saves what its own backward operator reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEED_RELATION = ("anchor", "sample", "weight", "bias")
NEED_RELATION_NCE = (
    "query",
    "positive",
    "anchor",
    "bank",
    "key_weight",
    "weight",
    "bias",
    "scale",
    "offset",
)


def need_bits(*inputs: Tensor | None) -> int:
    """Bit i is set when input i wants a gradient; 0 under no_grad."""
    if not torch.is_grad_enabled():
        return 0
    need = 0
    for bit, x in enumerate(inputs):
        if x is not None and x.requires_grad:
            need |= 1 << bit
    return need


def _refuse_double_backward(operator: str) -> None:
    # Grad mode is on in backward only under create_graph=True. Going on would return gradients that look
    # differentiable and lack every second derivative, so that the mistake would stay silent.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"crrcd_ext.{operator}: double backward (create_graph=True) is not supported by backend 'cpu'; "
            "use backend='reference'"
        )


class Relation(torch.autograd.Function):
    """crrcd::relation with crrcd::relation_backward as its derivative."""

    @staticmethod
    def forward(ctx, anchor, sample, weight, bias, need):
        relation, inverse_norm = torch.ops.crrcd.relation(anchor, sample, weight, bias)
        ctx.save_for_backward(relation, inverse_norm, anchor, sample, weight)
        ctx.need = need
        return relation

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward("relation")
        gradients = torch.ops.crrcd.relation_backward(grad, *ctx.saved_tensors, ctx.need)
        return *(g if ctx.need & 1 << bit else None for bit, g in enumerate(gradients)), None


class RelationNCE(torch.autograd.Function):
    """crrcd::relation_nce, or crrcd::relation_nce_ when an update is given; the first nine inputs have gradients."""

    @staticmethod
    def forward(
        ctx,
        query,
        positive,
        anchor,
        bank,
        key_weight,
        weight,
        bias,
        scale,
        offset,
        index,
        masks,
        options,
        need,
        update,
    ):
        loss, *gradients = call_relation_nce(
            query,
            positive,
            anchor,
            bank,
            key_weight,
            weight,
            bias,
            scale,
            offset,
            index,
            masks,
            options,
            need,
            update,
        )
        ctx.save_for_backward(*(g for bit, g in enumerate(gradients) if need & 1 << bit))
        ctx.need = need
        return loss

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward("relation_nce")
        saved = iter(ctx.saved_tensors)
        gradients = []
        for bit in range(len(NEED_RELATION_NCE)):
            g = next(saved) if ctx.need & 1 << bit else None
            gradients.append(None if g is None else (g * grad).to(g.dtype))
        return *gradients, None, None, None, None, None


def call_relation_nce(
    query,
    positive,
    anchor,
    bank,
    key_weight,
    weight,
    bias,
    scale,
    offset,
    index,
    masks,
    options,
    need,
    update,
):
    """The operator itself, in its own argument order; ``update`` None or (index, value, momentum, normalize)."""
    arguments = (
        query,
        positive,
        anchor,
        bank,
        weight,
        bias,
        scale,
        offset,
        index,
        key_weight,
        *masks,
        *options,
        need,
    )
    if update is None:
        return torch.ops.crrcd.relation_nce(*arguments)
    result = torch.ops.crrcd.relation_nce_(*arguments, *update)
    torch.autograd.graph.increment_version(bank)
    return result


def relation(anchor: Tensor, sample: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Backend "cpu" of functional.relation; operands share one dtype."""
    need = need_bits(anchor, sample, weight, bias)
    if not need:
        return torch.ops.crrcd.relation(anchor, sample, weight, bias)[0]
    return Relation.apply(anchor, sample, weight, bias, need)


def relation_nce(
    query,
    positive,
    anchor,
    bank,
    key_weight,
    weight,
    bias,
    scale,
    offset,
    index,
    masks,
    options,
    update,
) -> Tensor:
    """Backend "cpu" of functional.relation_nce; operands share one dtype, scale and offset are 0-dim tensors."""
    inputs = (query, positive, anchor, bank, key_weight, weight, bias, scale, offset)
    need = need_bits(*inputs)
    # The compiler cannot trace an autograd.Function that mutates an input: there the update is its own operator,
    # which runs after the pass as its reads of the bank come first in the graph.
    fused = None if torch.compiler.is_compiling() else update
    arguments = (*inputs, index, masks, options, need, fused)
    loss = RelationNCE.apply(*arguments) if need else call_relation_nce(*arguments)[0]
    if update is not None and fused is None:
        bank_update_(bank, *update)
    return loss


def bank_update_(
    bank: Tensor, index: Tensor, value: Tensor, momentum: float, normalize: bool
) -> None:
    """Backend "cpu" of functional.bank_update_."""
    torch.ops.crrcd.bank_update_(bank, index, value, momentum, normalize)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(bank)
