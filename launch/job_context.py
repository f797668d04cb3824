"""What the jobs of a run stand on: its arms, task and places, and what earlier jobs left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.choices import Keep
from conf.records import AnswerRule, CurvePoint
from conf.resolve import Arm
from conf.results import CheckpointChoice
from conf.schema import RunConfig
from evaluation.engines.endpoint_ceiling import EndpointPlace
from evaluation.mix import Mix
from evaluation.models import ModelPlace
from evaluation.tasks import Task
from launch.budget import Budget
from launch.checkpoints import best_point, point_checkpoint
from launch.jsonl import read_lines
from launch.placement import Machine
from launch.planned import Job, Plan
from launch.search.leg_search import EventsOf, LegSearch
from launch.search.messages import chosen, chosen_arm
from launch.search.trials import Trial
from launch.store import JobDirectory
from training.job import checkpoint_directory

SETS = {
    "evaluate": ("validation", "test"),
    "curve": ("curve",),
    "latency": ("latency",),
    "general": ("general",),
    "general_base": ("general",),
    "instructions": ("instructions",),
    "instructions_base": ("instructions",),
    "probes": ("bias", "abstain"),
    "probes_base": ("bias", "abstain"),
    "control": ("steering", "wording"),
}


def _failed_jobs(run: Path) -> set[str | None]:
    """The jobs that failed in this invocation, and those that could not start for it."""
    failed: set[str | None] = set()
    for line in read_lines(run / "journal.jsonl"):
        if line["event"] == "run_started":
            failed.clear()
        elif line["event"] == "job_failed":
            failed.add(line["job"])
    return failed


@dataclass(kw_only=True, slots=True)
class JobContext:
    """A run as its jobs see it; reads directories, starts nothing."""

    config: RunConfig
    plan: Plan
    arms: Mapping[str, Arm]
    task: Task
    places: Mapping[str, ModelPlace]
    machine: Machine
    run_path: Path
    budget: Budget | None = None
    mixes: Mapping[str, Mix] = field(default_factory=dict)
    searches: Mapping[str, tuple[Trial, ...]] = field(default_factory=dict)

    def directory(self, job: Job) -> JobDirectory:
        """Where a job's records and files lie."""
        return JobDirectory(Path(self.config.run.root), job.key)

    def trial_of(self, job: Job) -> Trial:
        """The trial that a leg is of."""
        assert job.arm is not None, "legs are of an arm"
        return next(t for t in self.searches[job.arm] if t.number == job.trial)

    def leg_search(self, arm: str) -> LegSearch:
        """The search of an arm whose trials train one by one."""
        return LegSearch(
            arm=arm,
            trials=self.searches[arm],
            halving=self.config.sweep.halving,
            budget=self.config.sweep.budget,
            usd_per_device_second=self.config.pricing.usd_per_device_second,
        )

    def leg_events(self, arm: str) -> EventsOf:
        """What the legs of an arm left, by trial and rung."""
        legs = {(leg.trial, leg.rung): leg for leg in self.plan.legs(arm)}
        failed = _failed_jobs(self.run_path)

        def events_of(trial: int, rung: int) -> Sequence[Any] | None:
            leg = legs[trial, rung]
            directory = self.directory(leg)
            if directory.done() is not None:
                return list(directory.events())
            return () if leg.id in failed else None

        return events_of

    def training_events(self, arm: str) -> list[Any]:
        """The records of the job that leaves an arm's checkpoint, and of the legs before it."""
        jobs = [*self.plan.legs(arm), self.plan.training(arm)]
        return [event for job in jobs for event in self.directory(job).events()]

    def log_directory(self, job: Job) -> Path:
        """Where a job's processes write what they print."""
        return (self.run_path / "logs" / job.id.replace(":", "-")).resolve()

    def arm_of(self, job: Job) -> Arm:
        """A job's arm; where it answers, with the setting that its search has chosen."""
        assert job.arm is not None
        search = self.plan.search(job.arm) if job.kind in SETS else None
        # What the base model is asked does not depend on the setting, nor wait for it.
        if search is None or job.kind.endswith("_base"):
            return self.arms[job.arm]
        choice = chosen(self.directory(search).events())
        assert choice is not None, "jobs that answer wait for the search"
        return chosen_arm(choice, self.searches[job.arm])

    def checkpoint_of(self, job: Job) -> Path | None:
        """The checkpoint that a job answers with, or None for the base model."""
        arm = self.arm_of(job)
        name = arm.name if arm.is_tuned else arm.on
        if name is None or job.kind.endswith("_base"):
            return None
        if name not in self.arms:
            return Path(name)
        points = self.directory(self.plan.training(name)).points
        choice = self.choice_of(name) if job.kind != "curve" else None
        if choice is not None:
            return checkpoint_directory(points, choice.variant)
        return point_checkpoint(points, job.point)

    def choice_of(self, name: str) -> CheckpointChoice | None:
        """What validation chose of a training's checkpoints; None: its arm keeps the last."""
        if self.arms[name].trainer.keep is not Keep.best or name in self.searches:
            return None
        left: dict[str, CurvePoint | None] = {}
        for job in self.plan.jobs:
            if job.kind == "curve" and job.arm == name:
                events = self.directory(job).events()
                left[job.id] = next((e for e in events if isinstance(e, CurvePoint)), None)
        return best_point(left)

    def rule_of(self, job: Job) -> AnswerRule | None:
        """How the arm answers, as its evaluate job chose; what is asked later is answered alike."""
        if job.kind not in ("latency", "control") and not job.wave:
            return None
        events = self.directory(self.plan.job(f"evaluate:{job.arm}")).events()
        return next((e for e in events if isinstance(e, AnswerRule)), None)

    def endpoint_of(self, arm: Arm) -> EndpointPlace | None:
        """Where a hosted arm's answers are kept, and what is left for them."""
        if not arm.engine.is_hosted:
            return None
        return EndpointPlace(
            answers=(Path(self.config.run.root) / ".cache" / "answers").resolve(),
            price=self.config.pricing.hosted.get(arm.engine.model or ""),
            spend=self.budget.endpoint_spend if self.budget else None,
            limit_usd=self.budget.hosted_limit_usd() if self.budget else None,
        )

    def num_labels(self, name: str) -> int:
        """Labelled examples that an arm trains on."""
        mix = self.mixes.get(name)
        return mix.num_labels if mix else len(self.task.items["train"])

    def renderer_sha256(self, arm: Arm) -> str:
        """Of the tokenizer and template that an arm's texts are made rows with."""
        from evaluation.prompts.rendering import Renderer

        model = arm.model
        place = self.places[arm.name].path
        return Renderer.load(place, layout=model.layout, max_length=model.max_length).sha256

    def plugins(self) -> tuple[str, ...]:
        """Files of the user's own code, where any process finds them."""
        return tuple(str(Path(p).resolve()) for p in self.config.plugins)
