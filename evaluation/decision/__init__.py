"""The verdict in plain sentences, with its reasons and what would change it (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from conf.decision_results import Utility
from conf.results import Pair, Recommendation
from conf.run_groups import DecisionConfig
from evaluation import wording
from evaluation.decision.changes import all_changes, is_told
from evaluation.decision.rules import (
    Choice,
    Evidence,
    best_on_validation,
    choose,
    family,
    measured_for,
    metric_of,
    pair_of,
    total_cost,
    volume,
)
from evaluation.decision.utility import all_utilities
from evaluation.decision.words import LIMIT_WORDS, limit_value, verdict_of


def decide(evidence: Evidence, *, decision: DecisionConfig) -> Recommendation:
    """The recommendation for these arms under these limits, this traffic and these prices."""
    choice = choose(evidence, decision=decision)
    utilities = all_utilities(evidence, decision=decision)
    reasons = (
        _main_reason(choice, evidence, decision=decision),
        *_others_open(choice, evidence),
        *_reference_reason(choice, evidence),
        *_headline(evidence),
        *_majority(choice, evidence),
        *_cost_reason(choice, evidence, decision=decision),
        *_expected_reason(choice, utilities, decision=decision),
        *_rejections(choice, evidence, decision=decision),
        *(
            f"{arm} {result.status}: {wording.first_line(result.error or 'no reason recorded')}"
            for arm, result in evidence.arms.items()
            if result.status != "done"
        ),
    )
    changes = all_changes(choice, evidence, decision=decision)
    return Recommendation(
        arm=choice.arm,
        verdict=verdict_of(choice),
        reasons=reasons,
        would_change_if=tuple(change.sentence for change in changes if is_told(change)),
        changes=changes,
        utilities=utilities,
    )


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


def _others_open(choice: Choice, evidence: Evidence) -> list[str]:
    """Of a verdict that is open: who else is not told apart from the leader."""
    if choice.state != "open" or choice.leader is None:
        return []
    return [
        f"{arm} is not told apart from {choice.leader} either:"
        f" {_difference(pair_of(evidence.pairs, choice.leader, arm))}."
        for arm in _with_state(choice, "open")
        if arm != choice.rival
    ]


def _difference(pair: Pair | None) -> str:
    if pair is None or pair.difference is None:
        return "unknown, for want of common items"
    interval = wording.span(pair.low, pair.high, is_points=True)
    return f"{wording.points(pair.difference)} points ({interval}; n = {pair.n})"


def _reference_reason(choice: Choice, evidence: Evidence) -> list[str]:
    """Say it plainly when neither fine-tuning nor prompting wins."""
    if choice.arm is not None and family(evidence.arms[choice.arm]) == "reference":
        names = {"tfidf": "TF-IDF with logistic regression", "linear_probe": "a linear probe"}
        kind = evidence.arms[choice.arm].kind
        name = names.get(kind, "the system given for comparison")
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


def _expected_reason(
    choice: Choice, utilities: Sequence[Utility], *, decision: DecisionConfig
) -> list[str]:
    """Costs with wrong answers, where those have a price."""
    names = (choice.arm or choice.leader, choice.rival)
    parts = [
        f"{u.arm} is expected to cost {wording.usd(u.expected_usd.value)} USD"
        f" ({wording.usd(u.expected_usd.low)} to {wording.usd(u.expected_usd.high)})"
        for u in utilities
        if u.arm in names
    ]
    error = wording.usd(decision.error_usd)
    return [f"With wrong answers at {error} USD each, {wording.joined(parts)}."] if parts else []


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
