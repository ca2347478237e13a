"""A test run without the compiled module is a failure, not a pass with skips.

CRRCD_TEST_REFERENCE_ONLY=1 allows it, for work on the Python side alone.

Of the operators' tests with kernels in Triton a part is selected, always the same: where Triton's
interpreter runs them, which is slow, CRRCD_TRITON_SHARE of them (1: all), and on a GPU, where every
one compiles a kernel or several, CRRCD_TRITON_TESTS of them, a number or "all".

CRRCD_FAKE_GPU=1, for --collect-only alone, collects what a machine with a GPU would.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sized

# Products of numpy, which Triton's interpreter makes, are too small for several threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is imported, as by torch
# Many processes share a GPU, and none of them needs all kernels.
os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")

import pytest
import torch
from helpers import fake_gpu
from hypothesis import settings

if not torch.cuda.is_available():
    # The interpreter runs the Triton kernels (helpers/interpreted.py). It has to be asked for
    # before the kernels are defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What somebody measured on this machine is not what the tests are about.
os.environ["CRRCD_TRITON_CONFIGS"] = "0"

from helpers.drawn import draw_evenly
from helpers.interpreted import INTERPRETED

from crrcd_ext import _backend

OF_THE_MACHINE = {"backend", "isa"}
"""Parameters of tests that take what is here, which may be nothing."""

settings.register_profile("crrcd", deadline=None, derandomize=True, print_blob=False, database=None)
settings.load_profile("crrcd")


def pytest_configure(config: pytest.Config) -> None:
    if fake_gpu.ASKED_FOR and not config.option.collectonly:
        raise pytest.UsageError(
            "CRRCD_FAKE_GPU: expected --collect-only beside it, since no GPU is there to run tests"
        )


def pytest_sessionstart(session: pytest.Session) -> None:
    if _backend.missing is not None and os.environ.get("CRRCD_TEST_REFERENCE_ONLY") != "1":
        pytest.exit(
            f"crrcd_ext._C is not built ({_backend.missing}): run `pip install -e .`, or set "
            "CRRCD_TEST_REFERENCE_ONLY=1 to test the Python side alone",
            returncode=1,
        )


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of backends or instruction sets none of which is here is skipped. An empty list of
    anything else is a mistake, at which collection fails (pyproject.toml)."""
    for node, mark in list(metafunc.definition.iter_markers_with_node("parametrize")):
        names, values = mark.args[:2]
        several = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        if OF_THE_MACHINE.isdisjoint(several) or not isinstance(values, Sized) or len(values) > 0:
            continue
        skip = pytest.mark.skip(reason=f"{names}: nothing that this test is for is here")
        nothing = pytest.param(*[None] * len(several), marks=skip, id="none")
        place = node.own_markers.index(mark)
        node.own_markers[place] = pytest.mark.parametrize(names, [nothing]).mark


def _backend_of(item: pytest.Item) -> str | None:
    return item.callspec.params.get("backend") if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = float(os.environ.get("CRRCD_TRITON_SHARE", "0.15"))
    drawn = random.Random(0)
    compiled = [item.nodeid for item in items if _backend_of(item) == "on_triton"]
    count = os.environ.get("CRRCD_TRITON_TESTS", "120")
    if count != "all" and not count.isdecimal():
        raise pytest.UsageError(f"CRRCD_TRITON_TESTS: expected a number or all, got {count!r}")
    chosen = draw_evenly(compiled, len(compiled) if count == "all" else int(count))

    def left_out(item: pytest.Item) -> bool:
        backend = _backend_of(item)
        if backend == "on_triton":
            return item.nodeid not in chosen
        return backend in INTERPRETED and drawn.random() >= share

    out = [item for item in items if left_out(item)]
    gone = set(out)
    items[:] = [item for item in items if item not in gone]
    config.hook.pytest_deselected(items=out)


@pytest.fixture
def large_bank() -> Iterator[Callable[[int, int, str], torch.Tensor]]:
    """Makes banks of bfloat16 without values on a device. On the CPU they are virtual memory, of
    which only the pages of rows in use come to be."""

    def make(rows: int, dim: int, device: str) -> torch.Tensor:
        try:
            return torch.empty(rows, dim, dtype=torch.bfloat16, device=device)
        except RuntimeError:
            pytest.skip(f"{device} has no {rows * dim * 2 / 2**30:.0f} GiB for a bank")

    yield make
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # other processes have tests on the same device


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
