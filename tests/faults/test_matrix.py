"""The matrix of faults is whole, and each test that it names is there."""

from __future__ import annotations

import ast
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.faults.__main__ import cases_of, line_of
from tests.faults.matrix import ROWS, Row

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_is_there_once() -> None:
    assert [row.number for row in ROWS] == list(range(1, 55))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_a_row_is_injected_or_says_why_not(row: Row) -> None:
    assert bool(row.tests) != bool(row.reason)
    assert not row.reason or row.reason.startswith(("here: ", "open: "))
    for node in row.tests:
        path, _, name = node.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert name in defined, node


def test_a_report_becomes_lines() -> None:
    report = ElementTree.ElementTree(
        ElementTree.fromstring(
            """<testsuites><testsuite>
            <testcase classname="tests.a.test_b" name="test_c[0]"><properties>
              <property name="recovery_seconds" value="7.4"/>
              <property name="steps_redone" value="1"/></properties></testcase>
            <testcase classname="tests.a.test_b" name="test_c[1]"><failure/><properties>
              <property name="recovery_seconds" value="12.0"/></properties></testcase>
            <testcase classname="tests.a.test_b" name="test_d"/>
            </testsuite></testsuites>"""
        )
    )
    cases = cases_of(report)
    assert [case.outcome for case in cases] == ["passed", "failure", "passed"]
    row = Row(number=9, fault="f", expected="e", tests=("tests/a/test_b.py::test_c",))
    assert line_of(row, cases) == "| 9 | f | e | 2 | 1 | 10 (12) | 1 |"
    missing = Row(number=9, fault="f", expected="e", reason="open: r")
    assert line_of(missing, cases) == "| 9 | f | e | 0 | | open: r | |"
