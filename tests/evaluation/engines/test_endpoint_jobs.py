"""An evaluation job whose model is hosted: messages, records and bill."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from conf.choices import AnswerBy
from conf.errors import ConfigError
from conf.run_groups import HostedPrice
from evaluation.answering import call_records
from evaluation.answering.runner import EvaluateJob, evaluate
from evaluation.engines.endpoint_ceiling import EndpointPlace, cost_usd
from evaluation.engines.endpoint_hosted import HostedEngine
from evaluation.prompts.rendering import Renderer
from evaluation.scoring.answers import read_answer
from evaluation.tasks import Task
from tests.evaluation import endpoint_server
from tests.evaluation.endpoint_server import Behaviour, serving
from tests.evaluation.jobs import Outcome, long_items, make_arm, small

PRICE = HostedPrice(
    input_usd_per_million=2.0,
    cached_input_usd_per_million=0.5,
    output_usd_per_million=8.0,
    source="test",
    date="2026-01-01",
)


@pytest.fixture(scope="module")
def renderer(tiny_model_dir: Path) -> Renderer:
    return Renderer.load(tiny_model_dir, layout="plain")


def outcome(
    task: Task, renderer: Renderer, url: str, answers: Path, *, sets: tuple[str, ...], **method: str
) -> Outcome:
    arm = make_arm(engine={"name": "openai", "base_url": url, "model": "big"}, **method)
    engine = HostedEngine(arm.engine, place=EndpointPlace(answers=answers, price=PRICE))
    job = EvaluateJob(name="job", arm=arm, sets=sets, devices=0, usd_per_device_second=0.1)
    events = list(evaluate(job, task=task, engine=engine, renderer=renderer))
    assert sum(e.tokens for e in Outcome(events, engine).lines) == engine.rows_computed
    return Outcome(events, engine)


def test_records_and_bill_are_the_endpoints_own(
    topic_task: Task, renderer: Renderer, tmp_path: Path
) -> None:
    # Items over the local model's context are no concern of a hosted one's.
    task, does = long_items(small(topic_task), 2), Behaviour()
    with serving(does) as url:
        out = outcome(task, renderer, url, tmp_path, sets=("validation", "test"))
        again = outcome(task, renderer, url, tmp_path, sets=("validation", "test"))
    assert out.rule.answer_by == "generate" and all(s.error is None for s in out.samples)
    assert all(s.prompt_tokens and s.cached_tokens == 4 for s in out.samples)
    assert {len(body["messages"]) for body in does.bodies} == {2}
    asked = {body["messages"][-1]["content"]: body for body in does.bodies}
    assert sum(does.requests.values()) == len(asked)
    usd = sum(
        cost_usd(PRICE, prompt_tokens=len(p) + 5, cached_tokens=4, completion_tokens=3) or 0.0
        for p in asked
    )
    new, reused = (
        sum(line.usd or 0.0 for line in out.lines if line.is_reused is flag)
        for flag in (False, True)
    )
    assert new + reused == pytest.approx(usd, rel=1e-9)
    assert sum(line.device_seconds for line in out.lines) == 0.0
    lines = [line for line in again.lines if not line.is_reused]
    assert sum(line.usd or 0.0 for line in lines) == 0.0  # found again, and on the bill as reused
    assert sum(line.usd or 0.0 for line in again.lines) == pytest.approx(usd, rel=1e-9)
    assert [s.answer for s in again.samples] == [s.answer for s in out.samples]


def test_a_thought_goes_back_as_the_beginning_of_the_answer(
    topic_task: Task, renderer: Renderer, tmp_path: Path
) -> None:
    does = Behaviour()
    with serving(does) as url:
        task = small(topic_task, test=2)
        out = outcome(task, renderer, url, tmp_path, sets=("test",), prompt="chain_of_thought")
    roles = [[turn["role"] for turn in body["messages"]] for body in does.bodies]
    assert all(turns[-1] == "assistant" for turns in roles)
    last = does.bodies[-1]["messages"][-1]["content"]
    assert last.startswith("Let's think step by step. word") and last.endswith("So the answer is")
    assert {s.call for s in out.of("test")} == {0, 1}


def test_counts_that_are_not_told_are_null(
    topic_task: Task, renderer: Renderer, tmp_path: Path
) -> None:
    with serving(Behaviour(usage=False)) as url:
        out = outcome(small(topic_task), renderer, url, tmp_path, sets=("test",))
    for s in out.of("test"):
        counts = (s.prompt_tokens, s.cached_tokens, s.computed_tokens, s.completion_tokens)
        assert counts == (None,) * 4 and s.answer is None or s.completion is not None
    assert any(line.usd is None for line in out.lines)


def test_scores_are_refused_by_name(topic_task: Task, renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="answer_by=generate"):
        outcome(
            small(topic_task),
            renderer,
            "http://127.0.0.1:1/v1",
            tmp_path,
            sets=("test",),
            answer_by=AnswerBy.score,  # type: ignore[arg-type]
        )


def test_answers_that_name_no_label_are_counted_and_read_anew_without_a_request(
    topic_task: Task, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer in ten is rubbish; a reader that understands it needs the stored texts alone."""

    def is_rubbish(prompt: str) -> bool:
        return hashlib.sha256(prompt.encode()).digest()[0] % 10 == 0

    monkeypatch.setattr(
        endpoint_server, "answer_to", lambda p: "}{ \u2603 ??" if is_rubbish(p) else "billing"
    )
    does, task = Behaviour(), small(topic_task, validation=28, test=42)
    with serving(does) as url:
        first = outcome(task, renderer, url, tmp_path, sets=("validation", "test"))
        asked = sum(does.requests.values())
        monkeypatch.setattr(
            call_records,
            "read_answer",
            lambda text, item, task: "login" if "??" in text else read_answer(text, item, task),
        )
        second = outcome(task, renderer, url, tmp_path, sets=("validation", "test"))
    rubbish = sum(is_rubbish(prompt) for prompt in does.requests)
    assert 0 < rubbish < asked / 3
    assert all(s.error is None for s in first.samples)  # the endpoint did what it was asked
    answers = Counter(s.answer for s in first.samples)
    assert answers == {"billing": asked - rubbish, None: rubbish}
    unread = [s for s in first.samples if s.answer is None]
    assert all(s.is_correct is False and s.is_format_valid is False for s in unread)
    assert Counter(s.answer for s in second.samples) == {
        "billing": asked - rubbish,
        "login": rubbish,
    }
    assert sum(does.requests.values()) == asked
