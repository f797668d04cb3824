"""The parts of the variance against sums of squares by hand, and against known parts."""

from __future__ import annotations

import numpy as np
import pytest

from conf.results import Variance
from evaluation.statistics.variance import Scores, pooled_interval, split_variance


def table(values: np.ndarray) -> Scores:
    """(draws, seeds, items) -> scores."""
    return {
        (d, s): {str(i): float(v) for i, v in enumerate(values[d, s])}
        for d in range(values.shape[0])
        for s in range(values.shape[1])
    }


def test_two_draws_of_two_items_by_hand() -> None:
    # Item means 0.5 and 0.75, draw means 0.75 and 0.5, grand mean 0.625.
    found = split_variance(table(np.array([[[0.5, 1.0]], [[0.5, 0.5]]])))
    assert found.items == pytest.approx((0.125**2 + 0.125**2) / 1 / 2)
    # Draws: 2 * ((1/8)^2 + (1/8)^2) = 1/16 on 1 degree; rest: total 3/16 - 1/16 - 1/16 = 1/16.
    assert found.draws == pytest.approx(0.0)
    assert found.seeds is None


def test_parts_of_the_crossed_layout_equal_its_mean_squares() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 5)) + rng.normal(0, 3, size=(3, 1, 1)) + rng.normal(size=(1, 4, 1))
    grand = x.mean()
    square = {}
    for axis, others in enumerate([(1, 2), (0, 2), (0, 1)]):
        means = x.mean(axis=others)
        square[axis] = x.size / x.shape[axis] * ((means - grand) ** 2).sum()
    rest = (((x - grand) ** 2).sum() - sum(square.values())) / (60 - 1 - 2 - 3 - 4)
    found = split_variance(table(x))
    assert found.items == pytest.approx(square[2] / 4 / 60)
    assert found.draws == pytest.approx(max(0.0, square[0] / 2 - rest) / 60)
    assert found.seeds == pytest.approx(max(0.0, square[1] / 3 - rest) / 60)


def test_known_parts_are_found_again() -> None:
    """100 items of sd 2, 60 draws of sd 1, 50 seeds of sd 0.5, a rest of sd 1."""
    rng = np.random.default_rng(4)
    x = (
        rng.normal(0, 2, size=(1, 1, 100))
        + rng.normal(0, 1, size=(60, 1, 1))
        + rng.normal(0, 0.5, size=(1, 50, 1))
        + rng.normal(0, 1, size=(60, 50, 100))
    )
    found = split_variance(table(x))
    assert found.items == pytest.approx(4 / 100, rel=0.3)
    assert found.draws == pytest.approx(1 / 60, rel=0.5)
    assert found.seeds == pytest.approx(0.25 / 50, rel=0.6)


def test_one_of_a_kind_has_no_part() -> None:
    found = split_variance({(0, 0): {"a": 1.0, "b": 0.0, "c": 1.0}})
    assert found.items == pytest.approx(np.var([1, 0, 1], ddof=1) / 3)
    assert (found.draws, found.seeds) == (None, None)
    assert split_variance({(0, 0): {"a": 1.0}}) == split_variance({}) == Variance()


def test_draws_and_seeds_that_go_together_are_not_told_apart() -> None:
    found = split_variance({(0, 0): {"a": 1.0, "b": 0.0}, (1, 1): {"a": 1.0, "b": 1.0}})
    assert (found.draws, found.seeds) == (None, None) and found.items is not None


def test_items_that_a_draw_has_not_answered_are_left_out() -> None:
    whole = {(0, 0): {"a": 1.0, "b": 0.0}, (1, 0): {"a": 0.5, "b": 0.0}}
    more = {**whole, (1, 0): {**whole[1, 0], "c": 1.0}}
    assert split_variance(more) == split_variance(whole)


def test_sources_widen_the_part_of_the_items() -> None:
    scores = {(0, 0): {str(k): float(k // 5 % 2) for k in range(50)}}
    sources = {str(k): str(k // 5) for k in range(50)}
    alone, shared = split_variance(scores), split_variance(scores, sources=sources)
    assert shared.items == pytest.approx((alone.items or 0) * 5 * (10 / 9) / (50 / 49))


def test_the_pooled_interval_covers_over_new_items_draws_and_seeds() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        x = 0.5 + (
            rng.normal(0, 0.1, size=(1, 1, 40))
            + rng.normal(0, 0.03, size=(4, 1, 1))
            + rng.normal(0, 0.02, size=(1, 3, 1))
            + rng.normal(0, 0.05, size=(4, 3, 40))
        )
        parts = split_variance(table(x))
        m = pooled_interval(float(x.mean()), parts, n=40, num_draws=4, num_seeds=3, confidence=0.95)
        covered += m.low <= 0.5 <= m.high
    assert 0.92 <= covered / 300 <= 0.99
