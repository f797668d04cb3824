"""The calibration error: closed forms, no error where there is none, and known ones found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conf.records import AnswerRule, SampleRecord
from evaluation.statistics.expected_calibration import (
    calibration_error,
    folded_normal_mean,
    stated_probability,
)
from evaluation.statistics.measures import Measure, changed


def rows(n: int, *, shift: float, seed: int, batch: int = 1) -> np.ndarray:
    """Confidences in [0.5, 0.95] and hits whose probability is `shift` lower."""
    rng = np.random.default_rng(seed)
    stated = rng.uniform(0.5, 0.95, size=(batch, n))
    hits = rng.random((batch, n)) < stated - shift
    return np.stack([stated, hits.astype(float)], axis=-1)


def test_the_folded_normal_mean_is_that_of_draws() -> None:
    draws = np.random.default_rng(0).standard_normal(400_000)
    for mean, sd in ((0.0, 0.1), (0.05, 0.1), (0.3, 0.1), (0.2, 0.0)):
        found = float(folded_normal_mean(np.array(mean), np.array(sd)))
        assert found == pytest.approx(float(np.abs(mean + sd * draws).mean()), abs=4e-4)


def test_bins_hold_equally_many_and_are_weighed_by_their_items() -> None:
    # 20 items of confidence 0.6 all right, 20 of 0.9 all wrong: no noise in a bin, nothing to take.
    stated = np.concatenate([np.full(20, 0.6), np.full(20, 0.9)])
    hits = np.concatenate([np.ones(20), np.zeros(20)])
    found = calibration_error(np.stack([stated, hits], axis=-1)[None])
    assert float(found[0]) == pytest.approx(0.5 * 0.4 + 0.5 * 0.9)


@pytest.mark.parametrize("n", [50, 200])
def test_debiasing_takes_most_of_the_noise_off(n: int) -> None:
    """Right probabilities: the plain estimate is far above 0 at small n; ours is near."""
    samples = rows(n, shift=0.0, seed=1, batch=400)
    order = np.argsort(samples[..., 0], axis=1)
    ordered = np.take_along_axis(samples, order[..., None], axis=1)
    bins = np.stack([b.mean(axis=1) for b in np.array_split(ordered, min(10, n // 10), axis=1)])
    plain = np.abs(bins[..., 0] - bins[..., 1]).mean(axis=0).mean()
    ours = calibration_error(samples).mean()
    assert ours < 0.65 * plain


def test_a_known_error_is_found() -> None:
    assert calibration_error(rows(300, shift=0.2, seed=2, batch=300)).mean() == pytest.approx(
        0.2, abs=0.01
    )


def test_the_bootstrap_interval_covers_a_known_error() -> None:
    covered = 0
    for seed in range(40):
        values = rows(200, shift=0.2, seed=100 + seed)[0]
        ids = tuple(map(str, range(200)))
        found = Measure(ids=ids, values=values, statistic=calibration_error).interval(0.95)
        assert found.low is not None and found.high is not None and found.n == 200
        covered += found.low <= 0.2 <= found.high
    assert covered >= 34  # of 40; fewer than 34 has probability 0.003 at 95%


def test_a_change_is_paired_by_item() -> None:
    ids = tuple(map(str, range(200)))
    before, after = (
        Measure(ids=ids, values=rows(200, shift=s, seed=5)[0], statistic=calibration_error)
        for s in (0.3, 0.0)
    )
    found = changed(before, after, confidence=0.95)
    assert found is not None and found.p_value is None and found.change.n == 200
    assert found.change.value == pytest.approx(after.value - before.value)
    assert found.change.high is not None and found.change.high < 0
    same = changed(before, before, confidence=0.95)
    assert same is not None and same.change.value == 0


def record(**fields: object) -> SampleRecord:
    values = {"arm": "a", "item_id": "i", "set": "test", "answer": "x", **fields}
    return SampleRecord(**values)  # type: ignore[arg-type]


def test_the_probability_is_that_of_the_answer_under_the_rule() -> None:
    scores = {"x": math.log(0.2), "y": math.log(0.6)}
    offsets = {"x": math.log(0.1), "y": math.log(0.9)}
    plain = record(label_logprobs=scores, answer="y")
    assert stated_probability(plain, None) == pytest.approx(0.75)
    batch = AnswerRule(arm="a", answer_by="score", calibration="batch", label_offsets=offsets)
    shifted = record(label_logprobs=scores, answer="y", calibrated_answer="x")
    assert stated_probability(shifted, batch) == pytest.approx(2 / (2 + 2 / 3))
    pmi = AnswerRule(arm="a", answer_by="score", normalisation="pmi")
    free = record(label_logprobs=scores, baseline_logprobs=offsets, calibrated_answer="x")
    assert stated_probability(free, pmi) == pytest.approx(2 / (2 + 2 / 3))


def test_without_a_distribution_nothing_is_stated() -> None:
    token = AnswerRule(arm="a", answer_by="score", normalisation="token")
    assert stated_probability(record(), None) is None
    assert stated_probability(record(label_logprobs={"x": -1.0, "y": -2.0}), token) is None
    assert stated_probability(record(label_logprobs={"y": -2.0}, answer=None), None) is None
