"""Intervals and tests where items share a source, e.g. a passage or a writer (pure).

Such items are not independent: the number of sources, not that of items, is what bounds them.
Sources: Liang and Zeger 1986 with the correction G / (G - 1), as in Miller 2024 (arXiv 2411.00640);
Student's t on G - 1 degrees of freedom; for shares Wilson's interval at the effective number of
items (Franco, Little, Louis and Slud 2019, J. Survey Statistics and Methodology 7:334).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from conf.records import Item, Measured
from evaluation.statistics import (
    Floats,
    PairedDifference,
    bonett_price,
    mcnemar_exact,
    mean_interval,
    normal_quantile,
    paired_difference,
    wilson,
)

# Over fewer sources their own errors are no guide (Cameron and Miller 2015, J. Human Resources
# 50:317); and a group column of a few values names kinds of items, which are shown as slices.
MIN_SOURCES = 10


def sources_of(items: Iterable[Item]) -> dict[str, str] | None:
    """Item id -> its source, by the group column; None where items are independent.

    That is where no two items share a group, or where there are fewer than 10 groups. An item
    without a group stands alone.
    """
    known = {item.id: item.group for item in items}
    sizes = Counter(group for group in known.values() if group is not None)
    if len(sizes) < MIN_SOURCES or max(sizes.values()) == 1:
        return None
    return {i: f"item {i}" if group is None else f"group {group}" for i, group in known.items()}


@dataclass(kw_only=True, slots=True, frozen=True)
class ClusteredMean:
    """A mean over items. variance: of the mean; None of a single source. num_sources: G."""

    mean: float
    variance: float | None
    num_sources: int


def clustered_mean(values: Sequence[float] | Floats, sources: Sequence[str]) -> ClusteredMean:
    """The mean over items, and its variance as their sources make it."""
    x = np.asarray(values, dtype=np.float64)
    assert x.size == len(sources) > 0, "one source per value"
    place = {name: number for number, name in enumerate(dict.fromkeys(sources))}
    index = np.array([place[name] for name in sources], dtype=np.intp)
    mean, count = float(x.mean()), len(place)
    if count < 2:
        return ClusteredMean(mean=mean, variance=None, num_sources=count)
    off = np.bincount(index, weights=x - mean)
    variance = count / (count - 1) * float(off @ off) / x.size**2
    return ClusteredMean(mean=mean, variance=variance, num_sources=count)


def clustered_interval(
    values: Sequence[float], sources: Sequence[str] | None, *, confidence: float, is_share: bool
) -> Measured:
    """A mean over items with its interval; sources None: the items are independent."""
    if sources is None or len(set(sources)) == len(values):
        return mean_interval(values, confidence=confidence, is_share=is_share)
    found, n = clustered_mean(values, sources), len(values)
    if found.variance is None:
        return Measured(value=found.mean, n=n)
    t = _student(confidence, found.num_sources - 1)
    if is_share and set(values) <= {0.0, 1.0}:
        share = wilson(found.mean * (size := _effective(found, n, confidence)), size, confidence)
        return Measured(value=found.mean, low=share.low, high=share.high, n=n)
    half = t * math.sqrt(found.variance)
    if half == 0:
        return mean_interval(
            [found.mean] * found.num_sources, confidence=confidence, is_share=is_share
        )
    low, high = found.mean - half, found.mean + half
    if is_share:
        low, high = max(0.0, low), min(1.0, high)
    return Measured(value=found.mean, low=low, high=high, n=n)


def _effective(found: ClusteredMean, n: int, confidence: float) -> int:
    """Independent items that would give as wide an interval, Student's t for the normal one."""
    plain, variance = found.mean * (1 - found.mean), found.variance
    if not variance or not plain:
        return found.num_sources
    shrunk = (normal_quantile(confidence) / _student(confidence, found.num_sources - 1)) ** 2
    return max(1, int(min(n, plain / variance) * shrunk))


def clustered_difference(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    sources: Sequence[str] | None,
    *,
    confidence: float,
) -> PairedDifference:
    """Compare two arms on the same items; sources None: the items are independent.

    Shared sources: Student's t of the clustered error in place of McNemar and bootstrap, which
    take items for independent.
    """
    if sources is None or len(set(sources)) == len(a):
        return paired_difference(a, b, confidence=confidence)
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    found, n = clustered_mean(d, sources), int(d.size)
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    low = high = p_value = None
    if found.variance:
        error = math.sqrt(found.variance)
        half = _student(confidence, found.num_sources - 1) * error
        low, high = found.mean - half, found.mean + half
        p_value = _two_sided(found.mean / error, found.num_sources - 1)
    elif found.variance is not None:  # no spread at all: each source says the same
        g = found.num_sources
        low, high = bonett_price(
            round(wins * g / n), round(losses * g / n), n=g, confidence=confidence
        )
        p_value = mcnemar_exact(g, 0) if found.mean else 1.0
    return PairedDifference(
        difference=found.mean,
        low=low,
        high=high,
        p_value=p_value,
        n=n,
        wins=wins,
        losses=losses,
        ties=n - wins - losses,
    )


def _student(confidence: float, freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + confidence / 2))


def _two_sided(t: float, freedom: float) -> float:
    from scipy.special import stdtr

    return float(2 * stdtr(freedom, -abs(t)))
