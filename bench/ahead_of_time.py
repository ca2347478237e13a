"""The Triton kernels of a call, compiled for GPUs that need not be here.

The host code runs on the CPU with launches recorded instead of made; each is then compiled as
Triton would compile it on the GPU in question. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bench import sass

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
"""Of the A100, H100, B200, RTX PRO 6000 (less a few) and MI300X."""


@dataclass(frozen=True)
class Launch:
    """A kernel as one call launches it."""

    kernel: object  # a triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple  # tensors, numbers, None
    constants: dict
    options: dict

    @property
    def warps(self) -> int:
        return self.options["num_warps"]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass
class Compiled:
    """What became of a launch."""

    launch: Launch
    arch: str
    shared: int  # bytes
    assembly: str
    binary: bytes = field(repr=False)

    def kernel(self) -> sass.Kernel:
        """Registers, stack, instructions and the main loop, of NVIDIA's binaries."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{self.launch.name}.cubin"
            path.write_bytes(self.binary)
            return sass.only_kernel(path, self.arch)


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Launches of the operators' host functions, called with tensors on the CPU, as on ``arch``."""
    from crrcd_ext.triton import INTERPRETED, launch

    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    launches: list[Launch] = []

    def run(kernel, grid, chosen, *arguments, **constants) -> None:
        if 0 not in grid:
            launches.append(Launch(kernel, grid, arguments, constants, launch.options(chosen)))

    hip = None if arch.startswith("sm_") else "ahead of time"
    with (
        mock.patch.object(launch, "run", run),
        mock.patch.object(launch, "architecture", lambda _: arch),
        mock.patch.object(launch, "multiprocessors", lambda _: MULTIPROCESSORS[arch]),
        mock.patch.object(torch.version, "hip", hip),
    ):
        yield launches


def record(arch: str, call: Callable[[], object]) -> list[Launch]:
    with recording(arch) as launches:
        call()
    return launches


def traffic(launches: list[Launch]) -> int:
    """Bytes between the kernels and device memory if each launch moves each of its tensors once:
    what several programs of one read comes from the cache. Copies and sums by torch are left out.
    """
    total = 0
    for launch in launches:
        tensors = [x for x in launch.arguments if isinstance(x, Tensor)]
        total += sum({x.untyped_storage().data_ptr(): x.nbytes for x in tensors}.values())
    return total


_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


def source(launch: Launch):
    """What Triton compiles: types of the arguments, those that divide by 16, constants."""
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature, constants, attributes = {}, dict(launch.constants), {}
    for place, (name, x) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(x, Tensor):
            signature[name] = _POINTERS[x.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        elif isinstance(x, float):
            signature[name] = "fp32"
        elif x is None or x == 1:
            signature[name], constants[name] = "constexpr", x
        else:
            signature[name] = "i32" if abs(x) < 2**31 else "i64"
            if x % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    for name in names[len(launch.arguments) :]:
        signature[name] = "constexpr"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compiled(launch: Launch, arch: str) -> Compiled:
    """Raises what Triton raises where it cannot compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch[3:]), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    try:
        result = triton.compile(source(launch), target=target, options=launch.options)
    except Exception as error:
        raise RuntimeError(f"{arch}: {launch.name}: {launch.constants}: {error}") from error
    binary = "cubin" if arch.startswith("sm_") else "hsaco"
    assembly = "ptx" if arch.startswith("sm_") else "amdgcn"
    return Compiled(launch, arch, result.metadata.shared, result.asm[assembly], result.asm[binary])
