"""The Triton kernels for `python -m bench static --backend triton`: compiled ahead of time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from bench import ahead_of_time, sass, triton_calls
from bench.ahead_of_time import Compiled

HEADER = ["call", "kernel", "warps", "keys", "regs", "stack", "spill", "shared", "MMA"]
HEADER += ["cp.async", "TMA", "loop", "clocks a pair"]

NOTES = """\
Each kernel as the first of these calls launches it, at A = B = 64, 16,384 negatives, widths of 128.
keys: of a tile. regs: registers of a thread. stack: bytes of a thread's stack, which holds spilled
registers; spill: loads and stores of it. shared: bytes. MMA: tensor-core instructions; cp.async,
TMA: asynchronous copies to shared memory. All count what stands in the kernel, not what is run.
loop: instructions of the loop with the most tensor-core work, loops within it and every branch
once; clocks a pair: what a multiprocessor needs to issue them, for each key. Spills of AMD's GPUs
are registers, not instructions. traffic: megabytes of a call, a model in which each launch moves
each of its tensors once."""


@dataclass(frozen=True)
class Row:
    """What became of a kernel on one architecture."""

    arch: str
    call: str
    kernel: str
    warps: int
    keys: int | None
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: int
    async_copies: int
    bulk_copies: int
    instructions_of: str  # what kind of tensor-core instructions
    loop: int | None = None
    clocks_a_pair: float | None = None

    def cells(self) -> list[str]:
        numbers = [self.registers, self.stack, self.spills, self.shared, self.tensor_core]
        numbers += [self.async_copies, self.bulk_copies, self.loop]
        clocks = f"{self.clocks_a_pair:.1f}" if self.clocks_a_pair else ""
        shown = ["" if x is None else str(x) for x in (self.warps, self.keys, *numbers)]
        return [self.call, self.kernel, *shown, clocks]


_KINDS = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync"}


def _on_nvidia(compiled: Compiled, common: dict) -> Row:
    kernel = compiled.kernel()
    loop, keys = kernel.tile_loop, common["keys"]
    steps = sass.count(loop.code).instructions if loop else None
    return Row(
        **common,
        registers=kernel.resources.registers,
        stack=kernel.resources.stack + kernel.resources.local,
        spills=kernel.counts.local,
        tensor_core=kernel.counts.tensor_core,
        async_copies=kernel.counts.async_copy,
        bulk_copies=compiled.assembly.count("cp.async.bulk.tensor"),
        instructions_of=next((v for k, v in _KINDS.items() if k in compiled.assembly), ""),
        loop=steps,
        clocks_a_pair=steps * compiled.launch.warps / 4 / keys if steps and keys else None,
    )


def _on_amd(compiled: Compiled, common: dict) -> Row:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", compiled.assembly)[1])

    return Row(
        **common,
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        tensor_core=len(re.findall(r"^\s+v_mfma", compiled.assembly, re.MULTILINE)),
        async_copies=len(re.findall(r"_load_lds_| lds$", compiled.assembly, re.MULTILINE)),
        bulk_copies=0,
        instructions_of="mfma" if "v_mfma" in compiled.assembly else "",
    )


FIRST = 4
"""So many failures and nothing else: this Triton does not know the architecture."""
_PASSES = {0: "", 1: " (normaliser)", 2: ""}


def rows(arch: str, failures: list[str], wanted: str = "", kernels: str = "") -> Iterator[Row]:
    """Of the calls and kernels that these expressions find, each kernel once.

    What Triton says of those that it cannot compile is added to ``failures``.
    """
    seen, failed = set(), 0
    for call in triton_calls.calls():
        if not re.search(wanted, str(call)):
            continue
        for launch in ahead_of_time.record(arch, call.run):
            key = ahead_of_time.source(launch).hash(), *launch.options.items()
            if key in seen or not re.search(kernels, launch.name):
                continue
            seen.add(key)
            try:
                compiled = ahead_of_time.compiled(launch, arch)
            except RuntimeError as error:
                failures.append(f"{str(call).strip()}: {error}")
                failed += 1
                if failed == len(seen) == FIRST:
                    raise RuntimeError(
                        f"none of the first {FIRST} kernels is compiled: {error}"
                    ) from error
                continue
            common = {
                "arch": arch,
                "call": str(call).strip(),
                "kernel": launch.name + _PASSES[launch.constants.get("MODE", 0)],
                "warps": launch.warps,
                "keys": launch.constants.get("BN"),
                "shared": compiled.shared,
            }
            yield (_on_nvidia if arch.startswith("sm_") else _on_amd)(compiled, common)


def traffic(arch: str, wanted: str = "") -> dict[str, int]:
    """Bytes of each call, see ahead_of_time.traffic."""
    found = (call for call in triton_calls.calls() if re.search(wanted, str(call)))
    return {str(c).strip(): ahead_of_time.traffic(ahead_of_time.record(arch, c.run)) for c in found}


def document(
    found: Iterable[Row], failures: list[str], moved: dict[str, dict[str, int]]
) -> dict[str, object]:
    import triton

    kernels = [asdict(row) for row in found]
    about = {"triton": triton.__version__, "kernels": kernels, "failures": failures}
    return about | {"traffic": moved}
