"""What a machine with a GPU collects, found where there is none; what collection must not do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import emulated
from helpers.cases import BACKENDS
from helpers.drawn import draw_evenly
from helpers.process import TESTS, python
from simt import build

needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled module")


def pytest_process(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("CRRCD_", "PYTEST_"))}
    own |= {"OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=own, cwd=TESTS.parent, capture_output=True, text=True)


def names_of(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith("tests/")]


# ----------------------------------------------------------------------------- as if there is a GPU


@pytest.fixture(scope="module")
def on_a_gpu() -> list[str]:
    return names_of(pytest_process("tests", "--collect-only", CRRCD_FAKE_GPU="1"))


@needs_cpu
def test_a_machine_with_a_gpu_collects_its_backends(on_a_gpu):
    assert sum("on_cuda" in name for name in on_a_gpu) > 2000
    assert sum("on_triton" in name for name in on_a_gpu) == 120
    assert not [name for name in on_a_gpu if "simt" in name]
    interpreted = re.compile(r"tests/test_(\w+_nce|relation|bank_update)\.py.*[\[-]triton[\]-]")
    assert not [name for name in on_a_gpu if interpreted.match(name)]


@needs_cpu
def test_the_sample_of_triton_is_from_all_files(on_a_gpu):
    sample = [name for name in on_a_gpu if "on_triton" in name]
    functions = {name.split("[")[0] for name in sample}
    assert len(functions) == len(sample)  # there are more functions than draws
    assert len({name.split("::")[0] for name in sample}) >= 6


@needs_cpu
@pytest.mark.parametrize("wanted, least, most", [("all", 121, 10_000), ("7", 7, 7)])
def test_as_much_of_triton_as_asked_for(wanted, least, most):
    variables = {"CRRCD_FAKE_GPU": "1", "CRRCD_TRITON_TESTS": wanted}
    names = names_of(pytest_process("tests/test_relation_nce.py", "--collect-only", **variables))
    assert least <= sum("on_triton" in name for name in names) <= most


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        (["--collect-only"], {"CRRCD_TRITON_TESTS": "some"}, "CRRCD_TRITON_TESTS: expected a num"),
        ([], {"CRRCD_FAKE_GPU": "1"}, "CRRCD_FAKE_GPU: expected --collect-only beside it"),
    ],
)
def test_what_conftest_refuses(arguments, variables, message):
    variables["CRRCD_TEST_REFERENCE_ONLY"] = "1"
    done = pytest_process("tests/test_pages.py", *arguments, **variables)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr


def test_draws_are_even():
    files = {"a": 10, "b": 20, "c": 2}  # functions in each
    names = [
        f"tests/{file}.py::test_{number}[{parameter}]"
        for file, count in files.items()
        for number in range(count)
        for parameter in range(5)
    ]
    sixteen = draw_evenly(names, 16)
    assert len({name.split("[")[0] for name in sixteen}) == 16
    assert {file: sum(f"/{file}.py" in name for name in sixteen) for file in files} == {
        "a": 5,
        "b": 10,
        "c": 1,
    }
    assert draw_evenly(reversed(names), 16) == sixteen
    assert draw_evenly(names, 64) >= sixteen
    assert len({name.split("[")[0] for name in draw_evenly(names, 32)}) == 32
    assert draw_evenly(names, 1000) == set(names)
    assert draw_evenly([], 5) == set()


# ----------------------------------------------------------------------------- lists that are empty

EMPTY = """
import pytest

@pytest.mark.parametrize("{names}", [], ids=[])
class Test{number}:
    @pytest.mark.parametrize("other", [1, 2])
    def test_both(self, {names}, other):
        raise AssertionError

@pytest.mark.parametrize("other", [1, 2])
@pytest.mark.parametrize("{names}", [])
def test_{number}({names}, other):
    raise AssertionError
"""


def run_empty(folder: Path, *lists: str) -> subprocess.CompletedProcess:
    file = folder / "test_empty.py"
    file.write_text("".join(EMPTY.format(names=n, number=i) for i, n in enumerate(lists)))
    options = ["-c", str(TESTS.parent / "pyproject.toml"), "-p", "conftest", "-rs", str(file)]
    return pytest_process(*options, PYTHONPATH=str(TESTS), CRRCD_TEST_REFERENCE_ONLY="1")


def test_tests_of_what_this_machine_lacks_are_skipped(tmp_path):
    lists = ["backend", "isa", "dtype, backend"]
    done = run_empty(tmp_path, *lists)
    assert done.returncode == 0, done.stdout
    assert "12 skipped" in done.stdout
    for names in lists:
        assert f": {names}: nothing that this test is for is here" in done.stdout


def test_any_other_empty_list_stops_collection(tmp_path):
    done = run_empty(tmp_path, "dtype")
    assert done.returncode == pytest.ExitCode.INTERRUPTED
    assert "Empty parameter set in 'test_0'" in done.stdout


# ------------------------------------------------------------------------------------- the emulator


@pytest.fixture
def refusing_compiler(tmp_path) -> tuple[Path, Path]:
    """A g++ that tells its version, compiles nothing, and a file that says what was asked of it."""
    compiler, log = tmp_path / "g++", tmp_path / "log"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {build.compiler()} --version\n'
        f'echo "$@" >> {log}\nexit 1\n'
    )
    compiler.chmod(0o755)
    return compiler, log


@pytest.mark.skipif(emulated.missing is not None, reason=f"no emulation: {emulated.missing}")
class TestEmulator:
    def test_collection_builds_nothing_and_a_failure_is_told_once(self, refusing_compiler):
        compiler, log = refusing_compiler
        variables = {"CXX": str(compiler), "CRRCD_TEST_REFERENCE_ONLY": "1"}
        file = "tests/test_bank_update.py"
        names = names_of(pytest_process(file, "--collect-only", **variables))
        simt = [name for name in names if "simt" in name]
        assert simt and not log.exists()

        done = pytest_process(*simt[:2], **variables)
        assert done.returncode == pytest.ExitCode.TESTS_FAILED
        assert "2 failed" in done.stdout
        assert "BuildError" in done.stdout
        asked = [line for line in log.read_text().splitlines() if "binding.cpp" in line]
        assert len(asked) == 1

    def test_it_can_be_switched_off(self):
        files = [f"tests/test_{name}.py" for name in ("bank_update", "cuda_kernels", "simt")]
        variables = {"CRRCD_EMULATOR": "0", "CRRCD_TEST_REFERENCE_ONLY": "1"}
        done = pytest_process(*files, "--collect-only", "-rs", **variables)
        assert not [name for name in names_of(done) if "simt" in name]
        assert done.stdout.count("no emulation: the emulator is off") == 2

    def test_a_gpu_does_not_hinder_it(self):
        variables = {"CRRCD_FAKE_GPU": "1", "CRRCD_EMULATOR": "1"}
        variables["CRRCD_TEST_REFERENCE_ONLY"] = "1"
        names = names_of(pytest_process("tests/test_bank_update.py", "--collect-only", **variables))
        assert any("simt" in name for name in names)

    def test_objects_of_kernels_are_any_torchs(self, monkeypatch, tmp_path):
        """They are found again by another torch, with the toolkit's headers elsewhere."""
        monkeypatch.setattr(build, "BUILD", tmp_path)
        monkeypatch.setattr(build, "run", lambda command, target: ran.append(target))
        toolkit = tmp_path / "include"
        toolkit.mkdir()
        for header in build.toolkit_include().glob("cuda_*16.h*"):
            (toolkit / header.name).write_bytes(header.read_bytes())
        kernels, hosts = [], []
        for version, place in (("2.11.0", build.toolkit_include()), ("2.14.1", toolkit)):
            monkeypatch.setattr(torch, "__version__", version)
            monkeypatch.setattr(build, "toolkit_include", lambda place=place: place)
            build.tools.cache_clear()
            for found, jobs in (
                (kernels, build.kernel_jobs([build.CUDA / "bank_update_kernel.cu"], True)),
                (hosts, build.host_jobs(True)),
            ):
                ran: list[Path] = []
                found.append([build.compile_object(job) for job in jobs])
        build.tools.cache_clear()
        assert kernels[0] == kernels[1]
        assert set(hosts[0]).isdisjoint(hosts[1])


def test_compilations_at_a_time():
    assert 1 <= build.processes() <= (os.cpu_count() or 1)


# --------------------------------------------------------------------------------- without pytest


def test_cases_can_be_made_without_pytest():
    code = (
        "import sys; sys.modules['pytest'] = None; import torch\n"
        "from helpers import cases, on_device\n"
        "case = cases.moved(cases.cast(cases.make_instance(), torch.float32), 'cpu')\n"
        "cases.assert_close(cases.run(case, 'reference'), cases.truth(case), 1e-4)\n"
        "print('made')"
    )
    done = python(code)
    assert "made" in done.stdout, done.stderr
