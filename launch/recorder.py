"""Writes what happens: the scheduler's listener, the one writer of a run directory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import (
    BudgetReached,
    Refused,
)
from conf.records import LedgerLine, Progress, TrainRecord, TrainSummary
from launch.budget import Budget
from launch.live import Live
from launch.plan import Job
from launch.preflight import Checked
from launch.scheduler import JobState
from launch.store import JobDirectory, RunDirectory, link_tree, renamed, write_json
from launch.tracking import Tracker

# Kinds of jobs that go on from the records of a killed attempt; others start again.
RESUMABLE = ("evaluate", "curve")


@dataclass(kw_only=True, slots=True)
class Recorder:
    """Writes what happens: the scheduler's listener, and the one writer of the run directory."""

    checked: Checked
    run: RunDirectory
    tracker: Tracker
    budget: Budget
    live: Live
    hardware: str
    _jobs: dict[str, JobDirectory] = field(default_factory=dict)

    def on_start(self, state: JobState) -> None:
        """Journal the start; what a killed attempt spent comes back onto the bill."""
        job = state.job
        directory = JobDirectory(self.checked.root, job.key)
        kept = directory.begin(keeps_records=job.kind in RESUMABLE)
        self._jobs[job.id] = directory
        self.run.journal("job_started", job=job.id, arm=job.arm, data={"attempt": state.attempts})
        for event in kept:
            shown = renamed(event, job=job.id, arm=job.arm, is_reused=True)
            self.run.append(shown, job=job.id, arm=job.arm)
        self.live.start(state)

    def on_event(self, state: JobState, event: Any) -> None:
        """Keep a record in the job's directory and the run's, and mirror it."""
        job = state.job
        self.live.event(state, event)
        if isinstance(event, Progress):
            return
        self._jobs[job.id].append(event)
        shown = renamed(event, job=job.id, arm=job.arm, is_reused=False)
        self.run.append(shown, job=job.id, arm=job.arm)
        seconds = time.monotonic() - (state.started or time.monotonic())
        self.tracker.event(job.arm, shown, job_seconds=seconds, devices=job.devices)
        if isinstance(event, TrainRecord) or isinstance(event, LedgerLine) and job.kind != "train":
            self.budget.spend(event.device_seconds)
        elif isinstance(event, TrainSummary):
            for line in training_ledger(event, job):
                self.on_event(state, line)

    def on_end(self, state: JobState) -> None:
        """Mark a job done or failed; only a whole job is ever reused."""
        job = state.job
        directory = self._jobs.pop(job.id, None)
        if state.status == "done":
            assert directory is not None
            directory.finish(seconds=state.seconds, hardware=self.hardware)
            self.run.journal(
                "job_done",
                job=job.id,
                arm=job.arm,
                data={"is_reused": False, "seconds": state.seconds},
            )
            show_checkpoints(self.checked, self.run, job)
        elif state.status == "reused":
            replay(self.checked, self.run, job)
        else:
            if directory is not None:
                directory.close()
            self._failed(state)
        self.live.end(state)

    def _failed(self, state: JobState) -> None:
        job = state.job
        remedy = state.error.remedy if isinstance(state.error, Refused) else ""
        self.run.journal(
            "job_failed" if state.status in ("failed", "skipped") else "job_stopped",
            job=job.id,
            arm=job.arm,
            data={
                "error": state.reason,
                "remedy": remedy,
                "is_refused": isinstance(state.error, Refused),
            },
        )
        if state.status == "failed":
            error = {
                "job": job.id,
                "arm": job.arm,
                "exception": type(state.error).__name__,
                "message": state.reason,
                "remedy": remedy or f"see {self.run.path}/logs/{job.id.replace(':', '-')}/",
                "attempts": state.attempts,
            }
            write_json(self.run.path / "logs" / job.id.replace(":", "-") / "error.json", error)

    def on_tick(self, states: dict[str, JobState]) -> None:
        """Let the screen move, and stop at the budget.

        An evaluation stops at once, for it goes on from its records. A training runs to its end:
        it would start again from its first step.
        """
        self.live.tick(states)
        reason = self.budget.excess()
        running = [s.job.kind for s in states.values() if s.status == "running"]
        if reason is not None and running and "train" not in running:
            raise BudgetReached(reason)


def training_ledger(summary: TrainSummary, job: Job) -> list[LedgerLine]:
    """A finished training's tokens by purpose; the device-seconds stand on the first line."""
    return [
        LedgerLine(
            job=job.id,
            arm=job.arm,
            purpose="train",
            tokens=summary.tokens,
            device_seconds=summary.device_seconds,
        ),
        LedgerLine(job=job.id, arm=job.arm, purpose="padding", tokens=summary.padding_tokens),
    ]


def show_checkpoints(checked: Checked, run: RunDirectory, job: Job) -> None:
    """Show a training's checkpoints as arms/<arm>/<variant>/checkpoint/."""
    if job.kind != "train" or job.arm is None:
        return
    points = JobDirectory(checked.root, job.key).path / "points"
    for directory in sorted(points.glob("*/checkpoint")):
        link_tree(directory, run.path / "arms" / job.arm / directory.parent.name / "checkpoint")


def replay(checked: Checked, run: RunDirectory, job: Job) -> None:
    """Put the records of a job found in the cache into the run directory, marked reused."""
    directory = JobDirectory(checked.root, job.key)
    done = directory.done()
    assert done is not None, "only a finished job is replayed"
    for event in directory.events():
        shown = renamed(event, job=job.id, arm=job.arm, is_reused=True)
        run.append(shown, job=job.id, arm=job.arm)
    facts = {"is_reused": True, "seconds": done.seconds}
    run.journal("job_done", job=job.id, arm=job.arm, data=facts)
    show_checkpoints(checked, run, job)


def is_finished(root: Path, job: Job) -> bool:
    """Whether a job is in the cache, with the files that later jobs read."""
    directory = JobDirectory(root, job.key)
    needed = {"train": "points/final/checkpoint/checkpoint.json", "rows": "rows.json"}
    if job.kind in needed and not (directory.path / needed[job.kind]).is_file():
        return False
    return directory.done() is not None
