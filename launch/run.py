"""From checked configurations to plan, jobs, records and report: one run, or several together."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
from evaluation.records.run_records import read_run
from launch import cluster, tracking
from launch.budget import ENDPOINT_SPEND, Budget
from launch.elsewhere.copies import Copier
from launch.evaluators import Evaluators
from launch.execute import Executor
from launch.judge import Judge, cancelled_before, tell_cancelled
from launch.label_curve.jobs import runner
from launch.live import Live
from launch.planned import Job
from launch.preflight import Checked
from launch.provenance import complete_facts, write_facts
from launch.recorder import Recorder, is_finished, replay
from launch.scheduler import JobState, Scheduler
from launch.search.leg_judge import LegJudge, first_reason
from launch.spending import Spending
from launch.store import RunDirectory
from launch.together import Member, Runs, joined
from launch.tracking import Alert, Tracker
from training.job import TrainingStopped, WorkerLost


@dataclass(kw_only=True, slots=True)
class Run:
    """A run whose directory is open.

    Args:
        prefix: before the names of its jobs and arms where several runs share a schedule.
        finished: the jobs that were found finished.
        cancelled: those that were found not worth running.
        exit_code: how it ended, as conf.errors says.
    """

    checked: Checked
    directory: RunDirectory
    tracker: Tracker
    copier: Copier
    finished: list[Job]
    cancelled: list[Job] = field(default_factory=list)
    prefix: str = ""
    exit_code: int = EXIT_DONE

    @property
    def num_pending(self) -> int:
        """Jobs that are left to run."""
        return len(self.checked.plan.jobs) - len(self.finished) - len(self.cancelled)


def execute(checked: Checked, console: Console) -> int:
    """Run what is missing, then report; returns the exit code."""
    from evaluation.report import panel

    with opened({"": checked}) as (run,):
        console.print(_opening(run), highlight=False, soft_wrap=True)
        run_jobs([run], console)
        results = report(run)
        if results is not None:
            if run.exit_code != EXIT_INTERRUPTED:
                panel.final(results, console)
            html = run.directory.path / "report.html"
            console.print(f"Report: {html}", highlight=False, soft_wrap=True)
        end_tracking(run, results, console)
        end_copies(run, console)
    if run.exit_code == EXIT_INTERRUPTED:
        console.print(
            f"Interrupted. The same command goes on from here: {checked.command}", soft_wrap=True
        )
    return run.exit_code


def _opening(run: Run) -> str:
    checked = run.checked
    items = checked.task.items
    counts = ", ".join(f"{len(items[s])} {s}" for s in ("train", "validation", "test"))
    reused = f", {len(run.finished)} found finished" if run.finished and run.num_pending else ""
    return (
        f"[bold]{checked.exp}[/bold] on {checked.task.name} ({counts} items), "
        f"{len(checked.arms)} arms, {run.num_pending} jobs to run{reused}\n{run.directory.path}"
    )


@contextmanager
def opened(
    checks: Mapping[str, Checked],
    *,
    group: str | None = None,
    swept: Mapping[str, Mapping[str, object]] | None = None,
) -> Iterator[list[Run]]:
    """Lock the directories of all runs and write what was asked; given back at the end.

    Args:
        checks: the runs by prefix.
        group: their group in W&B; each run's own name where it is None.
        swept: by prefix, the keys in which a run differs from the others.

    Raises:
        ClusterError: a directory that cannot be written, or that another process writes.
    """
    with ExitStack() as stack:
        stack.callback(tracking.shut_down)
        runs = []
        for prefix, checked in checks.items():
            directory = RunDirectory(checked.root, checked.name)
            directory.open()
            stack.callback(directory.close)
            jobs = checked.plan.jobs
            cancelled = cancelled_before(directory.path, jobs, checked.config.decision)
            left_out = {job.id for job in cancelled}
            finished = [j for j in jobs if j.id not in left_out and is_finished(checked.root, j)]
            is_over = len(finished) + len(cancelled) == len(jobs)
            tracker = Tracker(
                config=checked.config,
                name=checked.name,
                directory=directory.path,
                arms=checked.arms,
                num_train_labels=len(checked.task.items["train"]),
                mode="off" if is_over else checked.wandb_mode,  # it was mirrored as it ran
                group=group or checked.name,
                swept=(swept or {}).get(prefix, {}),
                searches=checked.searches,
            )
            runs.append(
                Run(
                    checked=checked,
                    directory=directory,
                    tracker=tracker,
                    copier=Copier(checked.config.cluster.copy_to, directory.path.resolve()),
                    finished=finished,
                    cancelled=cancelled,
                    prefix=prefix,
                )
            )
        for run in runs:
            write_facts(run.checked, run.directory)
            run.directory.journal("run_started", data={"command": run.checked.command})
        yield runs


def run_jobs(runs: list[Run], console: Console) -> None:
    """Run what is missing in any of the runs, and put down how each ended."""
    if any(run.num_pending for run in runs):
        _run_pending(runs, console)
    else:
        for run in runs:
            for job in run.finished:
                replay(run.checked, run.directory, job)
            for job in run.cancelled:
                tell_cancelled(run.checked, run.directory, job)
    for run in runs:
        run.directory.journal("run_finished", data={"exit_code": run.exit_code})


def _run_pending(runs: list[Run], console: Console) -> None:
    """Start Ray, run the jobs, stop Ray; Ctrl-C ends it with every finished job kept."""
    first = runs[0].checked  # machine, budget and prices are the same in all of them
    budget = Budget(
        config=first.config.budget,
        pricing=first.config.pricing,
        endpoint_spend=runs[0].directory.path.resolve() / ENDPOINT_SPEND,
        spending=Spending(runs[0].directory.path),
    )
    evaluators = Evaluators(machine=first.machine)
    members = {run.prefix: _member(run, budget, evaluators) for run in runs}
    plan = joined({run.prefix: run.checked.plan for run in runs})
    price = first.config.pricing.usd_per_device_second
    ended = None
    with Live(console, plan, usd_per_device_second=price) as live:
        together = Runs(members=members, budget=budget, live=live)
        scheduler = Scheduler(
            plan=plan,
            slots=first.machine.devices,
            slots_left=lambda: cluster.devices_left(first.config.cluster),
            run_job=together.run_job,
            listener=together,
            may_start=together.refusal,
            is_retryable=is_lost_process,
            is_finished=lambda job: is_finished(first.root, job),
            reached=lambda event: event.step if isinstance(event, TrainRecord) else None,
            why_stopped=together.why_stopped,
            why_cancelled=together.why_cancelled,
        )
        try:
            where = first.config.cluster
            is_here = where.name == "local"
            live.note("starting Ray on this machine" if is_here else "checking the cluster's nodes")
            cluster.start(first.machine, where, root=first.root)
            with _signals(together):  # after Ray, which sets its own
                scheduler.run()
        except KeyboardInterrupt:
            live.note("stopping")
            ended = EXIT_INTERRUPTED
        except BudgetReached as error:
            live.note(f"stopped at the budget: {error}")
            ended = EXIT_BUDGET
        finally:
            cluster.stop()
    for run in runs:
        names = [run.prefix + job.id for job in run.checked.plan.jobs]
        run.exit_code = _exit_code([scheduler.states.get(n) for n in names], ended=ended)


def _member(run: Run, budget: Budget, evaluators: Evaluators) -> Member:
    checked = run.checked
    recorder = Recorder(
        checked=checked,
        run=run.directory,
        tracker=run.tracker,
        copier=run.copier,
        budget=budget,
        hardware=checked.machine.name,
    )
    executor = Executor(
        config=checked.config,
        plan=checked.plan,
        arms=checked.arms,
        task=checked.task,
        places=checked.places,
        machine=checked.machine,
        run_path=run.directory.path,
        evaluators=evaluators,
        budget=budget,
        mixes=checked.mixes,
        searches=checked.searches,
    )
    return Member(
        plan=checked.plan,
        recorder=recorder,
        run_job=runner(executor, checked.labels),
        why_cancelled=first_reason(
            Judge(checked=checked, run=run.directory).cancelled,
            LegJudge(context=executor, run=run.directory).cancelled,
        ),
    )


@contextmanager
def _signals(runs: Runs) -> Iterator[None]:
    """Ctrl-C or SIGTERM: the first lets a training save its state, the second ends at once."""

    def halt(signum: int, frame: FrameType | None) -> None:
        if runs.halt is not None:
            raise KeyboardInterrupt
        runs.halt = KeyboardInterrupt("interrupted")

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


def _exit_code(states: list[JobState | None], *, ended: int | None) -> int:
    """How a run ended whose jobs stand so. ended: why all runs were broken off, if they were."""
    if ended is not None and not all(s is not None and s.is_over for s in states):
        return ended
    statuses = {s.status for s in states if s is not None}
    if "stopped" in statuses:
        return EXIT_BUDGET if ended is None else ended
    return EXIT_ARM_FAILED if statuses & {"failed", "skipped"} else EXIT_DONE


def report(run: Run) -> Results | None:
    """Write results and report from the records alone; None where there is nothing yet."""
    from evaluation.report.files import write_report
    from evaluation.results.summary import summarise

    complete_facts(run.checked, run.directory)
    records = read_run(run.directory.path)
    if not any(arm.samples for arm in records.arms.values()):
        return None
    results = summarise(records)
    write_report(results, records, run.directory.path)
    return results


ENDS = {
    EXIT_DONE: ("is done", "INFO"),
    EXIT_ARM_FAILED: ("has failed in part", "ERROR"),
    EXIT_BUDGET: ("has reached its budget", "WARN"),
    EXIT_INTERRUPTED: ("was interrupted", "WARN"),
}


def _alert(run: Run, results: Results | None) -> Alert:
    """How the run ended, as an alert: names and numbers, no text of an item."""
    how, level = ENDS[run.exit_code]
    failed = [name for name, arm in results.arms.items() if arm.error] if results else []
    parts = [f"Verdict: {results.recommendation.verdict}."] if results else []
    parts += [f"Failed: {', '.join(failed)}."] if failed else []
    parts.append(f"Again: {run.checked.command}")
    return Alert(title=f"{run.checked.name} {how}", text=" ".join(parts), level=level)


def end_tracking(run: Run, results: Results | None, console: Console) -> None:
    """Send the final numbers, and say what did not arrive and how to upload what is offline."""
    tracker = run.tracker
    if run.checked.config.tracking.upload_text:
        arms = read_run(run.directory.path).arms
        tracker.upload_text({name: arm.samples for name, arm in arms.items()})
    tracker.finish(results, alert=_alert(run, results))
    for line in [*tracker.warnings[:3], tracker.how_to_sync()]:
        if line:
            console.print(line, highlight=False, soft_wrap=True)


def end_copies(run: Run, console: Console) -> None:
    """Copy what the store lacks, the run itself last, and say what it has; where asked for."""
    checked = run.checked
    line = run.copier.end([j.key for j in checked.plan.jobs if is_finished(checked.root, j)])
    if line is not None:
        console.print(line, highlight=False, soft_wrap=True)
