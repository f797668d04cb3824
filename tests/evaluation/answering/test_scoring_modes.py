"""Ways to score labels in the runner, against plain forwards of the same prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.choices import AnswerBy, Calibration, Normalisation
from conf.errors import ConfigError, DataError, JobFailed
from conf.records import AnswerRule, Item, SampleRecord
from evaluation.answering.calls import check_labels
from evaluation.answering.rule_choice import wanted_comparisons
from evaluation.answering.runner import EvaluateJob, evaluate
from evaluation.engines.base import ScoreRequest, ScoreResult, only_winner
from evaluation.prepare import context_for
from evaluation.prompts import first_call, get_style
from evaluation.prompts.rendering import Renderer
from evaluation.prompts.truncation import MARK
from evaluation.scoring.calibration import content_free_items
from evaluation.tasks import Task
from tests.evaluation.jobs import (
    REAL,
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


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(tiny_model_dir)).eval()


Tokens = dict[str, list[float]]


def token_logprobs(model: PreTrainedModel, renderer: Renderer, task: Task, item: Item) -> Tokens:
    """Each label's tokens' log-probabilities from a forward of its own, no cache, no batch."""
    call = first_call(get_style("zero_shot"), item, context_for(task, make_arm()))
    text = renderer.render(call.messages)
    prompt = renderer.encode(text)
    found: Tokens = {}
    for label in task.candidates(item):
        whole = renderer.encode(text + renderer.gap(text) + label)
        assert whole[: len(prompt)] == prompt  # true of this tokenizer
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        found[label] = [float(logprobs[i - 1, whole[i]]) for i in range(len(prompt), len(whole))]
    return found


def free_sums(
    model: PreTrainedModel, renderer: Renderer, task: Task, item: Item
) -> dict[str, float]:
    """Mean over inputs without content of each label's sum."""
    rows = [
        {k: sum(v) for k, v in token_logprobs(model, renderer, task, free).items()}
        for free in content_free_items(item)
    ]
    return {label: float(np.mean([row[label] for row in rows])) for label in rows[0]}


def by_hand(name: str, tokens: Tokens, free: Mapping[str, float]) -> dict[str, float]:
    match name:
        case "sum":
            return {k: sum(v) for k, v in tokens.items()}
        case "token":
            return {k: sum(v) / len(v) for k, v in tokens.items()}
        case "byte":
            return {k: sum(v) / len(k.encode()) for k, v in tokens.items()}
        case "pmi":
            return {k: sum(v) - free[k] for k, v in tokens.items()}
        case _:
            return {k: v[0] for k, v in tokens.items()}


def best(values: Mapping[str, float]) -> str:
    return max(values, key=lambda k: values[k])


@pytest.mark.parametrize("name", ["sum", "token", "byte", "pmi", "first_token"])
@pytest.mark.parametrize("kind", ["classification", "multiple choice"])
def test_answers_follow_the_normalisation(
    topic_task: Task,
    tiny_model_dir: Path,
    renderer: Renderer,
    plain: PreTrainedModel,
    name: str,
    kind: str,
) -> None:
    task = small(topic_task, validation=3, test=4)
    task = task if kind == "classification" else multiple_choice(task)
    arm = make_arm(
        engine={**REAL, "latency_requests": 2},
        answer_by=AnswerBy.score,
        normalisation=Normalisation[name],
        calibration=Calibration.none,
    )
    out = run(arm, task, tiny_model_dir, renderer)
    assert (out.rule.normalisation, out.rule.calibration) == (name, "none")
    wanted_name = "score/none" if name == "sum" else f"score/{name}"
    assert out.rule.name == wanted_name and set(out.rule.validation) == {"score/none", wanted_name}
    items = {item.id: item for split in task.items.values() for item in split}
    for s in out.of("test"):
        item = items[s.item_id]
        tokens = token_logprobs(plain, renderer, task, item)
        sums = {k: sum(v) for k, v in tokens.items()}
        assert s.label_logprobs == pytest.approx(sums, abs=1e-3)
        assert s.answer == best(sums)  # raw, whatever the rule
        free: dict[str, float] = {}
        if name == "pmi":  # the task's labels have one baseline, an item's choices their own
            like = item if kind == "multiple choice" else task.items["validation"][0]
            free = free_sums(plain, renderer, task, like)
            found = s.baseline_logprobs if kind == "multiple choice" else out.rule.label_offsets
            assert found == pytest.approx(free, abs=1e-3)
        assert s.calibrated_answer == best(by_hand(name, tokens, free))
    hits = []
    for item in task.items["validation"]:
        like = item if kind == "multiple choice" else task.items["validation"][0]
        free = free_sums(plain, renderer, task, like) if name == "pmi" else {}
        tokens = token_logprobs(plain, renderer, task, item)
        hits.append(best(by_hand(name, tokens, free)) == item.answer_key)
    assert out.rule.validation[wanted_name].value == pytest.approx(np.mean(hits))


def test_choices_without_content_are_on_their_items_bill(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    task = multiple_choice(small(topic_task, validation=4, test=5))

    def answered(name: str) -> Any:
        arm = make_arm(
            engine={**REAL, "latency_requests": 2},
            answer_by=AnswerBy.score,
            normalisation=Normalisation[name],
        )
        return run(arm, task, tiny_model_dir, renderer)

    once, free = answered("sum"), answered("pmi")
    for name in ("validation", "test", "latency"):
        a, b = once.of(name), free.of(name)
        assert [s.item_id for s in a] == [s.item_id for s in b]
        for one, four in zip(a, b, strict=True):
            assert one.prompt_tokens < four.prompt_tokens < 4 * one.prompt_tokens
            assert four.completion_tokens == 0 and four.call == one.call == 0
        tokens = sum(line.tokens for line in free.lines if line.purpose == name)
        assert tokens == sum(s.computed_tokens for s in b)
    for s in free.of("latency"):
        assert s.total_seconds is not None and s.first_token_seconds is not None


def test_an_item_that_failed_still_pays_for_its_choices_without_content(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    task = long_items(multiple_choice(small(topic_task, validation=2)), 1)
    arm = make_arm(answer_by=AnswerBy.score, normalisation=Normalisation.pmi)
    out = run(arm, task, tiny_model_dir, renderer, sets=("validation", "test"))
    (failed,) = (s for s in out.of("test") if s.error is not None)
    assert failed.computed_tokens > 0 and failed.answer is None
    paid = sum(line.tokens for line in out.lines if line.purpose == "test")
    assert paid == sum(s.computed_tokens for s in out.of("test"))


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_resumed_run_keeps_its_normalisation(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer, share: float
) -> None:
    task = multiple_choice(small(topic_task, validation=4, test=4))
    for normalisation in (Normalisation.pmi, Normalisation.first_token, Normalisation.auto):
        arm = make_arm(engine=REAL, answer_by=AnswerBy.score, normalisation=normalisation)
        whole = run(arm, task, tiny_model_dir, renderer, sets=("validation", "test"))
        done = whole.samples[: int(share * len(whole.samples))]
        rest = run(arm, task, tiny_model_dir, renderer, sets=("validation", "test"), done=done)
        assert rest.rule.name == whole.rule.name
        assert rest.rule.validation == whole.rule.validation

        def answers(records: Sequence[SampleRecord]) -> dict[tuple[str, str], str | None]:
            return {(s.set, s.item_id): s.calibrated_answer for s in records}

        assert answers([*done, *rest.samples]) == answers(whole.samples)
        assert not {(s.set, s.item_id) for s in done} & {(s.set, s.item_id) for s in rest.samples}


def test_what_is_left_to_validation_costs_no_calls(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    task = small(topic_task, validation=5, test=4)

    def rows(**method: Any) -> int:
        arm = make_arm(engine=REAL, answer_by=AnswerBy.score, **method)
        return run(arm, task, tiny_model_dir, renderer).engine.rows_computed

    assert rows() == rows(normalisation=Normalisation.sum)
    without = {"calibration": Calibration.none}
    assert rows(**without) == rows(normalisation=Normalisation.sum, **without) < rows()


COMPARISONS = [
    ("classification", {}, "contextual batch token byte first_token pmi"),
    ("classification", {"calibration": "none"}, "token byte first_token"),
    ("classification", {"calibration": "batch"}, "batch"),
    ("classification", {"normalisation": "sum"}, "contextual batch"),
    ("classification", {"normalisation": "token"}, "token"),
    ("classification", {"normalisation": "pmi", "calibration": "none"}, "pmi"),
    ("multiple choice", {}, "token byte first_token"),
    ("multiple choice", {"normalisation": "pmi"}, "pmi"),
    ("multiple choice", {"normalisation": "sum"}, ""),
]


@pytest.mark.parametrize(("kind", "method", "names"), COMPARISONS)
def test_which_comparisons_are_tried(
    topic_task: Task, kind: str, method: dict[str, str], names: str
) -> None:
    enums = {"calibration": Calibration, "normalisation": Normalisation}
    arm = make_arm(**{key: enums[key][value] for key, value in method.items()})
    task = topic_task if kind == "classification" else multiple_choice(topic_task)
    assert wanted_comparisons(arm, task) == names.split()


def test_the_best_on_validation_answers_and_ties_keep_the_sum(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    words = {**topic_task.label_words, "food": "f\u00f6\u00f6d", "login": "l\U0001f600"}
    task = dataclasses.replace(topic_task, label_words=words)

    class Lengthy:
        """The right label scores best per byte, and short labels by their sums."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def score(self, requests: Any, **options: Any) -> Any:
            items = {i.id: i for split in topic_task.items.values() for i in split}
            for result in self.inner.score(requests, **options):
                item = items.get(result.id.split("|")[0])
                right = topic_task.labels.index(item.answer_key) if item else 0
                lengths = [len(words[label].encode()) for label in task.labels]
                values = tuple(
                    -n * (2.0 if index == right else 2.1) for index, n in enumerate(lengths)
                )
                yield dataclasses.replace(
                    result, label_logprobs=values, first_token_logprobs=values
                )

    arm = make_arm(
        engine={"script": "oracle"}, answer_by=AnswerBy.score, calibration=Calibration.none
    )
    engine = Lengthy(make_engine(arm, tiny_model_dir, renderer, task))
    job = EvaluateJob(name="job", arm=arm, sets=("validation", "test"))
    events = list(evaluate(job, task=task, engine=engine, renderer=renderer))
    (rule,) = (e for e in events if isinstance(e, AnswerRule))
    assert rule.name == "score/byte" and rule.validation["score/byte"].value == 1.0
    assert (rule.validation["score/none"].value or 0) < 0.7
    tests = [e for e in events if isinstance(e, SampleRecord) and e.set == "test"]
    assert all(s.is_correct_calibrated for s in tests)
    assert not all(s.is_correct for s in tests)


score_lists = st.lists(st.floats(-50, 0), min_size=1, max_size=8)


@given(score_lists, st.data())
def test_the_winner_is_the_argmax_of_score_plus_offset(
    sums: list[float], data: st.DataObject
) -> None:
    offsets = data.draw(
        st.just([]) | st.lists(st.floats(-50, 50), min_size=len(sums), max_size=len(sums))
    )
    request = ScoreRequest(
        id="x",
        prompt_ids=(1,),
        label_ids=tuple((i,) for i in range(len(sums))),
        label_offsets=tuple(offsets),
    )
    full = ScoreResult(
        id="x",
        label_logprobs=tuple(sums),
        first_token_logprobs=tuple(sums),
        cached_tokens=1,
        computed_tokens=2,
    )
    found = only_winner(request, full)
    wanted = int(np.argmax(np.array(sums) + np.array(offsets or [0.0] * len(sums))))
    assert found.winner == wanted and found.winner_logprob == sums[wanted]
    assert found.label_logprobs == found.first_token_logprobs == ()
    failed = dataclasses.replace(full, label_logprobs=(), first_token_logprobs=(), error="no room")
    assert only_winner(request, failed) == failed


@pytest.mark.parametrize("is_choice", [False, True])
def test_winner_only_gives_the_answers_of_full_scoring(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer, is_choice: bool
) -> None:
    task = small(topic_task, validation=5, test=5)
    task = multiple_choice(task) if is_choice else task
    full = run(
        make_arm(engine=REAL, calibration=Calibration.none, normalisation=Normalisation.sum),
        task,
        tiny_model_dir,
        renderer,
    )
    alone = run(make_arm(engine={**REAL, "winner_only": True}), task, tiny_model_dir, renderer)
    assert alone.rule.validation == full.rule.validation
    assert (alone.rule.name, alone.rule.label_offsets) == (full.rule.name, None)
    for a, b in zip(full.samples, alone.samples, strict=True):
        assert (a.item_id, a.set, a.answer, a.is_correct, a.score) == (
            b.item_id, b.set, b.answer, b.is_correct, b.score,
        )  # fmt: skip
        assert b.label_logprobs is None and b.calibrated_answer is None
        if b.answer_by == "score":
            assert a.label_logprobs is not None
            assert b.winner_logprob == pytest.approx(max(a.label_logprobs.values()), abs=1e-4)
    done = alone.samples[: len(alone.samples) // 2]
    rest = run(
        make_arm(engine={**REAL, "winner_only": True}), task, tiny_model_dir, renderer, done=done
    )
    assert len(done) + len(rest.samples) == len(alone.samples)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({"calibration": Calibration.batch}, "calibration"),
        ({"calibration": Calibration.contextual}, "calibration"),
        ({"normalisation": Normalisation.pmi}, "normalisation"),
        ({"normalisation": Normalisation.token}, "normalisation"),
    ],
)
def test_winner_only_refuses_what_needs_a_distribution(
    topic_task: Task,
    tiny_model_dir: Path,
    renderer: Renderer,
    method: dict[str, Any],
    key: str,
) -> None:
    arm = make_arm(engine={"winner_only": True}, **method)
    with pytest.raises(ConfigError, match=rf"arms\.arm\.{key}"):
        run(arm, topic_task, tiny_model_dir, renderer)


def test_winner_only_refuses_a_calibrated_rule(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    rule = AnswerRule(arm="arm", answer_by="score", normalisation="token")
    with pytest.raises(ConfigError, match=r"winner_only(.|\n)*score/token"):
        run(make_arm(engine={"winner_only": True}), topic_task, tiny_model_dir, renderer, rule=rule)


@pytest.mark.parametrize("answer_by", [AnswerBy.score, AnswerBy.generate])
@pytest.mark.parametrize("style", ["zero_shot", "chain_of_thought"])
def test_too_long_items_are_cut_and_counted(
    topic_task: Task,
    tiny_model_dir: Path,
    renderer: Renderer,
    answer_by: AnswerBy,
    style: str,
) -> None:
    task = long_items(small(topic_task), 4)
    arm = make_arm(
        engine={"script": "oracle", "too_long": "truncate"},
        answer_by=answer_by,
        prompt=style,
        max_thought_tokens=20,
    )
    out = run(arm, task, tiny_model_dir, renderer, sets=("test",))
    cut = {s.item_id for s in out.of("test") if s.truncated_tokens}
    assert cut == {"test-0", "test-1", "test-2", "test-3"}
    for s in out.of("test"):
        assert s.error is None
        if s.item_id not in cut:
            continue
        text = out.prompts[s.prompt_sha256]
        assert MARK in text and task.instruction in text
        assert s.prompt_tokens == len(renderer.encode(text)) < renderer.max_length
        assert s.prompt_tokens > 0.95 * renderer.max_length
        assert s.prompt_tokens + s.truncated_tokens > 3000
    assert any(note.endswith("4 truncated") for note in out.notes)


def test_what_cannot_be_cut_is_refused(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    task = small(topic_task)
    long = dataclasses.replace(task, instruction="Name the topic. " * 700)
    arm = make_arm(engine={"too_long": "truncate"}, answer_by=AnswerBy.score)
    with pytest.raises(JobFailed, match="context of 2048"):
        run(arm, long, tiny_model_dir, renderer, sets=("test",))


def same_choices(task: Task, count: int) -> Task:
    """Some test items have two choices that are one text to a tokenizer."""
    tests = list(task.items["test"])
    for index in range(count):
        tests[index] = dataclasses.replace(tests[index], choices=("rain", "storm", "storm"))
    return dataclasses.replace(task, items={**task.items, "test": tuple(tests)})


def test_labels_that_no_score_tells_apart_name_their_item(
    topic_task: Task, tiny_model_dir: Path, renderer: Renderer
) -> None:
    task = same_choices(multiple_choice(topic_task), 1)
    with pytest.raises(DataError, match=r"item test-0(.|\n)*'storm' and 'storm'"):
        check_labels(task, renderer)
    arm = make_arm(engine={"script": "constant"}, answer_by=AnswerBy.score)
    out = run(arm, task, tiny_model_dir, renderer, sets=("test",))
    (failed,) = (s for s in out.of("test") if s.error)
    assert failed.item_id == "test-0"
    assert "item test-0" in (failed.error or "") and "'storm' and 'storm'" in (failed.error or "")
    assert failed.answer is None and failed.is_correct is None
    check_labels(multiple_choice(topic_task), renderer)
    check_labels(topic_task, renderer)
    words = {**topic_task.label_words, "billing": " ", "login": "pass"}
    with pytest.raises(DataError, match="task.label_words"):
        check_labels(dataclasses.replace(topic_task, label_words=words), renderer)
