"""The wheel without the compiled module, installed where nothing else of the package is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

USE = """
import pathlib, sys, warnings
import torch
import crrcd_ext
from crrcd_ext import functional

assert pathlib.Path(crrcd_ext.__file__).is_relative_to(sys.prefix), crrcd_ext.__file__
available = crrcd_ext.available_backends()
assert available["cpu"].startswith("crrcd_ext._C is not there"), available
assert available["reference"] is None and available["triton"] is None, available

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
case = {
    "query": torch.randn(2, 3, 4),
    "positive": torch.randn(2, 3, 4),
    "anchor": torch.randn(2, 5),
    "bank": torch.randn(7, 5),
    "weight": torch.randn(4, 5),
    "scale": torch.tensor(9.0),
    "offset": torch.tensor(1.0),
}
found = {}
for backend in ("reference", "triton"):
    leaves = {k: v.clone().requires_grad_() for k, v in case.items()}
    loss = functional.relation_nce(**leaves, backend=backend)
    found[backend] = [loss, *torch.autograd.grad(loss, list(leaves.values()))]
torch.testing.assert_close(found["triton"], found["reference"])

torch.set_default_dtype(torch.float32)

criterion = crrcd_ext.CRDLoss(4, 6, 20, embedding_dim=5, negatives=8, backend="triton")
before = criterion.teacher_bank.rows.clone()
criterion(torch.randn(3, 4), torch.randn(3, 6), torch.arange(3)).backward()
assert (criterion.teacher_bank.rows != before).any(1).sum() == 3
print("worked")
"""


def run(*command: str | Path, **environment: str) -> str:
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and k[:6] != "CRRCD_"}
    variables |= environment
    done = subprocess.run(
        [str(word) for word in command],
        env=variables,
        cwd=environment["HOME"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git, whose files make the wheel")
def test_a_wheel_without_compiled_module(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "crrcd_ext", "python", "pyproject.toml", "setup.py", "README.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("needs a git checkout, whose files make the wheel")
    source = tmp_path / "source"
    for name in [*listed.stdout.split(), "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())

    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    # no compiler is asked for, and none would be found
    options = {"HOME": str(tmp_path), "CRRCD_COMPILED": "0", "CRRCD_CUDA": "0", "CXX": "none"}
    run(sys.executable, *build, "-w", tmp_path, source, **options)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")

    place = tmp_path / "environment"
    run(sys.executable, "-m", "venv", place, HOME=str(tmp_path))
    python = place / "bin" / "python"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    run(python, *install, HOME=str(tmp_path))
    # torch and Triton, which are too large to be installed again, are those of this environment;
    # what the new one has comes first
    (site,) = place.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    assert run(python, "-c", USE, HOME=str(tmp_path), TRITON_INTERPRET="1").endswith("worked\n")
