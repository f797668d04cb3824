"""The jobs of a label curve in the one static plan, and who runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.resolve import Arm
from conf.schema import RunConfig
from evaluation.models import ModelPlace
from evaluation.tasks import Task
from launch.estimate import with_estimates
from launch.label_curve.plan import LabelPlan, LabelRun, by_task
from launch.placement import Machine
from launch.plan import build_plan, one_after_another
from launch.planned import Estimate, Job, ModelSource, Plan, TaskFacts

if TYPE_CHECKING:
    from launch.execute import Executor

# Trainings before answers, so that one engine process serves all answers; references first, since
# they are the cheapest.
ORDER = ("model", "features", "rows", "reference", "train", "evaluate", "latency")
LAST = len(ORDER)


@dataclass(kw_only=True, slots=True, frozen=True)
class PlanParts:
    """What plans of a run are made from."""

    config: RunConfig
    places: Mapping[str, ModelPlace]
    sources: Mapping[str, ModelSource]
    plugins: tuple[str, ...]
    machine: Machine

    def plan(self, arms: Mapping[str, Arm], task: Task, *, bases: Mapping[str, str]) -> Plan:
        """The plan of these arms on a task; bases: arm -> the arm whose model it answers with."""
        return build_plan(
            self.config,
            arms,
            task=TaskFacts(sha256=task.sha256, kind=task.kind),
            models={n: self.sources[b] for n, b in bases.items() if b in self.sources},
            plugins=self.plugins,
            machine=self.machine,
        )

    def estimated(self, plan: Plan, arms: Mapping[str, Arm], task: Task) -> Plan:
        """The plan with estimates."""
        places = {n: self.places.get(n.partition("@")[0]) for n in arms}
        return with_estimates(
            plan,
            config=self.config,
            arms=dict(arms),
            task=task,
            places={n: p for n, p in places.items() if p is not None},
            machine=self.machine,
        )


def with_label_jobs(
    head: Plan, arms: Mapping[str, Arm], labels: LabelPlan, parts: PlanParts
) -> Plan:
    """The plan of the arms themselves and the jobs of all other runs of the curve.

    Args:
        head: jobs of the arms on their own task.
        arms: the arms.
        labels: the runs.
        parts: what the plan was made from.
    """
    largest = labels.sizes[-1]  # where the arms themselves stand
    known = {(job.arm or "", largest, job.kind): job.estimate for job in head.jobs}
    jobs: list[Job] = []
    for task, runs in by_task(labels.runs):
        jobs += _jobs_of(runs, task, parts, known)
    jobs = [_known(job, labels, known) for job in jobs]
    features = _features_jobs(arms, labels.features_task, parts)
    own = [job for job in head.jobs if job.kind != "features"]
    every = [*own, *features, *jobs]
    every.sort(key=lambda job: ORDER.index(job.kind) if job.kind in ORDER else LAST)
    return Plan(jobs=one_after_another(every))


def _jobs_of(
    runs: list[LabelRun],
    task: Task,
    parts: PlanParts,
    known: dict[tuple[str, int, str], Estimate],
) -> list[Job]:
    """The jobs of all runs on one set of labels; the first draw's estimates hold for the others."""
    arms = {run.arm.name: run.arm for run in runs}
    plan = parts.plan(arms, task, bases={run.arm.name: run.base for run in runs})
    kinds = ("rows", "train", "evaluate", "latency", "reference")
    plan = Plan(jobs=tuple(job for job in plan.jobs if job.kind in kinds))
    first = {run.arm.name: run for run in runs if run.is_first}
    if first:
        plan = parts.estimated(plan, arms, task)
        for job in plan.jobs:
            if job.arm in first:
                known[first[job.arm].base, first[job.arm].num_used, job.kind] = job.estimate
    return [_on_shared_features(job) for job in plan.jobs]


def _on_shared_features(job: Job) -> Job:
    """A fit waits for the features of its arm, which all runs share."""
    names = tuple(
        name.partition("@")[0] if name.startswith("features:") else name for name in job.depends_on
    )
    return dataclasses.replace(job, depends_on=names)


def _known(job: Job, labels: LabelPlan, known: Mapping[tuple[str, int, str], Estimate]) -> Job:
    run = next(run for run in labels.runs if run.arm.name == job.arm)
    estimate = known.get((run.base, run.num_used, job.kind), job.estimate)
    return dataclasses.replace(job, estimate=estimate)


def _features_jobs(arms: Mapping[str, Arm], task: Task, parts: PlanParts) -> list[Job]:
    """The hidden states of all items of any run."""
    probes = {name: arm for name, arm in arms.items() if arm.kind == "linear_probe"}
    if not probes:
        return []
    plan = parts.plan(probes, task, bases={name: name for name in probes})
    plan = parts.estimated(plan, probes, task)
    return [job for job in plan.jobs if job.kind == "features"]


def runner(executor: Executor, labels: LabelPlan | None) -> Callable[[Job], Iterator[Any]]:
    """What runs a job: on a label curve with the items of the job's own run."""
    if labels is None:
        return executor.run
    arms = {**executor.arms, **{run.arm.name: run.arm for run in labels.runs}}
    places = {
        name: place
        for name in arms
        if (place := executor.places.get(name.partition("@")[0])) is not None
    }
    executor = dataclasses.replace(executor, arms=arms, places=places)
    tasks = {run.arm.name: run.task for run in labels.runs}

    def run(job: Job) -> Iterator[Any]:
        task = tasks.get(job.arm or "", executor.task)
        if job.kind == "features":
            task = labels.features_task
        return dataclasses.replace(executor, task=task).run(job)

    return run
