"""What is asked of an arm besides its task, with its own prompt: other wordings, and to be steered.

And what is asked of its weights with a plain prompt: the probes for bias and for made-up answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from conf.choices import TaskKind
from conf.records import AnswerRule, Item
from conf.resolve import Arm
from evaluation.answering.asking import Asker, Emitted
from evaluation.answering.calls import Pass
from evaluation.probes.probe_scores import is_unanswerable
from evaluation.probes.probe_sets import FREE_INSTRUCTION, PROBE_SETS, UNKNOWN
from evaluation.probes.steering import STEERING, judged_by_form, steering_arm
from evaluation.probes.wordings import WORDING, is_worded, worded
from evaluation.tasks import Task


class MakeAsker(Protocol):
    """An asker of the job that is running.

    arm, task: how prompts are made. read_as: the task by which answers are read and scored; None:
    the same. paraphrase: number of the wording.
    """

    def __call__(
        self, arm: Arm, task: Task, /, *, read_as: Task | None = None, paraphrase: int = 0
    ) -> Asker:
        """The asker."""


def ask_wordings(
    arm: Arm, task: Task, ask: MakeAsker, *, rule: AnswerRule, work: Pass
) -> Iterator[Emitted]:
    """The items of a pass under the task's further wordings, answered by the arm's rule."""
    for number, wording in enumerate(task.instructions, start=1):
        if work.items and is_worded(arm, task, wording, work.items[0]):
            asker = ask(worded(arm, wording), task, paraphrase=number)
            yield from asker.run(replace(work, set=WORDING, purpose=WORDING, rule=rule))


def ask_steered(arm: Arm, task: Task, ask: MakeAsker) -> Iterator[Emitted]:
    """The task's items with instructions of their own."""
    items = task.items[STEERING]
    asker = ask(steering_arm(arm, task), task, read_as=judged_by_form(task))
    yield from asker.run(
        Pass(set=STEERING, purpose=STEERING, answer_by="generate", items=items, is_sample=True)
    )


def ask_probes(arm: Arm, task: Task, ask: MakeAsker) -> Iterator[Emitted]:
    """The probes: choices are scored, items without choices answered freely."""
    for name in PROBE_SETS:
        items = task.items.get(name, ())
        for is_choice in (True, False):
            mine = [item for item in items if bool(item.choices) is is_choice]
            if not mine:
                continue
            kind = TaskKind.multiple_choice if is_choice else TaskKind.generation
            answer_by = "score" if is_choice else "generate"
            instruction = (
                task.instruction if is_choice else FREE_INSTRUCTION.format(_no_answer(mine))
            )
            asker = ask(arm, replace(task, kind=kind, instruction=instruction))
            yield from asker.run(
                Pass(set=name, purpose=name, answer_by=answer_by, items=mine, is_sample=True)
            )


def _no_answer(items: Sequence[Item]) -> str:
    """The word of the user's own file for a question without an answer."""
    return next((item.answer_key for item in items if is_unanswerable(item)), UNKNOWN)
