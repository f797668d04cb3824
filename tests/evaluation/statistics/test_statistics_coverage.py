"""Coverage of the interval of a share, by exact binomial sums: no simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import wilson

SHARES = np.linspace(0.5, 0.99, 2451)
SIZES = (30, 50, 100, 300)


def coverage(ends: list[tuple[float, float]], shares: np.ndarray) -> np.ndarray:
    """P(low <= p <= high) at each p: the sum of the chances of the counts whose interval has it."""
    n = len(ends) - 1
    low, high = np.array(ends).T
    holds = (low[:, None] <= shares) & (shares <= high[:, None])
    return (stats.binom.pmf(np.arange(n + 1)[:, None], n, shares) * holds).sum(axis=0)


def ours(n: int) -> list[tuple[float, float]]:
    return [((m := wilson(k, n)).low, m.high) for k in range(n + 1)]


def theirs(n: int) -> list[tuple[float, float]]:
    found = [stats.binomtest(k, n).proportion_ci(0.95, method="wilson") for k in range(n + 1)]
    return [(interval.low, interval.high) for interval in found]


def normal_ends(n: int) -> list[tuple[float, float]]:
    """The interval of the central limit theorem, with n - 1, as lm-eval has it."""
    k = np.arange(n + 1) / n
    half = stats.norm.ppf(0.975) * np.sqrt(k * (1 - k) / (n - 1))
    return list(zip(k - half, k + half, strict=True))


@pytest.mark.parametrize("n", SIZES)
def test_mean_coverage_is_within_a_point_of_nominal(n: int) -> None:
    assert coverage(ours(n), SHARES).mean() == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("n", SIZES)
def test_the_lowest_coverage_is_that_of_the_method(n: int) -> None:
    """Of every 0.0002; ends are equal to scipy's, so no p can tell the two apart."""
    assert np.allclose(ours(n), theirs(n), rtol=0, atol=1e-8)
    assert coverage(ours(n), SHARES).min() == pytest.approx(
        coverage(theirs(n), SHARES).min(), abs=1e-8
    )


def test_the_normal_interval_fails_where_ours_holds() -> None:
    assert coverage(normal_ends(30), SHARES).mean() < 0.93
    assert coverage(normal_ends(30), SHARES).min() < 0.30
    assert coverage(ours(30), SHARES).min() > 0.83
