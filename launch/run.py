"""One run: a checked configuration -> plan -> jobs -> records -> report."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from conf.errors import (
    EXIT_ARM_FAILED,
    EXIT_BUDGET,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    BudgetReached,
    Refused,
)
from conf.hashing import plain
from conf.records import LedgerLine, Progress, TrainRecord, TrainSummary
from conf.results import Results
from evaluation.run_records import read_run
from launch import cluster
from launch.budget import Budget
from launch.execute import Executor
from launch.live import Live
from launch.plan import Job
from launch.preflight import Checked
from launch.scheduler import JobState, Scheduler
from launch.store import JobDirectory, RunDirectory, link_tree, renamed, write_json
from launch.tracking import Tracker

# Kinds of jobs that go on from the records of a killed attempt; others start again.
RESUMABLE = ("evaluate", "curve")
PACKAGES = (
    "crossover",
    "torch",
    "ray",
    "deepspeed",
    "transformers",
    "peft",
    "wandb",
    "hydra-core",
    "numpy",
)


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


def execute(checked: Checked, console: Console) -> int:
    """Run what is missing, then report; returns the exit code."""
    run = RunDirectory(checked.root, checked.name)
    run.open()
    try:
        return _execute(checked, run, console)
    finally:
        run.close()


def _execute(checked: Checked, run: RunDirectory, console: Console) -> int:
    _write_facts(checked, run)
    run.journal("run_started", data={"command": checked.command})
    finished = [j for j in checked.plan.jobs if is_finished(checked.root, j)]
    num_pending = len(checked.plan.jobs) - len(finished)
    opening = _opening(checked, run, len(finished), num_pending)
    console.print(opening, highlight=False, soft_wrap=True)
    exit_code, tracker = EXIT_DONE, None
    if num_pending:
        exit_code, tracker = _run_pending(checked, run, console)
    for job in finished if not num_pending else ():
        replay(checked, run, job)
    run.journal("run_finished", data={"exit_code": exit_code})
    results = _report(checked, run, console, exit_code)
    if tracker is not None:
        if checked.config.tracking.upload_text:
            arms = read_run(run.path).arms
            tracker.upload_text({name: arm.samples for name, arm in arms.items()})
        tracker.finish(results)
        for line in [*tracker.warnings[:3], tracker.how_to_sync()]:
            if line:
                console.print(line, highlight=False, soft_wrap=True)
    if exit_code == EXIT_INTERRUPTED:
        console.print(
            f"Interrupted. The same command goes on from here: {checked.command}", soft_wrap=True
        )
    return exit_code


def _opening(checked: Checked, run: RunDirectory, num_finished: int, num_pending: int) -> str:
    items = checked.task.items
    counts = ", ".join(f"{len(items[s])} {s}" for s in ("train", "validation", "test"))
    reused = f", {num_finished} found finished" if num_finished else ""
    return (
        f"[bold]{checked.exp}[/bold] on {checked.task.name} ({counts} items), "
        f"{len(checked.arms)} arms, {num_pending} jobs to run{reused}\n{run.path}"
    )


def _run_pending(checked: Checked, run: RunDirectory, console: Console) -> tuple[int, Tracker]:
    """Start Ray, run the jobs, stop Ray; Ctrl-C ends it with every finished job kept."""
    budget = Budget(config=checked.config.budget, pricing=checked.config.pricing)
    tracker = Tracker(
        config=checked.config,
        name=checked.name,
        directory=run.path,
        arms=checked.arms,
        num_train_labels=len(checked.task.items["train"]),
        mode=checked.wandb_mode,
    )
    executor = Executor(
        config=checked.config,
        plan=checked.plan,
        arms=checked.arms,
        task=checked.task,
        places=checked.places,
        machine=checked.machine,
        run_path=run.path,
    )
    price = checked.config.pricing.usd_per_device_second
    with Live(console, checked.plan, usd_per_device_second=price) as live:
        recorder = Recorder(
            checked=checked,
            run=run,
            tracker=tracker,
            budget=budget,
            live=live,
            hardware=checked.machine.name,
        )
        scheduler = Scheduler(
            plan=checked.plan,
            slots=checked.machine.devices,
            run_job=executor.run,
            listener=recorder,
            may_start=budget.refusal,
            is_retryable=_is_lost_process,
            is_finished=lambda job: is_finished(checked.root, job),
        )
        try:
            live.note("starting Ray on this machine")
            cluster.start(checked.machine)
            states = scheduler.run()
        except KeyboardInterrupt:
            live.note("stopping")
            return EXIT_INTERRUPTED, tracker
        except BudgetReached as error:
            live.note(f"stopped at the budget: {error}")
            return EXIT_BUDGET, tracker
        finally:
            cluster.stop()
    return _exit_code(states), tracker


def _is_lost_process(error: BaseException) -> bool:
    """Whether a process or node was lost, as opposed to the job's own failure."""
    from ray.exceptions import (
        ActorDiedError,
        ActorUnavailableError,
        NodeDiedError,
        WorkerCrashedError,
    )

    lost = (ActorDiedError, ActorUnavailableError, NodeDiedError, WorkerCrashedError)
    return isinstance(error, lost)


def _exit_code(states: dict[str, JobState]) -> int:
    statuses = {s.status for s in states.values()}
    if "stopped" in statuses:
        return EXIT_BUDGET
    return EXIT_ARM_FAILED if statuses & {"failed", "skipped"} else EXIT_DONE


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


def _report(
    checked: Checked, run: RunDirectory, console: Console, exit_code: int
) -> Results | None:
    """Results and report from the records alone; None where there is nothing to show yet."""
    from evaluation import panel
    from evaluation.report import write_report
    from evaluation.summary import summarise

    records = read_run(run.path)
    if not any(arm.samples for arm in records.arms.values()):
        return None
    results = summarise(records)
    paths = write_report(results, records, run.path)
    if exit_code != EXIT_INTERRUPTED:
        panel.final(results, console)
    console.print(f"Report: {paths.html}", highlight=False, soft_wrap=True)
    return results


def _write_facts(checked: Checked, run: RunDirectory) -> None:
    """config.json, plan.json and items.jsonl: what was asked, what will be done, on which items."""
    task = checked.task
    base = next(iter(checked.model_facts.values()), None)
    write_json(
        run.path / "config.json",
        {
            "config": plain(checked.config),
            "exp": checked.exp,
            "arms": {n: {"kind": a.kind, "on": a.on} for n, a in checked.arms.items()},
            "command": checked.command,
            **_commit(),
            "versions": _versions(),
            "hardware": {
                "name": checked.machine.name,
                "device": checked.machine.device,
                "devices": checked.machine.devices,
                "cores": cluster.num_cores(),
                "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                "system": platform.platform(),
            },
            "task": {
                "name": task.name,
                "kind": task.kind.name,
                "scoring": task.scoring,
                "instruction": task.instruction,
                "labels": list(task.labels),
                "sha256": task.sha256,
                "num_items": {s: len(v) for s, v in task.items.items()},
                "facts": plain(task.facts),
            },
            "model": {
                "name": checked.config.model.name,
                "path": checked.config.model.path,
                "note": checked.config.model.note,
                **(plain(dataclasses.asdict(base)) if base else {}),
            },
        },
    )
    write_json(run.path / "plan.json", checked.plan)
    run.write_items([i for s in ("train", "validation", "test") for i in task.items[s]])


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> dict[str, Any]:
    """The commit of this checkout and whether it has changes; None outside a repository."""
    here = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "is_dirty": None}
    return {"commit": commit, "is_dirty": bool(status.strip())}
