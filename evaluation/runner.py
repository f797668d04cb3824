"""One evaluation job: an arm's prompts through an engine, into records and the bill."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.records import AnswerRule, LedgerLine, Progress, PromptText, SampleRecord
from conf.resolve import Arm
from evaluation.engines.base import Engine

if TYPE_CHECKING:
    from evaluation.rendering import Renderer
    from evaluation.tasks import Task

Emitted = SampleRecord | AnswerRule | LedgerLine | PromptText | Progress


@dataclass(kw_only=True, slots=True, frozen=True)
class EvaluateJob:
    """What to evaluate.

    name: the job's id on its ledger lines. sets: of validation, test, latency, curve. rule: how to
    answer where validation ran before; None: it is chosen on validation, in this job.
    """

    name: str
    arm: Arm
    sets: tuple[str, ...]
    step: int | None = None
    train_seed: int | None = None
    num_labels: int | None = None
    devices: int = 1
    usd_per_device_second: float | None = None
    rule: AnswerRule | None = None


def record_key(record: SampleRecord) -> tuple[str, str, int, int, str]:
    """What makes a record one of a job's: item, set, repeat, call, and how it was answered."""
    return (record.item_id, record.set, record.repeat, record.call, record.answer_by)


def evaluate(
    job: EvaluateJob,
    *,
    task: Task,
    engine: Engine,
    renderer: Renderer,
    done: Collection[SampleRecord] = (),
) -> Iterator[Emitted]:
    """Run the job; `done`: the records that an interrupted attempt has already written."""
    yield from ()
