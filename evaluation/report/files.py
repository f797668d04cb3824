"""Writes what a run is read by: results.json, .csv, .tex, report.html, report.md, figures/."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.records import Measured, to_dict
from conf.results import ArmResult, Metric, Results
from evaluation.records.run_records import RunRecords
from evaluation.report.chosen_charts import report_charts
from evaluation.report.figures import write_svg
from evaluation.report.html import render_html
from evaluation.report.latex import results_tex
from evaluation.report.markdown import render_markdown
from evaluation.report.searches import search_drawings

XML = '<?xml version="1.0" encoding="utf-8"?>\n'


@dataclass(kw_only=True, slots=True, frozen=True)
class ReportPaths:
    """Where the files of a report lie."""

    results_json: Path
    results_csv: Path
    html: Path
    markdown: Path
    latex: Path
    figures: tuple[Path, ...]


def write_report(results: Results, records: RunRecords, directory: Path | str) -> ReportPaths:
    """Write all files of the report; each is replaced whole, so a reader never sees half of one."""
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    charts = report_charts(results, records)
    drawings = search_drawings(results)
    paths = ReportPaths(
        results_json=root / "results.json",
        results_csv=root / "results.csv",
        html=root / "report.html",
        markdown=root / "report.md",
        latex=root / "results.tex",
        figures=tuple(
            root / "figures" / f"{name}.svg" for name in (*(c.name for c in charts), *drawings)
        ),
    )
    _write(paths.results_json, json.dumps(to_dict(results), indent=1, allow_nan=False) + "\n")
    _write(paths.results_csv, results_csv(results))
    for chart, path in zip(charts, paths.figures, strict=False):
        write_svg(chart, path)
    for name, text in drawings.items():
        (root / "figures").mkdir(exist_ok=True)
        _write(root / "figures" / f"{name}.svg", XML + text)
    _write(paths.latex, results_tex(results))
    _write(paths.markdown, render_markdown(results, charts=charts))
    _write(paths.html, render_html(results, records, charts=charts))
    return paths


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def results_csv(results: Results) -> str:
    """One row per arm; measured values as four columns; unknown is empty."""
    rows = [{"arm": name, **_row(r)} for name, r in results.arms.items()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _row(r: ArmResult) -> dict[str, Any]:
    cost, latency, tokens, train = r.cost, r.latency, r.tokens, r.train
    row: dict[str, Any] = {
        "kind": r.kind,
        "status": r.status,
        "is_same_base": r.is_same_base,
        "labels_used": r.labels_used,
        "metric": r.metric.name if r.metric else None,
        **_columns("metric", r.metric),
        **_columns("accuracy", r.accuracy),
        **_columns("accuracy_calibrated", r.accuracy_calibrated),
        **_columns("macro_f1", r.macro_f1),
        **_columns("format_validity", r.format_validity),
        **_columns("consistency", r.consistency),
        **_columns("p50_seconds", latency.p50_seconds if latency else None),
        **_columns("p95_seconds", latency.p95_seconds if latency else None),
        "prompt_tokens": tokens.prompt.value if tokens else None,
        "cached_tokens": tokens.cached.value if tokens else None,
        "computed_tokens": tokens.computed.value if tokens else None,
        "completion_tokens": tokens.completion.value if tokens else None,
        "fixed_usd": cost.fixed_usd if cost else None,
        "fixed_device_seconds": cost.fixed_device_seconds if cost else None,
        **_columns("request_usd", cost.request_usd if cost else None),
        **_columns("request_device_seconds", cost.request_device_seconds if cost else None),
        **_columns("usd_per_million_tokens", cost.usd_per_million_tokens if cost else None),
        "trained_parameters": train.trained_parameters if train else None,
        "error": r.error,
    }
    return row


def _columns(name: str, measured: Measured | Metric | None) -> dict[str, float | None]:
    """value, low, high and n of a measured value."""
    if measured is None:
        return dict.fromkeys((f"{name}_value", f"{name}_low", f"{name}_high", f"{name}_n"))
    return {
        f"{name}_value": measured.value,
        f"{name}_low": measured.low,
        f"{name}_high": measured.high,
        f"{name}_n": measured.n,
    }
