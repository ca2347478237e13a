"""The launch planner: no plan exceeds a limit of any GPU, and what runs most has its room."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crrcd_ext import _backend, _plan

if _backend.compiled is None:
    pytest.skip("the planner is part of the compiled module", allow_module_level=True)

SIZES = {"anchors": 64, "queries": 64, "keys": 16384, "hidden": 128, "relation_dim": 128}
EVERYTHING = _plan.GRADIENTS
STORED = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}
each_arch = pytest.mark.parametrize("arch", _plan.GPUS)
size = st.one_of(st.integers(1, 70), st.integers(1, 600), st.sampled_from([16, 64, 128, 256, 512]))


def check_limits(arch: str, made: dict) -> None:
    gpu = _plan.GPUS[arch]
    assert made["segment"] > 0 and made["segment"] % 128 == 0
    for name in ("logits", "keys", "weight"):
        if name not in made:
            continue
        taken, blocks = made[name]["shared_bytes"], made[name]["blocks_a_multiprocessor"]
        assert blocks >= 1
        assert 0 < taken <= 1024 * gpu.shared_block
        assert blocks * (taken + 1024) <= 1024 * gpu.shared_processor
        # a thread may take all of its 255 registers
        assert blocks * 32 * made[name]["warps"] * 256 <= 65536
        assert blocks * made[name]["warps"] <= 48
        assert made["segment"] % made[name]["keys_of_a_tile"] == 0
        for parts in ("chunks", "key_parts", "anchor_parts"):
            if parts in made[name]:
                assert made[name][parts] >= 1


@each_arch
@settings(max_examples=300, deadline=None)
@given(
    sizes=st.tuples(size, size, st.integers(1, 3_000_000), size, size),
    precision=st.sampled_from(_plan.PRECISIONS),
    gradients=st.sets(st.sampled_from(EVERYTHING)),
)
def test_no_plan_exceeds_a_limit(arch, sizes, precision, gradients):
    sizes = dict(zip(SIZES, sizes, strict=True))
    made = _plan.plan(arch, **sizes, precision=precision, gradients=tuple(gradients))
    if made["fits"]:
        check_limits(arch, made)
        tile = made["logits"]["keys_of_a_tile"]
        assert made["logits"]["chunks"] <= -(-min(made["segment"], sizes["keys"]) // tile)
    elif precision in ("float64", "float32"):
        # at full precision the slopes of all queries lie in shared memory too
        widths = sizes["hidden"] + sizes["relation_dim"] + sizes["queries"]
        assert widths * (8 if precision == "float64" else 4) > 4400
    else:
        assert max(sizes["hidden"], sizes["relation_dim"]) > 512


@each_arch
@pytest.mark.parametrize("precision", [p for p in _plan.PRECISIONS if p != "float64"])
@pytest.mark.parametrize("hidden", [1, 64, 128, 256, 512])
@pytest.mark.parametrize("relation_dim", [1, 64, 128, 256, 512])
def test_widths_to_512_fit_everywhere(arch, precision, hidden, relation_dim):
    sizes = SIZES | {"hidden": hidden, "relation_dim": relation_dim}
    made = _plan.plan(arch, **sizes, precision=precision, gradients=EVERYTHING)
    assert made["fits"]
    check_limits(arch, made)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_main_pass_has_two_blocks_and_everything_resident(arch, precision):
    made = _plan.plan(arch, **SIZES, precision=precision)
    assert made["logits"]["blocks_a_multiprocessor"] == 2
    assert made["logits"]["warps"] == 4
    assert made["logits"]["resident"] == 1


@each_arch
@pytest.mark.parametrize("precision", _plan.PRECISIONS)
def test_work_space_does_not_grow_with_the_keys(arch, precision):
    some, few, many = (
        _plan.plan(arch, **SIZES | {"keys": keys}, precision=precision, gradients=EVERYTHING)
        for keys in (131_072, 1_000_000, 10_000_000)
    )
    assert many["work_bytes"] <= 1.1 * few["work_bytes"]  # segments are nearly as long as can be
    assert max(made["work_bytes"] for made in (some, few, many)) <= 64 << 20


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_work_space_of_the_main_pass(arch):
    made = _plan.plan(arch, **SIZES | {"keys": 131_072}, precision="bfloat16")
    assert made["work_bytes"] <= 20 << 20


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("anchors", [48, 64, 100])
@pytest.mark.parametrize("keys", [4096, 16384, 131_072])
def test_keys_and_anchors_are_shared_out_evenly(arch, anchors, keys):
    processors = _plan.GPUS[arch].processors
    made = _plan.plan(
        arch, **SIZES | {"keys": keys, "anchors": anchors}, gradients=("keys", "anchor")
    )
    tiles = -(-made["segment"] // made["keys"]["keys_of_a_tile"])
    segments = -(-keys // made["segment"])
    key_parts, anchor_parts = made["keys"]["key_parts"], made["keys"]["anchor_parts"]
    assert key_parts * anchor_parts <= processors * made["keys"]["blocks_a_multiprocessor"]
    busiest = segments * -(-tiles // key_parts) * -(-anchors // anchor_parts)
    assert busiest <= 1.2 * keys / made["keys"]["keys_of_a_tile"] * anchors / processors
    logits = made["logits"]
    assert logits["chunks"] * anchors <= 2 * processors * logits["blocks_a_multiprocessor"]


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("keys", [16384, 131_072])
def test_one_sum_a_key_where_there_are_keys_for_all(arch, keys):
    made = _plan.plan(arch, **SIZES | {"keys": keys}, gradients=EVERYTHING)
    assert made["keys"]["anchor_parts"] == 1


@pytest.mark.parametrize(
    "arch, precision, hidden, queries, first",
    [
        ("sm_90", "bfloat16", 128, 64, 1),
        ("sm_80", "float16", 128, 64, 1),
        ("sm_90", "bfloat16", 129, 64, 0),
        ("sm_90", "bfloat16", 128, 65, 0),
        ("sm_90", "tf32", 64, 64, 1),
        ("sm_90", "tf32", 65, 64, 0),
        ("sm_86", "bfloat16", 128, 64, 0),  # no room for blocks of eight warps
        ("sm_86", "bfloat16", 64, 64, 1),
    ],
)
def test_the_keys_pass_comes_first_where_a_block_has_all(arch, precision, hidden, queries, first):
    sizes = SIZES | {"hidden": hidden, "queries": queries}
    made = _plan.plan(arch, **sizes, precision=precision, gradients=EVERYTHING)
    assert made["keys"]["first"] == first
    assert made["keys"]["warps"] == 8 or not first


def test_a_large_cache_holds_more_keys():
    few, many = (
        _plan.plan(arch, **SIZES | {"keys": 131_072}, gradients=EVERYTHING)["segment"]
        for arch in ("sm_86", "sm_90")
    )
    of_key = 2 * 128 + 8 + 64 * 2 * 4  # the key, its mask, norms and what belongs to them
    assert few * of_key <= 6 << 20 < 10 << 20 < many * of_key <= 16 << 20


@pytest.mark.parametrize("size", ["hidden", "relation_dim", "queries"])
def test_bytes_are_not_counted_around_32_bits(size):
    for more in (1 << 24, 1 << 26):  # 64 rows of so many numbers are 2^32 bytes, or a multiple
        sizes = SIZES | {size: more}
        made = _plan.plan("sm_90", **sizes, precision="float32", gradients=EVERYTHING)
        assert made == {"fits": False}


def test_what_does_not_fit_is_told():
    made = _plan.plan("sm_86", **SIZES | {"hidden": 20_000}, precision="float64")
    assert made == {"fits": False}
    assert "no plan" in _plan.describe("sm_86", made)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("arch", "sm_70", "arch: expected one of sm_80, .*, got 'sm_70'"),
        ("precision", "int8", "precision: expected one of float64, .*, got 'int8'"),
        ("gradients", ("bank",), "gradients: expected one of query, .*, got 'bank'"),
        ("anchors", 0, "anchors: expected 1 or more, got 0"),
    ],
)
def test_bad_input(name, value, message):
    arguments = {"arch": "sm_80", **SIZES} | {name: value}
    with pytest.raises(ValueError, match=rf"crrcd_ext\.plan: {message}"):
        _plan.plan(**arguments)


def test_command_line():
    command = [
        sys.executable,
        "-m",
        "crrcd_ext",
        "plan",
        "--arch",
        "sm_80",
        "--gradients",
        *EVERYTHING,
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "sm_80 (A100, 108 multiprocessors)" in out
    assert out.count("gram: warps") == 3
    bad = subprocess.run([*command[:4], "--keys", "0"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "keys: expected 1 or more, got 0" in bad.stderr
