"""A run's pairs and means by how its items were come by, and what its tables say of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from conf.run_groups import DecisionConfig
from evaluation.records.run_records import RunRecords, read_run
from evaluation.report.pair_words import pairs_note, test_cells
from evaluation.results.item_intervals import ItemRule
from evaluation.results.summary import summarise
from evaluation.statistics import paired_difference, wilson
from evaluation.statistics.variance import split_variance
from tests.evaluation.fake_run import write_spam_run

test_cells.__test__ = False  # type: ignore[attr-defined]
A = {str(k): float(k % 10 != 0) for k in range(120)}
B = {str(k): float(k % 3 != 0) for k in range(120)}
PASSAGES = {str(k): str(k // 6) for k in range(120)}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    return read_run(write_spam_run(tmp_path_factory.mktemp("run"), num_test=120))


def test_a_fixed_number_of_independent_items() -> None:
    pair = ItemRule(confidence=0.95).pair(("a", "b"), A, B, margin=0.02)
    expected = paired_difference(list(A.values()), list(B.values()))
    assert pair.method == "fixed_n" and pair.p_value == expected.p_value
    assert (pair.e_value, pair.num_sources) == (None, None)
    assert ItemRule(confidence=0.95).mean(A) == wilson(108, 120)
    assert test_cells(pair)[0] == "< 0.001" and "McNemar" in pairs_note([pair])


def test_items_that_share_sources() -> None:
    rule = ItemRule(confidence=0.95, sources=PASSAGES)
    pair = rule.pair(("a", "b"), A, B, margin=0.02)
    assert (pair.method, pair.num_sources, pair.n, rule.largest) == ("clustered", 20, 120, 6)
    assert pair.p_value is not None and "sources (20 in all)" in pairs_note([pair])


@pytest.mark.parametrize("sources", [None, PASSAGES])
def test_a_run_that_looked_has_sequences_only(sources: dict[str, str] | None) -> None:
    rule = ItemRule(confidence=0.95, sources=sources, num_arms=3, is_sequential=True)
    pair = rule.pair(("a", "b"), A, B, margin=0.02)
    fixed = ItemRule(confidence=0.95, sources=sources).pair(("a", "b"), A, B, margin=0.02)
    assert pair.method == "confidence_sequence" and pair.p_value is None
    assert pair.low is not None and fixed.low is not None and fixed.high is not None
    assert pair.low < fixed.low < fixed.high < pair.high
    assert (pair.wins, pair.losses, pair.ties) == (fixed.wins, fixed.losses, fixed.ties)
    back = rule.pair(("b", "a"), B, A, margin=0.02)
    assert (back.low, back.high) == pytest.approx((-pair.high, -pair.low), abs=1e-9)
    assert test_cells(pair)[0].startswith("e = ") and "stop_early" in pairs_note([pair])
    mean, plain = rule.mean(A), wilson(108, 120)
    assert mean.value == pytest.approx(0.9) and mean.low < plain.low < plain.high < mean.high


def test_what_a_run_was_made_under_counts_and_not_what_it_is_decided_under(
    records: RunRecords,
) -> None:
    looked = dataclasses.replace(records, decision=DecisionConfig(stop_early=True))
    results = summarise(looked, decision=DecisionConfig(stop_early=False))
    assert {pair.method for pair in results.pairs} == {"confidence_sequence"}
    before = summarise(records, decision=DecisionConfig(stop_early=True))
    assert {pair.method for pair in before.pairs} == {"fixed_n"}
    assert all(pair.p_adjusted is not None for pair in before.pairs)


def test_shared_passages_reach_the_results(records: RunRecords) -> None:
    tests = [i for i in records.items.values() if i.split == "test"]
    grouped = {i.id: dataclasses.replace(i, group=f"p{k // 4}") for k, i in enumerate(tests)}
    results = summarise(dataclasses.replace(records, items={**records.items, **grouped}))
    assert {(p.method, p.num_sources) for p in results.pairs} == {("clustered", 30)}
    assert results.arms["lora"].variance.items != summarise(records).arms["lora"].variance.items


def test_several_draws_widen_the_interval_of_the_metric(records: RunRecords) -> None:
    """A second draw that is right elsewhere: its part is told, and the interval has it."""
    arm = records.arms["few_shot"]
    tests = [s for s in arm.samples if s.set == "test"]
    worse = [
        dataclasses.replace(s, draw=1, is_correct=False, is_correct_calibrated=False, score=0.0)
        for s in tests
    ]
    more = dataclasses.replace(arm, samples=(*arm.samples, *worse))
    both = dataclasses.replace(records, arms={**records.arms, "few_shot": more})
    one, two = (summarise(r).arms["few_shot"] for r in (records, both))
    assert one.variance.draws is None and one.variance.seeds is None
    assert two.variance.draws is not None and two.variance.items is not None
    right = {s.item_id: float(bool(s.is_correct_calibrated)) for s in tests}
    expected = split_variance({(0, 0): right, (1, 0): dict.fromkeys(right, 0.0)})
    assert two.variance.draws == pytest.approx(expected.draws)
    assert two.metric is not None and one.metric is not None
    assert two.metric.value == pytest.approx((one.metric.value or 0) / 2)
    assert two.metric.high - two.metric.low > 2 * (one.metric.high - one.metric.low)
    assert json.dumps(two.metric.n) == str(len(right))


def test_the_table_is_written_with_a_run(tmp_path: Path) -> None:
    from evaluation.report.tables import pair_table

    path = write_spam_run(tmp_path, num_test=40, decision=DecisionConfig(stop_early=True))
    table = pair_table(summarise(read_run(path)))
    assert "confidence sequences" in table.note
    assert all(row[4].startswith("e = ") for row in table.rows)
