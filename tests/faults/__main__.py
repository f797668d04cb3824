"""`python -m tests.faults [ROW ..]`: makes every fault of the matrix happen, and writes the table.

The tests run one after another in one pytest, whose output is the progress. The table has a line
for each row: cases, how many passed, the median and worst seconds to the next new step and the most
steps redone, where the tests tell them. All rows: tests/results/faults.md; some rows: printed only.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.matrix import ROWS, Row

RESULT = Path("tests/results/faults.md")
HEAD = "| row | fault | what must come of it | cases | passed | seconds (worst) | steps redone |"


@dataclass(kw_only=True)
class Case:
    """One case of a test, as pytest's report has it. told: what it recorded of itself."""

    node: str
    outcome: str
    told: dict[str, str] = field(default_factory=dict)


def cases_of(report: ElementTree.ElementTree[ElementTree.Element]) -> list[Case]:
    """All cases of a report; a node is `path::name` without parameters."""
    found = []
    for case in report.iter("testcase"):
        path = case.get("classname", "").replace(".", "/") + ".py"
        name = case.get("name", "").partition("[")[0]
        bad = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        told = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        found.append(Case(node=f"{path}::{name}", outcome=bad[0] if bad else "passed", told=told))
    return found


def line_of(row: Row, cases: Sequence[Case]) -> str:
    """A row of the table."""
    mine = [case for case in cases if case.node in row.tests]
    if not row.tests:
        return f"| {row.number} | {row.fault} | {row.expected} | 0 | | {row.reason} | |"
    passed = sum(case.outcome == "passed" for case in mine)
    seconds = [float(s) for c in mine if (s := c.told.get("recovery_seconds"))]
    steps = [int(s) for c in mine if (s := c.told.get("steps_redone"))]
    recovery = f"{statistics.median(seconds):.0f} ({max(seconds):.0f})" if seconds else ""
    return (
        f"| {row.number} | {row.fault} | {row.expected} | {len(mine)} | {passed} | {recovery} "
        f"| {max(steps) if steps else ''} |"
    )


def table(rows: Sequence[Row], cases: Sequence[Case]) -> str:
    """The whole table with what it stands on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    passed = sum(case.outcome == "passed" for case in cases)
    skipped = sum(case.outcome == "skipped" for case in cases)
    return "\n".join(
        [
            f"Faults, {time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip() or 'unknown'}, "
            f"{os.cpu_count()} cores: {passed} of {len(cases)} cases passed, {skipped} skipped.",
            "",
            HEAD,
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(line_of(row, cases) for row in rows),
            "",
        ]
    )


def main(arguments: Sequence[str]) -> int:
    """Run the tests of the rows; 0 where each fault ended as it should."""
    wanted = {int(a) for a in arguments}
    rows = [row for row in ROWS if not wanted or row.number in wanted]
    nodes = sorted({node for row in rows for node in row.tests})
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "faults.xml"
        command = [sys.executable, "-m", "pytest", "-v", *nodes, f"--junitxml={path}"]
        code = subprocess.run(command, check=False).returncode
        cases = cases_of(ElementTree.parse(path)) if path.exists() else []
    text = table(rows, cases)
    if not wanted and cases:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text, encoding="utf-8")
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
