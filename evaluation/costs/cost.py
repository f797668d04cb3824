"""From measured requests and ledger lines to what an arm costs (pure).

A device is one accelerator or one CPU core; device_seconds = wall seconds x devices reserved.
A price that is unknown leaves USD None; device-seconds need no price.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from conf.records import LedgerLine, Measured
from conf.run_groups import PricingConfig
from evaluation.statistics import NUM_RESAMPLES, mean_interval, percentile_interval

SECONDS_PER_HOUR = 3600.0

# Paid once, before the first request is served. Test, latency and general lines are the price of
# comparing, which no arm would pay in use.
FIXED_PURPOSES = (
    *("train", "sweep", "prompt_search", "redone"),
    *("validation", "calibration", "curve", "reference"),
)
PREPARING = ("train", "sweep", "prompt_search")  # of jobs that are over before a request comes


@dataclass(kw_only=True, slots=True, frozen=True)
class RequestCost:
    """One request measured alone: its device-seconds and its prompt + completion tokens."""

    device_seconds: float
    tokens: int


@dataclass(kw_only=True, slots=True, frozen=True)
class FixedCost:
    """What was spent before the first request; usd None without a price."""

    device_seconds: float
    usd: float | None
    people_usd: float = 0.0  # labels and hours, as the user prices them


def scaled(measured: Measured, factor: float) -> Measured:
    """A measured value in another unit."""
    return Measured(
        value=None if measured.value is None else measured.value * factor,
        low=None if measured.low is None else measured.low * factor,
        high=None if measured.high is None else measured.high * factor,
        n=measured.n,
    )


def request_device_seconds(
    requests: Sequence[RequestCost], *, confidence: float = 0.95
) -> Measured:
    """Mean device-seconds of a request, with a bootstrap interval over the measured requests."""
    return mean_interval([r.device_seconds for r in requests], confidence=confidence)


def request_usd(
    device_seconds: Measured, *, pricing: PricingConfig, hosting: float = 1.0
) -> Measured:
    """Mean USD of a request; the interval includes the price's own range where it has one.

    hosting: device-seconds paid for each busy one, see `PricingConfig.hosting`.
    """
    price = pricing.usd_per_device_second
    if price is None:
        return Measured(n=device_seconds.n)
    low_price, high_price = (hosting * end for end in price_range(pricing))
    at_price = scaled(device_seconds, hosting * price)
    return Measured(
        value=at_price.value,
        low=None if device_seconds.low is None else device_seconds.low * low_price,
        high=None if device_seconds.high is None else device_seconds.high * high_price,
        n=device_seconds.n,
    )


def price_range(pricing: PricingConfig) -> tuple[float, float]:
    """Lowest and highest USD per device-second; equal where the source gives one number."""
    price = pricing.device_hour
    assert price.usd is not None, "asked for the range of an unknown price"
    low = price.usd if price.low_usd is None else min(price.low_usd, price.usd)
    high = price.usd if price.high_usd is None else max(price.high_usd, price.usd)
    return low / SECONDS_PER_HOUR, high / SECONDS_PER_HOUR


def usd_per_million_tokens(
    requests: Sequence[RequestCost],
    *,
    usd_per_device_second: float | None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Measured:
    """Cost / (prompt + completion tokens), as a ratio of sums with a bootstrap interval."""
    n = len(requests)
    seconds = np.array([r.device_seconds for r in requests], dtype=np.float64)
    tokens = np.array([r.tokens for r in requests], dtype=np.float64)
    if usd_per_device_second is None or n == 0 or float(tokens.sum()) == 0:
        return Measured(n=n)
    factor = usd_per_device_second * 1e6
    value = float(seconds.sum() / tokens.sum()) * factor
    if n == 1 or bool(np.any(tokens == 0)):
        return Measured(value=value, n=n)
    chosen = np.random.default_rng(seed).integers(0, n, size=(NUM_RESAMPLES, n))
    ratios = seconds[chosen].sum(axis=1) / tokens[chosen].sum(axis=1) * factor
    low, high = percentile_interval(ratios, n=n, confidence=confidence)
    return Measured(value=value, low=low, high=high, n=n)


def fixed_cost(
    ledger: Sequence[LedgerLine],
    *,
    arms: Collection[str],
    usd_per_device_second: float | None,
    labels_used: int | None,
    label_usd: float | None,
    hours_usd: float = 0.0,
) -> FixedCost:
    """Cost paid once by an arm and the arms it stands on.

    Lines of FIXED_PURPOSES, and shared and padding lines of jobs that trained or searched. Labels
    and people's hours count when they have a price.
    """
    mine = [line for line in ledger if line.arm in arms]
    trained = {line.job for line in mine if line.purpose in PREPARING}
    fixed = [
        line
        for line in mine
        if line.purpose in FIXED_PURPOSES
        or (line.purpose in ("shared", "padding") and line.job in trained)
    ]
    device_seconds = sum(line.device_seconds for line in fixed)
    people_usd = (labels_used or 0) * (label_usd or 0.0) + hours_usd
    usd = None if usd_per_device_second is None else device_seconds * usd_per_device_second
    return FixedCost(
        device_seconds=device_seconds,
        usd=None if usd is None else usd + people_usd,
        people_usd=people_usd,
    )
