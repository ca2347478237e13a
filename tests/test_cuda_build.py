"""What the compiled CUDA kernels take, read from the compiled module."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from crrcd_ext import _backend

if _backend.compiled is None or not _backend.compiled.build_info()["cuda"]:
    pytest.skip("this build has no CUDA kernels", allow_module_level=True)


def test_no_kernel_spills_registers():
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton comes without cuobjdump")
    command = [tool, "--dump-resource-usage", _backend.compiled.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    assert len(usage) >= 104, listing[:400]  # kernels of one architecture
    assert not [u for u in usage if int(u[2]) or int(u[3])]
