"""Who failed where: each worker's own words, and logs/<job>/error.json, the one account of a job.

A worker writes error-<rank>.json beside its log, for Ray wraps, cuts or loses its words. The driver
makes error.json of them. All are whole or not there.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.errors import CrossoverError, Refused
from conf.hashing import plain
from conf.records import from_dict
from launch.logs.masking import masked, secrets_of

ERROR_FILE = "error.json"


@dataclass(kw_only=True, slots=True, frozen=True)
class JobError:
    """error.json: why a job failed.

    global_rank, node: of the worker that failed first; null where none left its words. time:
    seconds since the epoch.
    """

    job: str
    exception: str
    message: str
    remedy: str
    time: float
    arm: str | None = None
    global_rank: int | None = None
    node: str | None = None
    attempts: int | None = None


def log_name(job: str) -> str:
    """The name of a job's directory below logs/."""
    return job.replace(":", "-")


def node_name() -> str:
    """This machine's name, and its address in the cluster where Ray runs here."""
    name = platform.node()
    ray: Any = sys.modules.get("ray")  # a process that has not loaded it has no address
    if ray is None or not ray.is_initialized():
        return name
    return f"{name} ({ray.util.get_node_ip_address()})"


def _rank_of(log: Path) -> int | None:
    return int(log.stem) if log.stem.isdigit() else None


def note_worker(log: Path) -> None:
    """Write worker-<rank>.json: where the process that writes this log runs."""
    (log.parent / f"error-{log.stem}.json").unlink(missing_ok=True)
    facts = {"global_rank": _rank_of(log), "node": node_name(), "pid": os.getpid()}
    _write(log.parent / f"worker-{log.stem}.json", {**facts, "started": time.time()})


def note_failure(log: Path, error: BaseException) -> None:
    """Write error-<rank>.json: the worker's own words."""
    words = {
        "global_rank": _rank_of(log),
        "node": node_name(),
        "exception": type(error).__name__,
        "message": masked(str(error), secrets_of()),
        "is_own": isinstance(error, CrossoverError),
        "step": getattr(error, "step", None),
        "time": time.time(),
    }
    _write(log.parent / f"error-{log.stem}.json", words)


def _write(path: Path, value: Any) -> None:
    # Not launch.store's: a worker that has lost its disk must still raise its own error.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(plain(value), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        print(f"{path}: {error.strerror}", file=sys.stderr)


def write_job_error(
    logs: Path,
    *,
    job: str,
    arm: str | None,
    error: BaseException | None,
    reason: str,
    attempts: int,
) -> None:
    """Write logs/<job>/error.json from what the driver knows and what the workers said.

    Args:
        logs: the run's logs/.
        job: its id.
        arm: its arm.
        error: the job's own error.
        reason: it in words, as the run shows it.
        attempts: how many were made.
    """
    directory = logs / log_name(job)
    directory.mkdir(parents=True, exist_ok=True)
    worker = _first_to_fail(directory, reason)
    remedy = error.remedy if isinstance(error, Refused) else ""
    found = JobError(
        job=job,
        arm=arm,
        global_rank=worker.get("global_rank"),
        node=worker.get("node"),
        exception=type(error).__name__,
        message=masked(reason, secrets_of()),
        remedy=remedy or f"see {directory}/",
        attempts=attempts,
        time=time.time(),
    )
    _write(directory / ERROR_FILE, asdict(found))


def _first_to_fail(directory: Path, reason: str) -> dict[str, Any]:
    """The words that the reason quotes, else the earliest; the others were cut off by it."""
    said = [json.loads(p.read_text(encoding="utf-8")) for p in directory.glob("error-*.json")]
    said.sort(key=lambda w: (not w["message"] or w["message"] not in reason, w.get("time") or 0.0))
    return said[0] if said else {}


def clear_job_error(logs: Path, job: str) -> None:
    """A job starts: what an earlier attempt failed of is over."""
    (logs / log_name(job) / ERROR_FILE).unlink(missing_ok=True)


def job_error(logs: Path, job: str) -> JobError | None:
    """error.json of a job, or None where it has none, or one of another make."""
    try:
        text = (logs / log_name(job) / ERROR_FILE).read_text(encoding="utf-8")
        return from_dict(JobError, {"time": 0.0, **json.loads(text)})
    except (OSError, ValueError, TypeError):
        return None


def workers_of_job(logs: Path, job: str) -> list[dict[str, Any]]:
    """Where a job's processes run or ran, by rank."""
    found = []
    for path in sorted((logs / log_name(job)).glob("worker-*.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return found
