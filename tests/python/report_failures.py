"""A pytest plugin for runs that may be cut short: each failure goes to the file $BNB_FAILURES when it happens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("BNB_FAILURES")
    if path and report.failed:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"==== {report.nodeid}, {report.when}\n{report.longreprtext}\n")
