"""Memory banks lie on huge pages where the system has them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crrcd_ext._pages import HUGE_PAGE, advise_huge_pages
from crrcd_ext.compat.repdistiller import CRDLoss
from crrcd_ext.modules import MemoryBank

SMAPS = Path("/proc/self/smaps")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(
    not SMAPS.exists() or not SETTING.exists(), reason="needs Linux with transparent huge pages"
)


def advised(x: torch.Tensor) -> bool:
    """Whether the middle of a tensor's memory has the advice (flag "hg" of proc(5))."""
    middle = x.data_ptr() + x.nbytes // 2
    found = False
    for line in SMAPS.read_text().splitlines():
        first, *others = line.split()
        if first == "VmFlags:" and found:
            return "hg" in others
        if not first.endswith(":"):
            begin, end = (int(bound, 16) for bound in first.split("-"))
            found = begin <= middle < end
    raise AssertionError("no mapping has the tensor")


def test_the_rows_of_a_bank() -> None:
    assert advised(MemoryBank(150_000, 128).rows)
    assert not advised(torch.empty(150_000, 128))


def test_the_memories_of_the_compatible_losses() -> None:
    sizes = {"s_dim": 8, "t_dim": 8, "feat_dim": 128, "n_data": 150_000}
    contrast = CRDLoss(SimpleNamespace(**sizes, nce_k=4, nce_t=0.07, nce_m=0.5)).contrast
    assert advised(contrast.memory_v1)
    assert advised(contrast.memory_v2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_left_alone(device: str) -> None:
    small = torch.empty(HUGE_PAGE, dtype=torch.uint8, device=device)
    assert advise_huge_pages(small) is small
    large = torch.empty(32 * HUGE_PAGE, dtype=torch.uint8, device="meta")
    assert advise_huge_pages(large) is large
