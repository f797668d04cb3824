"""`make faults`: run the fault matrix and write its table.

    python -m tests.faults           all rows; the table goes to tests/results/faults.md
    python -m tests.faults 3 17      these rows; the table is printed
    python -m tests.faults chaos     random kills for half an hour: see chaos.py

Exit 0: each row that ran ended as it should. 1: one did not. 2: no such row. 130: interrupted; what
was found until then is printed.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from launch.cluster import num_cores, processor_name
from tests.benchmarks.harness import commit
from tests.faults import chaos
from tests.faults.matrix import ROWS, Row
from tests.faults.outcomes import Outcome, RowResult, table, with_missing
from tests.faults.reporting import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "results" / "faults.md"
LOG = ROOT / "outputs" / "faults.log"
# A test that is interrupted ends what it has started; nodes of Ray take some seconds each.
END_SECONDS = 60.0
POLL_SECONDS = 0.2


def main(argv: Sequence[str]) -> int:
    """Run what was asked for."""
    if argv[:1] == ["chaos"]:
        return chaos.main(argv[1:])
    known = {str(row.number): row for row in ROWS}
    if unknown := [word for word in argv if word not in known]:
        print(f"no row {', '.join(unknown)}: rows are 1 to {len(ROWS)}", file=sys.stderr)
        return 2
    rows = [known[word] for word in argv] or list(ROWS)
    outcomes: list[Outcome] = []
    began, code = time.monotonic(), 0
    try:
        for outcome in run(rows):
            outcomes.append(outcome)
            _tell(outcome)
    except KeyboardInterrupt:
        code = 130
    results = [RowResult.of(row, outcomes) for row in rows]
    if code:
        results = [r for r in results if r.ran]  # the others are neither injected nor excused
    text = table(results, facts=facts(time.monotonic() - began))
    print(f"\n{text}")
    if code == 0 and len(rows) == len(ROWS):
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text, encoding="utf-8")
        print(TABLE.relative_to(ROOT))
    return code or int(not all(r.is_kept for r in results if r.ran))


def run(rows: Sequence[Row]) -> Iterator[Outcome]:
    """Every test of the rows, as often as its rows ask for; a process for each file and round."""
    runs: Counter[str] = Counter()
    for row in rows:
        for test in row.tests:
            runs[test] = max(runs[test], row.runs)
    LOG.unlink(missing_ok=True)
    for number in range(max(runs.values(), default=0)):
        files: dict[str, list[str]] = {}
        for test in (t for t in runs if runs[t] > number):
            files.setdefault(test.partition("::")[0], []).append(test)
        for file, tests in files.items():
            print(f"{file}" + (f", run {number + 1}" if number else ""), flush=True)
            yield from run_file(tests)


def run_file(tests: Sequence[str], *, root: Path = ROOT) -> Iterator[Outcome]:
    """Some tests of one file below root, in one pytest; yields each when it has ended."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.faults.reporting", *tests]
    found: list[Outcome] = []
    LOG.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, LOG.open("ab") as log:
        report = Path(directory) / "report.jsonl"
        report.touch()
        process = subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | {VARIABLE: str(report), "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours alone, and is passed on once
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            for outcome in _followed(process, report):
                found.append(outcome)
                yield outcome
        finally:
            _end(process)
    yield from with_missing(found, tests)[len(found) :]


def _followed(process: subprocess.Popen[bytes], report: Path) -> Iterator[Outcome]:
    with report.open(encoding="utf-8") as stream:
        pending = ""
        while True:
            is_last = process.poll() is not None
            pending += stream.read()
            *lines, pending = pending.split("\n")
            yield from (Outcome.of(json.loads(line)) for line in lines)
            if is_last:
                return
            time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have an interrupted pytest end its test and what that has started."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tell(outcome: Outcome) -> None:
    name = outcome.test.rpartition("::")[2]
    reason = f"  {outcome.reason[:120]}" if outcome.verdict != "passed" else ""
    print(f"  {outcome.verdict:<8}{outcome.seconds:6.1f} s  {name}{reason}", flush=True)


def facts(seconds: float) -> str:
    """When, of which commit and on what it was measured."""
    of = commit()
    changed = " with changes" if of["is_dirty"] else ""
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"`make faults`, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, commit "
        f"{(of['commit'] or 'unknown')[:12]}{changed}, {num_cores()} cores ({processor_name()}), "
        f"{memory:.0f} GiB, {seconds / 60:.0f} minutes."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
