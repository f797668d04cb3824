"""Writes what happens in one run: the one writer of its directory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import Refused
from conf.records import LedgerLine, Progress, TrainRecord, TrainSummary
from conf.row_meter import announced_rows
from conf.sweep_records import RungRecord, SweepChoice, TrialRecord
from evaluation.answering.linear_probe import FEATURES_FILE
from launch.attempts import (
    Steps,
    ask_to_stop,
    billed_rows,
    redone,
    search_ledger,
    standing_ledger,
    training_ledger,
    whole,
)
from launch.budget import Budget
from launch.elsewhere.copies import Copier
from launch.judge import tell_cancelled
from launch.logs.errors_file import clear_job_error, write_job_error
from launch.planned import LEG, STEPPING_KINDS, TRAINING_KINDS, Job
from launch.preflight import Checked
from launch.scheduler import JobState
from launch.store import JobDirectory, RunDirectory, link_tree, renamed
from launch.tracking import Tracker
from training.state import remove_states

# Kinds of jobs that go on from the records of a killed attempt; others start again.
RESUMABLE = (
    *("train", LEG, "search", "prompt_search"),
    *("evaluate", "curve", "general", "general_base"),
    *("instructions", "instructions_base", "probes", "probes_base", "control"),
)
Paid = LedgerLine | TrainRecord | RungRecord
OF_TRIALS = (RungRecord, TrialRecord, SweepChoice)  # what the tracker is told of a search


@dataclass(kw_only=True, slots=True)
class Recorder:
    """Writes what happens to the jobs of one run; the one writer of its directory."""

    checked: Checked
    run: RunDirectory
    tracker: Tracker
    budget: Budget
    copier: Copier
    hardware: str
    _jobs: dict[str, JobDirectory] = field(default_factory=dict)
    _steps: dict[str, Steps] = field(default_factory=dict)
    # What earlier invocations paid, so that this one's expenses are told apart. By job: the records
    # of one that steps; of another, how many of its first ones, which may be a million.
    _paid: dict[str, set[Paid]] = field(default_factory=dict)
    _num_paid: dict[str, int] = field(default_factory=dict)
    # Jobs of which an earlier attempt announced rows that its records may not tell of.
    _interrupted: set[str] = field(default_factory=set)
    # The last step sent to the tracker, by job and trial.
    _mirrored: dict[tuple[str, int | None], int] = field(default_factory=dict)

    def on_start(self, state: JobState) -> None:
        """Journal the start; what earlier attempts did and spent comes back."""
        job = state.job
        directory = JobDirectory(self.checked.root, job.key)
        directory.begin(keeps_records=job.kind in RESUMABLE)
        self._jobs[job.id] = directory
        if announced_rows(directory.rows):
            self._interrupted.add(job.id)
        is_stepping = job.kind in STEPPING_KINDS
        if not is_stepping or any(isinstance(e, TrainSummary) for e in directory.events()):
            self._untold(job, directory)
        clear_job_error(self.run.path / "logs", job.id)
        self.run.journal("job_started", job=job.id, arm=job.arm, data={"attempt": state.attempts})
        if state.attempts == 1:
            self._note_paid(job, directory)
        steps, of_trials = [], []
        for number, event in enumerate(directory.events()):
            # The bill is stated anew with each start; this invocation's own records are there.
            if isinstance(event, LedgerLine) or state.attempts == 1:
                self._show(event, job, number=number)
            if is_stepping and isinstance(event, TrainRecord):
                steps.append(event)
            elif isinstance(event, OF_TRIALS):
                of_trials.append(event)
        if is_stepping:
            self._resume_steps(state, steps)
        for event in of_trials if state.attempts == 1 else ():
            shown = renamed(event, job=job.id, arm=job.arm, is_reused=True)
            self.tracker.event(job.arm, shown, job_seconds=0.0, devices=job.devices)

    def _note_paid(self, job: Job, directory: JobDirectory) -> None:
        """What earlier invocations left of a job is paid."""
        is_stepping = job.kind in STEPPING_KINDS
        paid: set[Paid] = set()
        num_kept, device_seconds = 0, 0.0
        for event in directory.events():
            num_kept += 1
            device_seconds += paid_device_seconds(job, event)
            if is_stepping and isinstance(event, Paid):
                paid.add(event)
        self._paid[job.id] = paid
        self._num_paid[job.id] = 0 if is_stepping else num_kept
        self.budget.begin_job(job.key, device_seconds)

    def _show(self, event: Any, job: Job, *, number: int) -> None:
        """Put a job's record of this number into the run directory, but for steps, see Steps."""
        if not isinstance(event, TrainRecord):
            is_paid = isinstance(event, LedgerLine) and (
                number < self._num_paid[job.id] or event in self._paid[job.id]
            )
            shown = renamed(event, job=job.id, arm=job.arm, is_reused=is_paid)
            self.run.append(shown, job=job.id, arm=job.arm)

    def _resume_steps(self, state: JobState, records: list[TrainRecord]) -> None:
        """Write the steps that earlier attempts left, and mirror those of earlier invocations."""
        job = state.job
        self._steps[job.id] = Steps.of(records)
        self._write_steps(job)
        for record in records if state.attempts == 1 else ():
            self._mirror(job, record, is_reused=True)

    def _mirror(self, job: Job, record: TrainRecord, *, is_reused: bool) -> None:
        """Send a step to the tracker, unless an earlier attempt has sent it."""
        if record.step > self._mirrored.get((job.id, record.trial), 0):
            self._mirrored[job.id, record.trial] = record.step
            shown = renamed(record, job=job.id, arm=job.arm, is_reused=is_reused)
            self.tracker.event(job.arm, shown, job_seconds=0.0, devices=job.devices)

    def _write_steps(self, job: Job) -> None:
        standing = self._steps[job.id].standing
        shown = [renamed(r, job=job.id, arm=job.arm, is_reused=False) for r in standing]
        self.run.rewrite_steps(job.arm, [r for r in shown if isinstance(r, TrainRecord)])

    def on_event(self, state: JobState, event: Any) -> None:
        """Keep a record in the job's directory and the run's, and mirror it."""
        job = state.job
        if isinstance(event, Progress):
            return
        if isinstance(event, TrainRecord):
            self._on_step(state, event)
            return
        if isinstance(event, TrainSummary):
            event = self._on_summary(job, event)
        if isinstance(event, TrialRecord) and job.kind == LEG:
            self._bill_leg(job)
        self._jobs[job.id].append(event)
        shown = renamed(event, job=job.id, arm=job.arm, is_reused=False)
        self.run.append(shown, job=job.id, arm=job.arm)
        seconds = time.monotonic() - (state.started or time.monotonic())
        self.tracker.event(job.arm, shown, job_seconds=seconds, devices=job.devices)
        if isinstance(event, LedgerLine):
            self.budget.spend_line(event, job=job.key)
        elif isinstance(event, RungRecord) and job.kind in STEPPING_KINDS:
            self.budget.spend(event.device_seconds, job=job.key)

    def _on_step(self, state: JobState, record: TrainRecord) -> None:
        """A training step; one that was there before makes it, and those after it, void."""
        job = state.job
        self.budget.spend(record.device_seconds, job=job.key)
        self._jobs[job.id].append(record)
        void = self._steps[job.id].add(record)
        shown = renamed(record, job=job.id, arm=job.arm, is_reused=False)
        if void:
            self._write_steps(job)
            self._bill_void(job, void)
        else:
            self.run.append(shown, job=job.id, arm=job.arm)
        self._mirror(job, record, is_reused=False)

    def _bill_void(self, job: Job, void: list[TrainRecord]) -> None:
        paid = [r for r in void if r in self._paid[job.id]]
        now = [r for r in void if r not in self._paid[job.id]]
        for records, is_reused in ((paid, True), (now, False)):
            if records:
                line = redone(records, job=job.id, arm=job.arm)
                shown = renamed(line, job=job.id, arm=job.arm, is_reused=is_reused)
                self.run.append(shown, job=job.id, arm=job.arm)

    def _on_summary(self, job: Job, summary: TrainSummary) -> TrainSummary:
        """Bill a finished training with all its attempts; returns its summary over all of them."""
        steps = self._steps[job.id]
        if job.kind == "search":
            complete = summary  # its trials counted over all attempts
            lines = self._search_lines(job)
        else:
            complete = whole(summary, steps)
            paid = [r for r in steps.standing if r in self._paid[job.id]]
            lines = training_ledger(complete, job=job.id, arm=job.arm, paid=paid)
        self._bill(job, lines)
        return complete

    def _bill(self, job: Job, lines: list[LedgerLine]) -> None:
        """State what a job that steps has cost, what it had not told of included."""
        directory = self._jobs[job.id]
        for line in lines:
            directory.append(line)
            self.run.append(line, job=job.id, arm=job.arm)
        for line in self._untold(job, directory):
            self.run.append(line, job=job.id, arm=job.arm)

    def _untold(self, job: Job, directory: JobDirectory) -> list[LedgerLine]:
        """Bill what earlier attempts announced and no record tells of; kept with the job.

        That is the pass they were killed in, results on their way to the driver, and a training's
        padding and probes. An attempt that was not interrupted bills its own rows by itself.
        """
        line = self._untold_line(job, directory)
        if line is None:
            return []
        directory.append(line)
        return [line]

    def _untold_line(self, job: Job, directory: JobDirectory) -> LedgerLine | None:
        if job.id not in self._interrupted:
            return None
        told = billed_rows(directory.events(), is_training=job.kind in STEPPING_KINDS)
        rows = announced_rows(directory.rows) - told
        if rows <= 0:
            return None
        return LedgerLine(job=job.id, arm=job.arm, purpose="redone", tokens=rows)

    def _bill_leg(self, job: Job) -> None:
        """Bill a leg that is over, once: its driver may have died right after it did."""
        events = self._jobs[job.id].events()
        if any(isinstance(e, LedgerLine) and e.purpose == "sweep" and e.tokens for e in events):
            return
        self._bill(job, self._search_lines(job))

    def _search_lines(self, job: Job) -> list[LedgerLine]:
        """The bill of a search so far, from the records that stand."""
        events = list(self._jobs[job.id].events())
        choice = next((e for e in events if isinstance(e, SweepChoice)), None)
        return search_ledger(
            [e for e in events if isinstance(e, TrainRecord | RungRecord)],
            winner=None if choice is None else choice.trials[0],
            job=job.id,
            arm=job.arm,
            paid=self._paid[job.id],
        )

    def on_retry(self, state: JobState) -> None:
        """Journal a lost attempt; the next one takes in what its worker wrote."""
        self._jobs.pop(state.job.id).close()
        facts = {"attempt": state.attempts, "error": state.reason}
        self.run.journal("attempt_lost", job=state.job.id, arm=state.job.arm, data=facts)

    def on_end(self, state: JobState) -> None:
        """Mark a job done or failed; only a whole job is ever reused."""
        job = state.job
        directory = self._jobs.get(job.id)
        if state.status == "done":
            assert directory is not None
            directory.finish(seconds=state.seconds, hardware=self.hardware)
            if job.kind in TRAINING_KINDS:
                remove_states(directory.points)
            self.run.journal(
                "job_done",
                job=job.id,
                arm=job.arm,
                data={"is_reused": False, "seconds": state.seconds},
            )
            show_checkpoints(self.checked, self.run, job)
            self.copier.job(job.key)
        elif state.status == "reused":
            replay(self.checked, self.run, job)
        elif state.status == "cancelled":
            tell_cancelled(self.checked, self.run, job)
        else:
            if directory is not None:
                self._interrupted.add(job.id)
                directory.close()
                self._bill_unfinished(job, directory)
            self._failed(state)
        self._jobs.pop(job.id, None)

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
            write_job_error(
                self.run.path / "logs",
                job=job.id,
                arm=job.arm,
                error=state.error,
                reason=state.reason,
                attempts=state.attempts,
            )

    def _bill_unfinished(self, job: Job, directory: JobDirectory) -> None:
        """State what a job that did not finish has spent; a later one states it anew."""
        is_stepping = job.kind in STEPPING_KINDS
        stated = list(directory.events()) if is_stepping else []
        if is_stepping:
            directory.take_in_streams()
        untold = self._untold_line(job, directory)
        if untold is not None:
            self.run.append(untold, job=job.id, arm=job.arm)
        if not is_stepping:
            return
        for number, event in enumerate(directory.events()):
            if isinstance(event, LedgerLine) and event not in stated:
                self._show(event, job, number=number)
        if job.kind in ("search", LEG):
            for line in self._search_lines(job):
                self.run.append(line, job=job.id, arm=job.arm)
            return
        standing = self._steps[job.id].standing
        paid = [r for r in standing if r in self._paid[job.id]]
        for line in standing_ledger(standing, job=job.id, arm=job.arm, paid=paid):
            self.run.append(line, job=job.id, arm=job.arm)

    def has_stepped(self, job: Job) -> bool:
        """Whether a job is a training that has made steps, so that there is a state to save."""
        return job.id in self._steps and bool(self._steps[job.id].first_steps)

    def ask_to_stop(self, job: Job) -> None:
        """Let a training save its state and stop."""
        ask_to_stop(JobDirectory(self.checked.root, job.key).points)


def paid_device_seconds(job: Job, event: Any) -> float:
    """What a record kept from before took: of a training a step or redone ones, else a bill."""
    is_training = job.kind in STEPPING_KINDS
    is_step = is_training and isinstance(event, TrainRecord | RungRecord)
    is_bill = isinstance(event, LedgerLine) and (not is_training or event.purpose == "redone")
    return float(event.device_seconds) if is_step or is_bill else 0.0


def show_checkpoints(checked: Checked, run: RunDirectory, job: Job) -> None:
    """Show a training's checkpoints as arms/<arm>/<variant>/checkpoint/, trials below trials/."""
    if job.kind not in TRAINING_KINDS or job.arm is None:
        return
    points = JobDirectory(checked.root, job.key).points
    for directory in sorted([*points.glob("*/checkpoint"), *points.glob("trials/*/*/checkpoint")]):
        link_tree(directory, run.path / "arms" / job.arm / directory.relative_to(points))


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
    final = "points/final/checkpoint/checkpoint.json"
    needed = {"train": final, "search": final, "rows": "rows.json", "features": FEATURES_FILE}
    if job.kind in needed and not (directory.path / needed[job.kind]).is_file():
        return False
    return directory.done() is not None
