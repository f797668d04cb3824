"""The rules that turn measured arms into a choice (pure); evaluation/decision.py words it.

1. Arms that miss a limit, or cannot be shown to meet it, leave.
2. The leader is the arm with the highest metric. Each other arm is `worse` (its whole interval is
   below the leader's, after Holm), `equal` (its whole interval lies inside the equivalence margin)
   or `open`. With `error_usd` all of this happens in money: total cost + cost of wrong answers.
3. The cheapest of leader and equal arms is taken, unless an open arm may be cheaper still.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

from conf.results import ArmResult, Pair
from conf.run_groups import DecisionConfig
from evaluation.statistics import items_to_decide, normal_quantile

LIMITS = (
    "minimum_metric",
    "minimum_format_validity",
    "maximum_p95_seconds",
    "maximum_total_usd",
)
FAMILIES = {
    "prompt": "prompt",
    "lora": "weights",
    "full": "weights",
    "peft": "weights",
    "instruction": "weights",
    "both": "both",
    "tfidf": "reference",
    "given": "reference",
}


@dataclass(kw_only=True, slots=True, frozen=True)
class Evidence:
    """What is decided from. validation: arm -> its score on validation, None where unknown."""

    arms: Mapping[str, ArmResult]
    pairs: Sequence[Pair]
    validation: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True, frozen=True)
class Standing:
    """An arm against the leader. state: worse | equal | open."""

    arm: str
    state: str
    pair: Pair | None


@dataclass(kw_only=True, slots=True, frozen=True)
class Choice:
    """The outcome of the rules. state: take | equal | open | none | nothing."""

    state: str
    arm: str | None = None
    leader: str | None = None
    standings: tuple[Standing, ...] = ()
    rejected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # arm -> limits missed
    more_items: int | None = None
    rival: str | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class Total:
    """Cost of the whole horizon; None where it is not known."""

    usd: float | None
    device_seconds: float | None


def without_limit(decision: DecisionConfig, limit: str) -> DecisionConfig:
    """The same decision with one limit lifted."""
    changed = copy(decision)
    setattr(changed, limit, None)
    return changed


def family(result: ArmResult) -> str:
    """The group of an arm: prompt, weights, both or reference."""
    return FAMILIES[result.kind]


def volume(decision: DecisionConfig) -> float:
    """Requests over the whole horizon."""
    return decision.requests_per_month * decision.horizon_months


def metric_of(result: ArmResult) -> float | None:
    """The arm's headline value."""
    return None if result.metric is None else result.metric.value


def total_cost(result: ArmResult, *, decision: DecisionConfig) -> Total:
    """Fixed cost + volume x request cost."""
    cost = result.cost
    if cost is None:
        return Total(usd=None, device_seconds=None)
    v = volume(decision)
    return Total(
        usd=_line(cost.fixed_usd, cost.request_usd.value, v),
        device_seconds=_line(cost.fixed_device_seconds, cost.request_device_seconds.value, v),
    )


def _line(fixed: float | None, request: float | None, v: float) -> float | None:
    return None if fixed is None or request is None else fixed + v * request


def is_cheaper(a: Total, b: Total) -> bool:
    """Whether a is known to cost less than b: in USD, or in device-seconds without a price."""
    if a.usd is not None and b.usd is not None:
        return a.usd < b.usd
    if a.device_seconds is not None and b.device_seconds is not None:
        return a.device_seconds < b.device_seconds
    return False


def measured_for(limit: str, result: ArmResult, *, decision: DecisionConfig) -> float | None:
    """The value that is held against a limit; None where it was not measured."""
    match limit:
        case "minimum_metric":
            return metric_of(result)
        case "minimum_format_validity":
            return None if result.format_validity is None else result.format_validity.value
        case "maximum_p95_seconds":
            return None if result.latency is None else result.latency.p95_seconds.value
        case "maximum_total_usd":
            return total_cost(result, decision=decision).usd
    raise AssertionError(f"no such limit: {limit}")


def missed_limits(result: ArmResult, *, decision: DecisionConfig) -> tuple[str, ...]:
    """The limits that an arm misses or cannot be shown to meet.

    An arm that scores labels, and a reference arm, can only answer with a label: format validity
    is not measured there and not asked for.
    """
    missed = []
    for limit in LIMITS:
        bound = getattr(decision, limit)
        if bound is None:
            continue
        is_generated = result.answer_rule is not None and result.answer_rule.answer_by == "generate"
        if limit == "minimum_format_validity" and not is_generated:
            continue
        value = measured_for(limit, result, decision=decision)
        is_met = value is not None and (
            value >= bound if limit.startswith("minimum") else value <= bound
        )
        if not is_met:
            missed.append(limit)
    return tuple(missed)


def loss_usd(result: ArmResult, *, decision: DecisionConfig) -> float | None:
    """Total cost + the cost of wrong answers, where both have a price."""
    usd, value = total_cost(result, decision=decision).usd, metric_of(result)
    if usd is None or value is None or decision.error_usd is None:
        return None
    return usd + decision.error_usd * volume(decision) * (1 - value)


def pair_of(pairs: Sequence[Pair], a: str, b: str) -> Pair | None:
    """The pair as a - b, whichever way round it was stored."""
    for p in pairs:
        if (p.a, p.b) == (a, b):
            return p
        if (p.a, p.b) == (b, a):
            return replace(
                p,
                a=a,
                b=b,
                difference=None if p.difference is None else -p.difference,
                low=None if p.high is None else -p.high,
                high=None if p.low is None else -p.low,
                wins=p.losses,
                losses=p.wins,
            )
    return None


def choose(evidence: Evidence, *, decision: DecisionConfig) -> Choice:
    """Apply the three rules of this module."""
    arms = evidence.arms
    done = [a for a, r in arms.items() if r.status == "done" and metric_of(r) is not None]
    missed = {a: missed_limits(arms[a], decision=decision) for a in done}
    rejected = {a: limits for a, limits in missed.items() if limits}
    eligible = {a: arms[a] for a in done if a not in rejected}
    if not eligible:
        return Choice(state="none" if done else "nothing", rejected=rejected)
    is_money = all(loss_usd(r, decision=decision) is not None for r in eligible.values())
    if is_money:
        leader = min(eligible, key=lambda a: loss_usd(eligible[a], decision=decision) or 0.0)
    else:
        leader = max(eligible, key=lambda a: metric_of(eligible[a]) or 0.0)
    standings = tuple(
        _standing(evidence, leader, arm, decision=decision, is_money=is_money)
        for arm in eligible
        if arm != leader
    )
    choice = Choice(state="take", arm=leader, leader=leader, standings=standings, rejected=rejected)
    return _pick(choice, arms, decision=decision, is_money=is_money)


def _standing(
    evidence: Evidence, leader: str, arm: str, *, decision: DecisionConfig, is_money: bool
) -> Standing:
    """Compare by the interval of leader - arm in the metric, or of arm - leader in USD."""
    pair = pair_of(evidence.pairs, leader, arm)
    if pair is None or pair.low is None or pair.high is None:
        return Standing(arm=arm, state="open", pair=pair)
    low, high, margin = pair.low, pair.high, decision.equivalence_margin
    is_separate = pair.p_adjusted is None or pair.p_adjusted < 1 - decision.confidence
    if is_money:
        assert decision.error_usd is not None
        per_point = decision.error_usd * volume(decision)
        ours = total_cost(evidence.arms[leader], decision=decision).usd
        theirs = total_cost(evidence.arms[arm], decision=decision).usd
        assert ours is not None and theirs is not None
        extra = theirs - ours
        low, high = extra + per_point * low, extra + per_point * high
        margin *= per_point
        is_separate = True  # the test of a difference of 0 in the metric is not the one asked here
    if -margin <= low and high <= margin:
        state = "equal"
    elif low > 0 and is_separate:
        state = "worse"
    else:
        state = "open"
    return Standing(arm=arm, state=state, pair=pair)


def _pick(
    choice: Choice, arms: Mapping[str, ArmResult], *, decision: DecisionConfig, is_money: bool
) -> Choice:
    """The cheapest of the equal arms, or the arm that stands in the way of a verdict."""
    assert choice.leader is not None
    cost = {a: total_cost(r, decision=decision) for a, r in arms.items()}
    equal = [s.arm for s in choice.standings if s.state == "equal"]
    arm = choice.leader
    for other in equal:
        if is_cheaper(cost[other], cost[arm]):
            arm = other
    # An open arm known to be dearer offers nothing that was measured; an unknown cost may be lower.
    # In money the cost is part of the comparison, so there every open arm stands in the way.
    rivals = [
        s
        for s in choice.standings
        if s.state == "open" and (is_money or not is_cheaper(cost[arm], cost[s.arm]))
    ]
    if rivals:
        needed = [(more_items(s.pair, decision=decision), s.arm) for s in rivals]
        known = [(n, name) for n, name in needed if n is not None]
        # All rivals must be settled: the one that needs most items counts.
        more, rival = max(known) if known else (None, rivals[0].arm)
        return replace(choice, state="open", arm=None, more_items=more, rival=rival)
    return replace(choice, state="equal" if equal else "take", arm=arm)


def more_items(pair: Pair | None, *, decision: DecisionConfig) -> int | None:
    """Further test items that would settle a pair, at the spread and difference measured.

    The lower of two: telling the difference from 0 (80% power, at Holm's level for this pair), and
    showing that it lies inside the margin. Rounded up to two figures.
    """
    if pair is None or pair.difference is None or pair.low is None or pair.high is None:
        return None
    if pair.n < 2 or pair.high <= pair.low:
        return None
    d, z = abs(pair.difference), normal_quantile(decision.confidence)
    sd = (pair.high - pair.low) / 2 / z * math.sqrt(pair.n)
    holm_factor = 1.0
    if pair.p_value and pair.p_adjusted:
        holm_factor = max(1.0, pair.p_adjusted / pair.p_value)
    confidence = 1 - (1 - decision.confidence) / holm_factor
    totals = [items_to_decide(sd, d, confidence=confidence)]
    if decision.equivalence_margin > d:
        totals.append(math.ceil((z * sd / (decision.equivalence_margin - d)) ** 2))
    known = [t for t in totals if t is not None]
    if not known:
        return None
    return round_up(max(min(known) - pair.n, pair.n / 10))


def round_up(value: float) -> int:
    """Up to two leading figures: 1234 -> 1300."""
    step = 10 ** max(0, math.floor(math.log10(value)) - 1) if value > 0 else 1
    return math.ceil(value / step) * step


def best_on_validation(evidence: Evidence, families: Sequence[str]) -> str | None:
    """The arm of these families with the highest validation score, so that test is not the judge.

    Arms without a validation score only count where none has one; then the first in order.
    """
    names = [
        a
        for a, r in evidence.arms.items()
        if r.status == "done" and family(r) in families and metric_of(r) is not None
    ]
    known = {a: v for a in names if (v := evidence.validation.get(a)) is not None}
    if known:
        return max(known, key=lambda a: known[a])
    return names[0] if names else None
