"""Tests and intervals that hold at every look, for values in a known range (numpy only).

A gambler bets on each item that the mean lies above (or below) a supposed one. Were that mean true,
no way of betting would be expected to gain, and the chance that the capital ever reaches c is at
most 1/c (Ville 1939): the capital is an e-value at every look, however the moment of looking was
chosen. The means against which it stays below 2/alpha in both directions are a confidence sequence.

Sources: Waudby-Smith and Ramdas 2024, JRSS B 86:1 (arXiv 2010.09686), the hedged capital of section
4.4 with the mixture over constant bets ("diversified Kelly") in place of a plug-in bet; a mixture
does not depend on the order of the items, so a decision is a function of the scores alone.
Ramdas et al. 2023, Statistical Science 38:576 (e-values, and Bonferroni for them).

Items that share a source are one bet of their sum. Sources count by their items: the mean is that
of the items, as in the metric, and the largest source has the whole bet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Parts of the capital that a bet may lose. A difference of 2 points among 30% that differ asks for
# 0.07, one of 15 points among 20% for 0.75; a mixture over 9 costs at most log 9 in the exponent.
BETS = np.array([0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.6, 0.8, 0.95])
HALVINGS = 40  # of an interval of 1: an end is found to 1e-12


@dataclass(kw_only=True, slots=True, frozen=True)
class Stakes:
    """What is bet on: by source the sum and the number of its items, on the scale 0 to 1.

    sums: (S,) sums of (value - low) / (high - low). sizes: (S,) items. largest: items of the
    largest source there can be, known before any score. low, high: the range of the values.
    """

    sums: Floats
    sizes: Floats
    largest: float
    low: float
    high: float

    @property
    def num_items(self) -> int:
        """Items of all sources."""
        return int(self.sizes.sum())

    @property
    def mean(self) -> float:
        """Of the items, in their own unit."""
        return self.in_unit(float(self.sums.sum() / self.sizes.sum()))

    def in_unit(self, share: float) -> float:
        """A mean on the scale 0 to 1 in the unit of the values."""
        return self.low + share * (self.high - self.low)

    def share(self, mean: float) -> float:
        """The inverse of in_unit."""
        return (mean - self.low) / (self.high - self.low)


def stakes(
    values: Sequence[float] | Floats,
    *,
    low: float,
    high: float,
    sources: Sequence[str] | None = None,
    largest: int | None = None,
) -> Stakes:
    """Values in their order, or by source in the order of each one's first item.

    Args:
        values: (N,) all within low .. high.
        low: the least possible value.
        high: the greatest.
        sources: (N,) which items belong together; None: each stands alone.
        largest: items of the largest source there can be; None: of those that are there.
    """
    x = (np.asarray(values, dtype=np.float64) - low) / (high - low)
    assert x.size == 0 or (x.min() >= 0 and x.max() <= 1), "values within their range"
    sizes = np.ones(x.size)
    if sources is not None:
        place = {name: number for number, name in enumerate(dict.fromkeys(sources))}
        index = np.array([place[name] for name in sources], dtype=np.intp)
        sizes = np.bincount(index).astype(np.float64)
        x = np.asarray(np.bincount(index, weights=x), dtype=np.float64)
    top = max(largest or 0, float(sizes.max(initial=1.0)))
    return Stakes(sums=x, sizes=sizes, largest=top, low=low, high=high)


def log_gains(bets_on: Stakes, mean: float, *, is_above: bool) -> Floats:
    """(S, B) log of the factor by which each bet's capital grows with each source.

    mean: the supposed one, in the unit of the values. is_above: whether the bet gains from means
    above it.
    """
    share = bets_on.share(mean)
    sums, share = (bets_on.sums, share) if is_above else (bets_on.sizes - bets_on.sums, 1.0 - share)
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = np.where(sums > 0, sums / share, 0.0) if share > 0 else np.inf * (sums > 0)
    odds = np.nan_to_num(odds, nan=0.0, posinf=1e300)
    return np.log1p(BETS * ((odds - bets_on.sizes) / bets_on.largest)[:, None])


def log_capital(
    bets_on: Stakes, mean: float, *, is_above: bool, counts: Floats | None = None
) -> Floats:
    """Log of the capital after all sources, from 1; () or (F,).

    counts: (F, S) how often each source comes in each of F data sets; None: once, in one.
    """
    gains = log_gains(bets_on, mean, is_above=is_above)
    total = gains.sum(axis=0) if counts is None else counts @ gains
    return np.asarray(np.logaddexp.reduce(total, axis=-1) - math.log(BETS.size))


def e_process(bets_on: Stakes, mean: float) -> Floats:
    """(S,) the e-value after each source: evidence against this mean, in either direction.

    At the first moment at which it reaches 1/alpha the mean is refused, with error alpha over all
    moments together.
    """
    paths = [
        np.logaddexp.reduce(np.cumsum(log_gains(bets_on, mean, is_above=is_above), axis=0), axis=-1)
        for is_above in (True, False)
    ]
    log_e = np.maximum(*paths) - math.log(2 * BETS.size)
    return np.asarray(np.exp(np.minimum(log_e, 700.0)))


def distinct(bets_on: Stakes) -> tuple[Stakes, Floats]:
    """Each different source once, and how often it came: (D,)."""
    both = np.stack([bets_on.sums, bets_on.sizes], axis=1)
    rows, seen = np.unique(both, axis=0, return_counts=True)
    return replace(bets_on, sums=rows[:, 0], sizes=rows[:, 1]), seen.astype(np.float64)


def log_e_value(bets_on: Stakes, mean: float) -> float:
    """Log of the e-value after all sources; 0 of no source."""
    if not bets_on.sums.size:
        return 0.0
    sides = (log_capital(bets_on, mean, is_above=side) for side in (True, False))
    return float(max(sides)) - math.log(2)


def confidence_sequence(bets_on: Stakes, *, alpha: float) -> tuple[float, float]:
    """The means that are not refused, in the unit of the values: (low, high).

    With probability 1 - alpha the true mean lies in all of the intervals of all looks.
    """
    if not bets_on.sums.size:
        return bets_on.low, bets_on.high
    bar = math.log(2 / alpha)
    center = bets_on.share(bets_on.mean)
    rows, seen = distinct(bets_on)
    counts = seen[None, :]

    def end(is_above: bool) -> float:
        refused, kept = (0.0, center) if is_above else (1.0, center)
        edge = bets_on.in_unit(refused)
        if log_capital(rows, edge, is_above=is_above, counts=counts)[0] < bar:
            return edge
        for _ in range(HALVINGS):
            middle = (refused + kept) / 2
            supposed = bets_on.in_unit(middle)
            capital = log_capital(rows, supposed, is_above=is_above, counts=counts)[0]
            refused, kept = (middle, kept) if capital >= bar else (refused, middle)
        return bets_on.in_unit(refused)

    return end(True), end(False)
