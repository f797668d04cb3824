"""The ten dimensions on which prompting and fine-tuning are said to differ, measured (pure).

One table from the results alone: a row a measure, a column an arm. A cell that is None was not
measured or means nothing for that arm; the row's note says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from conf.probe_results import DimensionRow, ProbeChange
from conf.records import Measured
from conf.results import ArmResult, Metric, Results
from evaluation import wording
from evaluation.results.dimension_rows import (
    CONTROL,
    COST,
    DATA,
    DIMENSIONS,
    EFFORT,
    KNOWLEDGE,
    LATENCY,
    METHODOLOGY,
    MODEL_CHANGE,
    PERFORMANCE,
    PROBE_ROWS,
    Cell,
    ProbeRow,
    dimension_row,
)
from evaluation.results.label_dimensions import label_rows

NO_CHOICE = "none for answers that are scored"


def all_dimensions(results: Results) -> tuple[DimensionRow, ...]:
    """All rows, dimension by dimension, in the question's order."""
    rows = [
        *_methodology(results),
        *_model_change(results),
        *_knowledge(results),
        *_data(results),
        *_control(results),
        *_performance(results),
        *_cost(results),
        *_latency(results),
        *_effort(results),
        *_probes(results),
    ]
    return tuple(sorted(rows, key=lambda row: DIMENSIONS.index(row.dimension)))


def _number(value: float | None) -> Measured | None:
    return None if value is None else Measured(value=float(value))


def _of(metric: Metric | None) -> Measured | None:
    if metric is None:
        return None
    return Measured(value=metric.value, low=metric.low, high=metric.high, n=metric.n)


def _methodology(results: Results) -> list[DimensionRow]:
    return [
        dimension_row(results, METHODOLOGY, "approach", lambda _, arm: arm.kind),
        dimension_row(
            results,
            METHODOLOGY,
            "answers by",
            lambda _, arm: arm.answer_rule.name if arm.answer_rule else None,
            note="chosen on validation; references answer in a way of their own",
        ),
    ]


def _model_change(results: Results) -> list[DimensionRow]:
    def trained(_: str, arm: ArmResult) -> Cell:
        if arm.kind == "both":
            return "those of the arm it stands on"
        if arm.kind == "prompt":
            return Measured(value=0.0)
        return _number(arm.train.trained_parameters if arm.train else None)

    def written(_: str, arm: ArmResult) -> Cell:
        if arm.kind == "both":
            return "those of the arm it stands on"
        if arm.kind == "prompt":
            return Measured(value=0.0)
        return _number(arm.train.checkpoint_bytes if arm.train else None)

    note = "references have no weights of a language model"
    return [
        dimension_row(
            results, MODEL_CHANGE, "trained parameters", trained, unit="count", note=note
        ),
        dimension_row(results, MODEL_CHANGE, "bytes written", written, unit="bytes", note=note),
    ]


def _knowledge(results: Results) -> list[DimensionRow]:
    base = results.decision.get("best_prompted")
    differences = {p.a: (p.difference, p.low, p.high, p.n) for p in results.pairs if p.b == base}
    for p in results.pairs:
        if p.a == base and p.difference is not None and p.low is not None and p.high is not None:
            differences[p.b] = (-p.difference, -p.high, -p.low, p.n)
    changes = {f.arm: f.change for f in results.forgetting}

    def gain(name: str, _: ArmResult) -> Cell:
        if name not in differences:
            return None
        value, low, high, n = differences[name]
        return Measured(value=value, low=low, high=high, n=n)

    return [
        dimension_row(
            results,
            KNOWLEDGE,
            "in-domain gain",
            gain,
            note=f"the metric against {base or 'the best prompted arm'}, on the same items",
            unit="points",
        ),
        dimension_row(
            results,
            KNOWLEDGE,
            "change on the general set",
            lambda name, _: changes.get(name),
            note="tuned less base weights; prompts leave the weights as they are",
            unit="points",
        ),
    ]


def _data(results: Results) -> list[DimensionRow]:
    return [
        dimension_row(
            results,
            DATA,
            "labels used",
            lambda _, arm: _number(arm.labels_used),
            note="shots, training rows and validation labels that chose something; the metric "
            "against their number: +exp=label_curve",
            unit="count",
        ),
        *label_rows(results),
    ]


def _control(results: Results) -> list[DimensionRow]:
    return [
        dimension_row(
            results,
            CONTROL,
            "format validity",
            lambda _, arm: arm.format_validity,
            note=NO_CHOICE,
            unit="share",
        ),
        dimension_row(
            results,
            CONTROL,
            "agreement over repeats",
            lambda _, arm: arm.consistency,
            note=f"{NO_CHOICE}, and without engine.repeats and engine.temperature above 0",
            unit="share",
        ),
    ]


def _performance(results: Results) -> list[DimensionRow]:
    names = {arm.metric.name for arm in results.arms.values() if arm.metric is not None}
    title = wording.metric(names.pop()) if len(names) == 1 else "metric"
    rows = [
        dimension_row(results, PERFORMANCE, title, lambda _, arm: _of(arm.metric), unit="share")
    ]
    if any(arm.macro_f1 is not None for arm in results.arms.values()):
        rows.append(
            dimension_row(
                results, PERFORMANCE, "macro-F1", lambda _, arm: arm.macro_f1, unit="share"
            )
        )
    return rows


def _cost(results: Results) -> list[DimensionRow]:
    has_price = bool(results.pricing.get("usd_per_device_second"))

    def fixed(_: str, arm: ArmResult) -> Cell:
        cost = arm.cost
        if cost is None:
            return None
        return _number(cost.fixed_usd if has_price else cost.fixed_device_seconds)

    def request(_: str, arm: ArmResult) -> Cell:
        if arm.cost is None:
            return None
        return arm.cost.request_usd if has_price else arm.cost.request_device_seconds

    unit = "usd" if has_price else "seconds"
    note = "at the price of the run" if has_price else "device-seconds, as there is no price"
    return [
        dimension_row(results, COST, "fixed", fixed, unit=unit, note=note),
        dimension_row(results, COST, "per request", request, unit=unit, note=f"measured, {note}"),
        dimension_row(
            results,
            COST,
            "prompt tokens, nothing cached",
            lambda _, arm: arm.tokens.prompt if arm.tokens else None,
            unit="tokens",
            note="per item",
        ),
        dimension_row(
            results,
            COST,
            "tokens computed, prefix cached",
            lambda _, arm: arm.tokens.computed if arm.tokens else None,
            unit="tokens",
            note="per item, for this item alone",
        ),
    ]


def _latency(results: Results) -> list[DimensionRow]:
    loads = {arm.latency.concurrency for arm in results.arms.values() if arm.latency is not None}
    note = f"concurrency {', '.join(map(str, sorted(loads)))}" if loads else ""
    parts: Mapping[str, Callable[[str, ArmResult], Cell]] = {
        "first token, p50": lambda _, a: a.latency.first_token_p50_seconds if a.latency else None,
        "whole answer, p50": lambda _, a: a.latency.p50_seconds if a.latency else None,
        "whole answer, p95": lambda _, a: a.latency.p95_seconds if a.latency else None,
    }
    return [
        dimension_row(results, LATENCY, title, cell, unit="seconds", note=note)
        for title, cell in parts.items()
    ]


def _people(results: Results) -> list[DimensionRow]:
    """No row where nobody has said how long people work: it cannot be measured."""
    if all(arm.people_hours is None for arm in results.arms.values()):
        return []
    hours = dimension_row(
        results,
        EFFORT,
        "people's hours",
        lambda _, arm: _number(arm.people_hours),
        unit="hours",
        note="as given by decision.tuning_hours and prompting_hours",
    )
    return [hours]


def _effort(results: Results) -> list[DimensionRow]:
    def trials(name: str, _: ArmResult) -> Cell:
        search = results.searches.get(name)
        return Measured(value=float(len(search.trials))) if search is not None else None

    def prompt_seconds(_: str, arm: ArmResult) -> Cell:
        return _number(arm.turn_around.prompt_seconds if arm.turn_around else None)

    def data_seconds(_: str, arm: ArmResult) -> Cell:
        return _number(arm.turn_around.data_seconds if arm.turn_around else None)

    return [
        dimension_row(
            results,
            EFFORT,
            "device-seconds before the first request",
            lambda _, arm: _number(arm.cost.fixed_device_seconds if arm.cost else None),
            unit="seconds",
            note="people's hours: decision.tuning_hours and prompting_hours, where given",
        ),
        *_people(results),
        dimension_row(
            results, EFFORT, "trials", trials, unit="count", note="of arms that were searched"
        ),
        dimension_row(
            results,
            EFFORT,
            "turn-around: changed prompt to score",
            prompt_seconds,
            unit="seconds",
            note="the evaluation on this machine, without start-up",
        ),
        dimension_row(
            results,
            EFFORT,
            "turn-around: changed data to score",
            data_seconds,
            unit="seconds",
            note="training, where there is one, and the evaluation",
        ),
    ]


def _probes(results: Results) -> list[DimensionRow]:
    """Rows of probes; those of the task only where its items have what they need."""
    rows = []
    for one in PROBE_ROWS:
        cell = partial(_probe_cell, one)
        is_there = any(cell(name, arm) is not None for name, arm in results.arms.items())
        if not is_there and one.probe.startswith("task_"):
            continue
        notes = [one.note, *_sizes(results, one.probe), *_changes(results, one)]
        rows.append(
            dimension_row(
                results,
                one.dimension,
                one.title,
                cell,
                note="; ".join(n for n in notes if n),
                unit=one.unit,
            )
        )
    return rows


def _probe_cell(row: ProbeRow, name: str, arm: ArmResult) -> Cell:
    del name
    found = arm.probes.get(row.probe)
    return None if found is None else found.measures.get(row.measure)


def _sizes(results: Results, probe: str) -> list[str]:
    """What is said of a probe's size, once."""
    found = (arm.probes.get(probe) for arm in results.arms.values())
    return sorted({one.note for one in found if one is not None and one.note})[:1]


def _changes(results: Results, row: ProbeRow) -> list[str]:
    """Before and after tuning, in words: 'lora +3.1 points (-0.2 to +6.0) on zero_shot'."""
    return [
        _changed(change)
        for change in results.probe_changes
        if (change.probe, change.measure) == (row.probe, row.measure)
    ]


def _changed(change: ProbeChange) -> str:
    span = wording.span(change.change.low, change.change.high, is_points=True)
    base = "its base" if change.base == change.arm else change.base
    return f"{change.arm} {wording.points(change.change.value)} points ({span}) against {base}"
