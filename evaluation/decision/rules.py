"""The rules that turn measured arms into a choice (pure); evaluation/decision words it.

1. Arms that miss a limit, or cannot be shown to meet it, leave.
2. The leader is the arm with the highest metric. Each other arm is `worse` (its whole interval is
   below the leader's, after Holm), `equal` (its whole interval lies inside the equivalence margin)
   or `open`. With `error_usd` all of this happens in money: total cost + cost of wrong answers.
3. The cheapest of leader and equal arms is taken, unless an open arm may be cheaper still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from conf.label_results import LabelCrossing
from conf.results import ArmResult, Pair
from conf.run_groups import DecisionConfig
from evaluation.decision.gap import Gap, Total, metric_gap, money_gap, more_items, state_of

LIMITS = (
    "minimum_metric",
    "minimum_format_validity",
    "minimum_consistency",
    "maximum_p95_seconds",
    "maximum_total_usd",
    "deadline_hours",
)
PAID_ONCE = ("prompt", "given")  # all other kinds are trained again when the data change
OF_GENERATED = ("minimum_format_validity", "minimum_consistency")  # null for any other answer
FAMILIES = {
    "prompt": "prompt",
    "lora": "weights",
    "full": "weights",
    "peft": "weights",
    "instruction": "weights",
    "both": "both",
    "tfidf": "reference",
    "linear_probe": "reference",
    "given": "reference",
}


@dataclass(kw_only=True, slots=True, frozen=True)
class Evidence:
    """What is decided from; the rules need arms and pairs alone.

    validation: arm -> its score on validation, None where unknown. The rest says what would change
    the verdict. usd_per_device_hour: the price in the arms' costs. usd_per_prompt_token: arm -> USD
    that one more prompt token adds to a request. crossings: of a label curve.
    """

    arms: Mapping[str, ArmResult]
    pairs: Sequence[Pair]
    validation: Mapping[str, float | None] = field(default_factory=dict)
    usd_per_device_hour: float | None = None
    usd_per_prompt_token: Mapping[str, float] = field(default_factory=dict)
    crossings: Sequence[LabelCrossing] = ()


@dataclass(kw_only=True, slots=True, frozen=True)
class Standing:
    """An arm against the leader. state: worse | equal | open."""

    arm: str
    state: str
    pair: Pair | None
    gap: Gap | None = None


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
    """Fixed cost, again at every change for what was trained, + volume x request cost."""
    cost = result.cost
    if cost is None:
        return Total(usd=None, device_seconds=None)
    v, times = volume(decision), times_paid(result, decision=decision)
    fixed_usd = None if cost.fixed_usd is None else times * cost.fixed_usd
    fixed_seconds = None if cost.fixed_device_seconds is None else times * cost.fixed_device_seconds
    usd, seconds = cost.request_usd, cost.request_device_seconds
    low, high = usd.low, usd.high
    if usd.value is not None and seconds.value and seconds.low is not None and seconds.high:
        low = usd.value * seconds.low / seconds.value
        high = usd.value * seconds.high / seconds.value
    return Total(
        usd=_line(fixed_usd, usd.value, v),
        device_seconds=_line(fixed_seconds, seconds.value, v),
        low_usd=_line(fixed_usd, low, v),
        high_usd=_line(fixed_usd, high, v),
    )


def times_paid(result: ArmResult, *, decision: DecisionConfig) -> float:
    """How often the fixed cost comes over the horizon: a prompt follows new data by itself."""
    if result.kind in PAID_ONCE:
        return 1.0
    return 1.0 + decision.changes_per_month * decision.horizon_months


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
        case "minimum_consistency":
            return None if result.consistency is None else result.consistency.value
        case "maximum_p95_seconds":
            return None if result.latency is None else result.latency.p95_seconds.value
        case "maximum_total_usd":
            return total_cost(result, decision=decision).usd
        case "deadline_hours":
            return None if result.ready_seconds is None else result.ready_seconds / 3600
    raise AssertionError(f"no such limit: {limit}")


def missed_limits(result: ArmResult, *, decision: DecisionConfig) -> tuple[str, ...]:
    """The limits that an arm misses or cannot be shown to meet.

    An arm that scores labels, and a reference arm, can only answer with a label, and always with
    the same: what OF_GENERATED asks for is not measured there and not asked for.
    """
    missed = []
    for limit in LIMITS:
        bound = getattr(decision, limit)
        if bound is None:
            continue
        is_generated = result.answer_rule is not None and result.answer_rule.answer_by == "generate"
        if limit in OF_GENERATED and not is_generated:
            continue
        value = measured_for(limit, result, decision=decision)
        is_met = value is not None and (
            value >= bound if limit.startswith("minimum") else value <= bound
        )
        if not is_met:
            missed.append(limit)
    return tuple(missed)


def usd_per_point(decision: DecisionConfig) -> float | None:
    """USD over the horizon that a difference of 1 in the metric is worth; None without a price."""
    return None if decision.error_usd is None else decision.error_usd * volume(decision)


def loss_usd(result: ArmResult, *, decision: DecisionConfig) -> float | None:
    """Total cost + the cost of wrong answers, where both have a price."""
    usd, value = total_cost(result, decision=decision).usd, metric_of(result)
    per_point = usd_per_point(decision)
    if usd is None or value is None or per_point is None:
        return None
    return usd + per_point * (1 - value)


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
    """Compare by the interval of leader - arm in the metric, or of what the leader saves in USD."""
    pair = pair_of(evidence.pairs, leader, arm)
    if pair is None:
        return Standing(arm=arm, state="open", pair=None)
    margin, per_point = decision.equivalence_margin, usd_per_point(decision)
    if is_money and per_point is not None:
        ours = total_cost(evidence.arms[leader], decision=decision)
        theirs = total_cost(evidence.arms[arm], decision=decision)
        gap = money_gap(pair, ours=ours, theirs=theirs, usd_per_point=per_point, margin=margin)
    else:
        gap = metric_gap(pair, margin=margin)
    # The test of a difference of 0 in the metric is not the one asked in money. A pair without a
    # p-value, as one stopped early by its confidence sequence, is judged by its interval alone.
    alpha = 1 - decision.confidence
    is_separate = is_money or pair.p_adjusted is None or pair.p_adjusted < alpha
    state = state_of(gap, is_separate=is_separate)
    return Standing(arm=arm, state=state, pair=pair, gap=gap)


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
        needed = [(items_of(s, decision=decision), s.arm) for s in rivals]
        known = [(n, name) for n, name in needed if n is not None]
        # All rivals must be settled: the one that needs most items counts.
        more, rival = max(known) if known else (None, rivals[0].arm)
        return replace(choice, state="open", arm=None, more_items=more, rival=rival)
    return replace(choice, state="equal" if equal else "take", arm=arm)


def items_of(standing: Standing, *, decision: DecisionConfig) -> int | None:
    """Further test items that would settle an arm against the leader; None: no such number."""
    return more_items(standing.gap, standing.pair, confidence=decision.confidence)


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
