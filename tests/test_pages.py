"""Memory banks lie on huge pages where the system has them."""

from pathlib import Path

import pytest
import torch
from helpers.process import python

from crrcd_ext._pages import HUGE_PAGE, advise_huge_pages
from crrcd_ext.modules import MemoryBank

SMAPS = Path("/proc/self/smaps")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(
    not SMAPS.exists() or not SETTING.exists(), reason="needs Linux with transparent huge pages"
)


ADVISED = """
from pathlib import Path
from types import SimpleNamespace
import torch
from crrcd_ext.compat.repdistiller import CRDLoss
from crrcd_ext.modules import MemoryBank

def advised(x):
    # whether the middle of a tensor's memory has the flag "hg" of proc(5)
    middle = x.data_ptr() + x.nbytes // 2
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if first == "VmFlags:" and found:
            return "hg" in others
        if not first.endswith(":"):
            begin, end = (int(bound, 16) for bound in first.split("-"))
            found = begin <= middle < end

plain = torch.empty(150_000, 128)
bank = MemoryBank(150_000, 128)
sizes = {"s_dim": 8, "t_dim": 8, "feat_dim": 128, "n_data": 150_000}
contrast = CRDLoss(SimpleNamespace(**sizes, nce_k=4, nce_t=0.07, nce_m=0.5)).contrast
print(*map(advised, (plain, bank.rows, contrast.memory_v1, contrast.memory_v2)))
"""


def test_banks_and_memories_are_advised() -> None:
    # In a process of its own: memory that was advised once may be used again.
    done = python(ADVISED)
    assert done.stdout.split() == ["False", "True", "True", "True"], done.stderr


def test_what_is_left_alone(monkeypatch) -> None:
    def refused(name):
        raise AssertionError("nothing is asked of the system")

    monkeypatch.setattr("ctypes.CDLL", refused)
    large = 32 * HUGE_PAGE
    for x in (
        torch.empty(HUGE_PAGE, dtype=torch.uint8),
        torch.empty(large, dtype=torch.uint8, device="meta"),
        torch.empty(1, dtype=torch.uint8).expand(large),
    ):
        assert advise_huge_pages(x) is x
    with pytest.raises(AssertionError, match="nothing is asked"):
        advise_huge_pages(torch.empty(large, dtype=torch.uint8))


def test_a_system_without_the_function(monkeypatch) -> None:
    def absent(name):
        raise OSError("no dynamic loading")

    monkeypatch.setattr("ctypes.CDLL", absent)
    assert MemoryBank(150_000, 128).num_rows == 150_000
