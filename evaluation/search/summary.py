"""From what a search left to what results.json says of it (pure)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from conf.hashing import canonical_json
from conf.records import Measured
from conf.search_results import (
    DecisionResult,
    FieldResult,
    RungValue,
    SearchResult,
    SearchTotals,
    SettingResult,
    TrialResult,
)
from conf.sweep_records import UNFINISHED, RungDecision, RungRecord, TrialRecord
from evaluation.records.search_records import SearchRecords
from evaluation.search.importance import importance
from evaluation.search.progress import best_so_far, pooled
from evaluation.search.values import is_number, label_of, without_texts
from evaluation.statistics import normal_quantile

# Fields that decide how many steps a training has; where one is searched, trials differ in it.
STEPS = ("epochs", "batch_size", "max_steps")
LOG_RATIO = 8  # numbers that span three doublings are shown on a log axis


def summarise_search(
    arm: str,
    search: SearchRecords,
    *,
    usd_per_device_second: float | None,
    space: Mapping[str, Any] | None = None,
    shows_text: bool = True,
) -> SearchResult:
    """The search of one arm.

    Args:
        arm: its name.
        search: its records.
        usd_per_device_second: the price; None: no sum of money is known.
        space: the arm's part of sweep.space, which says what was searched on a log scale.
        shows_text: whether prompt texts may stand in the result; else their numbers do.
    """
    price = usd_per_device_second
    values = _values(search.trials, shows_text=shows_text)
    rungs = {(r.trial, r.rung): r for r in search.rungs}
    settings = _settings(search, rungs, values, price=price)
    return SearchResult(
        arm=arm,
        metric=search.rungs[0].metric if search.rungs else None,
        settings=settings,
        trials=tuple(_trial(t, search.rungs, price=price) for t in search.trials),
        decisions=tuple(_decision(d) for d in search.decisions),
        choice=search.choice,
        totals=_totals(search, price=price),
        fields=_fields(settings, log_fields=set(_log_fields(space or {}))),
        best_so_far=best_so_far(search, usd_per_device_second=price),
        rungs=_rungs(search),
    )


def _values(trials: Sequence[TrialRecord], *, shows_text: bool) -> dict[int, dict[str, Any]]:
    """Trial -> field -> value."""
    found = [dict(t.values) for t in trials]
    found = found if shows_text else without_texts(found)
    return {t.trial: values for t, values in zip(trials, found, strict=True)}


def _trial(trial: TrialRecord, rungs: Iterable[RungRecord], *, price: float | None) -> TrialResult:
    return TrialResult(
        trial=trial.trial,
        setting=trial.setting,
        seed=trial.seed,
        draw=trial.draw,
        status=trial.status,
        reason=trial.reason,
        steps=trial.steps,
        tokens=trial.tokens,
        device_seconds=trial.device_seconds,
        usd=None if price is None else trial.device_seconds * price,
        rungs=tuple(
            RungValue(rung=r.rung, step=r.step, value=r.value)
            for r in rungs
            if r.trial == trial.trial
        ),
    )


# --- Settings -------------------------------------------------------------------------------------


def _settings(
    search: SearchRecords,
    rungs: Mapping[tuple[int, int], RungRecord],
    values: Mapping[int, dict[str, Any]],
    *,
    price: float | None,
) -> tuple[SettingResult, ...]:
    """All settings, the best first."""
    by_setting: dict[int, list[TrialRecord]] = {}
    for trial in search.trials:
        by_setting.setdefault(trial.setting, []).append(trial)
    found = []
    for trials in by_setting.values():
        at = [[rungs[t.trial, rung] for t in trials] for rung in _common_rungs(trials, rungs)]
        result = _setting(search, trials, at, values[trials[0].trial], price=price)
        found.append((_order(result, at[-1] if at else []), result))
    found.sort(key=lambda pair: pair[0])
    return tuple(_placed(result, place) for place, (_, result) in enumerate(found, start=1))


def _common_rungs(
    trials: Sequence[TrialRecord], rungs: Mapping[tuple[int, int], RungRecord]
) -> list[int]:
    """The rungs at which all replicates were scored."""
    scored = [{rung for trial, rung in rungs if trial == t.trial} for t in trials]
    return sorted(set.intersection(*scored))


def _order(result: SettingResult, records: Sequence[RungRecord]) -> tuple[float, ...]:
    """Smaller is better: the chosen one, then by rung, value and what breaks ties."""
    ties = [r.tie_break for r in records if r.tie_break is not None]
    value = result.value.value
    return (
        float(result.status != "chosen"),
        float(result.status == "failed"),
        math.inf if result.rung is None else -float(result.rung),
        math.inf if value is None else -value,
        -fmean(ties) if ties else 0.0,
        float(result.setting),
    )


def _setting(
    search: SearchRecords,
    trials: Sequence[TrialRecord],
    at: Sequence[Sequence[RungRecord]],
    values: dict[str, Any],
    *,
    price: float | None,
) -> SettingResult:
    """A setting; at: by rung, the records of its replicates."""
    first, choice, records = trials[0], search.choice, at[-1] if at else ()
    rung = records[0].rung if records else None
    seconds = math.fsum(t.device_seconds for t in trials)
    is_chosen = choice is not None and choice.setting == first.setting
    is_compared = choice is not None and rung == choice.rung and not is_chosen
    ended = {t.status for t in trials}
    worst = next((s for s in ("failed", "dropped", UNFINISHED) if s in ended), "done")
    return SettingResult(
        setting=first.setting,
        place=0,
        label=label_of(values),
        values=values,
        status="chosen" if is_chosen else worst,
        reason=next((t.reason for t in trials if t.status == worst and t.reason), ""),
        rung=rung,
        value=pooled(records),
        replicate_values=tuple(r.value.value for r in records if r.value.value is not None),
        seeds=len({t.seed for t in trials}),
        draws=len({t.draw for t in trials}),
        tokens=sum(t.tokens for t in trials),
        device_seconds=seconds,
        usd=None if price is None else seconds * price,
        trained_parameters=first.trained_parameters,
        is_told_apart=first.setting not in choice.not_told_apart
        if choice is not None and is_compared and worst == "done"
        else None,
        rungs=tuple(RungValue(rung=r[0].rung, step=r[0].step, value=pooled(r)) for r in at),
    )


def _placed(result: SettingResult, place: int) -> SettingResult:
    return replace(result, place=place)


# --- Rungs ----------------------------------------------------------------------------------------


def _rungs(search: SearchRecords) -> dict[str, int]:
    """Rung -> where it lay: the most steps that a trial had taken there, or items it was asked."""
    found: dict[str, int] = {}
    for r in sorted(search.rungs, key=lambda r: r.rung):
        found[str(r.rung)] = max(found.get(str(r.rung), 0), r.step or r.value.n or 0)
    return found


def _decision(decision: RungDecision) -> DecisionResult:
    return DecisionResult(
        rung=decision.rung,
        keep=decision.keep,
        drop=decision.drop,
        failed=decision.failed,
        reasons=dict(decision.reasons),
        correlation=rank_correlation(decision.correlation, n=decision.num_ranked),
        is_grace=decision.is_grace,
    )


def rank_correlation(value: float | None, *, n: int, confidence: float = 0.95) -> Measured:
    """A Spearman correlation with Bonett and Wright's interval; too few or a perfect one: none."""
    if value is None or n < 4 or abs(value) >= 1:
        return Measured(value=value, n=n or None)
    half = normal_quantile(confidence) * math.sqrt((1 + value**2 / 2) / (n - 3))
    center = math.atanh(value)
    return Measured(value=value, low=math.tanh(center - half), high=math.tanh(center + half), n=n)


# --- The bill -------------------------------------------------------------------------------------


def _totals(search: SearchRecords, *, price: float | None) -> SearchTotals:
    trials, spent = search.trials, [*search.rungs, *search.steps]
    # Rows of a search that did not end are as old as its last rung: its steps and rungs are not.
    is_over = bool(trials) and all(t.status != UNFINISHED for t in trials)
    told: Sequence[Any] = trials if is_over else spent
    seconds = math.fsum(record.device_seconds for record in told)
    taken, full, unit = _work(search)
    return SearchTotals(
        settings=len({t.setting for t in trials}),
        trials=len(trials) or len({r.trial for r in search.rungs}),
        tokens=sum(record.tokens for record in told),
        device_seconds=seconds,
        usd=None if price is None else seconds * price,
        unit=unit,
        taken=taken,
        full=full,
        share_of_grid=taken / full if full else None,
    )


def _work(search: SearchRecords) -> tuple[int, int | None, str]:
    """Steps or items that all trials took; what all of them to the end would have been; its unit.

    A trial that left has as many steps as those that went all the way, unless a field that decides
    the steps was searched: then nobody counted them.
    """
    is_trained = any(t.steps for t in search.trials) or bool(search.steps)
    whole = {t.trial for t in search.trials if t.status == "done"}
    if not is_trained:
        asked: dict[int, int] = {}
        for r in search.rungs:
            asked[r.trial] = max(asked.get(r.trial, 0), r.value.n or 0)
        full = {asked[t] for t in whole if t in asked}
        each = full.pop() if len(full) == 1 else None
        taken, unit = sum(asked.values()), "items"
    else:
        lengths = {t.steps for t in search.trials if t.trial in whole}
        fields = {name.rpartition(".")[2] for t in search.trials for name in t.values}
        each = lengths.pop() if len(lengths) == 1 and not fields & set(STEPS) else None
        is_over = all(t.status != UNFINISHED for t in search.trials)
        told = sum(t.steps for t in search.trials) if is_over else 0
        taken, unit = told or len(search.steps), "steps"
    if len(whole) == len(search.trials) and whole:
        return taken, taken, unit
    return taken, None if each is None else each * len(search.trials), unit


# --- Fields ---------------------------------------------------------------------------------------


def _fields(settings: Sequence[SettingResult], *, log_fields: set[str]) -> tuple[FieldResult, ...]:
    """The searched fields, the most important first; those not known last."""
    names = list(dict.fromkeys(name for s in settings for name in s.values))
    ranks = _ranks(settings)
    found = []
    for name in names:
        values = [s.values.get(name) for s in settings]
        result = importance(values, ranks)
        found.append(
            FieldResult(
                field=name,
                is_log=name in log_fields or _is_wide(values),
                num_values=len({canonical_json(v) for v in values}),
                share=result.share,
                chance_high=result.chance_high,
                p_value=result.p_value,
                n=len(settings),
            )
        )
    return tuple(sorted(found, key=lambda f: (f.share is None, -(f.share or 0.0))))


def _ranks(settings: Sequence[SettingResult]) -> list[float]:
    """Places; failed settings share the mean of theirs."""
    failed = [float(s.place) for s in settings if s.status == "failed"]
    return [fmean(failed) if s.status == "failed" else float(s.place) for s in settings]


def _is_wide(values: Sequence[Any]) -> bool:
    is_positive = all(is_number(v) and v > 0 for v in values)
    return bool(values) and is_positive and max(values) >= LOG_RATIO * min(values)


def _log_fields(space: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """Fields that were drawn evenly over their logarithm."""
    for name, below in space.items():
        if isinstance(below, Mapping) and "log_uniform" in below:
            yield f"{prefix}{name}"
        elif isinstance(below, Mapping):
            yield from _log_fields(below, f"{prefix}{name}.")
