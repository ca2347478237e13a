"""The emulator does what a GPU does, and the checker finds every planted bug in every schedule."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import emulated
from simt import build

if emulated.missing is not None:
    pytest.skip(f"no emulation: {emulated.missing}", allow_module_level=True)

KERNELS = Path(__file__).parent / "simt" / "kernels"
MODES = list(itertools.product(build.SCHEDULES, (False, True)))
MODE_NAMES = [f"{schedule}-{'late' if late else 'early'}" for schedule, late in MODES]


@pytest.fixture(params=[False, True], ids=["plain", "checked"])
def emulator(request):
    library = build.load_kernels(KERNELS / "selftest.cu", checked=request.param)
    yield library
    library.forget()
    library.configure()


@pytest.fixture(params=MODES, ids=MODE_NAMES)
def in_every_mode(request, emulator):
    schedule, late = request.param
    emulator.configure(schedule, seed=3, late=late)
    return emulator


@pytest.fixture(scope="module")
def planted():
    library = build.load_kernels(KERNELS / "planted.cu", checked=True)
    yield library
    library.forget()
    library.configure()


def watched(library: build.Library, **tensors: torch.Tensor) -> list[torch.Tensor]:
    for name, tensor in tensors.items():
        library.watch(tensor, name)
    return list(tensors.values())


# ------------------------------------------------------------------------------------------------
# Warps


def test_words_of_a_warp(in_every_mode):
    value = torch.tensor([(7 * i) % 32 for i in range(32)], dtype=torch.int32)
    out = torch.full((15, 32), -99, dtype=torch.int32)
    in_every_mode.call("run_warp_words", *watched(in_every_mode, value=value, out=out))
    v, lane = value.tolist(), range(32)
    ballot = sum(1 << i for i in lane if v[i] % 3 == 0)
    signed = ballot - (1 << 32) if ballot >> 31 else ballot
    odd_above_16 = sum(1 << i for i in lane if i % 2 and i > 16)
    expected = [
        [v[(i + 5) % 32] for i in lane],
        [v[i // 8 * 8 + 1] for i in lane],
        [v[i - 3] if i >= 3 else v[i] for i in lane],
        [v[i - 3] if i % 16 >= 3 else v[i] for i in lane],
        [v[i + 7] if i + 7 < 32 else v[i] for i in lane],
        [v[i ^ 16] for i in lane],
        [signed] * 32,
        [1] * 32,
        [0] * 32,
        [sum(v)] * 32,
        [max(v)] * 32,
        [v[i].bit_count() for i in lane],
        [v[i ^ 2] if i % 2 == 0 else odd_above_16 - (1 << 32) for i in lane],
        [4 * v[31 - i] + 1 for i in lane],
        [v[i ^ 12] if i ^ 12 < i // 8 * 8 + 8 else v[i] for i in lane],
    ]
    assert out.tolist() == expected


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_block_sum(in_every_mode, threads):
    numbers = torch.arange(2000, dtype=torch.float32) % 17
    out = torch.full((3,), -1.0)
    tensors = watched(in_every_mode, numbers=numbers, out=out)
    in_every_mode.call("run_block_sum", *tensors, len(numbers), len(out), threads)
    block = (torch.arange(len(numbers)) // threads) % len(out)
    expected = torch.zeros(3).index_add_(0, block, numbers)
    assert out.tolist() == expected.tolist()


def test_last_block_adds_what_others_left(in_every_mode):
    numbers = torch.arange(5 * 32, dtype=torch.float32)
    parts, arrived, out = torch.empty(5), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    tensors = watched(in_every_mode, numbers=numbers, parts=parts, arrived=arrived, out=out)
    in_every_mode.call("run_last_block_sum", *tensors, 5)
    assert out.item() == numbers.sum().item()


def test_atomics(in_every_mode):
    value = (torch.arange(128, dtype=torch.int32) * 37) % 101
    ints = torch.tensor([0, -5, 5000, 7, 0], dtype=torch.int32)
    longs = torch.zeros(2, dtype=torch.int64)
    floats, doubles = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    tensors = watched(
        in_every_mode, value=value, ints=ints, longs=longs, floats=floats, doubles=doubles
    )
    in_every_mode.call("run_atomics", *tensors)
    total = value.sum().item()
    assert ints[:3].tolist() == [total, value.max().item(), value.min().item()]
    assert ints[3].item() in value.tolist() and ints[4].item() == 128
    assert longs.tolist() == [total, value.max().item()]
    assert floats.item() == doubles.item() == total


def test_indices_of_threads_and_blocks(emulator):
    out = torch.full((12 * 60,), -1, dtype=torch.int32)
    emulator.call("run_indices", *watched(emulator, out=out))
    expected = torch.arange(12)[:, None] * 1000 + torch.arange(60)
    assert torch.equal(out.view(12, 60).long(), expected)


# ------------------------------------------------------------------------------------------------
# Shared memory and cp.async


def test_shared_memory_starts_as_nan():
    library = build.load_kernels(KERNELS / "selftest.cu", checked=False)
    out = torch.zeros(100, dtype=torch.int32)
    library.call("run_shared_poison", out, 100)
    assert (out == -1).all()


@pytest.mark.parametrize("words", [1, 1000, 25 * 1024])
def test_dynamic_shared_memory_also_above_48_kilobytes(emulator, words):
    numbers = torch.arange(words, dtype=torch.int32)
    out = torch.zeros_like(numbers)
    emulator.call("run_reverse_in_shared", *watched(emulator, numbers=numbers, out=out), words)
    assert torch.equal(out, numbers.flip(0))


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_double_buffered_cp_async(in_every_mode, tiles):
    numbers = torch.arange(tiles * 128, dtype=torch.float32)
    out = torch.full((128,), -1.0)
    in_every_mode.call("run_async_sum", *watched(in_every_mode, numbers=numbers, out=out), tiles)
    expected = numbers.view(tiles, 128)[:-1].sum(0).flip(0)
    assert torch.equal(out, expected)


# ------------------------------------------------------------------------------------------------
# Tensor cores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [16, 128])
def test_matrix_product_by_ldmatrix_and_mma(in_every_mode, dtype, depth):
    generator = torch.Generator().manual_seed(depth)
    a, b = (torch.randn(64, depth, generator=generator).to(dtype) for _ in range(2))
    c = torch.full((64, 64), float("nan"))
    tensors = watched(in_every_mode, a=a, b=b, c=c)
    in_every_mode.call("run_matmul", *tensors, depth, int(dtype == torch.float16))
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


def test_transposing_ldmatrix(emulator):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    c = torch.full((16, 8), float("nan"))
    emulator.call("run_matmul_trans", *watched(emulator, a=a, b=b, c=c))
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Nearest, ties away from zero: half of the last place kept is added to the magnitude."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_tf32_product(emulator):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.full((16, 8), float("nan"))
    emulator.call("run_matmul_tf32", *watched(emulator, a=a, b=b, c=c))
    rounded = to_tf32(a).double() @ to_tf32(b).double()
    torch.testing.assert_close(c.double(), rounded, rtol=1e-6, atol=1e-6)
    assert (c.double() - a.double() @ b.double()).abs().max() > 1e-5


def test_fast_functions(emulator):
    x = torch.tensor([0.25, 1.0, 3.5, 40.0])
    out = torch.empty(6, 4)
    emulator.call("run_fast_functions", *watched(emulator, x=x, out=out), 4)
    expected = torch.stack([x.exp2(), x.log2(), 1 / x, x.rsqrt(), x.log1p(), x])
    torch.testing.assert_close(out, expected)


# ------------------------------------------------------------------------------------------------
# What ends a launch


def test_stacks_hold_deep_calls_and_end_at_a_guard(emulator):
    out = torch.zeros(1, dtype=torch.int32)
    emulator.watch(out, "out")
    emulator.call("run_recurse", out, 100)
    assert out.item() != 0
    with pytest.raises(RuntimeError, match=r"kernel recurse: selftest\.cu:\d+.*stack overflow"):
        emulator.call("run_recurse", out, 100000)
    emulator.call("run_recurse", out, 100)  # and the next launch is none the worse


def test_an_invalid_address_ends_the_launch_alone():
    library = build.load_kernels(KERNELS / "selftest.cu", checked=False)
    # In a process of its own: a wild write could have met memory of this one.
    code = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]); from simt import build\n"
        "library = build.Library(pathlib.Path(sys.argv[2]), False)\n"
        "try: library.call('run_indices', 64)\n"
        "except RuntimeError as error: print(error)\n"
    )
    arguments = [sys.executable, "-c", code, str(KERNELS.parent.parent), str(library.path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert "kernel indices: selftest.cu:" in done.stdout, done
    assert "invalid address 0x40" in done.stdout


def test_trap_tells_its_message_and_thread(emulator):
    with pytest.raises(RuntimeError, match=r"thread \(33, 0, 0\): trap: id 12 is outside") as error:
        emulator.call("run_trap_at", 33)
    found = build.diagnose(str(error.value))
    assert found["kernel"] == "trap_at" and found["where"].startswith("selftest.cu:")


@pytest.mark.parametrize(
    ("threads", "shared", "message"),
    [(1025, 0, "expected 1 to 1024 threads"), (32, 300_000, "expected at most 232448 bytes")],
)
def test_launches_no_gpu_could_start(emulator, threads, shared, message):
    with pytest.raises(RuntimeError, match=message):
        emulator.call("run_too_much", threads, shared)


def test_launches_are_listed(emulator):
    emulator.launched()
    emulator.call("run_trap_at", -1)
    assert emulator.launched() == ["trap_at"]
    assert emulator.launched() == []


# ------------------------------------------------------------------------------------------------
# The checker. Each planted bug, what the report must say, and where: a piece of the line it names.

# A thread that is not waited for may not have run at all: then there is no value yet to race with.
RACE = r"(race: (read|write)|uninitialised: read) of a shared variable"
PLANTED = {
    "missing_barrier": (RACE, "tile["),
    "missing_end_of_loop_barrier": (RACE, "tile["),
    "race_between_warps": ("race: (read|write) of a shared variable", "tile["),
    "plain_read_beside_atomic": ("race: (read|atomic access) of a shared variable", "counter"),
    "async_wait_off_by_one": ("under a cp.async that was not waited for", "sum += buffer"),
    "async_without_barrier": (RACE, "tile["),
    "global_row_out_of_bounds": (
        r"out of bounds: read .* bytes behind .* `in`",
        "row",
    ),
    "shared_out_of_bounds": ("out of bounds: write .* behind the end of dynamic", "tile["),
    "array_out_of_bounds": ("out of bounds: index 64 of an array", "tile["),
    "divergent_barrier": ("divergent barrier: threads 0-31 in __syncthreads", "__syncthreads"),
    "missing_syncwarp": (RACE, "tile["),
    "missing_syncwarp_before_write": (RACE, "tile["),
    "missing_syncwarp_before_ldmatrix": (RACE, "ldmatrix"),
    "uninitialised_shared": ("uninitialised: read of a shared variable", "tile["),
    "uninitialised_global": ("uninitialised: read of `scratch`", "scratch["),
    "misaligned_vector": ("misaligned: .* no multiple of 16 bytes", "float4"),
    "blocks_write_the_same": (r"race: write of `out` \+ 0 bytes, .* by block", "out["),
    "accumulation_without_atomic": (r"race: read of `out` \+ 0 bytes, .* by block", "out[0] +="),
    "last_block_without_fence": ("race: read of `parts` .* after the write by block", "parts["),
    "shuffle_from_absent_lane": (r"shuffle from lane \d+, which does not take part", "__shfl"),
    "deadlock": (r"deadlock: .* in __syncthreads at .*; .* in a shuffle at", ""),
}


def call_planted(library: build.Library, name: str, bug: bool) -> None:
    library.forget()
    memory = torch.zeros(3, 1024)  # far apart, so that what lies behind `in` is near nothing else
    tensors = {"in": memory[0, :64], "out": memory[1, :64]}
    tensors["in"] += torch.arange(64)
    if name == "last_block_without_fence":
        tensors |= {"parts": torch.zeros(4 * 64), "arrived": torch.zeros(1, dtype=torch.int32)}
    watched(library, **tensors)
    if name == "uninitialised_global":
        tensors["scratch"] = torch.zeros(64)
        library.watch(tensors["scratch"], "scratch", initialised=False)
    library.call(f"run_{name}", int(bug), *tensors.values())


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(planted, name, mode):
    planted.configure(mode[0], seed=1, late=mode[1])
    message, line = PLANTED[name]
    with pytest.raises(RuntimeError, match=message) as error:
        call_planted(planted, name, True)
    found = build.diagnose(str(error.value))
    assert found["kernel"] == name
    file, number = found["where"].split(":")
    text = (KERNELS / file).read_text().splitlines()[int(number) - 1]
    assert line in text, f"{error.value}\n{text}"


@pytest.mark.parametrize("name", PLANTED)
def test_its_correct_twin_is_not(planted, name):
    for (schedule, late), seed in itertools.product(MODES, (1, 2)):
        planted.configure(schedule, seed=seed, late=late)
        call_planted(planted, name, False)


def test_every_planted_kernel_is_tested():
    text = (KERNELS / "planted.cu").read_text()
    kernels = {after.split("(")[0].split()[-1] for after in text.split("template <bool kBug>")[1:]}
    assert kernels - {"wrong_fragment"} == set(PLANTED)


def test_a_wrong_fragment_shows_in_numbers(planted):
    planted.configure()
    a, b = torch.randn(16, 16).bfloat16().float(), torch.randn(8, 16).bfloat16().float()
    c = torch.zeros(16, 8)
    planted.forget()
    watched(planted, a=a, b=b, c=c)
    planted.call("run_wrong_fragment", 0, a, c, b)
    torch.testing.assert_close(c, a @ b.T, rtol=1e-5, atol=1e-5)
    planted.call("run_wrong_fragment", 1, a, c, b)
    assert (c - a @ b.T).abs().max() > 0.1


def test_memory_that_is_not_registered_is_out_of_bounds(planted):
    planted.configure()
    planted.forget()
    tensors = torch.zeros(64), torch.zeros(64)
    with pytest.raises(RuntimeError, match=r"out of bounds: .* no tensor is registered"):
        planted.call("run_missing_barrier", 0, *tensors)


def test_a_product_takes_milliseconds():
    # Goals: a few ms plain, 10 ms checked. The limits leave room for a loaded machine.
    for checked, limit in ((False, 0.05), (True, 0.1)):
        library = build.load_kernels(KERNELS / "selftest.cu", checked=checked)
        a, b, c = (
            torch.randn(64, 128).bfloat16(),
            torch.randn(64, 128).bfloat16(),
            torch.zeros(64, 64),
        )
        watched(library, a=a, b=b, c=c)
        times = []
        for _ in range(5):
            start = time.process_time()
            library.call("run_matmul", a, b, c, 128, 0)
            times.append(time.process_time() - start)
        library.forget()
        assert min(times) < limit, (checked, times)


# ------------------------------------------------------------------------------------------------
# The GPU's side of gpu.cuh


def test_every_wrapper_is_its_instruction(tmp_path):
    nvcc = shutil.which("nvcc")
    triton = pytest.importorskip("triton", reason="its package has the disassembler")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if nvcc is None or not (tools / "nvdisasm").exists():
        pytest.skip("needs nvcc and nvdisasm")
    target = tmp_path / "selftest.cubin"
    folders = [f"-I{build.HERE}", f"-I{build.ROOT / 'csrc'}"]
    command = [nvcc, "-std=c++20", "-arch=sm_80", "-cubin", *folders, "-o", str(target)]
    subprocess.run([*command, str(KERNELS / "selftest.cu")], check=True, capture_output=True)
    listing = subprocess.run(
        [tools / "nvdisasm", target], check=True, capture_output=True, text=True
    ).stdout
    for instruction in (
        r"HMMA\.16816\.F32\.BF16",
        r"HMMA\.16816\.F32 ",
        r"HMMA\.1688\.F32\.TF32",
        r"LDSM\.16\.M88\.4",
        r"LDSM\.16\.MT88\.4",
        r"LDGSTS\.E\.BYPASS\.128",
        r"LDGDEPBAR",
        r"DEPBAR\.LE SB0, 0x1",
        r"MUFU\.EX2",
        r"MUFU\.LG2",
        r"MUFU\.RCP",
        r"MUFU\.RSQ",
    ):
        assert re.search(instruction, listing), instruction


def test_only_gpu_cuh_knows_the_compiler():
    files = [p for p in build.CUDA.iterdir() if p.suffix in (".cu", ".cuh", ".h", ".cpp")]
    assert [p.name for p in files if "__CUDACC__" in p.read_text()] == ["gpu.cuh"]


def test_kernels_include_no_torch():
    for path in build.CUDA.iterdir():
        if path.suffix in (".cu", ".cuh") or path.name.endswith("_params.h"):
            foreign = re.search(r"#\s*include\s*[<\"](torch|ATen|c10|Python)", path.read_text())
            assert not foreign, path
