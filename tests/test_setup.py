"""What setup.py makes of the toolkit that it finds and of CRRCD_CUDA; nothing is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

if torch.version.cuda is None:
    pytest.skip("this torch is a CPU build", allow_module_level=True)
MAJOR = int(torch.version.cuda.split(".")[0])


def toolkit(folder: Path, release: str | None) -> Path:
    """A folder whose nvcc says that release, or has none."""
    (folder / "bin").mkdir(parents=True)
    if release is not None:
        nvcc = folder / "bin" / "nvcc"
        nvcc.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}'\n"
        )
        nvcc.chmod(0o755)
    return folder


def setup(home: Path, wanted: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"CUDA_HOME": str(home), "CRRCD_CUDA": wanted}
    command = [sys.executable, "setup.py", "-q", "--name"]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


CASES = {
    f"{MAJOR + 1}.2": f"was built with CUDA {torch.version.cuda}, and the toolkit in ",
    None: "has no nvcc that runs",
}


@pytest.mark.parametrize("release", CASES)
def test_a_toolkit_that_does_not_fit(release, tmp_path):
    home = toolkit(tmp_path, release)
    automatic = setup(home, "auto")
    assert automatic.returncode == 0, automatic.stderr
    assert automatic.stdout == "crrcd_ext\n"
    said = [line for line in automatic.stderr.splitlines() if line.startswith("crrcd_ext: ")]
    assert len(said) == 1
    assert "a build without CUDA kernels: " in said[0] and CASES[release] in said[0]
    assert str(home) in said[0] and (release or "") in said[0]

    demanded = setup(home, "1")
    assert demanded.returncode == 1
    last = demanded.stderr.splitlines()[-1]
    assert last.startswith("crrcd_ext: CRRCD_CUDA=1, but ") and CASES[release] in last


def test_a_toolkit_of_the_same_major_release(tmp_path):
    done = setup(toolkit(tmp_path, f"{MAJOR}.9"), "1")
    assert done.returncode == 0, done.stderr
    assert "crrcd_ext: " not in done.stderr
