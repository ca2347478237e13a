"""Progress of long work: a bar on a terminal, a line now and then in a log file."""

import io
import sys

import pytest

from crrcd_train.meter import Lines, meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("crrcd_train.meter.time.monotonic", lambda: now[0])
    return now


def test_lines_every_so_often_and_a_last_one(clock: list[float]) -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    for second in range(60):
        clock[0] = float(second)
        lines.write(f"\r{second} of 60  ")
    lines.write("\n")
    assert stream.getvalue() == "25 of 60\n50 of 60\n59 of 60\n"


def test_short_work_leaves_no_line(clock: list[float]) -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    for text in ("\r0 of 2", "\r2 of 2", "\n"):
        lines.write(text)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("enabled", [True, False])
def test_without_a_terminal_progress_goes_to_standard_output(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdout", said)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(Lines, "SECONDS", 0.0)
    with meter("runs", "step", enabled=enabled, total=4) as bar:
        for _ in range(4):
            bar.update(1)
            bar.refresh()
    shown = said.getvalue().splitlines()
    assert [line.split(", ")[0] for line in shown] == [
        f"runs: {done} of 4 steps" for done in range(5 if enabled else 0)
    ]
