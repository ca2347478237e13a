"""Huge pages for memory banks, whose rows are read at random."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

HUGE_PAGE = 2 << 20
_WORTHWHILE = 8 * HUGE_PAGE
_MADV_HUGEPAGE = 14  # of <sys/mman.h>


def advise_huge_pages(x: Tensor) -> Tensor:
    """Asks Linux to back a large tensor, to which nothing was written yet, by huge pages.

    With pages of 4 KiB nearly every row of a bank of hundreds of megabytes costs a walk through the
    page tables. It is advice: other systems, devices and small tensors are left as they are, and
    copies of the tensor are not advised.
    """
    if sys.platform != "linux" or type(x) is not Tensor or x.device.type != "cpu":
        return x
    if x.nbytes < _WORTHWHILE or not x.is_contiguous():
        return x
    begin = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (x.data_ptr() + x.nbytes) // HUGE_PAGE * HUGE_PAGE
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return x
    madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(_MADV_HUGEPAGE))
    return x
