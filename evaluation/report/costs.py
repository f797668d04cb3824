"""Tables of money: break-even, what a request takes, how often to train again (pure)."""

from __future__ import annotations

from conf.records import Measured
from conf.results import BreakEven, Results, Retraining
from evaluation import wording
from evaluation.report.charts import CACHE_WORDS
from evaluation.report.tables import SimpleTable


def break_even_table(results: Results) -> SimpleTable:
    """Break-even of every prompted and fine-tuned pair, by cache, in USD and device-seconds."""
    by_pair: dict[tuple[str, str, str], dict[str, BreakEven]] = {}
    for b in results.break_even:
        key = (b.a, b.b, b.cache)
        by_pair.setdefault((b.b, b.a, b.cache) if (b.b, b.a, b.cache) in by_pair else key, {})[
            b.unit
        ] = b
    rows = tuple(
        (
            f"{a} to {b}",
            CACHE_WORDS[cache],
            *(
                text
                for unit in ("usd", "device_seconds")
                for text in (
                    wording.break_even_value(units[unit]),
                    wording.break_even_span(units[unit]) or "-",
                )
            ),
        )
        for (a, b, cache), units in by_pair.items()
        if {"usd", "device_seconds"} <= units.keys()
    )
    return SimpleTable(
        headings=(
            "from, to",
            "prompt cache",
            "in USD",
            "interval",
            "in device-seconds",
            "interval",
        ),
        rows=rows,
        note="Requests after which the second arm, with the higher fixed cost, has cost less in"
        " total. never: it stays dearer per request. No upper bound: the interval of the saving"
        " per request reaches 0.",
    )


def rates_table(results: Results) -> SimpleTable:
    """What a request takes on this model and device, by its tokens."""
    rates = results.request_rates
    rows: tuple[tuple[str, ...], ...] = ()
    if rates is not None and rates.prompt_token_device_seconds.value is not None:
        rows = tuple(
            (what, *_milliseconds(measured))
            for what, measured in (
                ("a request", rates.fixed_device_seconds),
                ("+ each prompt token computed", rates.prompt_token_device_seconds),
                ("+ each token put out", rates.output_token_device_seconds),
            )
        )
    return SimpleTable(
        headings=("of", "device-milliseconds", "interval"), rows=rows, note=_rates_note(results)
    )


def _milliseconds(measured: Measured) -> tuple[str, str]:
    if measured.value is None:
        return "not measured", "-"
    value, low, high = (
        None if v is None else f"{1000 * v:.3g}"
        for v in (measured.value, measured.low, measured.high)
    )
    return str(value), "-" if low is None or high is None else f"{low} to {high}"


def _rates_note(results: Results) -> str:
    rates = results.request_rates
    if rates is None:
        return ""
    note = f"Fitted to the timed requests of {', '.join(rates.arms)}."
    if rates.held_out_error is not None:
        note += f" An arm left out is predicted within {100 * rates.held_out_error:.0f}%."
    return note + (f" Not known: {rates.why_unknown}." if rates.why_unknown else "")


def retraining_table(results: Results) -> SimpleTable:
    """The shortest interval between changes of the data at which training again pays."""
    return SimpleTable(
        headings=("arm", "instead of", "pays if data change at most every", "interval"),
        rows=tuple((r.arm, r.against, *_months(r)) for r in results.retraining),
        note="Training again at every change, a prompt following by itself, at the assumed volume.",
    )


def _months(r: Retraining) -> tuple[str, str]:
    if r.status != "pays" or r.months is None:
        return {"never": "never", "always": "any"}.get(r.status, "unknown"), "-"
    if r.low is None:
        return _duration(r.months), "-"
    if r.high is None:
        return _duration(r.months), f"from {_duration(r.low)}, no upper bound"
    return _duration(r.months), f"{_duration(r.low)} to {_duration(r.high)}"


def _duration(months: float) -> str:
    """In the largest unit that leaves at least 1."""
    hours = months * 730.5  # 365.25 days / 12
    for unit, size in (("months", 730.5), ("days", 24.0), ("hours", 1.0)):
        if hours >= size:
            count = f"{hours / size:.3g}"
            return f"{count} {unit.removesuffix('s') if count == '1' else unit}"
    return f"{60 * hours:.2g} minutes"
