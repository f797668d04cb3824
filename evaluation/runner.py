"""One evaluation job: validation chooses how the arm answers, then test and latency answer so.

Every record is billed before it is yielded (evaluation/bill.py), so whatever a killed process has
written is paid for. A resumed job is given those records as `done`: it neither computes nor yields
them again, chooses the same rule (they count as if just answered), and bills only its own rows.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass

from conf.choices import AnswerBy, Calibration, TaskKind
from conf.records import AnswerRule, Item, Measured, SampleRecord
from conf.resolve import Arm
from evaluation.asking import Asker, Emitted, Pass
from evaluation.bill import Bill
from evaluation.calibration import (
    Candidate,
    best_label,
    choose,
    content_free_items,
    fit_offsets,
)
from evaluation.calls import CallMaker
from evaluation.engines.base import Engine
from evaluation.rendering import Renderer
from evaluation.statistics import wilson
from evaluation.tasks import Task


@dataclass(kw_only=True, slots=True, frozen=True)
class EvaluateJob:
    """What to evaluate.

    name: the job's id on its ledger lines. sets: of validation, test, latency, curve. rule: how to
    answer, where validation has chosen before; None: it is chosen here. step, train_seed,
    num_labels: of the checkpoint that the engine answers with.
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


def evaluate(
    job: EvaluateJob,
    *,
    task: Task,
    engine: Engine,
    renderer: Renderer,
    done: Collection[SampleRecord] = (),
) -> Iterator[Emitted]:
    """Run a job; yields records in the order in which they should be written.

    Args:
        job: arm and sets.
        task: items by split.
        engine: already answering with the arm's model and adapter.
        renderer: the model's.
        done: records that an interrupted attempt of this very job has written.

    Raises:
        JobFailed: over 10% of a set's items cannot be answered.
    """
    arm, method = job.arm, job.arm.answering
    bill = Bill(
        job=job.name,
        arm=arm.name,
        engine=engine,
        devices=job.devices,
        usd_per_device_second=job.usd_per_device_second,
    )
    common = {
        "arm": arm.name,
        "draw": method.draw,
        "num_shots": method.num_shots,
        "train_seed": job.train_seed,
        "num_labels": job.num_labels,
        "step": job.step,
    }
    asker = Asker(
        CallMaker(arm, task=task, renderer=renderer),
        task=task,
        engine=engine,
        bill=bill,
        batch_size=arm.engine.batch_size,
        common=common,
        done=done,
    )
    yield from _run_sets(job, task, asker)


def _run_sets(job: EvaluateJob, task: Task, asker: Asker) -> Iterator[Emitted]:
    if "curve" in job.sets:
        answer_by = _ways_to_answer(job.arm, task)[0]
        yield from asker.run(_validation(task, answer_by, purpose="curve"))
    if not {"validation", "test", "latency"} & set(job.sets):
        return
    rule = job.rule
    if rule is None:
        rule = yield from _choose_rule(job.arm, task, asker)
        yield rule
    elif "validation" in job.sets:
        yield from asker.run(_validation(task, rule.answer_by, rule=rule))
    engine = job.arm.engine
    if "test" in job.sets:
        is_varied = rule.answer_by == "generate" and engine.temperature > 0
        yield from asker.run(
            Pass(
                set="test",
                purpose="test",
                answer_by=rule.answer_by,
                items=task.items["test"],
                rule=rule,
                repeats=engine.repeats if is_varied else 1,
            )
        )
    if "latency" in job.sets and engine.latency_requests:
        yield from asker.run(
            Pass(
                set="latency",
                purpose="latency",
                answer_by=rule.answer_by,
                items=_spread(task.items["test"], engine.latency_requests),
                rule=rule,
                is_timed=True,
            )
        )


def _ways_to_answer(arm: Arm, task: Task) -> tuple[str, ...]:
    """Ways to try on validation, the simplest first; free answers are generated."""
    if task.kind not in (TaskKind.classification, TaskKind.multiple_choice):
        return ("generate",)
    wanted = arm.answering.answer_by
    return ("score", "generate") if wanted is AnswerBy.auto else (wanted.name,)


def _validation(
    task: Task, answer_by: str, *, purpose: str = "validation", rule: AnswerRule | None = None
) -> Pass:
    return Pass(
        set="validation",
        purpose=purpose,
        answer_by=answer_by,
        items=task.items["validation"],
        rule=rule,
    )


def _choose_rule(arm: Arm, task: Task, asker: Asker) -> Generator[Emitted, None, AnswerRule]:
    """Answer validation in every way there is; the better way becomes the arm's rule."""
    tried: list[Candidate] = []
    allowed: list[Candidate] = []
    for answer_by in _ways_to_answer(arm, task):
        yield from asker.run(_validation(task, answer_by))
        answers = asker.finals
        value = _measured([record.score or 0.0 for record in answers])
        plain = Candidate(answer_by=answer_by, calibration="none", offsets=None, value=value)
        calibrated: list[Candidate] = []
        if answer_by == "score" and task.kind is TaskKind.classification:
            calibrated = yield from _calibrations(arm, task, asker, answers)
        wanted = arm.answering.calibration
        tried += [plain, *calibrated]
        allowed += (
            calibrated
            if calibrated and wanted in (Calibration.contextual, Calibration.batch)
            else [plain, *calibrated]
        )
    best = choose(allowed)
    return AnswerRule(
        arm=arm.name,
        answer_by=best.answer_by,
        calibration=best.calibration,
        label_offsets=best.offsets,
        validation={candidate.name: candidate.value for candidate in tried},
        draw=arm.answering.draw,
    )


def _calibrations(
    arm: Arm, task: Task, asker: Asker, answers: Sequence[SampleRecord]
) -> Generator[Emitted, None, list[Candidate]]:
    """Candidates with offsets, which are fitted without labels; their scores then need labels."""
    wanted = arm.answering.calibration
    validation = [record for record in answers if record.label_logprobs is not None]
    inputs: dict[str, list[SampleRecord]] = {}
    if wanted in (Calibration.auto, Calibration.contextual) and task.items["validation"]:
        items = content_free_items(task.items["validation"][0])
        work = Pass(set="calibration", purpose="calibration", answer_by="score", items=items)
        for event in asker.run(work):
            if not isinstance(event, SampleRecord):  # no answers to items of the task
                yield event
        inputs["contextual"] = asker.finals
    if wanted in (Calibration.auto, Calibration.batch):
        inputs["batch"] = validation
    candidates = []
    for name, records in inputs.items():
        offsets = fit_offsets([r.label_logprobs for r in records if r.label_logprobs])
        if offsets is None:
            continue
        hits = [
            float(best_label(record.label_logprobs or {}, offsets) == record.target)
            for record in validation
        ]
        hits += [0.0] * (len(answers) - len(validation))  # an item that failed counts as wrong
        candidates.append(
            Candidate(answer_by="score", calibration=name, offsets=offsets, value=_measured(hits))
        )
    return candidates


def _measured(scores: Sequence[float]) -> Measured:
    """Mean of scores in [0, 1] with Wilson's interval, conservative for graded scores."""
    return wilson(min(sum(scores), len(scores)), len(scores))


def _spread(items: Sequence[Item], count: int) -> tuple[Item, ...]:
    """At most `count` items, evenly over the split, so that an order by length does not matter."""
    taken = min(count, len(items))
    return tuple(items[index * len(items) // taken] for index in range(taken))
