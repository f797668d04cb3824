"""The charts of a report, in the order in which they are read; latency and consistency (pure)."""

from __future__ import annotations

from conf.records import Measured
from conf.results import ArmResult, Results
from evaluation.decision.rules import family
from evaluation.records.run_records import RunRecords
from evaluation.report import charts
from evaluation.report.charts import Chart, Series
from evaluation.report.labels import label_charts
from evaluation.report.search_charts import search_charts


def report_charts(results: Results, records: RunRecords) -> list[Chart]:
    """All charts that have something to show."""
    found = [
        charts.accuracy_chart(results),
        charts.cost_quality_chart(results),
        charts.volume_chart(results),
        latency_chart(results),
        consistency_chart(results),
        charts.training_chart(results, records),
        charts.validation_chart(results, records),
    ]
    drawn = [chart for chart in found if chart.series]
    return [*drawn, *search_charts(results, records), *label_charts(results)]


def latency_chart(results: Results) -> Chart:
    """Median and 95th percentile of separate requests, the fastest arm on top."""
    timed = [(n, r) for n, r in results.arms.items() if r.latency and r.latency.p50_seconds.value]
    timed.sort(key=lambda pair: -(_p50(pair[1]).value or 0.0))
    series = []
    for name, r in timed:
        assert r.latency is not None
        series.append(_ranked(name, r, _p50(r)))
        if r.latency.p95_seconds.value is not None:
            late = f"{name}, 95th percentile"
            series.append(_ranked(name, r, r.latency.p95_seconds, label=late, style="hollow"))
    return Chart(
        name="latency",
        title="Latency of a request",
        x_title="time to the whole answer (seconds, log scale)",
        y_title="arm",
        series=tuple(series),
        caption="Filled: median, with its interval. Hollow: 95th percentile.",
        is_x_log=True,
        is_ranked=True,
    )


def _p50(r: ArmResult) -> Measured:
    return Measured() if r.latency is None else r.latency.p50_seconds


def _ranked(
    name: str,
    r: ArmResult,
    measured: Measured,
    *,
    factor: float = 1.0,
    label: str = "",
    style: str = "points",
) -> Series:
    """One point of an arm's row, with its interval."""
    low, high = (None if v is None else factor * v for v in (measured.low, measured.high))
    return Series(
        name=label or name,
        family=family(r),
        order=0,
        x=(factor * (measured.value or 0.0),),
        y=(name,),
        low=(low,),
        high=(high,),
        style=style,
    )


def consistency_chart(results: Results) -> Chart:
    """How often an arm says the same again: over repeats, and over wordings of the instruction."""
    series = []
    for name, r in results.arms.items():
        probe = r.probes.get("wording")
        wordings = None if probe is None else probe.measures.get("agreement")
        if r.consistency is not None and r.consistency.value is not None:
            series.append(_ranked(name, r, r.consistency, factor=100.0))
        if wordings is not None and wordings.value is not None:
            label = f"{name}, over wordings"
            series.append(_ranked(name, r, wordings, factor=100.0, label=label, style="hollow"))
    return Chart(
        name="consistency",
        title="Consistency",
        x_title="answers that agree (%)",
        y_title="arm",
        series=tuple(series),
        caption="Filled: over sampled repeats of a request. Hollow: over wordings.",
        is_ranked=True,
    )
