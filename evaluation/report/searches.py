"""The section of a report on each searched arm: sentences, tables and drawings (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conf.results import Results
from evaluation.report import search_tables as tables
from evaluation.report.charts import Chart
from evaluation.report.parallel_axes import parallel_svg
from evaluation.report.tables import SimpleTable


@dataclass(kw_only=True, slots=True, frozen=True)
class SearchSection:
    """What a report shows of one arm's search. parallel: SVG text; None: no setting ended."""

    arm: str
    sentences: tuple[str, ...]
    tables: tuple[tuple[str, SimpleTable], ...]
    parallel: str | None
    charts: tuple[Chart, ...]


def search_sections(results: Results, charts: Sequence[Chart]) -> list[SearchSection]:
    """One section per searched arm, in the order of the arms."""
    return [
        SearchSection(
            arm=name,
            sentences=tuple(tables.lead(search)),
            tables=tuple(
                (title, table)
                for title, table in (
                    ("Settings", tables.settings_table(search)),
                    ("Rungs", tables.decisions_table(search)),
                    ("What the order of settings depends on", tables.importance_table(search)),
                )
                if table.rows
            ),
            parallel=parallel_svg(search),
            charts=tuple(c for c in charts if c.section == f"search/{name}"),
        )
        for name, search in results.searches.items()
    ]


def shared_charts(charts: Sequence[Chart]) -> list[Chart]:
    """The charts over all searches."""
    return [chart for chart in charts if chart.section == "search"]


def search_drawings(results: Results) -> dict[str, str]:
    """Name of the file below figures/ -> SVG text."""
    drawn = {name: parallel_svg(search) for name, search in results.searches.items()}
    return {parallel_name(name): svg for name, svg in drawn.items() if svg is not None}


def parallel_name(arm: str) -> str:
    """The file of an arm's drawing, without its ending."""
    return f"search_settings_{arm}"
