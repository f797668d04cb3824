"""Is an arm still steered by a request? The task's own items, each with an instruction added.

A model that was tuned to one form of answer may answer so whatever it is asked. Each item carries
an instruction on the form of its answer, which a program checks; whether the answer is right is not
judged. Asked with the arm's own prompt, as its users would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from conf.choices import AnswerBy, TaskKind
from conf.hashing import sha256_of
from conf.records import Item
from conf.resolve import Arm
from evaluation.probes.instructions import ARGUMENT, KIND
from evaluation.tasks import Task
from evaluation.tasks.defaults import LABEL_KINDS, OBEYS

STEERING = "steering"
MAX_NEW_TOKENS = 12  # the forms that are asked for take 2 to 9
# check of evaluation/probes/instructions.py -> what is asked; {} stands for its argument
REQUESTS = {
    "opening": 'Answer in Spanish, and begin with "{}".',
    "num_words": "Answer in exactly {} word.",
    "json_key": 'Answer as JSON with the one key "{}".',
    "forbidden_word": 'Answer without the word "{}".',
}
ARGUMENTS = {"opening": "La respuesta es", "num_words": "1", "json_key": "answer"}


def steering_items(task: Task, items: Sequence[Item]) -> tuple[Item, ...]:
    """The items with an instruction each, the kinds in turn."""
    kinds = list(REQUESTS)
    return tuple(_steered(task, item, kinds[i % len(kinds)]) for i, item in enumerate(items))


def _steered(task: Task, item: Item, kind: str) -> Item:
    """The forbidden word is the first of the right answer: what a tuned model would say."""
    words = task.word(item.answer_key).split()
    first = words[0].strip(".,;:!?\"'()[]{}") if words else ""
    argument = ARGUMENTS.get(kind, first or "the")
    text = f"{item.input}\n{REQUESTS[kind].format(argument)}"
    return replace(
        item,
        id=f"{STEERING}-{item.id}",
        split=STEERING,
        input=text,
        sha256=sha256_of([STEERING, item.sha256, text]),
        slices={KIND: kind, ARGUMENT: argument},
    )


def judged_by_form(task: Task) -> Task:
    """The task as its steered answers are read: any text, judged by its form."""
    return replace(task, kind=TaskKind.pairs, scoring=OBEYS, labels=(), json_schema=None)


def steering_arm(arm: Arm, task: Task) -> Arm:
    """The arm with its own prompt, asked once and without sampling; labels get room for a form."""
    limit = arm.engine.max_new_tokens
    if limit is None and task.kind in LABEL_KINDS:
        limit = MAX_NEW_TOKENS
    engine = replace(arm.engine, temperature=0.0, repeats=1, max_new_tokens=limit)
    method = replace(arm.answering, self_consistency=False, answer_by=AnswerBy.generate)
    return replace(arm, engine=engine, method=method)
