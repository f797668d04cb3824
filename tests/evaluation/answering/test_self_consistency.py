"""Arms whose repeats vote: early stops, the vote in the metric, and what a request then costs."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conf.choices import AnswerBy, RepeatStopping
from conf.errors import ConfigError
from conf.records import AnswerRule, SampleRecord, to_dict
from evaluation.prompts.rendering import Renderer
from evaluation.records import arm_scores
from evaluation.records.arm_scores import Request, consistency, requests_of, voted
from evaluation.records.run_records import ArmRecords, read_run
from evaluation.results.summary import summarise
from evaluation.scoring.voting import majority
from evaluation.tasks import Task
from tests.evaluation import fake_run
from tests.evaluation.jobs import REAL, Outcome, generation, make_arm, run, small


@pytest.fixture(scope="module")
def renderer(tiny_model_dir: Path) -> Renderer:
    return Renderer.load(tiny_model_dir, layout="plain")


REPEATS = 5


def arm_of(engine: dict[str, Any], stopping: RepeatStopping) -> Any:
    # The tiny model writes noise: its answers differ between repeats.
    sampled = {"temperature": 0.6, "repeats": REPEATS, "latency_requests": 2}
    return make_arm(
        engine={**engine, **sampled, "repeat_stopping": stopping},
        prompt="chain_of_thought",
        max_thought_tokens=4,
        self_consistency=True,
    )


def answers(out: Outcome, name: str) -> dict[str, list[str | None]]:
    """Item -> answers in the order of repeats."""
    found: dict[str, list[tuple[int, str | None]]] = {}
    for s in out.of(name):
        if s.call == 1:
            found.setdefault(s.item_id, []).append((s.repeat, s.answer))
    return {item: [answer for _, answer in sorted(v)] for item, v in found.items()}


def vote(given: list[str | None]) -> str | None:
    place = majority(given)
    return None if place is None else given[place]


@pytest.mark.parametrize("engine", [REAL, {"script": "noisy"}], ids=["real", "scripted"])
def test_early_stops_keep_the_vote_and_save_repeats(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer, engine: dict[str, Any]
) -> None:
    task = small(topic_task, validation=6, test=8)

    def answered(stopping: RepeatStopping) -> Outcome:
        return run(arm_of(engine, stopping), task, tiny_model_dir, renderer)

    every, decided = answered(RepeatStopping.never), answered(RepeatStopping.decided)
    for name in ("validation", "test"):
        whole, part = answers(every, name), answers(decided, name)
        assert {len(given) for given in whole.values()} == {REPEATS}
        assert whole.keys() == part.keys()
        for item, given in part.items():
            assert given == whole[item][: len(given)]  # a repeat has its own noise
            assert vote(given) == vote(whole[item])
            assert 3 <= len(given) <= REPEATS
    assert len(decided.of("test")) < len(every.of("test"))
    tokens = [sum(s.completion_tokens for s in out.samples) for out in (decided, every)]
    assert tokens[0] < tokens[1]
    assert every.rule == decided.rule and every.rule.is_voted
    assert set(every.rule.validation) == {"generate/none"}
    targets = {item.id: item.answer_key for item in task.items["validation"]}
    hits = [vote(given) == targets[item] for item, given in answers(every, "validation").items()]
    assert every.rule.validation["generate/none"].value == pytest.approx(sum(hits) / len(hits))
    assert {s.repeat for s in decided.of("latency")} >= set(range(3))
    likely = answered(RepeatStopping.likely)
    assert len(likely.of("test")) <= len(decided.of("test"))


def test_a_resumed_vote_asks_no_repeat_twice(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    task, arm = small(topic_task, validation=4, test=5), arm_of(REAL, RepeatStopping.decided)
    whole = run(arm, task, tiny_model_dir, renderer)
    done = whole.samples[: len(whole.samples) // 2]
    rest = run(arm, task, tiny_model_dir, renderer, done=done)

    def keys(records: list[SampleRecord]) -> Counter[tuple[object, ...]]:
        return Counter((s.set, s.item_id, s.repeat, s.call, s.completion) for s in records)

    assert keys([*done, *rest.samples]) == keys(whole.samples)
    assert rest.rule == whole.rule


def test_only_generated_answers_that_can_be_equal_vote(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    task = small(topic_task)
    few = make_arm(engine={"temperature": 0.5, "repeats": 2}, self_consistency=True)
    with pytest.raises(ConfigError, match=r"arms\.arm\.self_consistency(.|\n)*3 or more"):
        run(few, task, tiny_model_dir, renderer)
    with pytest.raises(ConfigError, match="answer_by=generate"):
        make_arm(self_consistency=True, answer_by=AnswerBy.score)
    graded = dataclasses.replace(generation(task), scoring="chrf")
    with pytest.raises(ConfigError, match="chrf"):
        run(arm_of({}, RepeatStopping.decided), graded, tiny_model_dir, renderer)


def sample(item: str, repeat: int, answer: str | None, **fields: Any) -> SampleRecord:
    seconds = {"first_token_seconds": 0.5, "total_seconds": 1.0 + repeat}
    return SampleRecord(
        arm="a",
        item_id=item,
        set="test",
        repeat=repeat,
        answer_by="generate",
        prompt_tokens=10,
        completion_tokens=2,
        answer=answer,
        is_correct=answer == "yes",
        score=float(answer == "yes"),
        **{**seconds, **fields},
    )


def requests(samples: list[SampleRecord], **fields: Any) -> list[Request]:
    rule = AnswerRule(arm="a", answer_by="generate", is_voted=True)
    return requests_of(ArmRecords(samples=tuple(samples), rule=rule, **fields), set_name="test")


def test_a_voted_request_is_all_repeats() -> None:
    records = [
        *(sample("1", k, answer) for k, answer in enumerate(["no", "yes", None, "yes"])),
        *(sample("2", k, answer) for k, answer in enumerate(["no", "yes"])),
        sample("3", 0, None),
    ]
    found = voted(requests(records[::-1]), is_label=True)
    one, two, three = sorted(found, key=lambda r: r.final.item_id)
    assert [r.final.answer for r in (one, two, three)] == ["yes", "no", None]
    assert one.final.is_correct and not two.final.is_correct
    assert (one.prompt_tokens, one.completion_tokens) == (40, 8)
    assert one.total_seconds == 1 + 2 + 3 + 4 and one.first_token_seconds == 1 + 2 + 3 + 0.5
    assert three.total_seconds == 1.0
    untimed = [dataclasses.replace(s, total_seconds=None) for s in records]
    assert voted(requests(untimed), is_label=True)[0].total_seconds is None


def test_consistency_counts_the_repeats_that_all_items_have() -> None:
    agreeing = [sample("1", k, "yes") for k in range(3)]  # stopped early
    other = [sample("2", k, answer) for k, answer in enumerate(["yes", "no", "no", "no", "no"])]
    found = consistency(requests([*agreeing, *other]), confidence=0.95)
    assert found is not None and found.n == 2
    assert found.value == pytest.approx((1 + 1 / 3) / 2)


def test_the_vote_is_the_metric_of_the_run(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    path = root / "arms" / "chain_of_thought" / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    repeated = []
    for line in lines:
        repeated.append(line)
        if line["set"] == "test" and line["answer"] is not None:  # two more repeats say "ham"
            ham = {"answer": "ham", "is_correct": line["target"] == "ham", "score": 0.0}
            repeated += [{**line, **ham, "repeat": k} for k in (1, 2)]
        elif line["set"] == "test":
            repeated += [{**line, "repeat": k} for k in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in repeated))
    journal = root / "journal.jsonl"
    before = summarise(read_run(root)).arms["chain_of_thought"]
    rule = AnswerRule(arm="chain_of_thought", answer_by="generate", is_voted=True)
    event = {"time": 2e9, "event": "answer_rule", "arm": "chain_of_thought", "data": to_dict(rule)}
    journal.write_text(journal.read_text() + json.dumps(event) + "\n")
    after = summarise(read_run(root)).arms["chain_of_thought"]
    items = {s["item_id"]: s["target"] for s in lines if s["set"] == "test"}
    assert after.metric is not None and before.metric is not None
    assert after.metric.value == sum(target == "ham" for target in items.values()) / len(items)
    assert after.metric.value != before.metric.value and after.metric.n == before.metric.n
    assert after.tokens is not None and before.tokens is not None
    assert after.tokens.prompt.value == pytest.approx(3 * (before.tokens.prompt.value or 0))
    assert after.consistency == before.consistency and after.consistency is not None
    assert after.format_validity == before.format_validity


def test_an_arm_without_a_label_distribution_has_no_calibrated_answers(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    path = root / "arms" / "zero_shot" / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    none = dict.fromkeys(("label_logprobs", "calibrated_answer", "is_correct_calibrated"))
    path.write_text("".join(json.dumps(line | none) + "\n" for line in lines))
    journal = root / "journal.jsonl"
    rule = AnswerRule(arm="zero_shot", answer_by="score")
    event = {"time": 2e9, "event": "answer_rule", "arm": "zero_shot", "data": to_dict(rule)}
    journal.write_text(journal.read_text() + json.dumps(event) + "\n")
    arm = summarise(read_run(root)).arms["zero_shot"]
    right = [line["is_correct"] for line in lines if line["set"] == "test"]
    assert arm.metric is not None and arm.metric.value == sum(right) / len(right)
    assert arm.accuracy_calibrated is None and arm.accuracy is not None


def test_truncated_tokens_are_in_the_results(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    path = root / "arms" / "lora" / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in [line for line in lines if line["set"] == "test"][:3]:
        line["truncated_tokens"] = 40
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokens = summarise(read_run(root)).arms["lora"].tokens
    assert tokens is not None and tokens.truncated.value == 3 * 40 / 20
    assert arm_scores.requests_of(read_run(root).arms["lora"], set_name="test")
