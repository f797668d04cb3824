"""Measured values as a criterion's evidence writes them: always with interval and n (pure)."""

from __future__ import annotations

from conf.records import Measured
from conf.results import Metric, Pair
from evaluation import wording


def share(value: Measured | Metric) -> str:
    """'93.4% (90.1 to 95.7; n = 160)'."""
    return _with(wording.percent(value.value), wording.span(value.low, value.high), value.n)


def points(value: Measured) -> str:
    """'-5.0 points (-12.0 to +2.0; n = 60)', of a difference of shares."""
    span = wording.span(value.low, value.high, is_points=True)
    return _with(f"{wording.points(value.value)} points", span, value.n)


def amount(pair: Pair) -> str:
    """A paired difference, as points."""
    return points(Measured(value=pair.difference, low=pair.low, high=pair.high, n=pair.n))


def measured(value: Measured, *, unit: str, times: float = 1.0) -> str:
    """A cost of `times` requests: '0.0012 USD (0.0011 to 0.0013; n = 8)'."""
    show = [None if v is None else v * times for v in (value.value, value.low, value.high)]
    texts = [wording.amount(v, is_usd=unit == "USD") for v in show]
    span = f"{texts[1]} to {texts[2]}" if None not in show[1:] else "no interval"
    return _with(f"{texts[0]} {unit}", span, value.n)


def _with(text: str, span: str, n: int | None) -> str:
    return f"{text} ({span})" if n is None else f"{text} ({span}; n = {n})"
