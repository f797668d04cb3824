"""What the report's charts show, as plain data; evaluation/report/figures.py draws it (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from conf.results import ArmResult, BreakEven, Results
from evaluation import wording
from evaluation.decision.rules import family
from evaluation.records.run_records import RunRecords


@dataclass(kw_only=True, slots=True, frozen=True)
class Series:
    """Points or a line of one arm. order counts arms within a family, for dash and symbol.

    low, high: ends of the interval of the measured axis; None where there is none.
    """

    name: str
    family: str
    order: int
    x: tuple[float | str, ...]
    y: tuple[float | str, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    style: str = "points"  # points | hollow | joined (points with a line) | line | thin | faint


@dataclass(kw_only=True, slots=True, frozen=True)
class Mark:
    """A labelled point, or with y None a vertical line."""

    x: float
    label: str
    y: float | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class Chart:
    """One chart. is_ranked: y holds names and the measured axis is x.

    section: where it stands: empty with the arms' charts, `search`, or `search/<arm>`.
    """

    name: str
    title: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    caption: str = ""
    marks: tuple[Mark, ...] = ()
    is_x_log: bool = False
    is_y_log: bool = False
    is_ranked: bool = False
    section: str = ""


def metric_name(results: Results) -> str:
    """The headline metric's name in words."""
    name = next((r.metric.name for r in results.arms.values() if r.metric), "metric")
    return wording.metric(name)


def is_priced(results: Results) -> bool:
    """Whether request costs are known in USD."""
    return any(
        r.cost is not None and r.cost.request_usd.value is not None for r in results.arms.values()
    )


def _orders(results: Results) -> dict[str, int]:
    """Arm -> its number within its family."""
    seen: dict[str, int] = {}
    orders = {}
    for name, result in results.arms.items():
        orders[name] = seen.setdefault(family(result), 0)
        seen[family(result)] += 1
    return orders


def percent(value: float | None) -> float | None:
    """A share as percent."""
    return None if value is None else 100 * value


def accuracy_chart(results: Results) -> Chart:
    """The metric of every arm with its interval, best on top; hollow: before calibration."""
    orders = _orders(results)
    named = [(n, r) for n, r in results.arms.items() if r.metric and r.metric.value is not None]
    named.sort(key=lambda pair: pair[1].metric.value or 0.0)  # type: ignore[union-attr]
    series = []
    for name, r in named:
        assert r.metric is not None and r.metric.value is not None
        point = Series(
            name=name,
            family=family(r),
            order=orders[name],
            x=(100 * r.metric.value,),
            y=(name,),
            low=(percent(r.metric.low),),
            high=(percent(r.metric.high),),
        )
        series.append(point)
        raw = _raw(r)
        if raw is not None:
            series.append(
                Series(
                    name=f"{name}, not calibrated",
                    family=family(r),
                    order=orders[name],
                    x=(100 * raw,),
                    y=(name,),
                    style="hollow",
                )
            )
    has_raw = any(s.style == "hollow" for s in series)
    confidence = wording.percent(_number(results.decision.get("confidence")) or 0.95, digits=0)
    return Chart(
        name="accuracy",
        title=f"{wording.capitalised(metric_name(results))} on the test items",
        x_title=f"{metric_name(results)} (%)",
        y_title="arm",
        series=tuple(series),
        caption=f"Lines are {confidence} intervals."
        + (" Hollow: the same answers before calibration." if has_raw else ""),
        is_ranked=True,
    )


def _raw(r: ArmResult) -> float | None:
    """Uncalibrated accuracy, where the metric is the calibrated one."""
    is_calibrated = r.answer_rule is not None and r.answer_rule.is_calibrated
    return r.accuracy.value if is_calibrated and r.accuracy is not None else None


def cost_quality_chart(results: Results) -> Chart:
    """Metric against the cost of 1,000 requests."""
    with_usd, orders = is_priced(results), _orders(results)
    series = []
    for name, r in results.arms.items():
        cost = r.cost and (r.cost.request_usd if with_usd else r.cost.request_device_seconds).value
        if r.metric is None or r.metric.value is None or not cost:
            continue
        series.append(
            Series(
                name=name,
                family=family(r),
                order=orders[name],
                x=(1000 * cost,),
                y=(100 * r.metric.value,),
                low=(percent(r.metric.low),),
                high=(percent(r.metric.high),),
            )
        )
    unit = "USD" if with_usd else "device-seconds"
    return Chart(
        name="cost_quality",
        title=f"{wording.capitalised(metric_name(results))} against the cost of a request",
        x_title=f"cost per 1,000 requests ({unit}, log scale)",
        y_title=f"{metric_name(results)} (%)",
        series=tuple(series),
        caption="Better is up and to the left. Fixed costs are not in here: see total cost.",
        is_x_log=True,
    )


def training_chart(results: Results, records: RunRecords) -> Chart:
    """Training loss against tokens trained."""
    orders = _orders(results)
    series = []
    for name, r in results.arms.items():
        tokens, xs, ys = 0, [], []
        for record in sorted(records.arms[name].train, key=lambda t: (t.train_seed, t.step)):
            if record.train_seed != records.arms[name].train[0].train_seed:
                continue
            tokens += record.tokens
            xs.append(float(tokens))
            ys.append(record.loss)
        if xs:
            series.append(_line(name, family(r), orders[name], xs, ys))
    return Chart(
        name="training",
        title="Training loss",
        x_title="tokens trained (count, without padding)",
        y_title="loss (nats per target token)",
        series=tuple(series),
    )


def _line(name: str, kind: str, order: int, xs: Sequence[float], ys: Sequence[float]) -> Series:
    return Series(name=name, family=kind, order=order, x=tuple(xs), y=tuple(ys), style="line")


def validation_chart(results: Results, records: RunRecords) -> Chart:
    """Validation metric at the checkpoints of each training."""
    orders = _orders(results)
    series = []
    for name, r in results.arms.items():
        points = sorted(records.arms[name].curve, key=lambda p: p.tokens)
        points = [p for p in points if p.value.value is not None]
        if points:
            series.append(
                Series(
                    name=name,
                    family=family(r),
                    order=orders[name],
                    x=tuple(float(p.tokens) for p in points),
                    y=tuple(100 * (p.value.value or 0.0) for p in points),
                    low=tuple(percent(p.value.low) for p in points),
                    high=tuple(percent(p.value.high) for p in points),
                )
            )
    return Chart(
        name="validation",
        title="Validation during training",
        x_title="tokens trained (count, without padding)",
        y_title=f"{metric_name(results)} on validation (%)",
        series=tuple(series),
    )


def headline_break_even(results: Results, *, cache: str = "measured") -> BreakEven | None:
    """The crossing of the best prompted and the best fine-tuned arm, picked on validation.

    cache: what tokens cost that a cache holds, see `BreakEven`.
    """
    names = {results.decision.get("best_prompted"), results.decision.get("best_tuned")}
    unit = "usd" if is_priced(results) else "device_seconds"
    for b in results.break_even:
        if {b.a, b.b} == names and b.unit == unit and b.cache == cache:
            return b
    return None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def assumed_volume(results: Results) -> float | None:
    """Requests over the horizon that the decision assumes."""
    months = _number(results.decision.get("horizon_months"))
    requests = _number(results.decision.get("requests_per_month"))
    return None if months is None or requests is None else months * requests


CACHE_WORDS = {
    "measured": "cache as measured",
    "discount": "cache at a discount",
    "none": "no cache",
}


def _other_caches(
    name: str, result: ArmResult, grid: Sequence[float], *, unit: str, fixed: float
) -> list[Series]:
    """The arm's lines where cached tokens are paid; none where that comes to the same."""
    bills = {} if result.cost is None else result.cost.by_cache
    own = getattr(bills["measured"], unit).value if "measured" in bills else None
    found = []
    for order, cache in enumerate(("discount", "none"), start=1):
        request = getattr(bills[cache], unit).value if cache in bills else None
        if request is None or own is None or request <= 1.01 * own:
            continue
        ys = [fixed + v * request for v in grid]
        found.append(_line(f"{name}, {CACHE_WORDS[cache]}", family(result), order, grid, ys))
    return found


def volume_chart(results: Results) -> Chart:
    """Total cost against requests served, log-log, with the crossing and the assumed volume.

    The best prompted and the best tuned arm are thick, with a line for each rule about cached
    tokens: solid as measured, dashed at a discount, dotted without a cache.
    """
    with_usd, orders = is_priced(results), _orders(results)
    unit = "usd" if with_usd else "device_seconds"
    headline = {results.decision.get("best_prompted"), results.decision.get("best_tuned")}
    volume, crossing = assumed_volume(results), headline_break_even(results)
    at = crossing.requests if crossing is not None and crossing.status == "crosses" else None
    top = max(1e6, 10 * (volume or 0.0), 10 * (at or 0.0))
    grid = [10 ** (i / 8) for i in range(1000) if 10 ** (i / 8) <= top * 1.01]
    series, marks = [], []
    for name, r in results.arms.items():
        if r.cost is None or r.status != "done":
            continue
        fixed = r.cost.fixed_usd if with_usd else r.cost.fixed_device_seconds
        request = (r.cost.request_usd if with_usd else r.cost.request_device_seconds).value
        if fixed is None or request is None:
            continue
        ys = [fixed + v * request for v in grid]
        if min(ys) <= 0:
            continue
        line = _line(name, family(r), 0 if name in headline else orders[name], grid, ys)
        series.append(line if name in headline else replace(line, style="thin"))
        if name in headline:
            series += _other_caches(name, r, grid, unit=unit, fixed=fixed)
        if at and crossing is not None and name == crossing.b:
            label = (
                f"The lines of {crossing.a} and {crossing.b} cross at {wording.count(at)} requests."
            )
            marks.append(Mark(x=at, y=fixed + at * request, label=label))
    if volume:
        marks.append(Mark(x=volume, label=f"assumed: {wording.count(volume)} requests"))
    return Chart(
        name="volume",
        title="Total cost against volume",
        x_title="requests served (count, log scale)",
        y_title=f"total cost ({'USD' if with_usd else 'device-seconds'}, log scale)",
        series=tuple(series),
        caption=next((m.label for m in marks if m.y is not None), ""),
        marks=tuple(marks),
        is_x_log=True,
        is_y_log=True,
    )
