"""The tables and sentences of a report, for HTML and Markdown alike (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from conf.records import Measured
from conf.results import ArmResult, BreakEven, Pair, Results
from evaluation import wording
from evaluation.decision.rules import family, pair_of
from evaluation.report.charts import (
    assumed_volume,
    headline_break_even,
    is_priced,
    metric_name,
)
from evaluation.report.pair_words import pairs_note, test_cells


@dataclass(kw_only=True, slots=True, frozen=True)
class Cell:
    """A figure, and a smaller note below it (its interval)."""

    value: str
    note: str = ""


@dataclass(kw_only=True, slots=True, frozen=True)
class ArmRow:
    """One row of the table of arms; with an error there are no cells."""

    name: str
    family: str
    cells: tuple[Cell, ...] = ()
    error: str = ""
    note: str = ""
    style: str = ""


@dataclass(kw_only=True, slots=True, frozen=True)
class KeyFigure:
    """One figure beside the verdict."""

    title: str
    value: str
    note: str
    key: str = ""  # by which the page's script finds it again


@dataclass(kw_only=True, slots=True, frozen=True)
class SimpleTable:
    """Headings, rows of text, and a note below."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def arm_headings(results: Results) -> list[str]:
    """Headings of the table of arms; the first is the arm."""
    unit = "USD" if is_priced(results) else "device-s"
    return [
        "arm",
        f"{metric_name(results)}",
        "answered by",
        "macro-F1",
        "valid format",
        "latency p50, p95",
        f"{unit} per 1,000 requests",
        f"fixed {unit}",
        "USD per million tokens",
        "labels",
        "tokens in, out",
    ]


def arm_rows(results: Results) -> list[ArmRow]:
    """All arms; failed ones with their reason."""
    with_usd = is_priced(results)
    return [_arm_row(name, r, results, with_usd=with_usd) for name, r in results.arms.items()]


def _arm_row(name: str, r: ArmResult, results: Results, *, with_usd: bool) -> ArmRow:
    if r.status != "done":
        error = f"{r.status}: {r.error or 'no reason recorded'}"
        return ArmRow(name=name, family=family(r), error=error, style="failed")
    notes = ["reused"] if r.is_reused else []
    if not r.is_same_base:
        notes.append("another base model")
    return ArmRow(
        name=name,
        family=family(r),
        cells=tuple(_arm_cells(r, with_usd=with_usd)),
        note=", ".join(notes),
        style="chosen" if name == results.recommendation.arm else "",
    )


def _arm_cells(r: ArmResult, *, with_usd: bool) -> list[Cell]:
    cost, latency, tokens = r.cost, r.latency, r.tokens
    request = fixed = per_million = None
    if cost is not None:
        request = cost.request_usd if with_usd else cost.request_device_seconds
        fixed = cost.fixed_usd if with_usd else cost.fixed_device_seconds
        per_million = cost.usd_per_million_tokens.value
    metric = r.metric
    return [
        Cell(
            value=wording.percent(metric.value if metric else None),
            note=wording.span(metric.low, metric.high) if metric else "",
        ),
        _answered_by(r),
        _share_cell(r.macro_f1),
        _share_cell(r.format_validity),
        Cell(
            value=wording.seconds(latency.p50_seconds.value if latency else None),
            note=wording.seconds(latency.p95_seconds.value) if latency else "",
        ),
        _request_cell(request, is_usd=with_usd),
        Cell(value=wording.amount(fixed, is_usd=with_usd)),
        Cell(value=wording.usd(per_million)),
        Cell(value=wording.count(r.labels_used)),
        Cell(
            value=wording.tokens(tokens.prompt.value if tokens else None),
            note=wording.tokens(tokens.completion.value) if tokens else "",
        ),
    ]


def _share_cell(measured: Measured | None) -> Cell:
    if measured is None or measured.value is None:
        return Cell(value="-")
    return Cell(
        value=wording.percent(measured.value), note=wording.span(measured.low, measured.high)
    )


def _answered_by(r: ArmResult) -> Cell:
    if r.answer_rule is None:
        return Cell(value="-")
    rule = r.answer_rule
    vote = ", vote" if rule.is_voted else ""
    if not rule.is_calibrated:
        return Cell(value=rule.answer_by + vote)
    raw = f"raw {wording.percent(r.accuracy.value)}" if r.accuracy else ""
    return Cell(value=rule.name.replace("/", ", "), note=raw)


def _request_cell(request: Measured | None, *, is_usd: bool) -> Cell:
    if request is None or request.value is None:
        return Cell(value=wording.UNKNOWN)
    note = ""
    if request.low is not None and request.high is not None:
        ends = [wording.amount(1000 * v, is_usd=is_usd) for v in (request.low, request.high)]
        note = f"{ends[0]} to {ends[1]}"
    return Cell(value=wording.amount(1000 * request.value, is_usd=is_usd), note=note)


def key_figures(results: Results) -> list[KeyFigure]:
    """What stands beside the verdict: difference, costs, break-even, traffic and price."""
    prompted, tuned = (results.decision.get(k) for k in ("best_prompted", "best_tuned"))
    figures = []
    if isinstance(prompted, str) and isinstance(tuned, str):
        figures.append(_difference_figure(results, tuned, prompted))
    names = [n for n in (tuned, prompted, results.recommendation.arm) if isinstance(n, str)]
    names = list(dict.fromkeys(names))
    with_usd = is_priced(results)
    unit = "USD" if with_usd else "Device-seconds"
    for name in names:
        cost = results.arms[name].cost
        request = None
        if cost is not None:
            request = cost.request_usd if with_usd else cost.request_device_seconds
        cell = _request_cell(request, is_usd=with_usd)
        figures.append(
            KeyFigure(
                title=f"{unit} per 1,000 requests, {name}",
                value=cell.value,
                note=cell.note,
                key=f"request:{name}",
            )
        )
    crossing = headline_break_even(results)
    if crossing is not None:
        figures.append(
            KeyFigure(
                title=f"Break-even, {crossing.a} to {crossing.b}",
                value=wording.break_even_value(crossing),
                note=_break_even_note(results, crossing),
                key="break_even",
            )
        )
    return [*figures, *_assumptions(results)]


def _difference_figure(results: Results, tuned: str, prompted: str) -> KeyFigure:
    pair = pair_of(results.pairs, tuned, prompted)
    return KeyFigure(
        title=f"{tuned} minus {prompted}, points of {metric_name(results)}",
        value=wording.points(pair.difference if pair else None),
        note=f"{wording.span(pair.low, pair.high, is_points=True)}; n = {pair.n}" if pair else "",
    )


def _break_even_note(results: Results, crossing: BreakEven) -> str:
    """Its interval, and the crossing without a prompt cache where that is another one."""
    span = wording.break_even_span(crossing)
    bare = headline_break_even(results, cache="none")
    if bare is None or bare.requests == crossing.requests:
        return span
    return f"{span}; without a prompt cache: {wording.break_even_value(bare)}".removeprefix("; ")


def _assumptions(results: Results) -> list[KeyFigure]:
    months = results.decision.get("horizon_months")
    price = results.pricing.get("device_hour")
    usd = price.get("usd") if isinstance(price, dict) else None
    monthly = results.decision.get("requests_per_month")
    is_known = isinstance(monthly, (int, float)) and isinstance(months, (int, float))
    rate = f"{monthly:,.0f} a month for {months:g} months" if is_known else ""
    return [
        KeyFigure(
            title="Assumed volume",
            value=wording.count(assumed_volume(results)),
            note=rate,
            key="volume",
        ),
        KeyFigure(
            title="Price of a device-hour",
            value="no price" if usd is None else f"{usd:g} USD",
            note="cost in device-seconds"
            if usd is None
            else f"{results.pricing.get('source')}, {results.pricing.get('date')}",
            key="price",
        ),
    ]


def pair_table(results: Results) -> SimpleTable:
    """All pairs with difference, interval and tests."""
    rows = tuple(
        (
            f"{p.a} - {p.b}",
            wording.points(p.difference),
            wording.span(p.low, p.high, is_points=True),
            f"{p.wins} / {p.losses} / {p.ties}",
            *test_cells(p),
            str(p.n),
        )
        for p in sorted(results.pairs, key=_by_difference)
    )
    return SimpleTable(
        headings=("pair", "points", "interval", "wins / losses / ties", "p", "p (Holm)", "items"),
        rows=rows,
        note="Difference of the metric in percentage points, first minus second arm."
        + pairs_note(results.pairs),
    )


def _by_difference(p: Pair) -> float:
    return -abs(p.difference or 0.0)


def ledger_table(results: Results) -> SimpleTable:
    """Tokens and device-seconds by arm and purpose."""
    sums: dict[tuple[str, str], list[float]] = {}
    for line in results.ledger:
        arm = (line.arm or "(no arm)").partition("@")[0]  # the runs of a label curve with their arm
        total = sums.setdefault((arm, line.purpose), [0.0, 0.0, 0.0, 0.0])
        total[0] += line.tokens
        total[1] += line.completion_tokens
        total[2] += line.device_seconds
        total[3] += line.device_seconds if line.is_reused else 0.0
    price = results.pricing.get("usd_per_device_second")
    rows = [_ledger_row(*key, *values, price=price) for key, values in sums.items()]
    if sums:
        columns = [sum(v[i] for v in sums.values()) for i in range(4)]
        rows.append(_ledger_row("all", "", *columns, price=price))
    return SimpleTable(
        headings=(
            "arm",
            "purpose",
            "tokens",
            "completion tokens",
            "device-seconds",
            "USD",
            "of it reused",
        ),
        rows=tuple(rows),
        note="Tokens are rows forwarded through the embedding. A reused job keeps its original cost"
        " on the arm's bill. Test and latency lines are the price of comparing and are in no arm's"
        " fixed cost.",
    )


def _ledger_row(
    arm: str,
    purpose: str,
    tokens: float,
    completion: float,
    seconds: float,
    reused: float,
    *,
    price: object,
) -> tuple[str, ...]:
    usd = seconds * price if isinstance(price, (int, float)) else None
    return (
        arm,
        purpose,
        f"{tokens:,.0f}",
        f"{completion:,.0f}",
        f"{seconds:,.1f}",
        wording.usd(usd),
        wording.percent(reused / seconds if seconds else 0.0, digits=0),
    )
