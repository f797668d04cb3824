"""The verdict in plain sentences, with its reasons and what would change it (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from conf.results import Pair, Recommendation
from conf.run_groups import DecisionConfig
from evaluation import wording
from evaluation.decision_rules import (
    LIMITS,
    Choice,
    Evidence,
    best_on_validation,
    choose,
    family,
    is_cheaper,
    measured_for,
    metric_of,
    more_items,
    pair_of,
    total_cost,
    volume,
    without_limit,
)

LIMIT_WORDS = {
    "minimum_metric": "metric",
    "minimum_format_validity": "format validity",
    "maximum_p95_seconds": "p95 latency",
    "maximum_total_usd": "total cost",
}


def decide(evidence: Evidence, *, decision: DecisionConfig) -> Recommendation:
    """The recommendation for these arms under these limits, this traffic and these prices."""
    choice = choose(evidence, decision=decision)
    reasons = (
        _main_reason(choice, evidence, decision=decision),
        *_reference_reason(choice, evidence),
        *_headline(evidence),
        *_majority(choice, evidence),
        *_cost_reason(choice, evidence, decision=decision),
        *_rejections(choice, evidence, decision=decision),
        *(
            f"{arm} {result.status}: {wording.first_line(result.error or 'no reason recorded')}"
            for arm, result in evidence.arms.items()
            if result.status != "done"
        ),
    )
    changes = (
        *_item_changes(choice, evidence, decision=decision),
        *_volume_changes(choice, evidence, decision=decision),
        *_error_price_change(choice, evidence, decision=decision),
        *_limit_changes(choice, evidence, decision=decision),
        *_price_change(evidence),
    )
    return Recommendation(
        arm=choice.arm, verdict=_verdict(choice), reasons=reasons, would_change_if=changes
    )


def _verdict(choice: Choice) -> str:
    match choice.state:
        case "take":
            return f"take {choice.arm}"
        case "equal":
            return f"practically equal: take the cheaper, {choice.arm}"
        case "open" if choice.more_items is not None:
            return f"too close to call: about {choice.more_items:,} more items"
        case "open":
            return "too close to call"
        case "none":
            return "none meets your limits"
    return "no arm finished: nothing to compare"


def _with_state(choice: Choice, state: str) -> list[str]:
    return [s.arm for s in choice.standings if s.state == state]


def _main_reason(choice: Choice, evidence: Evidence, *, decision: DecisionConfig) -> str:
    if choice.state == "none":
        return (
            "Every arm that finished misses a limit of decision.*, or cannot be shown to meet it."
        )
    if choice.leader is None:
        return "No arm has a measured metric."
    leader = choice.leader
    if choice.state == "open":
        pair = pair_of(evidence.pairs, leader, choice.rival or "")
        return (
            f"{leader} leads, but {choice.rival} is not told apart from it and is not known to"
            f" cost more: the difference is {_difference(pair)}."
        )
    if choice.state == "equal":
        others = [a for a in (leader, *_with_state(choice, "equal")) if a != choice.arm]
        margin = wording.points(decision.equivalence_margin).lstrip("+")
        return (
            f"{choice.arm} and {wording.joined(others)} differ by less than {margin} points over"
            f" the whole interval; {choice.arm} is not known to cost more than any of them."
        )
    parts = [f"{leader} reaches {wording.share_with_interval(evidence.arms[leader].metric)}"]
    if worse := _with_state(choice, "worse"):
        parts.append(f"clearly better than {wording.joined(worse)}")
    if close := _with_state(choice, "open"):
        parts.append(f"not told apart from {wording.joined(close)}, which cost more")
    if not choice.standings:
        parts.append("the only arm left to choose")
    return ", ".join(parts) + "."


def _difference(pair: Pair | None) -> str:
    if pair is None or pair.difference is None:
        return "unknown, for want of common items"
    interval = wording.span(pair.low, pair.high, is_points=True)
    return f"{wording.points(pair.difference)} points ({interval}; n = {pair.n})"


def _reference_reason(choice: Choice, evidence: Evidence) -> list[str]:
    """Say it plainly when neither fine-tuning nor prompting wins."""
    if choice.arm is not None and family(evidence.arms[choice.arm]) == "reference":
        name = (
            "TF-IDF with logistic regression"
            if evidence.arms[choice.arm].kind == "tfidf"
            else ("the system given for comparison")
        )
        return [f"Neither fine-tuning nor prompting wins here: {name} is the better choice."]
    if choice.leader is None:
        return []
    models = [a for a, r in evidence.arms.items() if family(r) != "reference"]
    ahead = [
        a
        for a, r in evidence.arms.items()
        if family(r) == "reference" and r.status == "done" and _beats_all(evidence, a, models)
    ]
    return [f"No arm with a language model reaches a higher metric than {a}." for a in ahead]


def _beats_all(evidence: Evidence, arm: str, others: Sequence[str]) -> bool:
    mine = metric_of(evidence.arms[arm])
    values = [v for a in others if (v := metric_of(evidence.arms[a])) is not None]
    return mine is not None and bool(values) and mine >= max(values)


def _headline(evidence: Evidence) -> list[str]:
    """Best fine-tuned against best prompted arm, both picked on validation."""
    prompted = best_on_validation(evidence, ("prompt",))
    tuned = best_on_validation(evidence, ("weights", "both"))
    if prompted is None or tuned is None:
        return []
    pair = pair_of(evidence.pairs, tuned, prompted)
    is_validated = evidence.validation.get(prompted) is not None
    picked = "picked on validation" if is_validated else "the first, no validation score is known"
    if pair is None or pair.low is None or pair.high is None:
        return []
    word = "better" if pair.low > 0 else "worse" if pair.high < 0 else "not told apart"
    end = {
        "better": f"{tuned} is better than {prompted}",
        "worse": f"{tuned} is worse than {prompted}",
        "not told apart": f"{tuned} and {prompted} are not told apart",
    }[word]
    return [f"Fine-tuned against prompted (best of each, {picked}): {end}, by {_difference(pair)}."]


def _majority(choice: Choice, evidence: Evidence) -> list[str]:
    """A classifier that does not beat the most frequent label has not learned the task."""
    arm = choice.arm or choice.leader
    if arm is None:
        return []
    result = evidence.arms[arm]
    sizes = [m.n for m in result.by_label.values() if m.n]
    low = None if result.accuracy is None or result.metric is None else result.metric.low
    if len(sizes) < 2 or low is None:
        return []
    share = max(sizes) / sum(sizes)
    if low > share:
        return []
    return [
        f"Neither side is useful yet: {arm} is not clearly better than always answering the most"
        f" frequent label ({wording.percent(share)})."
    ]


def _cost_reason(choice: Choice, evidence: Evidence, *, decision: DecisionConfig) -> list[str]:
    names = [a for a in (choice.arm or choice.leader, choice.rival) if a is not None]
    requests = f"{wording.count(volume(decision))} requests"
    parts = []
    for arm in names:
        total = total_cost(evidence.arms[arm], decision=decision)
        if total.usd is not None:
            parts.append(f"{arm} costs {wording.usd(total.usd)} USD")
        elif total.device_seconds is not None:
            parts.append(f"{arm} takes {wording.seconds(total.device_seconds)} of device time")
    return [f"Over {requests}, {wording.joined(parts)} in all."] if parts else []


def _rejections(choice: Choice, evidence: Evidence, *, decision: DecisionConfig) -> list[str]:
    lines = []
    for arm, limits in choice.rejected.items():
        found = []
        for limit in limits:
            value = measured_for(limit, evidence.arms[arm], decision=decision)
            shown = "not measured" if value is None else limit_value(limit, value)
            found.append(f"{LIMIT_WORDS[limit]} {shown}, {_asked(limit, decision=decision)}")
        lines.append(f"{arm} is out: {'; '.join(found)}.")
    return lines


def _asked(limit: str, *, decision: DecisionConfig) -> str:
    side = "at least" if limit.startswith("minimum") else "at most"
    return f"{side} {limit_value(limit, getattr(decision, limit))} asked"


def limit_value(limit: str, value: float) -> str:
    """A limit's value in its unit."""
    match limit:
        case "maximum_p95_seconds":
            return wording.seconds(value)
        case "maximum_total_usd":
            return f"{wording.usd(value)} USD"
    return wording.percent(value)


def _item_changes(choice: Choice, evidence: Evidence, *, decision: DecisionConfig) -> list[str]:
    if choice.state == "open" and choice.leader and choice.rival:
        arms = evidence.arms
        ours, theirs = (
            total_cost(arms[a], decision=decision) for a in (choice.leader, choice.rival)
        )
        until = (
            f" Until then {choice.rival} is the cheaper and {choice.leader} the better measured."
            if is_cheaper(theirs, ours)
            else ""
        )
        if choice.more_items is None:
            return [f"No number of test items can be named that tells these two apart.{until}"]
        return [
            f"About {choice.more_items:,} more test items would settle {choice.leader} against"
            f" {choice.rival}, if difference and spread stay as measured.{until}"
        ]
    lines = []
    for standing in choice.standings:
        needed = more_items(standing.pair, decision=decision)
        if standing.state == "open" and needed is not None:
            lines.append(
                f"About {needed:,} more test items would show whether {standing.arm} is in truth"
                f" different from {choice.leader}."
            )
    return lines


def _volume_changes(choice: Choice, evidence: Evidence, *, decision: DecisionConfig) -> list[str]:
    """Where the cheapest of the arms that are practically equal changes."""
    if choice.arm is None:
        return []
    lines = []
    peers = [a for a in (choice.leader, *_with_state(choice, "equal")) if a and a != choice.arm]
    for other in peers:
        at = _crossing(evidence, choice.arm, other)
        if at is None:
            continue
        side = "Above" if at > volume(decision) else "Below"
        months = at / decision.requests_per_month
        lines.append(
            f"{side} {wording.count(at)} requests in all ({wording.count(months)} months at"
            f" this traffic) {other} would be the cheaper of the two."
        )
    return lines


def _crossing(evidence: Evidence, a: str, b: str) -> float | None:
    """Volume at which two arms cost the same; None where there is none above 0."""
    ca, cb = evidence.arms[a].cost, evidence.arms[b].cost
    if ca is None or cb is None:
        return None
    fixed = (ca.fixed_usd, cb.fixed_usd)
    request = (ca.request_usd.value, cb.request_usd.value)
    if None in (*fixed, *request):
        fixed = (ca.fixed_device_seconds, cb.fixed_device_seconds)
        request = (ca.request_device_seconds.value, cb.request_device_seconds.value)
    (fa, fb), (ra, rb) = fixed, request
    if fa is None or fb is None or ra is None or rb is None or ra == rb:
        return None
    at = (fb - fa) / (ra - rb)
    return at if at > 0 else None


def _error_price_change(
    choice: Choice, evidence: Evidence, *, decision: DecisionConfig
) -> list[str]:
    """The cost of a wrong answer below which a cheaper, worse arm would be the better buy."""
    if choice.arm is None:
        return []
    mine = evidence.arms[choice.arm]
    usd, value = total_cost(mine, decision=decision).usd, metric_of(mine)
    if usd is None or value is None:
        return []
    prices = []
    for standing in choice.standings:
        other = evidence.arms[standing.arm]
        their_usd, their_value = total_cost(other, decision=decision).usd, metric_of(other)
        if their_usd is None or their_value is None or standing.arm == choice.arm:
            continue
        if their_usd < usd and their_value < value:
            prices.append(
                ((usd - their_usd) / volume(decision) / (value - their_value), standing.arm)
            )
    if not prices:
        return []
    price, arm = max(prices)
    return [
        f"If a wrong answer cost less than {wording.usd(price)} USD, {arm} would be the better"
        " buy: it is cheaper and less often right."
    ]


def _limit_changes(choice: Choice, evidence: Evidence, *, decision: DecisionConfig) -> list[str]:
    """For each limit that is set: what value of it would give another answer."""
    lines = []
    for limit in LIMITS:
        if getattr(decision, limit) is None or not choice.rejected:
            continue
        other = choose(evidence, decision=without_limit(decision, limit))
        if other.arm is None or other.arm == choice.arm:
            continue
        value = measured_for(limit, evidence.arms[other.arm], decision=decision)
        if value is None:
            lines.append(f"Without decision.{limit} the answer would be {other.arm}.")
        else:
            lines.append(
                f"With decision.{limit} at {limit_value(limit, value)} the answer would be"
                f" {other.arm}."
            )
    return lines


def _price_change(evidence: Evidence) -> list[str]:
    is_priced = any(
        r.cost is not None and r.cost.request_usd.value is not None for r in evidence.arms.values()
    )
    if is_priced or not evidence.arms:
        return []
    return ["There is no price, so cost is compared in device-seconds; set pricing=... for USD."]
