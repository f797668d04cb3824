"""Arms x tasks: how each arm of several runs does on each run's task, with intervals (pure).

One tuned model on several tasks shows what tuning for one of them costs on the others: type
`arms.NAME.on=outputs/RUN/arms/lora/final/checkpoint` in a run on another task, then compare.
"""

from __future__ import annotations

from collections.abc import Sequence

from evaluation import wording
from evaluation.records.run_records import RunRecords
from evaluation.report.tables import SimpleTable
from evaluation.results.arm_summary import Settings, summarise_arm

NOTE = (
    "Each column is a run's test items under its own scoring rule; columns are not comparable with"
    " one another. Intervals are 95% unless decision.confidence says otherwise."
)


def task_table(runs: Sequence[RunRecords]) -> SimpleTable:
    """One row per arm name, one column per run; a dash where a run has no such arm."""
    columns = [_column(records) for records in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = tuple((name, *(column.get(name, "-") for column in columns)) for name in names)
    return SimpleTable(headings=("arm", *_headings(runs)), rows=rows, note=NOTE)


def are_of_several_tasks(runs: Sequence[RunRecords]) -> bool:
    """Whether the runs ask different questions: by the hash of task and items."""
    return len({str(records.task.get("sha256")) for records in runs}) > 1


def _column(records: RunRecords) -> dict[str, str]:
    """Arm -> its metric with interval, or why there is none."""
    settings = Settings(decision=records.decision, pricing=records.pricing)
    found = {}
    for name in records.arm_specs:
        result = summarise_arm(records, name, settings=settings).result
        found[name] = (
            wording.share_with_interval(result.metric) if result.status == "done" else result.status
        )
    return found


def _headings(runs: Sequence[RunRecords]) -> list[str]:
    """The task's name, with the run's where two runs share it, and the rule it is scored by."""
    names = [str(records.task.get("name") or records.name) for records in runs]
    return [
        f"{name if names.count(name) == 1 else f'{name} ({records.name})'}, {_metric(records)}"
        for name, records in zip(names, runs, strict=True)
    ]


def _metric(records: RunRecords) -> str:
    scoring = str(records.task.get("scoring") or "exact")
    return "accuracy" if scoring == "exact" else wording.metric(scoring)
