"""What would change the verdict: every knob, limit and number of items, as typed changes (pure)."""

from __future__ import annotations

from collections.abc import Iterator

from conf.decision_results import Change
from conf.run_groups import DecisionConfig
from evaluation import wording
from evaluation.decision.limits import limit_changes
from evaluation.decision.rules import (
    Choice,
    Evidence,
    best_on_validation,
    family,
    is_cheaper,
    items_of,
    metric_of,
    total_cost,
)
from evaluation.decision.sensitivity import (
    CHEAPEST_ERROR_USD,
    DEAREST_ERROR_USD,
    Knob,
    Switch,
    error_knob,
    price_knob,
    prompt_knob,
    switches,
    told,
    volume_knob,
)
from evaluation.decision.words import outcome_of, verdict_of


def all_changes(
    choice: Choice, evidence: Evidence, *, decision: DecisionConfig
) -> tuple[Change, ...]:
    """All that was solved for, and a line for what could not be."""
    if choice.state == "nothing":
        return ()
    return (
        *_items(choice, evidence, decision=decision),
        *_volume(choice, evidence, decision=decision),
        *_error_price(choice, evidence, decision=decision),
        *limit_changes(choice, evidence, decision=decision),
        *_device_price(choice, evidence, decision=decision),
        *_labels(choice, evidence),
        *_prompt_length(choice, evidence, decision=decision),
    )


def is_told(change: Change) -> bool:
    """Whether a change is worth a sentence in the verdict: it was found, or its lack matters."""
    is_found = change.direction not in ("never", "not_measured")
    return is_found or change.what == "items"  # how far a test would have to go on is always asked


def _change(what: str, switch: Switch, sentence: str) -> Change:
    return Change(
        what=what,
        at=switch.at,
        direction="above" if switch.is_above else "below",
        arm_then=switch.choice.arm,
        sentence=sentence,
        verdict_then=verdict_of(switch.choice),
    )


def _without(what: str, direction: str, sentence: str) -> Change:
    return Change(what=what, at=None, direction=direction, arm_then=None, sentence=sentence)


def _side(switch: Switch) -> str:
    return "Above" if switch.is_above else "Below"


def _never(knob: Knob, *, words: str) -> Change:
    return _without(knob.what, "never", f"No {words} changes the answer.")


def _items(choice: Choice, evidence: Evidence, *, decision: DecisionConfig) -> Iterator[Change]:
    """How many more test items would settle what is open."""
    if choice.state == "open" and choice.leader and choice.rival:
        yield _items_of_rival(choice, evidence, decision=decision)
        return
    for standing in choice.standings:
        needed = items_of(standing, decision=decision)
        if standing.state == "open" and needed is not None:
            yield Change(
                what="items",
                at=needed,
                direction="above",
                arm_then=None,
                sentence=f"About {needed:,} more test items would show whether {standing.arm} is"
                f" in truth different from {choice.leader}.",
            )


def _items_of_rival(choice: Choice, evidence: Evidence, *, decision: DecisionConfig) -> Change:
    leader, rival = choice.leader or "", choice.rival or ""
    ours, theirs = (total_cost(evidence.arms[a], decision=decision) for a in (leader, rival))
    is_rival_cheaper = is_cheaper(theirs, ours)
    until = (
        f" Until then {rival} is the cheaper and {leader} the better measured."
        if is_rival_cheaper and decision.error_usd is None
        else ""
    )
    needed = choice.more_items
    if needed is None:
        return _without(
            "items",
            "never",
            f"No number of test items can be named that tells these two apart.{until}",
        )
    return Change(
        what="items",
        at=needed,
        direction="above",
        arm_then=None,
        sentence=f"About {needed:,} more test items would settle {leader} against {rival}, if"
        f" difference and spread stay as measured.{until}",
    )


def _volume(choice: Choice, evidence: Evidence, *, decision: DecisionConfig) -> Iterator[Change]:
    knob = volume_knob(evidence, decision)
    found = told(knob)
    for switch in found:
        monthly = switch.at / decision.horizon_months
        yield _change(
            "volume",
            switch,
            f"{_side(switch)} {wording.count(switch.at)} requests in all"
            f" ({wording.count(monthly)} a month) {outcome_of(switch.choice)}.",
        )
    if not found:
        yield _never(knob, words="number of requests")


def _error_price(
    choice: Choice, evidence: Evidence, *, decision: DecisionConfig
) -> Iterator[Change]:
    """The cost of a wrong answer at which another arm is the better buy.

    Without decision.error_usd the metric comes first, as if a wrong answer cost more than anything:
    the walk then begins at a price without reason and looks for the first other arm below it.
    """
    if decision.error_usd is not None:
        knob = error_knob(evidence, decision, now=max(decision.error_usd, CHEAPEST_ERROR_USD))
        found = told(knob)
    else:
        knob = error_knob(evidence, decision, now=DEAREST_ERROR_USD)
        arms = (s for s in switches(knob, is_upward=False) if s.choice.arm)
        first = next((s for s in arms if s.choice.arm != choice.arm), None)
        found = [] if first is None else [first]
    for switch in found:
        side = "more" if switch.is_above else "less"
        yield _change(
            "error_usd",
            switch,
            f"If a wrong answer cost {side} than {wording.usd(switch.at)} USD,"
            f" {outcome_of(switch.choice)}{_why(choice, switch, evidence, decision=decision)}.",
        )
    if not found:
        done = [a for a in evidence.arms.values() if a.status == "done"]
        is_priced = all(total_cost(a, decision=decision).usd is not None for a in done)
        yield (
            _never(knob, words="price of a wrong answer")
            if is_priced
            else _without(
                "error_usd", "not_measured", "Without every arm's price, errors have none."
            )
        )


def _why(choice: Choice, switch: Switch, evidence: Evidence, *, decision: DecisionConfig) -> str:
    """': it is cheaper and less often right', where that is so."""
    mine, other = choice.arm or choice.leader, switch.choice.arm
    if mine is None or other is None:
        return ""
    ours, theirs = evidence.arms[mine], evidence.arms[other]
    our_value, their_value = metric_of(ours), metric_of(theirs)
    if our_value is None or their_value is None or their_value >= our_value:
        return ""
    costs = (total_cost(a, decision=decision) for a in (theirs, ours))
    return ": it is cheaper and less often right" if is_cheaper(*costs) else ""


def _device_price(
    choice: Choice, evidence: Evidence, *, decision: DecisionConfig
) -> Iterator[Change]:
    price = evidence.usd_per_device_hour
    if not price:
        yield _unpriced(evidence)
        return
    knob = price_knob(evidence, decision, usd_per_hour=price)
    found = told(knob)
    for switch in found:
        yield _change(
            "device_price",
            switch,
            f"{_side(switch)} {wording.usd(switch.at)} USD a device-hour (now"
            f" {wording.usd(price)}) {outcome_of(switch.choice)}.",
        )
    if not found:
        yield _never(knob, words="price of a device-hour")


def _unpriced(evidence: Evidence) -> Change:
    costs = [r.cost for r in evidence.arms.values() if r.cost is not None]
    if any(cost.request_usd.value is not None for cost in costs):
        return _without("device_price", "not_measured", "No price of a device is known.")
    return _without(
        "device_price",
        "without",
        "There is no price, so cost is compared in device-seconds; set pricing=... for USD.",
    )


def _labels(choice: Choice, evidence: Evidence) -> Iterator[Change]:
    """Where the label curves of the arm taken and of the other side's arms meet."""
    mine = choice.arm or choice.leader
    curves = [c for c in evidence.crossings if c.noise == 0 and mine in (c.prompted, c.tuned)]
    if not curves:
        yield _without(
            "labels", "not_measured", "What other numbers of labels would change is not measured."
        )
    for c in curves:
        if c.status != "crosses" or c.labels is None:
            word = {"none_seen": "never", "always": "always"}.get(c.status)
            sentence = (
                f"Whether {c.tuned} reaches {c.prompted} is not known."
                if word is None
                else f"From {c.smallest:,} to {c.largest:,} labels {c.tuned} is {word} as good as"
                f" {c.prompted}."
            )
            yield _without("labels", "not_measured" if word is None else "never", sentence)
            continue
        other = c.prompted if mine == c.tuned else c.tuned
        ends = [wording.count(v) for v in (c.low, c.high) if v is not None]
        interval = f" ({' to '.join(ends)})" if len(ends) == 2 else " (an end is not known)"
        more = "fewer" if other == c.prompted else "more"
        yield Change(
            what="labels",
            at=c.labels,
            direction="below" if more == "fewer" else "above",
            arm_then=other,
            sentence=f"With {more} than {wording.count(c.labels)} labels{interval} {other} would be"
            f" at least as good as {mine}.",
        )


def _prompt_length(
    choice: Choice, evidence: Evidence, *, decision: DecisionConfig
) -> Iterator[Change]:
    """How long the prompt of the arm taken, or of the best prompted one, would have to be."""
    arm = choice.arm
    if arm is None or family(evidence.arms[arm]) == "reference":
        arm = best_on_validation(evidence, ("prompt", "both"))
    elif family(evidence.arms[arm]) == "weights":
        arm = best_on_validation(evidence, ("prompt",))
    knob = None if arm is None else prompt_knob(evidence, decision, arm=arm)
    if knob is None:
        yield _without(
            "prompt_length", "not_measured", "What another prompt length would change is unknown."
        )
        return
    found = told(knob)
    for switch in found:
        side = "more" if switch.is_above else "fewer"
        yield _change(
            "prompt_length",
            switch,
            f"If {arm} took {side} than {wording.count(switch.at)} prompt tokens (now"
            f" {wording.count(knob.now)}) and were as good, {outcome_of(switch.choice)}.",
        )
    if not found:
        yield _never(knob, words=f"number of prompt tokens of {arm}")
