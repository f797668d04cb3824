"""One report over the runs of a sweep, from their records alone: sweep.json, report.md, a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from conf.errors import EXIT_ARM_FAILED, EXIT_BUDGET, EXIT_DONE, EXIT_INTERRUPTED
from conf.results import Pair
from evaluation.records.run_records import RunRecords, read_run
from evaluation.report.search_tables import searches_table
from evaluation.report.sweep_table import SweepRow, render_page, render_text, runs_table
from evaluation.report.tables import SimpleTable
from evaluation.report.task_table import are_of_several_tasks, task_table
from launch.compare import have_one_scoring, pair_table, paired, searches_of, show_table
from launch.store import write_atomically, write_json

STATUSES = {
    None: "running",
    EXIT_DONE: "done",
    EXIT_ARM_FAILED: "an arm failed",
    EXIT_BUDGET: "stopped at the budget",
    EXIT_INTERRUPTED: "interrupted",
}
PAIRS = "Pairs of different runs"
MAX_SHOWN_PAIRS = 12


@dataclass(kw_only=True, slots=True, frozen=True)
class SweepRun:
    """One run of a sweep.

    swept: the keys in which it differs from the others. keys: by arm, the key of the job that
    answered its items: equal keys are equal records. exit_code: None while it runs.
    """

    number: int
    swept: tuple[tuple[str, str], ...]
    path: Path
    command: str
    exit_code: int | None
    keys: Mapping[str, str]

    @property
    def status(self) -> str:
        """How it stands, in words."""
        return STATUSES[self.exit_code]


@dataclass(kw_only=True, slots=True, frozen=True)
class Sweep:
    """A sweep; path is its own directory, beside those of its runs."""

    name: str
    command: str
    path: Path
    runs: tuple[SweepRun, ...]


def write(sweep: Sweep) -> list[tuple[str, SimpleTable]]:
    """Write the sweep's directory; returns the tables of its report by title.

    While it runs there is sweep.json alone: which runs there are.
    """
    is_over = all(run.exit_code is not None for run in sweep.runs)
    records = _records(sweep) if is_over else []
    pairs = _pairs(sweep, records)
    write_json(
        sweep.path / "sweep.json",
        {
            "name": sweep.name,
            "command": sweep.command,
            "runs": [
                {
                    "number": run.number,
                    "run": run.path.name,
                    "overrides": dict(run.swept),
                    "command": run.command,
                    "status": run.status,
                    "exit_code": run.exit_code,
                }
                for run in sweep.runs
            ],
            "pairs": pairs,
        },
    )
    if not is_over:
        return []
    tables = [("Runs", runs_table([_row(r, n) for r, n in zip(sweep.runs, records, strict=True)]))]
    names = {str(r.task.get("name")) for r in records}
    if len(names) > 1 and are_of_several_tasks(records):
        tables.append(("Arms and tasks", task_table(records)))
    searches = searches_of(records)
    if searches:
        tables.append(("Searches", searches_table(searches)))
    if pairs:
        note = "A pair is `run/arm`, on the items both answered; p is adjusted over all pairs."
        tables.append((PAIRS, replace(pair_table(pairs, searches=searches), note=note)))
    facts = [("command", sweep.command), *((f"run {r.number}", str(r.path)) for r in sweep.runs)]
    write_atomically(sweep.path / "report.md", render_text(sweep.name, tables, facts=facts))
    write_atomically(sweep.path / "report.html", render_page(sweep.name, tables, facts=facts))
    return tables


def _records(sweep: Sweep) -> list[RunRecords]:
    """The runs, named by their numbers, as the tables name them."""
    return [replace(read_run(run.path), name=str(run.number)) for run in sweep.runs]


def _row(run: SweepRun, records: RunRecords) -> SweepRow:
    return SweepRow(
        number=run.number, swept=run.swept, status=run.status, records=records, keys=run.keys
    )


def _pairs(sweep: Sweep, records: list[RunRecords]) -> tuple[Pair, ...]:
    """Arms of different runs, paired; an arm whose records another run has too comes once."""
    if not records or not have_one_scoring(records):
        return ()
    seen: set[str] = set()
    copies = set()
    for run in sweep.runs:
        for arm, key in run.keys.items():
            if key in seen:
                copies.add(f"{run.number}/{arm}")
            seen.add(key)
    return paired(records, leave_out=copies)


def show(sweep: Sweep, tables: list[tuple[str, SimpleTable]], console: Console) -> None:
    """Print the tables and where the report lies."""
    for title, table in tables:
        console.print(f"\n[bold]{title}[/bold]", highlight=False)
        show_table(table, console, max_rows=None if title != PAIRS else MAX_SHOWN_PAIRS)
    console.print(f"Again: {sweep.command}", style="dim", soft_wrap=True, markup=False)
    console.print(f"Report: {sweep.path / 'report.html'}", highlight=False, soft_wrap=True)
