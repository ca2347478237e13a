"""`--dry-run`: all of the check that needs no device, on the versions that are here.

The scripts of the stages run for real, at small sizes on the CPU; tests are collected as a machine
with a GPU would collect them; commands are looked at, and what has to be carried is weighed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from bench.gpu_check import module
from bench.gpu_check.rows import emit
from bench.gpu_check.stage import ROOT, Job, Stage
from crrcd_ext._backend import OPERATORS

PYTHON = sys.executable
MOST_MEGABYTES = 64
"""What the sources and the bundle may have together."""
ARCHITECTURE = "9.0"


def plan() -> list[Stage]:
    from bench.gpu_check.stages import OPERATOR_TESTS, environment, script

    on_cpu = ["--device", "cpu", "--backend", "cpu"]
    nothing = environment()
    collected = [*OPERATOR_TESTS, "tests/test_device.py", "--collect-only", "-q"]
    collected += ["-p", "no:cacheprovider", "-p", "bench.gpu_check.pytest_rows"]
    faked = nothing | {"CRRCD_FAKE_GPU": "1", "CRRCD_EMULATOR": "0"}
    times = script("times", "--device", "cpu", "--small", "--variant", "eager", "torch.compile")
    return [
        Stage("module", 30, [Job("module", script("dry_run", "--module"), nothing)]),
        Stage(
            "commands and sizes", 30, [Job("commands", script("dry_run", "--commands"), nothing)]
        ),
        Stage("collection", 120, [Job("tests", [PYTHON, "-m", "pytest", *collected], faked)]),
        Stage(
            "scripts",
            400,
            [
                Job(
                    "device",
                    script("device", *on_cpu[:2], "--size", "64", "--megabytes", "1"),
                    nothing,
                ),
                *(
                    Job(
                        f"correctness, {operator}",
                        script("correctness", "--operator", operator, *on_cpu, "--small"),
                        nothing,
                        ("cpu",),
                    )
                    for operator in OPERATORS
                ),
                Job("small calls", script("small_calls", *on_cpu), nothing, ("cpu",)),
                Job("times", times, nothing),
                Job("benchmarks", script("benchmarks", *on_cpu, "--small"), nothing, ("cpu",)),
                *(
                    Job(name, script(name, "--help"), nothing)
                    for name in ("graphs", "module", "warm", "bundle")
                ),
            ],
            together=False,
        ),
    ]


def look_for_module() -> None:
    """Whether there is a compiled module, or one that was brought along, which is put in place."""
    unfit = module.mismatch(module.MANIFEST, ARCHITECTURE)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if unfit is None and not (ROOT / "crrcd_ext" / f"_C{suffix}").exists():
        module.take_along()
    question = "from crrcd_ext import _backend; print(_backend.missing or '')"
    done = subprocess.run([PYTHON, "-c", question], cwd=ROOT, capture_output=True, text=True)
    why = done.stdout.strip() or (done.stderr.strip()[-200:] if done.returncode else "")
    emit(kind="backend", backend="cpu", ok=not why, why=why, command="make gpu-bundle")
    emit(kind="bundle", fits=unfit is None, why=unfit or "")


def missing(commands: Sequence[Sequence[str]]) -> list[str]:
    """What commands name and this source tree lacks."""
    from bench.__main__ import make_parser

    found = []
    for words in commands:
        for word in words:
            file, _, function = word.partition("::")
            path = ROOT / file
            if word.startswith("tests/") and not path.exists():
                found.append(f"no file {file}")
            elif (
                word.startswith("tests/")
                and function
                and f"def {function}(" not in path.read_text()
            ):
                found.append(f"{file} has no {function}")
        if "-m" in words and words[words.index("-m") + 1].startswith("bench."):
            name = words[words.index("-m") + 1]
            if not (ROOT / Path(*name.split("."))).with_suffix(".py").exists():
                found.append(f"no module {name}")
        if list(words[1:3]) == ["-m", "bench"]:
            said = StringIO()
            try:
                with redirect_stderr(said):
                    make_parser().parse_args(words[3:])
            except SystemExit:
                found.append(said.getvalue().strip().splitlines()[-1])
    return found


def carried_megabytes() -> dict[str, float]:
    """Of the files that git knows, and of the bundle."""
    from bench.gpu_check.bundle import megabytes

    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\0")
    files = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    return {
        "sources": sum(p.stat().st_size for p in files) / 1e6,
        "bundle": megabytes(module.BUNDLE) if module.BUNDLE.is_dir() else 0.0,
    }


def look_at_commands() -> None:
    from bench.gpu_check.stages import plan as stages

    commands = [job.command for stage in stages() for job in stage.jobs]
    for problem in missing(commands):
        emit(kind="commands", what=problem, ok=False)
    emit(kind="commands", what=f"{len(commands)} commands of {len(stages())} stages", ok=True)
    total = sum(s.seconds for s in stages() if s.name not in ("module", "benchmarks"))
    emit(kind="commands", what="seconds of the stages without benchmarks", value=total)
    sizes = carried_megabytes()
    for what, size in sizes.items():
        emit(kind="carried", what=what, MB=round(size, 1))
    emit(
        kind="carried",
        what="together",
        MB=round(sum(sizes.values()), 1),
        ok=sum(sizes.values()) < MOST_MEGABYTES,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", action="store_true")
    parser.add_argument("--commands", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("CRRCD_BACKEND", "")
    if options.module:
        look_for_module()
    if options.commands:
        look_at_commands()
    return 0


if __name__ == "__main__":
    sys.exit(main())
