"""Other wordings and steering: what is asked, what it is judged by, and that it is billed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from conf.choices import TaskKind
from conf.records import AnswerRule, Item
from evaluation.probes.instructions import ARGUMENT, KIND, obeys
from evaluation.probes.steering import STEERING, judged_by_form, steering_items
from evaluation.probes.wordings import WORDING, further_wordings, paraphrases
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task
from tests.evaluation.jobs import generation, make_arm, multiple_choice, run, small

RULE = AnswerRule(arm="arm", answer_by="score")


def asked(task: Task, *, wordings: int = 2, items: int = 3, steered: int = 4) -> Task:
    tests = task.items["test"]
    further = {WORDING: tests[:items], STEERING: steering_items(task, tests[:steered])}
    return dataclasses.replace(
        task,
        instructions=further_wordings(task, wordings),
        items={**task.items, **further},
    )


def test_the_same_items_are_asked_under_other_wordings(
    topic_task: Task, tiny_model_dir: Path
) -> None:
    task = asked(small(topic_task))
    renderer = Renderer.load(tiny_model_dir, layout="plain")
    arm = make_arm(engine={"name": "forest"})
    found = run(arm, task, tiny_model_dir, renderer, sets=(WORDING,), rule=RULE, step=7)
    ids = [item.id for item in task.items[WORDING]]
    assert sorted((s.paraphrase, s.item_id) for s in found.of(WORDING)) == [
        (number, i) for number in (1, 2) for i in sorted(ids)
    ]
    assert all(s.step == 7 and s.answer in task.labels for s in found.samples)
    for number, words in enumerate(task.instructions, start=1):
        hashes = {s.prompt_sha256 for s in found.samples if s.paraphrase == number}
        assert all(words in found.prompts[h] for h in hashes)
    assert {line.purpose for line in found.lines} <= {WORDING, "shared", "padding"}
    done = found.samples[:4]
    rest = run(arm, task, tiny_model_dir, renderer, sets=(WORDING,), rule=RULE, done=done)
    assert {(s.paraphrase, s.item_id) for s in rest.samples} == {
        (s.paraphrase, s.item_id) for s in found.samples[4:]
    }


def test_a_prompt_without_the_instruction_has_no_wordings(
    topic_task: Task, tiny_model_dir: Path
) -> None:
    renderer = Renderer.load(tiny_model_dir, layout="plain")
    arm = make_arm(prompt="bare")
    found = run(arm, asked(small(topic_task)), tiny_model_dir, renderer, sets=(WORDING,), rule=RULE)
    assert found.samples == []


def test_a_steered_arm_keeps_its_prompt_and_its_shots(
    topic_task: Task, tiny_model_dir: Path
) -> None:
    task = asked(small(topic_task))
    renderer = Renderer.load(tiny_model_dir, layout="plain")
    arm = make_arm(engine={"name": "forest"}, prompt="few_shot", num_shots=2, answer_by="score")
    found = run(arm, task, tiny_model_dir, renderer, sets=(STEERING,), rule=RULE)
    by_id = {item.id: item for item in task.items[STEERING]}
    assert {s.item_id for s in found.of(STEERING)} == set(by_id)
    for sample in found.samples:
        assert sample.answer_by == "generate" and sample.completion_tokens <= 12
        score = obeys(sample.completion or "", by_id[sample.item_id], task)
        assert sample.is_correct == score.is_correct
        prompt = found.prompts[sample.prompt_sha256]
        assert task.instruction in prompt and by_id[sample.item_id].input in prompt
        assert sum(prompt.count(item.input) for item in task.items["train"]) == 2
    assert {line.purpose for line in found.lines} <= {STEERING, "shared", "padding"}


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("opening", "la respuesta es: lluvia", "weather. La respuesta es"),
        ("num_words", "weather", "the weather"),
        ("json_key", '{"answer": "weather"}', "answer: weather"),
        ("forbidden_word", "It is about rain.", "Weather!"),
    ],
)
def test_what_obeys_is_seen_by_its_form(topic_task: Task, kind: str, good: str, bad: str) -> None:
    items = [i for i in topic_task.items["test"] if i.label == "weather"]
    found = steering_items(topic_task, items[:4])
    item = next(i for i in found if i.slices[KIND] == kind)
    task = judged_by_form(topic_task)
    assert obeys(good, item, task).is_correct and not obeys(bad, item, task).is_correct
    assert not obeys("", item, task).is_correct
    assert item.slices[ARGUMENT] in item.input and item.answer_key == "weather"


def test_the_kinds_come_in_turn_and_no_id_is_a_test_items(topic_task: Task) -> None:
    tests = topic_task.items["test"]
    items = steering_items(topic_task, tests[:8])
    kinds = [item.slices[KIND] for item in items]
    assert kinds[:4] == kinds[4:] and len(set(kinds)) == 4
    assert not {i.id for i in items} & {i.id for i in tests}
    assert {i.split for i in items} == {STEERING}


def test_paraphrases_name_the_labels_and_keep_the_form(topic_task: Task) -> None:
    for text in paraphrases(topic_task):
        assert all(label in text for label in topic_task.labels)
    numeric = dataclasses.replace(generation(topic_task), scoring="numeric")
    assert all("number" in text for text in paraphrases(numeric))
    as_json = dataclasses.replace(generation(topic_task), scoring="json")
    assert all(as_json.instruction in text for text in paraphrases(as_json))
    for task in (topic_task, numeric, as_json, multiple_choice(topic_task), _with_context(numeric)):
        assert len({*paraphrases(task), task.instruction}) == 4
    assert len({paraphrases(t) for t in (numeric, _with_context(numeric))}) == 2


def test_the_users_own_wordings_come_first(topic_task: Task) -> None:
    own = ("Name it.", topic_task.instruction, "Which one?")
    task = dataclasses.replace(topic_task, instructions=own)
    assert further_wordings(task, 2) == ("Name it.", "Which one?")
    assert further_wordings(task, 9) == ("Name it.", "Which one?", *paraphrases(task))


def _with_context(task: Task) -> Task:
    def add(item: Item) -> Item:
        return dataclasses.replace(item, context="Some text.")

    items = {split: tuple(map(add, rows)) for split, rows in task.items.items()}
    return dataclasses.replace(task, kind=TaskKind.generation, items=items)
