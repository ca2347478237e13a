"""How kernels are launched: blocks, warps, types of the computation, slices of the work."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from crrcd_ext._schema import wide_dtype
from crrcd_ext.triton import INTERPRETED
from crrcd_ext.triton.configs import Config, choose, place

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Precision(NamedTuple):
    """Types of a computation, as its kernels take them."""

    operands: torch.dtype
    products: str
    """Of float32 operands: "ieee", or "tf32" where torch's setting allows it."""

    @property
    def name(self) -> str:
        """The row of the table of configurations."""
        if self.operands == torch.float32 and self.products == "tf32":
            return "tf32"
        return str(self.operands).removeprefix("torch.")

    @property
    def tensor_cores(self) -> bool:
        return self.name in ("tf32", "bfloat16", "float16")

    @property
    def constants(self) -> dict:
        wide = wide_dtype(self.operands)
        return {
            "DTYPE": TYPES[self.operands],
            "WIDE": TYPES[wide],
            "PRECISION": self.products,
        }

    @property
    def fast(self) -> bool:
        """Whether float32 may use the approximate instructions of NVIDIA's GPUs."""
        return self.operands != torch.float64 and torch.version.hip is None and not INTERPRETED


def precision(dtype: torch.dtype) -> Precision:
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return Precision(dtype, "ieee" if exact else "tf32")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and so on, "gfx942" and so on, or "interpreter"."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def config(kernel: str, types: Precision, device: torch.device, *sizes: int) -> Config:
    """``sizes``: queries, and the widest row that the kernel has to do with."""
    return choose(place(kernel, types.name, *sizes), architecture(device))


def block(size: int, most: int) -> int:
    """A power of two from 16, which products need, to ``most``."""
    return min(max(16, 1 << max(size - 1, 0).bit_length()), most)


def blocks(size: int, of: int) -> int:
    return max(1, -(-size // of))


def options(chosen: Config) -> dict:
    """How Triton is to compile a kernel."""
    found = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    if chosen.registers and torch.version.hip is None and not INTERPRETED:
        found["maxnreg"] = chosen.registers
    return found


LAUNCHED: list | None = None
"""The compiled kernels of launches, while something listens."""


MOST = 65535
"""Programs that a grid can have in its second and third direction."""


def run(kernel, grid: tuple, chosen: Config, *arguments, **constants) -> None:
    """Launches on the current stream of the arguments' device; an empty grid is no launch."""
    if 0 in grid:
        return
    if max(grid[1:], default=0) > MOST:
        raise ValueError(
            f"crrcd_ext: kernel {kernel.__name__}: expected sizes whose blocks fit this GPU's grid "
            f"(up to {MOST} in its second and third direction), got {grid}; choose backend 'cuda'"
        )
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(kernel, grid, chosen, *arguments, **constants)
    made = kernel[grid](*arguments, **constants, **options(chosen))
    if LAUNCHED is not None:
        LAUNCHED.append(made)
    return None
