"""Results of fake runs against counts made by hand from the same records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conf.records import AnswerRule, SampleRecord, from_dict, to_dict
from conf.results import Results
from conf.run_groups import DecisionConfig, PriceConfig, PricingConfig
from evaluation.records.arm_scores import consistency, requests_of
from evaluation.records.run_records import ArmRecords, read_run
from evaluation.results.summary import summarise
from evaluation.statistics import mcnemar_exact, wilson
from tests.evaluation import fake_run


@pytest.fixture(scope="module")
def spam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.write_spam_run(tmp_path_factory.mktemp("spam"))


@pytest.fixture(scope="module")
def spam_results(spam: Path) -> Results:
    return summarise(read_run(spam))


def lines(root: Path, arm: str) -> list[dict[str, object]]:
    text = (root / "arms" / arm / "samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_metric_is_the_calibrated_share_where_the_rule_calibrates(
    spam: Path, spam_results: Results
) -> None:
    for arm, key in (("few_shot", "is_correct_calibrated"), ("lora", "is_correct")):
        right = [s[key] for s in lines(spam, arm) if s["set"] == "test"]
        expected = wilson(sum(map(bool, right)), len(right))
        metric = spam_results.arms[arm].metric
        assert metric is not None and metric.name == "accuracy"
        assert (metric.value, metric.low, metric.high, metric.n) == (
            expected.value,
            expected.low,
            expected.high,
            200,
        )
    few_shot = spam_results.arms["few_shot"]
    raw = [bool(s["is_correct"]) for s in lines(spam, "few_shot") if s["set"] == "test"]
    assert few_shot.accuracy.value == sum(raw) / 200
    assert few_shot.accuracy_calibrated.value == few_shot.metric.value
    assert spam_results.arms["lora"].accuracy_calibrated is None


def test_calls_of_a_request_are_added_and_the_last_one_answers(
    spam: Path, spam_results: Results
) -> None:
    arm = spam_results.arms["chain_of_thought"]
    test = [s for s in lines(spam, "chain_of_thought") if s["set"] == "test"]
    assert len(test) == 400
    assert arm.metric.n == 200
    assert arm.tokens.completion.value == 40.0
    assert arm.tokens.prompt.value == pytest.approx(sum(s["prompt_tokens"] for s in test) / 200)
    assert arm.format_validity.n == 200


def test_scored_arms_have_no_format_validity_and_no_consistency(spam_results: Results) -> None:
    for name, arm in spam_results.arms.items():
        assert (arm.format_validity is None) == (name != "chain_of_thought")
        assert arm.consistency is None


def test_costs_come_from_latency_requests_and_devices(spam: Path, spam_results: Results) -> None:
    seconds = [s["total_seconds"] for s in lines(spam, "lora") if s["set"] == "latency"]
    mean = sum(seconds) / len(seconds) * 2  # two devices
    cost = spam_results.arms["lora"].cost
    assert cost.request_device_seconds.value == pytest.approx(mean)
    assert cost.request_usd.value == pytest.approx(mean * 0.0408 / 3600)
    assert cost.usd_per_million_tokens.value == pytest.approx(mean * 0.0408 / 3600 / 96 * 1e6)
    # 60 steps of 1.7 s on 2 devices, and 60 validation items
    assert cost.fixed_device_seconds == pytest.approx(204 + 60 * 0.112)


def test_an_arm_on_lora_inherits_its_cost_and_labels(spam_results: Results) -> None:
    lora, on_lora = spam_results.arms["lora"], spam_results.arms["few_shot_on_lora"]
    own = 60 * 0.155
    assert on_lora.cost.fixed_device_seconds == pytest.approx(lora.cost.fixed_device_seconds + own)
    assert on_lora.labels_used == lora.labels_used == 240 + 60
    assert on_lora.kind == "both" and on_lora.train is None
    assert spam_results.arms["few_shot"].labels_used == 8 + 60
    assert spam_results.arms["tfidf"].labels_used == 240


def test_labels_have_a_price_when_given(spam: Path) -> None:
    records = read_run(spam)
    priced = summarise(records, decision=DecisionConfig(label_usd=0.5))
    plain = summarise(records)
    for name, labels in (("lora", 300), ("zero_shot", 60)):
        difference = priced.arms[name].cost.fixed_usd - plain.arms[name].cost.fixed_usd
        assert difference == pytest.approx(0.5 * labels)


def test_pricing_can_be_replaced(spam: Path) -> None:
    pricing = PricingConfig(name="x", device_hour=PriceConfig(usd=3600.0), source="s", date="d")
    results = summarise(read_run(spam), pricing=pricing)
    cost = results.arms["full"].cost
    assert cost.request_usd.value == pytest.approx(cost.request_device_seconds.value)
    assert results.pricing["source"] == "s"


def test_pairs_are_complete_and_exact(spam: Path, spam_results: Results) -> None:
    assert len(spam_results.pairs) == 8 * 7 // 2
    pair = next(p for p in spam_results.pairs if (p.a, p.b) == ("few_shot", "lora"))
    one = {
        s["item_id"]: s["is_correct_calibrated"]
        for s in lines(spam, "few_shot")
        if s["set"] == "test"
    }
    two = {s["item_id"]: s["is_correct"] for s in lines(spam, "lora") if s["set"] == "test"}
    wins = sum(one[i] and not two[i] for i in one)
    losses = sum(two[i] and not one[i] for i in one)
    assert (pair.wins, pair.losses, pair.ties, pair.n) == (wins, losses, 200 - wins - losses, 200)
    assert pair.difference == pytest.approx((wins - losses) / 200)
    assert pair.p_value == mcnemar_exact(wins, losses)
    assert all(p.p_adjusted >= p.p_value for p in spam_results.pairs)


def test_break_even_is_there_for_every_prompted_and_tuned_pair(spam_results: Results) -> None:
    found = {(frozenset((b.a, b.b)), b.unit, b.cache) for b in spam_results.break_even}
    assert len(found) == len(spam_results.break_even) == 4 * 3 * 2 * 3
    by_unit = {b.unit: b for b in spam_results.break_even if (b.a, b.b) == ("few_shot", "lora")}
    few_shot, lora = (spam_results.arms[a].cost for a in ("few_shot", "lora"))
    saving = few_shot.request_device_seconds.value - lora.request_device_seconds.value
    extra = lora.fixed_device_seconds - few_shot.fixed_device_seconds
    for b in by_unit.values():
        assert b.requests == pytest.approx(extra / saving)
        assert b.low < b.requests < b.high


def test_recall_by_label_and_slices(spam: Path, spam_results: Results) -> None:
    mine = [s for s in lines(spam, "lora") if s["set"] == "test" and s["target"] == "spam"]
    recall = spam_results.arms["lora"].by_label["spam"]
    assert (recall.value, recall.n) == (sum(bool(s["is_correct"]) for s in mine) / 100, 100)
    assert set(spam_results.arms["lora"].by_slice) == {"length=long", "length=short"}


def test_results_survive_json(spam_results: Results) -> None:
    text = json.dumps(to_dict(spam_results), allow_nan=False)
    assert from_dict(Results, json.loads(text)).arms == spam_results.arms


def test_generation_repeats_failed_arm_and_no_price(tmp_path: Path) -> None:
    results = summarise(read_run(fake_run.write_orders_run(tmp_path)))
    zero_shot, full = results.arms["zero_shot"], results.arms["full"]
    assert zero_shot.metric.name == "json" and zero_shot.metric.n == 60
    assert zero_shot.metric.low < zero_shot.metric.value < zero_shot.metric.high
    assert zero_shot.accuracy is not None and zero_shot.macro_f1 is None
    assert zero_shot.consistency.n == 60 and zero_shot.consistency.value < 1
    assert zero_shot.cost.request_usd.value is None and zero_shot.cost.fixed_usd is None
    assert full.status == "failed" and full.metric is None and "not finite" in full.error
    assert full.cost.fixed_device_seconds == 41.0  # what it spent stays on its bill
    assert {b.status for b in results.break_even if b.unit == "usd"} == {"unknown"}
    assert all("full" not in (p.a, p.b) for p in results.pairs)
    assert results.recommendation.arm == "lora"
    assert zero_shot.is_reused and zero_shot.spent_now_device_seconds == 30.0


def sample(**fields: object) -> SampleRecord:
    return SampleRecord(**{"arm": "a", "item_id": "1", "set": "test", **fields})  # type: ignore[arg-type]


def test_an_answer_that_ended_in_an_error_is_wrong_not_missing(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    path = root / "arms" / "lora" / "samples.jsonl"
    changed = [json.loads(line) for line in path.read_text().splitlines()]
    first = next(s for s in changed if s["set"] == "test" and s["is_correct"])
    before = summarise(read_run(root)).arms["lora"].metric
    first |= {"is_correct": None, "answer": None, "score": None, "error": "too long"}
    path.write_text("".join(json.dumps(s) + "\n" for s in changed))
    after = summarise(read_run(root)).arms["lora"].metric
    assert after.n == before.n and after.value == pytest.approx(before.value - 1 / 20)


def test_only_answers_by_the_rule_at_the_last_checkpoint_count() -> None:
    samples = (
        sample(step=5, answer_by="score", answer="early"),
        sample(step=9, answer_by="score", answer="last"),
        sample(step=9, answer_by="generate", answer="other"),
    )
    arm = ArmRecords(samples=samples, rule=AnswerRule(arm="a", answer_by="score"))
    assert [r.final.answer for r in requests_of(arm, set_name="test")] == ["last"]


def test_consistency_by_hand() -> None:
    answers = ["x", "x", "y"]
    samples = [sample(repeat=i, answer=a, answer_by="generate") for i, a in enumerate(answers)]
    samples += [sample(item_id="2", repeat=i, answer="z", answer_by="generate") for i in range(3)]
    measured = consistency(
        requests_of(ArmRecords(samples=tuple(samples)), set_name="test"), confidence=0.95
    )
    assert measured.value == pytest.approx((1 / 3 + 1) / 2)
    scored = tuple(replace(s, answer_by="score") for s in samples)
    assert (
        consistency(requests_of(ArmRecords(samples=scored), set_name="test"), confidence=0.95)
        is None
    )
