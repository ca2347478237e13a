"""Rows of the bank: which are named, how they lie, what they get."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext._check import check_range


def check(name: str, argument: str, index: Tensor | None, bank: Tensor) -> None:
    """An index outside of the bank: IndexError on the CPU, an assertion of the device elsewhere."""
    if index is None or index.numel() == 0:
        return
    if index.device.type == "cpu":
        check_range(name, argument, index, bank)
    else:
        inside = (index >= 0) & (index < len(bank))
        # The one assertion of torch that does not wait for the device; it has no public name.
        expected = f"expected rows of the bank in [0, {len(bank)})"
        torch._assert_async(inside.all(), f"crrcd_ext.{name}: {argument}: {expected}")


def with_units(bank: Tensor) -> Tensor:
    """The bank where it lies, or a copy where the elements of a row do not lie side by side."""
    return bank if bank.stride(1) == 1 or bank.shape[1] < 2 else bank.contiguous()


def add(gradient: Tensor, index: Tensor, rows: Tensor) -> None:
    """gradient[index] += rows. On a GPU torch adds to a row that is named more than once in one
    order under ``torch.use_deterministic_algorithms``, otherwise in any."""
    gradient.index_add_(0, index, rows)
