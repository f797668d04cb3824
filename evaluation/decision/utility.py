"""What each arm is expected to cost, its wrong answers included, with an interval (pure)."""

from __future__ import annotations

import math

from conf.decision_results import Utility
from conf.records import Measured
from conf.results import ArmResult
from conf.run_groups import DecisionConfig
from evaluation.costs.cost import scaled
from evaluation.decision.rules import Evidence, total_cost, usd_per_point


def all_utilities(evidence: Evidence, *, decision: DecisionConfig) -> tuple[Utility, ...]:
    """The finished arms, the least expected cost first; empty without a price of wrong answers."""
    found = [
        u
        for name, result in evidence.arms.items()
        if result.status == "done" and (u := _utility(name, result, decision=decision)) is not None
    ]
    return tuple(sorted(found, key=lambda u: u.expected_usd.value or 0.0))


def _utility(name: str, result: ArmResult, *, decision: DecisionConfig) -> Utility | None:
    total, metric = total_cost(result, decision=decision), result.metric
    per_point = usd_per_point(decision)
    if total.usd is None or per_point is None or metric is None or metric.value is None:
        return None
    n = None if result.cost is None else result.cost.request_usd.n
    cost = Measured(value=total.usd, low=total.low_usd, high=total.high_usd, n=n)
    wrong = Measured(
        value=per_point * (1 - metric.value),
        low=None if metric.high is None else per_point * (1 - metric.high),
        high=None if metric.low is None else per_point * (1 - metric.low),
        n=metric.n,
    )
    expected = summed(cost, wrong)
    return Utility(
        arm=name,
        expected_usd=expected,
        expected_usd_per_month=scaled(expected, 1 / decision.horizon_months),
        cost_usd=cost,
        wrong_usd=wrong,
    )


def summed(a: Measured, b: Measured) -> Measured:
    """The sum of two values by Zou and Donner 2008 (MOVER); an end that one lacks is unknown.

    n is that of b. Each part brings the half-width of its own interval; they are independent.
    """
    if a.value is None or b.value is None:
        return Measured(n=b.n)
    value = a.value + b.value
    low = high = None
    if a.low is not None and b.low is not None:
        low = value - math.hypot(a.value - a.low, b.value - b.low)
    if a.high is not None and b.high is not None:
        high = value + math.hypot(a.high - a.value, b.high - b.value)
    return Measured(value=value, low=low, high=high, n=b.n)
