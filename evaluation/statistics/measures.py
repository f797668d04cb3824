"""A measure over items, its interval, and its change between two arms on the same items (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from conf.records import Measured
from evaluation.statistics import (
    Floats,
    bonett_price,
    mean_interval,
    paired_difference,
    percentile_interval,
)

NUM_RESAMPLES = 500  # of statistics that are no plain means


class Statistic(Protocol):
    """A number of some items' values; is_resampled: drawn with replacement from the items."""

    def __call__(self, values: Floats, *, is_resampled: bool = False) -> Floats:
        """values: (B, N, K), B samples of N items -> (B,)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Measure:
    """Values of items, and what is made of them; statistic None: the mean of one value each.

    values: (N, K), a row an item. is_share: they lie in [0, 1]; else they are differences of shares
    in [-1, 1]; where all are 0, or all 1, a bootstrap knows no spread: Bonett and Price's interval.
    """

    ids: tuple[str, ...]
    values: Floats
    statistic: Statistic | None = None
    is_share: bool = True

    def interval(self, confidence: float) -> Measured:
        """The measure with its interval; unknown without items."""
        if self.statistic is None and not self.is_share and np.ptp(self.values) == 0:
            return self._all_equal(confidence)
        if self.statistic is None or not self.ids:
            return mean_interval(self.values[:, 0], confidence=confidence, is_share=self.is_share)
        if len(self.ids) == 1:
            return Measured(value=self.value, n=1)
        return _measured(self.value, self.resampled(), n=len(self.ids), confidence=confidence)

    def _all_equal(self, confidence: float) -> Measured:
        """Differences that are all 0, or all 1 or -1; of others nothing is known of the spread."""
        n, value = len(self.ids), self.value
        if value not in (0.0, 1.0, -1.0):
            return Measured(value=value, n=n)
        wins, losses = (n, 0) if value > 0 else (0, n) if value < 0 else (0, 0)
        low, high = bonett_price(wins, losses, n=n, confidence=confidence)
        return Measured(value=value, low=min(low, value), high=max(high, value), n=n)

    @property
    def value(self) -> float:
        """Of all items."""
        if self.statistic is None:
            return float(self.values[:, 0].mean())
        return float(self.statistic(self.values[None])[0])

    def resampled(self) -> Floats:
        """Of bootstrap samples: the same rows for all measures of as many items, so pairs stay."""
        assert self.statistic is not None
        n = len(self.ids)
        rng = np.random.default_rng(0)
        block = max(1, 2_000_000 // n)  # bounds memory at about 32 MB
        parts = []
        for start in range(0, NUM_RESAMPLES, block):
            rows = rng.integers(0, n, size=(min(block, NUM_RESAMPLES - start), n))
            parts.append(self.statistic(self.values[rows], is_resampled=True))
        return np.concatenate(parts)

    def of(self, ids: Sequence[str]) -> Measure:
        """The same of some of the items."""
        place = {item_id: row for row, item_id in enumerate(self.ids)}
        return Measure(
            ids=tuple(ids),
            values=self.values[[place[i] for i in ids]],
            statistic=self.statistic,
            is_share=self.is_share,
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class Changed:
    """before, after and their paired difference on the items that both have."""

    before: Measured
    after: Measured
    change: Measured
    p_value: float | None = None


def item_measure(scores: Mapping[str, float], *, is_share: bool = True) -> Measure:
    """The mean of one value an item."""
    values = np.array(list(scores.values()), dtype=np.float64).reshape(-1, 1)
    return Measure(ids=tuple(scores), values=values, is_share=is_share)


def changed(before: Measure, after: Measure, *, confidence: float) -> Changed | None:
    """How a measure changed; None where no item has both."""
    common = sorted(set(before.ids) & set(after.ids))
    if not common:
        return None
    one, other = before.of(common), after.of(common)
    if one.statistic is None:
        d = paired_difference(other.values[:, 0], one.values[:, 0], confidence=confidence)
        change = Measured(value=d.difference, low=d.low, high=d.high, n=d.n)
        p_value = d.p_value
    else:
        draws = other.resampled() - one.resampled()
        change = _measured(other.value - one.value, draws, n=len(common), confidence=confidence)
        p_value = None
    return Changed(
        before=one.interval(confidence),
        after=other.interval(confidence),
        change=change,
        p_value=p_value,
    )


def _measured(value: float, draws: Floats, *, n: int, confidence: float) -> Measured:
    if float(np.ptp(draws)) == 0:  # a bootstrap that never varies knows nothing of the spread
        return Measured(value=value, n=n)
    low, high = percentile_interval(draws, n=n, confidence=confidence)
    return Measured(value=value, low=min(low, value), high=max(high, value), n=n)
