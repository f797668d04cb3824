"""Crossings against closed forms, and known ones recovered within the interval."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.results.label_crossing import Floats, crossing, draw_variance, places

SIZES = (8, 32, 128, 512)


def level(value: float, *, draws: int = 1, items: int = 40) -> Floats:
    return np.full((draws, items), value)


def test_lines_in_the_logarithm_of_labels_cross_where_the_algebra_says() -> None:
    for truth in (9.0, 31.9, 60.0, 400.0):
        a = [level(0.5) for _ in SIZES]
        b = [level(0.5 + 0.1 * math.log(size / truth)) for size in SIZES]
        found = crossing(SIZES, a, b, num_resamples=50)
        assert found.status == "crosses"
        assert found.labels == pytest.approx(truth, rel=1e-9)
        assert found.low == pytest.approx(truth) and found.high == pytest.approx(truth)
        assert found.share_seen == 1.0


@pytest.mark.parametrize(
    ("differences", "status", "labels"),
    [
        ((0.1, 0.2, 0.1, 0.1), "always", None),
        ((-0.1, -0.2, -0.1, -0.1), "none_seen", None),
        ((0.2, 0.1, 0.1, -0.1), "none_seen", None),  # ahead and behind again
        ((-0.1, 0.1, -0.1, 0.1), "crosses", 256.0),  # the last time counts
        ((-0.1, 0.0, 0.0, 0.0), "crosses", 32.0),  # as good is good enough
    ],
)
def test_every_status(differences: tuple[float, ...], status: str, labels: float | None) -> None:
    a = [level(0.5) for _ in SIZES]
    b = [level(0.5 + d) for d in differences]
    found = crossing(SIZES, a, b, num_resamples=20)
    assert found.status == status
    assert found.labels == (None if labels is None else pytest.approx(labels))


def test_places_by_brute_force() -> None:
    source = np.random.default_rng(0)
    x = np.log(np.array(SIZES, dtype=np.float64))
    rows = source.normal(size=(300, 4))
    for row, place in zip(rows, places(x, rows), strict=True):
        fine = np.linspace(x[0], x[-1], 30_001)
        values = np.interp(fine, x, row)
        below = np.flatnonzero(values < 0)
        if not len(below):
            assert place == -math.inf
        elif below[-1] == len(fine) - 1:
            assert place == math.inf
        else:
            assert abs(place - fine[below[-1]]) < 1e-3


def test_one_size_or_no_item_is_unknown() -> None:
    assert crossing((8,), [level(0.5)], [level(0.6)]).status == "unknown"
    empty = [level(0.5, items=0)] * 2
    assert crossing((8, 16), empty, empty).status == "unknown"
    assert crossing((), [], []).status == "unknown"


def test_draws_that_differ_by_chance_alone_have_no_variance_of_their_own() -> None:
    source = np.random.default_rng(1)
    own = [draw_variance((source.random((5, 200)) < 0.7).astype(float)) for _ in range(300)]
    assert np.mean(own) < 0.3 * 0.7 * 0.3 / 200  # far below that of draws' means
    shifted = [
        draw_variance(source.random((5, 200)) + source.normal(size=(5, 1)) * 0.2)
        for _ in range(300)
    ]
    assert np.mean(shifted) == pytest.approx(0.04, rel=0.15)
    assert draw_variance(level(0.5)) == 0.0


def synthetic(source: np.random.Generator, *, draws: int, items: int) -> tuple[list[Floats], ...]:
    """A level prompted arm and a tuned one that crosses it at 60 labels; answers are 0 or 1."""
    skill = source.normal(size=items) * 0.1  # of items, the same for both arms

    def answers(mean: float) -> Floats:
        luck = source.normal(size=(draws, 1)) * 0.03  # of draws
        shares = np.clip(mean + skill + luck, 0, 1)
        return (source.random((draws, items)) < shares).astype(float)

    prompted = [answers(0.6) for _ in SIZES]
    return prompted, [answers(0.6 + 0.09 * math.log(size / 60)) for size in SIZES]


def test_a_known_crossing_lies_within_the_interval() -> None:
    source = np.random.default_rng(3)
    hits, widths = 0, []
    for number in range(120):
        prompted, tuned = synthetic(source, draws=3, items=300)
        found = crossing(SIZES, prompted, tuned, num_resamples=400, seed=number)
        low, high = found.low or 0.0, found.high or math.inf
        hits += low <= 60 <= high
        widths.append(high / max(low, 1.0))
    assert hits >= 110  # 95% of 120 is 114; two standard errors are 5
    assert np.median(widths) < 30  # and it says something: sizes span a factor of 64
