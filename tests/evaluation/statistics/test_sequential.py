"""The sequential test against enumeration, and its error with a look after every item."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.statistics import normal_quantile
from evaluation.statistics import sequential as q

ALPHA = 0.05
differences = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30)


def bets(values: object, **sources: object) -> q.Stakes:
    return q.stakes(values, low=-1.0, high=1.0, **sources)


def capital_by_hand(values: list[float], mean: Fraction, *, sign: int) -> Fraction:
    """The mean over bets of the product over items, in exact fractions, from the definition."""
    total = Fraction(0)
    for bet in q.BETS:
        capital = Fraction(1)
        for value in values:
            x, m = (1 + sign * Fraction(value)) / 2, (1 + sign * mean) / 2
            capital *= 1 + Fraction(float(bet)) * (x / m - 1)
        total += capital
    return total / len(q.BETS)


@given(differences, st.sampled_from([-0.5, 0.0, 0.25]))
def test_the_e_value_is_that_of_the_definition(values: list[float], mean: float) -> None:
    sides = [capital_by_hand(values, Fraction(mean), sign=sign) for sign in (1, -1)]
    expected = max(sides) / 2
    assert math.exp(q.log_e_value(bets(values), mean)) == pytest.approx(float(expected), rel=1e-9)
    assert q.e_process(bets(values), mean)[-1] == pytest.approx(float(expected), rel=1e-9)


@given(differences, st.randoms())
def test_a_decision_does_not_depend_on_the_order(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)
    assert q.log_e_value(bets(shuffled), 0.0) == pytest.approx(
        q.log_e_value(bets(values), 0.0), abs=1e-9
    )


def test_a_fair_game_is_expected_to_gain_nothing() -> None:
    """All outcomes of three sources of two dependent items each, by enumeration."""
    # Of a source: both items +1, both -1, or +1 and -1; mean 0 whatever the chances below.
    kinds = {(1.0, 1.0): 0.2, (-1.0, -1.0): 0.2, (1.0, -1.0): 0.6}
    for is_above in (True, False):
        expected = 0.0
        for outcome in itertools.product(kinds, repeat=3):
            stakes = bets(list(itertools.chain(*outcome)), sources=["a", "a", "b", "b", "c", "c"])
            chance = math.prod(kinds[source] for source in outcome)
            expected += chance * math.exp(q.log_capital(stakes, 0.0, is_above=is_above))
        assert expected == pytest.approx(1.0, rel=1e-12)


def test_a_source_of_unequal_size_counts_by_its_items() -> None:
    """The mean that is bet on is that of the items: sources of 1 and 3 items, in equal numbers."""
    # Items of large sources score +0.2, of small ones -0.6: the mean over items is 0.
    kinds = {(-0.6,): 0.5, (0.2, 0.2, 0.2): 0.5}
    for is_above in (True, False):
        expected = 0.0
        for outcome in itertools.product(kinds, repeat=3):
            values = list(itertools.chain(*outcome))
            names = [str(k) for k, source in enumerate(outcome) for _ in source]
            stakes = bets(values, sources=names, largest=3)
            chance = math.prod(kinds[source] for source in outcome)
            expected += chance * math.exp(q.log_capital(stakes, 0.0, is_above=is_above))
        assert expected == pytest.approx(1.0, rel=1e-12)


@settings(max_examples=60)
@given(differences, st.sampled_from([0.05, 0.002]))
def test_the_interval_is_what_is_not_refused(values: list[float], alpha: float) -> None:
    stakes = bets(values)
    low, high = q.confidence_sequence(stakes, alpha=alpha)
    assert -1 <= low <= np.mean(values) + 1e-9 and np.mean(values) - 1e-9 <= high <= 1
    for mean in np.linspace(-0.995, 0.995, 41):
        is_refused = q.log_e_value(stakes, mean) >= math.log(1 / alpha)
        if abs(mean - low) > 1e-6 and abs(mean - high) > 1e-6:
            assert is_refused == (mean < low or mean > high)


def test_ends_of_the_range() -> None:
    assert q.confidence_sequence(bets([]), alpha=ALPHA) == (-1.0, 1.0)
    low, high = q.confidence_sequence(bets([1.0] * 50), alpha=ALPHA)
    assert 0.5 < low < 1 and high == 1.0
    low, high = q.confidence_sequence(bets([0.0] * 400), alpha=ALPHA)
    assert -0.05 < low < 0 < high < 0.05
    assert q.confidence_sequence(q.stakes([0.0] * 9, low=0, high=1), alpha=ALPHA)[0] == 0.0


Draw = Callable[[np.random.Generator], q.Stakes]


def _ties(rng: np.random.Generator) -> q.Stakes:
    return bets(rng.choice([-1.0, 0.0, 1.0], p=[0.02, 0.96, 0.02], size=300))


def _accurate(rng: np.random.Generator) -> q.Stakes:
    """Two independent arms that are right in 95%."""
    right = rng.random((2, 300)) < 0.95
    return bets(right[0].astype(float) - right[1])


def _clustered(rng: np.random.Generator) -> q.Stakes:
    """60 sources of 1 to 8 items; the items of a source mostly say the same."""
    sizes = rng.integers(1, 9, size=60)
    names = np.repeat(np.arange(60), sizes)
    shared = rng.choice([-1.0, 0.0, 1.0], p=[0.3, 0.4, 0.3], size=60)[names]
    own = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=names.size)
    values = np.where(rng.random(names.size) < 0.9, shared, own)
    return bets(values, sources=[str(name) for name in names], largest=8)


def _graded(rng: np.random.Generator) -> q.Stakes:
    return bets(rng.beta(2, 3, size=300) - rng.beta(2, 3, size=300))


CASES = {"ties": _ties, "accurate": _accurate, "clustered": _clustered, "graded": _graded}


def error_rate(draw: Draw, count: int) -> float:
    """The share of true nulls that a look after every item ever refuses."""
    rng = np.random.default_rng(11)
    return sum(q.e_process(draw(rng), 0.0).max() >= 1 / ALPHA for _ in range(count)) / count


def allowed(count: int) -> float:
    """Alpha and two Monte-Carlo standard errors."""
    return ALPHA + 2 * math.sqrt(ALPHA * (1 - ALPHA) / count)


@pytest.mark.parametrize("case", CASES)
def test_looking_after_every_item_keeps_the_error(case: str) -> None:
    assert error_rate(CASES[case], 2000) <= allowed(2000)


def test_the_nulls_are_hard_enough() -> None:
    """A z-test with the same looks, and bets that take a source's items for independent, fail."""
    rng = np.random.default_rng(3)
    peeked = ignored = 0
    for _ in range(300):
        x = 2 * _accurate(rng).sums - 1
        n = np.arange(1, x.size + 1)
        error = np.sqrt(np.maximum(np.cumsum(x**2) / n - (np.cumsum(x) / n) ** 2, 1e-12) / n)
        peeked += bool((np.abs(np.cumsum(x) / n) > 1.96 * error)[20:].any())
        sources = _clustered(rng)
        one = q.Stakes(
            sums=np.repeat(sources.sums / sources.sizes, sources.sizes.astype(int)),
            sizes=np.ones(int(sources.sizes.sum())),
            largest=1.0,
            low=-1.0,
            high=1.0,
        )
        ignored += bool(q.e_process(one, 0.0).max() >= 1 / ALPHA)
    assert peeked / 300 > 2 * allowed(300) and ignored / 300 > 2 * allowed(300)


def half_of_fixed_n(num_items: int, differing: float, count: int) -> float:
    """Median items to a decision at twice the detectable difference, as a share of fixed n."""
    reach = normal_quantile(0.95) + 0.8416212335729143  # 80% power at 5%
    difference = 0.0
    for _ in range(60):
        variance = differing - difference**2
        difference = 2 * reach * math.sqrt(variance / num_items)
    better = (differing + difference) / 2
    rng = np.random.default_rng(num_items)
    taken = []
    for _ in range(count):
        values = rng.choice(
            [1.0, -1.0, 0.0], p=[better, differing - better, 1 - differing], size=num_items
        )
        hits = np.flatnonzero(q.e_process(bets(values), 0.0) >= 1 / ALPHA)
        taken.append(hits[0] + 1 if hits.size else 10 * num_items)
    return float(np.median(taken)) / num_items


@pytest.mark.parametrize(
    ("num_items", "differing"), [(100, 0.4), (300, 0.15), (1000, 0.05), (1000, 0.3), (5000, 0.1)]
)
def test_twice_the_detectable_difference_takes_half_the_items(
    num_items: int, differing: float
) -> None:
    assert half_of_fixed_n(num_items, differing, 200) <= 0.5
