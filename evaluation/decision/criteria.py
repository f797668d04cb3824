"""The field's eleven reasons for prompting or fine-tuning, each with what this run measured (pure).

The best prompted and the best fine-tuned arm speak for their sides; validation picked both. A
reason that the user alone knows (whether it is a prototype) is shown with what bears on it. Every
comparison here is one of many and is not corrected for it, unless it is a pair of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conf.decision_results import Criterion
from conf.records import Measured, from_dict
from conf.results import ArmResult, BreakEven, Pair, Results
from conf.run_groups import DecisionConfig
from evaluation import wording
from evaluation.decision.criteria_words import amount, measured, points, share
from evaluation.decision.rules import metric_of, pair_of, volume

PROMPTING, FINE_TUNING = "prompting", "fine_tuning"
NEITHER, NOT_MEASURED = "neither", "not_measured"


@dataclass(kw_only=True, slots=True, frozen=True)
class Finding:
    """What was measured for a reason, and whom it speaks for."""

    says: str
    evidence: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Sides:
    """The two arms that are compared, and where they come from."""

    results: Results
    decision: DecisionConfig
    prompted: str
    tuned: str

    @property
    def arms(self) -> tuple[ArmResult, ArmResult]:
        """Prompted, tuned."""
        return self.results.arms[self.prompted], self.results.arms[self.tuned]

    def pair(self, a: str, b: str) -> Pair | None:
        """The paired difference a - b."""
        return pair_of(self.results.pairs, a, b)


def all_criteria(results: Results) -> tuple[Criterion, ...]:
    """The eleven lines; a run without both sides has measured none of them."""
    sides = _sides(results)
    lines = []
    for side, text, judge in REASONS:
        found = _missing("no finished arm on both sides") if sides is None else judge(sides)
        lines.append(Criterion(side=side, text=text, evidence=found.evidence, says=found.says))
    return tuple(lines)


def _sides(results: Results) -> Sides | None:
    prompted = results.decision.get("best_prompted")
    tuned = results.decision.get("best_tuned")
    if not isinstance(prompted, str) or not isinstance(tuned, str):
        return None
    decision = from_dict(DecisionConfig, results.decision)
    return Sides(results=results, decision=decision, prompted=prompted, tuned=tuned)


def _missing(why: str) -> Finding:
    return Finding(says=NOT_MEASURED, evidence=f"Not measured: {why}.")


def _lower(prompted: Measured, tuned: Measured) -> str:
    """The side whose value is lower for certain: the intervals do not touch."""
    ends = (prompted.low, prompted.high, tuned.low, tuned.high)
    if any(end is None for end in ends):
        return NEITHER
    p_low, p_high, t_low, t_high = (end for end in ends if end is not None)
    return FINE_TUNING if t_high < p_low else PROMPTING if p_high < t_low else NEITHER


def _higher(prompted: Measured, tuned: Measured) -> str:
    return {PROMPTING: FINE_TUNING, FINE_TUNING: PROMPTING}.get(_lower(prompted, tuned), NEITHER)


def _ahead(pair: Pair, *, confidence: float) -> str:
    """The side that a pair tuned - prompted shows to be better, after Holm."""
    if pair.low is None or pair.high is None:
        return NEITHER
    is_separate = pair.p_adjusted is None or pair.p_adjusted < 1 - confidence
    if not is_separate:
        return NEITHER
    return FINE_TUNING if pair.low > 0 else PROMPTING if pair.high < 0 else NEITHER


def _many_tasks(sides: Sides) -> Finding:
    found = next((f for f in sides.results.forgetting if f.arm == sides.tuned), None)
    if found is None or found.change.value is None:
        return _missing(f"the general set was not asked of {sides.tuned}")
    change = found.change
    says = NEITHER
    if change.low is not None and change.high is not None:
        says = PROMPTING if change.high < 0 else FINE_TUNING if change.low > 0 else NEITHER
    evidence = (
        f"On questions of other kinds {sides.tuned} is {points(change)} against its base, which one"
        f" prompt away serves any task."
    )
    return Finding(says=says, evidence=evidence)


def _limited_means(sides: Sides) -> Finding:
    prompted, tuned = sides.arms
    if prompted.cost is None or tuned.cost is None:
        return _missing("a cost is not known")
    ours = (tuned.cost.fixed_usd, prompted.cost.fixed_usd)
    unit = "USD"
    if None in ours:
        ours = (tuned.cost.fixed_device_seconds, prompted.cost.fixed_device_seconds)
        unit = "device-seconds"
    mine, theirs = ours
    if mine is None or theirs is None:
        return _missing("a fixed cost is not known")
    labels = (tuned.labels_used or 0, prompted.labels_used or 0)
    evidence = (
        f"Before the first request {sides.tuned} takes {wording.amount(mine, is_usd=unit == 'USD')}"
        f" {unit} and {labels[0]:,} labels, {sides.prompted}"
        f" {wording.amount(theirs, is_usd=unit == 'USD')} {unit} and {labels[1]:,} labels."
    )
    if mine > theirs and labels[0] >= labels[1]:
        return Finding(says=PROMPTING, evidence=evidence)
    is_less = mine < theirs and labels[0] <= labels[1]
    return Finding(says=FINE_TUNING if is_less else NEITHER, evidence=evidence)


def _precision_not_needed(sides: Sides) -> Finding:
    pair = sides.pair(sides.tuned, sides.prompted)
    if pair is None or pair.low is None or pair.high is None:
        return _missing("the two have no common items")
    margin = sides.decision.equivalence_margin
    says = PROMPTING if pair.high <= margin else FINE_TUNING if pair.low > margin else NEITHER
    evidence = (
        f"What {sides.tuned} adds to {sides.prompted}: {amount(pair)}; differences below"
        f" {wording.points(margin).lstrip('+')} points count as none."
    )
    return Finding(says=says, evidence=evidence)


def _prototype(sides: Sides) -> Finding:
    prompted, tuned = sides.arms
    if prompted.ready_seconds is None or tuned.ready_seconds is None:
        return _missing("the time until an arm can serve is not known")
    soon, late = prompted.ready_seconds, tuned.ready_seconds
    evidence = (
        f"{sides.prompted} can serve {wording.seconds(soon)} after the labels are there,"
        f" {sides.tuned} after {wording.seconds(late)}, the people's time not counted."
    )
    says = PROMPTING if soon < late else FINE_TUNING if late < soon else NEITHER
    return Finding(says=says, evidence=evidence)


def _largest_models(sides: Sides) -> Finding:
    others = {
        name: value
        for name, arm in sides.results.arms.items()
        if arm.kind == "prompt"
        and not arm.is_same_base
        and (value := metric_of(arm)) is not None
        and arm.status == "done"
    }
    if not others:
        return _missing("no prompted arm of this run has another base model")
    best = max(others, key=lambda name: others[name])
    pair = sides.pair(sides.tuned, best)
    if pair is None or pair.difference is None:
        return _missing(f"{best} and {sides.tuned} have no common items")
    says = _ahead(pair, confidence=sides.decision.confidence)
    return Finding(
        says=says, evidence=f"{sides.tuned} against {best}, another base model: {amount(pair)}."
    )


def _accuracy(sides: Sides) -> Finding:
    pair = sides.pair(sides.tuned, sides.prompted)
    prompted, tuned = sides.arms
    if pair is None or pair.difference is None or prompted.metric is None or tuned.metric is None:
        return _missing("the two have no common items")
    parts = [
        f"{sides.tuned} reaches {share(tuned.metric)}, {sides.prompted} {share(prompted.metric)};"
        f" the paired difference is {amount(pair)}"
    ]
    if prompted.consistency is not None and tuned.consistency is not None:
        parts.append(
            f"repeats agree in {share(tuned.consistency)} and {share(prompted.consistency)}"
        )
    says = _ahead(pair, confidence=sides.decision.confidence)
    return Finding(says=says, evidence="; ".join(parts) + ".")


def _domain_knowledge(sides: Sides) -> Finding:
    arms = sides.results.arms
    bare = [
        name
        for name, arm in arms.items()
        if arm.kind == "prompt" and arm.is_same_base and arm.status == "done" and arm.metric
    ]
    bare = [n for n in bare if n != sides.prompted] or bare
    plain = min(bare, key=lambda n: (arms[n].labels_used or 0, -(metric_of(arms[n]) or 0.0)))
    pair = sides.pair(sides.tuned, plain)
    if pair is None or pair.difference is None:
        return _missing("the two have no common items")
    others = sides.pair(sides.prompted, plain)
    by_prompt = (
        ""
        if others is None or others.difference is None
        else f"; {sides.prompted} gains {amount(others)}"
    )
    evidence = f"Over {plain}, which knows what the base knows, {sides.tuned} gains {amount(pair)}"
    return Finding(
        says=_ahead(pair, confidence=sides.decision.confidence), evidence=f"{evidence}{by_prompt}."
    )


def _production(sides: Sides) -> Finding:
    prompted, tuned = sides.arms
    if prompted.latency is None or tuned.latency is None:
        return _missing("latency and request cost were not timed")
    assert prompted.cost is not None and tuned.cost is not None
    costs = (prompted.cost.request_usd, tuned.cost.request_usd)
    unit = "USD"
    if any(c.value is None for c in costs):
        costs = (prompted.cost.request_device_seconds, tuned.cost.request_device_seconds)
        unit = "device-seconds"
    times = (prompted.latency.p50_seconds, tuned.latency.p50_seconds)
    crossing = _break_even(sides, "usd" if unit == "USD" else "device_seconds")
    found = {_lower(*costs), _lower(*times)}
    says = found.pop() if len(found) == 1 else NEITHER
    if says == FINE_TUNING and not _is_reached(crossing, volume(sides.decision)):
        says = NEITHER
    evidence = (
        f"1,000 requests take {measured(costs[1], unit=unit, times=1000)} with {sides.tuned} and"
        f" {measured(costs[0], unit=unit, times=1000)} with {sides.prompted}; half are answered"
        f" within {wording.seconds(times[1].value)} and {wording.seconds(times[0].value)}."
        f" {_crossing_words(crossing, volume(sides.decision))}"
    )
    return Finding(says=says, evidence=evidence)


def _break_even(sides: Sides, unit: str) -> BreakEven | None:
    names = {sides.prompted, sides.tuned}
    for b in sides.results.break_even:
        if {b.a, b.b} == names and b.unit == unit and b.cache == "measured":
            return b
    return None


def _is_reached(crossing: BreakEven | None, requests: float) -> bool:
    """Whether the planned volume is for certain beyond the break-even."""
    if crossing is None or crossing.status == "unknown":
        return False
    if crossing.status == "always":
        return True
    return crossing.high is not None and crossing.high <= requests


def _crossing_words(crossing: BreakEven | None, requests: float) -> str:
    planned = f"of {wording.count(requests)} planned"
    if crossing is None or crossing.status == "unknown":
        return "The break-even is not known."
    if crossing.status == "never":
        return f"{crossing.b} never pays back its start in this comparison."
    if crossing.status == "always":
        return f"{crossing.b} is cheaper from the first request on."
    low, high = wording.count(crossing.low), wording.count(crossing.high)
    ends = f"{low} to {high}" if crossing.high is not None else f"from {low}, no upper bound"
    at = wording.count(crossing.requests)
    return f"{crossing.b} pays back its start after {at} requests ({ends}) {planned}."


def _style(sides: Sides) -> Finding:
    prompted, tuned = (arm.format_validity for arm in sides.arms)
    if prompted is None or tuned is None:
        return _missing("answers are labels that were scored, and cannot miss a format")
    evidence = (
        f"Valid answers: {share(tuned)} with {sides.tuned}, {share(prompted)} with"
        f" {sides.prompted}."
    )
    return Finding(says=_higher(prompted, tuned), evidence=evidence)


def _hallucinations(sides: Sides) -> Finding:
    for probe in ("task_abstain", "abstain"):
        for change in sides.results.probe_changes:
            is_asked = change.arm == sides.tuned and change.measure == "unsupported"
            if change.probe != probe or not is_asked or change.change.value is None:
                continue
            low, high = change.change.low, change.change.high
            says = NEITHER
            if low is not None and high is not None:
                says = FINE_TUNING if high < 0 else PROMPTING if low > 0 else NEITHER
            evidence = (
                f"Unanswerable questions that were answered all the same: {share(change.before)}"
                f" before tuning, {share(change.after)} after it, {points(change.change)}."
            )
            return Finding(says=says, evidence=evidence)
    return _missing("no question without an answer was asked before and after tuning")


def _labelled_set(sides: Sides) -> Finding:
    labels = sides.arms[1].labels_used
    pair = sides.pair(sides.tuned, sides.prompted)
    if labels is None or pair is None or pair.difference is None:
        return _missing("the labels used are not known")
    curve = sides.results.label_curve
    crossings = [] if curve is None else [c for c in curve.crossings if c.noise == 0]
    mine = [c for c in crossings if (c.prompted, c.tuned) == (sides.prompted, sides.tuned)]
    says = _ahead(pair, confidence=sides.decision.confidence)
    evidence = f"With {labels:,} labels {sides.tuned} is {amount(pair)} against {sides.prompted}"
    if mine and mine[0].status == "crosses" and mine[0].labels is not None:
        evidence += f"; it catches up at about {wording.count(mine[0].labels)} labels"
    elif mine and mine[0].status == "none_seen":
        evidence += f"; up to {mine[0].largest:,} labels it did not catch up"
    near = sides.results.task.get("facts")
    if isinstance(near, dict) and near.get("near_duplicates"):
        evidence += f"; {near['near_duplicates']} near-duplicates were found in the set"
    return Finding(says=says, evidence=evidence + ".")


REASONS: Sequence[tuple[str, str, Callable[[Sides], Finding]]] = (
    (PROMPTING, "A quick, flexible solution for many general tasks is wanted.", _many_tasks),
    (PROMPTING, "Budget, data or training resources are limited.", _limited_means),
    (
        PROMPTING,
        "Extreme precision, consistency or deep domain knowledge is not needed.",
        _precision_not_needed,
    ),
    (PROMPTING, "It is a prototype.", _prototype),
    (
        PROMPTING,
        "The latest, largest models should be used without custom development.",
        _largest_models,
    ),
    (
        FINE_TUNING,
        "High accuracy, consistency and reliability on one task are demanded.",
        _accuracy,
    ),
    (FINE_TUNING, "Domain knowledge or jargon matters.", _domain_knowledge),
    (
        FINE_TUNING,
        "A production system with high volume needs cost and latency down.",
        _production,
    ),
    (FINE_TUNING, "A style, tone or format must be kept.", _style),
    (
        FINE_TUNING,
        "Hallucinations should fall, and facts be right within a context.",
        _hallucinations,
    ),
    (FINE_TUNING, "A good labelled set exists.", _labelled_set),
)
