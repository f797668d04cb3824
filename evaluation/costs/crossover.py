"""The request volume at which two arms have cost the same in total (pure).

Arm i has cost fixed_i + volume x request_i. With b dearer at first and cheaper per request, the
curves cross at (fixed_b - fixed_a) / (request_a - request_b). The interval comes from a bootstrap
of the difference of mean request costs (of the timed requests, of the rates that cached tokens are
priced at, and of the items whose errors cost money), carried through the (monotone) formula at
each end of the price's range: an interval that reaches a difference of 0 is unbounded above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from conf.results import BreakEven
from evaluation.statistics import percentile_interval, resampled_means

Floats = NDArray[np.float64]


@dataclass(kw_only=True, slots=True, frozen=True)
class Side:
    """One arm's costs: fixed and requests in device-seconds, people_usd in USD (labels, hours).

    requests_usd: of a hosted model instead of device-seconds; its fixed USD are in people_usd.
    hosting: device-seconds paid for each busy one, in USD only.
    rate_draws: (NUM_RESAMPLES,) device-seconds by which the mean request moves with the rates that
    were fitted; the same draw of the rates for both sides. scores: item id -> score.
    """

    arm: str
    fixed: float | None
    requests: Sequence[float] = ()
    people_usd: float = 0.0
    requests_usd: Sequence[float] = ()
    rate_draws: Floats | None = None
    hosting: float = 1.0
    scores: Mapping[str, float] = field(default_factory=dict)

    def requests_at(self, price: float) -> Floats:
        """What each timed request costs where a device-second costs `price`."""
        if self.requests_usd:
            return np.asarray(self.requests_usd, dtype=np.float64)
        return price * self.hosting * np.asarray(self.requests, dtype=np.float64)


@dataclass(kw_only=True, slots=True, frozen=True)
class Saving:
    """How much less b costs per request than a, with interval, in device-seconds or in USD."""

    value: float
    low: float | None
    high: float | None


def saving_per_request(
    a: Side,
    b: Side,
    *,
    price: float = 1.0,
    error_usd: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Saving | None:
    """Mean request of a minus mean request of b; None where either was not measured.

    Args:
        a: the arm that is dearer per request.
        b: the other one.
        price: of a device-second.
        error_usd: of a wrong answer, saved by the better arm: on the items both answered.
        confidence: of the interval.
        seed: of the resampling.
    """
    x, y = a.requests_at(price), b.requests_at(price)
    common = sorted(a.scores.keys() & b.scores.keys()) if error_usd else []
    if x.size == 0 or y.size == 0 or (error_usd and not common):
        return None
    gains = np.array([error_usd * (b.scores[i] - a.scores[i]) for i in common])
    value = float(x.mean() - y.mean()) + (float(gains.mean()) if common else 0.0)
    n = min(x.size, y.size)
    if n < 2:
        return Saving(value=value, low=None, high=None)
    draws = resampled_means(x, seed=seed) - resampled_means(y, seed=seed + 1)
    for side, sign in ((a, price), (b, -price)):
        if side.rate_draws is not None:
            draws = draws + sign * side.hosting * side.rate_draws
    if common:
        draws = draws + resampled_means(gains, seed=seed + 2)
    low, high = percentile_interval(draws, n=n, confidence=confidence)
    return Saving(value=value, low=low, high=high)


def break_even_device_seconds(
    a: Side, b: Side, *, confidence: float = 0.95, seed: int = 0
) -> BreakEven:
    """Requests after which b has taken fewer device-seconds than a; see `BreakEven`."""
    if a.requests_usd or b.requests_usd:
        return _unknown(a, b, unit="device_seconds")
    a, b = replace(a, hosting=1.0), replace(b, hosting=1.0)
    return _break_even(
        a, b, prices=(1.0,), unit="device_seconds", error_usd=0.0, confidence=confidence, seed=seed
    )


def break_even_usd(
    a: Side,
    b: Side,
    *,
    prices: tuple[float, float, float] | None,
    error_usd: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> BreakEven:
    """Requests after which b has cost less than a; prices: (value, low, high) USD a device-second.

    Without labels and errors that cost money the price cancels. With them the interval includes
    the price's range.
    """
    if prices is None:
        return _unknown(a, b, unit="usd")
    return _break_even(
        a,
        b,
        prices=prices,
        unit="usd",
        error_usd=error_usd or 0.0,
        confidence=confidence,
        seed=seed,
    )


def _unknown(a: Side, b: Side, *, unit: str) -> BreakEven:
    return BreakEven(
        a=a.arm, b=b.arm, requests=None, low=None, high=None, status="unknown", unit=unit
    )


def _break_even(
    a: Side,
    b: Side,
    *,
    prices: tuple[float, ...],
    unit: str,
    error_usd: float,
    confidence: float,
    seed: int,
) -> BreakEven:
    """Of the first price; its interval holds the crossings at all of them."""
    if a.fixed is None or b.fixed is None:
        return _unknown(a, b, unit=unit)
    labels = (b.people_usd - a.people_usd) if unit == "usd" else 0.0
    extras = [(b.fixed - a.fixed) * price + labels for price in prices]
    savings = [
        saving_per_request(a, b, price=p, error_usd=error_usd, confidence=confidence, seed=seed)
        for p in prices
    ]
    known = [saving for saving in savings if saving is not None]
    if len(known) < len(savings):
        return _unknown(a, b, unit=unit)
    extra, saving = extras[0], known[0]
    if extra < 0 and saving.value < 0:
        # Here a is the one with the higher fixed cost: it becomes b.
        return _break_even(
            b,
            a,
            prices=prices,
            unit=unit,
            error_usd=error_usd,
            confidence=confidence,
            seed=seed,
        )
    if extra <= 0 and saving.value > 0:
        return BreakEven(
            a=a.arm, b=b.arm, requests=0.0, low=None, high=None, status="always", unit=unit
        )
    is_crossing = saving.value > 0
    earliest = [
        max(0.0, e) / s.high for e, s in zip(extras, known, strict=True) if s.high and s.high > 0
    ]
    latest = [e / s.low for e, s in zip(extras, known, strict=True) if s.low and s.low > 0]
    is_bounded = len(latest) == len(known)
    return BreakEven(
        a=a.arm,
        b=b.arm,
        requests=extra / saving.value if is_crossing else None,
        low=min(earliest, default=None),
        high=max(latest) if is_bounded else None,
        status="crosses" if is_crossing else "never",
        is_high_unbounded=bool(earliest) and not is_bounded,
        unit=unit,
    )
