"""What the files of a run tell of it, whether or not its driver lives; used by status and runs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import DataError
from conf.records import JournalEvent, from_dict
from conf.run_groups import PricingConfig
from launch.jsonl import read_lines
from launch.logs.errors_file import JobError, job_error, log_name, workers_of_job
from launch.spending import Spent, read_spent

STATES = {
    "job_started": "running",
    "attempt_lost": "waiting",
    "job_done": "done",
    "job_failed": "failed",
    "job_stopped": "stopped",
    "job_cancelled": "left out",
}
ENDS = {0: "done", 1: "failed", 2: "refused", 3: "stopped at its budget", 130: "interrupted"}


@dataclass(kw_only=True, slots=True, frozen=True)
class JobView:
    """A job as its files show it. seconds: of a job that is over; heartbeat: since the epoch."""

    id: str
    state: str
    attempt: int | None
    seconds: float | None
    nodes: tuple[str, ...]
    heartbeat: float | None
    lost: str | None
    stacks: tuple[Path, ...]


@dataclass(kw_only=True, slots=True, frozen=True)
class RunView:
    """A run as its files show it.

    Args:
        exit_code: how its last invocation ended; None while it goes on, or where it was killed.
        is_driver_here: whether its driver lives on this machine; None where that cannot be told.
        heartbeat: when anything was last written, in seconds since the epoch.
        spent: in all invocations; None for a run that noted nothing.
        usd: what was spent in money; None without a price of a device-second.
        errors: of jobs that stand as failed, the newest last.
    """

    path: Path
    exit_code: int | None
    is_driver_here: bool | None
    heartbeat: float | None
    jobs: tuple[JobView, ...]
    spent: Spent | None
    usd: float | None
    errors: tuple[JobError, ...]

    @property
    def status(self) -> str:
        """One or two words."""
        if self.exit_code is not None:
            return ENDS.get(self.exit_code, f"exit code {self.exit_code}")
        if not any(job.state != "waiting" for job in self.jobs) and self.heartbeat is None:
            return "not started"
        return "broken off" if self.is_driver_here is False else "running"


def view_run(run: Path) -> RunView:
    """Read a run directory.

    Raises:
        DataError: the directory is no run directory, or one of its files cannot be read.
    """
    if not (run / "plan.json").is_file():
        raise DataError(
            str(run),
            found="no plan.json",
            expected="a run directory",
            remedy="python -m launch.runs lists those there are",
        )
    try:
        return _view(run)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(
            str(run),
            found=f"a damaged file: {type(error).__name__}: {error}",
            expected="the files that a run has written",
            remedy="type the run's command again: its finished jobs are kept",
        ) from None


def _view(run: Path) -> RunView:
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    events = latest_attempt([from_dict(JournalEvent, d) for d in read_lines(run / "journal.jsonl")])
    jobs = tuple(_job(run, job, events) for job in plan["jobs"])
    ends = [e for e in events if e.event == "run_finished"]
    times = [j.heartbeat for j in jobs if j.heartbeat is not None] + [e.time for e in events]
    spent = read_spent(run) or _of_ledger(events)
    return RunView(
        path=run,
        exit_code=ends[-1].data["exit_code"] if ends else None,
        is_driver_here=False if ends else is_locked_here(run),
        heartbeat=max(times, default=None),
        jobs=jobs,
        spent=spent,
        usd=_usd(run, spent),
        errors=tuple(_errors(run, jobs, events)),
    )


def latest_attempt(events: list[JournalEvent]) -> list[JournalEvent]:
    """The events since the command was last typed; finished jobs are journalled again each time."""
    starts = [i for i, e in enumerate(events) if e.event == "run_started"]
    return events[starts[-1] :] if starts else events


def _job(run: Path, job: dict[str, Any], events: list[JournalEvent]) -> JobView:
    own = [e for e in events if e.job == job["id"]]
    last = next((e for e in reversed(own) if e.event in STATES), None)
    started = next((e for e in reversed(own) if e.event == "job_started"), None)
    lost = next((e for e in reversed(own) if e.event == "attempt_lost"), None)
    state = STATES[last.event] if last else "waiting"
    is_reused = bool(last and last.data.get("is_reused"))
    logs = run / "logs"
    return JobView(
        id=job["id"],
        state="reused" if is_reused else state,
        attempt=started.data.get("attempt") if started else None,
        seconds=last.data.get("seconds") if last else None,
        nodes=()
        if is_reused or started is None
        else tuple(dict.fromkeys(str(w["node"]) for w in workers_of_job(logs, job["id"]))),
        heartbeat=_heartbeat(run, job) if started is not None else None,
        lost=str(lost.data["error"]) if lost else None,
        stacks=tuple(sorted((logs / log_name(job["id"])).glob("*.stack"))),
    )


def _heartbeat(run: Path, job: dict[str, Any]) -> float | None:
    """When a job's processes or its driver last wrote a record or a line, by the files' times."""
    cache = run.parent / ".cache" / "jobs" / str(job["key"])
    logs = run / "logs" / log_name(job["id"])
    files = [cache / "records.jsonl", *(cache / "points").glob("*.jsonl"), *logs.glob("*.log")]
    return max((f.stat().st_mtime for f in files if f.is_file()), default=None)


def is_locked_here(run: Path) -> bool | None:
    """Whether a process of this machine has locked the run; None where the system does not say.

    Asks the kernel's list: taking the lock, even for a moment, could refuse a driver that starts.
    """
    lock, table = run / ".lock", Path("/proc/locks")
    if not table.is_file():
        return None
    if not lock.is_file():
        return False
    inode = lock.stat().st_ino
    return any(
        line.split()[1] == "FLOCK" and int(line.split()[5].split(":")[2]) == inode
        for line in table.read_text().splitlines()
        if line.split()[1] != "->"
    )


def _of_ledger(events: list[JournalEvent]) -> Spent | None:
    """The bill of the last invocation, for a run that has not noted what it spends."""
    lines = [e.data for e in events if e.event == "ledger" and not e.data["is_reused"]]
    if not lines:
        return None
    hosted = sum(line.get("usd") or 0.0 for line in lines if not line["device_seconds"])
    return Spent(device_seconds=sum(x["device_seconds"] for x in lines), hosted_usd=hosted)


def _usd(run: Path, spent: Spent | None) -> float | None:
    path = run / "config.json"
    if spent is None or not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))["config"]
    price = from_dict(PricingConfig, config["pricing"]).usd_per_device_second
    if price is None and spent.device_seconds:
        return None
    return float(spent.device_seconds * (price or 0.0) + spent.hosted_usd)


def _errors(run: Path, jobs: tuple[JobView, ...], events: list[JournalEvent]) -> list[JobError]:
    """error.json of jobs that stand as failed; what the journal says where it is missing."""
    found = []
    for job in jobs:
        if job.state != "failed":
            continue
        event = [e for e in events if e.job == job.id and e.event == "job_failed"][-1]
        told = job_error(run / "logs", job.id) or JobError(
            job=job.id,
            arm=event.arm,
            exception="",
            message=str(event.data["error"]),
            remedy=str(event.data.get("remedy") or ""),
            time=event.time,
        )
        found.append(told)
    return sorted(found, key=lambda error: error.time)


def age(when: float | None) -> str:
    """How long ago, in words; "-" where it is not known."""
    if when is None:
        return "-"
    seconds = max(0.0, time.time() - when)
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
