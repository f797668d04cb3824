"""The runs of a sweep as tables, and the pages they stand on (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from evaluation import wording
from evaluation.records.run_records import RunRecords
from evaluation.report.markdown import escaped, markdown_table
from evaluation.report.tables import SimpleTable
from evaluation.results.arm_summary import ArmSummary, Settings, summarise_arm

TEMPLATES = Path(__file__).parent / "templates"
NOTE = (
    "Test metric with its interval, then the score on validation. * is the best of its "
    "column on validation: choose by that, since the best test figure of several flatters."
)


@dataclass(kw_only=True, slots=True, frozen=True)
class SweepRow:
    """A run of a sweep. keys: by arm, equal where two runs have the same records."""

    number: int
    swept: tuple[tuple[str, str], ...]
    status: str
    records: RunRecords
    keys: Mapping[str, str]


def runs_table(rows: Sequence[SweepRow]) -> SimpleTable:
    """One row per run: what it was swept with, how it ended, and each arm's metric."""
    swept = list(dict.fromkeys(key for row in rows for key, _ in row.swept))
    arms = list(dict.fromkeys(name for row in rows for name in row.records.arm_specs))
    found = [_summaries(row.records) for row in rows]
    best = {name: _best(name, rows, found) for name in arms}
    cells = []
    for row, summaries in zip(rows, found, strict=True):
        values = dict(row.swept)
        cells.append(
            (
                str(row.number),
                *(values.get(key, "") for key in swept),
                row.status,
                *(_cell(summaries.get(n), is_best=row.number == best[n]) for n in arms),
            )
        )
    return SimpleTable(headings=("run", *swept, "status", *arms), rows=tuple(cells), note=NOTE)


def _summaries(records: RunRecords) -> dict[str, ArmSummary]:
    settings = Settings(decision=records.decision, pricing=records.pricing)
    return {name: summarise_arm(records, name, settings=settings) for name in records.arm_specs}


def _best(
    name: str, rows: Sequence[SweepRow], found: Sequence[Mapping[str, ArmSummary]]
) -> int | None:
    """The run whose arm is best on validation; None where there is nothing to choose.

    Runs of different tasks are not ranked, nor an arm whose records are the same in all runs.
    """
    if len({str(row.records.task.get("sha256")) for row in rows}) > 1:
        return None
    scores = {
        row.number: score
        for row, summaries in zip(rows, found, strict=True)
        if name in summaries and (score := summaries[name].validation) is not None
    }
    if len({row.keys.get(name) for row in rows if row.number in scores}) < 2:
        return None
    return max(scores, key=lambda number: (scores[number], -number))


def _cell(summary: ArmSummary | None, *, is_best: bool) -> str:
    if summary is None:
        return "-"
    if summary.result.status != "done":
        reason = wording.first_line(summary.result.error or "", limit=40)
        return f"{summary.result.status}: {reason}" if reason else summary.result.status
    validation = summary.validation
    text = wording.share_with_interval(summary.result.metric)
    text += f"; val. {wording.percent(validation)}" if validation is not None else ""
    return f"{text} *" if is_best else text


def render_text(
    title: str, tables: Sequence[tuple[str, SimpleTable]], *, facts: Sequence[tuple[str, str]]
) -> str:
    """The report as Markdown."""
    lines = [f"# {escaped(title)}", ""]
    for heading, table in tables:
        lines += [f"## {heading}", "", *markdown_table(table.headings, table.rows), ""]
        lines += [escaped(table.note), ""] if table.note else []
    lines += ["## Again", "", *(f"- {escaped(name)}: {escaped(text)}" for name, text in facts)]
    return "\n".join(lines) + "\n"


def render_page(
    title: str, tables: Sequence[tuple[str, SimpleTable]], *, facts: Sequence[tuple[str, str]]
) -> str:
    """The report as one page without scripts; every text goes through jinja's escaping."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("sweep.html.jinja").render(
        title=title,
        tables=tables,
        facts=facts,
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )
