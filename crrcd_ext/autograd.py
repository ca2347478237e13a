"""Derivatives of the operators with kernels, in each library of them.

The losses compute their gradients in the forward pass: a scalar loss needs nothing from backward
but one factor, and losses that are not reduced a factor each, where a gradient's rows belong to one
of them. relation keeps what its own backward operator reads.

Each formula serves twice. Registered with its operator it is what the compiler sees: one node, that
may have the same tensor as two of its arguments. In a Function it serves eager calls, which cost a
fraction of a registered formula's overhead, and the operators that end in an underscore, which
change their bank and for that cannot have a formula of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from crrcd_ext import _schema


class Formula(NamedTuple):
    """A loss operator: the arguments, in its order, that the bits of ``need`` stand for, and how
    many arguments it has; the last is ``need``. Its twin, that updates the bank, has four more."""

    name: str
    positions: tuple[int, ...]
    arguments: int

    def operator(self, arguments: tuple, library: str = "crrcd"):
        pure = len(arguments) == self.arguments
        return getattr(getattr(torch.ops, library), self.name if pure else self.name + "_")


# query, positive, anchor, bank, key_weight, weight, bias, scale, offset
RELATION_NCE = Formula("relation_nce", (0, 1, 2, 3, 9, 4, 5, 6, 7), 21)
# query, positive, anchor, bank, scale, offset
DIFFERENCE_NCE = Formula("difference_nce", (0, 1, 2, 3, 4, 5), 19)
# query, positive, bank, scale, offset
INSTANCE_NCE = Formula("instance_nce", (0, 1, 2, 3, 4), 15)


def need_bits(*inputs: Tensor | None) -> int:
    """Bit i is set when input i wants a gradient; 0 under no_grad."""
    need = 0
    if torch.is_grad_enabled():
        for bit, x in enumerate(inputs):
            if x is not None and x.requires_grad:
                need |= 1 << bit
    return need


def _refuse_transforms(operator: str, inputs: Sequence[Tensor | None]) -> None:
    # torch.func and forward mode wrap tensors whose requires_grad says nothing of what is wanted:
    # a derivative would be zero or missing, a mistake that nothing would show.
    transforms = torch._C._are_functorch_transforms_active()
    if (transforms or forward_ad._current_level >= 0) and (
        torch.compiler.is_compiling()
        or any(x is not None and _is_followed(x, transforms) for x in inputs)
    ):
        raise RuntimeError(
            f"crrcd_ext.{operator}: derivatives by torch.func or in forward mode are not supported "
            "by compiled backends; use backend='reference'"
        )


def _is_followed(x: Tensor, transforms: bool) -> bool:
    """Whether torch.func, which transforms what is called, or forward mode derive by ``x``."""
    while _functorch.is_functorch_wrapped_tensor(x):
        # A tensor of vmap has what is wanted further within.
        if _functorch.is_gradtrackingtensor(x) and (
            x.requires_grad or forward_ad.unpack_dual(x).tangent is not None
        ):
            return True
        x = _functorch.get_unwrapped(x)
    # Under no_grad too, which a transform outside of the one that it is in does not heed.
    return (transforms and x.requires_grad) or forward_ad.unpack_dual(x).tangent is not None


def _refuse_double_backward(operator: str) -> None:
    # Grad mode is on in backward only under create_graph=True. The gradients would look
    # differentiable there and lack their second derivatives, a mistake that nothing would show.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"crrcd_ext.{operator}: double backward (create_graph=True) is not supported by "
            "compiled backends; use backend='reference'"
        )


def _keep_relation(ctx, inputs, output, first: int = 0) -> None:
    anchor, sample, weight, _bias = inputs
    ctx.save_for_backward(*output, anchor, sample, weight)
    ctx.mark_non_differentiable(output[1])
    ctx.need = sum(1 << bit for bit in range(4) if ctx.needs_input_grad[first + bit])


def _relation_backward(ctx, grad, library: str):
    _refuse_double_backward("relation")
    operator = getattr(torch.ops, library).relation_backward
    gradients = operator(grad, *ctx.saved_tensors, ctx.need)
    return tuple(g if ctx.need & 1 << bit else None for bit, g in enumerate(gradients))


class Relation(torch.autograd.Function):
    """Eager relation of a library's, arguments in its order."""

    @staticmethod
    def forward(ctx, library, *arguments):
        output = getattr(torch.ops, library).relation(*arguments)
        _keep_relation(ctx, arguments, output, first=1)
        ctx.library = library
        return output

    @staticmethod
    def backward(ctx, grad, _):
        return (None, *_relation_backward(ctx, grad, ctx.library))


def _loss_function(
    formula: Formula, libraries: list[torch.library.Library]
) -> type[torch.autograd.Function]:
    """Registers the operator's derivative and returns the Function of its eager calls."""

    def keep(ctx, inputs, output) -> None:
        _loss, *gradients = output
        ctx.need = inputs[formula.arguments - 1]
        ctx.save_for_backward(*(g for bit, g in enumerate(gradients) if ctx.need & 1 << bit))
        ctx.mark_non_differentiable(*gradients)
        ctx.arguments = len(inputs)

    def backward(ctx, grad, *_):
        _refuse_double_backward(formula.name)
        saved = iter(ctx.saved_tensors)
        if grad.dim() > 0:  # a factor of each loss, whose row of the gradient is the last dimension
            grad = grad.unsqueeze(-1)
        gradients = [None] * ctx.arguments
        for bit, position in enumerate(formula.positions):
            if ctx.need & 1 << bit:
                g = next(saved)
                gradients[position] = (g * grad).to(g.dtype)
        return tuple(gradients)

    def forward(ctx, library, *arguments):
        output = formula.operator(arguments, library)(*arguments)
        keep(ctx, arguments, output)
        return output

    def function_backward(ctx, *gradients):
        return (None, *backward(ctx, *gradients))

    for library in libraries:
        torch.library.register_autograd(
            f"{library.ns}::{formula.name}", backward, setup_context=keep, lib=library
        )
    members = {"forward": staticmethod(forward), "backward": staticmethod(function_backward)}
    return type(f"{formula.name}_function", (torch.autograd.Function,), members)


def _relation_function(library: torch.library.Library) -> None:
    """Registers the derivative of the library's relation."""
    torch.library.register_autograd(
        f"{library.ns}::relation",
        lambda ctx, grad, _: _relation_backward(ctx, grad, library.ns),
        setup_context=_keep_relation,
        lib=library,
    )


LIBRARIES = [_schema.define(namespace) for namespace in ("crrcd", "crrcd_triton")]
"""The operators' definitions, which live as long."""
for _library in LIBRARIES:
    _relation_function(_library)
_FUNCTIONS = {f: _loss_function(f, LIBRARIES) for f in (RELATION_NCE, DIFFERENCE_NCE, INSTANCE_NCE)}


def relation(
    anchor: Tensor, sample: Tensor, weight: Tensor, bias: Tensor | None, library: str
) -> Tensor:
    """functional.relation by the operator of ``library``; operands share one dtype."""
    arguments = (anchor, sample, weight, bias)
    _refuse_transforms("relation", arguments)
    if torch.compiler.is_compiling() or not need_bits(*arguments):
        return getattr(torch.ops, library).relation(*arguments)[0]
    return Relation.apply(library, *arguments)[0]


def loss(
    formula: Formula,
    arguments: tuple,
    bank: Tensor,
    update: tuple[Tensor, Tensor, float, bool] | None,
    library: str,
) -> Tensor:
    """A loss by the operators of ``library``; ``arguments`` are the operator's, but for ``need``.

    Operands share one dtype, but for the bank; scale and offset are 0-dim.
    """
    inputs = [arguments[position] for position in formula.positions]
    _refuse_transforms(formula.name, inputs)
    need = need_bits(*inputs)
    arguments = (*arguments, need)
    if torch.compiler.is_compiling():
        # A graph keeps the update behind the pass, which reads the bank.
        result = formula.operator(arguments, library)(*arguments)[0]
        if update is not None:
            getattr(torch.ops, library).bank_update_(bank, *update)
        return result
    if update is not None:
        arguments += update
    if need:
        result = _FUNCTIONS[formula].apply(library, *arguments)[0]
    else:
        result = formula.operator(arguments, library)(*arguments)[0]
    if update is not None:
        torch.autograd.graph.increment_version(bank)
    return result


def similar_mask(
    query: Tensor, bank: Tensor, index: Tensor | None, threshold: float, library: str
) -> Tensor:
    """functional.similar_mask by the operator of ``library``; it has no derivative."""
    return getattr(torch.ops, library).similar_mask(query, bank, index, threshold)


def bank_update_(
    bank: Tensor, index: Tensor, value: Tensor, momentum: float, normalize: bool, library: str
) -> None:
    """functional.bank_update_ by the operator of ``library``."""
    getattr(torch.ops, library).bank_update_(bank, index, value, momentum, normalize)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(bank)
