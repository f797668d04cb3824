"""A tuned arm with prompt=bare sees the input alone: fewer tokens, the same targets."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.prepare import context_for, training_rows
from evaluation.prompts import first_ask, get_style
from evaluation.prompts.rendering import Renderer
from tests.evaluation.chat_models import make_arm, make_task, write_model


@pytest.fixture
def renderer(tmp_path: Path) -> Renderer:
    return Renderer.load(write_model(tmp_path / "model"))


def test_rows_lose_the_instruction_and_nothing_else(renderer: Renderer) -> None:
    task = make_task()
    full = training_rows(task, make_arm("zero_shot", is_tuned=True), renderer)
    bare = training_rows(task, make_arm("bare", is_tuned=True), renderer)
    saved = {len(a.input_ids) - len(b.input_ids) for a, b in zip(full.rows, bare.rows, strict=True)}
    assert len(saved) == 1 and min(saved) >= len(renderer.encode(task.instruction)) - 2
    for a, b in zip(full.rows, bare.rows, strict=True):
        count = sum(b.target_mask)
        assert a.input_ids[-count:] == b.input_ids[-count:] and sum(a.target_mask) == count
    assert full.prompt_sha256 != bare.prompt_sha256


def test_the_prompt_that_is_trained_is_the_prompt_that_is_asked(renderer: Renderer) -> None:
    task, arm = make_task(), make_arm("bare", is_tuned=True)
    context = context_for(task, arm)
    for row, item in zip(training_rows(task, arm, renderer).rows, task.items["train"], strict=True):
        messages = first_ask(get_style("bare"), item, context).messages
        text = renderer.decode(list(row.input_ids), has_special_tokens=True)
        assert item.input in text and task.instruction not in text
        assert [m.content for m in messages if m.content] == [item.input]
