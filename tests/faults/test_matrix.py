"""The fault matrix is whole, its tests exist, and its table says what was found."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import __main__ as bench
from tests.faults.__main__ import ROOT, run_file
from tests.faults.matrix import ROWS, Row
from tests.faults.outcomes import Outcome, RowResult, is_of, table, with_missing
from tests.waiting import HANG_SECONDS

NUM_ROWS = 54


def test_all_rows_are_there_once() -> None:
    assert [row.number for row in ROWS] == list(range(1, NUM_ROWS + 1))
    assert len({row.fault for row in ROWS}) == NUM_ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_a_row_is_injected_or_says_why_not(row: Row) -> None:
    assert bool(row.tests) != bool(row.reason)
    assert not row.reason or row.reason.startswith(("here: ", "open: "))
    assert len(set(row.tests)) == len(row.tests) and row.runs >= 1
    for node in row.tests:
        path, _, name = node.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert name in defined, node


def test_an_id_asks_for_a_test_and_its_cases() -> None:
    case = "tests/a.py::test_b[c]"
    assert is_of(case, "tests/a.py::test_b") and is_of("tests/a.py::test_b", "tests/a.py::test_b")
    assert not any(is_of(case, asked) for asked in ("tests/a.py::test_", "tests/b.py::test_b"))


@pytest.mark.parametrize(("asked", "code"), [("99", 2), ("3", 0)])
def test_a_row_without_tests_starts_nothing(
    asked: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pytest without ids would run all that there is."""
    monkeypatch.setattr(bench, "ROWS", (row(3, reason="open: no test"), row(4, "f::a")))
    monkeypatch.setattr(bench, "run_file", None)
    assert bench.main([asked]) == code
    assert "no row 99" in capsys.readouterr().err or code == 0


def row(number: int, *tests: str, reason: str = "") -> Row:
    return Row(number=number, fault=f"fault {number}", expected="holds", tests=tests, reason=reason)


def test_the_table_counts_what_ran() -> None:
    outcomes = [
        Outcome(test="f::a", verdict="passed", recovery_seconds=4.0, steps_redone=1),
        Outcome(test="f::a", verdict="passed", recovery_seconds=9.0, steps_redone=0),
        Outcome(test="f::a", verdict="passed", recovery_seconds=5.0),
        Outcome(test="f::b[x]", verdict="failed", reason="assert 1 == 2"),
        Outcome(test="f::b[y]", verdict="passed"),
        Outcome(test="f::c", verdict="skipped", reason="no mounting here"),
    ]
    rows = (row(1, "f::a"), row(2, "f::a", "f::b"), row(3, "f::c"))
    rows += (row(4, reason="here: no GPU"),)
    results = [RowResult.of(r, outcomes) for r in rows]
    assert [r.is_kept for r in results] == [True, False, False, False]
    lines = table(results, facts="facts").splitlines()
    assert "1 of 2 rows end as they should, in 7 of 8 runs." in lines
    assert "| 1 | fault 1 | holds | 3 | 3 | 5.0 | 9.0 | 1 |" in lines
    assert "| 2 | fault 2 | holds | 5 | 4 | 5.0 | 9.0 | 1 |" in lines
    assert "| 3 | fault 3 | no mounting here |" in lines
    assert "| 4 | fault 4 | here: no GPU |" in lines
    assert "- `f::b[x]`: assert 1 == 2" in lines


def test_what_did_not_run_failed() -> None:
    found = with_missing([Outcome(test="f::a[1]", verdict="passed")], ["f::a", "g::b"])
    assert [(o.test, o.verdict) for o in found] == [("f::a[1]", "passed"), ("g::b", "failed")]


def test_a_real_pytest_is_followed(tmp_path: Path) -> None:
    """Verdicts, reasons and numbers, of a file that is not in the matrix."""
    file = tmp_path / "test_made.py"
    file.write_text(
        "import pytest\n"
        "def test_good(record_property):\n"
        "    record_property('recovery_seconds', 2.5)\n"
        "    record_property('steps_redone', 1)\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_bad(n):\n"
        "    assert n == 1, 'two'\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no disk')\n"
        "def test_broken(broken): pass\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_skipped(): pass\n"
    )
    names = ("good", "bad", "broken", "skipped")
    found = list(run_file([f"{file.name}::test_{name}" for name in names], root=tmp_path))
    told = {o.test.rpartition("::")[2]: (o.verdict, o.reason) for o in found}
    assert told["test_good"] == ("passed", "") and told["test_bad[1]"] == ("passed", "")
    assert told["test_bad[2]"][0] == "failed" and "two" in told["test_bad[2]"][1]
    assert told["test_broken"] == ("failed", "OSError: no disk")
    assert told["test_skipped"] == ("skipped", "no GPU")
    (good,) = (o for o in found if o.test.endswith("test_good"))
    assert (good.recovery_seconds, good.steps_redone) == (2.5, 1)


@pytest.mark.slow
def test_ctrl_c_ends_the_test_and_prints_what_was_found() -> None:
    """Row 6 is one quick test in a file; row 3 is at work when the interrupt comes."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "tests.faults", "6", "3"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("tests/training/test_faults.py"):
            break
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    text = "".join(lines) + process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 130, text
    assert "| 6 | " in text and "1 of 1 rows" in text
    assert "| 3 | " not in text, "an interrupted row is neither a failure nor excused"
