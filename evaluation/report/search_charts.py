"""The charts of searches: learning rates, best so far against cost, losses of trials (pure)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from conf.records import Measured, TrainRecord
from conf.results import Results
from conf.search_results import SearchResult, SettingResult
from evaluation import wording
from evaluation.decision.rules import family
from evaluation.records.run_records import RunRecords
from evaluation.report.charts import Chart, Series, percent
from evaluation.search.values import is_number, last_name

RATE = "learning_rate"
MAX_LINES = 60  # of losses: more cannot be told apart


def search_charts(results: Results, records: RunRecords) -> list[Chart]:
    """The charts of all searches that have something to show."""
    charts = [learning_rate_chart(results), best_so_far_chart(results)]
    charts += [loss_chart(name, results, records) for name in results.searches]
    return [chart for chart in charts if chart.series]


def metric_axis(search: SearchResult) -> str:
    """The title of an axis with the search's metric."""
    if search.metric == "minus_loss":
        return "minus the loss on validation (nats per target token)"
    return f"{wording.metric(search.metric or 'metric')} on validation (%)"


def scaled(value: float | None, search: SearchResult) -> float | None:
    """A value in the unit of its axis: a share in percent."""
    return value if search.metric == "minus_loss" else percent(value)


def place_of_rung(search: SearchResult, rung: int | None) -> str:
    """Where a rung lies: 'after 7 steps', 'on 15 items'."""
    at = search.rungs.get(str(rung))
    if at is None:
        return "at no rung"
    unit = search.totals.unit if at != 1 else search.totals.unit.removesuffix("s")
    return f"{'after' if search.totals.unit == 'steps' else 'on'} {at} {unit}"


def _alike(results: Results) -> list[tuple[int, SearchResult]]:
    """The searches judged by the metric of the first one, with their numbers within a family."""
    first = next((s.metric for s in results.searches.values() if s.metric), None)
    seen: dict[str, int] = defaultdict(int)
    found = []
    for name, search in results.searches.items():
        if search.metric == first and first is not None:
            kind = family(results.arms[name])
            found.append((seen[kind], search))
            seen[kind] += 1
    return found


def learning_rate_chart(results: Results) -> Chart:
    """Value against learning rate: all settings at one early rung, and those that came furthest."""
    series: list[Series] = []
    axis = ""
    for order, search in _alike(results):
        axis = axis or metric_axis(search)
        kind = family(results.arms[search.arm])
        common, early = _at_common_rung(search)
        last = max((s.rung for s in search.settings if s.rung is not None), default=None)
        done = [(s, s.value) for s in search.settings if s.rung == last]
        if common != last:
            name = f"{search.arm}, {place_of_rung(search, common)}"
            series += _rate_series(name, kind, order, early, search, style="hollow")
        name = f"{search.arm}, {place_of_rung(search, last)}"
        series += _rate_series(name, kind, order, done, search, style="joined")
    return Chart(
        name="search_learning_rate",
        title="Learning rates that were searched",
        x_title="learning rate (log scale)",
        y_title=axis,
        series=tuple(series),
        caption="One point is one setting, replicates pooled; bars are 95% intervals over the"
        " items. Hollow: the last rung that all settings came to. Other fields differ between"
        " points of one rate.",
        is_x_log=True,
        section="search",
    )


def _at_common_rung(
    search: SearchResult,
) -> tuple[int | None, list[tuple[SettingResult, Measured]]]:
    """The last rung at which all settings that did not fail were scored, and all values there."""
    reached = [s.rung for s in search.settings if s.status != "failed" and s.rung is not None]
    rung = min(reached, default=None)
    return rung, [(s, r.value) for s in search.settings for r in s.rungs if r.rung == rung]


def _rate_series(
    name: str,
    kind: str,
    order: int,
    points: Iterable[tuple[SettingResult, Measured]],
    search: SearchResult,
    *,
    style: str,
) -> list[Series]:
    """One series, by rate; none where fewer than two rates were searched."""
    rated = [(rate, m) for s, m in points if (rate := rate_of(s)) and m.value is not None]
    rated.sort(key=lambda pair: pair[0])
    if len({rate for s in search.settings if (rate := rate_of(s))}) < 2 or not rated:
        return []
    is_line = style == "joined" and len({rate for rate, _ in rated}) == len(rated) > 1
    return [
        Series(
            name=name,
            family=kind,
            order=order,
            x=tuple(rate for rate, _ in rated),
            y=tuple(scaled(m.value, search) or 0.0 for _, m in rated),
            low=tuple(scaled(m.low, search) for _, m in rated),
            high=tuple(scaled(m.high, search) for _, m in rated),
            style=style if is_line or style == "hollow" else "points",
        )
    ]


def rate_of(setting: SettingResult) -> float | None:
    """The learning rate of a setting, where it was searched."""
    for field, value in setting.values.items():
        if last_name(field) == RATE and is_number(value) and value > 0:
            return float(value)
    return None


def best_so_far_chart(results: Results) -> Chart:
    """The best setting at each rung against what the search had spent by then."""
    searches = _alike(results)
    is_priced = bool(searches) and all(s.totals.usd is not None for _, s in searches)
    series = []
    for order, search in searches:
        points = search.best_so_far
        if len(points) < 2:
            continue
        series.append(
            Series(
                name=search.arm,
                family=family(results.arms[search.arm]),
                order=order,
                x=tuple(float((p.usd if is_priced else p.device_seconds) or 0.0) for p in points),
                y=tuple(scaled(p.value.value, search) or 0.0 for p in points),
                low=tuple(scaled(p.value.low, search) for p in points),
                high=tuple(scaled(p.value.high, search) for p in points),
                style="joined",
            )
        )
    unit = "USD" if is_priced else "device-seconds"
    return Chart(
        name="search_best_so_far",
        title="Best setting so far against what the search had spent",
        x_title=f"spent by all trials ({unit})",
        y_title=metric_axis(searches[0][1]) if searches else "",
        series=tuple(series),
        caption="One point is one rung: the best of the settings scored there, and what all trials"
        " had spent up to it. Rungs differ in training or in items, so a point may lie below the"
        " one before. The best of several flatters: the test items took no part.",
        section="search",
    )


def loss_chart(arm: str, results: Results, records: RunRecords) -> Chart:
    """Training loss of every trial by step; the chosen one stands out."""
    search, found = results.searches[arm], records.arms[arm].search
    by_trial: dict[int, list[TrainRecord]] = defaultdict(list)
    for step in found.steps if found is not None else ():
        by_trial[step.trial or 0].append(step)
    chosen = search.choice.trials[0] if search.choice is not None else None
    labels = {t.trial: _label(search, t.setting, t.seed, t.draw) for t in search.trials}
    numbers = sorted(by_trial)[:MAX_LINES]
    numbers = [n for n in numbers if n != chosen] + [n for n in (chosen,) if n in by_trial]
    return Chart(
        name=f"search_loss_{arm}",
        title=f"Training loss of the trials of {arm}",
        x_title="optimizer steps",
        y_title="loss (nats per target token)",
        series=tuple(
            _loss_series(
                labels.get(n, f"trial {n}"),
                sorted(by_trial[n], key=lambda r: r.step),
                kind=family(results.arms[arm]),
                is_chosen=n == chosen,
            )
            for n in numbers
            if n is not None
        ),
        caption=f"{len(numbers)} of {len(by_trial)} trials, one line each; a line that ends early"
        " was dropped or failed." + ("" if chosen is None else " In colour: the chosen one."),
        section=f"search/{arm}",
    )


def _label(search: SearchResult, setting: int, seed: int, draw: int) -> str:
    own = next(s.label for s in search.settings if s.setting == setting)
    return " ".join([own, *(f"+{n}={i}" for n, i in (("seed", seed), ("draw", draw)) if i)])


def _loss_series(name: str, steps: Sequence[TrainRecord], *, kind: str, is_chosen: bool) -> Series:
    return Series(
        name=name,
        family=kind,
        order=0,
        x=tuple(float(r.step) for r in steps),
        y=tuple(r.loss for r in steps),
        style="line" if is_chosen else "faint",
    )
