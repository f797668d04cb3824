"""How one prompt does on some validation items, by answers that a desk hands out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from conf.errors import CrossoverError
from conf.records import Item, SampleRecord
from conf.resolve import Arm
from evaluation.answering.asking import Asker, Emitted
from evaluation.answering.bill import Bill
from evaluation.answering.calls import Call, CallMaker, Pass, Talk
from evaluation.answering.rule_choice import compare_ways, ways_to_answer
from evaluation.answering.runner import RECORDS_AT_ONCE, EvaluateJob, check_job, pass_over
from evaluation.prompts.rendering import Renderer
from evaluation.scoring.calibration import fit_offsets
from evaluation.search.shared_answers import Desk
from evaluation.tasks import Task

LEAST_LOGPROB = -69.0  # about log(1e-30): of the right label of an item without an answer

T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class Standing:
    """A prompt's scores of the items, in their order; tie_break: see RungRecord."""

    scores: tuple[float, ...]
    tie_break: float | None = None


class TrialPrompt:
    """One arm's prompt, asked about more and more items."""

    def __init__(self, arm: Arm, *, task: Task, renderer: Renderer) -> None:
        """Nothing is rendered, and nothing refused, before it is asked."""
        self._arm, self._task, self._renderer = arm, task, renderer
        self._calls: _OnceMade | None = None

    @property
    def has_tie_break(self) -> bool:
        """Whether all its labels are scored, so that the right one has a log-probability."""
        is_scored = ways_to_answer(self._arm, self._task)[0] == "score"
        return is_scored and not self._arm.engine.winner_only

    def standing(self, items: Sequence[Item], desk: Desk) -> Standing | str | None:
        """How it does on these items; a text: why it cannot be asked; None: not known yet.

        Args:
            items: of the validation split, the first ones in an order drawn by chance.
            desk: answers.
        """
        found: Standing | str
        try:
            found = self._measured(items, desk)
        except CrossoverError as error:
            found = str(error)
        return None if desk.is_guessing else found

    def _measured(self, items: Sequence[Item], desk: Desk) -> Standing:
        arm, task, method = self._arm, self._task, self._arm.answering
        if self._calls is None:
            job = EvaluateJob(name="", arm=arm, sets=("validation",))
            check_job(job, scoring=task.scoring)
            self._calls = _OnceMade(arm, task=task, renderer=self._renderer)
        asker = Asker(
            self._calls,
            task=task,
            engine=desk,
            bill=Bill(job="", arm=arm.name, engine=desk, devices=1, usd_per_device_second=None),
            batch_size=RECORDS_AT_ONCE,
            common={"arm": arm.name, "draw": method.draw, "num_shots": method.num_shots},
            normalisation=method.normalisation,
            is_winner_only=arm.engine.winner_only,
        )
        is_sample = len(items) < len(task.items["validation"])

        def validation(answer_by: str) -> Pass:
            work = pass_over(arm, task, "validation", items, answer_by=answer_by)
            return replace(work, is_sample=is_sample)

        events, (best, _) = _drained(compare_ways(arm, task, asker, validation=validation))
        scores = tuple(best.scores[item.id] for item in items)
        if not self.has_tie_break:
            return Standing(scores)
        records = [event for event in events if isinstance(event, SampleRecord)]
        return Standing(scores, right_logprob(records, num_items=len(items)))


def right_logprob(records: Iterable[SampleRecord], *, num_items: int) -> float:
    """Mean log-probability of the right labels among the labels, natural log.

    By sums, less the offsets of batch calibration where all items have the same labels: as
    comparable between prompts as can be, whichever way each of them answers. An item without an
    answer has the least there is.
    """
    found = [r for r in records if r.set == "validation" and r.label_logprobs and r.answer]
    sums = [r.label_logprobs for r in found if r.label_logprobs]
    is_shared = len({frozenset(labels) for labels in sums}) == 1
    offsets = (fit_offsets(sums) if is_shared else None) or {}
    values = [
        max(LEAST_LOGPROB, _log_share(labels, offsets, r.target or ""))
        for r, labels in zip(found, sums, strict=True)
    ]
    return math.fsum([*values, *[LEAST_LOGPROB] * (num_items - len(values))]) / num_items


def _log_share(sums: Mapping[str, float], offsets: Mapping[str, float], label: str) -> float:
    """Log of a label's share after offsets."""
    values = {name: value - offsets.get(name, 0.0) for name, value in sums.items()}
    highest = max(values.values())
    total = math.fsum(math.exp(value - highest) for value in values.values())
    return values[label] - highest - math.log(total)


def in_order(items: Sequence[Item], *, seed: int) -> tuple[Item, ...]:
    """Items in an order drawn by hash, which others that come or go do not change."""
    return tuple(
        sorted(items, key=lambda item: hashlib.sha256(f"{seed}/{item.id}".encode()).digest())
    )


class _OnceMade(CallMaker):
    """Renders and tokenises the first call of an item once, however often it is asked about."""

    def __init__(self, arm: Arm, *, task: Task, renderer: Renderer) -> None:
        super().__init__(arm, task=task, renderer=renderer)
        self._made: dict[tuple[str, int, str], Call] = {}

    def make(self, talk: Talk, *, answer_by: str) -> Call:
        if talk.index > 0:  # depends on what was answered
            return super().make(talk, answer_by=answer_by)
        key = (talk.item.id, talk.repeat, answer_by)
        if key not in self._made:
            self._made[key] = super().make(talk, answer_by=answer_by)
        return replace(self._made[key], talk=talk)


def _drained(events: Generator[Emitted, None, T]) -> tuple[list[Emitted], T]:
    """What a generator yields, and what it returns."""
    found: list[Emitted] = []
    while True:
        try:
            found.append(next(events))
        except StopIteration as end:
            return found, end.value
