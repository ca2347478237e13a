"""similar_mask: bits of products above a threshold, by one launch. See functional.similar_mask."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext._schema import words_of
from crrcd_ext.triton import bank_rows, launch
from crrcd_ext.triton.kernels import similar as kernels


def similar_mask(query: Tensor, bank: Tensor, index: Tensor | None, threshold: float) -> Tensor:
    """``crrcd_triton::similar_mask``."""
    bank_rows.check("similar_mask", "index", index, bank)
    B, D = query.shape
    keys = len(bank) if index is None else index.shape[-1]
    words = words_of(keys)
    bits = torch.empty((B, words), dtype=torch.int32, device=query.device)
    if bits.numel() == 0:
        return bits
    query, bank = query.contiguous(), bank_rows.with_units(bank)
    # A tensor, as numbers come to kernels in float32.
    level = torch.full((), threshold, dtype=query.dtype, device=query.device)
    own = index is not None and index.dim() == 2
    types = launch.Precision(query.dtype, "ieee")
    chosen = launch.config("similar_own" if own else "similar", types, query.device, B, D)
    tiles = launch.blocks(keys, chosen.keys)
    BD = launch.block(D, chosen.features)
    constants = {"WIDE": launch.TYPES[query.dtype], "WHOLE": D % BD == 0, "BD": BD}
    constants["BN"] = chosen.keys
    rows = query, bank, bank.stride(0)
    if own:
        launch.run(
            kernels.own,
            (B * tiles,),
            chosen,
            *rows,
            index,
            *index.stride(),
            level,
            bits,
            D,
            keys,
            words,
            tiles,
            **constants,
        )
        return bits
    BB = launch.block(B, chosen.queries)
    launch.run(
        kernels.shared,
        (tiles, launch.blocks(B, BB)),
        chosen,
        *rows,
        None if index is None else index.contiguous(),
        level,
        bits,
        B,
        D,
        keys,
        words,
        INDEXED=index is not None,
        BB=BB,
        **constants,
    )
    return bits
