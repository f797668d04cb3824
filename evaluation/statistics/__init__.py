"""Intervals and tests: plain functions of numbers, seeded where they draw (numpy only).

Sources: Wilson 1927; Newcombe 1998 (published values in the tests); McNemar 1947 in its exact form;
Bonett and Price 2012 (paired proportions); Holm 1979; Efron 1979 (percentile bootstrap).
All intervals assume a number of items fixed beforehand, without looks at the result on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from conf.records import Measured

Floats = npt.NDArray[np.float64]

NUM_RESAMPLES = 2000


def normal_quantile(confidence: float) -> float:
    """The z such that a normal value lies in (-z, z) with probability `confidence`."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(k: float, n: int, confidence: float = 0.95) -> Measured:
    """Wilson score interval of a share: k of n. n = 0 is unknown.

    k need not be whole: for scores in [0, 1] with sum k the interval is conservative, since no
    variable on [0, 1] with mean p has a variance above p(1 - p).
    """
    assert 0 <= k <= n, f"{k} of {n}"
    if n == 0:
        return Measured(n=0)
    z = normal_quantile(confidence)
    p = k / n
    scale = 1 / (1 + z * z / n)
    center = scale * (p + z * z / (2 * n))
    half = scale * z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if k == 0 else max(0.0, center - half)
    high = 1.0 if k == n else min(1.0, center + half)
    return Measured(value=p, low=low, high=high, n=n)


def mean_interval(
    values: Sequence[float] | Floats,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    is_share: bool = False,
) -> Measured:
    """Mean with a percentile bootstrap interval; one value has no interval, none is unknown.

    is_share: values lie in [0, 1]. Values of only 0 and 1, or without any spread (where a
    bootstrap would claim certainty), then get Wilson's interval.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        return Measured(n=0)
    if is_share:
        is_binary = bool(np.all((x == 0) | (x == 1)))
        if is_binary or float(np.ptp(x)) == 0:
            return wilson(min(float(x.sum()), float(x.size)), x.size, confidence)
    if x.size == 1:
        return Measured(value=float(x[0]), n=1)
    low, high = percentile_interval(resampled_means(x, seed=seed), n=x.size, confidence=confidence)
    return Measured(value=float(x.mean()), low=low, high=high, n=x.size)


def quantile_interval(
    values: Sequence[float] | Floats, *, share: float, confidence: float = 0.95
) -> Measured:
    """A quantile (e.g. share=0.95) with a distribution-free interval of order statistics.

    An end that the sample is too small to bound is None: 8 requests bound no p95 from above.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    if x.size == 0:
        return Measured(n=0)
    tail = (1 - confidence) / 2
    cdf = _binomial_cdf(x.size, share)
    below = [i for i in range(x.size) if cdf[i] <= tail]
    low = float(x[below[-1]]) if below else None
    above = [i for i in range(x.size) if cdf[i] >= 1 - tail]
    high = float(x[above[0]]) if above else None
    return Measured(value=float(np.quantile(x, share)), low=low, high=high, n=x.size)


def _binomial_cdf(n: int, p: float) -> list[float]:
    """P(X <= i) for X ~ Binomial(n, p), i = 0..n."""
    log_p, log_q = math.log(p), math.log1p(-p)
    total, cdf = 0.0, []
    for i in range(n + 1):
        log_choose = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        total += math.exp(log_choose + i * log_p + (n - i) * log_q)
        cdf.append(min(1.0, total))
    return cdf


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact McNemar p-value from the discordant counts: a binomial test at 1/2."""
    n = wins + losses
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / (1 << n))


@dataclass(kw_only=True, slots=True, frozen=True)
class PairedDifference:
    """Mean of a - b over common items with its interval, test and win/loss/tie counts."""

    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    n: int
    wins: int = 0
    losses: int = 0
    ties: int = 0


def paired_difference(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Compare two arms on the same items: a[i] and b[i] are scores of item i.

    Scores of only 0 and 1: exact McNemar; others: the paired bootstrap's two-sided p-value. The
    interval is the paired bootstrap's; where all differences are 0 it would have no width, and
    Bonett and Price's interval (one discordant item added each way) stands in.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    assert x.shape == y.shape, "paired scores need the same items"
    d = x - y
    n = int(d.size)
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    counts = {"n": n, "wins": wins, "losses": losses, "ties": n - wins - losses}
    if n == 0:
        return PairedDifference(difference=None, low=None, high=None, p_value=None, n=0)
    is_binary = bool(np.all(np.isin(x, (0.0, 1.0))) and np.all(np.isin(y, (0.0, 1.0))))
    if wins + losses == 0:
        low, high = bonett_price(0, 0, n=n, confidence=confidence)
        return PairedDifference(difference=0.0, low=low, high=high, p_value=1.0, **counts)
    if n == 1:
        return PairedDifference(difference=float(d[0]), low=None, high=None, p_value=None, **counts)
    means = resampled_means(d, seed=seed)
    low, high = percentile_interval(means, n=n, confidence=confidence)
    if is_binary and float(np.ptp(d)) == 0:
        low, high = bonett_price(wins, losses, n=n, confidence=confidence)
    p_value = mcnemar_exact(wins, losses) if is_binary else bootstrap_p_value(d, seed=seed)
    return PairedDifference(
        difference=float(d.mean()), low=low, high=high, p_value=p_value, **counts
    )


def bonett_price(
    wins: int, losses: int, *, n: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Adjusted Wald interval of a difference of paired shares (Bonett and Price 2012)."""
    z = normal_quantile(confidence)
    p, q = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    half = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return max(-1.0, p - q - half), min(1.0, p - q + half)


def bootstrap_p_value(differences: Floats, *, seed: int = 0) -> float:
    """Two-sided: how often a resampled mean, centred at 0, is as far from 0 as the observed one."""
    mean = float(differences.mean())
    centred = resampled_means(differences - mean, seed=seed)
    # The small slack counts resamples that equal the observed mean up to rounding.
    extreme = int((np.abs(centred) >= abs(mean) * (1 - 1e-9)).sum())
    return (extreme + 1) / (centred.size + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    m = len(p_values)
    adjusted = [0.0] * m
    running = 0.0
    for position, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        running = max(running, (m - position) * p_values[i])
        adjusted[i] = min(1.0, running)
    return adjusted


def resampled_means(values: Floats, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Floats:
    """Means of `num_resamples` draws with replacement of all values: (num_resamples,)."""
    rng = np.random.default_rng(seed)
    n = values.size
    unique, counts = np.unique(values, return_counts=True)
    block = max(1, 4_000_000 // n)  # bounds memory at about 32 MB
    sizes = [min(block, num_resamples - start) for start in range(0, num_resamples, block)]
    if unique.size * 4 <= n:  # few distinct values: draw how often each one comes
        parts = [rng.multinomial(n, counts / n, size=size) @ unique / n for size in sizes]
    else:
        parts = [values[rng.integers(0, n, size=(size, n))].mean(axis=1) for size in sizes]
    return np.concatenate(parts)


def percentile_interval(values: Floats, *, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The central interval of resampled statistics of n observations, expanded for small n.

    Plain percentiles cover too little at small n. Hesterberg (2015, arXiv 1411.5279) expands
    the tails so that a normal sample gets Student's t width.
    """
    from scipy.special import ndtr, stdtrit  # not scipy.stats, which takes a second to import

    assert n >= 2, "one observation has no interval"
    t = float(stdtrit(n - 1, 0.5 + confidence / 2))
    tail = float(ndtr(-math.sqrt(n / (n - 1)) * t))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def macro_f1(
    targets: Sequence[str],
    answers: Sequence[str | None],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Measured:
    """Unweighted mean of F1 over the labels among the targets, with a bootstrap interval.

    An answer that is None or no target label is wrong. A label without true or answered items in
    a resample counts 0 there, as in the whole sample.
    """
    if not targets:
        return Measured(n=0)
    cells = _cells(targets, answers)
    labels = sorted(set(targets))
    is_true = np.array([[t == label for label in labels] for t, _ in cells], dtype=np.float64)
    is_answered = np.array([[a == label for label in labels] for _, a in cells], dtype=np.float64)
    counts = np.array(list(cells.values()), dtype=np.float64)
    n = len(targets)
    if n == 1:
        return Measured(value=float(targets[0] == answers[0]), n=1)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=NUM_RESAMPLES)
    values = _f1(draws.astype(np.float64), is_true=is_true, is_answered=is_answered)
    low, high = percentile_interval(values, n=n, confidence=confidence)
    value = float(_f1(counts[None, :], is_true=is_true, is_answered=is_answered)[0])
    if low == high:  # no resample differs: a bootstrap would claim certainty
        return wilson(min(value * n, float(n)), n, confidence)
    return Measured(value=value, low=min(low, value), high=max(high, value), n=n)


def _cells(
    targets: Sequence[str], answers: Sequence[str | None]
) -> Mapping[tuple[str, str | None], int]:
    assert len(targets) == len(answers), "one answer per target"
    cells: dict[tuple[str, str | None], int] = {}
    for pair in zip(targets, answers, strict=True):
        cells[pair] = cells.get(pair, 0) + 1
    return cells


def _f1(counts: Floats, *, is_true: Floats, is_answered: Floats) -> Floats:
    """Macro-F1 of each row of cell counts: (B, cells) -> (B,)."""
    true_positives = counts @ (is_true * is_answered)
    both = counts @ is_true + counts @ is_answered  # 2 TP + FP + FN
    f1 = np.divide(2 * true_positives, both, out=np.zeros_like(both), where=both > 0)
    return np.asarray(f1.mean(axis=1), dtype=np.float64)


def quantile_to_decide(confidence: float, *, power: float = 0.8) -> float:
    """The z of a test at this confidence that misses a true difference in 1 - power of cases."""
    return normal_quantile(confidence) + NormalDist().inv_cdf(power)


def items_to_decide(
    differences_sd: float, difference: float, *, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Items in all at which a paired difference of this size and spread is told from 0.

    None where the difference is 0: no number of items decides that.
    """
    if difference == 0:
        return None
    z = quantile_to_decide(confidence, power=power)
    return math.ceil((z * differences_sd / difference) ** 2)
