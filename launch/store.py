"""The run directory and the job cache: paths, append-only records, one writer, atomic files.

outputs/<run>/ belongs to one run and is rebuilt from its jobs; outputs/.cache/jobs/<key>/ holds
each job once, by the hash of all that determines it, and is shared by all runs.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from conf.errors import ClusterError
from conf.hashing import plain
from conf.record_types import RECORD_TYPES
from conf.records import (
    AnswerRule,
    CurvePoint,
    Item,
    JournalEvent,
    LedgerLine,
    PromptText,
    SampleRecord,
    TrainingData,
    TrainRecord,
    TrainSummary,
    from_dict,
    to_dict,
)
from conf.sweep_records import (
    SEARCH_EVENTS,
    RungDecision,
    RungRecord,
    SweepChoice,
    TrialRecord,
)
from launch.attempts import discard_stream, each_step_once, left_streams, rows_dir, taken_in
from launch.jsonl import Lines, cut_broken_line, read_lines
from launch.written_prompts import WrittenPrompts

Event = (
    SampleRecord
    | TrainRecord
    | CurvePoint
    | LedgerLine
    | AnswerRule
    | PromptText
    | TrainSummary
    | TrainingData
    | RungRecord
    | RungDecision
    | TrialRecord
    | SweepChoice
    | JournalEvent
)
STEP_LINES = tuple(f'{{"type": "{of.__name__}"' for of in (TrainRecord, RungRecord))


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON, atomically."""
    write_atomically(path, json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def read_events(path: Path) -> Iterator[Event]:
    """A job's records in order; each training step and rung once, for which all are read at once.

    Those of a job without steps come one at a time, so that any number of them takes no memory.
    """
    lines = read_lines(path)
    events: Iterator[Any] = (from_dict(RECORD_TYPES[line["type"]], line) for line in lines)
    yield from each_step_once(events) if _has_steps(path) else events


def _has_steps(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open(encoding="utf-8") as stream:
        return any(line.startswith(STEP_LINES) for line in stream)


@dataclass(kw_only=True, slots=True, frozen=True)
class DoneJob:
    """done.json of a finished job: when, how long, on what."""

    key: str
    seconds: float
    hardware: str
    finished: float


class JobDirectory:
    """outputs/.cache/jobs/<key>: a job's records while it runs, and done.json when it is whole."""

    def __init__(self, root: Path, key: str) -> None:
        self.path = root / ".cache" / "jobs" / key
        self.key = key
        self._lines: Lines | None = None

    @property
    def records_path(self) -> Path:
        """Records of the current attempt."""
        return self.path / "records.jsonl"

    def done(self) -> DoneJob | None:
        """The finished job, or None where it has to run."""
        path = self.path / "done.json"
        return from_dict(DoneJob, json.loads(path.read_text())) if path.exists() else None

    @property
    def points(self) -> Path:
        """Where a training leaves its checkpoints, its state and its attempts' streams."""
        return self.path / "points"

    @property
    def rows(self) -> Path:
        """Where the processes of all attempts announce their rows, see conf/row_meter.py."""
        return rows_dir(self.points)

    def begin(self, *, keeps_records: bool) -> None:
        """Start an attempt; `events` are then what stays from a killed one.

        keeps_records: the job goes on from its records, so they all stay; otherwise it starts
        again, and only what the killed attempt spent stays, as `redone`. A job that is marked whole
        and yet starts has lost its files: it starts again.
        """
        if not keeps_records or self.done() is not None:
            kept = self._lost_work()
            self._clear()
            self._lines = Lines(self.records_path)
            for line in kept:
                self.append(line)
            return
        cut_broken_line(self.records_path)
        self.take_in_streams()
        self._lines = Lines(self.records_path)

    def _clear(self) -> None:
        """Remove all but the rows that were announced: they were computed all the same."""
        for path in self.path.glob("*"):
            if path.is_dir() and path != self.rows:
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file():
                path.unlink(missing_ok=True)

    def take_in_streams(self) -> None:
        """Add what trainings that have ended wrote; only while the job's records are closed."""
        for stream in left_streams(self.points):
            self._take_in(stream)

    def _take_in(self, stream: Path) -> None:
        """Add what the driver of an earlier attempt did not live to read; once, also if killed."""
        lines = list(read_lines(self.records_path))
        if not any(line.get("taken_in") == stream.name for line in lines):
            known: list[Any] = [from_dict(RECORD_TYPES[line["type"]], line) for line in lines]
            facts = {"time": time.time(), "taken_in": stream.name}
            lines += [
                {"type": type(e).__name__, **facts, **to_dict(e)} for e in taken_in(stream, known)
            ]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomically(self.records_path, text)
        discard_stream(stream)

    def append(self, event: Event) -> None:
        """Keep one record of the running attempt."""
        assert self._lines is not None, "begin() comes first"
        self._lines.append({"type": type(event).__name__, "time": time.time(), **to_dict(event)})

    def finish(self, *, seconds: float, hardware: str) -> None:
        """Mark the job whole; only then is it ever reused."""
        assert self._lines is not None, "begin() comes first"
        self._lines.close()
        self._lines = None
        write_json(
            self.path / "done.json",
            DoneJob(key=self.key, seconds=seconds, hardware=hardware, finished=time.time()),
        )
        for stream in left_streams(self.points):
            discard_stream(stream)

    def close(self) -> None:
        """Stop writing without marking the job whole."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def events(self) -> Iterator[Event]:
        """The job's records, see `read_events`."""
        return read_events(self.records_path)

    def _lost_work(self) -> list[LedgerLine]:
        """Bill a killed attempt from its records: tokens computed, seconds between its lines."""
        kept: list[LedgerLine] = []
        tokens, arm, first, last = 0, None, None, 0.0
        for line in read_lines(self.records_path):
            if line.get("purpose") == "redone":
                kept.append(from_dict(LedgerLine, line))
            tokens += line.get("computed_tokens") or 0
            tokens += line["tokens"] if line["type"] == "TrainRecord" else 0
            arm = arm or line.get("arm")
            first, last = line["time"] if first is None else first, line["time"]
        if first is not None and tokens:
            kept.append(
                LedgerLine(
                    job=self.key[:8],
                    arm=arm,
                    purpose="redone",
                    tokens=tokens,
                    device_seconds=last - first,
                )
            )
        return kept


class RunDirectory:
    """outputs/<run>: locked for one writer, its files rebuilt from the jobs at each start."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.path = root / name
        self._lock: IO[str] | None = None
        self._files: dict[Path, Lines] = {}
        self._prompts = WrittenPrompts()

    def open(self) -> None:
        """Create and lock the directory; clear what is rebuilt from jobs. Raises ClusterError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise ClusterError(
                "run.root",
                found=f"{self.path}: {error.strerror}",
                expected="a directory that can be written",
                remedy="write run.root=DIRECTORY",
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            writer = lock.read().strip() or "unknown"
            lock.close()
            raise ClusterError(
                "run.name",
                found=f"{self.path} is being written by process {writer}",
                expected="one writer per run",
                remedy="wait for it, stop it, or write run.name=ANOTHER",
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        for name in ("samples", "train", "curve"):
            for path in self.path.glob(f"arms/*/{name}.jsonl"):
                path.unlink()
        (self.path / "prompts.jsonl").unlink(missing_ok=True)

    def close(self) -> None:
        """Close all files and give the lock back."""
        for lines in self._files.values():
            lines.close()
        self._files.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def journal(
        self,
        event: str,
        *,
        job: str | None = None,
        arm: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one event to journal.jsonl."""
        self._append(
            self.path / "journal.jsonl",
            JournalEvent(
                time=time.time(), event=event, job=job, arm=arm, data=plain(dict(data or {}))
            ),
        )

    def write_items(self, items: list[Item]) -> None:
        """items.jsonl: every item with its split, hash and slices."""
        text = "".join(json.dumps(to_dict(i), ensure_ascii=False) + "\n" for i in items)
        write_atomically(self.path / "items.jsonl", text)

    def append(self, event: Event, *, job: str, arm: str | None) -> None:
        """Put a job's record where the run directory keeps its kind."""
        arm_directory = self.path / "arms" / (arm or "shared")
        if isinstance(event, SampleRecord):
            self._append(arm_directory / "samples.jsonl", event)
        elif isinstance(event, TrainRecord):
            self._append(arm_directory / "train.jsonl", event)
        elif isinstance(event, CurvePoint):
            self._append(arm_directory / "curve.jsonl", event)
        elif isinstance(event, PromptText):
            if self._prompts.add(event.arm, event.prompt_sha256):
                self._append(self.path / "prompts.jsonl", event)
        elif isinstance(event, JournalEvent):
            self._append(self.path / "journal.jsonl", dataclasses.replace(event, job=job))
        else:
            names = {
                LedgerLine: "ledger",
                AnswerRule: "answer_rule",
                TrainSummary: "train_summary",
                TrainingData: "training_data",
                **SEARCH_EVENTS,
            }
            self.journal(names[type(event)], job=job, arm=arm, data=to_dict(event))

    def rewrite_steps(self, arm: str | None, records: list[TrainRecord]) -> None:
        """Replace a training's lines in arms/<arm>/train.jsonl: an attempt went back.

        Lines before its first step are of an earlier leg.
        """
        path = self.path / "arms" / (arm or "shared") / "train.jsonl"
        open_lines = self._files.pop(path, None)
        if open_lines is not None:
            open_lines.close()
        if not records:
            return
        first: dict[tuple[int | None, int | None], int] = {}
        for record in records:
            first.setdefault((record.train_seed, record.trial), record.step)
        others = [
            line
            for line in read_lines(path)
            if line["step"] < first.get((line["train_seed"], line["trial"]), math.inf)
        ]
        lines = [*others, *map(to_dict, records)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(path, text)

    def _append(self, path: Path, value: Any) -> None:
        if path not in self._files:
            self._files[path] = Lines(path)
        self._files[path].append(value)


def renamed(event: Event, *, job: str, arm: str | None, is_reused: bool) -> Event:
    """A cached record under the names of the run that uses it; ledger lines are marked reused."""
    if isinstance(event, LedgerLine):
        return dataclasses.replace(event, job=job, arm=arm, is_reused=is_reused)
    return event if arm is None else dataclasses.replace(event, arm=arm)


def link_tree(source: Path, target: Path) -> None:
    """Show a directory in a second place without a second copy where the disk can link."""
    if target.exists():
        shutil.rmtree(target)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place)
            except OSError:
                shutil.copy2(path, place)
