"""What the compiled CUDA kernels take, read from the compiled module."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import sass
from crrcd_ext import _backend

if _backend.compiled is None or not _backend.compiled.build_info()["cuda"]:
    pytest.skip("this build has no CUDA kernels", allow_module_level=True)


def test_no_kernel_spills_registers():
    try:
        sass.cuobjdump()
    except sass.ToolMissing as missing:
        pytest.skip(str(missing))
    found = sass.resources(Path(_backend.compiled.__file__))
    assert len(found) >= 104  # kernels of one architecture
    assert not {k: use for k, use in found.items() if use.stack or use.local}
