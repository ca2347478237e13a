"""A test run without the compiled module is a failure, not a pass with skips.

CRRCD_TEST_REFERENCE_ONLY=1 allows it, for work on the Python side alone.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from crrcd_ext import _backend

settings.register_profile("crrcd", deadline=None, derandomize=True, print_blob=False, database=None)
settings.load_profile("crrcd")


def pytest_sessionstart(session: pytest.Session) -> None:
    if _backend.missing is not None and os.environ.get("CRRCD_TEST_REFERENCE_ONLY") != "1":
        pytest.exit(
            f"crrcd_ext._C is not built ({_backend.missing}): run `pip install -e .`, or set "
            "CRRCD_TEST_REFERENCE_ONLY=1 to test the Python side alone",
            returncode=1,
        )


@pytest.fixture(autouse=True)
def _settings_of_the_process(request: pytest.FixtureRequest):
    """Threads, instruction set and backend are the process's: every test leaves them as it came.

    One thread by default: on tiny tensors a second one mostly waits, for long on a loaded machine.
    Tests about threads set their number; training runs with the machine's.
    """
    threads = torch.get_num_threads()
    if not request.path.name.startswith("test_train"):
        torch.set_num_threads(1)
    chosen = _backend._chosen
    yield
    torch.set_num_threads(threads)
    _backend._chosen = chosen
    if _backend.compiled is not None:
        _backend.compiled.set_isa(None)
