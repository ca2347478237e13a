"""What a machine with a GPU need not build: the compiled module, and kernels in Triton's cache.

    python -m bench.gpu_check.bundle --architecture 9.0

started with the Python, torch and Triton of that machine (`make gpu-bundle` makes an environment of
them) leaves both in build/gpu_bundle, which is all that has to be carried there beside the sources.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from bench.gpu_check import module
from bench.gpu_check.stage import ROOT

OBJECTS = ROOT / "build" / "gpu_bundle_objects"
CACHE = ROOT / "build" / "gpu_bundle_triton"
MOST_MEGABYTES = 45


def build(architecture: str) -> None:
    environment = os.environ | {"CRRCD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    places = ["--build-lib", str(OBJECTS / "lib"), "--build-temp", str(OBJECTS)]
    command = [sys.executable, "setup.py", "-q", "build_ext", *places]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (made,) = (OBJECTS / "lib").glob("**/_C*.so")
    target = module.BUNDLE / made.name
    shutil.copy2(made, target)
    subprocess.run(["strip", "--strip-unneeded", str(target)], check=True)


def warm(architecture: str) -> None:
    for folder in (CACHE, module.UNPACKED):
        shutil.rmtree(folder, ignore_errors=True)
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(CACHE),
        "TRITON_STORE_BINARY_ONLY": "1",
        "TRITON_INTERPRET": "0",
    }
    arch = "sm_" + architecture.replace(".", "")
    command = [sys.executable, "-m", "bench.gpu_check.warm", "--arch", arch]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    with tarfile.open(module.PACKED, "w:xz") as file:
        file.add(CACHE, ".", filter=lambda m: None if m.name.endswith("lock") else m)


def megabytes(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.glob("**/*") if p.is_file()) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="9.0", help="compute capability of the GPU")
    options = parser.parse_args()
    shutil.rmtree(module.BUNDLE, ignore_errors=True)
    module.BUNDLE.mkdir(parents=True)
    build(options.architecture)
    warm(options.architecture)
    manifest = json.dumps(module.described(options.architecture), indent=1)
    module.MANIFEST.write_text(manifest + "\n")
    size = megabytes(module.BUNDLE)
    print(f"{module.BUNDLE.relative_to(ROOT)}: {size:.1f} MB, for {manifest}")
    if size > MOST_MEGABYTES:
        raise RuntimeError(f"the bundle has {size:.1f} MB, more than {MOST_MEGABYTES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
