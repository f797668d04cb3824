"""The tables and sentences of searches, for HTML, Markdown and the terminal alike (pure)."""

from __future__ import annotations

from collections.abc import Mapping

from conf.records import Measured
from conf.results import Results
from conf.search_results import DecisionResult, FieldResult, SearchResult, SettingResult
from evaluation import wording
from evaluation.report.search_charts import place_of_rung
from evaluation.report.tables import SimpleTable
from evaluation.search.values import last_name, shown_value


def value_text(measured: Measured, search: SearchResult) -> str:
    """A value of the search's metric with its interval and the items behind it."""
    if measured.value is None:
        return wording.UNKNOWN
    if search.metric != "minus_loss":
        text = wording.share_with_interval(measured)
    elif measured.low is None or measured.high is None:
        text = f"{measured.value:.4g}"
    else:
        text = f"{measured.value:.4g} ({measured.low:.4g} to {measured.high:.4g})"
    return text if measured.n is None else f"{text}, n = {measured.n}"


def lead(search: SearchResult) -> list[str]:
    """What was searched, what came of it, and what it took."""
    fields = wording.joined([last_name(f.field) for f in search.fields])
    totals, chosen = search.totals, search.chosen
    searched = f"Searched: {fields or 'nothing that ended'}; {_counted(totals.settings, 'setting')}"
    searched += f", {_counted(totals.trials, 'trial')}."
    sentences = [searched, _cost_sentence(search)]
    if search.choice is None or chosen is None:
        return [*sentences, "The search did not end, so nothing was chosen."]
    sentences.insert(
        1,
        f"Chosen: {chosen.label}. {wording.capitalised(wording.metric(search.choice.metric))} on"
        f" validation: {value_text(search.choice.value, search)},"
        f" {place_of_rung(search, search.choice.rung)}. It is the best of several there, which"
        " flatters it: the table of arms has its score on the test items, which took no part.",
    )
    close = [s.label for s in search.settings if s.is_told_apart is False]
    if close:
        sentences.insert(
            2,
            f"Not told apart from it on these items: {wording.joined(close)}. The paired"
            " differences could be 0, all looked at together at 95%.",
        )
    return sentences


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _cost_sentence(search: SearchResult) -> str:
    totals = search.totals
    text = f"It took {wording.count(totals.tokens)} tokens"
    text += f", {wording.seconds(totals.device_seconds)} of a device"
    text += f", {wording.usd(totals.usd)} USD" if totals.usd is not None else ""
    text += f", {totals.taken:,} {totals.unit}"
    if totals.full is None or totals.share_of_grid is None:
        return text + "; what all trials to the end would have taken was not counted."
    share = wording.percent(totals.share_of_grid, digits=0)
    return text + f": {share} of the {totals.full:,} of all trials to the end."


def settings_table(search: SearchResult) -> SimpleTable:
    """All settings, the best first."""
    fields = list(dict.fromkeys(name for s in search.settings for name in s.values))
    has_replicates = any(max(s.seeds, s.draws) > 1 for s in search.settings)
    has_weights = any(s.trained_parameters for s in search.settings)
    headings = ["place", *map(last_name, fields), "status", "judged", "value on validation"]
    headings += ["replicates"] if has_replicates else []
    headings += ["trained parameters"] if has_weights else []
    rows = []
    for s in search.settings:
        row = [str(s.place), *(_field_text(s, name) for name in fields)]
        row += [_status(s), place_of_rung(search, s.rung), value_text(s.value, search)]
        row += [_replicates(s, search)] if has_replicates else []
        row += [wording.count(s.trained_parameters)] if has_weights else []
        row += [wording.count(s.tokens), wording.seconds(s.device_seconds), wording.usd(s.usd)]
        rows.append(tuple(row))
    return SimpleTable(
        headings=(*headings, "tokens", "device time", "USD"),
        rows=tuple(rows),
        note="Best first: by the rung reached, then by the value there. Values of different rungs"
        " do not compare. Intervals are 95%, over the items; replicates are averaged before."
        " What a setting cost holds its training and all its scoring.",
    )


def _field_text(setting: SettingResult, name: str) -> str:
    return shown_value(setting.values[name]) if name in setting.values else "-"


def _status(setting: SettingResult) -> str:
    if setting.status == "failed":
        return f"failed: {wording.first_line(setting.reason, limit=80)}"
    return "done, not told apart" if setting.is_told_apart is False else setting.status


def _replicates(setting: SettingResult, search: SearchResult) -> str:
    """Their number and spread."""
    counts = [(setting.seeds, "seeds"), (setting.draws, "draws")]
    text = ", ".join(f"{n} {name}" for n, name in counts if n > 1) or "1"
    values = setting.replicate_values
    if len(values) < 2:
        return text
    if search.metric == "minus_loss":
        return f"{text}: {min(values):.4g} to {max(values):.4g}"
    return f"{text}: {wording.span(min(values), max(values))}"


def decisions_table(search: SearchResult) -> SimpleTable:
    """What each rung did."""
    return SimpleTable(
        headings=("rung", "judged", "trials", "went on", "dropped", "failed", "ranks as before"),
        rows=tuple(_decision_row(d, search) for d in search.decisions),
        note="Ranks as before: Spearman's correlation of the settings' order with that of the rung"
        " before, its 95% interval, and n settings. The first rung only watches; one at which ranks"
        " had changed too much drops nobody.",
    )


def _decision_row(d: DecisionResult, search: SearchResult) -> tuple[str, ...]:
    note = " (grace: ranks had changed)" if d.is_grace else ""
    return (
        str(d.rung),
        place_of_rung(search, d.rung),
        str(len(d.keep) + len(d.drop) + len(d.failed)),
        f"{len(d.keep)}{note}",
        str(len(d.drop)),
        str(len(d.failed)),
        correlation_text(d.correlation),
    )


def correlation_text(m: Measured) -> str:
    """0.31 (-0.52 to 0.84), n = 8."""
    if m.value is None:
        return "-"
    ends = "" if m.low is None or m.high is None else f" ({m.low:.2f} to {m.high:.2f})"
    return f"{m.value:.2f}{ends}, n = {m.n}"


def importance_table(search: SearchResult) -> SimpleTable:
    """How much of the order each field explains."""
    return SimpleTable(
        headings=("field", "values tried", "explains of the order", "by chance up to", "p", "n"),
        rows=tuple(_field_row(f) for f in search.fields),
        note="Share of the variance of the settings' ranks that lies between the field's values,"
        " adjusted for their number (epsilon squared); a number with more than four values is split"
        " into thirds. By chance: 95% of 2,000 shufflings stay below. One field at a time: what"
        " fields do together is not seen, and few settings tell little.",
    )


def _field_row(f: FieldResult) -> tuple[str, ...]:
    p_value = "< 0.001" if f.p_value is not None and f.p_value < 0.001 else f"{f.p_value or 0:.3f}"
    return (
        f.field,
        str(f.num_values),
        wording.percent(f.share, digits=0),
        wording.percent(f.chance_high, digits=0),
        wording.UNKNOWN if f.p_value is None else p_value,
        str(f.n),
    )


def searches_table(searches: Mapping[str, SearchResult]) -> SimpleTable:
    """Searches side by side: what each chose and took. searches: by the name that is shown."""
    rows = []
    for name, search in searches.items():
        totals, chosen = search.totals, search.chosen
        rows.append(
            (
                name,
                chosen.label if chosen else "none: the search did not end",
                value_text(search.choice.value, search) if search.choice else wording.UNKNOWN,
                str(totals.settings),
                str(totals.trials),
                wording.count(totals.tokens),
                wording.seconds(totals.device_seconds),
                wording.usd(totals.usd),
                wording.percent(totals.share_of_grid, digits=0),
            )
        )
    return SimpleTable(
        headings=(
            *("arm", "chosen setting", "value on validation", "settings", "trials"),
            *("tokens", "device time", "USD", "of the whole grid"),
        ),
        rows=tuple(rows),
        note="The value is the best of several and flatters; pairs are on test items. Of the whole"
        " grid: steps or items taken, of all trials to the end.",
    )


def chosen_labels(results: Results) -> dict[str, str]:
    """Arm -> the setting its search chose."""
    return {n: s.chosen.label for n, s in results.searches.items() if s.chosen is not None}
