"""bank_update_: the last of equal ids wins. See functional.bank_update_."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext._schema import wide_dtype
from crrcd_ext.triton import bank_rows, launch
from crrcd_ext.triton.configs import Config
from crrcd_ext.triton.kernels import bank_update as kernels


def bank_update_(
    bank: Tensor, index: Tensor, value: Tensor, momentum: float, normalize: bool
) -> None:
    """``crrcd_triton::bank_update_``."""
    bank_rows.check("bank_update_", "index", index, bank)
    updates, columns = value.shape
    # The numbers of the update that each row of the bank is last named by.
    last = torch.full((len(bank),), -1, dtype=torch.int64, device=bank.device)
    last.scatter_reduce_(0, index, torch.arange(updates, device=bank.device), "amax")
    wide = wide_dtype(torch.promote_types(bank.dtype, value.dtype))
    launch.run(
        kernels.bank_update,
        (updates,),
        Config(keys=1, warps=4, stages=1),
        bank,
        bank.stride(0),
        bank.stride(1),
        index.contiguous(),
        last,
        value.contiguous(),
        torch.full((), momentum, dtype=torch.float64, device=bank.device),
        columns,
        NORMALIZE=normalize,
        KEEPS=momentum > 0,
        WIDE=launch.TYPES[wide],
        BD=launch.block(columns, 1024),
    )
