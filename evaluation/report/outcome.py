"""What a report says after the comparison: what tuning unlearned, and how to use the winner."""

from __future__ import annotations

from conf.records import Measured
from conf.results import Results, ServeCommand
from evaluation import wording
from evaluation.report.tables import SimpleTable


def forgetting_table(results: Results) -> SimpleTable:
    """The general set before and after each tuning; no rows where it was not asked."""
    kinds = sorted({kind for f in results.forgetting for kind in f.by_kind})
    rows = tuple(
        (
            f.arm,
            _share(f.base),
            _share(f.tuned),
            wording.points(f.change.value),
            wording.span(f.change.low, f.change.high, is_points=True),
            f"{f.lost} / {f.gained}",
            *(wording.points(f.by_kind[k].value) if k in f.by_kind else "-" for k in kinds),
            str(f.change.n),
        )
        for f in results.forgetting
    )
    return SimpleTable(
        headings=("arm", "base", "tuned", "points", "interval", "lost / gained", *kinds, "items"),
        rows=rows,
        note="Easy questions that have nothing to do with the task, answered by the base model and"
        " by the tuned one: change in percentage points, paired by item. lost: only the base model"
        " is right. An interval that holds 0 is no proof of forgetting, and none against: it rules"
        " out only what is below its lower end.",
    )


def _share(measured: Measured) -> str:
    return f"{wording.percent(measured.value)} ({wording.span(measured.low, measured.high)})"


def serving(results: Results) -> dict[str, list[ServeCommand]]:
    """Arm -> its commands, in order."""
    found: dict[str, list[ServeCommand]] = {}
    for command in results.serving:
        found.setdefault(command.arm, []).append(command)
    return found
