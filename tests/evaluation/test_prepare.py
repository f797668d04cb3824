"""Training rows: the prompt of the arm's style, targets on the answer and its end alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.records import Item, RenderedExample
from evaluation.prepare import (
    context_for,
    prompt_pattern,
    read_rows,
    training_rows,
    write_rows,
)
from evaluation.prompts import first_ask, get_style
from evaluation.prompts.rendering import Renderer, joint_ids
from evaluation.tasks import Task
from tests.evaluation.chat_models import (
    free_task,
    make_arm,
    make_item,
    make_task,
    spam_items,
    write_model,
)


@pytest.fixture
def renderer(tmp_path: Path) -> Renderer:
    return Renderer.load(write_model(tmp_path / "model"))


def parts(row: RenderedExample, renderer: Renderer) -> tuple[str, str]:
    """Prompt and target texts of a row whose targets are at its end."""
    first = row.target_mask.index(1)
    assert row.target_mask == (0,) * first + (1,) * (len(row.target_mask) - first)
    return tuple(
        renderer.decode(ids, has_special_tokens=True)
        for ids in (row.input_ids[:first], row.input_ids[first:])
    )  # type: ignore[return-value]


@pytest.mark.parametrize("prompt", ["zero_shot", "few_shot", "role_play", "bare"])
def test_a_row_is_the_arms_prompt_and_the_label_word(renderer: Renderer, prompt: str) -> None:
    task = make_task(label_words={"ham": "good", "spam": "bad"})
    arm = make_arm(prompt, is_tuned=True, num_shots=2 if prompt == "few_shot" else 0)
    made = training_rows(task, arm, renderer)
    assert [row.item_id for row in made.rows] == [item.id for item in task.items["train"]]
    context = context_for(task, arm)
    for row, item in zip(made.rows, task.items["train"], strict=True):
        shots = tuple(shot for shot in context.shots if shot.id != item.id)
        ask = first_ask(get_style(prompt), item, replace(context, shots=shots))
        word = {"ham": "good", "spam": "bad"}[item.answer_key]
        assert parts(row, renderer) == (renderer.render(ask.messages), f"{word}<|im_end|>")
    assert made.num_truncated == 0


def test_a_row_begins_as_evaluation_does(renderer: Renderer) -> None:
    """Training ids are the ids that scoring the right label sees, then the end token."""
    task = make_task()
    made = training_rows(task, make_arm(is_tuned=True), renderer)
    context = context_for(task, make_arm())
    for row, item in zip(made.rows, task.items["train"], strict=True):
        ask = first_ask(get_style("zero_shot"), item, context)
        joint = joint_ids(renderer, renderer.render(ask.messages), ["ham", "spam"], end=True)
        right = joint.completion_ids[("ham", "spam").index(item.answer_key)]
        assert row.input_ids == (*joint.prompt_ids, *right)
        assert right[-1] == renderer.end_ids[0] and right.count(renderer.end_ids[0]) == 1


def test_chain_of_thought_trains_on_rationale_and_answer(renderer: Renderer) -> None:
    task = make_task(items={"train": spam_items(4, rationale="It says so.")})
    made = training_rows(task, make_arm("chain_of_thought", is_tuned=True), renderer)
    prompt, target = parts(made.rows[1], renderer)
    assert prompt.endswith("<|im_start|>assistant\nLet's think step by step.")
    assert target == " It says so. So the answer is spam<|im_end|>"
    without = make_task()
    with pytest.raises(DataError, match="rationale"):
        training_rows(without, make_arm("chain_of_thought", is_tuned=True), renderer)


def test_a_shot_does_not_see_itself(renderer: Renderer) -> None:
    task = make_task(items={"train": spam_items(4)})
    made = training_rows(task, make_arm("few_shot", is_tuned=True, num_shots=4), renderer)
    for row, item in zip(made.rows, task.items["train"], strict=True):
        text = renderer.decode(row.input_ids)
        assert text.count(item.input) == 1
        assert text.count("message number") == 4


def test_other_kinds(renderer: Renderer) -> None:
    choice = make_item("Which?", choices=("one", "two"), label="two")
    task = make_task(kind=TaskKind.multiple_choice, labels=(), label_words={})
    task = replace(task, items={"train": (choice,)})
    prompt, target = parts(training_rows(task, make_arm(is_tuned=True), renderer).rows[0], renderer)
    assert "A. one\nB. two" in prompt and target == "two<|im_end|>"
    pair = make_item("Say hi", target="Hi!\nHow are you?")
    task = free_task("rouge_l", kind=TaskKind.pairs, items={"train": (pair,)})
    _, target = parts(training_rows(task, make_arm(is_tuned=True), renderer).rows[0], renderer)
    assert target == "Hi!\nHow are you?<|im_end|>"


def test_the_plain_layout_ends_with_end_of_sequence(tmp_path: Path) -> None:
    renderer = Renderer.load(write_model(tmp_path, template=None, begins=True))
    row = training_rows(make_task(), make_arm(is_tuned=True), renderer).rows[1]
    assert parts(row, renderer) == (
        "<s>Is it ham or spam?\n\nInput: message number 1\nAnswer:",
        " spam<|end|>",
    )
    assert row.input_ids[0] == renderer.encode("")[0]


def test_the_shown_row_marks_its_targets(renderer: Renderer) -> None:
    made = training_rows(make_task(), make_arm(is_tuned=True), renderer)
    assert made.shown_row == (
        "<|im_start|>system\nIs it ham or spam?<|im_end|>\n<|im_start|>user\nmessage number 0"
        "<|im_end|>\n<|im_start|>assistant\n>>>ham<|im_end|><<<"
    )


def long_items(num_long: int, num_short: int) -> tuple[Item, ...]:
    long = tuple(make_item(f"{i} " + "xyz " * 400, label="ham") for i in range(num_long))
    return long + spam_items(num_short)


def test_rows_over_the_context_are_dropped_counted_or_refused(renderer: Renderer) -> None:
    arm = make_arm(is_tuned=True)
    made = training_rows(make_task(items={"train": long_items(2, 40)}), arm, renderer)
    assert (len(made.rows), made.num_truncated) == (40, 2)
    assert all(len(row.input_ids) <= renderer.max_length for row in made.rows)
    assert {row.item_id for row in made.rows} == {item.id for item in spam_items(40)}
    for counts in ((3, 40), (2, 0)):
        with pytest.raises(DataError, match="512 tokens"):
            training_rows(make_task(items={"train": long_items(*counts)}), arm, renderer)


@pytest.mark.parametrize("word", ["", "  "])
def test_a_row_without_targets_is_refused(renderer: Renderer, word: str) -> None:
    task = make_task(label_words={"ham": word, "spam": "spam"})
    with pytest.raises(DataError, match="no text"):
        training_rows(task, make_arm(is_tuned=True), renderer)


def test_the_prompts_hash_follows_the_prompt_and_not_the_items(renderer: Renderer) -> None:
    task = make_task()

    def sha256(task: Task, **fields: object) -> str:
        return training_rows(task, make_arm(is_tuned=True, **fields), renderer).prompt_sha256

    assert sha256(task) == sha256(replace(task, items={"train": spam_items(3)}))
    others = [
        sha256(task, instruction="Sort."),
        sha256(task, prompt="bare"),
        sha256(task, prompt="role_play"),
        sha256(task, prompt="role_play", persona="You are a pirate."),
        sha256(task, prompt="few_shot", num_shots=2),
        sha256(task, prompt="few_shot", num_shots=2, draw=1),
    ]
    assert len({sha256(task), *others}) == 7


def test_the_pattern_shows_where_the_item_goes(renderer: Renderer) -> None:
    item = make_item("?", context="c", choices=("x", "y"), label="x", slices={"tone": "dry"})
    context = context_for(make_task(), make_arm())
    text = prompt_pattern(get_style("zero_shot"), context, renderer, like=item)
    assert "user\n{context}\n{input}\nA. {choice 1}\nB. {choice 2}<|im_end|>" in text


def test_context_for_takes_the_arms_own_fields_first() -> None:
    task = make_task(label_words={"ham": "good", "spam": "bad"})
    context = context_for(task, make_arm("few_shot", num_shots=3, draw=2, instruction="Mine."))
    assert (context.instruction, len(context.shots), context.labels) == (
        "Mine.",
        3,
        ("good", "bad"),
    )
    assert context.answer_word(task.items["train"][1]) == "bad"
    assert context_for(task, make_arm()).instruction == "Is it ham or spam?"


@pytest.mark.parametrize("prompt", ["zero_shot", "bare"])
def test_shots_for_a_style_without_shots_are_refused(prompt: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        context_for(make_task(), make_arm(prompt, num_shots=2))
    assert refusal.value.where == "arms.mine.num_shots"


ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 1)), min_size=1, max_size=9).filter(
        lambda pairs: any(mask for _, mask in pairs)
    ),
    max_size=5,
)


@settings(max_examples=30, deadline=None)
@given(pairs=ROWS, name=st.text(max_size=5))
def test_rows_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[list[tuple[int, int]]], name: str
) -> None:
    rows = tuple(
        RenderedExample(
            item_id=f"{name}{i}",
            input_ids=tuple(id_ for id_, _ in row),
            target_mask=tuple(mask for _, mask in row),
        )
        for i, row in enumerate(pairs)
    )
    path = tmp_path_factory.mktemp("rows") / "deep" / "rows.jsonl"
    write_rows(rows, path)
    assert read_rows(path) == rows
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "{}",
        "[1]",
        '{"item_id": "a", "input_ids": [1, 2], "target_mask": [1]}',
        '{"item_id": "a", "input_ids": [1, 2], "target_mask": [0, 0]}',
    ],
)
def test_a_broken_row_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = RenderedExample(item_id="a", input_ids=(1, 2), target_mask=(0, 1))
    write_rows([good, good], path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError) as refusal:
        read_rows(path)
    assert refusal.value.where == f"{path}:3"
