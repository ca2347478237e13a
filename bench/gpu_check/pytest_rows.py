"""A plugin of pytest (-p bench.gpu_check.pytest_rows): failures and counts as rows, as they come.

What is cut off at its limit has told what it has found until then.
"""

from __future__ import annotations

import sys
import time

import pytest

from bench.gpu_check.rows import emit

MOST = 25
"""Failures that get a row of their own."""


class Rows:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.told = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not (report.failed or report.skipped):
            return
        self.counts[report.outcome] += 1
        if report.failed and self.counts["failed"] <= MOST:
            crash = getattr(report.longrepr, "reprcrash", None)
            what = str(getattr(crash, "message", report.longrepr)).splitlines() or [""]
            command = f"{sys.executable} -m pytest '{report.nodeid}'"
            emit(kind="test", test=report.nodeid, what=what[0][:200], ok=False, command=command)
        if time.monotonic() - self.told > 5:
            self.tell()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            lines = str(report.longrepr).splitlines() or [""]
            command = f"{sys.executable} -m pytest --collect-only '{report.nodeid}'"
            emit(kind="test", test=report.nodeid, what=lines[-1][:200], ok=False, command=command)

    def pytest_sessionfinish(self) -> None:
        self.tell()

    def tell(self) -> None:
        self.told = time.monotonic()
        emit(kind="tests so far", **self.counts)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not the processes of xdist
        config.pluginmanager.register(Rows(config))
