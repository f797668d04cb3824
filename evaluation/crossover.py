"""The request volume at which two arms have cost the same in total (pure).

Arm i has cost fixed_i + volume x request_i. With b dearer at first and cheaper per request, the
curves cross at (fixed_b - fixed_a) / (request_a - request_b). The interval comes from a bootstrap
of the difference of mean request costs, which is carried through the (monotone) formula, so an
interval that reaches a difference of 0 is unbounded above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conf.results import BreakEven
from evaluation.statistics import percentile_interval, resampled_means


@dataclass(kw_only=True, slots=True, frozen=True)
class Side:
    """One arm's costs: fixed and requests in device-seconds, labels_usd in USD."""

    arm: str
    fixed: float | None
    requests: Sequence[float] = ()
    labels_usd: float = 0.0


@dataclass(kw_only=True, slots=True, frozen=True)
class Saving:
    """How much less b costs per request than a, in device-seconds, with interval."""

    value: float
    low: float | None
    high: float | None


def saving_per_request(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Saving | None:
    """Mean request of a minus mean request of b; None where either was not measured."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.size == 0 or y.size == 0:
        return None
    value = float(x.mean() - y.mean())
    n = min(x.size, y.size)
    if n < 2:
        return Saving(value=value, low=None, high=None)
    draws = resampled_means(x, seed=seed) - resampled_means(y, seed=seed + 1)
    low, high = percentile_interval(draws, n=n, confidence=confidence)
    return Saving(value=value, low=low, high=high)


def break_even_device_seconds(
    a: Side, b: Side, *, confidence: float = 0.95, seed: int = 0
) -> BreakEven:
    """Requests after which b has taken fewer device-seconds than a; see `BreakEven`."""
    return _break_even(
        a, b, prices=(1.0, 1.0, 1.0), unit="device_seconds", confidence=confidence, seed=seed
    )


def break_even_usd(
    a: Side,
    b: Side,
    *,
    prices: tuple[float, float, float] | None,
    confidence: float = 0.95,
    seed: int = 0,
) -> BreakEven:
    """Requests after which b has cost less than a; prices: (value, low, high) USD a device-second.

    Without labels the price cancels. With them the interval includes the price's range.
    """
    if prices is None:
        return _unknown(a, b, unit="usd")
    return _break_even(a, b, prices=prices, unit="usd", confidence=confidence, seed=seed)


def _unknown(a: Side, b: Side, *, unit: str) -> BreakEven:
    return BreakEven(
        a=a.arm, b=b.arm, requests=None, low=None, high=None, status="unknown", unit=unit
    )


def _break_even(
    a: Side,
    b: Side,
    *,
    prices: tuple[float, float, float],
    unit: str,
    confidence: float,
    seed: int,
) -> BreakEven:
    saving = saving_per_request(a.requests, b.requests, confidence=confidence, seed=seed)
    if saving is None or a.fixed is None or b.fixed is None:
        return _unknown(a, b, unit=unit)
    labels = (b.labels_usd - a.labels_usd) if unit == "usd" else 0.0
    # Seconds-equivalent of what b costs more at first, at each price.
    extra, *ends = [b.fixed - a.fixed + labels / price if price else 0.0 for price in prices]
    if extra < 0 and saving.value < 0:
        # Here a is the one with the higher fixed cost: it becomes b.
        return _break_even(b, a, prices=prices, unit=unit, confidence=confidence, seed=seed)
    if extra <= 0 and saving.value > 0:
        return BreakEven(
            a=a.arm, b=b.arm, requests=0.0, low=None, high=None, status="always", unit=unit
        )
    is_crossing = saving.value > 0
    may_cross = saving.high is not None and saving.high > 0
    is_bounded = saving.low is not None and saving.low > 0
    return BreakEven(
        a=a.arm,
        b=b.arm,
        requests=extra / saving.value if is_crossing else None,
        low=max(0.0, min(ends)) / saving.high if may_cross and saving.high else None,
        high=max(ends) / saving.low if is_bounded and saving.low else None,
        status="crosses" if is_crossing else "never",
        is_high_unbounded=may_cross and not is_bounded,
        unit=unit,
    )
