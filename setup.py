"""Builds crrcd_ext._C. The rest of the package's metadata is in pyproject.toml.

CRRCD_CUDA   auto (default): CUDA kernels where the build has their sources and a toolkit; 0: a CPU
             build; 1: fail where CUDA kernels cannot be built
DEBUG        1: no optimisation, debug symbols
MAX_JOBS     parallel compilations (default: one per processor)
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "crrcd_ext: torch is needed to build: install it first, then "
        "`pip install --no-build-isolation .`"
    )

ROOT = Path(__file__).parent
DEBUG = os.environ.get("DEBUG", "0") == "1"


def with_cuda() -> bool:
    """Whether CUDA kernels are built: what CRRCD_CUDA asks for and this machine can do."""
    wanted = os.environ.get("CRRCD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"crrcd_ext: CRRCD_CUDA: expected auto, 0 or 1, got {wanted!r}")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    lacking = [
        reason
        for absent, reason in (
            (not sources, "this release has no CUDA kernels"),
            (CUDA_HOME is None, "no CUDA toolkit was found (set CUDA_HOME)"),
            (torch.version.cuda is None, f"torch {torch.__version__} is a CPU build"),
        )
        if absent
    ]
    if wanted == "1" and lacking:
        sys.exit(f"crrcd_ext: CRRCD_CUDA=1, but {'; '.join(lacking)}")
    return wanted != "0" and not lacking


def compiler_version() -> str:
    command = os.environ.get("CXX", "c++")
    try:
        out = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"crrcd_ext: no C++ compiler: `{command}` does not run; install g++ or set CXX")
    return out.stdout.splitlines()[0]


cuda = with_cuda()
flags = ["-O0", "-g"] if DEBUG else ["-O3", "-DNDEBUG"]
# contraction to fused multiply-add is wanted; no other relaxation of floating-point rules is
flags += ["-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden"]
flags += ["-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
if platform.system() == "Linux":
    flags.append("-fopenmp")
compiler = compiler_version().replace('"', "")

setup(
    ext_modules=[
        CppExtension(
            "crrcd_ext._C",
            sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.cpp")),
            define_macros=[
                ("CRRCD_WITH_CUDA", str(int(cuda))),
                ("CRRCD_DEBUG", str(int(DEBUG))),
                ("CRRCD_COMPILER", f'"{compiler}"'),
                ("CRRCD_TORCH_VERSION", f'"{torch.__version__}"'),
            ],
            extra_compile_args=flags,
            extra_link_args=["-fopenmp"] if platform.system() == "Linux" else [],
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
)
