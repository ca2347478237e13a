"""Builds and smokes the library with several releases of torch and Python: `make test-versions`.

    python3 tests/versions.py [--only 2.6:3.10 ...] [--triton sm_90 ...] [--table FILE]

Each cell of the matrix, a release of torch on a release of Python, gets a virtual environment of
its own: torch and the tools that the build needs, the package built from a copy of the sources and
installed, tests/smoke.py run against it. For one Python of each torch the Triton kernels are
compiled ahead of time as well. One environment exists at a time, of 7 GB.

What became of each cell is kept in build/versions/state.json, with a log beside it. A second call
goes on where the first one stopped; --only runs cells again, whatever became of them. The table,
build/versions/table.md, goes between the marks of docs/versions.md with `--table docs/versions.md`.

PYTHONS      interpreters, with spaces between them (default: python3.10 to python3.13 on the PATH)

It needs no more than Python's standard library. Where ccache is installed, it compiles once what is
the same in several cells; Pythons that were built with other flags pass them on to extensions.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "versions"
TORCHES = ("2.6", "2.8", "2.11", "2.14.1")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
ARCHITECTURES = ("sm_90", "sm_100", "sm_80")
TOOLS = ["setuptools>=77", "wheel", "ninja", "pybind11>=2.12", "packaging"]
TOOLS += ["numpy>=1.26", "pytest>=8.0", "hypothesis>=6.100", "matplotlib>=3.8"]
GIGABYTES = 12  # an environment, and torch's wheel while it is unpacked
NO_WHEEL = ("No matching distribution found for torch==", "ERROR: Could not find a version that")
MARKS = ("<!-- table of tests/versions.py -->", "<!-- end of the table -->")


class Cell(NamedTuple):
    torch: str
    python: str

    def __str__(self) -> str:
        return f"{self.torch}:{self.python}"

    @property
    def title(self) -> str:
        return f"torch {self.torch} on Python {self.python}"


class Failed(Exception):
    """A stage ended with an error, whose first line this is."""


class NoWheel(Exception):
    """This torch does not exist for this Python."""


def order() -> list[Cell]:
    """All cells: first the diagonal, then each torch on its lowest and highest Python, the rest."""
    diagonal = list(map(Cell, TORCHES, PYTHONS))
    ends = [Cell(torch, python) for torch in TORCHES for python in (PYTHONS[0], PYTHONS[-1])]
    rest = [Cell(torch, python) for torch in TORCHES for python in PYTHONS]
    return list(dict.fromkeys([*diagonal, *ends, *rest]))


def compiles_triton(cell: Cell) -> bool:
    """The Triton of a torch is one for all Pythons: it is asked once, on the diagonal."""
    return PYTHONS[TORCHES.index(cell.torch)] == cell.python


# ---------------------------------------------------------------------------------------------
# What is known so far


class State:
    """Results by cell, and of Triton by torch and architecture, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, dict] = {}
        self.triton: dict[str, dict[str, dict]] = {}
        if path.exists():
            found = json.loads(path.read_text())
            self.cells, self.triton = found["cells"], found["triton"]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps({"cells": self.cells, "triton": self.triton}, indent=2))
        partial.replace(self.path)

    def architectures(self, cell: Cell, wanted: tuple[str, ...]) -> list[str]:
        """Those that Triton has still to compile for in this cell."""
        done = self.triton.get(cell.torch, {})
        return [arch for arch in wanted if compiles_triton(cell) and arch not in done]


def first_error(text: str) -> str:
    """The first line that names an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pattern = re.compile(r"\berror:|^[\w.]*(Error|Exception)\b|^ERROR\b|^crrcd_ext: ")
    return next((line for line in lines if pattern.search(line)), lines[-1] if lines else "")


def own_warnings(text: str) -> list[str]:
    """Compilers' warnings of files of ours, each once."""
    found = re.findall(r"^\s*\S*?(csrc/\S+: warning\b.*)$", text, re.MULTILINE)
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------------------------------
# One cell


class Runner:
    """Makes the environment of a cell and runs the stages in it."""

    def __init__(self, cell: Cell, interpreter: str) -> None:
        self.cell, self.interpreter = cell, interpreter
        # One place for all: what a compiler reads has the same names in all cells, and ccache
        # knows it again.
        self.place, self.source = BUILD / "environment", BUILD / "source"
        self.python = self.place / "bin" / "python"
        self.log = BUILD / "logs" / f"{cell.torch}-{cell.python}.log"

    def variables(self, **more: str) -> dict[str, str]:
        ours = ("CRRCD_", "TRITON_", "TORCH", "PYTHON")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        kept["PATH"] = f"{_compilers()}{os.pathsep}{self.place / 'bin'}{os.pathsep}{kept['PATH']}"
        kept["PYTHONPATH"] = str(self.place / "lib" / "python" / "site-packages")
        kept["TORCHINDUCTOR_CACHE_DIR"] = str(BUILD / "cache" / "inductor")
        kept["TRITON_CACHE_DIR"] = str(BUILD / "cache" / "triton")
        return kept | more

    def run(self, *command: object, **variables: str) -> str:
        words = [str(word) for word in command]
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(words)}\n")
            log.flush()
            begins = log.tell()
            done = subprocess.run(
                words, cwd=BUILD, env=self.variables(**variables), stdout=log, stderr=log
            )
        with self.log.open(errors="replace") as log:
            log.seek(begins)
            output = log.read()
        if done.returncode != 0:
            if "torch" in " ".join(words) and any(words_ in output for words_ in NO_WHEEL):
                raise NoWheel
            raise Failed(first_error(output) or f"status {done.returncode}")
        return output

    def environment(self) -> dict:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(BUILD).free / 1e9
        if free < GIGABYTES:
            sys.exit(f"versions: {free:.0f} GB of disk are free, {GIGABYTES} are needed")
        self.log.write_text("")
        shutil.rmtree(self.place, ignore_errors=True)
        self.run(self.interpreter, "-m", "venv", self.place)
        (self.place / "lib" / "python").symlink_to(f"python{self.cell.python}")
        pip = (self.python, "-m", "pip", "--disable-pip-version-check", "install", "-q")
        # bytecode of all that nobody imports would take half the time
        self.run(*pip, "--no-compile", f"torch=={self.cell.torch}.*", *TOOLS)
        versions = "import json, platform, numpy, torch, triton; print(json.dumps(dict("
        versions += "python=platform.python_version(), torch=torch.__version__, "
        versions += "triton=triton.__version__, numpy=numpy.__version__)))"
        return json.loads(self.run(self.python, "-c", versions).splitlines()[-1])

    def copy_sources(self) -> None:
        """The sources alone: no object of another torch, and no compiled module."""
        shutil.rmtree(self.source, ignore_errors=True)
        self.source.mkdir(parents=True)
        unwanted = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        for name in ("crrcd_ext", "csrc", "python", "bench"):
            shutil.copytree(ROOT / name, self.source / name, ignore=unwanted)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy2(ROOT / name, self.source)

    def build(self) -> list[str]:
        """Installs the package as a user does; returns warnings of its own sources."""
        self.copy_sources()
        pip = (self.python, "-m", "pip", "--disable-pip-version-check", "install", "-v")
        options = ("--no-deps", "--no-build-isolation", "--no-index", self.source)
        return own_warnings(self.run(*pip, *options, CRRCD_CUDA="0"))

    def smoke(self) -> list[str]:
        """Returns what could not be looked at here."""
        variables = {"CRRCD_EMULATOR": "1", "TRITON_INTERPRET": "1"}
        output = self.run(self.python, ROOT / "tests" / "smoke.py", **variables)
        return re.findall(r"^left out: (.*)", output, re.MULTILINE)

    def compile_triton(self, arch: str) -> dict:
        """Counts of the Triton kernels, compiled ahead of time for ``arch``."""
        folder = BUILD / "triton" / self.cell.torch
        document = folder / "static_triton.json"
        document.unlink(missing_ok=True)
        self.copy_sources()
        command = ("-m", "bench", "static", "--backend", "triton", "--arch", arch)
        command += ("--output", folder)
        failure = ""
        try:
            self.run("nice", self.python, *command, PYTHONPATH=str(self.source))
        except Failed as error:
            failure = str(error)
            if not document.exists():
                return {"error": failure}
        found = json.loads(document.read_text())
        spilling = [row for row in found["kernels"] if row["spills"] or row["stack"]]
        return {
            "triton": found["triton"],
            "kernels": len(found["kernels"]) + len(found["failures"]),
            "failures": len(found["failures"]),
            "spills": Counter(row["call"].split()[1] for row in spilling),
            "error": failure,
        }

    def remove(self) -> None:
        for folder in (self.place, self.source, BUILD / "cache"):
            shutil.rmtree(folder, ignore_errors=True)


def _compilers() -> Path:
    """A folder in which each compiler is ccache under its name; empty where there is none."""
    folder = BUILD / "compilers"
    folder.mkdir(parents=True, exist_ok=True)
    ccache = shutil.which("ccache")
    for name in ("c++", "g++", "cc", "gcc"):
        link = folder / name
        link.unlink(missing_ok=True)
        if ccache is not None and shutil.which(name) is not None:
            link.symlink_to(ccache)
    return folder


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S}  {text}", flush=True)


@contextlib.contextmanager
def timed(cell: Cell, stage: str, seconds: dict[str, int]) -> Iterator[None]:
    say(f"{cell.title}: {stage}")
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] = round(time.monotonic() - began)


def run_cell(cell: Cell, runner: Runner, state: State, archs: list[str]) -> None:
    """All stages that are left of a cell; each result is saved at once."""
    record = {"date": f"{datetime.date.today()}", "seconds": {}, "machine": machine()}
    seconds = record["seconds"]
    known = state.cells.get(str(cell), {}).get("outcome")
    try:
        with timed(cell, "environment", seconds):
            record |= runner.environment()
        if known is None:
            with timed(cell, "build", seconds):
                warnings = runner.build()
            with timed(cell, "smoke", seconds):
                record["left_out"] = runner.smoke()
            if warnings:
                raise Failed(warnings[0])
            record["outcome"] = "passed"
    except NoWheel:
        record["outcome"] = "no wheel"
    except Failed as error:
        record |= {"outcome": "failed", "error": str(error)}
    if known is None:
        record["log"] = str(runner.log.relative_to(ROOT))
        state.cells[str(cell)] = record
        state.save()
        words = [f"{stage} {taken} s" for stage, taken in seconds.items()]
        say(f"{cell.title}: {record['outcome']} ({', '.join(words)}) {record.get('error', '')}")
    if "torch" not in record or "triton" not in record:
        return  # no environment
    for arch in archs:
        with timed(cell, f"Triton for {arch}", seconds):
            found = runner.compile_triton(arch)
        found |= {"date": record["date"], "seconds": seconds[f"Triton for {arch}"]}
        found.setdefault("triton", record["triton"])
        state.triton.setdefault(cell.torch, {})[arch] = found
        state.save()
        say(f"{cell.title}: Triton for {arch}: {summary(found)}")


def run_cells(
    cells: list[Cell],
    interpreters: dict[str, str],
    state: State,
    archs: tuple[str, ...],
    make_runner=Runner,
) -> None:
    """Cells that have no result yet, or whose Triton kernels have none."""
    for cell in cells:
        left = state.architectures(cell, archs)
        known = state.cells.get(str(cell), {}).get("outcome")
        if known is not None and (known == "no wheel" or not left):
            continue
        if cell.python not in interpreters:
            continue
        runner = make_runner(cell, interpreters[cell.python])
        try:
            run_cell(cell, runner, state, left)
        finally:
            runner.remove()


# ---------------------------------------------------------------------------------------------
# Interpreters, machine, table


def find_interpreters() -> dict[str, str]:
    """Version -> interpreter, of those that run."""
    named = os.environ.get("PYTHONS", "").split()
    found = {}
    for command in named or [f"python{version}" for version in PYTHONS]:
        ask = [command, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            done = subprocess.run(ask, capture_output=True, text=True)
        except OSError:
            done = None
        if done is not None and done.returncode == 0:
            found.setdefault(done.stdout.strip(), command)
        elif named:
            sys.exit(f"versions: PYTHONS: {command!r} does not run")
    return found


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} processors"


def summary(found: dict) -> str:
    """Of an architecture's Triton kernels, for a table."""
    if "kernels" not in found:
        return f"fails: {found['error']}"
    spills = found["spills"]
    words = f"{found['kernels']} kernels, {found['failures']} fail, {sum(spills.values())} spill"
    return words + (
        f" ({', '.join(f'{n} {kind}' for kind, n in spills.items())})" if spills else ""
    )


def table(state: State) -> str:
    """Markdown: the matrix, what stands behind each cell that did not pass, Triton's kernels."""
    lines = ["| torch | " + " | ".join(f"Python {python}" for python in PYTHONS) + " |"]
    lines.append("| --- |" + " --- |" * len(PYTHONS))
    notes: dict[tuple[str, str], list[str]] = {}
    for torch in TORCHES:
        row = []
        for python in PYTHONS:
            cell = Cell(torch, python)
            record = state.cells.get(str(cell))
            row.append("not run" if record is None else record["outcome"])
            if record is not None and record["outcome"] == "failed":
                notes.setdefault((torch, f"`{record['error']}`"), []).append(python)
            for name in (record or {}).get("left_out", ()):
                notes.setdefault((torch, f"without backend {name}"), []).append(python)
        releases = {r["torch"] for k, r in state.cells.items() if _of(k, torch) and "torch" in r}
        lines.append(f"| {', '.join(sorted(releases)) or torch} | " + " | ".join(row) + " |")
    records = list(state.cells.values())
    if records:
        dates, numpys = (sorted({r[k] for r in records if k in r}) for k in ("date", "numpy"))
        lines += ["", f"{_span(dates)}; {'; '.join(sorted({r['machine'] for r in records}))}."]
        if numpys:
            lines[-1] += f" numpy {', '.join(numpys)}."
    if notes:
        lines += [""]
        lines += [f"- {Cell(t, ', '.join(of)).title}: {text}" for (t, text), of in notes.items()]
    if state.triton:
        known = {arch for found in state.triton.values() for arch in found}
        archs = sorted(known.union(ARCHITECTURES), key=_number)
        lines += ["", "| Triton | torch | " + " | ".join(archs) + " |"]
        lines.append("| --- | --- |" + " --- |" * len(archs))
        for torch in TORCHES:
            found = state.triton.get(torch, {})
            if not found:
                continue
            release = next(iter(found.values()))["triton"]
            row = [summary(found[arch]) if arch in found else "not run" for arch in archs]
            lines.append(f"| {release} | {torch} | " + " | ".join(row) + " |")
        dates = sorted({x["date"] for found in state.triton.values() for x in found.values()})
        lines += ["", f"{_span(dates)}."]
    return "\n".join(lines) + "\n"


def _of(key: str, torch: str) -> bool:
    return key.startswith(f"{torch}:")


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _span(dates: list[str]) -> str:
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def write_table(text: str, path: Path) -> None:
    """Puts the table between the marks of a file."""
    before, begin, rest = path.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        sys.exit(f"versions: {path}: expected the lines {MARKS[0]} and {MARKS[1]}")
    path.write_text(f"{before}{begin}\n{text}{end}{after}")


def parse_cell(text: str) -> Cell:
    cell = Cell(*text.split(":")) if text.count(":") == 1 else None
    if cell not in order():
        raise argparse.ArgumentTypeError(f"expected TORCH:PYTHON, as 2.6:3.10, got {text!r}")
    return cell


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", type=parse_cell, metavar="TORCH:PYTHON")
    parser.add_argument("--triton", nargs="*", default=ARCHITECTURES, metavar="SM")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there, no runs")
    options = parser.parse_args()
    state = State(BUILD / "state.json")
    if options.table is not None:
        write_table(table(state), options.table)
        return 0
    interpreters = find_interpreters()
    if missing := [version for version in PYTHONS if version not in interpreters]:
        say(f"no Python {', '.join(missing)} here (PYTHONS=... names interpreters)")
    for cell in options.only or ():
        state.cells.pop(str(cell), None)
    run_cells(options.only or order(), interpreters, state, tuple(options.triton))
    (BUILD / "table.md").write_text(table(state))
    print(table(state))
    return int(any(record["outcome"] == "failed" for record in state.cells.values()))


if __name__ == "__main__":
    sys.exit(main())
