"""The general set: right answers, checked in another way than they were made, and never changed."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from conf.choices import TaskKind
from evaluation.probes.general_set import (
    KNOWLEDGE,
    MOST_ITEMS,
    WORDS,
    general_arm,
    general_items,
    general_task,
)
from evaluation.prompts.rendering import Renderer
from tests.evaluation.jobs import make_arm, run

ITEMS = general_items()
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def of(kind: str) -> list[tuple[str, str]]:
    return [(i.input, i.answer_key) for i in ITEMS if i.slices["kind"] == kind]


def test_every_item_has_four_different_choices_and_one_right_one() -> None:
    assert len(ITEMS) == MOST_ITEMS == len({i.sha256 for i in ITEMS}) == len({i.id for i in ITEMS})
    for item in ITEMS:
        assert len(set(item.choices)) == len(item.choices) == 4
        assert item.choices.count(item.answer_key) == 1
        assert item.split == "general"


def test_kinds_take_turns_so_that_any_number_of_items_is_balanced() -> None:
    for count in (1, 4, 7, 60, 120):
        counts = Counter(i.slices["kind"] for i in general_items(count))
        assert sum(counts.values()) == count
        assert max(counts.values()) - min(counts.values()) <= 1 or count < 4
    assert general_items(60) == ITEMS[:60]


def test_no_place_among_the_choices_gives_the_answer_away() -> None:
    places = Counter(i.choices.index(i.answer_key) for i in ITEMS)
    assert max(places.values()) < 0.4 * len(ITEMS)


def test_arithmetic_is_right() -> None:
    for question, answer in of("arithmetic"):
        a, sign, b = re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", question).groups()  # type: ignore[union-attr]
        assert OPERATIONS[sign](int(a), int(b)) == int(answer)


def test_copying_is_right() -> None:
    for question, answer in of("copying"):
        head, _, rest = question.partition(": ")
        words = rest.rstrip("?").split(", ")
        place = {"Repeat this word": 0, "Which word is first in this list": 0}.get(head, -1)
        assert words[place] == answer


@pytest.mark.parametrize(("kind", "tables"), [("knowledge", KNOWLEDGE), ("words", WORDS)])
def test_facts_are_those_of_the_tables_and_no_wrong_choice_is_right(
    kind: str, tables: dict[str, dict[str, str]]
) -> None:
    facts = {q.format(about): a for q, t in tables.items() for about, a in t.items()}
    assert dict(of(kind)) == facts
    for facts_of_one in tables.values():  # one answer for each, so that no other row's is right
        assert len(set(facts_of_one.values())) == len(facts_of_one)


def test_it_never_changes() -> None:
    """Another set would make forgetting of old and new runs incomparable."""
    assert general_task(MOST_ITEMS).sha256[:16] == "96f37156f037f5e0"


def test_the_set_is_answered_plainly_whatever_the_arm_does(
    tiny_model_dir: Path,
) -> None:
    arm = make_arm(
        engine={"name": "forest", "winner_only": True},
        prompt="role_play",
        persona="You are a pirate.",
        instruction="Say arr.",
    )
    plain, task = general_arm(arm), general_task(8)
    assert task.kind is TaskKind.multiple_choice
    renderer = Renderer.load(tiny_model_dir, layout="plain")
    outcome = run(plain, task, tiny_model_dir, renderer, sets=("general",), step=3)
    records = outcome.of("general")
    assert [r.item_id for r in outcome.samples] == [r.item_id for r in records]
    assert {r.item_id for r in records} == {i.id for i in task.items["general"]}
    assert {(r.arm, r.step, r.answer_by) for r in records} == {("arm", 3, "score")}
    for record in records:
        assert record.label_logprobs is not None and len(record.label_logprobs) == 4
        assert record.answer == max(record.label_logprobs, key=record.label_logprobs.__getitem__)
        assert record.is_correct == (record.answer == record.target)
    assert not [text for text in outcome.prompts.values() if "pirate" in text or "arr" in text]
    assert {line.purpose for line in outcome.lines} <= {"general", "shared"}


def test_a_resumed_job_asks_only_what_is_missing(tiny_model_dir: Path) -> None:
    arm, task = general_arm(make_arm(engine={"name": "forest"})), general_task(8)
    renderer = Renderer.load(tiny_model_dir, layout="plain")
    whole = run(arm, task, tiny_model_dir, renderer, sets=("general",))
    rest = run(arm, task, tiny_model_dir, renderer, sets=("general",), done=whole.samples[:5])
    assert len(rest.samples) == 3
    again = {r.item_id: r.answer for r in [*whole.samples[:5], *rest.samples]}
    assert again == {r.item_id: r.answer for r in whole.samples}
