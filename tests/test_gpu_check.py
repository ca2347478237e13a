"""`python -m bench gpu_check`: limits, the report whatever happens, its scripts, without a GPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from bench import gpu_check, measure
from bench.__main__ import main
from bench.gpu_check import (
    bundle,
    correctness,
    counters,
    device,
    dry_run,
    first_launch,
    module,
    report,
    rows,
    sanitizers,
    stage,
    stages,
    times,
)
from bench.gpu_check.stage import ROOT, Job, Stage

USABLE = {"cuda": None, "triton": None}


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def emitting(row: dict, then: str = "") -> list[str]:
    """A job that writes one row, as the scripts do."""
    path = f"os.environ[{rows.VARIABLE!r}]"
    return python(f"import os, time; open({path}, 'a').write({json.dumps(row)!r} + '\\n'); {then}")


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "log").open("wb") as file:
        yield file


# ------------------------------------------------------------------------------------- the stages


def test_a_stage_ends_at_its_limit_and_keeps_its_rows(log, monkeypatch):
    monkeypatch.setattr(stage, "GRACE", 0.2)
    jobs = [
        Job("slow", emitting({"ok": True, "n": 1}, "time.sleep(60)")),
        Job(
            "deaf", python("import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)")
        ),
        Job("quick", emitting({"ok": True, "n": 2})),
    ]
    began = time.monotonic()
    done = stage.run_stage(Stage("s", 1.5, jobs), 1.5, log, USABLE)
    assert 1.0 < time.monotonic() - began < 4.0
    states = {job["name"]: job["status"] for job in done["jobs"]}
    assert states == {
        "quick": "done",
        "slow": "cut off at its limit",
        "deaf": "cut off at its limit",
    }
    assert {row["n"] for job in done["jobs"] for row in job["rows"]} == {1, 2}


def test_what_a_job_has_started_ends_with_it(log, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "GRACE", 0.2)
    place = str(tmp_path / "pid")
    child = f"import os, time; open({place!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    stage.run_stage(Stage("s", 2, [Job("parent", python(code))]), 2, log, USABLE)
    pid = int(Path(place).read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child is still there")


def test_jobs_one_after_the_other_and_those_without_time(log, monkeypatch):
    monkeypatch.setattr(stage, "GRACE", 0.2)
    jobs = [Job("a", python("")), Job("b", python("import time; time.sleep(60)")), Job("c", [])]
    done = stage.run_stage(Stage("s", 1.5, jobs, together=False), 1.5, log, USABLE)
    states = [(job["name"], job["status"]) for job in done["jobs"]]
    assert states == [("a", "done"), ("b", "cut off at its limit"), ("c", "left out: no time")]


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (("cuda",), "left out: no nvcc"),
        (("no-such-program",), "left out: no-such-program is not installed"),
        (("triton",), "done"),
    ],
)
def test_a_job_whose_needs_are_not_met_says_so(log, needs, reason):
    jobs = [Job("a", python(""), needs=needs)]
    done = stage.run_stage(Stage("s", 20, jobs), 20, log, {"cuda": "no nvcc", "triton": None})
    assert done["jobs"][0]["status"] == reason


def test_kernels_are_usable_when_the_module_stage_says_so():
    assert "has not found" in gpu_check.usable([])["cuda"]
    found = [
        {"kind": "backend", "backend": "cuda", "ok": False, "why": "the build failed"},
        {"kind": "backend", "backend": "triton", "ok": True, "why": ""},
    ]
    usable = gpu_check.usable([{"jobs": [{"rows": found}]}])
    assert usable["cuda"] == "the build failed" and usable["triton"] is None


def test_limits_of_the_plan():
    limits = {s.name: s.seconds for s in stages.plan()}
    without_build = sum(limits.values()) - limits["benchmarks"] - stages.BUILD_SECONDS - 40
    assert without_build <= gpu_check.MINUTES * 60 - 20  # something is left for benchmarks
    order = list(limits)
    assert order[:4] == ["device", "module", "correctness", "times"] and order[-1] == "benchmarks"


def test_the_plan_covers_what_it_promises():
    jobs = {s.name: [" ".join(job.command) for job in s.jobs] for s in stages.plan()}
    for backend in ("cuda", "triton"):
        for operator in correctness.OPERATORS:
            words = f"--operator {operator} --backend {backend}"
            assert sum(words in command for command in jobs["correctness"]) == 1
    tools = [command.split("--tool ")[1] for command in jobs["sanitizers"]]
    assert tools == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert all("on_cuda" in command for command in jobs["tests"])
    assert set(times.VARIANTS) == {"cuda", "triton", "eager", "torch.compile"}
    names = list(times.headline())
    assert any("A=64" in name for name in names) and any("A=8" in name for name in names)


def test_cases_of_correctness_are_every_combination():
    found = [case for o in correctness.OPERATORS for case in correctness.all_cases(o)]
    assert len(found) == len(set(found)) == 5 * (1 + 2 + 4 + 8 + 8 + 2) + 2 * (1 + 2 + 2)
    assert {case.precision for case in found} == {"bf16", "fp16", "tf32", "f32", "f64"}


# ------------------------------------------------------------------------------------- the report


def test_what_is_cut_off_is_a_failure_but_for_open_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "GRACE", 0.1)
    monkeypatch.setattr(gpu_check, "LEAST", 0.1)
    jobs = [Job("job", emitting({"ok": True}, "time.sleep(60)"))]
    plan = [Stage("hung", 1.5, jobs), Stage("endless", 1.5, jobs, open_ended=True)]
    assert gpu_check.run(plan, report.Report(tmp_path, device.about()), 60) == 1
    (failure,) = read(tmp_path)["failures"]
    assert failure["stage"] == "hung" and failure["what"].endswith("at its limit, after 1 rows")


def test_the_log_keeps_both_ends_of_much_output(log, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "LOGGED", 100)
    jobs = [Job("a", python("print('b' + 10_000 * 'x' + 'e')"))]
    stage.run_stage(Stage("s", 20, jobs), 20, log, USABLE)
    text = (tmp_path / "log").read_text()
    assert "\nbx" in text and text.endswith("xe\n") and len(text) < 500


def stub(number: int, seconds: float = 0.0) -> Stage:
    wrong = {
        "kind": "k",
        "case": f"case {number}",
        "ok": number % 2 == 0,
        "command": f"run {number}",
    }
    return Stage(f"stage {number}", 60, [Job("job", emitting(wrong, f"time.sleep({seconds})"))])


def read(folder: Path) -> dict:
    """The report as JSON, after a look at the other one, which is written after it."""
    markdown = (folder / "gpu_check.md").read_text()
    document = json.loads((folder / "gpu_check.json").read_text())
    assert markdown.startswith("# gpu_check\n") and "## Stages" in markdown
    for found in document["stages"][:-1]:
        assert f"| {found['name']} |" in markdown
    return document


def test_a_failing_stage_is_reported_first_and_the_next_goes_on(tmp_path, capsys):
    made = report.Report(tmp_path, device.about())
    assert gpu_check.run([stub(0), stub(1), stub(2)], made, 60) == 1
    document = read(tmp_path)
    assert [s["name"] for s in document["stages"]] == ["stage 0", "stage 1", "stage 2"]
    assert document["state"] == "finished"
    assert document["failures"] == [{"stage": "stage 1", "what": "case case 1", "command": "run 1"}]
    markdown = (tmp_path / "gpu_check.md").read_text()
    assert markdown.index("run 1") < markdown.index("## Stages") < markdown.index("## stage 0")
    assert "WRONG  case case 1" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_job_that_dies_is_a_failure_with_its_last_line(tmp_path):
    made = report.Report(tmp_path, device.about())
    stages_ = [Stage("s", 20, [Job("job", python("raise ValueError('no luck')"))])]
    assert gpu_check.run(stages_, made, 60) == 1
    (failure,) = read(tmp_path)["failures"]
    assert failure["what"] == "job: FAILED, status 1: ValueError: no luck"
    assert "no luck" in (tmp_path / "gpu_check.log").read_text()


def in_a_process(folder: Path) -> None:
    """Forty stages; what is said goes to a file."""
    gpu_check.say = lambda text: (folder / "said").open("a").write(text + "\n")
    gpu_check.run([stub(n, 0.2) for n in range(40)], report.Report(folder, ABOUT), 60)


ABOUT = {"command": "c", "date": "d", "commit": None, "device": "x", "cpu": "x", "cores": 1}
ABOUT |= {"threads": 1, "memory_gib": 1, "torch": "t", "crrcd_ext": {"compiled": False}}


def test_a_kill_at_any_moment_leaves_a_report_of_all_finished_stages(tmp_path):
    """Ten times SIGKILL, twice SIGTERM, at moments drawn at random."""
    drawn = random.Random(0)
    for number, kill in enumerate([signal.SIGKILL] * 10 + [signal.SIGTERM] * 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        driver = multiprocessing.get_context("fork").Process(target=in_a_process, args=(folder,))
        driver.start()
        while not (folder / "said").exists():
            time.sleep(0.01)
        time.sleep(1.5 * drawn.random())
        os.kill(driver.pid, kill)
        driver.join(30)
        said = (folder / "said").read_text()
        document = read(folder)
        # A stage that has just begun has no job yet.
        status = [s["jobs"][0]["status"] if s["jobs"] else "begun" for s in document["stages"]]
        ended = [s for s, of in zip(document["stages"], status, strict=True) if of == "done"]
        assert len(ended) >= said.count("; job: done")  # all that it has said to be done
        assert [s["name"] for s in ended] == [f"stage {n}" for n in range(len(ended))]
        if kill == signal.SIGTERM:
            assert document["state"].startswith("stopped by SIGTERM")
            assert status[-1] in ("begun", "done", "stopped")


def test_stages_that_use_up_their_limits_end_in_time(tmp_path, monkeypatch):
    """The plan at a fiftieth of its limits, every job of which would run for ever."""
    monkeypatch.setattr(stage, "GRACE", 0.1)
    monkeypatch.setattr(gpu_check, "LEAST", 0.2)
    for_ever = python("import time; time.sleep(600)")
    scaled = [
        Stage(s.name, s.seconds / 50, [Job(job.name, for_ever) for job in s.jobs[:2]])
        for s in stages.plan()
    ]
    began = time.monotonic()
    gpu_check.run(scaled, report.Report(tmp_path, device.about()), gpu_check.MINUTES * 60 / 50)
    assert time.monotonic() - began < 480 / 50 + 2
    found = read(tmp_path)["stages"]
    assert [s["name"] for s in found] == [s.name for s in scaled]
    assert found[3]["jobs"][0]["status"] == "cut off at its limit"


def test_half_a_row_is_none(tmp_path):
    path = tmp_path / "rows"
    path.write_text('{"a": 1}\n{"b": ')
    assert rows.read(path) == [{"a": 1}]
    assert rows.read(tmp_path / "nothing") == []


# ----------------------------------------------------------------------------- what a machine lacks


def smi(monkeypatch, **answers: list[list[str]]) -> None:
    monkeypatch.setattr(
        device, "nvidia_smi", lambda query, fields: answers[query.replace("-", "_")]
    )


def test_without_a_gpu_it_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    smi(monkeypatch, gpu=[])
    assert main(["gpu_check", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "torch sees no GPU here, nor does nvidia-smi" in said[0]
    assert "--dry-run" in said[0] and not list(tmp_path.iterdir())


def test_an_old_driver_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    smi(monkeypatch, gpu=[["NVIDIA H200", "535.1"]])
    assert "its driver, 535.1, is too old" in device.problem()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build without CUDA" in device.problem()


def test_a_process_of_somebody_else_on_the_gpu_is_named(monkeypatch):
    monkeypatch.setenv("CRRCD_CHECK_PID", "7")
    smi(monkeypatch, compute_apps=[["7", "python3", "1 MiB"], ["9", "train.py", "80000 MiB"]])
    assert device.others() == ["train.py (process 9, 80000 MiB)"]


def test_what_was_brought_along_has_to_fit(tmp_path, monkeypatch):
    manifest = tmp_path / "manifest.json"
    assert "nothing was brought along" in module.mismatch(manifest, "9.0")
    right = module.described("9.0")
    manifest.write_text(json.dumps(right))
    assert module.mismatch(manifest, "9.0") is None
    assert module.mismatch(manifest, "8.0").startswith("architecture is 8.0 here")
    for key in right:
        manifest.write_text(json.dumps({**right, key: "other"}))
        assert module.mismatch(manifest, "9.0").startswith(f"{key} is ")


def test_sources_decide_whether_a_module_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "csrc" / "a.cu").write_text("1")
    before = module.digest()
    (tmp_path / "csrc" / "a.cu").write_text("2")
    assert module.digest() != before


def test_a_failed_build_is_no_silent_change_to_triton(monkeypatch):
    monkeypatch.setattr(module, "launches", lambda backend: "no kernel image")
    monkeypatch.setattr(module, "mismatch", lambda *_: "nothing was brought along")
    monkeypatch.setattr(module, "build", lambda *_: "there is no nvcc to build with")
    why, origin = module.find_cuda("9.0", 10)
    assert "nothing was brought along; there is no nvcc" in why and not origin
    monkeypatch.setattr(module, "build", lambda *_: None)
    assert module.find_cuda("9.0", 10)[0].endswith("no kernel image")
    monkeypatch.setattr(module, "launches", lambda backend: None)
    assert module.find_cuda("9.0", 10)[0] is None


def test_a_wrong_kernel_is_not_built_again(monkeypatch, tmp_path):
    (tmp_path / "crrcd_ext").mkdir()
    (tmp_path / "crrcd_ext" / "_C.so").write_text("")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "launches", lambda backend: "RuntimeError: an illegal access")
    monkeypatch.setattr(module, "build", None)  # would raise
    assert module.find_cuda("9.0", 10) == ("RuntimeError: an illegal access", "was here")


def test_one_operator_that_fails_leaves_its_backend_usable(monkeypatch, tmp_path):
    monkeypatch.setenv(rows.VARIABLE, str(tmp_path / "rows"))
    right = correctness.call

    def call(case, given, backend):
        if case.operator != "relation":
            raise RuntimeError("no luck\nmore")
        return right(case, given, backend)

    monkeypatch.setattr(correctness, "call", call)
    assert first_launch.main("reference", "cpu") == 0
    found = rows.read(tmp_path / "rows")
    assert [row["ok"] for row in found] == [True] + [False] * (len(correctness.OPERATORS) - 1)
    assert found[1]["note"] == "RuntimeError: no luck"
    monkeypatch.setattr(correctness, "OPERATORS", ("instance_nce",))
    assert first_launch.main("reference", "cpu") == 1


def test_triton_finds_the_kernels_that_were_brought_along(tmp_path, monkeypatch):
    made, packed = tmp_path / "made", tmp_path / "triton.tar.xz"
    (made / "KEY").mkdir(parents=True)
    listing = {"child_paths": {"k.cubin": "/elsewhere/KEY/k.cubin"}}
    (made / "KEY" / "__grp__k.json").write_text(json.dumps(listing))
    with tarfile.open(packed, "w:xz") as file:
        file.add(made, ".")
    monkeypatch.setattr(module, "PACKED", packed)
    monkeypatch.setattr(module, "UNPACKED", tmp_path / "there")
    module.unpack()
    paths = json.loads((tmp_path / "there" / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert paths == {"k.cubin": str(tmp_path / "there" / "KEY" / "k.cubin")}


def test_the_bundle_is_weighed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(500_000))
    assert bundle.megabytes(tmp_path) == 0.5


# ------------------------------------------------------------------------------------ its scripts


@pytest.mark.parametrize("operator", correctness.OPERATORS)
def test_correctness_on_the_cpu(operator, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(rows.VARIABLE, str(tmp_path / "rows"))
    found = [c for c in correctness.all_cases(operator) if c.precision in ("f64", "bf16")]
    assert correctness.run(found, "reference", "cpu", True, str) is None
    written = rows.read(tmp_path / "rows")
    assert len(written) == len(found) and all(row["ok"] is True for row in written)
    assert [row["command"] for row in written] == [str(n) for n in range(len(found))]


def test_correctness_sees_a_wrong_gradient_and_other_bits(monkeypatch):
    case = correctness.Case("instance_nce", "f32", "all", "nce", "own")
    right = correctness.call

    def wrong(case, given, backend):
        made = right(case, given, "reference")
        if backend == "wrong":
            made["query"][0, 0] *= 1.01
        if backend == "restless":
            made["bank"] += 1e-9 * torch.rand(())
        return made

    monkeypatch.setattr(correctness, "call", wrong)
    row = correctness.check(case, "wrong", "cpu", True)
    assert row["ok"] is False and row["worst"] == "query" and row["error"] > row["allowed"]
    row = correctness.check(case, "restless", "cpu", True)
    assert row["ok"] is False and row["not repeated"] == "3 of 3"
    assert correctness.check(case, "reference", "cpu", True)["ok"] is True


def test_correctness_goes_on_after_memory_runs_out_and_stops_with_a_lost_device(
    monkeypatch, tmp_path
):
    monkeypatch.setenv(rows.VARIABLE, str(tmp_path / "rows"))
    raised = iter([torch.OutOfMemoryError("CUDA out of memory\nmore"), RuntimeError("assert")])

    def check(*_):
        raise next(raised)

    monkeypatch.setattr(correctness, "check", check)
    monkeypatch.setattr(correctness, "is_lost", lambda device: True)
    found = list(correctness.all_cases("relation"))
    assert correctness.run(found, "cuda", "cuda", True, str) == 1
    written = rows.read(tmp_path / "rows")
    assert [row["ok"] for row in written] == [None, False]
    assert written[0]["worst"] == "out of memory: CUDA out of memory"


def test_headline_times_on_the_cpu(monkeypatch):
    monkeypatch.setattr(times, "SECONDS", 0.01)
    monkeypatch.setitem(times.VARIANTS, "ours", (times.OPERATOR, "reference"))
    for turn in times.turns(times.headline(small=True), "cpu"):
        for variant in ("eager", "ours"):
            row = turn.row(variant)
            assert row["ok"] is True and row["ms"] > 0 and row["host ms"] > 0, row
        assert row["differs"] > 0 or turn.first is not None


def test_a_variant_that_cannot_run_is_a_row(monkeypatch):
    (turn,) = times.turns({"n": next(iter(times.headline(small=True).values()))}, "cpu")
    row = turn.row("cuda")
    assert row["ok"] is False and "backend 'cuda'" in row["note"]


def test_counters_are_read_from_what_ncu_prints():
    text = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","void relation_logits<3>(Params)","SOL","Duration","us","215.3"
"0","1","void relation_logits<3>(Params)","SOL","Memory Throughput","%","71.2"
"0","1","void relation_logits<3>(Params)","SOL","Unknown","%","1"
"1","1","own_entries(Params)","SOL","Duration","us","90"
"""
    assert list(counters.parsed(text)) == [
        {"kernel": "relation_logits<3>", "duration": "215.3 us", "memory %": "71.2"},
        {"kernel": "own_entries", "duration": "90 us"},
    ]


def test_what_a_sanitizer_finds_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv(rows.VARIABLE, str(tmp_path / "rows"))
    lines = [
        "========= COMPUTE-SANITIZER",
        "calls=10  of=115",
        "========= Invalid __global__ read of size 4 bytes",
        "=========     at crrcd::own_entries",
        "========= ERROR SUMMARY: 1 error",
    ]
    sanitizers.tell("memcheck", lines)
    found = rows.read(tmp_path / "rows")
    assert [row["ok"] for row in found] == [False, False]
    assert found[0]["what"] == "Invalid __global__ read of size 4 bytes"
    assert "--tool memcheck" in found[0]["command"]
    sanitizers.tell(
        "racecheck", ["========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"]
    )
    assert rows.read(tmp_path / "rows")[2]["ok"] is True


def test_names_of_kernels_without_what_surrounds_them():
    long = "void crrcd::cuda::<unnamed>::relation_keys<(crrcd::cuda::Precision)3>(crrcd::P, int)"
    assert counters.short(long) == "relation_keys<(Precision)3>"
    assert counters.short("own_entries(Params)") == "own_entries"
    assert counters.short("own_entries") == "own_entries"


class Event:
    order: ClassVar[list[str]] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.order.append("event")

    def synchronize(self):
        self.order.append("wait")

    def elapsed_time(self, other):
        return 1500.0  # milliseconds


def test_times_of_a_gpu_are_between_two_events(monkeypatch):
    order = Event.order = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("idle"))
    assert measure.time_once(partial(order.append, "step"), "cuda") == 1.5
    assert order == ["idle", "event", "step", "event", "wait"]
    measure.time_once(partial(order.append, "step"), "cpu")
    assert order[5:] == ["step"]


def test_a_device_that_is_not_there_is_one_clear_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["instance_nce", "--device", "cuda"]) == 1
    assert "bench: --device cuda: torch sees no CUDA device" in capsys.readouterr().err


def test_pytest_tells_failures_and_counts_as_rows(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\n\n\ndef test_good():\n    pass\n\n\ndef test_bad():\n    assert 1 == 2\n"
        "\n\n@pytest.mark.skip\ndef test_left_out():\n    pass\n"
    )
    environment = os.environ | {
        rows.VARIABLE: str(tmp_path / "rows"),
        "PYTHONPATH": str(ROOT),
        "PYTEST_ADDOPTS": "",
    }
    plugin = ["-p", "bench.gpu_check.pytest_rows", "-p", "no:cacheprovider", "-n", "2"]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugin, "test_x.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    *written, counts = rows.read(tmp_path / "rows")
    (failed,) = [row for row in written if row["kind"] == "test"]
    assert failed["test"] == "test_x.py::test_bad" and failed["what"] == "assert 1 == 2"
    assert failed["ok"] is False and failed["command"].endswith("-m pytest 'test_x.py::test_bad'")
    assert counts == {"kind": "tests so far", "passed": 1, "failed": 1, "skipped": 1}


# ------------------------------------------------------------------------------------ the dry run


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["python", "-m", "pytest", "tests/test_nothing.py"], "no file tests/test_nothing.py"),
        (
            ["python", "-m", "pytest", "tests/test_device.py::test_x"],
            "test_device.py has no test_x",
        ),
        (["x", "python", "-m", "bench.gpu_check.nothing"], "no module bench.gpu_check.nothing"),
        (["python", "-m", "bench", "instance_nce", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_what_a_command_lacks_is_named(command, message):
    (found,) = dry_run.missing([command])
    assert message in found


def test_all_that_the_stages_start_exists():
    assert dry_run.missing([job.command for s in stages.plan() for job in s.jobs]) == []


def test_the_dry_run_of_commands_and_sizes(tmp_path):
    words = ["gpu_check", "--dry-run", "--stages", "commands", "--output", str(tmp_path)]
    assert main(words) == 0
    document = json.loads((tmp_path / "gpu_check_dry_run.json").read_text())
    assert [s["name"] for s in document["stages"]] == ["module", "commands and sizes"]
    assert document["failures"] == [] and document["state"] == "finished"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "nothing"], "--stages: expected some of device, module, "),
        (["--minutes", "0"], "--minutes: expected a positive number, got 0.0"),
    ],
)
def test_arguments_are_checked(words, message, capsys):
    assert main(["gpu_check", *words]) == 1
    assert message in capsys.readouterr().err
