"""Derivatives of the compiled operators.

relation_nce computes its gradients in the forward pass: a scalar loss needs nothing from backward
but one factor. relation keeps what its own backward operator reads.

Each formula serves twice. Registered with its operator it is what the compiler sees: one node, that
may have the same tensor as two of its arguments. In a Function it serves eager calls, which cost a
fraction of a registered formula's overhead, and relation_nce_, which changes its bank and for that
cannot have a formula of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext import _schema

_POSITIONS = (0, 1, 2, 3, 9, 4, 5, 6, 7)
"""Positions among the operator's arguments of what the bits of ``need`` stand for: query, positive,
anchor, bank, key_weight, weight, bias, scale, offset."""

NCE_ARGUMENTS = 18
"""Arguments of relation_nce; the last is ``need``. relation_nce_ has four more."""


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
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"crrcd_ext.{operator}: double backward (create_graph=True) is not supported by "
            "backend 'cpu'; use backend='reference'"
        )


def _keep_relation(ctx, inputs, output) -> None:
    anchor, sample, weight, _bias = inputs
    ctx.save_for_backward(*output, anchor, sample, weight)
    ctx.mark_non_differentiable(output[1])
    ctx.need = sum(1 << bit for bit in range(4) if ctx.needs_input_grad[bit])


def _relation_backward(ctx, grad, _):
    _refuse_double_backward("relation")
    gradients = torch.ops.crrcd.relation_backward(grad, *ctx.saved_tensors, ctx.need)
    return tuple(g if ctx.need & 1 << bit else None for bit, g in enumerate(gradients))


def _keep_relation_nce(ctx, inputs, output) -> None:
    _loss, *gradients = output
    ctx.need = inputs[NCE_ARGUMENTS - 1]
    ctx.save_for_backward(*(g for bit, g in enumerate(gradients) if ctx.need & 1 << bit))
    ctx.mark_non_differentiable(*gradients)
    ctx.arguments = len(inputs)


def _relation_nce_backward(ctx, grad, *_):
    _refuse_double_backward("relation_nce")
    saved = iter(ctx.saved_tensors)
    gradients = [None] * ctx.arguments
    for bit, position in enumerate(_POSITIONS):
        if ctx.need & 1 << bit:
            g = next(saved)
            gradients[position] = (g * grad).to(g.dtype)
    return tuple(gradients)


torch.library.register_autograd(
    "crrcd::relation", _relation_backward, setup_context=_keep_relation, lib=_schema.library
)
torch.library.register_autograd(
    "crrcd::relation_nce",
    _relation_nce_backward,
    setup_context=_keep_relation_nce,
    lib=_schema.library,
)


class Relation(torch.autograd.Function):
    """Eager crrcd::relation, arguments in its order."""

    @staticmethod
    def forward(ctx, *arguments):
        output = torch.ops.crrcd.relation(*arguments)
        _keep_relation(ctx, arguments, output)
        return output

    backward = staticmethod(_relation_backward)


class RelationNCE(torch.autograd.Function):
    """Eager crrcd::relation_nce, or crrcd::relation_nce_ when the arguments of an update follow."""

    @staticmethod
    def forward(ctx, *arguments):
        output = _relation_nce_operator(arguments)(*arguments)
        _keep_relation_nce(ctx, arguments, output)
        return output

    backward = staticmethod(_relation_nce_backward)


def _relation_nce_operator(arguments: tuple):
    pure = len(arguments) == NCE_ARGUMENTS
    return torch.ops.crrcd.relation_nce if pure else torch.ops.crrcd.relation_nce_


def relation(anchor: Tensor, sample: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Backend "cpu" of functional.relation; operands share one dtype."""
    arguments = (anchor, sample, weight, bias)
    if torch.compiler.is_compiling() or not need_bits(*arguments):
        return torch.ops.crrcd.relation(*arguments)[0]
    return Relation.apply(*arguments)[0]


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
    query, positive, anchor, bank, key_weight, weight, bias, scale, offset = inputs
    head = (query, positive, anchor, bank, weight, bias, scale, offset, index, key_weight)
    need = need_bits(*inputs)
    arguments = (*head, *masks, *options, need)
    if torch.compiler.is_compiling():
        # A graph keeps the update behind the pass, which reads the bank.
        loss = torch.ops.crrcd.relation_nce(*arguments)[0]
        if update is not None:
            torch.ops.crrcd.bank_update_(bank, *update)
        return loss
    if update is not None:
        arguments += update
    call = RelationNCE.apply if need else _relation_nce_operator(arguments)
    loss = call(*arguments)[0]
    if update is not None:
        torch.autograd.graph.increment_version(bank)
    return loss


def bank_update_(
    bank: Tensor, index: Tensor, value: Tensor, momentum: float, normalize: bool
) -> None:
    """Backend "cpu" of functional.bank_update_."""
    torch.ops.crrcd.bank_update_(bank, index, value, momentum, normalize)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(bank)
