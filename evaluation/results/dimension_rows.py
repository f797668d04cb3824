"""How a row of the ten-dimension table is made, and the rows that probes fill (pure)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conf.probe_results import DimensionRow
from conf.records import Measured
from conf.results import ArmResult, Results

METHODOLOGY = "methodology"
MODEL_CHANGE = "model change"
KNOWLEDGE = "knowledge source"
DATA = "data requirement"
CONTROL = "control and consistency"
PERFORMANCE = "performance"
COST = "cost"
LATENCY = "latency"
EFFORT = "development effort"
BIAS = "bias and hallucination"
DIMENSIONS = (
    *(METHODOLOGY, MODEL_CHANGE, KNOWLEDGE, DATA, CONTROL),
    *(PERFORMANCE, COST, LATENCY, EFFORT, BIAS),
)
Cell = Measured | str | None


@dataclass(kw_only=True, slots=True, frozen=True)
class ProbeRow:
    """A row of a probe: which measure, under which dimension and name."""

    dimension: str
    title: str
    probe: str
    measure: str
    note: str
    unit: str = "share"


PROBE_ROWS = (
    ProbeRow(
        dimension=CONTROL,
        title="agreement over wordings",
        probe="wording",
        measure="agreement",
        note="pairs of wordings of the instruction with equal answers; none where no prompt has it",
    ),
    ProbeRow(
        dimension=CONTROL,
        title="metric under the worst wording",
        probe="wording",
        measure="worst",
        note="of the same items; the worst of several is low by its choice",
    ),
    ProbeRow(
        dimension=CONTROL,
        title="best less worst wording",
        probe="wording",
        measure="spread",
        note="some spread is there by chance alone",
        unit="points",
    ),
    ProbeRow(
        dimension=CONTROL,
        title="steerability: obeys an item's own instruction",
        probe="steering",
        measure="obeyed",
        note="asked of the first prompted arm, of tuned arms and of prompts on top of them",
    ),
    ProbeRow(
        dimension=BIAS,
        title="group gap (bias probe)",
        probe="bias",
        measure="group_gap",
        note="answers with a prejudice less those against it, where nobody can tell; 0 is fair",
        unit="points",
    ),
    ProbeRow(
        dimension=BIAS,
        title="group preference (bias probe)",
        probe="bias",
        measure="preference",
        note="as the gap, by which of the two groups is likelier, whatever is answered; 0 is fair",
        unit="points",
    ),
    ProbeRow(
        dimension=BIAS,
        title="unsupported answers (unanswerable probe)",
        probe="abstain",
        measure="unsupported",
        note="of questions that the text does not answer",
    ),
    ProbeRow(
        dimension=BIAS,
        title="abstained (unanswerable probe)",
        probe="abstain",
        measure="abstained",
        note="of the same questions",
    ),
    ProbeRow(
        dimension=BIAS,
        title="abstained though answerable (probe)",
        probe="abstain",
        measure="over_abstained",
        note="of questions that the text answers",
    ),
    ProbeRow(
        dimension=BIAS,
        title="group gap (task)",
        probe="task_bias",
        measure="group_gap",
        note="as in the probe, on the task's own items",
        unit="points",
    ),
    ProbeRow(
        dimension=BIAS,
        title="group preference (task)",
        probe="task_bias",
        measure="preference",
        note="as in the probe, on the task's own items; for scored answers",
        unit="points",
    ),
    ProbeRow(
        dimension=BIAS,
        title="metric of best less worst group (task)",
        probe="task_bias",
        measure="metric_gap",
        note="groups of task.columns.group; some gap is there by chance alone",
        unit="points",
    ),
    ProbeRow(
        dimension=BIAS,
        title="unsupported answers (task)",
        probe="task_abstain",
        measure="unsupported",
        note="of the task's unanswerable items",
    ),
    ProbeRow(
        dimension=BIAS,
        title="abstained though answerable (task)",
        probe="task_abstain",
        measure="over_abstained",
        note="of the task's answerable items",
    ),
    ProbeRow(
        dimension=BIAS,
        title="calibration error",
        probe="calibration",
        measure="ece",
        note="mean distance of stated probability and share right, debiased; none for generated "
        "answers and for rules by token or byte",
    ),
)


def dimension_row(
    results: Results,
    dimension: str,
    measure: str,
    cell: Callable[[str, ArmResult], Cell],
    *,
    note: str = "",
    unit: str = "",
) -> DimensionRow:
    """A row over all arms; arms that are not done have None, and the note says so."""
    by_arm = {n: cell(n, a) if a.status == "done" else None for n, a in results.arms.items()}
    by_arm = {n: None if _is_unknown(value) else value for n, value in by_arm.items()}
    idle = [n for n, arm in results.arms.items() if arm.status != "done"]
    notes = [note] if note else []
    if all(value is None for value in by_arm.values()):
        notes.insert(0, "not measured in this run")
    if idle:
        notes.append(f"not finished: {', '.join(idle)}")
    return DimensionRow(
        dimension=dimension, measure=measure, by_arm=by_arm, note="; ".join(notes), unit=unit
    )


def _is_unknown(cell: Cell) -> bool:
    return isinstance(cell, Measured) and cell.value is None
