"""What a request costs under three rules for prompt tokens that a cache holds (pure).

    measured   they cost nothing more: the prefix was computed once and kept, as in the run
    discount   they cost a provider's share of the price of a computed token
    none       they are computed again for every request

An own device's request under a rule = the measured one + share x what computing its cached tokens
takes, by the rates that were fitted to the run's requests. A hosted model's request is priced by
its provider: what was billed is the discount.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conf.records import Measured
from conf.results import CacheCost
from conf.run_groups import PricingConfig
from evaluation.costs import cost
from evaluation.costs.request_rates import Rates, TimedRequest
from evaluation.statistics import percentile_interval, resampled_means

Floats = NDArray[np.float64]

CACHES = ("measured", "discount", "none")


@dataclass(kw_only=True, slots=True, frozen=True)
class Priced:
    """An arm's timed requests under one rule, in device-seconds.

    rate_draws: how far their mean moves with the rates, by draw; None where no rate was needed.
    """

    requests: Sequence[float]
    rate_draws: Floats | None = None

    def mean(self, *, confidence: float) -> Measured:
        """Of the requests, with a bootstrap interval over requests and rates."""
        values = np.asarray(self.requests, dtype=np.float64)
        n = values.size
        if self.rate_draws is None or n < 2:
            found = cost.request_device_seconds(
                [cost.RequestCost(device_seconds=r, tokens=0) for r in self.requests],
                confidence=confidence,
            )
            return found
        draws = resampled_means(values) + self.rate_draws
        low, high = percentile_interval(draws, n=n, confidence=confidence)
        return Measured(value=float(values.mean()), low=low, high=high, n=n)


def share_paid(cache: str, pricing: PricingConfig) -> float | None:
    """Share of a computed token's cost that a cached one is charged; None: no such rule."""
    shares = {"measured": 0.0, "discount": pricing.cached_input.ratio, "none": 1.0}
    return shares[cache]


def priced(timed: Sequence[TimedRequest], rates: Rates, *, share: float | None) -> Priced | None:
    """An arm's requests where cached tokens cost `share`; None where that is not known."""
    if share is None:
        return None
    cached = np.array([r.cached_tokens for r in timed], dtype=np.float64)
    if share == 0 or not cached.any():
        return Priced(requests=[r.device_seconds for r in timed])
    if rates.per_prompt_token is None:
        return None
    again = np.array([rates.of_cached(tokens) for tokens in cached])  # (requests, 1 + draws)
    means = share * again.mean(axis=0)
    return Priced(
        requests=[
            r.device_seconds + share * more for r, more in zip(timed, again[:, 0], strict=True)
        ],
        rate_draws=means[1:] - means[0],
    )


def by_cache(
    timed: Sequence[TimedRequest],
    rates: Rates,
    *,
    pricing: PricingConfig,
    hosting: float,
    confidence: float,
) -> dict[str, CacheCost]:
    """A request's cost under each rule that can be worked out; empty where nothing was timed."""
    found = {}
    for cache in CACHES if timed else ():
        at = priced(timed, rates, share=share_paid(cache, pricing))
        if at is not None:
            seconds = at.mean(confidence=confidence)
            usd = cost.request_usd(seconds, pricing=pricing, hosting=hosting)
            found[cache] = CacheCost(usd=usd, device_seconds=seconds)
    return found
