"""The benchmarks compare like with like: same loss, same gradients, numbers that mean something."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import embedding_bag

from bench import difference_nce, instance_nce, losses, overhead
from bench.__main__ import main
from bench.baselines import BASELINES, make_step
from bench.embeddings import DTYPES, NEGATIVES, OBJECTIVES
from bench.measure import Copy, Exponentials, MatrixProduct, RowCopies, RowSums, Timing, interleave
from bench.memory import peak_extra_memory
from bench.problem import GRADIENTS, Shape, make_problem
from bench.relation_nce import Case as RelationCase
from bench.steps import EXCLUDING, OPERATOR
from bench.suite import Absent, Patience, best_baseline, run_case
from bench.table import markdown_table, terminal_table
from crrcd_ext import _backend

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
    case = RelationCase(SMALL, "float32", "all")
    names = [OPERATOR, "eager", "chunks + backward"]
    variants = run_case(case, names, backend="reference", memory=False)["variants"]
    assert "median_s" in variants[OPERATOR]  # the rest is not lost with it
    for name in names[1:]:
        said = variants[name]["skipped"]
        assert said.startswith("WRONG: gradients differ by 5") and "those of crrcd_ext" in said
        assert variants[name]["wrong"] and "median_s" not in variants[name]


@pytest.mark.parametrize(
    ("error", "said", "wrong"),
    [
        (torch.OutOfMemoryError("no memory"), "out of memory", False),
        (RuntimeError("no kernel\nmore"), "FAILED: no kernel", True),
    ],
)
def test_a_variant_that_fails_leaves_the_others(monkeypatch, error, said, wrong):
    def failing(problem, name, dtype, backend="cpu", chunk=512):
        def fail():
            raise error

        return fail if name == "eager" else make_step(problem, name, dtype, backend, chunk)

    monkeypatch.setattr("bench.relation_nce.make_step", failing)
    case = RelationCase(SMALL, "float32", "all")
    variants = run_case(case, [OPERATOR, "eager"], backend="reference", memory=False)["variants"]
    assert variants["eager"]["skipped"] == said and variants["eager"].get("wrong", False) == wrong
    assert "median_s" in variants[OPERATOR]


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


INSTANCE = instance_nce.Shape(queries=5, keys=37, dim=16, rows=50)
DIFFERENCE = difference_nce.Shape(anchors=4, queries=5, keys=37, dim=16, rows=50)
EMBEDDING_SHAPES = [
    pytest.param(instance_nce, INSTANCE, id="instance_nce"),
    pytest.param(difference_nce, DIFFERENCE, id="difference_nce"),
    pytest.param(difference_nce, replace(DIFFERENCE, anchors=5), id="difference_nce, A==B"),
]


def uncompiled(case):
    return [name for name in case.baselines if not case.compiled(name)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize(("command", "shape"), EMBEDDING_SHAPES)
def test_baselines_of_embeddings_compute_what_the_operator_computes(
    command, shape, negatives, objective, dtype
):
    case = command.Case(shape, negatives, objective, dtype)
    problem = case.make_problem()
    assert problem.bank.dtype == getattr(torch, dtype)
    expected_loss = case.make_step(problem, OPERATOR, "reference", 0)()
    expected = problem.gradients()
    assert len(uncompiled(case)) >= 3
    for name in uncompiled(case):
        loss = case.make_step(problem, name, "reference", 16)()  # 16 + 16 + 5 keys
        torch.testing.assert_close(loss, expected_loss)
        for key, gradient in problem.gradients().items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=name)


LOSS_SHAPE = losses.Shape(batch=5, keys=37, student_dim=6, teacher_dim=7, dim=16, rows=50)
LOSS_CASES = [
    pytest.param(losses.Case(replace(LOSS_SHAPE, rows=0 if job == "infonce" else 50), job), id=job)
    for job in losses.JOBS
]


@pytest.mark.parametrize("case", LOSS_CASES)
def test_training_steps_agree_and_leave_the_same_memories(case):
    problem = case.make_problem()
    before = [memory.clone() for memory in problem.memories]
    first = None
    for name in [OPERATOR, *uncompiled(case)]:
        truth = case.truth(problem, name)
        filled = len(problem.in_use)
        try:
            step = case.make_step(problem, name, "reference", 0)
        except Absent as absent:
            assert "pip install" in str(absent)
            continue
        memories = [*problem.in_use, problem.memories][filled]  # its own, if it has any
        for _ in range(2):  # what the first step changed does not reach the second
            loss = step()
            found = problem.gradients()
            after = [memory.clone() for memory in memories]
            if first is None:
                first = loss, found, after
                for old, new in zip(before, after, strict=True):
                    assert len((old != new).any(1).nonzero()) == case.shape.batch
            if not case.comparable(name):
                assert name == losses.MODULE and case.job != "infonce"
                assert all(gradient.norm() > 0 for gradient in found.values())
                torch.testing.assert_close(after, first[2], msg=name)
                continue  # of negatives of its own
            for key, gradient in (truth or first[1]).items():
                torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=name)
            if not truth:
                torch.testing.assert_close(loss, first[0], msg=name)
            torch.testing.assert_close(after, first[2], msg=name)


@pytest.mark.parametrize("package", ["lightly", "pytorch_metric_learning"])
def test_an_absent_package_is_named(package, small_meters, monkeypatch):
    for module in ("loss", "losses", "distances"):
        monkeypatch.setitem(sys.modules, f"{package}.{module}", None)
    name = package.replace("_", "-")
    case = losses.Case(replace(LOSS_SHAPE, rows=0), "infonce")
    result = run_case(case, [losses.EAGER, name], backend="reference", repeats=1, memory=False)
    assert result["variants"][name] == {"skipped": f"absent: pip install {name}"}


def test_what_does_not_fit_is_left_out(small_meters, monkeypatch):
    monkeypatch.setattr("bench.machine.available_bytes", lambda device: 4_000_000)
    case = difference_nce.Case(replace(DIFFERENCE, keys=1000), "own", "nce", "float32")
    # Two of [A, B, K, D] and four of [A, B, K] in float32.
    assert case.needed_bytes("public way") == 2 * 4 * 320_000 + 4 * 4 * 20_000
    variants = [OPERATOR, "public way"]
    result = run_case(case, variants, backend="reference", repeats=1, memory=False)
    assert result["variants"]["public way"] == {"skipped": "needs about 0 GB"}
    assert result["variants"][OPERATOR]["times_operator"] == 1


@pytest.mark.parametrize("threshold", [0.2, -2.0])
def test_similar_negatives_are_found_and_left_out(small_meters, monkeypatch, threshold):
    monkeypatch.setattr("bench.instance_nce.SIMILAR", threshold)
    monkeypatch.setattr("bench.baselines.SIMILAR", threshold)
    relation = RelationCase(Shape(4, 5, 37, 8, 8, 8, 40), "float32", "query")
    for case in (instance_nce.Case(INSTANCE, "own", "nce", "float32"), relation):
        names = [OPERATOR, EXCLUDING]
        plain, excluding = (
            float(case.make_step(case.make_problem(), name, "reference", 0)()) for name in names
        )
        assert excluding < plain
        if threshold < -1:  # all are: the positives are left
            problem = case.make_problem()
            cosine = (problem.query * problem.positive).sum(-1).detach()
            logit = problem.scale * cosine - problem.offset
            assert excluding == pytest.approx(float(torch.nn.functional.softplus(-logit).mean()))
        found = run_case(case, names, backend="reference", repeats=1, memory=False)["variants"]
        assert found[EXCLUDING]["times_operator"] > 0


def test_what_would_take_too_long_is_left_out():
    few = instance_nce.Case(INSTANCE, "shared", "nce", "float32")
    many, other = few.with_keys(370), replace(few, objective="infonce")
    patience = Patience(5.0)
    patience.learn(few, "eager", 1.0)
    assert patience.expected(many, "eager") == pytest.approx(10.0)
    assert patience.expected(many, "torch.compile") == 0
    assert patience.expected(other.with_keys(370), "eager") == 0


def test_patience_spares_the_operator(small_meters):
    patience = Patience(0.0)
    case = instance_nce.Case(INSTANCE, "shared", "nce", "float32")
    run = partial(run_case, backend="reference", repeats=1, memory=False, patience=patience)
    variants = [OPERATOR, "eager"]
    assert "median_s" in run(case, variants)["variants"]["eager"]
    again = run(case.with_keys(74), variants)["variants"]
    assert again["eager"] == {"skipped": "takes about 0 s"}
    assert "median_s" in again[OPERATOR]


def test_meters_read_the_rows_that_they_count(monkeypatch):
    bank = torch.arange(40.0).view(10, 4)
    index = torch.tensor([[3, 9, 3], [0, 1, 2]])
    copies = RowCopies(bank, index, length=4)
    copies()
    assert copies.buffer[:2].tolist() == bank[[1, 2]].tolist()  # the last piece
    found = []
    monkeypatch.setattr(
        "bench.measure.embedding_bag",
        lambda *arguments, **options: found.append(embedding_bag(*arguments, **options)),
    )
    sums = RowSums(bank.to(torch.bfloat16), index, length=4)
    sums()
    expected = [bank[[3, 9, 3, 0]].sum(0).tolist(), bank[[1, 2]].sum(0).tolist()]
    assert found[0].tolist() == expected
    assert (copies.amount, sums.amount) == (6 * 4 * 4, 6 * 4 * 2)


@pytest.fixture
def small_meters(monkeypatch):
    monkeypatch.setattr("bench.suite.Copy", partial(Copy, megabytes=1))
    for command in (instance_nce, difference_nce, losses):
        monkeypatch.setattr(command, "MatrixProduct", partial(MatrixProduct, size=64))
        monkeypatch.setattr(command, "Exponentials", partial(Exponentials, 64, 1))


@pytest.mark.parametrize("command", [instance_nce, difference_nce])
def test_commands_of_the_embedding_operators(command, small_meters, tmp_path, capsys):
    name = command.Case.command
    arguments = (
        f"{name} --backend reference --keys 16 32 --own-keys 8 16 --queries 4 --dim 8 --rows 40 "
        f"--repeats 3 --objective infonce --dtype bfloat16 --no-memory --output {tmp_path}"
    )
    variants = ["--variants", OPERATOR, "public way", "eager"]
    assert main([*arguments.split(), *variants]) == 0
    assert "Summary: negatives of each query, infonce, bfloat16 bank" in capsys.readouterr().out
    cases = json.loads((tmp_path / f"{name}.json").read_text())["cases"]
    assert [(case["negatives"], case["shape"]["keys"]) for case in cases] == [
        *(("shared", 16), ("shared", 32), ("own", 8), ("own", 16)),
    ]
    for case in cases:
        rows = case["shape"]["keys"] * (1 if case["negatives"] == "shared" else 4)
        assert case["row_bytes"] == rows * 8 * 2
        assert case["mm_gflops"] > 0 and case["rows_gb_s"] > 0 and case["exp_g_s"] > 0
        for variant in case["variants"].values():
            assert min(variant[f"{key}_fraction"] for key in ("mm", "exp", "rows")) > 0
    assert "| public way |" in (tmp_path / f"{name}.md").read_text()
    for negatives in NEGATIVES:
        picture = tmp_path / f"{name}-{negatives}-infonce-bfloat16-40.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_losses_command(small_meters, tmp_path, capsys):
    arguments = (
        "losses --backend reference --keys 8 16 --queue-keys 16 32 --batch 4 --student-dim 5 "
        f"--teacher-dim 6 --dim 8 --rows 40 --repeats 3 --no-memory --output {tmp_path}"
    )
    assert main([*arguments.split(), "--variants", OPERATOR, "public way", "eager"]) == 0
    assert "Summary: CRCD, two sides" in capsys.readouterr().out
    cases = json.loads((tmp_path / "losses.json").read_text())["cases"]
    # Operations of both sides, and an exponential for each logit.
    of_crd, of_crcd, of_infonce = (cases[place] for place in (0, 2, 4))
    assert of_crd["nominal_operations"] == 2 * 4 * 4 * 8 * 8
    assert of_crcd["nominal_operations"] == 2 * (4 + 2 * 4) * 4 * 8 * 8
    assert of_infonce["nominal_operations"] == 4 * 4 * 16 * 8
    counts = [case["exponentials"] for case in (of_crd, of_crcd, of_infonce)]
    assert counts == [2 * 4 * 8, 2 * 4 * 4 * 8, 4 * 16]
    # Both sides gather the positive and the negatives of every query; the queue is read once.
    assert (of_crd["row_bytes"], of_infonce["row_bytes"]) == (2 * 4 * 9 * 8 * 4, 16 * 8 * 4)
    for name in ("losses-crd-40", "losses-crcd-40", "losses-infonce"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_memory_of_a_training_step():
    case = losses.Case(losses.Shape(batch=8, keys=2048, dim=64, rows=500), "crd")
    gathered = 4 * 8 * 2049 * 64  # one side: 4.2 MB
    assert 2 * gathered < peak_extra_memory(case, "public way") < 6 * gathered


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


def test_overhead_times_calls_whose_kernels_are_left_out(capsys):
    assert main(["overhead", "--rounds", "20"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[1:] for row in rows if row and row[0].endswith("_nce")}
    assert set(found) == {"relation_nce", "difference_nce", "instance_nce"}
    assert all(float(bare) > 0 and float(whole) > 0 for bare, whole, _ in found.values())
    assert overhead.STUBBED not in _backend.COMPILED
