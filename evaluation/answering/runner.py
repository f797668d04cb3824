"""One evaluation job: validation chooses how the arm answers, then test and latency answer so.

Every record is billed before it is yielded (answering/bill.py), so whatever a killed process has
written is paid for. A resumed job is given those records as `done`: it neither computes nor yields
them again, chooses the same rule (they count as if just answered), and bills only its own rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import evaluation.probes.instructions  # noqa: F401 - registers its scorer
from conf.choices import Normalisation, TaskKind
from conf.errors import ConfigError
from conf.methods import check_answering
from conf.records import AnswerRule, Item, SampleRecord
from conf.resolve import Arm
from evaluation.answering.asking import Asker, Emitted
from evaluation.answering.bill import Bill
from evaluation.answering.calls import CallMaker, Pass
from evaluation.answering.control import MakeAsker, ask_probes, ask_steered, ask_wordings
from evaluation.answering.rule_choice import choose_rule, ways_to_answer
from evaluation.engines.base import Engine
from evaluation.probes.probe_sets import PROBE_SETS
from evaluation.probes.steering import STEERING
from evaluation.probes.wordings import WORDING
from evaluation.prompts.rendering import Renderer
from evaluation.scoring.voting import check_voting
from evaluation.tasks import Task
from evaluation.tasks.splits import spread

RECORDS_AT_ONCE = 32  # written and billed together where the engine chooses its batches itself


@dataclass(kw_only=True, slots=True, frozen=True)
class EvaluateJob:
    """What to evaluate.

    name: the job's id on its ledger lines. sets: of validation, test, latency, curve, general,
    instructions, bias, abstain, steering, wording.
    rule: how to answer, where validation has chosen before; None: it is chosen here. step,
    train_seed, num_labels: of the checkpoint that the engine answers with. is_sample: the test
    items are a few of the set, drawn by chance.
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
    is_sample: bool = False


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
        ConfigError: method, engine and task do not go together.
        JobFailed: over 10% of a set's items cannot be answered.
    """
    arm, method = job.arm, job.arm.answering
    check_job(job, scoring=task.scoring)
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

    def ask(a: Arm, made: Task, *, read_as: Task | None = None, paraphrase: int = 0) -> Asker:
        return Asker(
            CallMaker(a, task=made, renderer=renderer),
            task=read_as or made,
            engine=engine,
            bill=bill,
            batch_size=arm.engine.batch_size or RECORDS_AT_ONCE,
            common={**common, "paraphrase": paraphrase},
            normalisation=method.normalisation,
            is_winner_only=arm.engine.winner_only,
            done=done,
        )

    yield from _run_sets(job, task, ask)


def check_job(job: EvaluateJob, *, scoring: str) -> None:
    """Refuse a job whose method, engine, task and rule do not go together.

    Raises:
        ConfigError: e.g. a rule with calibration for an engine without a label distribution.
    """
    key, engine = f"arms.{job.arm.name}", job.arm.engine
    check_answering(key, job.arm.answering, engine)
    if job.arm.answering.self_consistency:
        check_voting(scoring, key=key)
    if engine.winner_only and job.rule is not None and job.rule.is_calibrated:
        raise ConfigError(
            f"{key}.engine.winner_only",
            found=f"true, and labels that are compared by {job.rule.name}",
            expected="a rule of plain sums, since there is no label distribution",
            remedy=f"write {key}.engine.winner_only=false",
        )


def _run_sets(job: EvaluateJob, task: Task, ask: MakeAsker) -> Iterator[Emitted]:
    arm = job.arm
    make = partial(pass_over, arm, task)
    if set(PROBE_SETS) & set(job.sets):
        yield from ask_probes(arm, task, ask)
        return
    asker = ask(arm, task)
    validation = task.items["validation"]
    if "curve" in job.sets:
        answer_by = ways_to_answer(arm, task)[0]
        yield from asker.run(make("validation", validation, answer_by=answer_by, is_curve=True))
    if "general" in job.sets:
        yield from asker.run(make("general", task.items["general"], answer_by="score"))
    if "instructions" in job.sets:
        items = task.items["instructions"]
        yield from asker.run(make("instructions", items, answer_by="generate"))
    if STEERING in job.sets and task.items[STEERING]:
        yield from ask_steered(arm, task, ask)
    if not {"validation", "test", "latency", WORDING} & set(job.sets):
        return
    rule = job.rule
    if rule is None:
        rule = yield from choose_rule(
            arm,
            task,
            asker,
            validation=lambda answer_by: make("validation", validation, answer_by=answer_by),
        )
        yield rule
    elif "validation" in job.sets:
        yield from asker.run(make("validation", validation, answer_by=rule.answer_by, rule=rule))
    answer = partial(make, answer_by=rule.answer_by, rule=rule)
    if "test" in job.sets:
        tests = answer("test", task.items["test"])
        yield from asker.run(replace(tests, is_sample=job.is_sample))
    if WORDING in job.sets:
        work = answer(WORDING, task.items[WORDING])
        yield from ask_wordings(arm, task, ask, rule=rule, work=work)
    if "latency" in job.sets and arm.engine.latency_requests:
        items = spread(task.items["test"], arm.engine.latency_requests)
        yield from asker.run(answer("latency", items))


def pass_over(
    arm: Arm,
    task: Task,
    name: str,
    items: Sequence[Item],
    *,
    answer_by: str,
    rule: AnswerRule | None = None,
    is_curve: bool = False,
) -> Pass:
    """A pass of an arm over one set.

    Sampled test answers are repeated. Where repeats vote they are one answer, so that validation
    and latency requests need all of them too; points of a curve do with one.
    """
    engine, method = arm.engine, arm.answering
    is_voted = method.self_consistency and not is_curve
    is_repeated = (
        answer_by == "generate" and engine.temperature > 0 and (name == "test" or is_voted)
    )
    is_choice = task.kind is TaskKind.multiple_choice
    is_pmi = is_choice and answer_by == "score" and method.normalisation is Normalisation.pmi
    return Pass(
        set=name,
        purpose="curve" if is_curve else name,
        answer_by=answer_by,
        items=items,
        rule=rule,
        repeats=engine.repeats if is_repeated else 1,
        stopping=engine.repeat_stopping if is_voted else None,
        is_pmi=is_pmi and not is_curve,
        is_timed=name == "latency",
    )
