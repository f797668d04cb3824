"""Which comparisons close and which arms leave: rules one by one, and the error over many runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from conf.run_groups import DecisionConfig
from evaluation.decision.closing import (
    NUM_FUTURES,
    Comparison,
    futures,
    judge,
    leaving,
    pair_alpha,
    pair_stakes,
)
from evaluation.decision.gap import Total
from evaluation.records.run_records import read_run
from evaluation.results.summary import summarise
from evaluation.statistics.sequential import log_e_value, stakes
from tests.benchmarks.early_stopping import replay
from tests.evaluation.fake_run import write_spam_run

FREE = Total(usd=1.0, device_seconds=None)
DEAR = Total(usd=2.0, device_seconds=None)


def scored(**arms: list[float]) -> dict[str, dict[str, float]]:
    return {name: {str(i): v for i, v in enumerate(own)} for name, own in arms.items()}


def judged(
    scores: Mapping[str, Mapping[str, float]],
    *,
    num_left: int,
    costs: Mapping[str, Total] | None = None,
    frozen: tuple[Comparison, ...] = (),
    **decision: float,
) -> dict[tuple[str, str], Comparison]:
    items = max(scores.values(), key=len)
    pairs = judge(
        scores,
        items=list(items),
        num_left=num_left,
        num_arms=len(scores),
        decision=DecisionConfig(**decision),
        costs=costs or dict.fromkeys(scores, FREE),
        frozen=frozen,
    )
    return {(p.a, p.b): p for p in pairs}


def test_each_pair_has_its_share_of_the_error() -> None:
    assert pair_alpha(2, confidence=0.95) == pytest.approx(0.05)
    assert pair_alpha(8, confidence=0.95) == pytest.approx(0.05 / 28)


def test_a_clear_difference_closes_and_the_arm_behind_leaves() -> None:
    pairs = judged(scored(a=[1.0] * 60, b=[1.0] * 20 + [0.0] * 40), num_left=200)
    pair = pairs["a", "b"]
    assert (pair.state, pair.behind, pair.trailing) == ("different", "b", "b")
    assert pair.low > 0 and pair.e_value > 20 and pair.n == 60
    assert leaving(list(pairs.values()), ["a", "b"]) == ("a", "b")


def test_equal_arms_close_once_the_margin_holds_them() -> None:
    same = scored(a=[1.0, 0.0] * 600, b=[1.0, 0.0] * 600)
    assert judged(same, num_left=5000, equivalence_margin=0.02)["a", "b"].state == "equal"
    few = scored(a=[1.0, 0.0] * 50, b=[1.0, 0.0] * 50)
    assert judged(few, num_left=5000, equivalence_margin=0.02)["a", "b"].state == "open"


def test_what_is_left_decides_whether_a_pair_is_hopeless() -> None:
    near = scored(a=[1.0] * 40 + [0.0] * 40, b=[1.0] * 38 + [0.0] * 41 + [1.0])
    assert judged(near, num_left=20)["a", "b"].state == "hopeless"
    assert judged(near, num_left=20_000)["a", "b"].state == "open"


def test_an_arm_behind_that_costs_more_is_not_waited_for() -> None:
    scores = scored(a=[1.0] * 26 + [0.0] * 14, b=[0.0] * 10 + [1.0] * 19 + [0.0] * 11)
    dearer = judged(scores, num_left=60, costs={"a": FREE, "b": DEAR})["a", "b"]
    assert (dearer.state, dearer.trailing) == ("dearer", "b")
    assert dearer.low < 0 < dearer.high  # it is not called worse
    for costs in ({"a": DEAR, "b": FREE}, {"a": FREE, "b": FREE}):
        assert judged(scores, num_left=60, costs=costs)["a", "b"].state == "open"
    unknown = Total(usd=None, device_seconds=None)
    assert judged(scores, num_left=60, costs={"a": unknown, "b": DEAR})["a", "b"].state == "open"


def test_a_limit_may_take_the_leader_away() -> None:
    scores = scored(a=[1.0] * 26 + [0.0] * 14, b=[0.0] * 10 + [1.0] * 19 + [0.0] * 11)
    costs = {"a": FREE, "b": DEAR}
    pairs = judged(scores, num_left=60, costs=costs, maximum_p95_seconds=1.0)
    assert pairs["a", "b"].state == "open"


def test_arms_that_are_behind_others_are_not_compared_any_further() -> None:
    top, low = [1.0] * 60, [1.0] * 10 + [0.0] * 50
    other = [0.0] * 8 + [1.0] * 12 + [0.0] * 40
    pairs = judged(scored(top=top, low=low, other=other), num_left=2000)
    assert pairs["top", "low"].state == pairs["top", "other"].state == "different"
    assert pairs["low", "other"].state == "irrelevant"
    assert set(leaving(list(pairs.values()), ["top", "low", "other"])) == {"top", "low", "other"}


def test_an_arm_stays_for_the_one_comparison_that_is_open() -> None:
    top, near = [1.0] * 54 + [0.0] * 6, [1.0] * 50 + [0.0] * 10
    pairs = judged(scored(top=top, near=near, low=[0.0] * 60), num_left=2000)
    assert pairs["top", "near"].state == "open"
    assert leaving(list(pairs.values()), ["top", "near", "low"]) == ("low",)


def test_a_pair_whose_arm_has_left_stays_as_it_was() -> None:
    frozen = Comparison(
        a="a", b="b", state="dearer", difference=0.2, low=-0.1, high=0.5, e_value=2.0, n=20
    )
    pairs = judged(scored(a=[1.0] * 40, b=[1.0] * 20), num_left=0, frozen=(frozen,))
    kept = pairs["a", "b"]
    assert (kept.state, kept.n, kept.low, kept.trailing) == ("dearer", 20, -0.1, "b")


def test_scores_out_of_range_keep_a_pair_open() -> None:
    pairs = judged(scored(a=[3.0, 0.0], b=[0.0, 0.0]), num_left=0)
    assert not pairs and leaving([], ["a", "b"]) == ()


def test_futures_know_what_is_certain() -> None:
    ahead = stakes([1.0] * 30 + [0.0] * 10, low=-1, high=1)
    sure = futures(ahead, num_left=1, alpha=0.05, margin=0.02)
    assert (sure.decided, sure.turned) == (1.0, 0.0)
    level = stakes([1.0, -1.0] * 20, low=-1, high=1)
    assert futures(level, num_left=1, alpha=0.05, margin=0.02).decided == 0.0


def test_futures_match_a_closed_form() -> None:
    """One item decides which of two level arms is ahead: chances from the bootstrap's prior."""
    one_behind = stakes([-1.0] + [0.0] * 7, low=-1, high=1)
    # Weights: the -1 seen and its prior 2, ties 7, +1 prior 1: level again with chance 1 in 10.
    found = futures(one_behind, num_left=1, alpha=0.05, margin=0.02)
    error = math.sqrt(0.1 * 0.9 / NUM_FUTURES)
    assert found.turned == pytest.approx(0.1, abs=4 * error)


def test_hardly_ever_is_one_of_five_equal_arms_called_different() -> None:
    """Runs of four waves over five equal arms that share their luck: errors over all pairs."""
    rng, wrong, count, alpha = np.random.default_rng(2), 0, 200, pair_alpha(5, confidence=0.95)
    for _ in range(count):
        hard = rng.random(160) < 0.3
        right = np.where(hard, rng.random((5, 160)) < 0.5, rng.random((5, 160)) < 0.95)
        arms = {
            str(k): {str(i): float(v) for i, v in enumerate(own)} for k, own in enumerate(right)
        }
        names = [(a, b) for a in arms for b in arms if a < b]
        found = False
        for end in (20, 40, 80, 160):
            items = [str(i) for i in range(end)]
            for a, b in names:
                bets_on = pair_stakes(arms[a], arms[b], items=items, sources=None, largest=None)
                assert bets_on is not None
                found = found or log_e_value(bets_on, 0.0) >= -math.log(alpha)
        wrong += found
    assert wrong / count <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / count)


def test_waves_spare_a_third_of_the_answers_and_decide_alike(tmp_path: Path) -> None:
    """Eight made-up arms on 160 items, replayed; the same arm is taken, or none."""
    records = read_run(write_spam_run(tmp_path, num_test=160))
    whole, waved = summarise(records).recommendation, replay(records, seed=0)
    assert waved.ratio >= 1.5 and waved.arm == whole.arm
    assert waved.verdict.split(":")[0] == whole.verdict.split(":")[0]
