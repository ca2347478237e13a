"""relation and its backward pass. See functional.relation."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext._schema import wide_dtype
from crrcd_ext.reference import nan_for_infinity
from crrcd_ext.triton import launch
from crrcd_ext.triton.kernels import relation as kernels

ANCHOR, SAMPLE, WEIGHT, BIAS = (1 << n for n in range(4))

HIDDEN = 32
"""Hidden units at a time: products at full precision are unrolled, and must not be long."""

SEGMENT_ELEMENTS = 1 << 22
"""Hidden units, or entries of relation vectors, that the backward pass makes at a time."""


def relation(
    anchor: Tensor, sample: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``crrcd_triton::relation``: [A, M, R] unit vectors and [A, M] inverses of their norms."""
    A, M, (R, H) = len(anchor), len(sample), weight.shape
    types = launch.precision(anchor.dtype)
    chosen = launch.config("relation", types, anchor.device, M, max(R, H))
    BR = launch.block(R, chosen.features)
    vectors = anchor.new_empty((A, M, R))
    inverse_norm = anchor.new_empty((A, M), dtype=wide_dtype(anchor.dtype))
    launch.run(
        kernels.relation,
        (A, -(-M // chosen.keys)),
        chosen,
        nan_for_infinity(anchor).contiguous(),
        nan_for_infinity(sample).contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        vectors,
        inverse_norm,
        M,
        H,
        R,
        BIAS=bias is not None,
        **types.constants,
        FAST=types.fast,
        BH=launch.block(H, HIDDEN),
        BR=BR,
        SEVERAL=R > BR,
        BN=chosen.keys,
    )
    return vectors, inverse_norm


def relation_backward(
    grad: Tensor,
    relation: Tensor,
    inverse_norm: Tensor,
    anchor: Tensor,
    sample: Tensor,
    weight: Tensor,
    need: int,
) -> tuple[Tensor, ...]:
    """``crrcd_triton::relation_backward``, by torch's matrix products for some anchors at a time.

    With w of norm 1 / r and v = r w: d_w = (d_v - <d_v, v> v) r, which is 0 where w vanishes.
    """
    A, M, (R, H) = len(anchor), len(sample), weight.shape
    wide = inverse_norm.dtype
    wanted = [bool(need & bit) for bit in (ANCHOR, SAMPLE, WEIGHT, BIAS)]
    d_anchor, d_sample, d_weight, d_bias = (
        torch.zeros(shape if wants else 0, dtype=wide, device=anchor.device)
        for wants, shape in zip(wanted, ((A, H), (M, H), (R, H), (R,)), strict=True)
    )
    P, X, W = (nan_for_infinity(x.to(wide)) for x in (anchor, sample, weight))
    step = max(1, SEGMENT_ELEMENTS // max(M * max(H, R), 1))
    for first in range(0, A if M else 0, step):
        of = slice(first, first + step)
        d_v, v = grad[of].to(wide), relation[of].to(wide)
        d_w = (d_v - (d_v * v).sum(-1, keepdim=True) * v) * inverse_norm[of, :, None]
        if need & BIAS:
            d_bias += d_w.sum((0, 1))
        if not need & ~BIAS:
            continue
        seen = P[of, None] - X
        if need & WEIGHT:
            d_weight += d_w.flatten(0, 1).T @ seen.relu().flatten(0, 1)
        if need & (ANCHOR | SAMPLE):
            d_hidden = (d_w @ W).masked_fill_(seen <= 0, 0)
            if need & ANCHOR:
                d_anchor[of] = d_hidden.sum(1)
            if need & SAMPLE:
                d_sample -= d_hidden.sum(0)
    return tuple(x.to(anchor.dtype) for x in (d_anchor, d_sample, d_weight, d_bias))
