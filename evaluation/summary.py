"""From the records of a run to its results (pure: no file is read or written here)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from conf.hashing import plain
from conf.results import BreakEven, Pair, Results
from conf.run_groups import DecisionConfig, PricingConfig
from conf.search_results import SearchResult
from evaluation import cost
from evaluation.arm_summary import ArmSummary, Settings, summarise_arm
from evaluation.criteria import all_criteria
from evaluation.crossover import Side, break_even_device_seconds, break_even_usd
from evaluation.decision import decide
from evaluation.decision_rules import Evidence, best_on_validation, family
from evaluation.forgetting import all_forgetting
from evaluation.item_intervals import ItemRule
from evaluation.label_curve import summarise_label_curve
from evaluation.probe_summary import with_probes
from evaluation.run_records import RunRecords
from evaluation.search_summary import summarise_search
from evaluation.serving import serve_commands
from evaluation.statistics import holm


def summarise(
    records: RunRecords,
    *,
    decision: DecisionConfig | None = None,
    pricing: PricingConfig | None = None,
) -> Results:
    """The results of a run, under its own decision and pricing or under others."""
    settings = Settings(decision=decision or records.decision, pricing=pricing or records.pricing)
    arms = {name: summarise_arm(records, name, settings=settings) for name in records.arm_specs}
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
        crossings=() if curve is None else curve.crossings,
    )
    found = Results(
        run=records.name,
        task={**records.task, "items": _item_counts(records)},
        model=dict(records.model),
        arms=results,
        pairs=pairs,
        break_even=all_break_evens(arms, settings=settings),
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
    )
    found = with_probes(found, records, confidence=settings.confidence)
    return replace(found, serving=serve_commands(found, records), criteria=all_criteria(found))


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


def all_break_evens(arms: Mapping[str, ArmSummary], *, settings: Settings) -> tuple[BreakEven, ...]:
    """Every prompted arm against every arm with trained weights, in USD and in device-seconds."""
    done = {name: arm for name, arm in arms.items() if arm.result.status == "done"}
    prompted = [n for n, a in done.items() if family(a.result) == "prompt"]
    tuned = [n for n, a in done.items() if family(a.result) in ("weights", "both")]
    price, prices = settings.pricing.usd_per_device_second, None
    if price:
        prices = (price, *cost.price_range(settings.pricing))
    found = []
    for a, b in itertools.product(prompted, tuned):
        one, other = _side(a, done[a]), _side(b, done[b])
        found.append(break_even_usd(one, other, prices=prices, confidence=settings.confidence))
        found.append(break_even_device_seconds(one, other, confidence=settings.confidence))
    return tuple(found)


def _side(name: str, arm: ArmSummary) -> Side:
    return Side(
        arm=name,
        fixed=arm.fixed.device_seconds,
        requests=arm.requests,
        labels_usd=arm.fixed.labels_usd,
    )
