"""`python -m launch.compare RUN RUN ..`: arms of finished runs, paired on the items they share.

Runs on different tasks have no items to pair: they give a table of arms x tasks.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conf.errors import DataError
from conf.results import Pair
from evaluation.arm_summary import ArmSummary
from evaluation.run_records import RunRecords
from launch.cli import guarded


def scores_by_content(records: RunRecords) -> dict[str, ArmSummary]:
    """The arms of a run as `<run>/<arm>`, their scores keyed by each item's content hash."""
    import dataclasses

    from evaluation.arm_summary import Settings, summarise_arm

    settings = Settings(decision=records.decision, pricing=records.pricing)
    found = {}
    for name in records.arm_specs:
        arm = summarise_arm(records, name, settings=settings)
        scores = {records.items[i].sha256: s for i, s in arm.scores.items() if i in records.items}
        found[f"{records.name}/{name}"] = dataclasses.replace(arm, scores=scores)
    return found


def read_runs(paths: list[Path]) -> list[RunRecords]:
    """The runs. Raises DataError for fewer than two, and for a directory that is no run."""
    from evaluation.run_records import read_run

    if len(paths) < 2:
        raise DataError(
            "python -m launch.compare",
            found=f"{len(paths)} runs",
            expected="at least two",
            remedy="python -m launch.compare outputs/RUN_A outputs/RUN_B",
        )
    return [read_run(p) for p in paths]


def compare(paths: list[Path]) -> tuple[Pair, ...]:
    """Pairs of arms of different runs, on items of equal content, Holm-adjusted over all pairs.

    Raises:
        DataError: fewer than two runs, a directory that is no run, or runs of different scoring.
    """
    return paired(read_runs(paths))


def paired(runs: list[RunRecords]) -> tuple[Pair, ...]:
    """The pairs of runs that are read already. Raises DataError for different scoring."""
    from evaluation.summary import all_pairs

    scorings = {str(r.task.get("scoring")) for r in runs}
    if len(scorings) > 1:
        raise DataError(
            "task.scoring",
            found=", ".join(sorted(scorings)),
            expected="one scoring rule in all runs",
        )
    arms: dict[str, ArmSummary] = {}
    for records in runs:
        arms |= scores_by_content(records)
    pairs = all_pairs(arms, confidence=runs[0].decision.confidence)
    return tuple(p for p in pairs if p.a.split("/")[0] != p.b.split("/")[0] and p.n)


def show(pairs: tuple[Pair, ...], console: Console) -> None:
    """Print the pairs, largest difference first."""
    if not pairs:
        console.print("No two arms of different runs answered an item of the same content.")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("a", "b", "a - b", "interval", "p (Holm)", "n"):
        table.add_column(column, justify="left" if column in "ab" else "right")
    for pair in sorted(pairs, key=lambda p: -abs(p.difference or 0.0)):
        interval = "" if pair.low is None else f"{pair.low:+.3f} to {pair.high:+.3f}"
        p_value = "" if pair.p_adjusted is None else f"{pair.p_adjusted:.3g}"
        table.add_row(pair.a, pair.b, f"{pair.difference:+.3f}", interval, p_value, str(pair.n))
    console.print(table)


def show_tasks(runs: list[RunRecords], console: Console) -> None:
    """Print arms x tasks."""
    from evaluation.task_table import task_table

    found = task_table(runs)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, heading in enumerate(found.headings):
        table.add_column(heading, justify="right" if place else "left")
    for row in found.rows:
        table.add_row(*row)
    console.print(table)
    console.print(found.note, style="dim", highlight=False)


def main(paths: list[Path]) -> int:
    """Compare and print."""
    from evaluation.task_table import are_of_several_tasks

    runs, console = read_runs(paths), Console()
    if are_of_several_tasks(runs):
        show_tasks(runs, console)
    if len({str(r.task.get("scoring")) for r in runs}) == 1:
        show(paired(runs), console)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main([Path(p) for p in sys.argv[1:]])))
