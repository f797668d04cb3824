"""The ten-dimension table, the eleven criteria and what stands behind a row, as text (pure)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from conf.probe_results import DimensionRow
from conf.records import Measured
from conf.results import Results
from evaluation import wording
from evaluation.report.tables import Cell, SimpleTable

# Where the page shows what a dimension's numbers come from: an id, and the link's words.
EVIDENCE = {
    "methodology": ("prompts", "prompts"),
    "model change": ("method", "facts of the run"),
    "knowledge source": ("items", "items that differ"),
    "data requirement": ("ledger", "ledger"),
    "control and consistency": ("records", "records"),
    "performance": ("items", "items that differ"),
    "cost": ("ledger", "ledger"),
    "latency": ("latency", "latency"),
    "development effort": ("ledger", "ledger"),
    "bias and hallucination": ("records", "records"),
}
UNITS = {"usd": "USD", "points": "points"}  # the others stand with their numbers
SIDES = {"prompting": "prompting", "fine_tuning": "fine-tuning"}
SAYS = {
    "prompting": "speaks for prompting",
    "fine_tuning": "speaks for fine-tuning",
    "neither": "speaks for neither",
    "not_measured": "not measured",
}


@dataclass(kw_only=True, slots=True, frozen=True)
class MeasureRow:
    """One measure of a dimension: a cell per arm, in the order of the arms."""

    measure: str
    note: str
    cells: tuple[Cell, ...]


@dataclass(kw_only=True, slots=True, frozen=True)
class DimensionGroup:
    """A dimension with its measures. anchor: the section that shows its evidence."""

    dimension: str
    anchor: str
    anchor_text: str
    rows: tuple[MeasureRow, ...]


def dimension_groups(results: Results) -> list[DimensionGroup]:
    """The rows of results.dimensions by dimension, in their order."""
    groups = []
    for name, rows in itertools.groupby(results.dimensions, key=lambda row: row.dimension):
        anchor, text = EVIDENCE.get(name, ("method", "method"))
        measures = tuple(_measure(row, results) for row in rows)
        groups.append(
            DimensionGroup(dimension=name, anchor=anchor, anchor_text=text, rows=measures)
        )
    return groups


def _measure(row: DimensionRow, results: Results) -> MeasureRow:
    cells = tuple(dimension_cell(row.by_arm.get(arm), unit=row.unit) for arm in results.arms)
    unit = UNITS.get(row.unit)
    measure = f"{row.measure} ({unit})" if unit else row.measure
    return MeasureRow(measure=measure, note=row.note, cells=cells)


def dimension_cell(value: Measured | str | None, *, unit: str) -> Cell:
    """A number with its interval below it, a text as it is, a dash for what was not measured."""
    if isinstance(value, str):
        return Cell(value=value)
    if value is None or value.value is None:
        return Cell(value="-")
    note = ""
    if value.low is not None and value.high is not None:
        if unit == "share":
            note = wording.span(value.low, value.high)
        else:
            note = f"{_shown(value.low, unit)} to {_shown(value.high, unit)}"
    return Cell(value=_shown(value.value, unit), note=note)


def _shown(value: float, unit: str) -> str:
    match unit:
        case "share":
            return wording.percent(value)
        case "points":
            return wording.points(value)
        case "usd":
            return wording.usd(value)
        case "seconds":
            return wording.seconds(value)
        case "bytes":
            return wording.size_in_bytes(value)
        case "hours":
            return f"{value:.3g} h"
        case "count" | "tokens" | "device_seconds":
            return wording.count(value)
    return f"{value:.3g}"


def dimensions_table(results: Results) -> SimpleTable:
    """The same for Markdown: dimension, measure, an arm a column."""
    rows = []
    for group in dimension_groups(results):
        for row in group.rows:
            cells = (f"{c.value} ({c.note})" if c.note else c.value for c in row.cells)
            rows.append((group.dimension, row.measure, *cells))
    return SimpleTable(
        headings=("dimension", "measure", *results.arms),
        rows=tuple(rows),
        note="A dash: not measured, or without meaning for that arm.",
    )


def criteria_table(results: Results) -> SimpleTable:
    """The reasons that the field gives for either side, beside what this run saw of them."""
    rows = tuple(
        (SIDES.get(c.side, c.side), c.text, c.evidence or "-", SAYS.get(c.says, c.says))
        for c in results.criteria
    )
    return SimpleTable(
        headings=("a reason for", "when", "in this run", "which"),
        rows=rows,
        note="Reasons that textbooks and vendors give; the right side is this run's own evidence.",
    )


def latency_table(results: Results) -> SimpleTable:
    """Seconds of separate requests, by arm."""
    rows = tuple(
        (
            name,
            *(
                _seconds(m)
                for m in (
                    r.latency.first_token_p50_seconds,
                    r.latency.p50_seconds,
                    r.latency.p95_seconds,
                )
            ),
            str(r.latency.concurrency),
            wording.count(r.latency.p50_seconds.n),
        )
        for name, r in results.arms.items()
        if r.latency is not None
    )
    return SimpleTable(
        headings=("arm", "first token, p50", "answer, p50", "answer, p95", "at once", "requests"),
        rows=rows,
        note="Separate requests on a machine that did nothing else; intervals by order statistics.",
    )


def _seconds(measured: Measured) -> str:
    cell = dimension_cell(measured, unit="seconds")
    return f"{cell.value} ({cell.note})" if cell.note else cell.value
