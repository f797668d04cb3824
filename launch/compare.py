"""`python -m launch.compare RUN RUN ..`: arms of finished runs, paired on the items they share."""

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


def compare(paths: list[Path]) -> tuple[Pair, ...]:
    """Pairs of arms of different runs, on items of equal content, Holm-adjusted over all pairs.

    Raises:
        DataError: fewer than two runs, a directory that is no run, or runs of different scoring.
    """
    from evaluation.run_records import read_run
    from evaluation.summary import all_pairs

    if len(paths) < 2:
        raise DataError(
            "python -m launch.compare",
            found=f"{len(paths)} runs",
            expected="at least two",
            remedy="python -m launch.compare outputs/RUN_A outputs/RUN_B",
        )
    runs = [read_run(p) for p in paths]
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


def main(paths: list[Path]) -> int:
    """Compare and print."""
    show(compare(paths), Console())
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main([Path(p) for p in sys.argv[1:]])))
