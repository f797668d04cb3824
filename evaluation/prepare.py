"""Training rows: what an arm's prompt and the right answer become as token ids and targets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from conf.choices import ShotSelection
from conf.errors import ConfigError, DataError
from conf.hashing import sha256_of
from conf.records import Item, RenderedExample, SourceRows, from_dict, to_dict
from conf.resolve import Arm
from evaluation.prompts import PromptContext, Style, draw_shots, first_ask, first_call, get_style
from evaluation.prompts.rendering import Renderer, joint_ids
from evaluation.prompts.shots import NearestShots
from evaluation.tasks import Task

MAX_TOO_LONG_SHARE = 0.05
STYLES_WITHOUT_SHOTS = ("zero_shot", "bare", "cloze")
TARGET_OPEN, TARGET_CLOSE = ">>>", "<<<"


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainingRows:
    """The rows of one arm.

    prompt_sha256: of the prompt with placeholders for the item. num_truncated: items left out since
    they do not fit the model's context; no row is ever cut. shown_row: one row as text, its targets
    between >>> and <<<. sources: what was kept and dropped of each; their rows stand in this order.
    """

    rows: tuple[RenderedExample, ...]
    prompt_sha256: str
    num_truncated: int
    shown_row: str
    sources: tuple[SourceRows, ...] = ()


def context_for(task: Task, arm: Arm) -> PromptContext:
    """What the arm's prompt style may use: instruction, label words, shots, persona.

    Raises:
        ConfigError: more shots than training items, or shots for a style that shows none.
    """
    method = arm.answering
    key = f"arms.{arm.name}"
    if method.num_shots and method.prompt in STYLES_WITHOUT_SHOTS:
        raise ConfigError(
            f"{key}.num_shots",
            found=f"{method.num_shots} with prompt={method.prompt}, which shows no shots",
            expected="0, or a style that shows them",
            remedy=f"write {key}.prompt=few_shot",
        )
    return PromptContext(
        instruction=method.instruction or task.instruction,
        kind=task.kind,
        labels=tuple(task.word(label) for label in task.labels),
        shots=draw_shots(
            task,
            num_shots=method.num_shots,
            selection=method.shot_selection,
            draw=method.draw,
            key=f"{key}.num_shots",
        ),
        answer_word=lambda item: task.word(item.answer_key),
        persona=method.persona,
        max_thought_tokens=method.max_thought_tokens,
        retrieve=NearestShots(task.items["train"], num_shots=method.num_shots)
        if method.shot_selection is ShotSelection.retrieved
        else None,
    )


def prompt_pattern(style: Style, context: PromptContext, renderer: Renderer, *, like: Item) -> str:
    """The rendered text of a style's first call with placeholders where the item's texts go.

    like: any item of the task; it says which fields there are.
    """
    probe = replace(
        like,
        id="pattern",
        input="{input}",
        context=None if like.context is None else "{context}",
        choices=tuple(f"{{choice {i + 1}}}" for i in range(len(like.choices))),
        rationale=None,
        slices={name: f"{{{name}}}" for name in like.slices},
    )
    call = first_call(style, probe, context)
    return renderer.render(call.messages, call.prefix)


def training_rows(
    task: Task, arm: Arm, renderer: Renderer, *, split: str = "train"
) -> TrainingRows:
    """Render and tokenise a split for training, in the split's order.

    The prompt is the arm's own, so that training and evaluation see the same text. Targets are the
    answer and the token that ends it; for a style that thinks first, the rationale too. An item
    that is one of the shots does not see itself among them.

    Raises:
        DataError: over 5% of the items, or all, are too long; an item has no rationale or target.
    """
    style = get_style(arm.answering.prompt, key=f"arms.{arm.name}.prompt")
    context = context_for(task, arm)
    items = task.items[split]
    every_row = [training_row(item, style, context, renderer) for item in items]
    rows = tuple(row for row in every_row if len(row.input_ids) <= renderer.max_length)
    num_too_long = len(every_row) - len(rows)
    if not rows or num_too_long > MAX_TOO_LONG_SHARE * len(every_row):
        longest = max((len(row.input_ids) for row in every_row), default=0)
        raise DataError(
            f"{task.name}, {split} split",
            found=f"{num_too_long} of {len(every_row)} rows over {renderer.max_length} tokens; "
            f"the longest has {longest}",
            expected=f"at most {MAX_TOO_LONG_SHARE:.0%} of rows over the model's context",
            remedy=f"shorten the inputs or lower arms.{arm.name}.num_shots",
        )
    pattern = prompt_pattern(style, context, renderer, like=items[0])
    return TrainingRows(
        rows=rows,
        prompt_sha256=sha256_of(pattern),
        num_truncated=num_too_long,
        shown_row=shown_row(rows[0], renderer),
        sources=(
            source_rows(
                "target",
                kept=rows,
                dropped=[row for row in every_row if len(row.input_ids) > renderer.max_length],
                num_items=len(items),
            ),
        ),
    )


def source_rows(
    name: str,
    *,
    kept: Sequence[RenderedExample],
    dropped: Sequence[RenderedExample],
    num_items: int,
    **facts: Any,
) -> SourceRows:
    """The counts of one source; facts: further fields of SourceRows."""
    return SourceRows(
        source=name,
        num_items=num_items,
        num_rows=len(kept),
        tokens=sum(len(row.input_ids) for row in kept),
        target_tokens=sum(sum(row.target_mask) for row in kept),
        num_dropped=len(dropped),
        dropped_tokens=sum(len(row.input_ids) for row in dropped),
        **facts,
    )


def training_row(
    item: Item, style: Style, context: PromptContext, renderer: Renderer
) -> RenderedExample:
    """One item's row; what follows the first call's prompt is the completion."""
    others = tuple(shot for shot in context.shots if shot.id != item.id)
    context = replace(context, shots=others)
    ask = first_ask(style, item, context)
    first = first_call(style, item, context)
    prompt = renderer.render(first.messages, first.prefix)
    asked = renderer.render(ask.messages, ask.prefix)
    completion = context.answer_word(item)
    if asked != prompt and asked.startswith(prompt):
        completion = asked[len(prompt) :].lstrip(" ") + renderer.gap(asked) + completion
    else:
        prompt = asked
    joint = joint_ids(renderer, prompt, [completion], end=True)
    targets = joint.completion_ids[0]
    return RenderedExample(
        item_id=item.id,
        input_ids=(*joint.prompt_ids, *targets),
        target_mask=(0,) * len(joint.prompt_ids) + (1,) * len(targets),
    )


def shown_row(row: RenderedExample, renderer: Renderer) -> str:
    """A row as text, special tokens included, with its targets marked."""
    text = ""
    pairs = zip(row.input_ids, row.target_mask, strict=True)
    for is_target, run in groupby(pairs, key=lambda pair: pair[1]):
        piece = renderer.decode([id_ for id_, _ in run], has_special_tokens=True)
        text += f"{TARGET_OPEN}{piece}{TARGET_CLOSE}" if is_target else piece
    return text


def write_rows(rows: Sequence[RenderedExample], path: Path) -> None:
    """One JSON object a line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(json.dumps(to_dict(row)) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def read_rows(path: Path) -> tuple[RenderedExample, ...]:
    """The rows that write_rows wrote; DataError with file and line for anything else."""
    return tuple(_read_rows(path))


def _read_rows(path: Path) -> Iterator[RenderedExample]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = from_dict(RenderedExample, json.loads(line))
            except (ValueError, TypeError) as error:
                raise _bad_row(path, number, str(error)) from None
            if len(row.input_ids) != len(row.target_mask) or not any(row.target_mask):
                raise _bad_row(path, number, "no targets, or a mask of another length")
            yield row


def _bad_row(path: Path, number: int, found: str) -> DataError:
    return DataError(
        f"{path}:{number}",
        found=found,
        expected="item_id, input_ids and target_mask, with at least one target",
        remedy="delete the file: it is made again",
    )
