"""`python -m launch.status RUN`: the state of a run, from its files alone."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

from launch.cli import guarded
from launch.run_state import JobView, RunView, age, view_run


def status(run: Path) -> str:
    """Jobs with state, node and last heartbeat, what was spent, and the last error, as text.

    Raises:
        DataError: the directory is no run directory.
    """
    view = view_run(run)
    return "\n".join([f"{run.name}: {_headline(view)}", *map(_line, view.jobs), *_tail(view)])


def _headline(view: RunView) -> str:
    if view.heartbeat is None:
        return "not started"
    when = datetime.datetime.fromtimestamp(view.heartbeat).isoformat(sep=" ", timespec="seconds")
    if view.exit_code is not None:
        return f"finished with exit code {view.exit_code} ({view.status}) at {when}"
    where = {
        True: "its driver runs on this machine",
        False: "no driver on this machine writes it",
        None: "",
    }[view.is_driver_here]
    words = f"last heartbeat {age(view.heartbeat)}, at {when}"
    return f"{words}; {where}" if where else words


def _line(job: JobView) -> str:
    parts = [f"  {job.id:<30} {job.state:<9}"]
    if job.seconds:
        parts.append(f"{job.seconds:8.1f} s")
    elif job.state == "running":
        parts.append(f"heartbeat {age(job.heartbeat)}")
    if job.attempt is not None and job.attempt > 1:
        parts.append(f"attempt {job.attempt}")
    if job.nodes:
        parts.append(f"on {', '.join(job.nodes)}")
    return "  ".join(parts).rstrip()


def _tail(view: RunView) -> list[str]:
    lines = []
    if view.spent is not None:
        usd = "no price of a device-hour" if view.usd is None else f"{view.usd:.4f} USD"
        lines.append(f"  spent: {view.spent.device_seconds:.0f} device-seconds, {usd}")
    for job in view.jobs:
        if job.lost is not None:
            lines.append(f"  lost: {job.id}: {job.lost}")
        if job.stacks:
            lines.append(f"  stacks of {job.id}: {', '.join(map(str, job.stacks))}")
    if view.errors:
        last = view.errors[-1]
        lines.append(f"  last error: {last.job}: {last.message}")
        if last.node is not None:
            rank = "" if last.global_rank is None else f", worker {last.global_rank}"
            lines.append(f"    where:  {last.node}{rank}; {last.exception}, {age(last.time)}")
        if last.remedy:
            lines.append(f"    remedy: {last.remedy}")
    if view.status == "broken off":
        lines.append("  the command, typed again, goes on from here")
    return lines


def main(run: Path) -> int:
    """Print the status; of a sweep, that of each of its runs."""
    from launch.compare import runs_of

    print("\n".join(status(path) for path in runs_of([run])))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(Path(sys.argv[1] if len(sys.argv) == 2 else "RUN"))))
