"""The compiled module: the one that is here, one that was brought along, or one built now.

Each candidate has to import and launch a kernel, in a process of its own. What
was brought along lies in build/gpu_bundle (`make gpu-bundle`) and is taken where it was built for
this Python, this torch, this GPU and these sources.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch

from bench.gpu_check.rows import emit
from bench.gpu_check.stage import ROOT

BUNDLE = ROOT / "build" / "gpu_bundle"
MANIFEST = BUNDLE / "manifest.json"
PACKED = BUNDLE / "triton.tar.xz"
UNPACKED = ROOT / "build" / "gpu_triton"
FIRST_LAUNCH = "bench.gpu_check.first_launch"
LAUNCH_SECONDS = 45.0
"""For an import on a cold machine, a context and the launches, with a few kernels of Triton's."""
UNFIT = re.compile(
    r"kernel image|is not available|is not there|no CUDA kernels|ImportError|undefined symbol"
    r"|cannot open shared object|within"
)
"""What is said of a module that was built for something else."""


def digest() -> str:
    """Of all that the compiled module is made from."""
    found = hashlib.sha256()
    sources = [p for p in (ROOT / "csrc").glob("**/*") if p.is_file()]
    for path in [*sorted(sources), ROOT / "setup.py"]:
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:20]


def described(architecture: str) -> dict[str, str]:
    """What a module is built for and from, here and now."""
    return {
        "python": "{}.{}".format(*sys.version_info),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "architecture": architecture,
        "sources": digest(),
    }


def mismatch(manifest: Path, architecture: str) -> str | None:
    """Why what was brought along does not fit, or None where it does."""
    if not manifest.exists():
        return "nothing was brought along in build/gpu_bundle"
    brought, here = json.loads(manifest.read_text()), described(architecture)
    for key, value in here.items():
        if brought.get(key) != value:
            return f"{key} is {value} here, the module was built for {brought.get(key)}"
    return None


def launches(backend: str) -> str | None:
    """Why no kernel can be launched, or None."""
    command = [sys.executable, "-m", FIRST_LAUNCH, backend]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": LAUNCH_SECONDS}
    try:
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return f"no launch within {LAUNCH_SECONDS:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1] if lines else f"status {done.returncode}"


def unpack() -> None:
    """Puts Triton's kernels that were brought along where jobs look for them. Triton's lists of a
    kernel's files have absolute paths: those of where they lie now."""
    if not PACKED.exists() or UNPACKED.is_dir():
        return
    with tarfile.open(PACKED) as file:
        file.extractall(UNPACKED, filter="data")
    for listing in UNPACKED.glob("*/__grp__*.json"):
        found = json.loads(listing.read_text())
        paths = {name: str(listing.parent / name) for name in found["child_paths"]}
        listing.write_text(json.dumps({**found, "child_paths": paths}))


def take_along() -> None:
    """Puts the module that was brought along in its place."""
    (module,) = BUNDLE.glob("_C*.so")
    shutil.copy2(module, ROOT / "crrcd_ext" / module.name)


def build(architecture: str, timeout: float) -> str | None:
    """Builds for this GPU with all cores; why that failed, or None."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "there is no nvcc to build with (set CUDA_HOME, or bring a module: make gpu-bundle)"
    environment = os.environ | {
        "CRRCD_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": architecture,
        "MAX_JOBS": str(os.cpu_count()),
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"the build took more than {timeout:.0f} s"
    print(done.stdout + done.stderr, flush=True)
    emit(kind="build", architecture=architecture, s=round(time.monotonic() - began, 1))
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()
        wrong = [line for line in lines if "error" in line.lower()] or lines[-1:]
        return f"the build failed: {wrong[0] if wrong else done.returncode}"
    return None


def find_cuda(architecture: str, seconds: float) -> tuple[str | None, str]:
    """Why there is no module with CUDA kernels that run here, or None; and where it came from.

    ``seconds``: for a build. What can be launched is not built anew, however wrong it is."""
    reasons = []
    if any((ROOT / "crrcd_ext").glob("_C*.so")):
        why = launches("cuda")
        if why is None or not UNFIT.search(why):
            return why, "was here"
        reasons.append(f"the module that is here: {why}")
    why = mismatch(MANIFEST, architecture)
    if why is None:
        take_along()
        why = launches("cuda")
        if why is None or not UNFIT.search(why):
            return why, "brought along"
    reasons.append(why)
    why = build(architecture, seconds) or launches("cuda")
    return (None, "built now") if why is None else ("; ".join([*reasons, why]), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["cuda", "triton"], default="cuda")
    parser.add_argument("--seconds", type=float, default=90.0, help="for a build")
    options = parser.parse_args()
    began = time.monotonic()
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    if options.backend == "cuda":
        why, origin = find_cuda(architecture, options.seconds)
        command = f"CRRCD_CUDA=1 TORCH_CUDA_ARCH_LIST={architecture} {sys.executable} setup.py"
        command += " build_ext --inplace"
    else:
        why, origin = launches("triton"), ""
        command = f"{sys.executable} -m {FIRST_LAUNCH} triton"
    row = {"kind": "backend", "backend": options.backend, "ok": why is None, "why": why or origin}
    emit(**row, s=round(time.monotonic() - began, 1), command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
