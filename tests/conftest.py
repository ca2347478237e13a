"""A test run without the compiled module is a failure, not a pass with skips.

CRRCD_TEST_REFERENCE_ONLY=1 allows it, for work on the Python side alone.

Of the operators' tests that Triton's interpreter runs, which is slow, a share is selected, always
the same; CRRCD_TRITON_SHARE=1 takes all of them.
"""

from __future__ import annotations

import os
import random

# Products of numpy, which Triton's interpreter makes, are too small for several threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is imported, as by torch

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # The interpreter runs the Triton kernels (helpers/interpreted.py). It has to be asked for
    # before the kernels are defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What somebody measured on this machine is not what the tests are about.
os.environ["CRRCD_TRITON_CONFIGS"] = "0"

from helpers.interpreted import INTERPRETED

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = float(os.environ.get("CRRCD_TRITON_SHARE", "0.15"))
    drawn = random.Random(0)

    def left_out(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return parameters.get("backend") in INTERPRETED and drawn.random() >= share

    out = [item for item in items if left_out(item)]
    gone = set(out)
    items[:] = [item for item in items if item not in gone]
    config.hook.pytest_deselected(items=out)


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
