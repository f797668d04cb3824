"""Other wordings of a task's instruction: how much do an arm's answers hang on the words?

A task that brings none gets plain paraphrases of the sentence that its kind has by default
(evaluation/tasks/defaults.py). Prompt formats alone were seen to move accuracy by 10 to 76 points
(Sclar et al. 2024, arXiv 2310.11324).
"""

from __future__ import annotations

from dataclasses import replace

from conf.choices import TaskKind
from conf.records import Item
from conf.resolve import Arm
from evaluation.prepare import context_for
from evaluation.prompts import first_call, get_style
from evaluation.tasks import Task

WORDING = "wording"
# {} stands for the words of the labels
_LABELS = (
    "Read the text and say which of these fits best: {}. Write only that.",
    "Which label does the text deserve? Choose one of {} and give nothing else.",
    "Sort the text into one of the classes {}. Reply with the class alone.",
)
_CHOICES = (
    "Pick the choice that answers the question. Write only the choice.",
    "Which of the choices is right? Reply with that choice alone.",
    "Read the question and the choices, and give the correct one, word for word.",
)
_CONTEXT = (
    "Find the answer to the question in the context. Write it as briefly as you can.",
    "Using the context alone, reply to the question with a few words.",
    "Read the context, then answer the question shortly, with nothing added.",
)
_FREE = (
    "Here is an input. Reply with its answer and nothing else.",
    "Give the answer that belongs to the input. Add no explanation.",
    "Work out what the input asks for, and write only that.",
)
# Forms that a scoring rule reads are kept in every wording.
_FORMS = {"numeric": " The answer is one number.", "json": " The answer is one JSON object"}


def paraphrases(task: Task) -> tuple[str, ...]:
    """Three further wordings of what a task of this kind asks by default."""
    words = ", ".join(task.word(label) for label in task.labels)
    match task.kind:
        case TaskKind.classification:
            return tuple(text.format(words) for text in _LABELS)
        case TaskKind.multiple_choice:
            return _CHOICES
    has_context = any(item.context for item in task.items["train"])
    form = _FORMS.get(task.scoring, "")
    if task.scoring == "json":
        form += f" as here: {task.instruction}"
    return tuple(text + form for text in (_CONTEXT if has_context else _FREE))


def further_wordings(task: Task, count: int) -> tuple[str, ...]:
    """At most `count` wordings other than the task's own: the user's first, then paraphrases."""
    others = dict.fromkeys((*task.instructions, *paraphrases(task)))
    return tuple(text for text in others if text != task.instruction)[:count]


def worded(arm: Arm, wording: str) -> Arm:
    """The arm with another instruction."""
    return replace(arm, method=replace(arm.answering, instruction=wording))


def is_worded(arm: Arm, task: Task, wording: str, item: Item) -> bool:
    """Whether the arm's prompt shows the instruction at all: a bare one, say, does not."""
    style = get_style(arm.answering.prompt)
    one, other = (
        first_call(style, item, context_for(task, a)).messages for a in (arm, worded(arm, wording))
    )
    return one != other
