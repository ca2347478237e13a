"""Derivatives of the compiled operators.

relation_nce computes its gradients in the forward pass: a scalar loss needs nothing from backward
but one factor. relation keeps what its own backward operator reads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def need_bits(*inputs: Tensor | None) -> int:
    """Bit i is set when input i wants a gradient; 0 under no_grad."""
    need = 0
    if torch.is_grad_enabled():
        for bit, x in enumerate(inputs):
            if x is not None and x.requires_grad:
                need |= 1 << bit
    return need


def _refuse_double_backward(operator: str) -> None:
    # Grad mode is on in backward only under create_graph=True. The gradients would look
    # differentiable there and lack their second derivatives, a mistake that nothing would show.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"crrcd_ext.{operator}: double backward (create_graph=True) is not supported by "
            "backend 'cpu'; use backend='reference'"
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
        return (*(g if ctx.need & 1 << bit else None for bit, g in enumerate(gradients)), None)


class RelationNCE(torch.autograd.Function):
    """crrcd::relation_nce, or crrcd::relation_nce_ with an update; nine inputs have gradients."""

    @staticmethod
    def forward(ctx, index, masks, options, need, update, *inputs):
        loss, *gradients = call_relation_nce(inputs, index, masks, options, need, update)
        ctx.save_for_backward(*(g for bit, g in enumerate(gradients) if need & 1 << bit))
        ctx.need = need
        ctx.inputs = len(inputs)
        return loss

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward("relation_nce")
        saved = iter(ctx.saved_tensors)
        gradients = [None] * 5
        for bit in range(ctx.inputs):
            g = next(saved) if ctx.need & 1 << bit else None
            gradients.append(None if g is None else (g * grad).to(g.dtype))
        return tuple(gradients)


def call_relation_nce(inputs, index, masks, options, need, update) -> tuple[Tensor, ...]:
    """The operator itself; ``update`` is None or (index, value, momentum, normalize)."""
    query, positive, anchor, bank, key_weight, weight, bias, scale, offset = inputs
    head = (query, positive, anchor, bank, weight, bias, scale, offset, index, key_weight)
    if update is None:
        return torch.ops.crrcd.relation_nce(*head, *masks, *options, need)
    result = torch.ops.crrcd.relation_nce_(*head, *masks, *options, need, *update)
    torch.autograd.graph.increment_version(bank)
    return result


def relation(anchor: Tensor, sample: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Backend "cpu" of functional.relation; operands share one dtype."""
    need = need_bits(anchor, sample, weight, bias)
    if not need:
        return torch.ops.crrcd.relation(anchor, sample, weight, bias)[0]
    return Relation.apply(anchor, sample, weight, bias, need)


def relation_nce(
    inputs: tuple[Tensor | None, ...],
    index: Tensor | None,
    masks: tuple[Tensor | None, ...],
    options: tuple[bool, str],
    update: tuple[Tensor, Tensor, float, bool] | None,
) -> Tensor:
    """Backend "cpu" of functional.relation_nce.

    ``inputs`` are query, positive, anchor, bank, key_weight, weight, bias (one dtype, but for the
    bank) and scale, offset (0-dim); ``masks`` are anchor_id, query_id, key_id, query_label,
    key_label; ``options`` self_pairs and objective.
    """
    need = need_bits(*inputs)
    # The compiler cannot trace an autograd.Function that mutates an input. There the update is an
    # operator of its own; the graph keeps it behind the pass, which reads the bank.
    fused = None if torch.compiler.is_compiling() else update
    if need:
        loss = RelationNCE.apply(index, masks, options, need, fused, *inputs)
    else:
        loss = call_relation_nce(inputs, index, masks, options, need, fused)[0]
    if update is not None and fused is None:
        bank_update_(inputs[3], *update)
    return loss


def bank_update_(
    bank: Tensor, index: Tensor, value: Tensor, momentum: float, normalize: bool
) -> None:
    """Backend "cpu" of functional.bank_update_."""
    torch.ops.crrcd.bank_update_(bank, index, value, momentum, normalize)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(bank)
