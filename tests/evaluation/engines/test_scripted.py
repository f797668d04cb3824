"""The scripted engine: deterministic, counted like a model, without torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.errors import ConfigError
from conf.groups import EngineConfig
from evaluation.engines.base import GenerateRequest, ScoreRequest
from evaluation.engines.scripted import ScriptedEngine
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task


@pytest.fixture(scope="module")
def renderer(tiny_model_dir: Path) -> Renderer:
    return Renderer.load(tiny_model_dir, layout="plain")


def make(script: str, renderer: Renderer, task: Task, *, cache: bool = True) -> ScriptedEngine:
    config = EngineConfig(name="scripted", script=script, prefix_cache=cache)
    return ScriptedEngine(config, renderer=renderer, task=task)


def requests(task: Task, renderer: Renderer, *, shots: int = 0) -> list[ScoreRequest]:
    labels = tuple(tuple(renderer.encode(" " + label)) for label in task.labels)
    head = renderer.encode("Name the topic." + " my invoice is wrong: billing" * shots)
    return [
        ScoreRequest(
            id=f"{item.id}|0|0",
            prompt_ids=(*head, *renderer.encode(" " + item.input)),
            label_ids=labels,
        )
        for item in task.items["test"]
    ]


def accuracy(engine: ScriptedEngine, task: Task, asked: list[ScoreRequest]) -> float:
    hits = 0
    for item, result in zip(task.items["test"], engine.score(asked), strict=True):
        best = max(range(len(task.labels)), key=lambda i: result.label_logprobs[i])
        hits += task.labels[best] == item.label
    return hits / len(asked)


def test_scripts(topic_task: Task, renderer: Renderer) -> None:
    asked = requests(topic_task, renderer)
    assert accuracy(make("oracle", renderer, topic_task), topic_task, asked) == 1.0
    assert accuracy(make("constant", renderer, topic_task), topic_task, asked) == 6 / 42
    noisy = accuracy(make("noisy", renderer, topic_task), topic_task, asked)
    assert 0.6 < noisy < 0.97
    assert noisy == accuracy(make("noisy", renderer, topic_task), topic_task, asked)
    longer = requests(topic_task, renderer, shots=300)
    assert accuracy(make("noisy", renderer, topic_task), topic_task, longer) > noisy


def test_echo_favours_the_label_in_the_prompt(topic_task: Task, renderer: Renderer) -> None:
    labels = tuple(tuple(renderer.encode(" " + label)) for label in topic_task.labels)
    prompt = tuple(renderer.encode("we spoke of travel today"))
    request = ScoreRequest(id="x", prompt_ids=prompt, label_ids=labels)
    (result,) = make("echo", renderer, topic_task).score([request])
    best = max(range(len(labels)), key=lambda i: result.label_logprobs[i])
    assert topic_task.labels[best] == "travel"
    (generated,) = make("echo", renderer, topic_task).generate(
        [GenerateRequest(id="x", prompt_ids=prompt, max_new_tokens=4)]
    )
    assert "we spoke of travel today".endswith(generated.text.strip())


@pytest.mark.parametrize("cache", [True, False])
def test_counts_add_up(topic_task: Task, renderer: Renderer, cache: bool) -> None:
    engine = make("noisy", renderer, topic_task, cache=cache)
    asked = requests(topic_task, renderer)
    scored = list(engine.score(asked))
    answers = [GenerateRequest(id=r.id, prompt_ids=r.prompt_ids, max_new_tokens=5) for r in asked]
    generated = list(engine.generate(answers))
    spent = engine.take_shared()
    own = sum(r.computed_tokens for r in scored) + sum(r.computed_tokens for r in generated)
    assert own + spent.shared_tokens + spent.padding_tokens == engine.rows_computed
    assert (spent.shared_tokens > 0) is cache
    assert engine.take_shared().shared_tokens == 0
    for request, result in zip(asked, scored, strict=True):
        inner = {ids[:k] for ids in request.label_ids for k in range(1, len(ids))}
        assert result.computed_tokens + result.cached_tokens == len(request.prompt_ids) + len(inner)
    for request, answer in zip(asked, generated, strict=True):
        forwarded = len(request.prompt_ids) + answer.completion_tokens - 1
        assert answer.computed_tokens + answer.cached_tokens == forwarded


def test_generated_answers_are_the_labels_words(topic_task: Task, renderer: Renderer) -> None:
    engine = make("oracle", renderer, topic_task)
    items = topic_task.items["test"]
    answers = engine.generate(
        [GenerateRequest(id=f"{i.id}|0|0", prompt_ids=(1, 2), max_new_tokens=20) for i in items]
    )
    assert [a.text for a in answers] == [item.label for item in items]


def test_sleep_is_timed(topic_task: Task, renderer: Renderer) -> None:
    engine = make("oracle+sleep:0.02", renderer, topic_task)
    begun = time.perf_counter()
    results = list(engine.score(requests(topic_task, renderer)[:3], timed=True))
    assert time.perf_counter() - begun >= 0.06
    assert all(r.total_seconds is not None and r.total_seconds >= 0.02 for r in results)


@pytest.mark.parametrize("script", ["", "magic", "sleep:x", "oracle+sleep", "sleep:-1"])
def test_unknown_scripts_are_refused(topic_task: Task, renderer: Renderer, script: str) -> None:
    with pytest.raises(ConfigError, match="engine.script"):
        make(script, renderer, topic_task)


def test_no_torch() -> None:
    code = (
        "import sys, evaluation.engines, evaluation.engines.scripted, evaluation.models.facts,"
        " evaluation.models, evaluation.answering.references, evaluation.answering.runner;"
        "heavy = {'torch', 'transformers', 'peft', 'sklearn'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
