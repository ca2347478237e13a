"""Python code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import crrcd_ext

TESTS = Path(__file__).resolve().parent.parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own, with the variables of this package as given."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("CRRCD_")}
    # The package that this process imported: the tree's, or an installed one.
    path = [str(Path(crrcd_ext.__file__).parent.parent), variables.get("PYTHONPATH", "")]
    variables |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=300, cwd=TESTS
    )
