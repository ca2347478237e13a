"""`python -m bench gpu_check`: what it would start exists, and its report, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import gpu_check, measure
from bench.__main__ import main
from bench.gpu_check import Step
from bench.steps import OPERATOR


def plan() -> list[Step]:
    return gpu_check.steps("cuda", "9.0a", Path("somewhere"))


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu_check", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("gpu-check: torch sees no GPU here") and "exists" in printed[0]
    assert not list(tmp_path.iterdir())


def test_everything_that_it_starts_exists():
    assert gpu_check.missing(plan()) == []
    words = [word for step in plan() for word in step.command]
    for operator in ("relation_nce", "difference_nce", "instance_nce"):
        assert f"tests/test_{operator}.py" in words and operator in words
    variants = words[words.index("--variants") :]
    assert {OPERATOR, "eager", "torch.compile", "chunks + checkpoint"} <= set(variants)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["-m", "pytest", "tests/test_nothing.py"], "s: no file tests/test_nothing.py"),
        (["-m", "pytest", "tests/test_device.py::test_x"], "s: tests/test_device.py has no test_x"),
        (["nothing.py", "build_ext"], "s: no file nothing.py"),
        (["-m", "bench", "instance_nce", "--colour", "red"], "unrecognized arguments: --colour"),
        (["-m", "bench", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_what_is_missing_is_named(command, message, monkeypatch, capsys):
    step = Step("s", [sys.executable, *command])
    (found,) = gpu_check.missing([step])
    assert message in found
    monkeypatch.setattr(gpu_check, "steps", lambda *_: [step])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu_check"]) == 1
    assert message in capsys.readouterr().err


def test_architectures():
    found = [gpu_check.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))]
    assert found == ["8.0", "8.9", "9.0a", "10.0a", "12.0a"]


def test_a_run_goes_on_after_a_failure_and_reports_all(tmp_path, capsys):
    """The whole way with the CPU in the GPU's place, at small sizes."""
    bench = (
        f"-m bench instance_nce --device cpu --backend reference --keys 16 --negatives shared "
        f"--objective nce --dtype float32 --queries 4 --dim 8 --rows 40 --repeats 3 --no-memory "
        f"--output {tmp_path} --variants"
    ).split()
    bench += [OPERATOR, "eager", "chunks + checkpoint"]
    steps = [
        Step("good", [sys.executable, "-c", "pass"]),
        Step("bad", [sys.executable, "-c", "raise SystemExit(3)"]),
        Step("absent", ["no-such-tool"], tool="no-such-tool"),
        Step("bench instance_nce", [sys.executable, *bench], result="instance_nce"),
        Step(
            "bench instance_nce, triton",
            [sys.executable, *bench[:-5], str(tmp_path / "triton"), "--variants", OPERATOR],
            result="triton/instance_nce",
            backend="triton",
        ),
    ]
    options = argparse.Namespace(device="cpu", output=tmp_path, threads=1)
    assert gpu_check.run(steps, options, size=64, megabytes=1) == 1
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    states = {step["name"]: step["status"] for step in document["steps"]}
    assert states == {
        "good": "done",
        "bad": "FAILED, status 3",
        "absent": "left out: no-such-tool is not installed",
        "bench instance_nce": "done",
        "bench instance_nce, triton": "done",
    }
    assert set(document["ceilings"]) == {"copy", "float32", "tf32", "bfloat16"}
    assert min(document["ceilings"].values()) > 0
    (case,) = document["benchmarks"]["instance_nce"]
    (label,) = document["triton_seconds"]
    assert label == gpu_check.title("instance_nce", case)
    row = gpu_check.case_row("instance_nce", case, document["ceilings"], document["triton_seconds"])
    assert all(row[place] for place in (1, 2, 3, 4, 6, 7)) and row[5] == ""
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| bad | FAILED, status 3 |" in text and f"| {row[0]} |" in text
    assert gpu_check.run(steps[:1], options, size=64, megabytes=1) == 0


def test_a_row_in_numbers():
    case = {
        "shape": {"queries": 4},
        "dtype": "bfloat16",
        "grads": "all",
        "nominal_operations": 4e9,
        "row_bytes": 1e9,
        "variants": {
            OPERATOR: {"median_s": 0.01, "peak_bytes": 2_000_000},
            "eager": {"times_operator": 3.0},
            "torch.compile": {"skipped": "needs about 9 GB"},
            "chunks + checkpoint": {"times_operator": 5.0},
            "compiled chunks + checkpoint": {"times_operator": 4.0},
        },
    }
    limits = {"copy": 400.0, "float32": 1000.0, "tf32": 2000.0, "bfloat16": 4000.0}
    label = "relation_nce, bfloat16, all, queries=4"
    row = gpu_check.case_row("relation_nce", case, limits, {label: 0.025})
    assert row[0] == label
    assert row[1:] == ["10.0", "0.25", "0.10", "3.00", "", "4.00", "2.50", "2.0"]
    # The bank's storage is not the operands' type.
    assert gpu_check.case_row("instance_nce", case, limits, {})[3] == "0.40"
    assert gpu_check.case_row("instance_nce", {**case, "variants": {}}, limits, {}) is None


def test_times_of_a_gpu_wait_for_it(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    measure.time_once(partial(order.append, "step"), "cuda")
    assert order == ["wait", "step", "wait"]
    measure.time_once(partial(order.append, "step"), "cpu")
    assert order[3:] == ["step"]


def test_a_device_that_is_not_there_is_one_clear_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["instance_nce", "--device", "cuda"]) == 1
    assert "bench: --device cuda: torch sees no CUDA device" in capsys.readouterr().err
