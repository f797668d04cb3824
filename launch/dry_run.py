"""`dry_run=true`: the plan, its tokens, time, money and memory, and what is found finished."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from conf.groups import PricingConfig
from evaluation.tasks import Task
from launch.plan import Plan
from launch.preflight import Checked
from launch.recorder import is_finished


def show(checked: Checked, console: Console) -> None:
    """Print the plan; starts nothing and writes nothing."""
    finished = {j.id for j in checked.plan.jobs if is_finished(checked.root, j)}
    console.print(f"[bold]Plan of {checked.name}[/bold]", highlight=False, soft_wrap=True)
    console.print(_data_line(checked.task), highlight=False, soft_wrap=True)
    console.print(f"Machine: {checked.machine.name}", highlight=False)
    console.print(_table(checked.plan, finished))
    console.print(
        _totals(checked.plan, finished, checked.config.pricing), highlight=False, soft_wrap=True
    )
    console.print("Nothing was started. Leave out dry_run=true to run it.")


def _data_line(task: Task) -> str:
    counts = ", ".join(f"{len(task.items[s])} {s}" for s in ("train", "validation", "test"))
    return f"Task: {task.name}, {task.kind.name}, scored by {task.scoring}; {counts} items"


def _table(plan: Plan, finished: set[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("job", "after", "devices", "tokens", "seconds", "USD", "memory", ""):
        is_text = column in ("job", "after", "")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for job in plan.jobs:
        estimate = job.estimate
        table.add_row(
            job.id,
            " ".join(name.partition(":")[0] for name in job.depends_on),
            str(job.devices or ""),
            "" if estimate.tokens is None else f"{estimate.tokens:,}",
            "?" if estimate.seconds is None else f"{estimate.seconds:.0f}",
            "" if estimate.usd is None else f"{estimate.usd:.4f}",
            "" if estimate.memory_bytes is None else f"{estimate.memory_bytes / 2**30:.1f} GiB",
            "reused" if job.id in finished else "",
        )
    return table


def _totals(plan: Plan, finished: set[str], pricing: PricingConfig) -> str:
    todo = [j.estimate for j in plan.jobs if j.id not in finished]
    seconds = sum(e.seconds or 0.0 for e in todo)
    usd = sum(e.usd or 0.0 for e in todo)
    unknown = sum(e.seconds is None for e in todo)
    lines = [f"To run: {len(todo)} jobs, about {seconds / 60:.1f} minutes one after another"]
    if pricing.device_hour.usd is not None:
        lines.append(
            f"about {usd:.4f} USD at {pricing.device_hour.usd} USD per device-hour "
            f"({pricing.source}, {pricing.date})"
        )
    if unknown:
        lines.append(f"{unknown} of them without an estimate of seconds")
    return "; ".join(lines)
