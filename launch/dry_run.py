"""`dry_run=true`: the plan, its tokens, time, money and memory, and what is found finished."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluation.mix import Mix
from evaluation.tasks import Task
from launch.label_curve.dry_run import is_point, point_table
from launch.placement import Machine
from launch.planned import SEARCH_KINDS, Estimate, Job, Plan
from launch.preflight import Checked
from launch.rates import device_facts, price_of
from launch.recorder import is_finished
from launch.search.estimate import search_size
from launch.search.halving import rung_shares
from launch.search.prompt_search import prompt_halving
from training.zero import gigabytes


def show(checked: Checked, console: Console) -> None:
    """Print the plan; starts nothing and writes nothing."""
    finished = {j.id for j in checked.plan.jobs if is_finished(checked.root, j)}
    console.print(f"[bold]Plan of {checked.name}[/bold]", highlight=False, soft_wrap=True)
    console.print(_data_line(checked.task), highlight=False, soft_wrap=True)
    for name, mix in checked.mixes.items():
        console.print(_mix_line(name, mix), highlight=False, soft_wrap=True)
    console.print(f"Machine: {checked.machine.name}", highlight=False)
    console.print(_table(checked.plan, finished))
    if checked.labels is not None:
        console.print("The points of the label curve, with the jobs of the arms themselves:")
        console.print(point_table(checked.labels, checked.plan, finished))
    for job in checked.plan.jobs:
        if job.id not in finished and not is_point(job):
            for line in _job_lines(job, checked):
                console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(_totals(checked, finished), highlight=False, soft_wrap=True)
    console.print("Nothing was started. Leave out dry_run=true to run it.")


def _job_lines(job: Job, checked: Checked) -> list[str]:
    """What is planned of one training or search, in words."""
    lines = training_lines(job, checked.machine) if job.kind == "train" else []
    return lines + (search_lines(job, checked) if job.kind in SEARCH_KINDS else [])


def search_lines(job: Job, checked: Checked) -> list[str]:
    """The trials of a search, where they are judged, and how much of all of them that takes."""
    trials = checked.searches[job.arm or ""]
    halving = checked.config.sweep.halving
    if job.kind == "prompt_search":
        halving = prompt_halving(halving, num_items=len(checked.task.items["validation"]))
    size = search_size(trials, halving)
    settings = len({trial.setting for trial in trials})
    rungs = ", ".join(f"{share:.0%}" for share in rung_shares(halving))
    unit = "their steps" if job.kind == "search" else "the validation items"
    judged = f"judged on validation after {rungs} of {unit}" if halving.enabled else "not halved"
    return [
        f"{job.id}: {len(trials)} trials of {settings} settings, {judged}: "
        f"as much as {size.trainings:.1f} whole ones where none fails",
        *(f"  {trial.number}  {trial.label}" for trial in trials),
    ]


def show_sweep(runs: Sequence[tuple[str, Checked]], console: Console) -> None:
    """Print a line for each run of a sweep, and what all of them need; starts nothing.

    Args:
        runs: what each varies, and the run. A job that an earlier run has too is not counted again.
        console: where to print.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("run", "values", "jobs", "reused", "as before", "seconds", "USD"):
        table.add_column(column, justify="left" if column == "values" else "right")
    done: set[str] = set()
    seen: set[str] = set()
    todo: list[Job] = []
    for number, (label, checked) in enumerate(runs, start=1):
        jobs = checked.plan.jobs
        done |= {j.key for j in jobs if is_finished(checked.root, j)}
        mine = [j for j in jobs if j.key not in done | seen]
        before = sum(j.key in seen - done for j in jobs)
        seen |= {j.key for j in jobs}
        todo += mine
        reused = sum(j.key in done for j in jobs)
        counts = (str(len(jobs)), str(reused or ""), str(before or ""))
        table.add_row(str(number), escape(label), *counts, *_sums(mine, checked))
    first = runs[0][1]
    table.add_row("", "all", str(len(todo)), "", "", *_sums(todo, first))
    console.print(f"[bold]Plan of {len(runs)} runs[/bold] on {first.machine.name}", highlight=False)
    console.print(table)
    for _, checked in runs:
        console.print(f"  {checked.name}", highlight=False, soft_wrap=True)
    console.print(
        "Nothing was started. Leave out dry_run=true to run them; leave out -m for one run's plan."
    )


def _sums(jobs: Sequence[Job], checked: Checked) -> tuple[str, str]:
    """Seconds one after another and USD of these jobs; ? where a part is not known."""
    seconds = [j.estimate.seconds for j in jobs]
    usd = sum(j.estimate.usd or 0.0 for j in jobs)
    is_priced = price_of(checked.config, checked.machine) is not None
    unknown = " + ?" if None in seconds else ""
    return f"{sum(s or 0.0 for s in seconds):.0f}{unknown}", f"{usd:.4f}" if is_priced else ""


def _data_line(task: Task) -> str:
    counts = ", ".join(f"{len(task.items[s])} {s}" for s in ("train", "validation", "test"))
    return f"Task: {task.name}, {task.kind.name}, scored by {task.scoring}; {counts} items"


def _mix_line(name: str, mix: Mix) -> str:
    rows = ", ".join(
        f"{mix.num_rows[s.name]} {s.name}" + (f" ({s.note})" if s.note else "") for s in mix.sources
    )
    return f"Mix of {name}: {mix.size} rows: {rows}"


def _table(plan: Plan, finished: set[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("job", "after", "devices", "tokens", "seconds", "USD", "memory", ""):
        is_text = column in ("job", "after", "")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for job in (job for job in plan.jobs if not is_point(job)):
        estimate = job.estimate
        table.add_row(
            job.id,
            " ".join(name.partition(":")[0] for name in job.depends_on),
            str(job.devices or ""),
            _tokens(estimate),
            "?" if estimate.seconds is None else f"{estimate.seconds:.0f}",
            "" if estimate.usd is None else f"{estimate.usd:.4f}",
            "" if estimate.memory_bytes is None else gigabytes(estimate.memory_bytes),
            "reused" if job.id in finished else "",
        )
    return table


def _tokens(estimate: Estimate) -> str:
    if estimate.tokens is None:
        return ""
    return f"about {estimate.tokens:,}" if estimate.is_about else f"{estimate.tokens:,}"


def training_lines(job: Job, machine: Machine) -> list[str]:
    """What is planned of one training, in words."""
    estimate = job.estimate
    plan = estimate.training
    if plan is None:
        return [
            f"{job.id}: memory and operations are not known before the model is here "
            "(python -m launch.prefetch makes it ready)"
        ]
    about = "about " if estimate.is_about else ""
    trained = "unknown" if plan.trained_parameters is None else f"{plan.trained_parameters:,}"
    lines = [
        f"{job.id}: {plan.steps:,} steps, {plan.examples:,} examples, {about}{estimate.tokens:,} "
        f"tokens, {about}{estimate.flops or 0:.2e} FLOPs; {trained} parameters train",
        f"  ZeRO {plan.zero_reason}",
        "  bytes per device: "
        + ", ".join(f"{name} {gigabytes(n)}" for name, n in plan.memory.items() if n)
        + (f"; moved off the device: {gigabytes(plan.host_bytes)}" if plan.host_bytes else ""),
    ]
    if machine.device != "cpu" and plan.workers < machine.devices:
        lines.append(
            f"  {plan.workers} of {machine.devices} devices train: a batch has equal shares for no "
            f"more; trainer.batch_size={machine.devices} would use all"
        )
    if estimate.seconds is None:
        lines.append("  seconds are not known: no rate of this device is")
    else:
        lines.append(
            f"  {estimate.seconds:.0f} s ({estimate.low_seconds:.0f} to "
            f"{estimate.high_seconds:.0f}), {estimate.rate}"
        )
    return lines


def _totals(checked: Checked, finished: set[str]) -> str:
    pricing = checked.config.pricing
    todo = [j.estimate for j in checked.plan.jobs if j.id not in finished]
    seconds = sum(e.seconds or 0.0 for e in todo)
    usd = sum(e.usd or 0.0 for e in todo)
    unknown = sum(e.seconds is None for e in todo)
    lines = [f"To run: {len(todo)} jobs, about {seconds / 60:.1f} minutes one after another"]
    if price_of(checked.config, checked.machine) is not None:
        lines.append(
            f"about {usd:.4f} USD at {pricing.device_hour.usd} USD per device-hour "
            f"({pricing.source}, {pricing.date})"
        )
    elif checked.machine.device != "cpu":
        facts = device_facts(checked.config)
        preset = None if facts is None else facts.pricing
        remedy = (
            f"add pricing={preset}" if preset else "add pricing.device_hour.usd with its source"
        )
        lines.append(f"money: no price of this device; {remedy}")
    if unknown:
        lines.append(f"{unknown} of them without an estimate of seconds")
    if any(j.wave for j in checked.plan.jobs):
        lines.append("test items are asked in waves (ids end in :1 ..): arms that leave need fewer")
    if any(e.is_about for e in todo):
        lines.append(
            "tokens marked about are not exact: a search ends early, or no tokenizer is here yet"
        )
    return "; ".join(lines)
