"""Numbers and names as people read them: one place for the report, the panel and the verdict."""

from __future__ import annotations

import math

from conf.records import Measured
from conf.results import BreakEven, Metric

UNKNOWN = "n/a"
METRICS = {
    "json": "JSON score",
    "exact": "exact match",
    "numeric": "numeric match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
}


def metric(name: str) -> str:
    """A metric's name as people write it."""
    return METRICS.get(name, name.replace("_", " "))


def capitalised(text: str) -> str:
    """The first letter large, the others as they are."""
    return text[:1].upper() + text[1:]


def percent(value: float | None, *, digits: int = 1) -> str:
    """0.934 -> '93.4%'."""
    return UNKNOWN if value is None else f"{100 * value:.{digits}f}%"


def points(value: float | None, *, digits: int = 1) -> str:
    """A difference of shares in percentage points, signed: 0.031 -> '+3.1'."""
    return UNKNOWN if value is None else f"{100 * value:+.{digits}f}"


def span(low: float | None, high: float | None, *, is_points: bool = False) -> str:
    """An interval of shares: '90.1 to 95.7'; the unit stands with the value."""
    if low is None or high is None:
        return "no interval"
    show = points if is_points else lambda v: f"{100 * v:.1f}"
    return f"{show(low)} to {show(high)}"


def share_with_interval(measured: Measured | Metric | None) -> str:
    """'93.4% (90.1 to 95.7)'."""
    if measured is None or measured.value is None:
        return UNKNOWN
    if measured.low is None or measured.high is None:
        return percent(measured.value)
    return f"{percent(measured.value)} ({span(measured.low, measured.high)})"


def usd(value: float | None) -> str:
    """A sum of money with two or three figures that matter: '12.40', '0.0034', '1,240'."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0"
    if abs(value) < 1000:
        value = float(f"{value:.3g}")  # before the digits are counted: 0.9999 is 1.00
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 1:
        return f"{value:.2f}"
    digits = min(12, 2 - math.floor(math.log10(size)))
    return f"{value:.{digits}f}"


def seconds(value: float | None) -> str:
    """A duration: '0.31 ms', '45 ms', '1.24 s', '2 min 5 s', '3.1 h'."""
    if value is None:
        return UNKNOWN
    if value < 0.01:
        return f"{1000 * value:.2f} ms"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} s"
    if value < 7200:
        return f"{value // 60:.0f} min {value % 60:.0f} s"
    return f"{value / 3600:.1f} h"


def count(value: float | None) -> str:
    """A count in words that can be read at a glance: '1,240', '3.4 million'."""
    if value is None:
        return UNKNOWN
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def tokens(value: float | None) -> str:
    """Mean tokens per item."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def size_in_bytes(value: float | None) -> str:
    """'3.2 MB'."""
    if value is None:
        return UNKNOWN
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} bytes"


def joined(names: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    if len(names) <= 1:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def first_line(text: str, *, limit: int = 200) -> str:
    """The first line of an error, cut at `limit` characters."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def amount(value: float | None, *, is_usd: bool) -> str:
    """A cost in USD, or without a price in device-seconds; the unit stands in the heading."""
    return usd(value) if is_usd or (value is not None and 0 < value < 100) else count(value)


def break_even_value(b: BreakEven) -> str:
    """Requests, or why there is no number."""
    match b.status:
        case "crosses":
            return f"{count(b.requests)} requests"
        case "never":
            return "never"
        case "always":
            return "from the first request"
    return "unknown"


def break_even_span(b: BreakEven) -> str:
    """The interval in words; empty where there is nothing to say."""
    if b.low is None and b.high is None:
        return "no interval" if b.status == "crosses" else ""
    if b.high is None:
        return f"from {count(b.low)}, no upper bound"
    return f"{count(b.low)} to {count(b.high)}"
