"""A plugin of pytest: a line of JSON for each test that ended, in the file FAULTS_REPORT.

Lines and no document, so that what a run has found stands when it is interrupted.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

VARIABLE = "FAULTS_REPORT"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tests that ran, and those that a fixture failed or skipped."""
    if report.when != "call" and report.passed:
        return
    line: dict[str, Any] = {
        "test": report.nodeid,
        "verdict": report.outcome,
        "seconds": report.duration,
        "reason": _reason(report),
        "properties": dict(report.user_properties),
    }
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def _reason(report: pytest.TestReport) -> str:
    """The first line of what it failed or was skipped with."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message).partition("\n")[0] if crash else ""
