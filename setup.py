"""Builds crrcd_ext._C. The rest of the package's metadata is in pyproject.toml.

CRRCD_COMPILED
             0: a package of Python alone, for any platform, without crrcd_ext._C: backends triton
             and reference
CRRCD_CUDA   auto (default): CUDA kernels where there is a toolkit for this torch; 0: a CPU build;
             1: fail where CUDA kernels cannot be built
TORCH_CUDA_ARCH_LIST
             the GPUs to build for (default: this machine's; where it has none, "8.0+PTX;9.0",
             which newer ones can run too; `make dist` names them all)
DEBUG        1: no optimisation, debug symbols
CRRCD_SANITIZE
             1: under AddressSanitizer and UBSan, for tests/sanitize.py, which builds and runs it
MAX_JOBS     parallel compilations (default: one per processor)
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

COMPILED = os.environ.get("CRRCD_COMPILED", "1")
if COMPILED not in ("0", "1"):
    sys.exit(f"crrcd_ext: CRRCD_COMPILED: expected 0 or 1, got {COMPILED!r}")
if COMPILED == "0" and os.environ.get("CRRCD_CUDA") == "1":
    sys.exit("crrcd_ext: CRRCD_CUDA=1 asks for compiled kernels, CRRCD_COMPILED=0 for none")

# torch takes the folder above the nvcc that it finds for the toolkit, where that may be a wrapper.
nvcc = shutil.which("nvcc")
header = Path("include") / "cuda_runtime_api.h"
usual = Path("/usr/local/cuda")
if nvcc and not (Path(nvcc).parents[1] / header).exists() and (usual / header).exists():
    os.environ.setdefault("CUDA_HOME", str(usual))

if COMPILED == "1":
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        sys.exit(
            "crrcd_ext: torch is needed to build: install it first, then "
            "`pip install --no-build-isolation .`"
        )

ROOT = Path(__file__).parent
DEBUG = os.environ.get("DEBUG", "0") == "1"
SANITIZE = os.environ.get("CRRCD_SANITIZE", "0") == "1"


def toolkit_version() -> str | None:
    """Of the toolkit in CUDA_HOME, as "13.0"; None where its nvcc does not run."""
    command = [os.path.join(CUDA_HOME, "bin", "nvcc"), "--version"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+\.\d+)", out)
    return found and found[1]


def without_cuda() -> str | None:
    """Why CUDA kernels cannot be built here, or None when they can."""
    of_torch = torch.version.cuda
    if of_torch is None:
        return f"torch {torch.__version__} is a CPU build"
    if CUDA_HOME is None:
        return "no CUDA toolkit was found (set CUDA_HOME)"
    toolkit = toolkit_version()
    if toolkit is None:
        return f"{CUDA_HOME} has no nvcc that runs (set CUDA_HOME)"
    major = of_torch.split(".")[0]
    if toolkit.split(".")[0] != major:
        return (
            f"torch {torch.__version__} was built with CUDA {of_torch}, and the toolkit in "
            f"{CUDA_HOME} is {toolkit} (set CUDA_HOME to one of CUDA {major})"
        )
    return None


def with_cuda() -> bool:
    """Whether CUDA kernels are built: what CRRCD_CUDA asks for and this machine can do."""
    wanted = os.environ.get("CRRCD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"crrcd_ext: CRRCD_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return False
    reason = without_cuda()
    if reason is None:
        return True
    if wanted == "1":
        sys.exit(f"crrcd_ext: CRRCD_CUDA=1, but {reason}")
    print(f"crrcd_ext: a build without CUDA kernels: {reason}", file=sys.stderr)
    return False


def compiler_version() -> str:
    command = os.environ.get("CXX", "c++")
    try:
        out = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(
            f"crrcd_ext: no C++ compiler: `{command}` does not run; install g++, set CXX, or do "
            "without compiled kernels: CRRCD_COMPILED=0"
        )
    return out.stdout.splitlines()[0]


def compiler_flags() -> tuple[list[str], list[str]]:
    """Of the C++ compiler and the linker."""
    # Python's own flags may ask for debug symbols, which double the time and the size
    flags = ["-O0", "-g"] if DEBUG else ["-O3", "-g0", "-DNDEBUG"]
    link_flags = ["-fopenmp"] if platform.system() == "Linux" else []
    if SANITIZE:
        link_flags += ["-fsanitize=address,undefined"]
        # vptr asks for type information that torch hides
        flags = ["-O1", "-g1", *link_flags[-1:], "-fno-sanitize-recover=undefined"]
        flags += ["-fno-sanitize=vptr", "-fno-omit-frame-pointer", "-fno-wrapv", "-UNDEBUG"]
    # contraction to fused multiply-add is wanted; no other relaxation of floating-point rules is
    flags += ["-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    if platform.system() == "Linux":
        flags.append("-fopenmp")
    return flags, link_flags


def sources(cuda: bool) -> list[str]:
    found = [p for p in (ROOT / "csrc").glob("**/*") if p.suffix in (".cpp", ".cu")]
    return sorted(str(p.relative_to(ROOT)) for p in found if cuda or p.parent.name != "cuda")


def compiled_module() -> dict[str, object]:
    """What setup has to know of crrcd_ext._C."""
    cuda = with_cuda()
    flags, link_flags = compiler_flags()
    compiler = compiler_version().replace('"', "")
    arguments = {"cxx": flags}
    if cuda:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0")
        arguments["nvcc"] = ["-O0", "-g", "-G"] if DEBUG else ["-O3", "-DNDEBUG"]
        arguments["nvcc"] += ["-std=c++20", "-Xcompiler=-fvisibility=hidden"]
    module = (CUDAExtension if cuda else CppExtension)(
        "crrcd_ext._C",
        sources(cuda),
        define_macros=[
            ("CRRCD_WITH_CUDA", str(int(cuda))),
            ("CRRCD_DEBUG", str(int(DEBUG))),
            ("CRRCD_COMPILER", f'"{compiler}"'),
            ("CRRCD_TORCH_VERSION", f'"{torch.__version__}"'),
        ],
        extra_compile_args=arguments,
        extra_link_args=link_flags,
    )
    build = BuildExtension.with_options(no_python_abi_suffix=False)
    return {"ext_modules": [module], "cmdclass": {"build_ext": build}}


setup(**(compiled_module() if COMPILED == "1" else {}))
