"""Errors of items that share sources: exact fractions, the one-way layout, and coverage."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from conf.records import Item
from evaluation.statistics import clusters as c
from evaluation.statistics import paired_difference, wilson

rows = st.lists(
    st.tuples(st.floats(-1, 1, width=32), st.sampled_from("abcdefgh")), min_size=2, max_size=40
)


def liang_zeger(values: list[float], sources: list[str]) -> Fraction:
    """The definition in exact fractions: squared sums of residuals by source, over n squared."""
    x = [Fraction(v) for v in values]
    mean = sum(x) / len(x)
    sums: dict[str, Fraction] = {}
    for value, name in zip(x, sources, strict=True):
        sums[name] = sums.get(name, Fraction(0)) + value - mean
    g = len(sums)
    return Fraction(g, g - 1) * sum(s * s for s in sums.values()) / len(x) ** 2


@given(rows)
def test_the_clustered_error_equals_exact_fractions(pairs: list[tuple[float, str]]) -> None:
    values, sources = [v for v, _ in pairs], [s for _, s in pairs]
    found = c.clustered_mean(values, sources)
    if len(set(sources)) == 1:
        assert found.variance is None
    else:
        assert found.variance == pytest.approx(float(liang_zeger(values, sources)), abs=1e-12)


def test_sources_of_equal_size_give_the_error_of_their_means() -> None:
    """Then the clustered error is that of the sample of source means, and so is the t-test."""
    rng = np.random.default_rng(0)
    a, b = rng.random((12, 5)), rng.random((12, 5))
    sources = [str(k) for k in range(12) for _ in range(5)]
    means = (a - b).mean(axis=1)
    found = c.clustered_mean((a - b).ravel(), sources)
    assert math.sqrt(found.variance or 0) == pytest.approx(stats.sem(means), rel=1e-12)
    d = c.clustered_difference(a.ravel(), b.ravel(), sources, confidence=0.95)
    theirs = stats.ttest_1samp(means, 0.0)
    assert d.p_value == pytest.approx(theirs.pvalue, abs=1e-10)
    interval = theirs.confidence_interval(0.95)
    assert (d.low, d.high) == pytest.approx((interval.low, interval.high), abs=1e-10)
    mean = c.clustered_interval(list(a.ravel()), sources, confidence=0.9, is_share=True)
    expected = stats.t.interval(0.9, 11, loc=a.mean(), scale=stats.sem(a.mean(axis=1)))
    assert (mean.low, mean.high) == pytest.approx(expected, abs=1e-10)


def test_single_sources_are_independent_items() -> None:
    values, names = [1.0, 0.0, 1.0, 1.0], list("abcd")
    assert c.clustered_interval(values, names, confidence=0.95, is_share=True) == wilson(3, 4)
    assert c.clustered_interval(values, None, confidence=0.95, is_share=True) == wilson(3, 4)
    assert c.clustered_difference(values, [0.0] * 4, names, confidence=0.95) == paired_difference(
        values, [0.0] * 4
    )


def test_sources_that_say_the_same_count_once() -> None:
    """20 sources of 10 equal answers: as wide as 20 items with Student's t, not as 200."""
    values = [float(k % 4 != 0) for k in range(20) for _ in range(10)]
    names = [str(k) for k in range(20) for _ in range(10)]
    found = c.clustered_interval(values, names, confidence=0.95, is_share=True)
    one_each = wilson(15, 20)
    assert found.low is not None and one_each.low is not None
    assert found.value == 0.75 and found.n == 200
    assert found.low < one_each.low < found.low + 0.05
    sure = c.clustered_interval([1.0] * 200, names, confidence=0.95, is_share=True)
    assert sure.low == pytest.approx(wilson(20, 20).low)
    same = c.clustered_difference([1.0] * 200, [1.0] * 200, names, confidence=0.95)
    assert same.p_value == 1 and same.high > 0.05 and same.ties == 200


def test_one_source_has_no_interval() -> None:
    found = c.clustered_interval([0.2, 0.4], ["a", "a"], confidence=0.95, is_share=True)
    assert (found.low, found.n) == (None, 2) and found.value == pytest.approx(0.3)
    d = c.clustered_difference([1.0, 1.0], [0.0, 1.0], ["a", "a"], confidence=0.95)
    assert (d.low, d.p_value, d.wins, d.ties) == (None, None, 1, 1)


@pytest.mark.parametrize("graded", [False, True])
def test_clustered_intervals_cover_where_plain_ones_do_not(graded: bool) -> None:
    rng = np.random.default_rng(1)
    covered = plain = wrong = 0
    count, names = 300, [str(k) for k in range(30) for _ in range(6)]
    for _ in range(count):
        p = np.repeat(rng.beta(1, 0.25, size=30), 6)  # a share for each source; mean 0.8
        values = p if graded else (rng.random(180) < p).astype(float)
        m = c.clustered_interval(list(values), names, confidence=0.95, is_share=True)
        covered += m.low <= 0.8 <= m.high
        m = wilson(values.sum(), values.size)
        plain += m.low <= 0.8 <= m.high
        other = np.repeat(rng.beta(1, 0.25, size=30), 6)
        d = c.clustered_difference(values, other, names, confidence=0.95)
        wrong += d.p_value < 0.05
    assert 0.92 < covered / count < 0.99 and plain / count < 0.85
    assert wrong / count < 0.05 + 2 * math.sqrt(0.05 * 0.95 / count)


def items(groups: list[str | None]) -> list[Item]:
    return [
        Item(id=str(k), split="test", input="x", sha256="", label="a", group=group)
        for k, group in enumerate(groups)
    ]


def test_which_groups_are_sources() -> None:
    many = [f"passage {k // 2}" for k in range(20)]
    found = c.sources_of(items([*many, None]))
    assert found is not None and found["0"] == found["1"] != found["2"]
    assert found["20"] not in (found["0"], found["19"])
    assert c.sources_of(items(["men", "women"] * 20)) is None  # kinds of items, not sources
    assert c.sources_of(items([f"passage {k}" for k in range(20)])) is None
    assert c.sources_of(items([None] * 20)) is None
