"""What each kind of job does: finds its inputs in the job cache, and calls the room that can.

Runs in the scheduler's threads. Heavy work happens in Ray processes (launch/workers.py); preparing
rows is light and happens here.
"""

from __future__ import annotations

import json
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.choices import Keep
from conf.methods import FullMethod, LoraMethod, PeftMethod
from conf.records import (
    AnswerRule,
    CurvePoint,
    JournalEvent,
    Measured,
    Progress,
    SampleRecord,
    TrainSummary,
    to_dict,
)
from conf.resolve import Arm
from conf.results import CHECKPOINT_CHOSEN
from evaluation.models import ModelPlace, make_ready
from evaluation.statistics import mean_interval, wilson
from launch import cluster, train_workers, workers
from launch.attempts import each_step_once
from launch.checkpoints import verified
from launch.evaluators import Evaluators
from launch.job_context import SETS, JobContext
from launch.leg_jobs import choice_events, leg_events
from launch.logs import worker_log
from launch.placement import engine_actors, model_dtype, threads_of, workers_left, workers_of
from launch.planned import Job
from launch.prepared_rows import prepare_rows
from launch.probing import asked
from launch.rates import noted, rate_file
from launch.reference_jobs import ReferenceWork, reference_events
from launch.reference_plan import features_job
from launch.search.leg_run import Leg
from launch.search.messages import chosen, chosen_arm, curve_point, packed, rung_points, steps_of
from launch.search.pack_search import PackSearch
from launch.search.prompt_search import STATE
from launch.trained_rows import training_data
from launch.waves import wave_task
from training.job import CHECKPOINT_FILE, FINAL, TrainJob, checkpoint_directory

# What is computed in the driver's own threads is done by one of them at a time: two that import
# transformers at once fail, and output is redirected for the whole process.
_IN_THIS_PROCESS = threading.Lock()
PARTS_AHEAD = 16  # of 0.2 s each; an evaluator that is faster than the driver writes waits


@dataclass(kw_only=True, slots=True)
class Executor(JobContext):
    """Runs one job at a time per thread; shared by all threads of a scheduler."""

    evaluators: Evaluators

    def run(self, job: Job) -> Iterator[Any]:
        """The events of a job."""
        match job.kind:
            case "model":
                yield from self._make_model(job)
            case "rows":
                yield from self._prepare_rows(job)
            case "train":
                yield from self._train(job)
            case "leg":
                yield from leg_events(self, job)
            case "search" if job.arm and self.plan.legs(job.arm):
                yield from choice_events(self, job)
            case "search":
                yield from self._search(job)
            case "prompt_search":
                yield from self._search_prompts(job)
            case kind if kind in SETS:
                yield from self._answer(job)
            case "reference" | "features":
                yield from reference_events(self._reference_work(job))
            case _:
                raise AssertionError(f"unknown kind of job: {job.kind}")

    def _make_model(self, job: Job) -> Iterator[Any]:
        name = next(n for n, p in self.places.items() if p.key == job.key)
        yield Progress(done=0, total=1, unit="models", note="preparing the model, about 30 s")
        texts = [i.input for split in ("train", "validation") for i in self.task.items[split]]
        with _IN_THIS_PROCESS, worker_log.logged(self.log_directory(job) / "0.log"):
            make_ready(self.arms[name].model, self.places[name], texts=texts)
        yield Progress(done=1, total=1, unit="models")

    def _prepare_rows(self, job: Job) -> Iterator[Any]:
        arm = self.arm_of(job)
        with _IN_THIS_PROCESS:
            yield prepare_rows(
                arm,
                task=self.task,
                model_dir=self.places[arm.name].path,
                mix=self.mixes.get(arm.name),
                has_rungs=arm.name in self.searches,
                directory=self.directory(job).path,
            )

    def _train(self, job: Job) -> Iterator[Any]:
        if self._is_trained(job):
            return
        train_job, rows = self.train_job(job, self.arm_of(job))
        yield training_data(train_job.arm_name, rows, trainer=train_job.trainer)
        events = self.trained(job, train_job)
        root = Path(self.config.run.root)
        yield from noted(events, rate_file(root, machine=self.machine, job=train_job))

    def _search(self, job: Job) -> Iterator[Any]:
        """Train all trials of an arm in one pack; the chosen one's checkpoint is the arm's."""
        first, rows = self.train_job(job, self.arm_of(job))
        trials = self.searches[first.arm_name]
        events = list(self.directory(job).events())
        if not self._is_trained(job):
            search = packed(first, trials, rows=rows, sweep=self.config.sweep)
            for event in self.trained(job, search.jobs[0], search):
                events.append(event)
                yield event
        events = each_step_once(events)
        choice = chosen(events)
        assert choice is not None, "a search without a choice fails"
        trainer = chosen_arm(choice, trials).trainer
        yield training_data(first.arm_name, rows, trainer=trainer)
        yield from rung_points(events)

    def trained(
        self, job: Job, train_job: TrainJob, search: PackSearch | Leg | None = None
    ) -> Iterator[Any]:
        """The records of one attempt."""
        self.evaluators.release_idle()
        yield Progress(done=0, total=1, unit="steps", note="starting workers")
        yield from train_workers.run_training(
            train_job,
            machine=self.machine,
            log_dir=self.log_directory(job),
            collective_timeout_seconds=self.config.cluster.collective_timeout_seconds,
            search=search,
        )

    def train_job(self, job: Job, arm: Arm) -> tuple[TrainJob, Path]:
        """What a job's worker is told of an arm or a trial of it, and where the rows lie."""
        method = arm.training
        assert isinstance(method, (FullMethod, LoraMethod, PeftMethod))
        rows = self.directory(self.plan.job(f"rows:{arm.name}")).path.resolve()
        facts = json.loads((rows / "rows.json").read_text(encoding="utf-8"))
        left = cluster.machine_left(self.machine, self.config.cluster)
        asked = workers_of(self.config, self.machine)
        count = workers_left(asked, left, batch_size=arm.trainer.batch_size)
        place = self.places[arm.name]
        return TrainJob(
            arm_name=arm.name,
            method=method,
            trainer=arm.trainer,
            zero=arm.zero,
            model_dir=str(place.path),
            base_model=arm.model.path or arm.model.name,
            base_model_sha256=_model_sha256(place),
            rows_path=str(rows / "rows.jsonl"),
            output_dir=str(self.directory(job).path.resolve() / "points"),
            dtype=model_dtype(arm.model, self.machine.device),
            device=self.machine.device,
            threads=threads_of(count, left),
            world_size=count,
            usd_per_device_second=self.config.pricing.usd_per_device_second,
            num_labels=self.num_labels(arm.name),
            kernels_impl=self.config.kernels.impl.name,
            **facts,
        ), rows

    def _is_trained(self, job: Job) -> bool:
        """Whether an earlier attempt finished, and its driver died before it marked the job so."""
        directory = self.directory(job)
        final = checkpoint_directory(directory.points, FINAL)
        is_ended = any(isinstance(e, TrainSummary) for e in directory.events())
        return is_ended and (final / CHECKPOINT_FILE).is_file()

    def _answer(self, job: Job) -> Iterator[Any]:
        work = self._work(job)
        if job.kind == "evaluate":
            yield from self._told_choice(job)
        actor = self.evaluators.borrow(work.actors)
        is_alive = False
        correct = array("d")  # 8 bytes an item
        try:
            for event in _stream(actor.answer, work):
                is_point = isinstance(event, SampleRecord) and job.kind == "curve"
                if is_point and event.score is not None:
                    correct.append(event.score)
                if isinstance(event, AnswerRule) and work.step is not None:
                    yield from self._final_point(job, work, event)
                yield event
            is_alive = True
        finally:
            self.evaluators.give_back(work.actors, actor, is_alive=is_alive)
        if job.kind == "curve" and correct:
            yield self._point(job, work, _measured(correct))

    def _search_prompts(self, job: Job) -> Iterator[Any]:
        """Try all trials of a prompted arm on validation; the best is what the arm answers with."""
        base, directory = self._work(job), self.directory(job)
        sweep = self.config.sweep
        work = workers.SearchWork(
            base=base,
            trials=self.searches[base.arm.name],
            halving=sweep.halving,
            budget=sweep.budget,
            seed=sweep.seed,
            state_path=directory.path.resolve() / STATE,
        )
        actor, is_alive = self.evaluators.borrow(base.actors), False
        try:
            yield from _stream(actor.search, work)
            is_alive = True
        finally:
            self.evaluators.give_back(base.actors, actor, is_alive=is_alive)

    def _work(self, job: Job) -> workers.AnswerWork:
        """Everything an evaluator needs for this job."""
        arm = self.arm_of(job)
        model_dir, adapter_dir = self.places[arm.name].path, None
        step = seed = record = None
        checkpoint = self.checkpoint_of(job)
        if checkpoint is not None:
            record = verified(checkpoint, renderer_sha256=self.renderer_sha256(arm))
            step, seed = record.step, record.train_seed
            if record.kind == "full":
                model_dir = checkpoint
            else:
                adapter_dir = checkpoint
        is_probed = job.kind in ("evaluate", "curve") and not job.wave
        whom = asked(job.kind, arm=arm, arms=self.arms, task=self.task, config=self.config)
        return workers.AnswerWork(
            job=job.id,
            arm=whom.arm,
            sets=("test",) if job.wave else SETS.get(job.kind, ()),
            task=wave_task(whom.task, job.wave, seed=self.config.task.seed),
            model_dir=model_dir.resolve(),
            adapter_dir=adapter_dir.resolve() if adapter_dir else None,
            step=step,
            train_seed=seed,
            machine=self.machine,
            devices=job.devices,
            plugins=self.plugins(),
            rule=self.rule_of(job),
            num_labels=self.num_labels(arm.name if arm.is_tuned else arm.on or "")
            if checkpoint is not None
            else None,
            usd_per_device_second=self.config.pricing.usd_per_device_second,
            log_path=self.log_directory(job) / "0.log",
            records_path=self.directory(job).records_path.resolve(),
            actors=engine_actors(arm, self.machine),
            kernels_impl=self.config.kernels.impl.name,
            endpoint=self.endpoint_of(arm),
            probe=record.probe if record is not None and is_probed else (),
            trained_dtype=record.dtype if record is not None else "float32",
            is_sample=job.wave is not None,
            rows_dir=self.directory(job).rows.resolve(),
        )

    def _told_choice(self, job: Job) -> Iterator[JournalEvent]:
        """Put down which checkpoint an arm answers with, where it is not simply the last."""
        arm = self.arm_of(job)
        name = arm.name if arm.is_tuned else arm.on or ""
        choice = self.choice_of(name) if name in self.arms else None
        if choice is not None:
            yield JournalEvent(
                time=time.time(), event=CHECKPOINT_CHOSEN, arm=arm.name, data=to_dict(choice)
            )

    def _final_point(
        self, job: Job, work: workers.AnswerWork, rule: AnswerRule
    ) -> Iterator[CurvePoint]:
        """The last checkpoint's point on the curve, from the validation that chose the answers."""
        arm = self.arm_of(job)
        if job.kind != "evaluate" or not arm.is_tuned or arm.trainer.keep is Keep.best:
            return  # a curve job scored it, if any
        raw = rule.validation.get(f"{rule.answer_by}/none") or next(
            iter(rule.validation.values()), None
        )
        if raw is not None:
            yield self._point(job, work, raw)

    def _point(self, job: Job, work: workers.AnswerWork, value: Measured) -> CurvePoint:
        assert work.step is not None and job.arm is not None
        is_label_task = bool(self.task.labels) or self.task.kind.name == "multiple_choice"
        return curve_point(
            job.arm,
            steps_of(self.training_events(job.arm)),
            step=work.step,
            metric="accuracy" if is_label_task else self.task.scoring,
            value=value,
            seed=work.train_seed or 0,
        )

    def _reference_work(self, job: Job) -> ReferenceWork:
        """What a job of a reference arm needs; other processes give their devices back first."""
        self.evaluators.release_idle()
        arm = self.arm_of(job)
        place = self.places.get(arm.name)
        needed = job.id if job.kind == "features" else features_job(job)
        return ReferenceWork(
            job=job,
            arm=arm,
            task=self.task,
            model_dir=place.path.resolve() if place else None,
            machine=self.machine,
            plugins=self.plugins(),
            usd_per_device_second=self.config.pricing.usd_per_device_second,
            features=self.directory(self.plan.job(needed)).path.resolve() if needed else None,
            log_path=self.log_directory(job) / "0.log",
            rows_dir=self.directory(job).rows.resolve(),
        )


def _stream(method: Any, work: workers.AnswerWork | workers.SearchWork) -> Iterator[Any]:
    import ray

    options = {"num_returns": "streaming", "_generator_backpressure_num_objects": PARTS_AHEAD}
    for reference in method.options(**options).remote(work):
        yield from ray.get(reference)


def _measured(values: Sequence[float]) -> Measured:
    if all(v in (0.0, 1.0) for v in values):
        return wilson(sum(values), len(values))
    return mean_interval(values)


def _model_sha256(place: ModelPlace) -> str:
    from evaluation.models.facts import facts

    return facts(place.path).sha256
