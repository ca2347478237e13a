"""The benchmarks compare like with like: same loss, same gradients, numbers that mean something."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench.__main__ import main
from bench.baselines import BASELINES, make_step
from bench.measure import Copy, MatrixProduct, Timing, interleave
from bench.memory import peak_extra_memory
from bench.problem import GRADIENTS, Shape, make_problem
from bench.relation_nce import Case as RelationCase
from bench.steps import OPERATOR
from bench.suite import best_baseline, run_case
from bench.table import markdown_table, terminal_table

SMALL = Shape(anchors=5, queries=7, keys=37, hidden=24, relation=16, bank_dim=20, rows=50)
UNCOMPILED = [name for name, (_, compiled) in BASELINES.items() if not compiled]


@pytest.mark.parametrize("grads", list(GRADIENTS))
@pytest.mark.parametrize("name", UNCOMPILED)
@pytest.mark.parametrize(
    "shape", [SMALL, replace(SMALL, queries=SMALL.anchors)], ids=["A!=B", "A==B"]
)
def test_baselines_compute_what_the_operator_computes(name, grads, shape):
    problem = make_problem(shape, grads)
    expected_loss = make_step(problem, OPERATOR, "float32", "reference")()
    expected = problem.gradients()
    loss = make_step(problem, name, "float32", chunk=16)()  # 16 + 16 + 5 keys
    torch.testing.assert_close(loss, expected_loss)
    assert set(expected) == set(GRADIENTS[grads])
    for key, gradient in problem.gradients().items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=key)


def test_autocast_baselines_stay_close_to_the_float32_loss():
    problem = make_problem(SMALL)
    expected = make_step(problem, "eager", "float32")()
    for name in UNCOMPILED:
        loss = make_step(problem, name, "bfloat16", chunk=16)()
        torch.testing.assert_close(loss.float(), expected, rtol=2e-2, atol=0)


def test_only_the_gradients_asked_for_are_computed():
    problem = make_problem(SMALL, "query")
    make_step(problem, "chunks + checkpoint", "float32", chunk=16)()
    assert problem.query.grad is not None
    assert problem.weight.grad is None and problem.key_weight.grad is None


def test_nominal_operations_of_the_requirement():
    base = Shape()
    forward_and_backward = 6 * 64 * 4096 * 128 * 128 + 6 * 64 * 64 * 4096 * 128
    assert base.nominal_operations("all") == forward_and_backward
    assert base.nominal_operations("query") == 2 * 64 * 4096 * 128 * 128 + 4 * 64 * 64 * 4096 * 128


def test_interleaving_gives_every_step_its_turn_in_every_place():
    order = []
    timings = interleave({name: lambda name=name: order.append(name) for name in "abc"}, repeats=3)
    assert "".join(order) == "abcbcacab"
    assert all(len(timing.seconds) == 3 for timing in timings.values())
    # The budget is spent at once, and still three rounds are made.
    assert len(interleave({"a": lambda: None}, repeats=9, budget=0.0)["a"].seconds) == 3


def test_ratio_is_taken_round_by_round():
    # The machine became ten times slower in the last round: the ratio does not notice.
    mine, theirs = Timing([1.0, 1.0, 10.0]), Timing([2.0, 2.0, 20.0])
    assert theirs.ratio_to(mine) == 2.0


def test_disagreeing_variants_are_not_compared(monkeypatch):
    def half(problem, name, dtype, backend="cpu", chunk=512):
        step = make_step(problem, name, dtype, backend, chunk)

        def wrong():
            step()
            if name != OPERATOR:
                problem.query.grad.mul_(0.5)

        return wrong

    monkeypatch.setattr("bench.relation_nce.make_step", half)
    with pytest.raises(
        RuntimeError, match=r"eager and crrcd_ext disagree .* gradients differ by 5"
    ):
        case = RelationCase(SMALL, "float32", "all")
        run_case(case, [OPERATOR, "eager"], backend="reference", memory=False)


def test_peak_memory_sees_what_is_allocated():
    shape = replace(SMALL, anchors=16, keys=4096, hidden=64, relation=64)
    tensor = 4 * shape.anchors * shape.keys * shape.relation  # one of [A, K, R]: 16.8 MB
    case = RelationCase(shape, "float32", "all")
    eager = peak_extra_memory(case, "eager")
    chunked = peak_extra_memory(case, "chunks + checkpoint", chunk=256)
    assert 2 * tensor < eager < 12 * tensor
    assert chunked < tensor


def test_command_line_writes_table_json_and_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bench.relation_nce.MatrixProduct", partial(MatrixProduct, size=64))
    monkeypatch.setattr("bench.suite.Copy", partial(Copy, megabytes=1))
    arguments = (
        "relation_nce --backend reference --keys 16 32 --anchors 4 --queries 4 --hidden 8 "
        "--relation 8 --bank-dim 8 --rows 40 --repeats 3 --dtype float32 --grads all query "
        f"--no-memory --output {tmp_path}"
    )
    variants = ["--variants", OPERATOR, "eager", "chunks + backward"]
    assert main([*arguments.split(), *variants]) == 0
    printed = capsys.readouterr().out
    assert "Summary: float32, gradients: query" in printed
    document = json.loads((tmp_path / "relation_nce.json").read_text())
    assert {"command", "date", "cpu", "cores", "torch", "commit"} <= set(document["about"])
    assert len(document["cases"]) == 4
    case = document["cases"][0]
    assert case["mm_gflops"] > 0 and case["copy_gb_s"] > 0
    assert set(case["variants"]) == {OPERATOR, "eager", "chunks + backward"}
    assert all(len(result["seconds"]) == 3 for result in case["variants"].values())
    assert best_baseline(case, ("eager",))[0] == "eager"
    assert "| eager |" in (tmp_path / "relation_nce.md").read_text()
    for grads in ("all", "query"):
        picture = tmp_path / f"relation_nce-float32-{grads}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_module_step_command(tmp_path, capsys):
    arguments = (
        "module_step --backend reference --anchors 2 all --batch 6 --negatives 16 --samples 40 "
        f"--repeats 3 --output {tmp_path}"
    )
    assert main(arguments.split()) == 0
    assert "over operator" in capsys.readouterr().out
    cases = json.loads((tmp_path / "module_step.json").read_text())["cases"]
    assert [case["anchors"] for case in cases] == [2, None]


def test_an_unavailable_backend_is_one_clear_line(tmp_path, capsys):
    assert main(["module_step", "--backend", "nosuch", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bench: ") and "nosuch" in error


def test_tables():
    header, rows = ["", "ms"], [["a", "1.0"], ["long name", "12.5"]]
    assert terminal_table(header, rows).splitlines() == [
        "             ms",
        "---------  ----",
        "a           1.0",
        "long name  12.5",
    ]
    assert markdown_table(header, rows).splitlines()[1] == "| --- | ---: |"
