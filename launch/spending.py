"""spent.jsonl: what all invocations of a run have spent, so that `budget.*` caps them together.

A line is written as a record comes in. What a worker did after its driver was killed is in the
job's own records; it is added when the job starts again (`Spending.unseen`).
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from conf.records import to_dict
from launch.jsonl import cut_broken_line, read_lines

SPENT_FILE = "spent.jsonl"
# So much of the time that a killed invocation ran may be missing from max_wall_seconds.
WALL_SECONDS = 5.0


@dataclass(kw_only=True, slots=True, frozen=True)
class Spent:
    """Sums over lines. wall_seconds: while an invocation ran, not between them."""

    device_seconds: float = 0.0
    hosted_usd: float = 0.0
    wall_seconds: float = 0.0


@dataclass(kw_only=True, slots=True, frozen=True)
class _Line:
    time: float
    job: str | None
    device_seconds: float
    hosted_usd: float
    wall_seconds: float


def read_spent(run: Path) -> Spent | None:
    """What a run has spent in all its invocations; None for one that has not noted it."""
    path = run / SPENT_FILE
    if not path.is_file():
        return None
    sums = dict.fromkeys(("device_seconds", "hosted_usd", "wall_seconds"), 0.0)
    for line in read_lines(path):
        for name in sums:
            sums[name] += line[name]
    return Spent(**sums)


@dataclass(slots=True)
class Spending:
    """The file of one run: what earlier invocations spent, and the lines of this one.

    Args:
        run: the run's directory, locked by this process.
    """

    run: Path
    before: Spent = field(init=False)
    _by_job: dict[str, float] = field(init=False)
    _noted: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Read what is there, without a line that a kill cut off."""
        path = self.run / SPENT_FILE
        cut_broken_line(path)
        self.before = read_spent(self.run) or Spent()
        by_job: defaultdict[str, float] = defaultdict(float)
        for line in read_lines(path):
            if line["job"] is not None:
                by_job[line["job"]] += line["device_seconds"]
        self._by_job = dict(by_job)

    def add(self, *, job: str | None, device_seconds: float = 0.0, hosted_usd: float = 0.0) -> None:
        """Note an expense. job: the key of its job."""
        now = time.monotonic()
        line = _Line(
            time=time.time(),
            job=job,
            device_seconds=device_seconds,
            hosted_usd=hosted_usd,
            wall_seconds=now - self._noted,
        )
        self._noted = now
        with (self.run / SPENT_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(to_dict(line)) + "\n")

    def tick(self) -> None:
        """Note the time now and then, also where no record comes in."""
        if time.monotonic() - self._noted >= WALL_SECONDS:
            self.add(job=None)

    def begin(self, job: str) -> None:
        """Note that this run starts a job, so that what its workers do is this run's expense."""
        self.add(job=job)

    def unseen(self, job: str, device_seconds: float) -> float:
        """What an earlier invocation's workers spent on a job that its driver did not note.

        Args:
            job: its key.
            device_seconds: of all records that the job has kept.

        Returns:
            0 for a job that this run has not started before: another run's, or new.
        """
        noted = self._by_job.get(job)
        return 0.0 if noted is None else max(0.0, device_seconds - noted)
