"""report.md: the same numbers as the page, briefly (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from conf.results import Results
from evaluation import wording
from evaluation.report import costs, dimensions, method, outcome, tables
from evaluation.report.charts import Chart
from evaluation.report.labels import label_section
from evaluation.report.searches import parallel_name, search_sections, shared_charts
from evaluation.report.training_tables import instructions_table, sources_table


def render_markdown(results: Results, *, charts: Sequence[Chart]) -> str:
    """The report as Markdown."""
    verdict = results.recommendation.verdict
    lines = [f"# {escaped(wording.capitalised(verdict))}", ""]
    lines += [f"{escaped(reason)}\n" for reason in results.recommendation.reasons]
    if results.recommendation.would_change_if:
        lines += ["What would change this:", ""]
        lines += [f"- {escaped(change)}" for change in results.recommendation.would_change_if]
        lines.append("")
    lines += [
        f"- {escaped(f.title)}: **{escaped(f.value)}** {escaped(f'({f.note})' if f.note else '')}"
        for f in tables.key_figures(results)
    ]
    lines += ["", "## Arms", "", *_arms(results), ""]
    for title, table in (
        ("The ten dimensions", dimensions.dimensions_table(results)),
        ("Eleven reasons", dimensions.criteria_table(results)),
        ("Latency", dimensions.latency_table(results)),
        ("Pairs", tables.pair_table(results)),
        ("Break-even", costs.break_even_table(results)),
        ("What a request takes", costs.rates_table(results)),
        ("Training again", costs.retraining_table(results)),
        ("Obeying instructions", instructions_table(results)),
        ("Training data", sources_table(results)),
        ("Forgetting", outcome.forgetting_table(results)),
        ("Ledger", tables.ledger_table(results)),
    ):
        if table.rows:
            lines += [
                f"## {title}",
                "",
                *markdown_table(table.headings, table.rows),
                "",
                table.note,
                "",
            ]
    lines += _label_curve(results, charts)
    lines += _searches(results, charts)
    lines += ["## Figures", ""]
    lines += [_figure(chart.title, chart.name) for chart in charts if not chart.section]
    lines += _serving(results)
    lines += ["## Method", "", *(f"- {escaped(note)}" for note in method.method_notes(results)), ""]
    command = str(results.provenance.get("command") or "not recorded")
    lines += ["Run again:", "", *(f"    {line}" for line in command.splitlines()), ""]
    lines += [f"- {name}: {escaped(text)}" for name, text in method.run_facts(results)]
    return "\n".join(lines) + "\n"


def _figure(title: str, name: str) -> str:
    return f"![{escaped(title)}](figures/{name}.svg)\n"


def _label_curve(results: Results, charts: Sequence[Chart]) -> list[str]:
    """Metric and cost against the number of labels."""
    section = label_section(results, charts)
    if section is None:
        return []
    lines = ["## Labels", "", *(f"{escaped(sentence)}\n" for sentence in section.sentences)]
    lines += [_figure(chart.title, chart.name) for chart in section.charts]
    for title, table in section.tables:
        lines += [f"### {title}", "", *markdown_table(table.headings, table.rows), ""]
        lines += [escaped(table.note), ""]
    return lines


def _searches(results: Results, charts: Sequence[Chart]) -> list[str]:
    """What was searched, and what came of it."""
    sections = search_sections(results, charts)
    lines = ["## Search", ""] if sections else []
    lines += [_figure(chart.title, chart.name) for chart in shared_charts(charts)]
    for section in sections:
        lines += [f"### {escaped(section.arm)}", ""]
        lines += [f"{escaped(sentence)}\n" for sentence in section.sentences]
        if section.parallel:
            lines.append(_figure(f"Settings of {section.arm}", parallel_name(section.arm)))
        for title, table in section.tables:
            lines += [f"#### {title}", "", *markdown_table(table.headings, table.rows), ""]
            lines += [escaped(table.note), ""]
        lines += [_figure(chart.title, chart.name) for chart in section.charts]
    return lines


def _serving(results: Results) -> list[str]:
    """What to type to use the winner."""
    found = outcome.serving(results)
    lines = ["## Use it", ""] if found else []
    for arm, commands in found.items():
        lines += [f"### {escaped(arm)}", ""] if len(found) > 1 else []
        for command in commands:
            lines += [f"{escaped(command.title)}:", ""]
            lines += [*(f"    {line}" for line in command.text.splitlines()), ""]
            lines += [escaped(command.note), ""] if command.note else []
    return lines


def _arms(results: Results) -> list[str]:
    headings = tables.arm_headings(results)
    rows = []
    for row in tables.arm_rows(results):
        if row.error:
            rows.append([row.name, row.error, *[""] * (len(headings) - 2)])
        else:
            cells = [f"{c.value} ({c.note})" if c.note else c.value for c in row.cells]
            rows.append([row.name, *cells])
    return markdown_table(headings, rows)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; every cell is escaped."""
    head = f"| {' | '.join(map(escaped, headings))} |"
    rule = f"| --- |{' ---: |' * (len(headings) - 1)}"
    return [head, rule, *(f"| {' | '.join(map(escaped, row))} |" for row in rows)]


def escaped(text: str) -> str:
    """One line of text that Markdown shows as it is."""
    flat = " ".join(text.split())
    for character in "\\`*_[]<>|":
        flat = flat.replace(character, f"\\{character}")
    return flat
