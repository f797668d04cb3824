"""Gaps in points and in money against closed forms and a simulation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from conf.records import Measured
from conf.results import ArmResult
from conf.run_groups import DecisionConfig
from evaluation.decision.gap import Gap, Total, metric_gap, money_gap, more_items, state_of
from evaluation.decision.rules import Evidence, choose, total_cost
from evaluation.decision.utility import all_utilities, summed
from tests.evaluation.decision_cases import arm, pair


def test_money_without_cost_intervals_is_the_metric_scaled_and_shifted() -> None:
    found = money_gap(
        pair("a", "b", 0.1, 0.04),
        ours=Total(usd=50.0, device_seconds=None),
        theirs=Total(usd=20.0, device_seconds=None),
        usd_per_point=1000.0,
        margin=0.02,
    )
    assert found is not None
    expected = (-30 + 100, -30 + 60, -30 + 140, 20.0, 0.0)
    got = (found.value, found.low, found.high, found.margin, found.floor)
    assert got == pytest.approx(expected)


def test_the_interval_of_a_sum_is_exact_for_normal_parts() -> None:
    half = 1.96 * math.hypot(3.0, 4.0)
    found = summed(
        Measured(value=10.0, low=10 - 1.96 * 3, high=10 + 1.96 * 3, n=8),
        Measured(value=20.0, low=20 - 1.96 * 4, high=20 + 1.96 * 4, n=200),
    )
    assert (found.value, found.low, found.high, found.n) == pytest.approx(
        (30.0, 30 - half, 30 + half, 200)
    )
    one_sided = summed(Measured(value=1.0), Measured(value=2.0, low=1.0, high=3.0))
    assert (one_sided.value, one_sided.low, one_sided.high) == (3.0, None, None)
    assert summed(Measured(), Measured(value=1.0)).value is None


def test_expected_cost_covers_the_truth() -> None:
    """2,000 draws of measured request costs and right answers: the interval holds for 95%."""
    rng = np.random.default_rng(3)
    truth_request, truth_right, n = 2e-4, 0.8, 300
    truth = 5.0 + 1.2e6 * (truth_request + 1e-3 * (1 - truth_right))
    hits = 0
    for _ in range(2000):
        request = rng.normal(truth_request, 3e-5)
        right = rng.binomial(n, truth_right) / n
        half = 1.96 * math.sqrt(right * (1 - right) / n)
        cost = Measured(value=5 + 1.2e6 * request, low=5 + 1.2e6 * (request - 1.96 * 3e-5),
                        high=5 + 1.2e6 * (request + 1.96 * 3e-5))  # fmt: skip
        per_point = 1e-3 * 1.2e6
        wrong = Measured(value=per_point * (1 - right), low=per_point * (1 - right - half),
                         high=per_point * (1 - right + half))  # fmt: skip
        total = summed(cost, wrong)
        assert total.low is not None and total.high is not None
        hits += total.low <= truth <= total.high
    assert abs(hits / 2000 - 0.95) < 0.02


def test_utilities_are_cost_plus_wrong_answers_cheapest_first() -> None:
    arms = {
        "full": arm(0.9, kind="full", fixed=5000.0),
        "zero_shot": arm(0.7),
        "failed": arm(None, kind="lora", status="failed"),
    }
    evidence = Evidence(arms=arms, pairs=[])
    assert all_utilities(evidence, decision=DecisionConfig()) == ()
    cheap = all_utilities(evidence, decision=DecisionConfig(error_usd=0.001))
    dear = all_utilities(evidence, decision=DecisionConfig(error_usd=1.0))
    assert [u.arm for u in cheap] == ["zero_shot", "full"]
    assert [u.arm for u in dear] == ["full", "zero_shot"]
    # 1.2 USD of requests + 1.2 million x 0.1 wrong answers; the metric's interval is +-0.03
    full = dear[0]
    assert full.expected_usd.value == pytest.approx(5001.2 + 120_000)
    assert full.wrong_usd.low == pytest.approx(84_000)
    assert full.wrong_usd.high == pytest.approx(156_000)
    assert full.expected_usd_per_month.value == pytest.approx((5001.2 + 120_000) / 12)
    assert full.expected_usd.n == 200


def test_costs_that_are_not_sure_leave_money_open_and_items_cannot_help() -> None:
    sure, unsure = arm(0.9, request=2e-6), arm(0.8, request=1e-6)
    pairs = [pair("sure", "unsure", 0.1, 0.02)]
    decision = DecisionConfig(error_usd=1e-4, equivalence_margin=0.0)  # 12 USD for 0.1
    assert choose(Evidence(arms={"sure": sure, "unsure": unsure}, pairs=pairs),
                  decision=decision).arm == "sure"  # fmt: skip
    wide = with_request_interval(sure, low=0.5e-6, high=20e-6)
    choice = choose(Evidence(arms={"sure": wide, "unsure": unsure}, pairs=pairs), decision=decision)
    assert choice.state == "open" and choice.more_items is None


def with_request_interval(result: ArmResult, *, low: float, high: float) -> ArmResult:
    assert result.cost is not None
    seconds, usd = result.cost.request_device_seconds, result.cost.request_usd.value
    assert seconds.value is not None and usd is not None
    factor = seconds.value / usd
    measured = Measured(value=seconds.value, low=low * factor, high=high * factor, n=8)
    return replace(result, cost=replace(result.cost, request_device_seconds=measured))


def test_the_price_range_moves_all_arms_and_is_not_in_the_comparison() -> None:
    base = with_request_interval(arm(0.9, request=2e-6), low=1.9e-6, high=2.1e-6)
    assert base.cost is not None
    ranged = replace(base.cost, request_usd=Measured(value=2e-6, low=1e-6, high=9e-6, n=8))
    total = total_cost(replace(base, cost=ranged), decision=DecisionConfig())
    assert (total.usd, total.low_usd, total.high_usd) == pytest.approx((2.4, 2.28, 2.52))


def test_states_by_hand() -> None:
    inside = Gap(value=0.0, low=-0.02, high=0.02, margin=0.02)
    ahead = Gap(value=0.1, low=0.01, high=0.2, margin=0.02)
    assert state_of(None, is_separate=True) == "open"
    assert state_of(inside, is_separate=False) == "equal"
    assert state_of(ahead, is_separate=True) == "worse"
    assert state_of(ahead, is_separate=False) == "open"


def test_more_items_narrow_what_items_can() -> None:
    close = pair("a", "b", 0.06, 0.0588, n=100, p=0.05)
    gap = metric_gap(close, margin=0.0)
    assert gap is not None
    found = more_items(gap, close, confidence=0.95)
    assert found == 97
    # The same in money, 1000 USD a point and no cost interval, needs the same items.
    free = Total(usd=0.0, device_seconds=None)
    money = money_gap(close, ours=free, theirs=free, usd_per_point=1000.0, margin=0.0)
    assert more_items(money, close, confidence=0.95) == found
    # With a cost interval half as wide as the gap it needs 1 / (1 - 1/4) as many in all.
    unsure = Total(usd=0.0, device_seconds=None, low_usd=-30.0, high_usd=30.0)
    money = money_gap(close, ours=free, theirs=unsure, usd_per_point=1000.0, margin=0.0)
    # 196.2 / 0.75 - 100 = 161.6, up to two figures
    assert more_items(money, close, confidence=0.95) == 170
