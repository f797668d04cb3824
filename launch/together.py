"""The runs of one invocation as the scheduler sees them: one plan, one listener, one end.

`python launch.py ..` has one run, `-m` has several. Each keeps its own records; jobs, devices,
budget, screen and Ctrl-C are common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from conf.errors import BudgetReached
from launch.budget import Budget
from launch.live import Live
from launch.plan import one_after_another
from launch.planned import Job, Plan
from launch.recorder import Recorder
from launch.scheduler import JobState
from training.job import TrainingStopped


@dataclass(kw_only=True, slots=True, frozen=True)
class Member:
    """One run: its own plan, who writes its records, runs its jobs, and finds some not worth it."""

    plan: Plan
    recorder: Recorder
    run_job: Callable[[Job], Iterator[Any]]
    why_cancelled: Callable[[Job], str | None] = lambda job: None


def joined(plans: Mapping[str, Plan]) -> Plan:
    """All jobs of several plans, run after run; a job that several have runs once.

    Args:
        plans: by prefix, which goes before the names of its jobs and arms: "2/" makes
            `2/evaluate:lora` of arm `2/lora`. "" where there is one run.
    """
    jobs = [_prefixed(job, prefix) for prefix, plan in plans.items() for job in plan.jobs]
    return Plan(jobs=one_after_another(jobs))


def _prefixed(job: Job, prefix: str) -> Job:
    return dataclasses.replace(
        job,
        id=prefix + job.id,
        arm=None if job.arm is None else prefix + job.arm,
        depends_on=tuple(prefix + name for name in job.depends_on),
        after=tuple(prefix + name for name in job.after),
    )


@dataclass(kw_only=True, slots=True)
class Runs:
    """The scheduler's listener: tells the run a job belongs to, and says when all of them end.

    Args:
        members: the runs by prefix.
        budget: what all of them may spend together.
        live: the one screen.
        halt: why the runs end as soon as trainings have saved.
    """

    members: Mapping[str, Member]
    budget: Budget
    live: Live
    halt: BaseException | None = None
    _owners: dict[str, tuple[Member, Job]] = field(init=False)
    _is_stopping: bool = False

    def __post_init__(self) -> None:
        """Note whose job each is, and what its run calls it."""
        self._owners = {
            prefix + job.id: (member, job)
            for prefix, member in self.members.items()
            for job in member.plan.jobs
        }

    def run_job(self, job: Job) -> Iterator[Any]:
        """The events of a job, from the run it belongs to."""
        member, own = self._owners[job.id]
        return member.run_job(own)

    def _own(self, state: JobState) -> tuple[Recorder, JobState]:
        member, job = self._owners[state.job.id]
        return member.recorder, dataclasses.replace(state, job=job)

    def on_start(self, state: JobState) -> None:
        """A job was started."""
        recorder, own = self._own(state)
        recorder.on_start(own)
        self.live.start(state)

    def on_event(self, state: JobState, event: Any) -> None:
        """A running job yielded an event."""
        recorder, own = self._own(state)
        self.live.event(state, event)
        recorder.on_event(own, event)

    def on_retry(self, state: JobState) -> None:
        """An attempt was lost."""
        recorder, own = self._own(state)
        recorder.on_retry(own)
        self.live.note(f"{state.job.id}: {state.reason}")

    def on_end(self, state: JobState) -> None:
        """A job is over."""
        recorder, own = self._own(state)
        recorder.on_end(own)
        self.live.end(state)

    def refusal(self, job: Job) -> str | None:
        """Why a job may not start: the runs are ending, or their budget is spent."""
        return str(self.halt) if self.halt is not None else self.budget.refusal(job)

    def why_cancelled(self, job: Job) -> str | None:
        """Why a job is not worth running in the run it belongs to."""
        member, own = self._owners[job.id]
        return member.why_cancelled(own)

    def why_stopped(self, error: BaseException) -> str | None:
        """Why a training stopped, where it was asked to from here; or that a ceiling is reached."""
        if isinstance(error, BudgetReached):
            return str(error)
        if self.halt is not None and isinstance(error, TrainingStopped):
            return f"{self.halt}; {error}"
        return None

    def on_tick(self, states: dict[str, JobState]) -> None:
        """Let the screen move, and end the runs where they have to.

        An evaluation goes on from its records, so it ends at once; a training that has made steps
        saves its state first.

        Raises:
            BudgetReached, KeyboardInterrupt: what `halt` says, once nothing has to be saved.
        """
        self.live.tick(states)
        running = [s.job for s in states.values() if s.status == "running"]
        reason = self.budget.excess()
        if self.halt is None and reason is not None and running:
            self.halt = BudgetReached(reason)
        is_done = all(s.is_over and s.status != "stopped" for s in states.values())
        if self.halt is None or is_done:
            return
        owners = [self._owners[job.id] for job in running]
        saving = [(m.recorder, own) for m, own in owners if m.recorder.has_stepped(own)]
        if not saving:
            raise self.halt
        if not self._is_stopping:
            self._is_stopping = True
            self.live.note(f"{self.halt}: the training saves its state and stops; Ctrl-C: now")
        for recorder, own in saving:
            recorder.ask_to_stop(own)
