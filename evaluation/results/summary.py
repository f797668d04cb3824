"""From the records of a run to its results (pure: no file is read or written here)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from conf.hashing import plain
from conf.results import BreakEven, Pair, RequestRates, Results
from conf.run_groups import DecisionConfig, PricingConfig
from conf.search_results import SearchResult
from evaluation.costs import cost
from evaluation.costs.cost_curves import CACHES, by_cache, priced, share_paid
from evaluation.costs.crossover import Side, break_even_device_seconds, break_even_usd
from evaluation.costs.request_rates import Rates, TimedRequest, fit_rates, key_share_of, reported
from evaluation.decision import decide
from evaluation.decision.criteria import all_criteria
from evaluation.decision.retraining import all_retraining
from evaluation.decision.rules import Evidence, best_on_validation, family
from evaluation.records.run_records import RunRecords
from evaluation.results.arm_summary import ArmSummary, Settings, summarise_arm
from evaluation.results.forgetting import all_forgetting
from evaluation.results.item_intervals import ItemRule
from evaluation.results.label_curve import summarise_label_curve
from evaluation.results.probe_summary import with_probes
from evaluation.results.serving import serve_commands
from evaluation.search.summary import summarise_search
from evaluation.statistics import holm

OWN = ""  # `ArmSpec.base` of arms that answer with the model of the run


def summarise(
    records: RunRecords,
    *,
    decision: DecisionConfig | None = None,
    pricing: PricingConfig | None = None,
) -> Results:
    """The results of a run, under its own decision and pricing or under others."""
    settings = Settings(decision=decision or records.decision, pricing=pricing or records.pricing)
    arms = {name: summarise_arm(records, name, settings=settings) for name in records.arm_specs}
    by_base = rates_by_base(records, arms)
    rates = {name: by_base[spec.base] for name, spec in records.arm_specs.items()}
    arms = {n: with_caches(arm, rates[n], settings=settings) for n, arm in arms.items()}
    rule = ItemRule.of(records, confidence=settings.confidence)
    pairs = all_pairs(arms, rule=rule, margin=settings.decision.equivalence_margin)
    results = {name: arm.result for name, arm in arms.items()}
    validation = {name: arm.validation for name, arm in arms.items()}
    curve = summarise_label_curve(records, arms, settings=settings)
    evidence = Evidence(
        arms=results,
        pairs=pairs,
        validation=validation,
        usd_per_device_hour=settings.pricing.device_hour.usd,
        usd_per_prompt_token=usd_per_prompt_token(arms, rates, settings=settings),
        crossings=() if curve is None else curve.crossings,
    )
    break_evens = all_break_evens(arms, rates, settings=settings)
    found = Results(
        run=records.name,
        task={**records.task, "items": _item_counts(records)},
        model=dict(records.model),
        arms=results,
        pairs=pairs,
        break_even=break_evens,
        recommendation=decide(evidence, decision=settings.decision),
        ledger=records.ledger,
        instructions=all_forgetting(
            records, confidence=settings.confidence, set_name="instructions"
        ),
        pricing={
            **plain(settings.pricing),
            "usd_per_device_second": settings.pricing.usd_per_device_second,
        },
        decision={
            **plain(settings.decision),
            "validation": validation,
            "best_prompted": best_on_validation(evidence, ("prompt",)),
            "best_tuned": best_on_validation(evidence, ("weights", "both")),
        },
        provenance={
            "experiment": records.experiment,
            "command": records.command,
            "commit": records.commit,
            "is_dirty": records.is_dirty,
            "versions": dict(records.versions),
            "hardware": dict(records.hardware),
            "exit_code": records.exit_code,
            "num_broken_lines": records.num_broken_lines,
        },
        forgetting=all_forgetting(records, confidence=settings.confidence),
        searches=all_searches(records, settings=settings),
        label_curve=curve,
        request_rates=reported_rates(records, arms, by_base[OWN], settings=settings),
        retraining=all_retraining(break_evens, results, decision=settings.decision),
    )
    found = with_probes(found, records, confidence=settings.confidence)
    return replace(found, serving=serve_commands(found, records), criteria=all_criteria(found))


def rates_by_base(records: RunRecords, arms: Mapping[str, ArmSummary]) -> dict[str, Rates]:
    """Base model -> its rates on its device, from the requests of all arms that use it.

    The keys' share is known of the run's own model alone; of another, attention counts for nothing.
    """
    found = {}
    for base in {OWN, *(spec.base for spec in records.arm_specs.values())}:
        share = key_share_of(records.model) if base == OWN else 0.0
        found[base] = fit_rates(_timed_by_arm(records, arms, base=base), key_share=share)
    return found


def _timed_by_arm(
    records: RunRecords, arms: Mapping[str, ArmSummary], *, base: str
) -> dict[str, Sequence[TimedRequest]]:
    """Timed requests of the arms that run this base model on devices of our own."""
    return {
        name: arm.timed
        for name, arm in arms.items()
        if records.arm_specs[name].base == base
        and family(arm.result) != "reference"
        and records.arm_specs[name].hosted_model is None
    }


def reported_rates(
    records: RunRecords, arms: Mapping[str, ArmSummary], rates: Rates, *, settings: Settings
) -> RequestRates | None:
    """The rates of the run's own model for the report; None where nothing was timed."""
    timed = _timed_by_arm(records, arms, base=OWN)
    if not any(timed.values()):
        return None
    return reported(rates, timed, confidence=settings.confidence)


def with_caches(arm: ArmSummary, rates: Rates, *, settings: Settings) -> ArmSummary:
    """The arm with the cost of its request under each rule for cached tokens."""
    if arm.result.cost is None or not arm.timed or arm.result.kind == "given":
        return arm
    found = by_cache(
        arm.timed,
        rates,
        pricing=settings.pricing,
        hosting=arm.hosting,
        confidence=settings.confidence,
    )
    return replace(arm, result=replace(arm.result, cost=replace(arm.result.cost, by_cache=found)))


def usd_per_prompt_token(
    arms: Mapping[str, ArmSummary], rates: Mapping[str, Rates], *, settings: Settings
) -> dict[str, float]:
    """Arm -> USD that one more computed prompt token adds to a request, where both are known."""
    price = settings.pricing.usd_per_device_second
    per_token = {name: rates[name].per_prompt_token for name, arm in arms.items() if arm.timed}
    if price is None:
        return {}
    return {
        name: seconds * price * arms[name].hosting
        for name, seconds in per_token.items()
        if seconds is not None
    }


def all_searches(records: RunRecords, *, settings: Settings) -> dict[str, SearchResult]:
    """The search of each arm that was searched."""
    spaces = (records.config.get("sweep") or {}).get("space") or {}
    return {
        name: summarise_search(
            name,
            arm.search,
            usd_per_device_second=settings.pricing.usd_per_device_second,
            space=spaces.get(name),
            shows_text=records.shows_text,
        )
        for name, arm in records.arms.items()
        if arm.search is not None
    }


def _item_counts(records: RunRecords) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in records.items.values():
        counts[item.split] = counts.get(item.split, 0) + 1
    return counts


def all_pairs(arms: Mapping[str, ArmSummary], *, rule: ItemRule, margin: float) -> tuple[Pair, ...]:
    """Every two finished arms on the items both answered, with Holm over all pairs that have a p.

    rule: how the items were come by. margin: differences within it are practically equal.
    """
    done = [name for name, arm in arms.items() if arm.scores]
    pairs = [
        rule.pair((a, b), arms[a].scores, arms[b].scores, margin=margin)
        for a, b in itertools.combinations(done, 2)
    ]
    return _adjusted(pairs)


def _adjusted(pairs: list[Pair]) -> tuple[Pair, ...]:
    tested = [i for i, p in enumerate(pairs) if p.p_value is not None]
    adjusted = holm([p for i in tested if (p := pairs[i].p_value) is not None])
    for i, p_value in zip(tested, adjusted, strict=True):
        pairs[i] = replace(pairs[i], p_adjusted=p_value)
    return tuple(pairs)


def all_break_evens(
    arms: Mapping[str, ArmSummary], rates: Mapping[str, Rates], *, settings: Settings
) -> tuple[BreakEven, ...]:
    """Every prompted arm against every arm with trained weights, in USD and in device-seconds.

    Of a pair under each rule for cached tokens, the measured one first.
    """
    done = {name: arm for name, arm in arms.items() if arm.result.status == "done"}
    prompted = [n for n, a in done.items() if family(a.result) == "prompt"]
    tuned = [n for n, a in done.items() if family(a.result) in ("weights", "both")]
    pairs = itertools.product(prompted, tuned, CACHES)
    return tuple(
        found
        for a, b, cache in pairs
        for found in _crossings(
            _side(a, done[a], rates[a], cache=cache, settings=settings),
            _side(b, done[b], rates[b], cache=cache, settings=settings),
            cache=cache,
            settings=settings,
        )
    )


def _crossings(
    a: Side | None, b: Side | None, *, cache: str, settings: Settings
) -> list[BreakEven]:
    """In USD and in device-seconds; none where the rule cannot be applied to both."""
    if a is None or b is None:
        return []
    price, confidence = settings.pricing.usd_per_device_second, settings.confidence
    prices = (price, *cost.price_range(settings.pricing)) if price else None
    error_usd = settings.decision.error_usd
    found = [
        break_even_usd(a, b, prices=prices, error_usd=error_usd, confidence=confidence),
        break_even_device_seconds(a, b, confidence=confidence),
    ]
    return [replace(entry, cache=cache) for entry in found]


def _side(
    name: str, arm: ArmSummary, rates: Rates, *, cache: str, settings: Settings
) -> Side | None:
    """The arm's costs under a rule for cached tokens; None where they are not known."""
    if arm.hosted_usd:
        bill = arm.result.cost
        return Side(
            arm=name,
            fixed=None if bill is None or bill.fixed_usd is None else 0.0,
            people_usd=0.0 if bill is None else bill.fixed_usd or 0.0,
            requests_usd=arm.hosted_usd[cache],
            scores=arm.scores,
        )
    at = priced(arm.timed, rates, share=share_paid(cache, settings.pricing))
    if at is None:
        return None
    return Side(
        arm=name,
        fixed=arm.fixed.device_seconds,
        requests=at.requests,
        people_usd=arm.fixed.people_usd,
        hosting=arm.hosting,
        rate_draws=at.rate_draws,
        scores=arm.scores,
    )
