"""``python -m crrcd_ext``: what this installation can run, and what it was built with.

``python -m crrcd_ext plan``: how a call would be cut up on a GPU.
``python -m crrcd_ext tune``: measure configurations of the Triton kernels on this GPU.
"""

from __future__ import annotations

import os
import platform
import sys

import torch

import crrcd_ext
from crrcd_ext import _backend, _plan


def report() -> str:
    """Backends with the reason where one is absent, versions, instruction sets, build, threads."""
    variables = {name: os.environ.get(name) for name in ("CRRCD_BACKEND", "CRRCD_CPU_ISA")}
    lines = [
        f"crrcd_ext    {crrcd_ext.__version__}",
        f"torch        {torch.__version__}",
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"installed    {os.path.dirname(crrcd_ext.__file__)}",
        "environment  " + ", ".join(f"{k}={v or '(not set)'}" for k, v in variables.items()),
        f"chosen       {_backend.current_backend()}",
        "backends",
    ]
    for name, reason in _backend.available_backends().items():
        lines.append(f"  {name:<11}" + ("available" if reason is None else f"absent: {reason}"))
    for device in _backend.AUTO:
        lines.append(f"auto, tensors on {device}")
        lines += [f"  {k:<15} {order}" for k, order in _backend.automatic(device).items()]
    if _backend.compiled is None:
        lines.append(f"  to have cpu: {_backend.INSTALL}")
        return "\n".join(lines)
    try:
        active = _backend.compiled.isa_active()
    except (RuntimeError, ValueError) as error:
        active = f"none: {error}"
    names = ", ".join(_backend.compiled.isa_available())
    lines.append(f"instruction sets  {names}; active: {active}")
    lines.append(f"threads           {_backend.compiled.num_threads()}")
    lines.append("build")
    lines += [f"  {key:<16}{value}" for key, value in _backend.compiled.build_info().items()]
    return "\n".join(lines)


def main() -> None:
    command, *arguments = sys.argv[1:] or [""]
    if command == "plan":
        _plan.main(arguments)
    elif command == "tune":
        from crrcd_ext import _tune  # imports Triton

        _tune.main(arguments)
    elif command:
        sys.exit(f"python -m crrcd_ext: expected nothing, 'plan' or 'tune', got {command!r}")
    else:
        print(report())


if __name__ == "__main__":
    main()
