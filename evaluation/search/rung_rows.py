"""The rows that a search of trainings is judged by: validation items as the trained arm is asked.

A task with labels has a row for each label of an item, with the very tokens that the engine scores
(answering/calls.py), so that a trial's value is the accuracy of its plain sums. Where an answer is
generated, or a style thinks before it asks, an item has one row, its right answer, and counts by
its loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from conf.errors import DataError
from conf.records import Item, RenderedExample
from conf.resolve import Arm
from conf.trial_records import LabelRow
from evaluation.answering.calls import CallMaker
from evaluation.answering.rule_choice import ways_to_answer
from evaluation.engines.base import ScoreRequest
from evaluation.prepare import context_for, training_row
from evaluation.prompts import Ask, get_style
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task


def rung_rows(task: Task, arm: Arm, renderer: Renderer) -> tuple[LabelRow, ...]:
    """The rows of all validation items that fit the model's context, in the items' order.

    Raises:
        DataError: none fits.
    """
    items = task.items["validation"]
    by_label = _label_rows(task, arm, renderer)
    rows = tuple(by_label if by_label is not None else _answer_rows(task, arm, renderer))
    if not rows:
        raise DataError(
            f"{task.name}, validation split",
            found=f"no item of {len(items)} that fits the context of {renderer.max_length} tokens",
            expected="items to judge the trials of a search by",
            remedy=f"shorten the inputs, or lower arms.{arm.name}.num_shots",
        )
    return rows


def _label_rows(task: Task, arm: Arm, renderer: Renderer) -> list[LabelRow] | None:
    """A row for each label of each item; None where labels are not what is scored."""
    if ways_to_answer(arm, task)[0] != "score":
        return None
    maker = CallMaker(arm, task=task, renderer=renderer)
    rows: list[LabelRow] = []
    for item in task.items["validation"]:
        talk = maker.start(item, repeat=0)
        if not isinstance(talk.call, Ask):
            return None
        call = maker.make(talk, answer_by="score")
        assert isinstance(call.request, ScoreRequest)
        if call.error is None:
            rows += _rows_of(item, call.request, call.labels)
    return rows


def _rows_of(item: Item, request: ScoreRequest, labels: tuple[str, ...]) -> Iterator[LabelRow]:
    prompt = request.prompt_ids
    for number, (label, ids) in enumerate(zip(labels, request.label_ids, strict=True)):
        yield LabelRow(
            item_id=item.id,
            input_ids=(*prompt, *ids),
            target_mask=(0,) * len(prompt) + (1,) * len(ids),
            label=number,
            is_reference=label == item.answer_key,
        )


def _answer_rows(task: Task, arm: Arm, renderer: Renderer) -> Iterator[LabelRow]:
    """One row for each item: what follows its prompt is the right answer."""
    style = get_style(arm.answering.prompt, key=f"arms.{arm.name}.prompt")
    context = context_for(task, arm)
    for item in task.items["validation"]:
        row = training_row(item, style, context, renderer)
        if len(row.input_ids) <= renderer.max_length:
            facts = {f.name: getattr(row, f.name) for f in fields(RenderedExample)}
            yield LabelRow(**facts)
