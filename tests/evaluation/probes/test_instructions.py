"""Embedded requests: every right answer obeys, others do not; what is judged is never trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from conf.errors import ConfigError, DataError
from conf.groups import TaskConfig
from conf.records import Item
from evaluation.probes.general_set import general_items
from evaluation.probes.instruction_tables import QUESTIONS, TEST_QUESTIONS
from evaluation.probes.instructions import (
    INSTRUCTIONS,
    instruction_arm,
    instruction_task,
    obeys,
    requests,
)
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import load_task
from evaluation.tasks.held_out import HeldOut
from tests.evaluation.jobs import REAL, make_arm, run

TASK = instruction_task(66)
TRAIN, JUDGED = TASK.items["train"], requests(is_test=True)


def obeyed(kind: str, argument: str, answer: str) -> bool | None:
    item = Item(id="i", split="x", input="?", sha256="", target="x")
    item.slices.update(instruction=kind, argument=argument)
    return obeys(answer, item, TASK).is_correct


def test_every_right_answer_obeys_its_instruction() -> None:
    assert all(obeys(i.answer_key, i, TASK).score == 1.0 for i in (*TRAIN, *JUDGED))


def test_the_plain_sentence_obeys_only_where_it_happens_to() -> None:
    """A model that ignores the instruction must not score: one_line, and sometimes the count."""
    sentences = {q.text: q.sentence for q in (*QUESTIONS, *TEST_QUESTIONS)}
    lucky: Counter[str] = Counter()
    for item in (*TRAIN, *JUDGED):
        (sentence,) = {s for text, s in sentences.items() if text in item.input}
        lucky[item.slices["instruction"]] += obeys(sentence, item, TASK).score == 1.0
    assert set(+lucky) == {"one_line", "num_words"}


@pytest.mark.parametrize(
    ("kind", "argument", "good", "bad"),
    [
        ("upper_case", "", ["PARIS.", "A 2"], ["Paris", "12", ""]),
        ("lower_case", "", ["it is 8."], ["It is 8.", "8"]),
        ("end_word", "truly", ["It is so, truly.", "Truly"], ["truly it is", "", "untruly"]),
        ("first_word", "Well", ["well, yes", '"Well" he said'], ["Wellness", "It is well"]),
        ("num_words", "3", ["It is  red."], ["red", "It is very red"]),
        ("json_key", "reply", ['{"reply": 3}'], ['{"reply": ""}', '{"a": 1}', "{", "[1]", '"x"']),
        ("json_key", "a", ['{"a": "b"}'], ['{"a": 1, "b": 2}', '```{"a": 1}```']),
        ("quotes", "", ['"yes"'], ["'yes'", '""', '"yes" he said', '"']),
        ("brackets", "", ["[yes]"], ["(yes)", "[]", "[yes"]),
        ("twice", "|", ["red | red", "Red|red."], ["red", "red | blue", "|", "red | red | red"]),
        ("one_line", "", ["short"], ["a\nb", "x" * 61, ""]),
        ("bullet", "", ["- yes"], ["-yes", "yes", "- "]),
    ],
)
def test_each_check(kind: str, argument: str, good: list[str], bad: list[str]) -> None:
    assert [obeyed(kind, argument, text) for text in good] == [True] * len(good)
    assert [obeyed(kind, argument, text) for text in bad] == [False] * len(bad)


def test_what_is_judged_is_never_trained() -> None:
    held_out = HeldOut([*JUDGED, *general_items()])
    assert not [i.input for i in TRAIN if held_out.has(i)]
    assert not [i.input for i in JUDGED if HeldOut(general_items()).has(i)]
    assert not {q.text for q in QUESTIONS} & {q.text for q in TEST_QUESTIONS}
    new = {i.name for i in INSTRUCTIONS if not i.is_trained}
    assert new == {i.slices["instruction"] for i in JUDGED if i.slices["kind"] == "new kinds"}
    assert not new & {i.slices["instruction"] for i in TRAIN}
    for instruction in INSTRUCTIONS:
        if instruction.is_trained:
            last = instruction.wordings[-1].split("{}")[0]
            assert not [i for i in TRAIN if last in i.input]


def test_any_first_part_has_all_kinds_about_equally() -> None:
    assert requests(is_test=True) == JUDGED
    assert TASK.items["instructions"] == JUDGED[:66]
    for count in (11, 22, 66):
        kinds = Counter(i.slices["instruction"] for i in JUDGED[:count])
        assert set(kinds.values()) == {count // 11}
    assert len({i.id for i in (*TRAIN, *JUDGED)}) == len(TRAIN) + len(JUDGED)


def test_the_rule_is_not_for_other_tasks() -> None:
    with pytest.raises(ConfigError, match=r"task\.scoring"):
        load_task(TaskConfig(name="x", source="sms_spam", scoring="obeys"))
    with pytest.raises(DataError, match="no instruction"):
        obeys("x", Item(id="i", split="x", input="?", sha256="", target="x"), TASK)


def test_the_set_is_asked_plainly_and_billed(tiny_model_dir: Path) -> None:
    """Whatever the arm's prompt and sampling, one greedy answer to each request."""
    sampled = {**REAL, "temperature": 0.7, "repeats": 3, "stop": ["x"]}
    arm = instruction_arm(make_arm(engine=sampled, prompt="few_shot", num_shots=2))
    renderer = Renderer.load(tiny_model_dir, layout="plain")
    task = instruction_task(5)
    found = run(arm, task, tiny_model_dir, renderer, sets=("instructions",))
    by_id = {s.item_id: s for s in found.samples}
    assert len(found.samples) == 5 and set(by_id) == {i.id for i in JUDGED[:5]}
    assert {(s.set, s.repeat, s.answer_by) for s in found.samples} == {
        ("instructions", 0, "generate")
    }
    assert {line.purpose for line in found.lines} <= {"instructions", "shared", "padding"}
    for item in JUDGED[:5]:
        answer = by_id[item.id].answer or ""
        assert by_id[item.id].score == obeys(answer, item, task).score
    assert all("Answer the request." in text for text in found.prompts.values())
