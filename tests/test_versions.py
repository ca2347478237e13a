"""tests/versions.py with a runner that builds nothing: what is run, kept, run again and shown."""

from __future__ import annotations

import argparse
import sys

import pytest
import versions
from versions import Cell, Failed, NoWheel, State

ARCHS = ("sm_90",)
INTERPRETERS = {version: f"python{version}" for version in versions.PYTHONS}


class Stub:
    """Says what it was asked for; cells in ``fails`` raise at the stage named."""

    def __init__(self, calls: list[str], fails: dict[str, tuple[str, Exception]]) -> None:
        self.calls, self.fails = calls, fails

    def __call__(self, cell: Cell, interpreter: str) -> Stub:
        assert interpreter == f"python{cell.python}"
        self.cell, self.log = cell, versions.ROOT / "build" / f"{cell}.log"
        return self

    def _stage(self, name: str) -> None:
        self.calls.append(f"{self.cell} {name}")
        stage, error = self.fails.get(str(self.cell), ("", None))
        if stage == name:
            raise error

    def environment(self) -> dict:
        self._stage("environment")
        release = self.cell.torch if self.cell.torch.count(".") == 2 else f"{self.cell.torch}.0"
        return {"torch": release, "triton": "3.9.1", "numpy": "2.0", "python": self.cell.python}

    def build(self) -> list[str]:
        self._stage("build")
        return []

    def smoke(self) -> list[str]:
        self._stage("smoke")
        return ["moon: too far"] if self.cell.torch == "2.14.1" else []

    def compile_triton(self, arch: str) -> dict:
        self._stage(arch)
        return {"triton": "3.9.1", "kernels": 7, "failures": 1, "spills": {"bf16": 2}, "error": ""}

    def remove(self) -> None:
        self._stage("remove")


def run(path, cells, archs=(), interpreters=INTERPRETERS, fails=None) -> tuple[list[str], State]:
    """One process: the state is read anew from its file."""
    calls: list[str] = []
    state = State(path)
    versions.run_cells(cells, interpreters, state, archs, Stub(calls, fails or {}))
    return calls, State(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deeper" / "state.json"


def test_the_diagonal_comes_first_then_the_ends():
    cells = versions.order()
    assert len(cells) == len(set(cells)) == len(versions.TORCHES) * len(versions.PYTHONS)
    assert list(map(str, cells[:4])) == ["2.6:3.10", "2.8:3.11", "2.11:3.12", "2.14.1:3.13"]
    assert {cell.python for cell in cells[4:10]} == {"3.10", "3.13"}


def test_a_finished_cell_is_not_run_again(path):
    cells = [Cell("2.6", "3.10"), Cell("2.8", "3.10")]
    calls, state = run(path, cells)
    stages = ["environment", "build", "smoke", "remove"]
    assert calls == [f"{cell} {stage}" for cell in cells for stage in stages]
    assert {k: record["outcome"] for k, record in state.cells.items()} == {
        "2.6:3.10": "passed",
        "2.8:3.10": "passed",
    }
    assert run(path, cells)[0] == []


def test_it_goes_on_where_it_was_stopped(path):
    cells = versions.order()[:3]
    with pytest.raises(KeyboardInterrupt):
        run(path, cells, fails={"2.8:3.11": ("smoke", KeyboardInterrupt())})
    assert list(State(path).cells) == ["2.6:3.10"]
    calls, state = run(path, cells)
    assert calls[0] == "2.8:3.11 environment" and "2.6:3.10 environment" not in calls
    assert list(state.cells) == [str(cell) for cell in cells]


@pytest.mark.parametrize("stage", ["environment", "build", "smoke"])
def test_a_failure_is_kept_with_its_first_line_and_does_not_stop_the_others(path, stage):
    cells = versions.order()[:2]
    calls, state = run(path, cells, fails={"2.6:3.10": (stage, Failed("error: no such thing"))})
    record = state.cells["2.6:3.10"]
    assert (record["outcome"], record["error"]) == ("failed", "error: no such thing")
    assert record["log"].endswith("2.6:3.10.log")
    assert calls[calls.index(f"2.6:3.10 {stage}") + 1] == "2.6:3.10 remove"
    assert state.cells["2.8:3.11"]["outcome"] == "passed"
    assert run(path, cells)[0] == []


def test_warnings_of_our_own_sources_fail_a_cell(path, monkeypatch):
    monkeypatch.setattr(Stub, "build", lambda self: ["csrc/checks.cpp:1:2: warning: unused"])
    record = run(path, [Cell("2.6", "3.10")])[1].cells["2.6:3.10"]
    assert (record["outcome"], record["error"]) == (
        "failed",
        "csrc/checks.cpp:1:2: warning: unused",
    )


def test_a_torch_without_a_wheel_is_no_failure(path):
    cells = [Cell("2.6", "3.13")]
    state = run(path, cells, ARCHS, fails={"2.6:3.13": ("environment", NoWheel())})[1]
    assert state.cells["2.6:3.13"]["outcome"] == "no wheel"
    assert run(path, cells, ARCHS)[0] == []


def test_a_python_that_is_missing_is_left_for_later(path):
    cells = [Cell("2.6", "3.10")]
    assert run(path, cells, interpreters={})[1].cells == {}
    assert run(path, cells)[1].cells["2.6:3.10"]["outcome"] == "passed"


def test_triton_is_compiled_once_for_each_torch_and_can_be_asked_for_later(path):
    cells = [Cell("2.6", "3.10"), Cell("2.6", "3.13")]
    run(path, cells)
    calls, state = run(path, cells, ARCHS)
    assert calls == ["2.6:3.10 environment", "2.6:3.10 sm_90", "2.6:3.10 remove"]
    assert state.triton["2.6"]["sm_90"]["kernels"] == 7
    assert state.cells["2.6:3.10"]["outcome"] == "passed"
    assert run(path, cells, ARCHS)[0] == []


def test_the_table_says_what_was_run(path):
    cells = [Cell("2.6", "3.10"), Cell("2.6", "3.13"), Cell("2.8", "3.11"), Cell("2.14.1", "3.12")]
    cells.append(Cell("2.14.1", "3.13"))
    fails = {
        "2.6:3.13": ("environment", NoWheel()),
        "2.8:3.11": ("smoke", Failed("error: crcd on cpu")),
    }
    state = run(path, cells, ARCHS, fails=fails)[1]
    lines = versions.table(state).splitlines()
    assert "| torch | Python 3.10 | Python 3.11 | Python 3.12 | Python 3.13 |" in lines
    assert "| 2.6.0 | passed | not run | not run | no wheel |" in lines
    assert "| 2.8.0 | not run | failed | not run | not run |" in lines
    assert "| 2.11 | not run | not run | not run | not run |" in lines
    assert "| 2.14.1 | not run | not run | passed | passed |" in lines
    assert "- torch 2.8 on Python 3.11: `error: crcd on cpu`" in lines
    assert "- torch 2.14.1 on Python 3.12, 3.13: without backend moon: too far" in lines
    assert "| 3.9.1 | 2.6 | not run | 7 kernels, 1 fail, 2 spill (2 bf16) | not run |" in lines
    assert any(versions.machine() in line and "numpy 2.0" in line for line in lines)


def test_the_table_goes_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    begin, end = versions.MARKS
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    versions.write_table("| new |\n", page)
    assert page.read_text() == f"before\n{begin}\n| new |\n{end}\nafter\n"
    page.write_text("no marks\n")
    with pytest.raises(SystemExit, match=r"page\.md: expected the lines"):
        versions.write_table("| new |\n", page)


def test_names_of_cells():
    assert versions.parse_cell("2.6:3.10") == Cell("2.6", "3.10")
    for wrong in ("2.6", "2.6:3.9", "2.6:3.10:1", "1.0:3.10"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected TORCH:PYTHON.*got"):
            versions.parse_cell(wrong)


def test_interpreters_are_those_that_run(monkeypatch):
    here = "{}.{}".format(*sys.version_info)
    monkeypatch.setenv("PYTHONS", sys.executable)
    assert versions.find_interpreters() == {here: sys.executable}
    monkeypatch.setenv("PYTHONS", "/no/such/python")
    with pytest.raises(SystemExit, match="'/no/such/python' does not run"):
        versions.find_interpreters()


LOG = """\
building
  /here/build/versions/source/csrc/cpu/plan.h:12:5: warning: unused variable 'x'
In file included from /here/site-packages/torch/x.h:3: warning: not ours
/here/build/versions/source/csrc/cpu/plan.h:12:5: warning: unused variable 'x'
csrc/cuda/tile.cuh(7): warning #177-D: variable "y" was declared but never referenced
csrc/cpu/plan.h:9:1: error: expected ';'
Traceback (most recent call last):
RuntimeError: Error compiling objects
"""


def test_logs_are_read():
    assert versions.own_warnings(LOG) == [
        "csrc/cpu/plan.h:12:5: warning: unused variable 'x'",
        'csrc/cuda/tile.cuh(7): warning #177-D: variable "y" was declared but never referenced',
    ]
    assert versions.first_error(LOG) == "csrc/cpu/plan.h:9:1: error: expected ';'"
    assert versions.first_error("one\nValueError: two\nthree") == "ValueError: two"
    assert versions.first_error("one\ntwo\n\n") == "two"
    assert versions.first_error("") == ""


def test_a_first_cell_in_a_fresh_clone_finds_room(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(versions, "BUILD", tmp_path / "build" / "versions")
    monkeypatch.setattr(versions, "GIGABYTES", float("inf"))
    with pytest.raises(SystemExit, match="GB of disk are free, inf are needed"):
        versions.Runner(Cell("2.14.1", "3.11"), sys.executable).environment()
