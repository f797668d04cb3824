"""`python -m launch.compare RUN RUN ..`: arms of finished runs, paired on the items they share.

Runs on different tasks have no items to pair: they give a table of arms x tasks. The directory of a
sweep stands for its runs. An arm that was searched is shown with the setting its search chose, and
what the search took; it answers the test items as any other arm does, so that both compare.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conf.errors import DataError
from conf.results import Pair
from conf.search_results import SearchResult
from evaluation.records.run_records import RunRecords
from evaluation.report.tables import SimpleTable
from evaluation.results.arm_summary import ArmSummary
from launch.cli import guarded


def scores_by_content(records: RunRecords) -> dict[str, ArmSummary]:
    """The arms of a run as `<run>/<arm>`, their scores keyed by each item's content hash."""
    import dataclasses

    from evaluation.results.arm_summary import Settings, summarise_arm

    settings = Settings(decision=records.decision, pricing=records.pricing)
    found = {}
    for name in records.arm_specs:
        arm = summarise_arm(records, name, settings=settings)
        scores = {records.items[i].sha256: s for i, s in arm.scores.items() if i in records.items}
        found[f"{records.name}/{name}"] = dataclasses.replace(arm, scores=scores)
    return found


def read_runs(paths: list[Path]) -> list[RunRecords]:
    """The runs. Raises DataError for fewer than two, and for a directory that is no run."""
    from evaluation.records.run_records import read_run

    if len(paths) < 2:
        raise DataError(
            "python -m launch.compare",
            found=f"{len(paths)} runs",
            expected="at least two",
            remedy="python -m launch.compare outputs/RUN_A outputs/RUN_B",
        )
    return [read_run(p) for p in paths]


def runs_of(paths: list[Path]) -> list[Path]:
    """Run directories; the directory of a sweep stands for those of its runs."""
    found = []
    for path in paths:
        if (path / "sweep.json").is_file():
            sweep = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
            found += [path.parent / run["run"] for run in sweep["runs"]]
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def compare(paths: list[Path]) -> tuple[Pair, ...]:
    """Pairs of arms of different runs, on items of equal content, Holm-adjusted over all pairs.

    Raises:
        DataError: fewer than two runs, a directory that is no run, or runs of different scoring.
    """
    return paired(read_runs(paths))


def have_one_scoring(runs: list[RunRecords]) -> bool:
    """Whether all runs score answers by the same rule, so that they can be paired."""
    return len({str(r.task.get("scoring")) for r in runs}) == 1


def paired(runs: list[RunRecords], *, leave_out: Collection[str] = ()) -> tuple[Pair, ...]:
    """The pairs of runs that are read already.

    Args:
        runs: at least two.
        leave_out: arms, as `<run>/<arm>`, that are in no pair.

    Raises:
        DataError: different scoring.
    """
    from evaluation.results.item_intervals import ItemRule
    from evaluation.results.summary import all_pairs

    if not have_one_scoring(runs):
        raise DataError(
            "task.scoring",
            found=", ".join(sorted({str(r.task.get("scoring")) for r in runs})),
            expected="one scoring rule in all runs",
        )
    arms: dict[str, ArmSummary] = {}
    for records in runs:
        found = scores_by_content(records)
        arms |= {name: arm for name, arm in found.items() if name not in leave_out}
    first = runs[0].decision
    rule = ItemRule(
        confidence=first.confidence,
        num_arms=len(arms),
        is_sequential=any(records.decision.stop_early for records in runs),
    )
    pairs = all_pairs(arms, rule=rule, margin=first.equivalence_margin)
    return tuple(p for p in pairs if p.a.split("/")[0] != p.b.split("/")[0] and p.n)


def searches_of(runs: list[RunRecords]) -> dict[str, SearchResult]:
    """The searches of all runs, by `<run>/<arm>`."""
    from evaluation.results.arm_summary import Settings
    from evaluation.results.summary import all_searches

    found: dict[str, SearchResult] = {}
    for records in runs:
        settings = Settings(decision=records.decision, pricing=records.pricing)
        searches = all_searches(records, settings=settings)
        found |= {f"{records.name}/{arm}": search for arm, search in searches.items()}
    return found


def pair_table(
    pairs: tuple[Pair, ...], *, searches: Mapping[str, SearchResult] | None = None
) -> SimpleTable:
    """The pairs, largest difference first.

    Args:
        pairs: of arms as `<run>/<arm>`.
        searches: of these arms; each is shown with the setting that was chosen.
    """
    chosen = {name: search.chosen for name, search in (searches or {}).items()}
    names = {name: f"{name} ({setting.label})" for name, setting in chosen.items() if setting}
    rows = []
    for pair in sorted(pairs, key=lambda p: -abs(p.difference or 0.0)):
        interval = "" if pair.low is None else f"{pair.low:+.3f} to {pair.high:+.3f}"
        p_value = "" if pair.p_adjusted is None else f"{pair.p_adjusted:.3g}"
        a, b = names.get(pair.a, pair.a), names.get(pair.b, pair.b)
        rows.append((a, b, f"{pair.difference:+.3f}", interval, p_value, str(pair.n)))
    headings = ("a", "b", "a - b", "interval", "p (Holm)", "n")
    return SimpleTable(headings=headings, rows=tuple(rows))


def show_table(table: SimpleTable, console: Console, *, max_rows: int | None = None) -> None:
    """Print a table and its note; a last line counts what is left out."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for place, heading in enumerate(table.headings):
        shown.add_column(heading, justify="right" if place else "left", overflow="fold")
    for row in table.rows[:max_rows]:
        shown.add_row(*map(escape, row))
    console.print(shown)
    left = len(table.rows) - (max_rows or len(table.rows))
    if left > 0:
        console.print(f"... {left} more in the report")
    if table.note:
        console.print(table.note, style="dim", highlight=False, markup=False)


def main(paths: list[Path]) -> int:
    """Compare and print."""
    from evaluation.report.search_tables import searches_table
    from evaluation.report.task_table import are_of_several_tasks, task_table

    runs, console = read_runs(runs_of(paths)), Console()
    searches = searches_of(runs)
    if are_of_several_tasks(runs):
        show_table(task_table(runs), console)
    if have_one_scoring(runs):
        pairs = paired(runs)
        if pairs:
            show_table(pair_table(pairs, searches=searches), console)
        else:
            console.print("No two arms of different runs answered an item of the same content.")
    if searches:
        console.print("\n[bold]Searches[/bold]", highlight=False)
        show_table(searches_table(searches), console)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main([Path(p) for p in sys.argv[1:]])))
