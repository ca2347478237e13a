"""Schemas and fake kernels of the operators, for every library that has kernels for them.

``crrcd::`` has those of the compiled module, ``crrcd_triton::`` those in Triton. They are defined
here and not in C++ so that an installation without a compiler has them too, for tracing and export.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASKS = (
    "Tensor? query_id, Tensor? key_id, Tensor? query_label, Tensor? key_label, Tensor? excluded"
)
_OBJECTIVE = "str objective, Tensor? weights, str reduction, int need"
_NCE_BEFORE = "Tensor query, Tensor positive, Tensor anchor"
_NCE_AFTER = (
    "Tensor weight, Tensor? bias, Tensor scale, Tensor offset, Tensor? index, Tensor? key_weight, "
    f"Tensor? anchor_id, {_MASKS}, bool self_pairs, {_OBJECTIVE}"
)
_NCE_RESULT = (
    "(Tensor loss, Tensor d_query, Tensor d_positive, Tensor d_anchor, Tensor d_bank, "
    "Tensor d_key_weight, Tensor d_weight, Tensor d_bias, Tensor d_scale, Tensor d_offset)"
)
_DIFFERENCE_BEFORE = "Tensor query, Tensor positive, Tensor anchor"
_DIFFERENCE_AFTER = (
    f"Tensor scale, Tensor offset, Tensor? index, Tensor? anchor_id, {_MASKS}, "
    f"bool self_pairs, float eps, {_OBJECTIVE}"
)
_DIFFERENCE_RESULT = (
    "(Tensor loss, Tensor d_query, Tensor d_positive, Tensor d_anchor, Tensor d_bank, "
    "Tensor d_scale, Tensor d_offset)"
)
_INSTANCE_BEFORE = "Tensor query, Tensor positive"
_INSTANCE_AFTER = f"Tensor scale, Tensor offset, Tensor? index, {_MASKS}, {_OBJECTIVE}"
_INSTANCE_RESULT = (
    "(Tensor loss, Tensor d_query, Tensor d_positive, Tensor d_bank, Tensor d_scale, "
    "Tensor d_offset)"
)
_UPDATE = "Tensor update_index, Tensor update_value, float momentum, bool normalize"

SCHEMAS = (
    "relation(Tensor anchor, Tensor sample, Tensor weight, Tensor? bias)"
    " -> (Tensor relation, Tensor inverse_norm)",
    "relation_backward(Tensor grad, Tensor relation, Tensor inverse_norm, Tensor anchor, "
    "Tensor sample, Tensor weight, int need)"
    " -> (Tensor d_anchor, Tensor d_sample, Tensor d_weight, Tensor d_bias)",
    *(
        schema
        for name, before, after, result in (
            ("relation_nce", _NCE_BEFORE, _NCE_AFTER, _NCE_RESULT),
            ("difference_nce", _DIFFERENCE_BEFORE, _DIFFERENCE_AFTER, _DIFFERENCE_RESULT),
            ("instance_nce", _INSTANCE_BEFORE, _INSTANCE_AFTER, _INSTANCE_RESULT),
        )
        for schema in (
            f"{name}({before}, Tensor bank, {after}) -> {result}",
            f"{name}_({before}, Tensor(a!) bank, {after}, {_UPDATE}) -> {result}",
        )
    ),
    "similar_mask(Tensor query, Tensor bank, Tensor? index, float threshold) -> Tensor",
    "bank_update_(Tensor(a!) bank, Tensor index, Tensor value, float momentum, bool normalize)"
    " -> ()",
)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms, sums and losses: float64 for operands in float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def words_of(count: int) -> int:
    """Words of 32 bits that have a bit for each of ``count`` negatives."""
    return (count + 31) // 32


def _gradient(needed: int, like: Tensor, shape=None) -> Tensor:
    if not needed:
        return like.new_empty((0,))
    return torch.empty(like.shape if shape is None else shape, dtype=like.dtype, device=like.device)


def _relation(anchor, sample, weight, bias):
    pairs = (anchor.shape[0], sample.shape[0])
    inverse_norm = anchor.new_empty(pairs, dtype=wide_dtype(anchor.dtype))
    return anchor.new_empty((*pairs, weight.shape[0])), inverse_norm


def _relation_backward(grad, relation, inverse_norm, anchor, sample, weight, need):
    return (
        _gradient(need & 1, anchor),
        _gradient(need & 2, sample),
        _gradient(need & 4, weight),
        _gradient(need & 8, weight, (weight.shape[0],)),
    )


def _loss_and_gradients(
    losses: tuple[int, ...], reduction: str, need: int, *inputs: Tensor | None
) -> tuple[Tensor, ...]:
    """``losses``: the shape of what is not reduced."""
    query = inputs[0]
    return (
        query.new_empty(losses if reduction == "none" else (), dtype=wide_dtype(query.dtype)),
        *(_gradient(need & 1 << bit, query if x is None else x) for bit, x in enumerate(inputs)),
    )


def _relation_nce(
    query, positive, anchor, bank, weight, bias, scale, offset, index, key_weight, *rest
):
    inputs = (query, positive, anchor, bank, key_weight, weight, bias, scale, offset)
    return _loss_and_gradients(query.shape[:2], *rest[9:11], *inputs)


def _difference_nce(query, positive, anchor, bank, scale, offset, *rest):
    inputs = (query, positive, anchor, bank, scale, offset)
    return _loss_and_gradients(query.shape[:1], *rest[11:13], *inputs)


def _instance_nce(query, positive, bank, scale, offset, *rest):
    inputs = (query, positive, bank, scale, offset)
    return _loss_and_gradients(query.shape[:1], *rest[8:10], *inputs)


def _similar_mask(query, bank, index, threshold):
    count = bank.shape[0] if index is None else index.shape[-1]
    return query.new_empty((query.shape[0], words_of(count)), dtype=torch.int32)


def _bank_update_(bank, index, value, momentum, normalize):
    return None


_FAKES = {
    "relation": _relation,
    "relation_backward": _relation_backward,
    "relation_nce": _relation_nce,
    "relation_nce_": _relation_nce,
    "difference_nce": _difference_nce,
    "difference_nce_": _difference_nce,
    "instance_nce": _instance_nce,
    "instance_nce_": _instance_nce,
    "similar_mask": _similar_mask,
    "bank_update_": _bank_update_,
}


def define(namespace: str) -> torch.library.Library:
    """Defines the operators, with fakes and without kernels; they live as long as the result."""
    library = torch.library.Library(namespace, "DEF")
    for schema in SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library
