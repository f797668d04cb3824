"""From the records of a label curve's runs to its points, crossings and suspects (pure)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np

from conf.label_results import LabelCrossing, LabelCurve, LabelPlace, LabelPoint
from conf.records import Measured
from evaluation.decision.rules import family
from evaluation.records.run_records import RunRecords
from evaluation.results.arm_summary import ArmSummary, Settings, answered_requests, summarise_arm
from evaluation.results.arm_summary import is_calibrated as is_arm_calibrated
from evaluation.results.item_intervals import ItemRule
from evaluation.results.label_crossing import Floats, crossing
from evaluation.results.suspects import MAX_SUSPECTS, suspects
from evaluation.statistics.variance import Replicate, split_variance

Scores = Mapping[Replicate, Mapping[str, float]]


@dataclass(kw_only=True, slots=True, frozen=True)
class _Curve:
    """What is known of a curve: a summary for each run that is done, by name of its records."""

    records: RunRecords  # with the runs as arms
    runs: Mapping[str, ArmSummary]
    places: Mapping[tuple[str, int, float], tuple[LabelPlace, ...]]
    settings: Settings

    def scores(self, places: Sequence[LabelPlace]) -> dict[Replicate, Mapping[str, float]]:
        """(draw, seed) -> item -> score, of the runs that are done."""
        return {
            (place.draw, place.seed): self.runs[place.records].scores
            for place in places
            if place.records in self.runs
        }


def summarise_label_curve(
    records: RunRecords, arms: Mapping[str, ArmSummary], *, settings: Settings
) -> LabelCurve | None:
    """The label curve of a run; None where it has none.

    arms: the summaries of the run's arms, which are some of the curve's runs.
    """
    if not records.label_places:
        return None
    curve = _read(records, arms, settings)
    section = records.config.get("label_curve") or {}
    points = tuple(_point(curve, key) for key in curve.places if key[1])
    found, num_checked = suspects(
        _answers(curve),
        {i: item for i, item in records.items.items() if item.split == "test"},
        shows_text=records.shows_text,
    )
    metrics = (s.result.metric.name for s in curve.runs.values() if s.result.metric is not None)
    return LabelCurve(
        metric=next(metrics, "metric"),
        sizes=tuple(sorted({size for _, size, _ in curve.places if size})),
        draws=int(section.get("draws") or 1),
        seeds=int(section.get("seeds") or 1),
        noise=tuple(sorted({noise for _, _, noise in curve.places})),
        points=points,
        constants={
            arm: _measured(curve.scores(places), curve)
            for (arm, size, _), places in curve.places.items()
            if not size and curve.scores(places)
        },
        crossings=tuple(_crossings(curve)),
        suspects=tuple(found[:MAX_SUSPECTS]),
        num_suspects=len(found),
        num_checked=num_checked,
    )


def _read(records: RunRecords, arms: Mapping[str, ArmSummary], settings: Settings) -> _Curve:
    """The runs as arms of their own, under the names of their records."""
    specs, runs = dict(records.arm_specs), dict(records.arms)
    for place in records.label_places:
        if place.records in records.label_runs:
            spec = replace(records.arm_specs[place.arm], name=place.records, on=place.on)
            shots = min(spec.num_shots, place.num_used)
            specs[place.records] = replace(spec, num_shots=shots)
            runs[place.records] = records.label_runs[place.records]
    records = replace(records, arm_specs=specs, arms=runs)
    places: dict[tuple[str, int, float], list[LabelPlace]] = {}
    for place in records.label_places:
        places.setdefault((place.arm, place.num_labels, place.noise), []).append(place)
    summaries = {
        name: arms.get(name) or summarise_arm(records, name, settings=settings)
        for name in dict.fromkeys(place.records for place in records.label_places)
    }
    return _Curve(
        records=records,
        runs={name: summary for name, summary in summaries.items() if summary.scores},
        places={key: tuple(value) for key, value in places.items()},
        settings=settings,
    )


def _point(curve: _Curve, key: tuple[str, int, float]) -> LabelPoint:
    arm, size, noise = key
    places = curve.places[key]
    scores = curve.scores(places)
    done = [place for place in places if place.records in curve.runs]
    runs = [curve.runs[place.records] for place in done]
    by_draw = [fmean(v) for v in _by_draw(scores).values()]
    variance = split_variance(scores)
    seconds = [_fixed_seconds(place, curve) for place in done]
    fixed = fmean(seconds) if seconds else None
    price = curve.settings.pricing.usd_per_device_second
    labels_usd = places[0].num_used * (curve.settings.decision.label_usd or 0.0)
    timed = next((r.result.cost for r in runs if r.timed), None)
    tokens = [
        r.result.tokens.prompt.value for r in runs if r.result.tokens and r.result.tokens.prompt.n
    ]
    return LabelPoint(
        arm=arm,
        num_labels=size,
        num_used=places[0].num_used,
        noise=noise,
        value=_measured(scores, curve),
        by_draw=tuple(by_draw),
        sd_draws=stdev(by_draw) if len(by_draw) > 1 else None,
        variance_items=variance.items,
        variance_draws=variance.draws,
        variance_seeds=variance.seeds,
        num_runs=len(done),
        num_missing=len(places) - len(done),
        share_flipped=fmean(place.share_flipped for place in places),
        fixed_device_seconds=fixed,
        fixed_usd=None if fixed is None or price is None else fixed * price + labels_usd,
        request_device_seconds=timed.request_device_seconds if timed else Measured(),
        request_usd=timed.request_usd if timed else Measured(),
        prompt_tokens=fmean(t for t in tokens if t is not None) if any(tokens) else None,
    )


def _fixed_seconds(place: LabelPlace, curve: _Curve) -> float:
    """Device-seconds before the first request; of shared features the share of the run's labels."""
    own = curve.runs[place.records].fixed.device_seconds
    features = f"features:{place.arm}"
    lines = [line for line in curve.records.ledger if line.job == features]
    shared = sum(line.device_seconds for line in lines if line.purpose == "reference")
    if not lines:
        return own
    if place.records == place.arm:
        own -= shared
    return own + shared * place.num_used / max(1, _num_features(curve))


def _num_features(curve: _Curve) -> int:
    """Items that features were computed of: the test and validation items, and each draw's set."""
    items = sum(item.split != "train" for item in curve.records.items.values())
    largest = max(size for _, size, _ in curve.places)
    draws = {place.draw for place in curve.records.label_places}
    return items + largest * len(draws)


def _by_draw(scores: Scores) -> dict[int, list[float]]:
    values: dict[int, list[float]] = {}
    for (draw, _), by_item in sorted(scores.items()):
        values.setdefault(draw, []).append(fmean(by_item.values()))
    return values


def _measured(scores: Scores, curve: _Curve) -> Measured:
    """The mean over items, draws and seeds, with an interval that has all of them in it."""
    if not scores:
        return Measured(n=0)
    common = set.intersection(*(set(by_item) for by_item in scores.values()))
    means = {i: fmean(by_item[i] for by_item in scores.values()) for i in sorted(common)}
    if not means:
        return Measured(n=0)
    rule = ItemRule.of(curve.records, confidence=curve.settings.confidence)
    pooled = rule.pooled(means, split_variance(scores), scores)
    return rule.mean(means) if pooled.low is None else pooled


def _crossings(curve: _Curve) -> list[LabelCrossing]:
    """Every tuned arm against every prompted one, at each level of noise."""
    kinds = {
        place.arm: family(curve.runs[place.records].result)
        for place in curve.records.label_places
        if place.records in curve.runs
    }
    prompted = [name for name, kind in kinds.items() if kind == "prompt"]
    tuned = [name for name, kind in kinds.items() if kind == "weights"]
    noises = sorted({noise for _, _, noise in curve.places})
    found = []
    for noise, a, b in itertools.product(noises, prompted, tuned):
        sizes = sorted({s for arm, s, e in curve.places if arm == b and e == noise and s})
        sides = [(s, _table(curve, a, s, noise), _table(curve, b, s, noise)) for s in sizes]
        both = [(s, p, q) for s, p, q in sides if p and q]
        common = (
            set.intersection(*(set(t.items) for _, p, q in both for t in (p, q))) if both else []
        )
        items = sorted(common)
        at = crossing(
            [s for s, _, _ in both],
            [p.of(items) for _, p, _ in both],
            [q.of(items) for _, _, q in both],
            confidence=curve.settings.confidence,
        )
        found.append(
            LabelCrossing(
                prompted=a,
                tuned=b,
                noise=noise,
                status=at.status,
                labels=at.labels,
                low=at.low,
                high=at.high,
                share_seen=at.share_seen,
                smallest=min(sizes, default=0),
                largest=max(sizes, default=0),
            )
        )
    return found


@dataclass(kw_only=True, slots=True, frozen=True)
class _Table:
    """Draw -> item -> score, seeds averaged."""

    draws: Mapping[int, Mapping[str, float]]

    @property
    def items(self) -> set[str]:
        return set.intersection(*(set(by_item) for by_item in self.draws.values()))

    def of(self, items: Sequence[str]) -> Floats:
        """(D, N) scores in the order of the draws."""
        rows = [[self.draws[draw][i] for i in items] for draw in sorted(self.draws)]
        return np.array(rows, dtype=np.float64)


def _table(curve: _Curve, arm: str, size: int, noise: float) -> _Table | None:
    """An arm's scores at a size; an arm without labels has the same everywhere."""
    places = curve.places.get((arm, size, noise)) or curve.places.get((arm, 0, 0.0)) or ()
    scores = curve.scores(places)
    draws: dict[int, dict[str, list[float]]] = {}
    for (draw, _), by_item in scores.items():
        for item_id, score in by_item.items():
            draws.setdefault(draw, {}).setdefault(item_id, []).append(score)
    if not draws:
        return None
    return _Table(draws={d: {i: fmean(v) for i, v in own.items()} for d, own in draws.items()})


def _answers(curve: _Curve) -> dict[str, dict[str, list[str | None]]]:
    """Arm -> test item -> the answers of its runs with most labels and without noise."""
    largest = max((size for _, size, _ in curve.places), default=0)
    answers: dict[str, dict[str, list[str | None]]] = {}
    for (arm, size, noise), places in curve.places.items():
        if noise or size not in (0, largest):
            continue
        for place in (place for place in places if place.records in curve.runs):
            name = place.records
            with_calibration = is_arm_calibrated(curve.records, name)
            for request in answered_requests(curve.records, name, set_name="test"):
                final = request.final
                answer = final.calibrated_answer if with_calibration else final.answer
                answers.setdefault(arm, {}).setdefault(final.item_id, []).append(answer)
    return answers
