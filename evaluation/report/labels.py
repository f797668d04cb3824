"""The report's section on a label curve: sentences, charts and tables (pure)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conf.label_results import LabelCrossing, LabelCurve, LabelPoint
from conf.records import Measured
from conf.results import Results
from evaluation import wording
from evaluation.decision.rules import family
from evaluation.report.charts import Chart, Series, is_priced, percent
from evaluation.report.tables import SimpleTable

SECTION = "label_curve"
MAX_ROWS = 30  # of suspects; results.json has more


@dataclass(kw_only=True, slots=True, frozen=True)
class LabelSection:
    """What a report shows of a label curve."""

    sentences: tuple[str, ...]
    tables: tuple[tuple[str, SimpleTable], ...]
    charts: tuple[Chart, ...]


def label_section(results: Results, charts: Sequence[Chart]) -> LabelSection | None:
    """The section; None where the run has no label curve."""
    curve = results.label_curve
    if curve is None:
        return None
    tables = (
        ("Crossings", crossing_table(curve)),
        ("Points", point_table(curve, results)),
        ("Suspected labels", suspect_table(curve)),
    )
    return LabelSection(
        sentences=tuple(sentences(curve)),
        tables=tuple((title, table) for title, table in tables if table.rows),
        charts=tuple(chart for chart in charts if chart.section == SECTION),
    )


def sentences(curve: LabelCurve) -> list[str]:
    """What was tried, and what that leaves out."""
    sizes = wording.joined([f"{size:,}" for size in curve.sizes])
    lines = [
        f"{sizes} labels, {_times(curve.draws, 'draw')} of each, "
        f"{_times(curve.seeds, 'training seed')} a draw; the sets of one draw are nested, and each "
        "label comes before any comes twice. To find rare labels, more items have to be looked at "
        "than are counted here.",
        "Nothing was chosen on validation labels: labels are scored, calibrated on inputs alone, "
        "and the last step answers. No arm was stopped early.",
    ]
    missing = sum(point.num_missing for point in curve.points)
    if missing:
        lines.append(f"{_times(missing, 'run')} did not end, and points have fewer draws for it.")
    if curve.num_checked and not curve.num_suspects:
        lines.append(
            f"No label is suspect: of {curve.num_checked} test items there is none that all arms "
            "answer alike and against its label."
        )
    return lines


def _times(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def label_charts(results: Results) -> list[Chart]:
    """Metric, cost before the first request, and what noise does, against the number of labels."""
    curve = results.label_curve
    if curve is None:
        return []
    charts = [_metric_chart(curve, results), _cost_chart(curve, results)]
    charts += [_noise_chart(curve, results)] if len(curve.noise) > 1 else []
    return [chart for chart in charts if chart.series]


def _metric_chart(curve: LabelCurve, results: Results) -> Chart:
    name = wording.metric(curve.metric)
    series = [
        *_series(curve, results, lambda point: point.value),
        *_constant_series(curve, results),
    ]
    return Chart(
        name="label_curve",
        title=f"{wording.capitalised(name)} against the number of labels",
        x_title="labels (log scale)",
        y_title=f"{name} (%)",
        series=tuple(series),
        caption="Bars are intervals over items, draws and seeds. Level lines: arms without labels.",
        is_x_log=True,
        section=SECTION,
    )


def _cost_chart(curve: LabelCurve, results: Results) -> Chart:
    priced = is_priced(results)
    unit = "USD, labels with their price" if priced else "device-seconds"

    def cost(point: LabelPoint) -> Measured:
        value = point.fixed_usd if priced else point.fixed_device_seconds
        return Measured(value=value if value else None)

    return Chart(
        name="label_cost",
        title="Cost before the first request against the number of labels",
        x_title="labels (log scale)",
        y_title=f"fixed cost ({unit}, log scale)",
        series=tuple(_series(curve, results, cost, scale=1.0)),
        caption="Mean over draws: training, features, validation inputs and fits.",
        is_x_log=True,
        is_y_log=True,
        section=SECTION,
    )


def _noise_chart(curve: LabelCurve, results: Results) -> Chart:
    largest = curve.sizes[-1]
    orders = _orders(curve, results)
    series = []
    for arm, (kind, order) in orders.items():
        points = [p for p in curve.points if p.arm == arm and p.num_labels == largest]
        points = [p for p in points if p.value.value is not None]
        xs = tuple(100 * p.noise for p in points)
        series += _line(arm, kind, order, xs, [p.value for p in points], scale=100.0)
    name = wording.metric(curve.metric)
    return Chart(
        name="label_noise",
        title=f"{wording.capitalised(name)} with flipped labels",
        x_title=f"labels flipped (%), of {largest:,}",
        y_title=f"{name} (%)",
        series=tuple(series),
        caption="Training labels and shots are flipped, test labels never.",
        section=SECTION,
    )


def _orders(curve: LabelCurve, results: Results) -> dict[str, tuple[str, int]]:
    """Arm -> its family, and its number within it."""
    seen: dict[str, int] = defaultdict(int)
    found = {}
    for arm in dict.fromkeys([*(p.arm for p in curve.points), *curve.constants]):
        kind = family(results.arms[arm])
        found[arm] = (kind, seen[kind])
        seen[kind] += 1
    return found


def _series(
    curve: LabelCurve,
    results: Results,
    measure: Callable[[LabelPoint], Measured],
    *,
    scale: float = 100.0,
) -> list[Series]:
    """One series an arm, without noise."""
    series = []
    for arm, (kind, order) in _orders(curve, results).items():
        points = [p for p in curve.points if p.arm == arm and not p.noise]
        known = [(p, measure(p)) for p in points if measure(p).value is not None]
        xs = tuple(p.num_labels for p, _ in known)
        series += _line(arm, kind, order, xs, [m for _, m in known], scale=scale)
    return series


def _line(
    arm: str,
    kind: str,
    order: int,
    xs: Sequence[float],
    values: Sequence[Measured],
    *,
    scale: float,
) -> list[Series]:
    if not values:
        return []
    return [
        Series(
            name=arm,
            family=kind,
            order=order,
            x=tuple(float(x) for x in xs),
            y=tuple(scale * (m.value or 0.0) for m in values),
            low=tuple(None if m.low is None else scale * m.low for m in values),
            high=tuple(None if m.high is None else scale * m.high for m in values),
            style="joined" if len(values) > 1 else "points",
        )
    ]


def _constant_series(curve: LabelCurve, results: Results) -> list[Series]:
    """Arms without labels, level over all sizes."""
    orders = _orders(curve, results)
    ends = (float(curve.sizes[0]), float(curve.sizes[-1])) if curve.sizes else ()
    return [
        Series(
            name=arm,
            family=orders[arm][0],
            order=orders[arm][1],
            x=ends,
            y=tuple(percent(value.value) or 0.0 for _ in ends),
            style="line",
        )
        for arm, value in curve.constants.items()
        if value.value is not None
    ]


def crossing_table(curve: LabelCurve) -> SimpleTable:
    """Tuned against prompted: from how many labels on the tuned arm is at least as good."""
    has_noise = len(curve.noise) > 1
    rows = tuple(
        (
            crossing.tuned,
            crossing.prompted,
            *((wording.percent(crossing.noise, digits=0),) if has_noise else ()),
            crossing_words(crossing),
            _crossing_span(crossing),
            wording.percent(crossing.share_seen, digits=0),
        )
        for crossing in curve.crossings
    )
    return SimpleTable(
        headings=(
            "tuned",
            "prompted",
            *(("labels flipped",) if has_noise else ()),
            "as good from (labels)",
            "interval",
            "resamples with it",
        ),
        rows=rows,
        note="From that many labels on the tuned arm stays at least as good, interpolated in the"
        " logarithm of labels; the interval is a bootstrap over items and draws. A crossing beyond"
        " the numbers tried is not extrapolated.",
    )


def crossing_words(crossing: LabelCrossing) -> str:
    """'about 140', 'none seen up to 512', '8 or fewer'."""
    match crossing.status:
        case "crosses":
            return f"about {_rounded(crossing.labels)}"
        case "none_seen":
            return f"none seen up to {crossing.largest:,}"
        case "always":
            return f"{crossing.smallest:,} or fewer"
    return "not measured"


def _crossing_span(crossing: LabelCrossing) -> str:
    if crossing.share_seen is None:
        return "no interval"
    below, above = f"under {crossing.smallest:,}", f"over {crossing.largest:,}"
    if crossing.low is None and crossing.high == crossing.smallest:
        return below
    if crossing.high is None and crossing.low == crossing.largest:
        return above
    low = below if crossing.low is None else _rounded(crossing.low)
    high = above if crossing.high is None else _rounded(crossing.high)
    return f"{low} to {high}"


def _rounded(labels: float | None) -> str:
    """Two figures: more would pretend."""
    return wording.UNKNOWN if labels is None else f"{float(f'{labels:.2g}'):,.0f}"


def point_table(curve: LabelCurve, results: Results) -> SimpleTable:
    """Every arm at every number of labels."""
    priced = is_priced(results)
    unit = "USD" if priced else "device-s"
    rows = []
    for point in curve.points:
        fixed = point.fixed_usd if priced else point.fixed_device_seconds
        request = (point.request_usd if priced else point.request_device_seconds).value
        used = f" ({point.num_used:,} used)" if point.num_used != point.num_labels else ""
        rows.append(
            (
                point.arm,
                f"{point.num_labels:,}{used}",
                wording.percent(point.share_flipped) if point.noise else "none",
                wording.share_with_interval(point.value),
                wording.points(point.sd_draws).removeprefix("+"),
                f"{point.num_runs} of {point.num_runs + point.num_missing}",
                wording.amount(fixed, is_usd=priced),
                wording.amount(None if request is None else 1000 * request, is_usd=priced),
                wording.tokens(point.prompt_tokens),
            )
        )
    return SimpleTable(
        headings=(
            "arm",
            "labels",
            "flipped",
            wording.metric(curve.metric),
            "sd over draws (points)",
            "runs",
            f"fixed ({unit})",
            f"{unit}/1,000 requests",
            "prompt tokens",
        ),
        rows=tuple(rows),
        note="Fixed: mean over draws, before the first request. Requests are timed in the first"
        " draw. Drawn shots end at num_shots: more labels change nothing.",
    )


def suspect_table(curve: LabelCurve) -> SimpleTable:
    """Test items that all arms answer alike and against their label."""
    shown = curve.suspects[:MAX_ROWS]
    has_text = any(s.input is not None for s in shown)
    rows = tuple(
        (
            s.item_id,
            *(
                (s.label or "", s.answer or "", wording.first_line(s.input or ""))
                if has_text
                else ()
            ),
            str(s.num_answers),
        )
        for s in shown
    )
    more = curve.num_suspects - len(shown)
    return SimpleTable(
        headings=(
            "item",
            *(("label", "all arms say", "input") if has_text else ()),
            "answers",
        ),
        rows=rows,
        note=f"{curve.num_suspects} of {curve.num_checked} test items that all arms answered"
        + (f"; {more} more are in results.json" if more > 0 else "")
        + ". All arms can be wrong in the same way: look at them before a label is changed."
        + ("" if has_text or not shown else " Texts are left out, since report.text=none."),
    )
