"""The command line as a user meets it: one-line errors, Ctrl-C, a study and its report."""

from __future__ import annotations

import html.parser
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import idx_files
from test_train_loop import SMALL

from crrcd_train import checkpoint, runs
from crrcd_train.__main__ import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return idx_files.write(tmp_path_factory.mktemp("files"))


@pytest.fixture
def common(files: Path, tmp_path: Path) -> list[str]:
    torch.set_num_threads(1)
    return ["--set", *SMALL, f"data.source={files}", f"data.root={tmp_path / 'data'}"]


def start(arguments: list[str]) -> subprocess.Popen:
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "crrcd_train", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupt_once_under_way(process: subprocess.Popen, metrics: Path) -> tuple[str, str]:
    """Sends SIGINT when three epochs stand in the metrics; returns stdout and stderr."""
    limit = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "training did not begin"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=120)


def test_ctrl_c_leaves_a_usable_checkpoint(common: list[str], tmp_path: Path) -> None:
    arguments = ["distill", "--method", "ce", *common, "optim.epochs=150", "--output"]
    process = start([*arguments, str(tmp_path / "parts")])
    _, errors = interrupt_once_under_way(process, tmp_path / "parts" / "metrics.csv")
    assert process.returncode == 130
    assert "run the same command again with --resume to go on" in errors
    assert "Traceback" not in errors
    stopped = checkpoint.load(tmp_path / "parts" / checkpoint.FILE)
    assert stopped["config"]["run"]["method"] == "ce"
    assert 0 < stopped["step"] < stopped["steps"]
    assert main([*arguments, str(tmp_path / "parts"), "--resume"]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    one, other = (
        checkpoint.load(tmp_path / name / checkpoint.FILE)["modules"]["model"]
        for name in ("parts", "whole")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_study_is_interrupted_completed_and_reported(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "study"
    file = tmp_path / "study.toml"
    file.write_text(
        '[study]\nmethods = ["ce", "crrcd", "few"]\nseeds = [0, 1]\nsizes = [7]\nworkers = 2\n'
        '[study.variants.few]\nmethod = "crrcd"\nset = { "crrcd.negatives" = 8 }\n'
        "[study.size_overrides.7]\nstudent.width = 6\n"
    )
    arguments = ["study", str(file), *common, "optim.epochs=20", "--output", str(output)]
    process = start(arguments)
    metrics = output / "7x7" / "crrcd" / "seed0" / "metrics.csv"
    _, errors = interrupt_once_under_way(process, metrics)
    assert process.returncode == 130
    assert "run the same command again to go on" in errors
    assert "Traceback" not in errors
    assert checkpoint.exists(metrics.parent / checkpoint.FILE)
    assert not (metrics.parent / runs.RESULT).exists()

    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| 7 x 7 | crrcd | 2 |" in printed
    assert f"report: {output / 'report' / 'report.html'}" in printed
    results = {path: path.stat().st_mtime_ns for path in output.glob("7x7/*/*/result.json")}
    assert len(results) == 6
    assert json.loads((output / "study.json").read_text())["seconds"] > 0
    settings = runs.read_result(output / "7x7" / "few" / "seed1")["config"]
    assert settings["student"]["width"] == 6 and settings["crrcd"]["negatives"] == 8

    report = output / "report"
    names = {"accuracy", "curves", "diagnostics", "tsne", "cosines"}
    for name in names:
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (report / "report.html").read_text()
    found = _Page()
    found.feed(page)
    assert found.images == len(names) and found.outside == []
    for text in ("optim.epochs = 20", "crrcd-train study", "torch: ", "<td>crrcd</td>", "gain"):
        assert text in page
    assert (report / "table.md").read_text().count("\n") == 2 + 1 + 3  # head, teacher, methods

    # Again: nothing is repeated, the report is made anew.
    assert main(arguments) == 0
    assert "6 of 6 runs are finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert main(["report", str(output)]) == 0
    assert main(["evaluate", str(output / "7x7" / "crrcd" / "seed0")]) == 0
    assert "Ankle boot" in capsys.readouterr().out
    found = json.loads((output / "7x7" / "crrcd" / "seed0" / "evaluation.json").read_text())
    assert found["test"] == runs.read_result(output / "7x7" / "crrcd" / "seed0")["test"]

    # Other settings in the same folder are refused.
    assert main([*arguments, "--set", "optim.lr=0.3"]) == 2
    assert "holds a run with other settings (optim.lr: 0.1 -> 0.3)" in capsys.readouterr().err


class _Page(html.parser.HTMLParser):
    """Counts embedded pictures and lists what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.outside = 0, []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href"):
                if (value or "").startswith("data:image/png;base64,"):
                    self.images += 1
                else:
                    self.outside.append(value)


@pytest.mark.parametrize("command", ["teacher", "distill", "study"])
def test_unwritable_output_folder(
    command: str, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert main([command, *common, "--output", str(tmp_path / "file" / "runs")]) == 2
    _one_line(capsys, "output folder", "cannot be written (Not a directory)")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["distill", "--set", "optim.lrr=1", "--output", "{tmp}"], "did you mean optim.lr?"),
        (["study", "{tmp}/none.toml", "--output", "{tmp}"], "No such file"),
        (["study", "a", "--config", "b", "--output", "{tmp}"], "given twice"),
        (["evaluate", "{tmp}/none"], "no folder"),
        (["evaluate", "{tmp}"], "no usable checkpoint"),
        (["evaluate"], "name the folder"),
        (["report", "{tmp}"], "holds no study"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([part.format(tmp=tmp_path) for part in arguments]) == 2
    _one_line(capsys, text)


def test_damaged_checkpoints_are_one_line(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["distill", *common, "run.method=ce", "--output", str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / checkpoint.FILE).write_bytes(b"nothing of use")
    assert main([*arguments, "--resume"]) == 2
    _one_line(capsys, "no usable checkpoint", "is damaged", "--fresh")
    assert main([*arguments, "--fresh"]) == 0


def test_a_mistake_prints_no_traceback(tmp_path: Path) -> None:
    process = start(["distill", "--set", "optim.lr=-1", "--output", str(tmp_path)])
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and printed == ""
    assert errors.startswith("crrcd-train: error: ") and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "setting", "text"),
    [
        ("distill", "teacher.checkpoint=", "method crcd needs a teacher"),
        ("distill", "teacher.checkpoint={tmp}/none.pt", "none.pt is missing"),
        ("study", "teacher.checkpoint={tmp}/none.pt", "none.pt is missing"),
    ],
)
def test_a_missing_teacher_is_told_before_a_download(
    command: str, setting: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data"
    arguments = ["run.method=crcd", f"data.root={data}", setting.format(tmp=tmp_path)]
    assert main([command, "--set", *arguments, "--output", str(tmp_path / "run")]) == 2
    _one_line(capsys, text)
    assert not data.exists()


def _one_line(capsys: pytest.CaptureFixture, *texts: str) -> None:
    errors = capsys.readouterr().err
    assert errors.startswith("crrcd-train: error: ") and errors.count("\n") == 1
    for text in texts:
        assert text in errors
