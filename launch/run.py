"""One run: a checked configuration -> plan -> jobs -> records -> report."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from conf.errors import (
    EXIT_ARM_FAILED,
    EXIT_BUDGET,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    BudgetReached,
)
from conf.records import TrainRecord
from conf.results import Results
from evaluation.run_records import read_run
from launch import cluster
from launch.budget import Budget
from launch.execute import Executor
from launch.live import Live
from launch.preflight import Checked
from launch.provenance import write_facts
from launch.recorder import Recorder, is_finished, replay
from launch.scheduler import JobState, Scheduler
from launch.store import RunDirectory
from launch.tracking import Tracker
from training.job import TrainingStopped, WorkerLost


def execute(checked: Checked, console: Console) -> int:
    """Run what is missing, then report; returns the exit code."""
    run = RunDirectory(checked.root, checked.name)
    run.open()
    try:
        return _execute(checked, run, console)
    finally:
        run.close()


def _execute(checked: Checked, run: RunDirectory, console: Console) -> int:
    write_facts(checked, run)
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
        mixes=checked.mixes,
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
            may_start=recorder.refusal,
            is_retryable=is_lost_process,
            is_finished=lambda job: is_finished(checked.root, job),
            reached=lambda event: event.step if isinstance(event, TrainRecord) else None,
            why_stopped=recorder.why_stopped,
        )
        try:
            live.note("starting Ray on this machine")
            cluster.start(checked.machine)
            with _signals(recorder):  # after Ray, which sets its own
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


@contextmanager
def _signals(recorder: Recorder) -> Iterator[None]:
    """Ctrl-C or SIGTERM: the first lets a training save its state, the second ends at once."""

    def halt(signum: int, frame: FrameType | None) -> None:
        if recorder.halt is not None:
            raise KeyboardInterrupt
        recorder.halt = KeyboardInterrupt("interrupted")

    before = {signum: signal.signal(signum, halt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)


def is_lost_process(error: BaseException) -> bool:
    """Whether a process or node was lost, as opposed to the job's own failure.

    A training that stopped by itself was told to by its worker's SIGTERM: its machine goes away.
    """
    from ray.exceptions import (
        ActorDiedError,
        ActorUnavailableError,
        NodeDiedError,
        WorkerCrashedError,
    )

    lost = (ActorDiedError, ActorUnavailableError, NodeDiedError, WorkerCrashedError)
    return isinstance(error, (*lost, WorkerLost, TrainingStopped))


def _exit_code(states: dict[str, JobState]) -> int:
    statuses = {s.status for s in states.values()}
    if "stopped" in statuses:
        return EXIT_BUDGET
    return EXIT_ARM_FAILED if statuses & {"failed", "skipped"} else EXIT_DONE


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
