"""Schemas and fake kernels of the ``crrcd::`` operators; the compiled module registers the kernels.

They are defined here and not in C++ so that an installation without a compiler has them too, for
tracing and export.
"""

from __future__ import annotations

import torch
from torch import Tensor

library = torch.library.Library("crrcd", "DEF")

_NCE_BEFORE = "Tensor query, Tensor positive, Tensor anchor"
_NCE_AFTER = (
    "Tensor weight, Tensor? bias, Tensor scale, Tensor offset, Tensor? index, Tensor? key_weight, "
    "Tensor? anchor_id, Tensor? query_id, Tensor? key_id, "
    "Tensor? query_label, Tensor? key_label, bool self_pairs, str objective, int need"
)
_NCE_RESULT = (
    "(Tensor loss, Tensor d_query, Tensor d_positive, Tensor d_anchor, Tensor d_bank, "
    "Tensor d_key_weight, Tensor d_weight, Tensor d_bias, Tensor d_scale, Tensor d_offset)"
)
_UPDATE = "Tensor update_index, Tensor update_value, float momentum, bool normalize"

for schema in (
    "relation(Tensor anchor, Tensor sample, Tensor weight, Tensor? bias)"
    " -> (Tensor relation, Tensor inverse_norm)",
    "relation_backward(Tensor grad, Tensor relation, Tensor inverse_norm, Tensor anchor, "
    "Tensor sample, Tensor weight, int need)"
    " -> (Tensor d_anchor, Tensor d_sample, Tensor d_weight, Tensor d_bias)",
    f"relation_nce({_NCE_BEFORE}, Tensor bank, {_NCE_AFTER}) -> {_NCE_RESULT}",
    f"relation_nce_({_NCE_BEFORE}, Tensor(a!) bank, {_NCE_AFTER}, {_UPDATE}) -> {_NCE_RESULT}",
    "bank_update_(Tensor(a!) bank, Tensor index, Tensor value, float momentum, bool normalize)"
    " -> ()",
):
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms, sums and losses: float64 for operands in float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gradient(needed: int, like: Tensor, shape=None) -> Tensor:
    if not needed:
        return like.new_empty((0,))
    return torch.empty(like.shape if shape is None else shape, dtype=like.dtype, device=like.device)


@torch.library.register_fake("crrcd::relation", lib=library)
def _(anchor, sample, weight, bias):
    pairs = (anchor.shape[0], sample.shape[0])
    inverse_norm = anchor.new_empty(pairs, dtype=wide_dtype(anchor.dtype))
    return anchor.new_empty((*pairs, weight.shape[0])), inverse_norm


@torch.library.register_fake("crrcd::relation_backward", lib=library)
def _(grad, relation, inverse_norm, anchor, sample, weight, need):
    return (
        _gradient(need & 1, anchor),
        _gradient(need & 2, sample),
        _gradient(need & 4, weight),
        _gradient(need & 8, weight, (weight.shape[0],)),
    )


def _relation_nce(
    query, positive, anchor, bank, weight, bias, scale, offset, index, key_weight, *rest
):
    need = rest[7]
    inputs = (query, positive, anchor, bank, key_weight, weight, bias, scale, offset)
    return (
        query.new_empty((), dtype=wide_dtype(query.dtype)),
        *(_gradient(need & 1 << bit, query if x is None else x) for bit, x in enumerate(inputs)),
    )


torch.library.register_fake("crrcd::relation_nce", _relation_nce, lib=library)
torch.library.register_fake("crrcd::relation_nce_", _relation_nce, lib=library)


@torch.library.register_fake("crrcd::bank_update_", lib=library)
def _(bank, index, value, momentum, normalize):
    return None
