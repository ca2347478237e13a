"""`python -m bench static`: reading compiled kernels, limits of multiprocessors, the model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench import ahead_of_time, sass, static, static_model, static_triton, triton_calls
from bench.__main__ import main
from bench.sass import Counts, Instruction, Kernel, Name, Resources
from bench.static_model import Case, Gpu, MainLoop, Work
from crrcd_ext import _backend

SYMBOL = (
    "_ZN5crrcd4cuda48_GLOBAL__N__1a2b3c4d_15_instance_f32_cu_0f1e2d3c11own_entriesIf13__nv_bfloat16"
    "Li32ELi4ELNS_4PassE0EEEvNS0_14InstanceParamsIT_EE"
)

RESOURCES = """
Fatbin elf code:
arch = sm_80
Resource usage:
 Function first:
  REG:90 STACK:16 SHARED:32 LOCAL:0 CONSTANT[0]:440 TEXTURE:0 SURFACE:0 SAMPLER:0
Fatbin elf code:
arch = sm_90a
 Function first:
  REG:64 STACK:0 SHARED:1056 LOCAL:8 CONSTANT[0]:440 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function without_shared:
  REG:56 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:656 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ELF = """
arch = sm_80
.nv.info.first
\t<0x1>
\tAttribute:\tEIATTR_CRS_STACK_SIZE
\tFormat:\tEIFMT_SVAL
\tValue:\t0x0
\t<0x2>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x2 0x1
"""

# Two loops, one in the other; code behind the exit that the inner one jumps to and that comes back;
# the inner loop is left by a call; the branch to itself that ends a kernel's code.
SASS = """
Fatbin elf code:
arch = sm_80
\tcode for sm_80
\t\tFunction : nested
\t.headerflags\t@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x00000a0000017a02 */
                                                                   /* 0x000fe40000000f00 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;         /* 0x00000a0000017a02 */
        /*0020*/                   FFMA R5, R5, R5, R5 ;           /* 0x00000a0000017a02 */
        /*0030*/                   LDSM.16.M88.4 R8, [R2] ;        /* 0x00000a0000017a02 */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ; /* 0x0 */
        /*0050*/                   HFMA2.MMA R9, -RZ, RZ, 0, 0 ;   /* 0x00000a0000017a02 */
        /*0060*/                   BRA.DIV ~URZ, 0x00f0 ;          /* 0x00000a0000017a02 */
        /*0070*/                   MUFU.EX2 R9, R9 ;               /* 0x00000a0000017a02 */
        /*0080*/              @!P0 CALL.REL.NOINC 0x00a0 ;         /* 0x00000a0000017a02 */
        /*0090*/                   BRA 0x0030 ;                    /* 0x00000a0000017a02 */
        /*00a0*/                   STG.E.U16 [R2.64], R4 ;         /* 0x00000a0000017a02 */
        /*00b0*/             @!UP1 BRA 0x0010 ;                    /* 0x00000a0000017a02 */
        /*00c0*/                   BAR.SYNC 0x0 ;                  /* 0x00000a0000017a02 */
        /*00d0*/                   RED.E.ADD.F32.FTZ.RN [R2.64], R4 ; /* 0x0 */
        /*00e0*/                   EXIT ;                          /* 0x00000a0000017a02 */
        /*00f0*/                   SHFL.BFLY R4, R4, R5, R6 ;      /* 0x00000a0000017a02 */
        /*0100*/                   BRA 0x0070 ;                    /* 0x00000a0000017a02 */
        /*0110*/                   BRA 0x110;                      /* 0x00000a0000017a02 */
        /*0120*/                   NOP ;                           /* 0x00000a0000017a02 */
arch = sm_90a
\t\tFunction : straight
        /*0000*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64], P1 ; /* 0x0 */
        /*0010*/              @P0  EXIT ;                          /* 0x00000a0000017a02 */
        /*0020*/                   STL.64 [R1], R4 ;               /* 0x00000a0000017a02 */
        /*0030*/                   EXIT ;                          /* 0x00000a0000017a02 */
"""


def code_of(symbol: str) -> list[Instruction]:
    return next(code for _, name, code in sass.parse_sass(SASS.splitlines()) if name == symbol)


def test_names_are_readable():
    name = sass.name_of(SYMBOL)
    assert str(name) == "own_entries<float, bf16, 32, 4, kNce>"
    assert (name.types, name.variant) == (("float", "bf16"), ("32", "4", "kNce"))
    assert name.source == "instance_f32"
    assert str(sass.name_of("plain_c_name")) == "plain_c_name"
    nested = sass.name_of("_Z4passIN5crrcd6TraitsI6__halfLi64EEELb1EEvPT_")
    assert nested.arguments == ("Traits<fp16, 64>", "true")


@pytest.mark.parametrize(
    ("source", "operator"),
    [
        ("instance_f32", "instance_nce"),
        ("bank_update_kernel", "bank_update_"),
        ("relation_bf16", "relation_nce"),
        ("relationship", ""),
        ("difference_f64", "difference_nce"),
        ("other", ""),
    ],
)
def test_operator_of_a_file(source, operator):
    assert static.operator_of(source) == operator


def test_every_file_with_kernels_has_an_operator():
    files = sorted((sass.ROOT / "csrc" / "cuda").glob("*.cu"))
    assert files and all(static.operator_of(path.stem) for path in files)


def test_operators_are_those_of_the_package():
    from crrcd_ext import _schema

    known = {schema.split("(")[0] for schema in _schema.SCHEMAS}
    assert set(static_model.SOURCES.values()) <= known


def test_resources_and_threads():
    found = sass.parse_resources(RESOURCES.splitlines())
    assert found["sm_80", "first"] == Resources(registers=90, stack=16, local=0, shared=32)
    # What the system keeps of a block's shared memory is not the kernel's.
    assert found["sm_90a", "first"] == Resources(registers=64, stack=0, local=8, shared=32)
    assert found["sm_90a", "without_shared"].shared == 0
    assert sass.parse_max_threads(ELF.splitlines()) == {("sm_80", "first"): 256}


def test_instructions_are_counted():
    kernels = [(arch, name) for arch, name, _ in sass.parse_sass(SASS.splitlines())]
    assert kernels == [("sm_80", "nested"), ("sm_90a", "straight")]
    counts = sass.count(code_of("nested"))
    assert counts.instructions == 18  # no NOP
    assert (counts.tensor_core, counts.tensor_operations) == (1, 2 * 16 * 8 * 16)
    assert (counts.ldmatrix, counts.multiply_add, counts.special) == (1, 1, 1)
    assert (counts.barrier, counts.atomic, counts.local) == (1, 1, 0)
    assert (counts.global_loads, counts.global_stores) == ({128: 1}, {16: 1})
    counts = sass.count(code_of("straight"))
    assert (counts.async_copy, counts.local, counts.global_loads) == (1, 1, {})


def test_loops_nest_and_the_one_with_tensor_cores_is_the_main_one():
    outer, inner = sorted(sass.loops(code_of("nested")), key=lambda loop: loop.head)
    assert (outer.head, outer.depth, outer.contains) == (0x10, 0, 1)
    assert (inner.head, inner.depth, inner.contains) == (0x30, 1, 0)
    # With what stands behind the exit, without what comes after the loop.
    assert [i.address for i in inner.code] == [*range(0x30, 0xA0, 0x10), 0xF0, 0x100]
    assert outer.own.instructions == 4 and len(outer.code) == 13
    assert sass.main_loop(sass.loops(code_of("nested"))).head == 0x30
    assert sass.main_loop(sass.loops(code_of("straight"))) is None


def test_without_tensor_cores_the_main_loop_is_the_innermost_one_that_multiplies():
    code = [
        replace(i, opcode="FADD" if sass.is_tensor_core(i) else i.opcode) for i in code_of("nested")
    ]
    assert (
        sass.main_loop(sass.loops(code)).head == 0x30
    )  # innermost, though the outer one has the FFMA


def test_a_turn_takes_the_shortest_way_that_passes_the_stops():
    loop = sass.tile_loop(sass.loops(code_of("nested")))
    assert loop.head == 0x10  # the outermost one, its tensor-core work being within
    # The inner loop is left by the call; the way around by 0xf0 is the longer one.
    shortest = sass.turn(loop, [])
    assert (shortest.instructions, shortest.tensor_core) == (10, 1)
    twice = sass.turn(loop, [{"tensor_core": 1}, {"tensor_core": 1}])
    assert (twice.instructions, twice.tensor_core) == (17, 2)
    around = sass.turn(loop, [{"global_stores": 1}])
    assert around.instructions == shortest.instructions
    assert sass.turn(loop, [{"tensor_core": 2}]) is None


def test_loops_within_and_of_special_functions():
    found = sass.loops(code_of("nested"))
    tiles = sass.tile_loop(found)
    assert sass.inner_loop(found, tiles).head == 0x30
    assert sass.inner_loop(found, sass.inner_loop(found, tiles)) is None
    assert sass.special_loop(found).own.special == 1
    assert sass.inner_loop([], None) is None and sass.special_loop([]) is None


@pytest.mark.parametrize(
    ("opcode", "clocks"),
    [
        ("LDSM.16.M88.4", 4),  # four matrices of 8 x 8 x 2 bytes
        ("LDSM.16.MT88.4", 4),
        ("LDSM.16.M88.2", 2),
        ("LDSM.16.M88", 1),
        ("LDS.128", 4),  # 32 lanes of 16 bytes
        ("LDS.64", 2),
        ("STS", 1),
        ("LDS.U.128", 4),
        ("STS.U16", 1),  # 64 bytes take a clock as well
        ("LDGSTS.E.BYPASS.LTC128B.128", 4),
        ("LDGSTS.E.64", 2),
        ("LDG.E.128", 0),
        ("HMMA.16816.F32.BF16", 0),
    ],
)
def test_clocks_of_shared_memory(opcode, clocks):
    assert sass.shared_clocks(Instruction(0, opcode)) == clocks


def test_clocks_of_shared_memory_are_counted():
    assert sass.count(code_of("nested")).shared_clocks == 4
    assert sass.count(code_of("straight")).shared_clocks == 4


@pytest.mark.parametrize(
    ("opcode", "operations"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("DMMA.884", 2 * 8 * 8 * 4),
        ("IMMA.16832.S8.S8", 2 * 16 * 8 * 32),
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 // 4),
        ("FFMA", 0),
    ],
)
def test_operations_of_a_tensor_core_instruction(opcode, operations):
    assert sass.tensor_operations(Instruction(0, opcode)) == operations


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [
        ("sm_80", 32, 128, 0, 16),  # threads
        ("sm_80", 128, 256, 0, 2),  # registers
        ("sm_80", 129, 256, 0, 1),  # registers, in units of 8 for each thread
        ("sm_80", 255, 32, 0, 8),  # each partition holds two warps
        ("sm_80", 255, 96, 0, 2),
        ("sm_80", 255, 257, 0, 0),
        ("sm_80", 32, 128, 80 * 1024, 2),  # shared memory
        ("sm_80", 32, 128, 82 * 1024, 1),  # what the system takes does not fit twice
        ("sm_80", 16, 32, 0, 32),  # blocks
        ("sm_86", 32, 128, 0, 12),
        ("sm_90", 32, 128, 112 * 1024, 2),
        ("sm_90a", 32, 128, 112 * 1024, 2),
        ("sm_75", 32, 128, 0, None),
    ],
)
def test_blocks_per_multiprocessor(arch, registers, threads, shared, blocks):
    assert static.blocks_per_multiprocessor(arch, registers, threads, shared) == blocks


GPU = Gpu("test", "sm_80", 10, gigahertz=1.0, bandwidth=100, tensor={"bf16": 4}, mma_sync=0.5)


def kernel_with(loop: Counts, arch: str = "sm_80", **loops) -> Kernel:
    name = Name("pass", ("bf16",), "relation_nce_bf16")
    return Kernel(arch, "symbol", name, Resources(64, 0, 0, 0, 128), loop, loop, **loops)


def test_the_model_in_numbers():
    loop = Counts(instructions=40, tensor_operations=8192, shared_clocks=30, multiply_add=5)
    work = Work(
        bytes=1e9,
        least_bytes=5e8,
        tensor={"bf16": 4e9},
        multiply_adds=1.28e12,
        doubles=1e10,
        special=1.6e11,
        main_loops=(MainLoop("pass<bf16>", tensor_operations=8.192e9),),
    )
    times = static_model.seconds(work, GPU, [kernel_with(loop)])
    assert times == {
        "memory": pytest.approx(0.01),
        "tensor": pytest.approx(0.002),  # at half of 4 TFLOP/s
        "fp32": pytest.approx(1.0),
        "fp64": pytest.approx(0.5),  # 2 of 10 multiprocessors a clock
        "special": pytest.approx(1.0),
        "issue": pytest.approx(1e6 * 40 / (4 * 10 * 1e9)),
        "shared": pytest.approx(1e6 * 30 / (10 * 1e9)),
    }
    for part, passes in (
        (MainLoop("pass<bf16>", multiply_adds=3200.0), 20),
        (MainLoop("pass<bf16>", passes=7), 7),
    ):
        known = static_model.loop_clocks([part], GPU, [kernel_with(loop)])
        assert known == {"issue": passes * 40 / 4, "shared": passes * 30}
    copied = MainLoop("pass<bf16>", passes=7, copied=12800)
    known = static_model.loop_clocks([copied], GPU, [kernel_with(loop)])
    assert known["shared"] == 7 * 30 + 100
    pairs = replace(work, pairs=2e6)
    assert static_model.clocks_a_pair(pairs, GPU, [kernel_with(loop)]) == {
        "issue": pytest.approx(5),
        "shared": pytest.approx(15),
    }


def test_what_a_way_leaves_is_made_in_the_main_loop():
    found = sass.loops(code_of("nested"))
    loop = Counts(instructions=6, tensor_operations=4096, shared_clocks=4)
    tiles = sass.tile_loop(found)
    kernel = kernel_with(
        loop,
        tile_loop=tiles,
        inner_loop=sass.inner_loop(found, tiles),
        special_loop=Counts(instructions=3),
    )
    # ten ways of 10 instructions, with one of the 12 products of 4096 operations each
    part = MainLoop("pass<bf16>", 12 * 4096 * 10, passes=10, stops=({"tensor_core": 1},))
    (passes, way), (rest, whole) = static_model.issued(part, "sm_80", [kernel])
    assert (passes, way.instructions, way.tensor_operations) == (10, 10, 4096)
    assert (rest, whole) == (110, loop)
    # the loop within it has a turn of its own: 7 instructions
    inner = replace(part, within=True, tensor_operations=0)
    assert [code.instructions for _, code in static_model.issued(inner, "sm_80", [kernel])] == [7]
    special = MainLoop("pass<bf16>", passes=5, special=True)
    assert static_model.issued(special, "sm_80", [kernel]) == [(5, Counts(instructions=3))]
    assert static_model.issued(replace(part, stops=({"ldmatrix": 2},)), "sm_80", [kernel]) == []


def test_code_that_stands_for_a_gpu():
    kernels = [kernel_with(Counts(), arch) for arch in ("sm_80", "sm_90a")]
    known = {
        arch: (static_model.code_for(gpu, kernels), static_model.runs_as_it_is(gpu, kernels))
        for arch in ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
        for gpu in [replace(GPU, arch=arch)]
    }
    assert known == {
        "sm_75": ("", False),
        "sm_80": ("sm_80", True),
        "sm_89": ("sm_80", True),
        "sm_90": ("sm_90a", True),  # as builds used to name it
        "sm_100": ("sm_90a", False),
        "sm_120": ("sm_90a", False),
    }
    work = Work(bytes=1, least_bytes=1, main_loops=(MainLoop("pass<bf16>", passes=1),))
    times = static_model.seconds(work, replace(GPU, arch="sm_75"), kernels)
    assert times["issue"] is None and times["shared"] is None


def gpu_of(name: str) -> Gpu:
    return next(gpu for gpu in static_model.GPUS if gpu.name == name)


def test_what_mma_sync_reaches():
    work = Work(bytes=0, least_bytes=0, tensor={"bf16": 1e12})
    microseconds = {
        gpu.name: round(1e6 * static_model.seconds(work, gpu, [])["tensor"])
        for gpu in static_model.GPUS
    }
    assert microseconds == {
        "A100": 3205,  # 312 TFLOP/s
        "H100": 1605,  # 0.63 of 989
        "H200": 1605,
        "B200": 1778,  # a quarter of 2,250
        "RTX 4090": 6061,
        "RTX 5090": 4762,
    }
    assert [gpu.name for gpu in static_model.GPUS if gpu.assumed] == ["B200"]
    assert any(
        "B200" in line and "25% (an assumption)" in line for line in static_model.assumptions()
    )


def test_multiprocessors_are_those_of_the_plan():
    from crrcd_ext import _plan

    for gpu in static_model.GPUS:
        assert gpu.multiprocessors == _plan.GPUS[gpu.arch].processors
        assert gpu.name in _plan.GPUS[gpu.arch].device


def test_time_of_the_host():
    assert static_model.Launches(59, 2).seconds == pytest.approx(244e-6)
    assert static_model.relation_launches(64, 2, 3, live=True) == static_model.Launches(160, 8)


def test_a_new_case_is_a_table(monkeypatch):
    work = Work(
        bytes=3e6,
        least_bytes=2e6,
        tensor={"bf16": 3.12e9},
        least_tensor=2.08e9,
        launches=static_model.Launches(3, 2),
        main_loops=(MainLoop("pass<bf16>", passes=1e6),),
    )
    monkeypatch.setattr(static_model, "CASES", [Case("relation_nce", "A=64", work)])
    kernels = [kernel_with(Counts(instructions=4, shared_clocks=152.28))]
    results = static.modelled(kernels)
    assert all(not result["measured"] for result in results)
    ((title, rows),) = static.model_tables(results).items()
    assert title == "relation_nce, A=64: 3.1 GFLOP on tensor cores, 1.50 x least"
    assert [row[0] for row in rows] == [gpu.name for gpu in static_model.GPUS]
    cells = dict(zip(static.MODEL_HEADER, rows[0], strict=True))
    assert (cells["MB"], cells["x least"], cells["tensor"]) == ("3.0", "1.50", "10.0")
    # a million turns on 108 multiprocessors at 1.41 GHz; five launches
    assert (cells["issue"], cells["shared"]) == ("6.6", "1,000.0")
    assert (cells["bound by"], cells["most ms"], cells["sum ms"]) == ("shared", "1.000", "1.018")
    assert (cells["launches"], cells["host ms"]) == ("3 + 2", "0.020")
    assert cells["call ms"] == "1.000-1.020"
    others = [dict(zip(static.MODEL_HEADER, row, strict=True)) for row in rows[1:]]
    assert [c["shared"][0] == "~" for c in others] == [True, True, True, False, True]
    # the host takes longer
    results[0]["host_s"], results[0]["call_s"] = 0.002, [0.002, 0.003]
    cells = dict(zip(static.MODEL_HEADER, static.model_row(results[0]), strict=True))
    assert (cells["bound by"], cells["call ms"]) == ("host, shared", "2.000-3.000")
    monkeypatch.setattr(static_model, "CASES", [Case("difference_nce", "A=64", work)])
    assert static.modelled(kernels) == []


def test_bytes_of_instance_nce():
    work = static_model.instance_own(64, 1024, 128, 1 << 40, "bf16")
    rows = 64 * 1024 * 128 * 2
    assert work.bytes == rows + 3 * 64 * 128 * 4 + 64 * 1024 * 8
    assert work.doubles == 3 * 64 * 1024
    assert math.isclose(work.least_bytes, work.bytes, rel_tol=1e-6)  # hardly a row is drawn twice
    work = static_model.instance_shared(64, 1024, 128, 1 << 40, "float")
    assert work.bytes == 1024 * 128 * 4 + 3 * 64 * 128 * 4 + 1024 * 8


def test_work_of_similar_mask():
    work = static_model.similar_own(64, 1024, 128, 1 << 40, "bf16")
    assert work.bytes == 64 * 1024 * 128 * 2 + 64 * 128 * 4 + 64 * 1024 * 8 + 64 * 1024 // 8
    assert math.isclose(work.least_bytes, work.bytes, rel_tol=1e-6)  # hardly a row is drawn twice
    work = static_model.similar_shared(65, 1024, 128, "float")
    assert work.bytes == work.least_bytes == 1024 * 128 * 4 + 65 * 128 * 4 + 65 * 1024 // 8
    assert work.multiply_adds == 128 * 1024 * 128


def test_work_of_difference_nce():
    gpu = gpu_of("H100")
    single = static_model.difference_shared(gpu, 16384, "float")
    ends = 4 * 64 * 128 * 4 + 16384 * 8  # anchor, query, positive, gradient; index
    assert single.least_bytes == 16384 * 128 * 4 + ends
    # of 264 blocks 64 rows of gradient and two sums a pair; a 64-bit word a key; in and out
    kept = 264 * (64 * 128 + 2 * 64 * 64) * 4 + 16384 * 8
    assert single.bytes == single.least_bytes + 2 * kept
    assert not single.tensor
    half = static_model.difference_shared(gpu, 16384, "bf16")
    assert half.tensor == {"bf16": 2 * 128 * 16384 * 128}
    assert single.multiply_adds - half.multiply_adds == 2 * 128 * 16384 * 128
    # fewer tiles of 32 keys than blocks
    few = static_model.difference_shared(gpu, 320, "float")
    assert few.bytes - few.least_bytes == 2 * (10 * (64 * 128 + 2 * 64 * 64) * 4 + 320 * 8)


def test_command_on_the_built_module(tmp_path, capsys):
    built = _backend.compiled is not None and _backend.compiled.build_info()["cuda"]
    if not built:
        assert main(["static", "--output", str(tmp_path)]) == 1
        assert "no CUDA kernels" in capsys.readouterr().err
        return
    try:
        sass.cuobjdump()
    except sass.ToolMissing as missing:
        pytest.skip(str(missing))
    arch = sass.architectures(static.module_with_kernels())[0]
    command = ["static", "--output", str(tmp_path), "--arch", arch]
    wanted = r"instance.*<float, float|relation_logits<kBF16, kNce, 4>"
    assert main([*command, "--kernel", wanted]) == 0
    printed = capsys.readouterr().out
    model = printed[printed.index("Model, not measured") :]
    assert max(map(len, model[: model.index("Model, not measured. MB")].splitlines())) <= 160
    document = json.loads((tmp_path / "static.json").read_text())
    assert {"command", "date", "commit"} <= set(document["about"])
    kernels = {kernel["name"]: kernel for kernel in document["kernels"]}
    own = kernels["own_entries<float, float, 32, 4, kNce>"]
    assert (own["operator"], own["types"]) == ("instance_nce", ["float", "float"])
    assert own["resources"]["max_threads"] == 128 and own["resources"]["stack"] == 0
    # The logit's and the gradient's multiply-adds: four rows of four columns each.
    assert own["main_loop"]["multiply_add"] >= 32 and own["main_loop"]["contains"] == 0
    assert own["counts"]["global_loads"]["128"] >= 1
    tile = kernels["shared_tiles<float, float, kNce>"]
    assert tile["resources"]["dynamic_shared"] > 30_000 and tile["counts"]["barrier"] > 0
    assert tile["main_loop"]["multiply_add"] >= 0.5 * tile["main_loop"]["instructions"]
    # Of a tile of 16 keys in the logits' pass 156 ldmatrix.x4 take 4 clocks each; making hid 16
    # loads and stores of 16 bytes and the next tile 8 copies, 4 each; offsets 8 loads of 8 bytes, 2
    # each; slopes 16 stores of 4 bytes, and three loads more.
    for case in document["model"]:
        if case["operator"] == "relation_nce" and "query" in case["case"]:
            clocks = case["clocks_a_pair"]
            assert clocks["shared"] == pytest.approx((624 + 64 + 32 + 16 + 16 + 3) / 16, abs=0.5)
            assert clocks["issue"] == pytest.approx(19.5, abs=0.5)
    assert "| own_entries<float, float, 32, 4, kNce> |" in (tmp_path / "static.md").read_text()
    assert main([*command, "--kernel", "no such"]) == 1
    assert "finds none of the kernels" in capsys.readouterr().err
    assert main([*command[:-1], "sm_10"]) == 1
    assert f"--arch: expected some of {arch}" in capsys.readouterr().err


def test_dynamic_shared_memory_of_tiles():
    # operand and weight of 64 x 68, a factor for each of 64 rows, 24 doubles
    assert (
        static_model.DYNAMIC_SHARED["shared_tiles"](Name("shared_tiles", ("float",)), "") == 35264
    )


@pytest.mark.skipif(_backend.compiled is None, reason="the planner is part of the compiled module")
def test_relation_nce_follows_the_plan():
    from crrcd_ext import _plan

    sizes = {"anchors": 64, "queries": 64, "hidden": 128, "relation_dim": 128}
    for gpu in static_model.GPUS:
        work = static_model.relation(gpu, 16384, live=False)
        made = _plan.plan(gpu.arch, keys=16384, **sizes)
        parts = made["logits"]["chunks"] * 64 * 64 * 128 * 4
        keys, queries = 16384 * 128 * 2, 64 * 64 * 128 * 2
        assert work.least_bytes == keys + 64 * 128 * 2 + 128 * 128 * 2 + 3 * queries
        assert work.bytes == work.least_bytes + 2 * keys + 2 * queries + 2 * parts
        assert work.bytes < 40e6
        assert sum(work.tensor.values()) <= 1.05 * work.least_tensor
        # Q W; of each lane four sums for every second turn of 16 keys
        assert work.doubles == 64 * 64 * 128 * 128 + 64 * 16384 / 16 / 2 * 4 * 32
        assert work.launches == static_model.Launches(60, 2)
        live = static_model.relation(gpu, 16384, live=True)
        made = _plan.plan(gpu.arch, keys=16384, **sizes, gradients=_plan.GRADIENTS)
        small = gpu.name.startswith("RTX")  # no room for blocks with all hidden units
        assert made["keys"]["first"] == (not small)
        # W'W hid; the logits twice, the gradients by them of keys and queries; a triangle; W hid
        products = 128**2 + 4 * 64 * 128 + 9216 + (128**2 if small else 0)
        assert sum(live.tensor.values()) == 2 * 64 * 16384 * products
        assert sum(live.tensor.values()) <= (1.6 if small else 1.2) * live.least_tensor
        # a piece of QW of 16 KB for 128 keys; or four pieces for 16
        assert live.main_loops[1].copied == 64 * 16384 * 16384 * (4 / 16 if small else 1 / 128)
        assert live.bytes < 150e6
        assert live.doubles - work.doubles == 128**3
        assert live.launches.own == 4
        live = static_model.relation(gpu, 131072, live=True)
        assert live.work_bytes < 64e6
        name = Name("relation_logits", ("kBF16", "kNce", "4"), "relation_bf16")
        everything = _plan.plan(gpu.arch, keys=16384, **sizes, gradients=_plan.GRADIENTS)
        known = static_model.DYNAMIC_SHARED["relation_logits"](name, gpu.arch)
        assert known == everything["logits"]["shared_bytes"]
        assert static_model.DYNAMIC_SHARED["relation_logits"](name, f"{gpu.arch}a") == known


@pytest.mark.skipif(_backend.compiled is None, reason="the planner is part of the compiled module")
def test_doubles_take_long_on_small_gpus():
    gpu = gpu_of("RTX 4090")
    work = static_model.relation(gpu, 16384, live=False)
    # 71.3 million of 2 a clock on 128 multiprocessors at 2.52 GHz
    assert static_model.seconds(work, gpu, [])["fp64"] == pytest.approx(110.5e-6, rel=1e-3)


@pytest.fixture
def launches(monkeypatch):
    """Kernels of one call, by name; those in the result are compiled, the others fail."""
    compiles: set[str] = set()

    def launch(name):
        return SimpleNamespace(name=name, options={}, warps=4, constants={})

    def compiled(launch, arch):
        if launch.name not in compiles:
            raise RuntimeError(f"{arch}: {launch.name}: unknown")
        return SimpleNamespace(shared=0, launch=launch)

    def source(launch):
        return SimpleNamespace(hash=lambda: launch.name)

    monkeypatch.setattr(triton_calls, "calls", lambda: [SimpleNamespace(run=None)])
    monkeypatch.setattr(ahead_of_time, "record", lambda *_: [launch(x) for x in "abcdef"])
    monkeypatch.setattr(ahead_of_time, "source", source)
    monkeypatch.setattr(ahead_of_time, "compiled", compiled)
    monkeypatch.setattr(static_triton, "_on_nvidia", lambda _, common: common["kernel"])
    return compiles


def test_kernels_that_triton_cannot_compile_are_told(launches):
    launches |= {"b", "e"}
    failures = ["of another architecture"]
    assert list(static_triton.rows("sm_90", failures)) == ["b", "e"]
    assert [text.split(": ", 1)[1] for text in failures[1:]] == [
        f"sm_90: {name}: unknown" for name in "acdf"
    ]


def test_an_architecture_that_triton_does_not_know_ends_it(launches):
    launches |= {"e"}
    with pytest.raises(RuntimeError, match="none of the first 4 kernels is compiled: sm_90: d: "):
        list(static_triton.rows("sm_90", []))
