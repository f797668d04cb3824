"""What results.json says of a search, against counts by hand and closed forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from conf.hashing import plain
from conf.records import JournalEvent, Measured, to_dict
from conf.search_results import SearchResult
from conf.sweep_records import SEARCH_EVENTS, RungRecord, SweepChoice, TrialRecord
from evaluation.records.run_records import RunRecords, read_run
from evaluation.records.search_records import SearchRecords, search_records
from evaluation.results.summary import summarise
from evaluation.search.importance import groups_of, importance
from evaluation.search.progress import pooled
from evaluation.search.summary import rank_correlation, summarise_search
from evaluation.search.values import label_of, shown_value, without_texts
from evaluation.statistics import mean_interval
from tests.evaluation import fake_search

PRICE = 1e-5


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    return read_run(fake_search.write_searched_run(tmp_path_factory.mktemp("searched")))


@pytest.fixture(scope="module")
def lora(records: RunRecords) -> tuple[SearchRecords, SearchResult]:
    search = records.arms["lora"].search
    assert search is not None
    result = summarise_search(
        "lora", search, usd_per_device_second=PRICE, space=fake_search.LORA_SPACE
    )
    return search, result


def test_every_setting_has_its_replicates_costs_and_the_value_of_its_last_common_rung(
    lora: tuple[SearchRecords, SearchResult],
) -> None:
    search, result = lora
    assert len(result.settings) == 8 and len(result.trials) == 16
    assert [s.place for s in result.settings] == list(range(1, 9))
    for s in result.settings:
        own = [t for t in search.trials if t.setting == s.setting]
        assert (s.seeds, s.draws) == (2, 1) == (len({t.seed for t in own}), 1)
        assert s.tokens == sum(t.tokens for t in own)
        assert s.device_seconds == pytest.approx(sum(t.device_seconds for t in own))
        assert s.usd == pytest.approx(PRICE * s.device_seconds)
        at = [r for r in search.rungs if r.rung == s.rung and r.trial in {t.trial for t in own}]
        by_item = [(a + b) / 2 for a, b in zip(*(r.per_item for r in at), strict=True)]
        assert s.value == mean_interval(by_item, is_share=True) and s.value.n == 48
        assert s.replicate_values == tuple(r.value.value for r in at)
        assert s.rungs[-1].value == s.value and s.rungs[-1].rung == s.rung


def test_the_best_is_first_the_failed_last_and_the_chosen_has_the_choices_value(
    lora: tuple[SearchRecords, SearchResult],
) -> None:
    _, result = lora
    assert result.choice is not None and result.chosen is result.settings[0]
    assert result.settings[0].setting == result.choice.setting
    assert result.settings[0].value == result.choice.value
    assert result.settings[-1].status == "failed" and result.settings[-1].rung is not None
    order = [(s.rung, s.value.value) for s in result.settings[1:-1]]
    assert order == sorted(order, key=lambda pair: (-(pair[0] or 0), -(pair[1] or 0)))
    told = {s.setting: s.is_told_apart for s in result.settings}
    assert told.pop(result.choice.setting) is None
    compared = {s for s, is_told in told.items() if is_told is not None}
    assert {s for s in compared if not told[s]} == set(result.choice.not_told_apart)


def test_totals_are_the_sum_of_trials_and_the_share_is_of_all_to_the_end(
    lora: tuple[SearchRecords, SearchResult],
) -> None:
    search, result = lora
    totals = result.totals
    assert (totals.settings, totals.trials, totals.unit) == (8, 16, "steps")
    assert totals.tokens == sum(t.tokens for t in search.trials)
    assert totals.tokens == sum(r.tokens for r in (*search.rungs, *search.steps))
    assert totals.taken == len(search.steps) and totals.full == 16 * 50
    assert totals.share_of_grid == pytest.approx(len(search.steps) / 800)
    assert result.rungs == {"0": 4, "1": 7, "2": 21, "3": 50}


def test_a_prompts_share_counts_items(records: RunRecords) -> None:
    search = records.arms["few_shot"].search
    assert search is not None
    totals = summarise_search("few_shot", search, usd_per_device_second=None).totals
    # 6 prompts to rung 1 (5 items), 2 to rung 2 (16), 1 to the end (48).
    assert (totals.taken, totals.full, totals.unit) == (4 * 5 + 16 + 48, 6 * 48, "items")
    assert totals.usd is None


def test_what_all_to_the_end_would_take_is_unknown_where_the_steps_were_searched(
    lora: tuple[SearchRecords, SearchResult],
) -> None:
    search, _ = lora
    trials = [replace(t, values={**t.values, "trainer.epochs": t.setting}) for t in search.trials]
    result = summarise_search(
        "lora", replace(search, trials=tuple(trials)), usd_per_device_second=None
    )
    assert result.totals.full is None and result.totals.share_of_grid is None
    assert result.totals.taken == len(search.steps)


def test_best_so_far_is_the_best_of_each_rung_at_what_all_had_spent(
    lora: tuple[SearchRecords, SearchResult],
) -> None:
    search, result = lora
    setting = {t.trial: t.setting for t in search.trials}
    for point in result.best_so_far:
        at = [r for r in search.rungs if r.rung == point.rung]
        by_setting: dict[int, list[RungRecord]] = {}
        for r in at:
            by_setting.setdefault(setting[r.trial], []).append(r)
        best = max(pooled(rs).value or 0.0 for rs in by_setting.values())
        assert point.value.value == best and point.num_settings == len(by_setting)
        # The failing trial takes 2 steps towards rung 1, where the others took 3.
        trained = sum(1 for s in search.steps if s.step <= fake_search.STEPS[point.rung])
        scored = sum(r.tokens for r in search.rungs if r.rung <= point.rung)
        assert point.tokens == trained * fake_search.STEP_TOKENS + scored
        assert point.usd == pytest.approx(PRICE * point.device_seconds)
    assert result.best_so_far[-1].tokens == result.totals.tokens
    assert result.choice is not None
    assert result.best_so_far[-1].setting == result.choice.setting


def test_a_search_that_did_not_end_has_its_rungs_and_its_bill(records: RunRecords) -> None:
    search = records.arms["lora"].search
    assert search is not None
    result = summarise_search(
        "lora", replace(search, trials=(), choice=None), usd_per_device_second=PRICE
    )
    assert result.settings == () and result.choice is None and result.chosen is None
    assert result.totals.trials == 16 and result.totals.full is None
    assert result.totals.tokens == sum(r.tokens for r in (*search.rungs, *search.steps))
    assert len(result.decisions) == 4 and len(result.best_so_far) == 4


def test_a_search_that_was_stopped_has_its_settings_as_of_its_last_rung(
    records: RunRecords,
) -> None:
    search = records.arms["lora"].search
    assert search is not None
    rungs = tuple(r for r in search.rungs if r.rung <= 1)
    steps = tuple(s for s in search.steps if s.step <= fake_search.STEPS[1] + 3)
    live = set(search.decisions[1].keep)
    rows = tuple(
        replace(t, status="unfinished", rung=1, steps=fake_search.STEPS[1], tokens=1234)
        if t.trial in live
        else t
        for t in search.trials
    )
    stopped = replace(
        search, rungs=rungs, steps=steps, decisions=search.decisions[:2], trials=rows, choice=None
    )
    result = summarise_search("lora", stopped, usd_per_device_second=PRICE)
    assert len(result.settings) == 8 and result.chosen is None
    status = {s.setting: s.status for s in result.settings}
    assert {status[t.setting] for t in rows if t.trial in live} == {"unfinished"}
    assert "dropped" in status.values()
    first = result.settings[0]
    assert first.status == "unfinished" and first.rung == 1 and first.value.n == 48
    assert first.values and first.tokens == 2 * 1234 and first.is_told_apart is None
    # What it took holds the steps after that rung, which the rows do not know of.
    assert result.totals.tokens == sum(r.tokens for r in (*rungs, *steps))
    assert result.totals.taken == len(steps) and result.totals.full is None


def test_of_several_rows_of_a_trial_the_last_counts(records: RunRecords) -> None:
    search = records.arms["lora"].search
    assert search is not None
    early = replace(search.trials[3], status="unfinished", rung=0, steps=1)
    events = [
        JournalEvent(time=1.0, event=SEARCH_EVENTS[TrialRecord], arm="lora", data=plain(row))
        for row in (search.trials[0], early, search.trials[3])
    ]
    found = search_records(events, steps=())
    assert found is not None and found.trials == (search.trials[0], search.trials[3])


def test_log_fields_are_those_drawn_so_and_those_over_three_doublings(
    lora: tuple[SearchRecords, SearchResult],
) -> None:
    fields = {f.field: f for f in lora[1].fields}
    assert fields["trainer.learning_rate"].is_log
    assert not fields["lora_rank"].is_log and not fields["trainer.schedule"].is_log
    assert {f.n for f in fields.values()} == {8}


# --- Field importance -----------------------------------------------------------------------------


def test_importance_is_epsilon_squared_with_a_permutation_test() -> None:
    values, ranks = ["a", "a", "b", "b", "b"], [1.0, 2.0, 4.0, 3.0, 5.0]

    def epsilon(order: tuple[float, ...]) -> float:
        a, b = order[:2], order[2:]
        within = sum((x - sum(a) / 2) ** 2 for x in a) + sum((x - sum(b) / 3) ** 2 for x in b)
        return 1 - (within / 3) / (10 / 4)

    found = importance(values, ranks)
    assert found.share == pytest.approx(epsilon(tuple(ranks)))
    every = [epsilon(order) for order in permutations(ranks)]
    exact = sum(e >= epsilon(tuple(ranks)) - 1e-9 for e in every) / len(every)
    assert found.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / 2000))
    high = sorted(every)[int(0.95 * len(every))]
    assert found.chance_high == pytest.approx(high, abs=0.01)


def test_a_field_that_decides_everything_stands_out_and_a_peak_in_the_middle_is_seen() -> None:
    rates = [10 ** (-5 + i / 4) for i in range(15)]
    by_distance = sorted(range(15), key=lambda i: abs(i - 7))
    ranks = [float(by_distance.index(i) + 1) for i in range(15)]
    peaked = importance(rates, ranks)
    noise = importance([i % 2 for i in range(15)], ranks)
    assert peaked.share is not None and peaked.share > 0.5
    assert peaked.p_value is not None and peaked.p_value < 0.01
    assert noise.p_value is not None and noise.p_value > 0.05 and (noise.share or 0) < 0.2


@pytest.mark.parametrize(
    ("values", "ranks"),
    [
        ([1, 2, 1, 2], [1.0, 2.0, 3.0, 4.0]),  # four settings
        (["x"] * 8, [float(i) for i in range(8)]),  # one value
        (["a", "b", "c", "d", "e"], [1.0, 2.0, 3.0, 4.0, 5.0]),  # a value each
        ([1, 1, 2, 2, 2], [3.0] * 5),  # all failed
        ([], []),
    ],
)
def test_too_little_to_tell_is_unknown(values: list[object], ranks: list[float]) -> None:
    found = importance(values, ranks)
    assert found.share is None and found.p_value is None and found.chance_high is None


def test_many_numbers_are_split_into_thirds_with_equals_together() -> None:
    assert groups_of([6, 1, 2, 3, 4, 5]) == [2, 0, 0, 1, 1, 2]
    groups = groups_of([1, 1, 1, 1, 2, 3, 4, 5, 6])
    assert len({g for g, v in zip(groups, [1, 1, 1, 1, 2, 3, 4, 5, 6], strict=True) if v == 1}) == 1
    assert groups_of([True, False, True]) == [0, 1, 0] and groups_of([1, 1.5, None]) == [0, 1, 2]


@pytest.mark.parametrize(("value", "n"), [(0.5, 12), (-0.3, 40), (0.0, 5)])
def test_a_correlations_interval_is_bonett_and_wrights(value: float, n: int) -> None:
    found = rank_correlation(value, n=n)
    half = 1.959964 * math.sqrt((1 + value**2 / 2) / (n - 3))
    assert found.low == pytest.approx(math.tanh(math.atanh(value) - half), abs=1e-6)
    assert found.high == pytest.approx(math.tanh(math.atanh(value) + half), abs=1e-6)


def test_too_few_or_perfect_ranks_have_no_interval() -> None:
    assert rank_correlation(-1.0, n=9) == Measured(value=-1.0, n=9)
    assert rank_correlation(0.5, n=3) == Measured(value=0.5, n=3)
    assert rank_correlation(None, n=0) == Measured()


# --- Values and files -----------------------------------------------------------------------------


def test_texts_are_numbered_as_they_come_and_the_rest_stays() -> None:
    every = [
        {"instruction": "Say.", "num_shots": 2, "prompt": "few_shot"},
        {"instruction": "Tell me now.", "num_shots": 4, "prompt": "few_shot"},
        {"instruction": "Say.", "num_shots": 8, "prompt": "my own prompt"},
    ]
    safe = without_texts(every)
    assert [v["instruction"] for v in safe] == ["instruction 1", "instruction 2", "instruction 1"]
    assert [v["num_shots"] for v in safe] == [2, 4, 8]
    assert [v["prompt"] for v in safe] == ["few_shot", "few_shot", "prompt 1"]
    assert label_of(safe[0]) == 'instruction="instruction 1" num_shots=2 prompt=few_shot'
    assert [shown_value(v) for v in (3.42e-4, 0.5, 16, True, None)] == [
        *("3.42e-4", "0.5", "16", "true", "null")
    ]


def test_results_json_holds_searches_and_a_run_without_text_has_none(tmp_path: Path) -> None:
    for text in ("full", "none"):
        run = read_run(fake_search.write_searched_run(tmp_path / text, text=text))
        written = json.dumps(to_dict(summarise(run)), allow_nan=False)
        found = json.loads(written)["searches"]
        assert set(found) == {"few_shot", "lora"}
        assert ("Ham or spam?" in json.dumps(found)) == (text == "full")
        assert ("instruction 2" in json.dumps(found)) == (text == "none")


def test_a_run_without_a_search_has_none(records: RunRecords) -> None:
    arms = {n: replace(a, search=None) for n, a in records.arms.items()}
    assert summarise(replace(records, arms=arms)).searches == {}


def test_all_trials_failed() -> None:
    trials = tuple(
        TrialRecord(
            arm="a",
            trial=i,
            setting=i,
            seed=0,
            draw=0,
            label="",
            values={"x": i},
            status="failed",
            reason="no",
        )
        for i in range(3)
    )
    result = summarise_search("a", SearchRecords(trials=trials), usd_per_device_second=None)
    assert [s.status for s in result.settings] == ["failed"] * 3 and result.best_so_far == ()
    assert all(s.value == Measured() and s.rung is None for s in result.settings)


def test_a_failed_setting_is_last_however_far_it_came(
    lora: tuple[SearchRecords, SearchResult],
) -> None:
    search, _ = lora
    assert search.choice is not None
    last = [t.setting for t in search.trials if t.rung == search.choice.rung]
    failed = last[0]
    trials = [
        replace(t, status="failed", reason="no") if t.setting == failed else t
        for t in search.trials
    ]
    found = summarise_search(
        "lora", replace(search, trials=tuple(trials), choice=None), usd_per_device_second=None
    )
    assert {s.setting for s in found.settings[-2:]} == {failed, 7}
    assert [s.status for s in found.settings[-2:]] == ["failed", "failed"]


def test_of_equal_settings_the_last_point_is_the_chosen_one() -> None:
    rungs = tuple(
        RungRecord(
            arm="a",
            trial=t,
            rung=0,
            step=0,
            metric="accuracy",
            value=Measured(value=0.5, n=2),
            per_item=(0.0, 1.0),
        )
        for t in range(3)
    )
    trials = tuple(
        TrialRecord(arm="a", trial=i, setting=i, seed=0, draw=0, label="", values={"x": i}, rung=0)
        for i in range(3)
    )
    choice = SweepChoice(
        arm="a",
        setting=2,
        trials=(2,),
        rung=0,
        metric="accuracy",
        value=Measured(value=0.5, n=2),
        trained_parameters=0,
    )
    records = SearchRecords(rungs=rungs, trials=trials, choice=choice)
    result = summarise_search("a", records, usd_per_device_second=None)
    assert result.best_so_far[-1].setting == 2
    assert [s.setting for s in result.settings] == [2, 0, 1]
