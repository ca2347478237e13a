"""Builds kernel files with g++ and the emulator into shared libraries that run them on the CPU.

`load` gives the package's own CUDA kernels (csrc/cuda) with their host entries, `load_kernels`
small files of the tests, without torch. Objects and libraries lie in build/simt, named by a hash of
everything that goes into them, so that a second call finds them ready.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = ROOT / "tests" / "simt"
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "simt"
EMULATOR = [HERE / "simt.cpp", HERE / "checker.cpp"]
GIGABYTES = 1.0  # that a compilation may take

SCHEDULES = ("forward", "reverse", "greedy", "random")

COMMON = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-DCRRCD_SIMT"]
COMMON += ["-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-attributes"]
# Kernels look at memory as other types, as on a GPU.
KERNEL = ["-x", "c++", "-O1", "-fno-strict-aliasing"]
# CRRCD_SIMT_SANITIZE=1: everything under AddressSanitizer and UBSan, for tests/sanitize.py. Their
# hooks exclude the checker's.
SANITIZE: list[str] = []
if os.environ.get("CRRCD_SIMT_SANITIZE", "0") == "1":
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    SANITIZE += ["-fno-sanitize=vptr", "-fno-omit-frame-pointer"]
CHECKED = ["-fsanitize=thread,alignment,bounds,shift"]
CHECKED += ["--param=tsan-instrument-func-entry-exit=0"]


class BuildError(RuntimeError):
    """The emulated kernels cannot be built; the message says what to install or mend."""


class Unavailable(BuildError):
    """This machine cannot build them, whatever the sources: another system, no g++."""


class ToolkitMissing(Unavailable):
    """No headers of a CUDA toolkit: a machine that cannot build the CUDA kernels either."""


def compiler() -> str:
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        raise Unavailable(f"the emulator is for Linux on x86-64, this is {platform.platform()}")
    command = os.environ.get("CXX", "g++")
    try:
        out = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise Unavailable(f"`{command}` does not run: install g++ or set CXX") from None
    if "Free Software Foundation" not in out.stdout:
        raise Unavailable(
            f"`{command}` is no g++, whose sanitizer hooks the checker needs: set CXX"
        )
    return command


@functools.cache
def toolkit_include() -> Path:
    """The folder of a CUDA toolkit's headers; nothing else of the toolkit is needed."""
    from torch.utils.cpp_extension import CUDA_HOME

    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    homes = [Path(CUDA_HOME)] if CUDA_HOME else []
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    folders = [home / "include" for home in homes] + sorted(packages.glob("cu*/include"))
    needed = ("cuda_bf16.h", "cuda_fp16.h", "vector_types.h", "crt/host_defines.h", "nv/target")
    for folder in folders:
        if all((folder / name).exists() for name in needed):
            return folder
    raise ToolkitMissing(
        f"no folder has the CUDA toolkit's headers ({', '.join(needed)}): install the toolkit and "
        f"set CUDA_HOME; looked in {', '.join(map(str, folders)) or 'no folder'}"
    )


class Job(NamedTuple):
    """A source to compile. What it includes from `folders` is known by the name `includes`."""

    source: Path
    flags: list[str]
    folders: tuple[str, ...] = ()
    includes: str = ""


def processes() -> int:
    """Compilations at a time: one for each processor, as far as the memory reaches."""
    memory = Path("/proc/meminfo").read_text()
    available = int(re.search(r"MemAvailable:\s*(\d+)", memory)[1]) / 2**20
    return max(1, min(len(os.sched_getaffinity(0)), int(available / GIGABYTES)))


@functools.cache
def tools() -> bytes:
    """What every object depends on besides its own sources: the compiler and the toolkit, wherever
    it lies."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout
    headers = sorted(toolkit_include().glob("cuda_*16.h*"))
    return b"\0".join([version, *(p.read_bytes() for p in headers)])


@functools.cache
def includes(source: Path) -> frozenset[Path]:
    """The project's headers that a file includes, directly or not."""
    found: set[Path] = set()
    for name in re.findall(r'^\s*#include "([^"]+)"', source.read_text(), re.MULTILINE):
        places = (folder / name for folder in (source.parent, HERE, CUDA.parent, CUDA))
        header = next((p.resolve() for p in places if p.exists()), None)
        if header is not None:
            found |= {header, *includes(header)}
    return frozenset(found)


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def run(command: list[str], target: Path) -> None:
    """Runs a command that writes to its last argument, and puts the file in place when whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    partial.replace(target)


def compile_object(job: Job) -> Path:
    own = [f"-I{folder}" for folder in (HERE, ROOT / "csrc", CUDA)]
    foreign = [x for folder in (toolkit_include(), *job.folders) for x in ("-isystem", str(folder))]
    flags = [*COMMON, *job.flags, *SANITIZE]
    sources = [job.source, *sorted(includes(job.source))]
    contents = [part for p in sources for part in (p.name.encode(), p.read_bytes())]
    key = digest(" ".join([compiler(), *flags, job.includes]).encode(), *contents, tools())
    target = BUILD / "objects" / f"{job.source.stem}-{key}.o"
    if not target.exists():
        run([compiler(), *flags, *own, *foreign, "-c", str(job.source)], target)
    return target


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Processes that want the same library build it once: the others wait."""
    import fcntl  # not on Windows, where there is no emulator

    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@one_at_a_time()
def link(name: str, jobs: list[Job], flags: Sequence[str] = ()) -> Path:
    """Compiles sources, each with its flags, and links them; nothing is done twice."""
    with ThreadPoolExecutor(processes()) as pool:
        objects = list(pool.map(compile_object, jobs))
    key = digest(" ".join(flags).encode(), *(o.name.encode() for o in objects))
    target = BUILD / f"{name}-{key}.so"
    if not target.exists():
        hidden = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,now"]
        run([compiler(), *hidden, *SANITIZE, *map(str, objects), *flags], target)
    return target


class Library:
    """Emulated kernels, loaded. Its entries return a message or nothing, see entry.h."""

    def __init__(self, path: Path, checked: bool) -> None:
        self.path, self.checked = path, checked
        self.handle = ctypes.CDLL(str(path))
        self.handle.simt_launched.restype = ctypes.c_char_p

    def configure(self, schedule: str = "forward", *, seed: int = 0, late: bool = False) -> None:
        """Order of the threads, seed of the random one, cp.async at once or at its wait."""
        number = SCHEDULES.index(schedule)
        self.handle.simt_configure(number, ctypes.c_uint64(seed), int(late))

    def watch(self, tensor: torch.Tensor, name: str, initialised: bool = True) -> None:
        """Tells the checker of memory that kernels may use, until `forget`."""
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor")
        address, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
        self.handle.simt_watch(address, size, name.encode(), int(initialised))

    def forget(self) -> None:
        self.handle.simt_forget()

    def watch_tensors(self, on: bool) -> None:
        """Makes new tensors in memory that the checker watches, the only one to be used; or not."""
        self.handle.simt_watch_tensors(int(on))

    def set_shared_bytes(self, count: int) -> None:
        """Shared memory that a block of the emulated GPU can ask for."""
        self.handle.simt_set_shared_bytes(ctypes.c_int64(count))

    def set_segment(self, keys: int) -> None:
        """Keys that relation_nce works off at a time; 0: as many as it likes."""
        self.handle.simt_set_segment(ctypes.c_int64(keys))

    def launched(self) -> list[str]:
        """Names of the kernels started since the last call, of many the latest."""
        return self.handle.simt_launched().decode().split()

    def call(self, entry: str, *arguments: torch.Tensor | int) -> None:
        """Calls an entry of entry.h; raises RuntimeError with what emulator or checker found."""
        function = getattr(self.handle, entry)
        function.restype = ctypes.c_char_p
        converted = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a)
            for a in arguments
        ]
        message = function(*converted)
        if message is not None:
            raise RuntimeError(message.decode())


def kernel_jobs(sources: Sequence[Path], checked: bool) -> list[Job]:
    """Of these objects any torch can make use."""
    jobs = [Job(source, KERNEL + (CHECKED if checked else [])) for source in sources]
    return jobs + [Job(source, ["-O3"]) for source in EMULATOR]


@functools.cache
def load_kernels(*sources: Path, checked: bool) -> Library:
    """Kernel files with entries of entry.h, without torch."""
    name = f"{sources[0].stem}-{'checked' if checked else 'plain'}"
    return Library(link(name, kernel_jobs(sources, checked), ["-Wl,-z,defs"]), checked)


def host_jobs(checked: bool) -> list[Job]:
    """The host entries of csrc/cuda and what they share with the other backends."""
    from torch.utils.cpp_extension import include_paths

    shared = [p for p in CUDA.parent.glob("*.cpp") if p.name != "register.cpp"]
    sources = [HERE / "binding.cpp", *sorted(CUDA.glob("*.cpp")), *sorted(shared)]
    library = ["-DCRRCD_SIMT_LIBRARY=" + ("crrcd_simt_checked" if checked else "crrcd_simt")]
    folders = tuple(include_paths())
    # the wheels of torch 2.6 have the strings of an older C++ library
    flags = ["-O1", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    return [
        Job(s, [*flags, *(library if s.parent == HERE else [])], folders, torch.__version__)
        for s in sources
    ]


@functools.cache
def load(checked: bool) -> Library:
    """The package's CUDA kernels and host entries, which register themselves when loaded."""
    from torch.utils.cpp_extension import library_paths

    kind = "checked" if checked else "plain"
    flags = []
    for folder in library_paths():
        flags += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    flags += ["-lc10", "-ltorch_cpu", "-ltorch"]
    # Host entries take longest: they come first.
    jobs = host_jobs(checked) + kernel_jobs(sorted(CUDA.glob("*.cu")), checked)
    return Library(link(f"crrcd-{kind}", jobs, flags), checked)


def diagnose(message: str) -> dict[str, str]:
    """The parts of a message of emulator or checker: kernel, where, block, thread, what."""
    pattern = r"simt: kernel (?P<kernel>\S+): (?P<where>.*?): block (?P<block>\(.*?\)), "
    found = re.match(pattern + r"thread (?P<thread>\(.*?\)): (?P<what>.*)", message, re.DOTALL)
    return found.groupdict() if found else {}
