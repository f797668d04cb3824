"""Intervals and tests against published values, closed forms, scipy, sklearn and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from evaluation import statistics as s


# Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (Wilson without correction).
@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(k: int, n: int, low: float, high: float) -> None:
    measured = s.wilson(k, n)
    assert measured.low == pytest.approx(low, abs=5e-5)
    assert measured.high == pytest.approx(high, abs=5e-5)
    assert (measured.value, measured.n) == (k / n, n)


@given(st.integers(1, 400), st.data())
def test_wilson_equals_scipy(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    theirs = stats.binomtest(k, n).proportion_ci(0.9, method="wilson")
    ours = s.wilson(k, n, 0.9)
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


def test_wilson_of_nothing_is_unknown() -> None:
    assert s.wilson(0, 0).value is None
    assert s.mean_interval([]).value is None
    assert s.quantile_interval([], share=0.5).value is None


def test_wilson_covers_by_exact_enumeration() -> None:
    n = 30
    ends = [s.wilson(k, n) for k in range(n + 1)]
    shares = np.linspace(0.05, 0.95, 181)
    coverage = [
        sum(stats.binom.pmf(k, n, p) for k, e in enumerate(ends) if e.low <= p <= e.high)
        for p in shares
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(coverage) > 0.91


def test_a_single_value_has_no_interval() -> None:
    assert s.mean_interval([3.0]).low is None
    single = s.paired_difference([0.7], [0.2])
    assert (single.difference, single.low, single.p_value) == (pytest.approx(0.5), None, None)


def test_shares_without_spread_do_not_claim_certainty() -> None:
    assert s.mean_interval([1.0] * 20, is_share=True) == s.wilson(20, 20)
    assert s.mean_interval([0.5] * 20, is_share=True).high > 0.6
    assert s.mean_interval([0, 1, 1], is_share=True) == s.wilson(2, 3)
    assert s.macro_f1(["a", "b"] * 5, ["a", "b"] * 5).low < 0.9


@pytest.mark.parametrize("n", [8, 30])
def test_mean_interval_covers_the_mean_of_few_values(n: int) -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for i in range(400):
        measured = s.mean_interval(rng.normal(1.0, 2.0, size=n), seed=i)
        covered += measured.low <= 1.0 <= measured.high
    # 0.95 +- 3 standard errors; plain percentiles cover about 0.90 at n = 8.
    assert covered / 400 > 0.917


def test_mean_interval_has_student_width_for_normal_values() -> None:
    x = stats.norm.ppf((np.arange(400) + 0.5) / 400)
    measured = s.mean_interval(x, seed=1)
    half = stats.t.ppf(0.975, 399) * x.std(ddof=1) / 20
    assert measured.high == pytest.approx(half, rel=0.1)
    assert measured.low == pytest.approx(-half, rel=0.1)


def test_both_ways_of_resampling_draw_the_same_distribution() -> None:
    few = np.array([0.0, 0.25, 1.0] * 40)
    many = few + np.linspace(0, 1e-9, 120)  # all distinct: the other path
    one, two = (
        s.resampled_means(few, num_resamples=20000),
        s.resampled_means(many, num_resamples=20000),
    )
    assert one.mean() == pytest.approx(two.mean(), abs=2e-3)
    assert one.std() == pytest.approx(two.std(), rel=0.03)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_the_binomial_test(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert s.mcnemar_exact(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_items_is_finite() -> None:
    assert 0 < s.mcnemar_exact(2000, 2300) < 1e-4


def test_paired_difference_counts_and_orients() -> None:
    a, b = [1, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0]
    d = s.paired_difference(a, b)
    assert (d.wins, d.losses, d.ties, d.n) == (3, 1, 2, 6)
    assert d.difference == pytest.approx(2 / 6)
    assert d.p_value == s.mcnemar_exact(3, 1)
    back = s.paired_difference(b, a)
    assert back.difference == -d.difference and back.p_value == d.p_value


def test_equal_arms_have_an_interval_with_width() -> None:
    d = s.paired_difference([1, 0, 1, 0] * 10, [1, 0, 1, 0] * 10)
    assert d.difference == 0 and d.p_value == 1 and d.low < -0.02 and d.high > 0.02


def test_bonett_price_by_hand() -> None:
    # b = 9, c = 3, n = 50: p = 10/52, q = 4/52.
    p, q = 10 / 52, 4 / 52
    half = 1.959963985 * math.sqrt((p + q - (p - q) ** 2) / 52)
    assert s.bonett_price(9, 3, n=50) == pytest.approx((p - q - half, p - q + half))


def test_paired_interval_covers_and_bootstrap_test_keeps_its_level() -> None:
    rng = np.random.default_rng(2)
    covered = rejected = 0
    for i in range(300):
        base = rng.random(60)
        a, b = (
            np.clip(base + rng.normal(0, 0.1, 60), 0, 1),
            np.clip(base + rng.normal(0, 0.1, 60), 0, 1),
        )
        d = s.paired_difference(a, b, seed=i)
        covered += d.low <= 0 <= d.high
        rejected += d.p_value < 0.05
    assert covered / 300 > 0.91
    assert rejected / 300 < 0.09


def test_holm_by_hand() -> None:
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert s.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_rejects_what_the_closed_test_rejects(p_values: list[float]) -> None:
    """Holm is the closure of Bonferroni: p_i adjusted = max over subsets with i of |S| min(S)."""
    m = len(p_values)
    subsets = [c for k in range(1, m + 1) for c in itertools.combinations(range(m), k)]
    for i, adjusted in enumerate(s.holm(p_values)):
        closed = max(min(1.0, len(c) * min(p_values[j] for j in c)) for c in subsets if i in c)
        assert adjusted == pytest.approx(closed)


def test_quantile_interval_of_eight_values() -> None:
    values = [float(v) for v in range(8)]
    median = s.quantile_interval(values, share=0.5)
    # P(X <= 0) = 1/256 for Binomial(8, 1/2), P(X <= 1) = 9/256 > 0.025: first and last value.
    assert (median.value, median.low, median.high) == (3.5, 0.0, 7.0)
    assert s.quantile_interval(values, share=0.95).high is None


def test_quantile_interval_covers() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        m = s.quantile_interval(rng.exponential(size=200), share=0.95)
        covered += m.low <= -math.log(0.05) <= m.high
    assert covered / 500 > 0.93


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcz")), min_size=2, max_size=40)
)
def test_macro_f1_equals_sklearn(pairs: list[tuple[str, str]]) -> None:
    targets, answers = [t for t, _ in pairs], [a for _, a in pairs]
    labels = sorted(set(targets))
    expected = f1_score(targets, answers, labels=labels, average="macro", zero_division=0)
    if len(set(targets)) > 1:
        assert s.macro_f1(targets, answers).value == pytest.approx(expected)


def test_macro_f1_counts_missing_answers_as_wrong() -> None:
    measured = s.macro_f1(["a", "b", "a", "b"], ["a", None, "a", "b"])
    assert measured.value == pytest.approx((1.0 + 2 / 3) / 2)
    assert measured.low <= measured.value <= measured.high


def test_items_to_decide_matches_the_normal_formula() -> None:
    n = s.items_to_decide(0.5, 0.1)
    assert n == math.ceil(((1.959964 + 0.841621) * 5) ** 2)
    assert s.items_to_decide(0.5, 0.0) is None
