"""What a search had spent after each rung, and the best it knew then (pure).

Values of different rungs do not compare, so there is one point for each rung: the best setting
there by the metric that the search chose by, and what all trials had spent up to it. A step
belongs to the first rung of its trial that it leads to; a trial that failed on the way spent what
it did on the next one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from conf.records import Measured
from conf.search_results import SearchPoint
from conf.sweep_records import RungRecord
from evaluation.records.search_records import SearchRecords
from evaluation.statistics import mean_interval


def pooled(records: Sequence[RungRecord]) -> Measured:
    """The value of a setting at a rung: the mean over replicates, its interval over the items."""
    known = [r.value.value for r in records if r.value.value is not None]
    if not known or len(known) < len(records):
        return Measured()
    if not all(r.per_item for r in records):
        return records[0].value if len(records) == 1 else Measured(value=fmean(known))
    per_item = [fmean(values) for values in zip(*(r.per_item for r in records), strict=True)]
    return mean_interval(per_item, is_share=records[0].metric != "minus_loss")


def best_so_far(
    search: SearchRecords, *, usd_per_device_second: float | None
) -> tuple[SearchPoint, ...]:
    """A point for each rung, lowest first; tokens and device-seconds of training and scoring."""
    tokens, seconds = _spent_by_rung(search)
    setting_of = {t.trial: t.setting for t in search.trials}
    points = []
    so_far_tokens, so_far_seconds = 0, 0.0
    for rung in sorted({r.rung for r in search.rungs}):
        so_far_tokens += tokens[rung]
        so_far_seconds += seconds[rung]
        by_setting: dict[int, list[RungRecord]] = defaultdict(list)
        for record in search.rungs:
            if record.rung == rung:
                by_setting[setting_of.get(record.trial, record.trial)].append(record)
        values = {setting: pooled(records) for setting, records in by_setting.items()}
        best = _best(values, by_setting, search)
        if best is None:
            continue
        price = usd_per_device_second
        points.append(
            SearchPoint(
                rung=rung,
                num_settings=len(values),
                setting=best,
                value=values[best],
                tokens=so_far_tokens,
                device_seconds=so_far_seconds,
                usd=None if price is None else so_far_seconds * price,
            )
        )
    return tuple(points)


def _best(
    values: Mapping[int, Measured],
    records: Mapping[int, Sequence[RungRecord]],
    search: SearchRecords,
) -> int | None:
    """The setting with the largest value; of equals the one that the search would choose."""
    chosen = None if search.choice is None else search.choice.setting

    def rank(setting: int) -> tuple[float, ...]:
        ties = [r.tie_break for r in records[setting] if r.tie_break is not None]
        value = values[setting].value
        assert value is not None, "only settings with a value are ranked"
        return (value, fmean(ties) if ties else 0.0, float(setting == chosen), -setting)

    known = [setting for setting, m in values.items() if m.value is not None]
    return max(known, key=rank, default=None)


def _spent_by_rung(search: SearchRecords) -> tuple[dict[int, int], dict[int, float]]:
    """Rung -> tokens and device-seconds of the steps that lead to it and of its scoring."""
    tokens: dict[int, int] = defaultdict(int)
    seconds: dict[int, float] = defaultdict(float)
    rungs: dict[int, list[RungRecord]] = defaultdict(list)
    for record in search.rungs:
        rungs[record.trial].append(record)
        tokens[record.rung] += record.tokens
        seconds[record.rung] += record.device_seconds
    last = max((r.rung for r in search.rungs), default=0)
    for step in search.steps:
        assert step.trial is not None, "steps of a search are steps of a trial"
        rung = _leads_to(step.step, rungs[step.trial], last=last)
        tokens[rung] += step.tokens
        seconds[rung] += step.device_seconds
    return tokens, seconds


def _leads_to(step: int, rungs: Sequence[RungRecord], *, last: int) -> int:
    """The first rung of a trial at or after a step; behind its last one, the rung after that."""
    following = [r.rung for r in rungs if r.step >= step]
    if following:
        return min(following)
    return min(max((r.rung for r in rungs), default=-1) + 1, last)
