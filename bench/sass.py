"""CUDA kernels of a compiled module as they are: resources, instructions, loops.

Read with cuobjdump, which comes with Triton's package and with a CUDA toolkit; no GPU is needed.
"""

from __future__ import annotations

import ctypes
import functools
import heapq
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class ToolMissing(RuntimeError):
    """No cuobjdump; the message says what to install."""


@functools.cache
def cuobjdump() -> Path:
    """The tool that reads compiled kernels."""
    found = importlib.util.find_spec("triton")
    if found is not None and found.origin is not None:
        tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.exists():
            return tool
    on_path = shutil.which("cuobjdump")
    if on_path is None:
        raise ToolMissing("cuobjdump is not there: pip install triton, or install a CUDA toolkit")
    return Path(on_path)


def _lines(module: Path, *options: str) -> Iterator[str]:
    command = [str(cuobjdump()), *options, str(module)]
    with tempfile.TemporaryFile("w+") as said:  # it warns of what nobody asked
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            yield from process.stdout
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(
                f"`{' '.join(command)}` ended with status {process.returncode}: {said.read()}"
            )


# ---------------------------------------------------------------------------------------------
# Names


def demangled(symbol: str) -> str:
    """A C++ name as it is written, by the C++ library that torch has loaded."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    memory = demangle(symbol.encode(), None, None, ctypes.byref(status))
    if status.value != 0:
        return symbol
    text = ctypes.string_at(memory).decode()
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    free(memory)
    return text


@functools.cache
def enumerators() -> dict[tuple[str, int], str]:
    """(enum, value) -> name, of the enums that kernels may have as template arguments."""
    names = {}
    for path in sorted((ROOT / "csrc").rglob("*.h")) + sorted((ROOT / "csrc").rglob("*.cuh")):
        for enum, body in re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", path.read_text()):
            value = 0
            for entry in re.sub(r"//.*", "", body).split(","):
                name, _, number = (part.strip() for part in entry.partition("="))
                if name:
                    value = int(number) if number else value
                    names[enum, value] = name
                    value += 1
    return names


def _split(text: str) -> list[str]:
    """Template arguments, at commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "<(") - (letter in ">)")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _readable(argument: str) -> str:
    enum = re.fullmatch(r"\((?:\w+::)*(\w+)\)(\d+)", argument)
    if enum:
        return enumerators().get((enum[1], int(enum[2])), argument)
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16")):
        argument = argument.replace(long, short)
    return re.sub(r"\w+::|\(anonymous namespace\)::", "", argument)


@dataclass(frozen=True)
class Name:
    """`kernel<types..., values...>` of a file of csrc/cuda."""

    kernel: str
    arguments: tuple[str, ...] = ()
    source: str = ""  # the file without its ending

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(a for a in self.arguments if not self._is_value(a))

    @property
    def variant(self) -> tuple[str, ...]:
        return tuple(a for a in self.arguments if self._is_value(a))

    @staticmethod
    def _is_value(argument: str) -> bool:
        known = argument in ("true", "false") or argument in enumerators().values()
        return known or re.fullmatch(r"-?\d+\w*", argument) is not None

    def __str__(self) -> str:
        return self.kernel + (f"<{', '.join(self.arguments)}>" if self.arguments else "")


def name_of(symbol: str) -> Name:
    text = demangled(symbol).replace("(anonymous namespace)::", "")
    found = re.match(r"(?:void )?(?:\w+::)*(\w+)", text)
    if text == symbol or found is None:
        return Name(symbol)
    arguments = ""
    if text[found.end() :].startswith("<"):
        depth = 0
        for place in range(found.end(), len(text)):
            depth += (text[place] == "<") - (text[place] == ">")
            if depth == 0:
                arguments = text[found.end() + 1 : place]
                break
    # nvcc names the anonymous namespace after the file.
    source = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]{8}", symbol)
    return Name(found[1], tuple(map(_readable, _split(arguments))), source[1] if source else "")


# ---------------------------------------------------------------------------------------------
# Resources

SYSTEM_SHARED = 1024  # bytes of shared memory of each block


def generation(arch: str) -> int:
    """sm_90 -> 90, and so is sm_90a, which a build may name."""
    return int(re.search(r"\d+", arch)[0])


@dataclass(frozen=True)
class Resources:
    """What one block or thread takes; `max_threads` is None where the source does not limit it."""

    registers: int
    stack: int
    local: int
    shared: int
    max_threads: int | None = None


def parse_resources(lines: Iterable[str], arch: str = "") -> dict[tuple[str, str], Resources]:
    """(architecture, symbol) -> Resources, from --dump-resource-usage; ``arch`` is that of a file
    for one architecture, where no line says it."""
    found, symbol = {}, ""
    for line in lines:
        words = line.split()
        if line.startswith("arch ="):
            arch = words[-1]
        elif words[:1] == ["Function"]:
            symbol = words[1].rstrip(":")
        elif words[:1] and words[0].startswith("REG:"):
            use = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            # From sm_90 on what the system keeps of every block is counted in, but for kernels
            # without any in a file without dynamic shared memory.
            system = SYSTEM_SHARED if generation(arch) >= 90 else 0
            shared = max(use["SHARED"] - system, 0)
            found[arch, symbol] = Resources(use["REG"], use["STACK"], use["LOCAL"], shared)
    return found


def parse_max_threads(lines: Iterable[str], arch: str = "") -> dict[tuple[str, str], int]:
    """(architecture, symbol) -> threads of __launch_bounds__, from -elf."""
    found, symbol, wanted = {}, "", False
    for line in lines:
        if line.startswith("arch ="):
            arch = line.split()[-1]
        elif line.startswith(".nv.info."):
            symbol = line.strip()[len(".nv.info.") :]
        elif "Attribute:" in line:
            wanted = line.split()[-1] in ("EIATTR_MAX_THREADS", "EIATTR_REQNTID")
        elif wanted and "Value:" in line:
            x, y, z = (int(word, 16) for word in line.split()[1:4])
            found[arch, symbol] = x * y * z
            wanted = False
    return found


# ---------------------------------------------------------------------------------------------
# Instructions

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: LDG.E.128
    operands: str = ""
    predicate: str = ""

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes. A loop may be left by a call under a predicate that never returns;
        other calls come back to what follows them."""
        jumps = self.base in ("BRA", "JMP") or (self.base == "CALL" and self.predicate)
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if jumps and found else None

    @property
    def conditional(self) -> bool:
        """Whether what follows can be reached too: a predicate in front or among the operands."""
        return bool(self.predicate) or "," in self.operands


def parse_sass(
    lines: Iterable[str], arch: str = ""
) -> Iterator[tuple[str, str, list[Instruction]]]:
    """(architecture, symbol, instructions) of each kernel, from -sass."""
    symbol, code = "", []
    for line in lines:
        instruction = _INSTRUCTION.match(line)
        if instruction:
            address, predicate, opcode, operands = instruction.groups()
            code.append(Instruction(int(address, 16), opcode, operands.strip(), predicate or ""))
            continue
        starts = "Function :" in line
        if (starts or line.startswith("arch =")) and code:
            yield arch, symbol, code
            code = []
        if starts:
            symbol = line.split()[-1]
        elif line.startswith("arch ="):
            arch = line.split()[-1]
    if code:
        yield arch, symbol, code


def is_tensor_core(instruction: Instruction) -> bool:
    # HFMA2.MMA is arithmetic on halves.
    return instruction.base.endswith("MMA")


def is_multiply_add(instruction: Instruction) -> bool:
    return instruction.base in ("FFMA", "FFMA2", "DFMA")


def tensor_operations(instruction: Instruction) -> int:
    """Multiplications and additions of a tensor-core instruction, from the shape in its name."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.opcode)
    if shape:  # HGMMA: by four warps
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) // 4
    packed = re.search(r"MMA\.(?:SP\.)?(\d+)", instruction.opcode)
    if packed is None or len(packed[1]) < 3:
        return 0
    digits = packed[1]  # 16816 is 16 x 8 x 16, 884 is 8 x 8 x 4
    m = 16 if digits.startswith("16") else 8
    n, k = digits[len(str(m))], digits[len(str(m)) + 1 :]
    return 2 * m * int(n) * int(k)


def width(instruction: Instruction) -> int:
    """Bits that a load or store moves for each thread."""
    found = re.search(r"\.[US]?(8|16|64|128|256)\b", instruction.opcode)
    return int(found[1]) if found else 32


SHARED_BYTES = 128  # that shared memory moves, a clock and multiprocessor


def shared_clocks(instruction: Instruction) -> int:
    """Clocks for which a warp's instruction has a multiprocessor's shared memory to itself: what
    its lanes move by width, as if no two of them had the same address and none the same bank. Less
    than 128 bytes take a clock too."""
    if instruction.base == "LDSM":  # 8 x 8 matrices of two-byte elements
        matrices = re.search(r"\.M[MT]?88\.(\d)", instruction.opcode)
        return 128 * int(matrices[1] if matrices else 1) // SHARED_BYTES
    if instruction.base in ("LDS", "STS", "LDGSTS"):
        return max(32 * width(instruction) // 8 // SHARED_BYTES, 1)
    return 0


@dataclass
class Counts:
    """How often each kind of instruction stands in some code."""

    instructions: int = 0
    tensor_core: int = 0
    tensor_operations: int = 0  # of one warp
    ldmatrix: int = 0
    async_copy: int = 0
    shared_clocks: int = 0  # of one warp, see shared_clocks
    multiply_add: int = 0
    special: int = 0
    barrier: int = 0
    atomic: int = 0
    local: int = 0  # loads and stores of a thread's own memory: spills, arrays
    global_loads: dict[int, int] = field(default_factory=dict)  # bits -> count
    global_stores: dict[int, int] = field(default_factory=dict)
    shared_loads: dict[int, int] = field(default_factory=dict)
    shared_stores: dict[int, int] = field(default_factory=dict)


def count(code: Iterable[Instruction]) -> Counts:
    bases, widths = Counter(), {base: Counter() for base in ("LDG", "STG", "LDS", "STS")}
    found = Counts()
    for instruction in code:
        base = instruction.base
        bases[base] += 1
        found.instructions += base != "NOP"
        found.tensor_core += is_tensor_core(instruction)
        found.tensor_operations += tensor_operations(instruction)
        found.multiply_add += is_multiply_add(instruction)
        found.shared_clocks += shared_clocks(instruction)
        if base in widths:
            widths[base][width(instruction)] += 1
    found.ldmatrix = bases["LDSM"]
    found.async_copy = bases["LDGSTS"]
    found.special = bases["MUFU"]
    found.barrier = bases["BAR"]
    found.atomic = sum(bases[base] for base in ("RED", "REDG", "ATOM", "ATOMG", "ATOMS"))
    found.local = bases["LDL"] + bases["STL"]
    found.global_loads, found.global_stores, found.shared_loads, found.shared_stores = (
        dict(sorted(widths[base].items())) for base in ("LDG", "STG", "LDS", "STS")
    )
    return found


# ---------------------------------------------------------------------------------------------
# Loops


@dataclass
class Loop:
    """A natural loop: its head, which every way into it passes, and all that leads back there."""

    head: int  # address
    code: list[Instruction]
    depth: int  # loops around it
    contains: int  # loops within it
    own: Counts  # of what is in no loop within it


_LEAVE = ("EXIT", "RET", "BRA", "JMP", "BRX", "JMX", "BPT")


def _blocks(code: list[Instruction]) -> list[list[Instruction]]:
    """Runs of instructions that are entered at the first and left at the last only."""
    starts = {code[0].address}
    for this, after in zip(code, [*code[1:], None], strict=True):
        if this.target is not None:
            starts.add(this.target)
        if (this.target is not None or this.base in _LEAVE) and after is not None:
            starts.add(after.address)
    blocks: list[list[Instruction]] = []
    for instruction in code:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    return blocks


def _successors(blocks: list[list[Instruction]]) -> list[list[int]]:
    at = {block[0].address: number for number, block in enumerate(blocks)}
    after = []
    for number, block in enumerate(blocks):
        last, follow = block[-1], []
        if last.target in at:
            follow.append(at[last.target])
        if (last.base not in _LEAVE or last.conditional) and number + 1 < len(blocks):
            follow.append(number + 1)
        after.append(follow)
    return after


def _dominators(after: list[list[int]], roots: Iterable[int]) -> dict[int, int]:
    """Block -> the last block that every way to it passes; roots have the virtual block -1."""
    order, seen = [], set()
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(after[root]))]
        while stack:
            block, rest = stack[-1]
            following = next((s for s in rest if s not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(after[following])))
    place = {block: number for number, block in enumerate(order)} | {-1: len(order)}
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in after[block]:
            before[following].append(block)
    for root in roots:
        before[root].append(-1)
    parent: dict[int, int] = {-1: -1}
    changed = True
    while changed:
        changed = False
        for block in reversed(order):
            common = None
            for other in before[block]:
                if other not in parent:
                    continue
                if common is None:
                    common = other
                while common != other:
                    if place[common] < place[other]:
                        common = parent[common]
                    else:
                        other = parent[other]
            if parent.get(block) != common:
                parent[block] = common
                changed = True
    return parent


def loops(code: list[Instruction]) -> list[Loop]:
    """All natural loops. Code that is jumped to and comes back is none, wherever it stands."""
    blocks = _blocks(code)
    after = _successors(blocks)
    reached = {s for number, follow in enumerate(after) for s in follow if s != number}
    # Subroutines, and whatever an indirect branch leads to, have no visible way to them.
    parent = _dominators(after, [n for n in range(len(blocks)) if n == 0 or n not in reached])

    def dominates(head: int, block: int) -> bool:
        while block != head and block != -1:
            block = parent.get(block, -1)
        return block == head

    before: list[list[int]] = [[] for _ in blocks]
    for number, follow in enumerate(after):
        for following in follow:
            before[following].append(number)
    bodies: dict[int, set[int]] = {}
    for number, follow in enumerate(after):
        for head in follow:
            # The branch to itself that ends a kernel's code is none.
            endless = head == number and len(blocks[number]) == 1
            if endless or not dominates(head, number):
                continue
            body = bodies.setdefault(head, {head})
            queue = [number]
            while queue:
                block = queue.pop()
                if block not in body:
                    body.add(block)
                    queue += before[block]
    found = []
    for head, body in bodies.items():
        within = [other for h, other in bodies.items() if h != head and h in body]
        around = [h for h, other in bodies.items() if h != head and head in other]
        nested = set().union(*within)
        found.append(
            Loop(
                blocks[head][0].address,
                [i for number in sorted(body) for i in blocks[number]],
                len(around),
                len(within),
                count(i for number in body - nested for i in blocks[number]),
            )
        )
    return found


def main_loop(found: Iterable[Loop]) -> Loop | None:
    """The loop with the most tensor-core work of its own; where none has any, the innermost one
    with the most multiply-adds."""

    def heat(loop: Loop) -> tuple:
        return loop.own.tensor_operations, loop.contains == 0, loop.own.multiply_add, loop.depth

    return max(found, key=heat, default=None)


def tile_loop(found: Iterable[Loop]) -> Loop | None:
    """The outermost loop with the most tensor-core work, that of the loops within it included, or
    with the most such instructions, where they do not say how large they are."""

    def heat(loop: Loop) -> tuple:
        counts = count(loop.code)
        return counts.tensor_operations, counts.tensor_core, -loop.depth

    return max(found, key=heat, default=None)


def inner_loop(found: Iterable[Loop], outer: Loop | None) -> Loop | None:
    """The longest loop within another."""
    inside = {i.address for i in outer.code} if outer else set()
    within = [loop for loop in found if loop is not outer and loop.head in inside]
    return max(within, key=lambda loop: len(loop.code), default=None)


def special_loop(found: Iterable[Loop]) -> Loop | None:
    """The innermost loop with the most special functions."""
    innermost = [loop for loop in found if not loop.contains]
    return max(innermost, key=lambda loop: loop.own.special, default=None)


def _total(counts: Counts, name: str) -> int:
    value = getattr(counts, name)
    return sum(value.values()) if isinstance(value, dict) else value


def turn(loop: Loop, stops: Sequence[Mapping[str, int]]) -> Counts | None:
    """What one turn of the loop issues that passes, in this order, blocks with at least these
    counts: the shortest such way from the loop's head back to it; None where there is none."""
    blocks = _blocks(loop.code)
    after, head = _successors(blocks), 0
    for number, block in enumerate(blocks):
        if block[0].address == loop.head:
            head = number
        if number + 1 not in after[number]:
            continue
        to = blocks[number + 1][0].address
        if to != block[-1].target and to > block[-1].address + 16:
            after[number].remove(number + 1)  # what follows in the kernel is not of the loop
    counts = [count(block) for block in blocks]

    def passed(number: int, reached: int) -> int:
        if reached == len(stops):
            return reached
        return reached + all(
            _total(counts[number], name) >= least for name, least in stops[reached].items()
        )

    start = (head, passed(head, 0))
    queue = [(counts[head].instructions, start)]
    before: dict[tuple[int, int], tuple[int, int] | None] = {start: None}
    length, done = {start: counts[head].instructions}, set()
    while queue:
        so_far, state = heapq.heappop(queue)
        if state in done:
            continue
        done.add(state)
        number, reached = state
        if head in after[number] and reached == len(stops):
            way, at = [], state
            while at is not None:
                way.append(at[0])
                at = before[at]
            return count(i for n in way for i in blocks[n])
        for following in after[number]:
            if following == head:
                continue
            to = (following, passed(following, reached))
            cost = so_far + counts[following].instructions
            if cost < length.get(to, cost + 1):
                length[to], before[to] = cost, state
                heapq.heappush(queue, (cost, to))
    return None


# ---------------------------------------------------------------------------------------------
# Kernels


@dataclass
class Kernel:
    """One kernel of one architecture."""

    arch: str
    symbol: str
    name: Name
    resources: Resources
    counts: Counts
    loop: Counts | None  # all of the main loop, loops within it once
    loop_contains: int = 0
    tile_loop: Loop | None = None
    inner_loop: Loop | None = None  # of the tile loop
    special_loop: Counts | None = None


def architectures(module: Path) -> list[str]:
    return sorted({arch for arch, _ in resources(module)}, key=generation)


def resources(module: Path) -> dict[tuple[str, str], Resources]:
    return parse_resources(_lines(module, "--dump-resource-usage"))


def _kernel(arch: str, symbol: str, code: list[Instruction], use: Resources) -> Kernel:
    found = loops(code)
    loop, tiles, special = main_loop(found), tile_loop(found), special_loop(found)
    return Kernel(
        arch,
        symbol,
        name_of(symbol),
        use,
        count(code),
        count(loop.code) if loop else None,
        loop.contains if loop else 0,
        tiles,
        inner_loop(found, tiles),
        special.own if special else None,
    )


def kernels(module: Path, archs: Iterable[str], pattern: str = "") -> list[Kernel]:
    """The kernels of these architectures whose readable name the expression `pattern` finds."""
    use = resources(module)
    found = []
    for wanted in archs:
        threads = parse_max_threads(_lines(module, "-elf", "-arch", wanted))
        for arch, symbol, code in parse_sass(_lines(module, "-sass", "-arch", wanted)):
            name = name_of(symbol)
            if re.search(pattern, f"{name.source} {name}"):
                limit = threads.get((arch, symbol))
                whole = replace(use[arch, symbol], max_threads=limit)
                found.append(_kernel(arch, symbol, code, whole))
    return found


def only_kernel(binary: Path, arch: str) -> Kernel:
    """The kernel of a file that has one, for one architecture."""
    use = parse_resources(_lines(binary, "--dump-resource-usage"), arch)
    threads = parse_max_threads(_lines(binary, "-elf"), arch)
    ((arch, symbol, code),) = parse_sass(_lines(binary, "-sass"), arch)
    limit = threads.get((arch, symbol))
    return _kernel(arch, symbol, code, replace(use[arch, symbol], max_threads=limit))
