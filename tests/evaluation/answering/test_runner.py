"""Evaluation jobs on the scripted and the real engine: records, rules, resuming and the bill."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conf.choices import AnswerBy, Calibration
from conf.errors import JobFailed
from conf.records import AnswerRule, Item, LedgerLine, PromptText, SampleRecord
from evaluation.answering.runner import EvaluateJob, evaluate
from evaluation.engines.base import Engine
from evaluation.prompts import get_style
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task
from tests.evaluation.jobs import (
    REAL,
    Outcome,
    generation,
    long_items,
    make_arm,
    make_engine,
    multiple_choice,
    run,
    small,
)


@pytest.fixture(scope="module")
def renderer(tiny_model_dir: Path) -> Renderer:
    return Renderer.load(tiny_model_dir, layout="plain")


ARMS = {
    "zero-shot": {},
    "few-shot": {"prompt": "few_shot", "num_shots": 7},
    "chain of thought": {"prompt": "chain_of_thought", "max_thought_tokens": 6},
}


@pytest.mark.parametrize("method", ARMS.values(), ids=ARMS.keys())
@pytest.mark.parametrize("engine", [REAL, {"script": "noisy"}], ids=["real", "scripted"])
def test_the_bill_equals_the_rows(
    topic_task: Task,
    tiny_model_dir: Path,
    renderer: Renderer,
    method: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    task = small(topic_task)
    arm = make_arm(engine=engine, **method)
    out = run(arm, task, tiny_model_dir, renderer, devices=2, usd_per_device_second=0.5)
    tokens = Counter[str]()
    for line in out.lines:
        tokens[line.purpose] += line.tokens
        assert line.usd is None or line.usd == pytest.approx(0.5 * line.device_seconds)
    for name in ("validation", "test", "latency"):
        assert tokens[name] == sum(s.computed_tokens for s in out.of(name)) > 0
    assert tokens["shared"] > 0 and tokens["calibration"] > 0
    texts = {e.prompt_sha256 for e in out.events if isinstance(e, PromptText)}
    assert {s.prompt_sha256 for s in out.samples} <= texts
    assert len(texts) == sum(isinstance(e, PromptText) for e in out.events)


def test_lines_come_before_what_they_pay_for(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    out = run(make_arm(), small(topic_task), tiny_model_dir, renderer)
    paid: Counter[str] = Counter()
    owed: Counter[str] = Counter()
    for event in out.events:
        if isinstance(event, LedgerLine):
            paid[event.purpose] += event.tokens
        elif isinstance(event, SampleRecord):
            owed[event.set] += event.computed_tokens
            assert owed[event.set] <= paid[event.set]


def test_an_oracle_is_right_by_score(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    out = run(make_arm(engine={"script": "oracle"}), topic_task, tiny_model_dir, renderer)
    # Score and generate are both perfect: ties go to score without calibration.
    assert out.rule.answer_by == "score" and out.rule.calibration == "none"
    assert out.rule.label_offsets is None
    assert set(out.rule.validation) == {
        *(f"score/{name}" for name in ("none", "contextual", "batch", "token", "byte", "pmi")),
        "generate/none",
    }
    assert all(m.value == 1.0 and m.n == 28 for m in out.rule.validation.values())
    tests = out.of("test")
    assert [s.item_id for s in tests] == [item.id for item in topic_task.items["test"]]
    for s in tests:
        assert s.is_correct and s.is_correct_calibrated and s.score == 1.0
        assert s.answer == s.target == s.calibrated_answer
        assert s.is_format_valid is None and s.completion is None
        assert set(s.label_logprobs or {}) == set(topic_task.labels)
        assert s.first_token_seconds is None
    latency = out.of("latency")
    assert len(latency) == 8 and all(s.total_seconds for s in latency)


def test_the_worse_way_is_not_taken(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    class BadScores:
        """Generates rightly, scores the first label always."""

        def __init__(self, inner: Engine) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def score(self, requests: Any, **options: Any) -> Any:
            for result in self.inner.score(requests, **options):
                count = len(result.label_logprobs)
                values = (-0.1, *(-3.0 - k for k in range(count - 1)))
                yield dataclasses.replace(
                    result, label_logprobs=values, first_token_logprobs=values
                )

    arm = make_arm(engine={"script": "oracle"})
    engine = BadScores(make_engine(arm, tiny_model_dir, renderer, topic_task))
    job = EvaluateJob(name="job", arm=arm, sets=("test",))
    events = list(evaluate(job, task=topic_task, engine=engine, renderer=renderer))  # type: ignore[arg-type]
    out = Outcome(events, engine)  # type: ignore[arg-type]
    assert out.rule.answer_by == "generate" and out.rule.validation["score/none"].value == 1 / 7
    for s in out.of("test"):
        assert s.answer_by == "generate" and s.is_correct and s.is_format_valid is True
        assert s.is_correct_calibrated is None and s.calibrated_answer is None


def test_batch_calibration_mends_a_leaning(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    class Leaning:
        """Right label likelier than the others, but label 0 gets a bonus that outweighs it."""

        def __init__(self, inner: Engine) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def score(self, requests: Any, **options: Any) -> Any:
            for result in self.inner.score(requests, **options):
                is_item = not result.id.startswith("content-free")
                plain = result.label_logprobs if is_item else [0.0] * len(result.label_logprobs)
                values = (plain[0] + 6.0, *plain[1:])
                yield dataclasses.replace(
                    result, label_logprobs=values, first_token_logprobs=values
                )

    for wanted in (Calibration.auto, Calibration.batch, Calibration.contextual, Calibration.none):
        arm = make_arm(engine={"script": "oracle"}, answer_by=AnswerBy.score, calibration=wanted)
        engine = Leaning(make_engine(arm, tiny_model_dir, renderer, topic_task))
        job = EvaluateJob(name="job", arm=arm, sets=("validation", "test"))
        events = list(evaluate(job, task=topic_task, engine=engine, renderer=renderer))  # type: ignore[arg-type]
        out = Outcome(events, engine)  # type: ignore[arg-type]
        raw = [s.is_correct for s in out.of("test")]
        calibrated = [s.is_correct_calibrated for s in out.of("test")]
        assert sum(map(bool, raw)) == 6
        assert all(calibrated) is (wanted is not Calibration.none)
        assert "generate/none" not in out.rule.validation
        if wanted is not Calibration.auto:
            assert out.rule.calibration == wanted.name
        if wanted is Calibration.none:
            assert raw == calibrated and out.rule.label_offsets is None


def test_thoughts_are_recorded_billed_and_not_thought_twice(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    arm = make_arm(
        engine=REAL, prompt="chain_of_thought", max_thought_tokens=5, answer_by=AnswerBy.auto
    )
    task = small(topic_task)
    out = run(arm, task, tiny_model_dir, renderer)
    by_call = Counter((s.call, s.answer_by) for s in out.of("validation"))
    assert by_call == {(0, "score"): 14, (1, "score"): 14, (1, "generate"): 14}
    for s in out.samples:
        if s.call == 0:
            assert s.answer is None and s.completion is not None and s.completion_tokens > 0
            assert s.label_logprobs is None
    tests = out.of("test")
    assert {s.answer_by for s in tests} == {out.rule.answer_by}
    assert Counter(s.call for s in tests) == {0: 10, 1: 10}
    latency = out.of("latency")
    assert len(latency) == 16 and all(s.total_seconds for s in latency)


def key(record: SampleRecord) -> SampleRecord:
    """A record without how it was computed: batches differ after a resume."""
    return dataclasses.replace(
        record,
        computed_tokens=0,
        cached_tokens=0,
        first_token_seconds=None,
        total_seconds=None,
        label_logprobs=None,
    )


@pytest.mark.parametrize("method", [{}, ARMS["chain of thought"]], ids=["one call", "two calls"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_resumed_run_equals_an_uninterrupted_one(
    topic_task: Task,
    tiny_model_dir: Path,
    renderer: Renderer,
    method: dict[str, Any],
    share: float,
) -> None:
    task = small(topic_task)
    arm = make_arm(engine=REAL, **method)
    whole = run(arm, task, tiny_model_dir, renderer)
    done = whole.samples[: int(share * len(whole.samples))]
    rest = run(arm, task, tiny_model_dir, renderer, done=done)
    assert rest.rule.answer_by == whole.rule.answer_by
    assert rest.rule.calibration == whole.rule.calibration
    assert {n: m.value for n, m in rest.rule.validation.items()} == {
        n: m.value for n, m in whole.rule.validation.items()
    }
    wanted = sorted(map(key, whole.samples), key=repr)
    assert sorted(map(key, [*done, *rest.samples]), key=repr) == wanted
    known = {s.prompt_sha256 for s in done}
    assert known.isdisjoint(e.prompt_sha256 for e in rest.events if isinstance(e, PromptText))


def test_sampled_repeats_of_generated_answers(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    task = small(topic_task)
    sampled = {**REAL, "temperature": 0.8, "repeats": 3}
    arm = make_arm(engine=sampled, answer_by=AnswerBy.generate)
    out = run(arm, task, tiny_model_dir, renderer, sets=("test",))
    tests = out.of("test")
    assert Counter(s.repeat for s in tests) == {0: 10, 1: 10, 2: 10}
    by_item: dict[str, set[str | None]] = {}
    for s in tests:
        by_item.setdefault(s.item_id, set()).add(s.completion)
    assert max(map(len, by_item.values())) > 1
    again = run(arm, task, tiny_model_dir, renderer, sets=("test",))
    assert [s.completion for s in again.of("test")] == [s.completion for s in tests]
    scored = run(make_arm(engine=sampled, answer_by=AnswerBy.score), task, tiny_model_dir, renderer)
    assert {s.repeat for s in scored.of("test")} == {0}


def test_a_curve_is_validation_at_a_step(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    out = run(make_arm(), topic_task, tiny_model_dir, renderer, sets=("curve",), step=13)
    assert {(s.set, s.step, s.answer_by) for s in out.samples} == {("validation", 13, "score")}
    assert len(out.samples) == 28
    assert {line.purpose for line in out.lines} <= {"curve", "shared", "padding"}
    assert not any(isinstance(e, AnswerRule) for e in out.events)


def test_a_given_rule_is_followed(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    offsets = dict.fromkeys(topic_task.labels, 0.0) | {"billing": -100.0}
    rule = AnswerRule(arm="arm", answer_by="score", calibration="batch", label_offsets=offsets)
    out = run(
        make_arm(engine={"script": "oracle"}),
        topic_task,
        tiny_model_dir,
        renderer,
        sets=("test",),
        rule=rule,
    )
    assert {s.set for s in out.samples} == {"test"}
    assert {s.calibrated_answer for s in out.samples} == {"billing"}
    assert all(s.is_correct for s in out.samples)


@pytest.mark.parametrize("engine", [REAL, {"script": "oracle"}], ids=["real", "oracle"])
def test_multiple_choice_scores_each_items_own_choices(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer, engine: dict[str, Any]
) -> None:
    task = multiple_choice(small(topic_task))
    out = run(make_arm(engine=engine), task, tiny_model_dir, renderer)
    names = {"score/none", "score/token", "score/byte", "generate/none"}
    assert set(out.rule.validation) in (names, {*names, "score/first_token"})
    items = {item.id: item for item in task.items["validation"]}
    for s in out.of("validation"):
        if s.answer_by == "score":
            sums = s.label_logprobs or {}
            assert tuple(sums) == items[s.item_id].choices
            assert s.answer == max(sums, key=lambda w: sums[w])


def test_free_answers_are_generated(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    task = generation(topic_task)
    out = run(make_arm(engine={"script": "noisy"}), task, tiny_model_dir, renderer)
    assert (out.rule.answer_by, out.rule.calibration) == ("generate", "none")
    assert set(out.rule.validation) == {"generate/none"}
    tests = out.of("test")
    assert 0.5 < sum(s.score or 0 for s in tests) / len(tests) < 1
    assert all(s.label_logprobs is None for s in tests)


@pytest.mark.parametrize("engine", [REAL, {"script": "oracle"}], ids=["real", "oracle"])
def test_too_long_items_are_errors_and_no_answers(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer, engine: dict[str, Any]
) -> None:
    arm = make_arm(engine=engine, answer_by=AnswerBy.score)
    task = long_items(topic_task, 2)
    out = run(arm, task, tiny_model_dir, renderer, sets=("test",))
    failed = [s for s in out.of("test") if s.error is not None]
    assert [s.item_id for s in failed] == ["test-0", "test-1"]
    for s in failed:
        assert "context of 2048" in (s.error or "")
        assert s.answer is None and s.is_correct is None and s.score is None
    assert len(out.of("test")) == 42
    with pytest.raises(JobFailed, match=r"5 of 42 test items.*test-0.*tokens"):
        run(arm, long_items(topic_task, 5), tiny_model_dir, renderer, sets=("test",))


def test_styles_of_three_calls_and_of_the_users_own(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    from evaluation.plugins import STYLES, prompt_style
    from evaluation.prompts import Ask, Think, conversation

    @prompt_style("twice_then_check")
    def twice_then_check(item: Item, context: Any) -> Any:
        messages = conversation(item, system=context.instruction)
        if item.id.endswith("0"):  # talks of different lengths in one pass
            first = yield Think(messages, max_new_tokens=3)
            second = yield Think(messages, prefix=first + " and", max_new_tokens=2)
            messages = conversation(item, system=context.instruction + second)
        answer = yield Ask(messages)
        return f" {answer} "

    try:
        assert get_style("twice_then_check") is twice_then_check
        arm = make_arm(engine=REAL, prompt="twice_then_check", answer_by=AnswerBy.generate)
        out = run(arm, small(topic_task), tiny_model_dir, renderer)
        calls = Counter(s.item_id for s in out.of("test"))
        assert calls == {f"test-{i}": 3 if i % 10 == 0 else 1 for i in range(10)}
        assert sum(s.is_format_valid is not None for s in out.of("test")) == 10
    finally:
        del STYLES._functions["twice_then_check"]
