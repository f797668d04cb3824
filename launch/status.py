"""`python -m launch.status RUN`: the state of a run, from its files alone."""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path

from conf.errors import DataError
from conf.records import JournalEvent, from_dict
from launch.cli import guarded
from launch.store import read_lines


def status(run: Path) -> str:
    """Jobs with their state, what was spent, and the last error, as text.

    Raises:
        DataError: the directory is no run directory.
    """
    if not (run / "plan.json").is_file():
        raise DataError(
            str(run),
            found="no plan.json",
            expected="a run directory",
            remedy="python -m launch.status outputs/RUN",
        )
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    events = latest_attempt([from_dict(JournalEvent, d) for d in read_lines(run / "journal.jsonl")])
    states = {e.job: e for e in events if e.event in STATES and e.job}
    lines = [f"{run.name}: {_headline(events)}"]
    for job in plan["jobs"]:
        event = states.get(job["id"])
        text = STATES[event.event] if event else "waiting"
        if event and event.data.get("is_reused"):
            text = "reused"
        seconds = event.data.get("seconds") if event else None
        lines.append(f"  {job['id']:<30} {text:<9}" + (f"{seconds:8.1f} s" if seconds else ""))
    spent = sum(
        e.data["device_seconds"] for e in events if e.event == "ledger" and not e.data["is_reused"]
    )
    lines.append(f"  spent: {spent:.0f} device-seconds in this attempt")
    errors = [e for e in events if e.event == "job_failed"]
    if errors:
        lines.append(f"  last error: {errors[-1].job}: {errors[-1].data['error']}")
    return "\n".join(lines)


STATES = {
    "job_started": "running",
    "job_done": "done",
    "job_failed": "failed",
    "job_stopped": "stopped",
    "job_cancelled": "left out",
}


def latest_attempt(events: list[JournalEvent]) -> list[JournalEvent]:
    """The events since the command was last typed; finished jobs are journalled again each time."""
    starts = [i for i, e in enumerate(events) if e.event == "run_started"]
    return events[starts[-1] :] if starts else events


def _headline(events: list[JournalEvent]) -> str:
    if not events:
        return "not started"
    last = events[-1]
    when = datetime.datetime.fromtimestamp(last.time).isoformat(sep=" ", timespec="seconds")
    ends = [e for e in events if e.event == "run_finished"]
    if ends:
        return f"finished with exit code {ends[-1].data['exit_code']} at {when}"
    return f"last event {time.time() - last.time:.0f} s ago, at {when}"


def main(run: Path) -> int:
    """Print the status; of a sweep, that of each of its runs."""
    from launch.compare import runs_of

    print("\n".join(status(path) for path in runs_of([run])))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(Path(sys.argv[1] if len(sys.argv) == 2 else "RUN"))))
