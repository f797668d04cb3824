"""Attempts of one training or search: each step once over all of them, and all that they cost.

An attempt that ends early leaves a stream file, which its worker wrote and its driver may not have
read to the end. The next attempt takes it in first. Steps after the state from which an attempt
goes on are done again: their earlier records become ledger lines with purpose `redone`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from conf.hashing import plain
from conf.record_types import RECORD_TYPES
from conf.records import LedgerLine, Progress, TrainRecord, TrainSummary, from_dict
from conf.sweep_records import RungRecord, SweepChoice, TrialRecord

# What a finished training puts on the bill; a training that goes on afterwards states it anew.
TRAINING_PURPOSES = ("train", "sweep", "padding", "agreement")
E = TypeVar("E")


@dataclass(kw_only=True, slots=True)
class Steps:
    """The records of a training that stand: each step once, in order; of a search, by trial.

    first_steps: trial -> first step of the running attempt; without those that have none yet.
    """

    first_steps: dict[int | None, int] = field(default_factory=dict)
    _series: dict[int | None, list[TrainRecord]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[TrainRecord]) -> Steps:
        """Steps of earlier attempts, each of them once."""
        steps = cls()
        for record in records:
            steps.add(record)
        steps.first_steps.clear()
        return steps

    @property
    def standing(self) -> list[TrainRecord]:
        """Those of all attempts."""
        return [record for series in self._series.values() for record in series]

    def add(self, record: TrainRecord) -> list[TrainRecord]:
        """Take in a record of the running attempt; returns those that it makes void."""
        self.first_steps.setdefault(record.trial, record.step)
        series = self._series.setdefault(record.trial, [])
        void: list[TrainRecord] = []
        while series and series[-1].step >= record.step:
            void.append(series.pop())
        series.append(record)
        return void[::-1]

    def earlier_device_seconds(self) -> float:
        """What the standing steps of earlier attempts took."""
        firsts = self.first_steps
        return sum(
            r.device_seconds for r in self.standing if r.step < firsts.get(r.trial, math.inf)
        )


def redone(void: Iterable[TrainRecord | RungRecord], *, job: str, arm: str | None) -> LedgerLine:
    """The bill of steps that were trained, or rungs that were scored, for nothing."""
    records = list(void)
    return LedgerLine(
        job=job,
        arm=arm,
        purpose="redone",
        tokens=sum(r.tokens for r in records),
        device_seconds=sum(r.device_seconds for r in records),
    )


def each_step_once(events: Iterable[E]) -> list[E | TrainRecord | LedgerLine]:
    """A job's records with each training step and each rung once, repeated ones as `redone` lines.

    Training records come first; records of other jobs pass as they are.
    """
    steps, others, is_ended = Steps(), list[E | LedgerLine](), False
    rungs: dict[tuple[int, int], int] = {}
    for event in events:
        if not isinstance(event, TrainRecord):
            if isinstance(event, RungRecord):
                before = rungs.get((event.trial, event.rung))
                if before is not None:
                    void_rung = cast(RungRecord, others[before])
                    others[before] = redone([void_rung], job="", arm=event.arm)
                rungs[event.trial, event.rung] = len(others)
            others.append(event)
            is_ended = is_ended or isinstance(event, TrainSummary)
            continue
        if is_ended:  # it was not the end after all
            others, is_ended = [e for e in others if not _is_ending(e)], False
            rungs = {
                (e.trial, e.rung): i for i, e in enumerate(others) if isinstance(e, RungRecord)
            }
        void = steps.add(event)
        if void:
            others.append(redone(void, job="", arm=event.arm))
    return [*steps.standing, *others]


def _is_ending(event: object) -> bool:
    """Whether an event belongs to the end of a training or search."""
    if isinstance(event, LedgerLine):
        return event.purpose in TRAINING_PURPOSES
    return isinstance(event, TrainSummary | TrialRecord | SweepChoice)


def whole(summary: TrainSummary, steps: Steps) -> TrainSummary:
    """The summary of a training over all attempts: the last one's seconds and what still stands."""
    seconds = summary.device_seconds + steps.earlier_device_seconds()
    return dataclasses.replace(summary, device_seconds=seconds)


def training_ledger(
    summary: TrainSummary, *, job: str, arm: str | None, paid: Sequence[TrainRecord] = ()
) -> list[LedgerLine]:
    """A finished training's tokens by purpose; the device-seconds stand on the `train` lines.

    paid: steps that an earlier invocation paid for; they stand on a line of their own.
    """
    earlier = _sums(paid)
    now = (summary.tokens - earlier[0], summary.device_seconds - earlier[1])
    return [
        *_train_lines(earlier, now, job=job, arm=arm),
        LedgerLine(job=job, arm=arm, purpose="padding", tokens=summary.padding_tokens),
        LedgerLine(job=job, arm=arm, purpose="agreement", tokens=summary.probe_tokens),
        LedgerLine(job=job, arm=arm, purpose="redone", tokens=summary.redone_tokens),
    ]


def standing_ledger(
    standing: Sequence[TrainRecord], *, job: str, arm: str | None, paid: Sequence[TrainRecord]
) -> list[LedgerLine]:
    """The steps of a training that is not finished."""
    earlier, both = _sums(paid), _sums(standing)
    return _train_lines(earlier, (both[0] - earlier[0], both[1] - earlier[1]), job=job, arm=arm)


def search_ledger(
    spent: Iterable[TrainRecord | RungRecord],
    *,
    winner: int | None,
    job: str,
    arm: str | None,
    paid: Collection[object] = (),
) -> list[LedgerLine]:
    """What the trials of a search spent: `train` on the winner's own steps, else `sweep`.

    winner: the trial that was chosen; None while there is none. paid: what an earlier invocation
    paid for; it stands on lines of its own.
    """
    sums: dict[tuple[str, bool], list[TrainRecord | RungRecord]] = {}
    for record in spent:
        is_winner = isinstance(record, TrainRecord) and record.trial == winner
        key = ("train" if is_winner else "sweep", record in paid)
        sums.setdefault(key, []).append(record)
    return [
        LedgerLine(
            job=job,
            arm=arm,
            purpose=purpose,
            tokens=sum(r.tokens for r in records),
            device_seconds=sum(r.device_seconds for r in records),
            is_reused=is_reused,
        )
        for (purpose, is_reused), records in sorted(sums.items())
    ]


def billed_rows(events: Iterable[object], *, is_training: bool) -> int:
    """The rows that a job's records account for, of all its attempts.

    A training's steps and a search's rungs stand in records of their own, of which the lines
    `train` and `sweep` are sums; other jobs have lines for everything.
    """
    rows = 0
    for event in events:
        if isinstance(event, LedgerLine):
            rows += 0 if is_training and event.purpose in ("train", "sweep") else event.tokens
        elif is_training and isinstance(event, TrainRecord | RungRecord):
            rows += event.tokens
    return rows


def _sums(records: Sequence[TrainRecord]) -> tuple[int, float]:
    return sum(r.tokens for r in records), sum(r.device_seconds for r in records)


def _train_lines(
    earlier: tuple[int, float], now: tuple[int, float], *, job: str, arm: str | None
) -> list[LedgerLine]:
    return [
        LedgerLine(
            job=job, arm=arm, purpose="train", tokens=t, device_seconds=s, is_reused=is_reused
        )
        for (t, s), is_reused in ((earlier, True), (now, False))
        if t or not is_reused
    ]


# --- The stream of one attempt -------------------------------------------------------------------


def stream_path(points: Path, attempt: str) -> Path:
    """Where the worker of an attempt writes its records, below a training's output directory."""
    return points / f"stream-{attempt}.jsonl"


def rows_dir(points: Path) -> Path:
    """Where the processes of a training announce their rows, given its output directory."""
    return points.parent / "rows"


def stream_line(record: object, *, devices: int) -> str:
    """A record as the line of a stream; `at` and `devices` tell what an attempt cost."""
    facts = {"type": type(record).__name__, "at": time.time(), "devices": devices}
    return json.dumps({**facts, **plain(record)}) + "\n"


def ask_to_stop(points: Path) -> None:
    """Have the running attempt save its state and stop after its step; may be called again."""
    for stream in points.glob("stream-*.jsonl"):
        stop_path(stream).touch()


def stop_path(stream: Path) -> Path:
    """The file that asks an attempt to stop."""
    return stream.with_suffix(".stop")


def left_streams(points: Path) -> list[Path]:
    """Streams of earlier attempts, the oldest first."""
    return sorted(points.glob("stream-*.jsonl"))


def discard_stream(stream: Path) -> None:
    """Remove a stream that was taken in; a worker that still writes to it fails and ends."""
    stream.unlink(missing_ok=True)
    stop_path(stream).unlink(missing_ok=True)


def taken_in(stream: Path, known: list[Any]) -> Iterator[Any]:
    """What a stream adds to a job's known records, and what else the attempt spent.

    An attempt spent the seconds between its first line and its last. Those of its steps and rungs
    stand in their records; the rest (loading, saving) is lost with it, unless it was the last.
    """
    lines = list(_whole_lines(stream))
    events: list[Any] = [from_dict(RECORD_TYPES[line["type"]], line) for line in lines]
    events = [event for event in events if not isinstance(event, Progress)]
    records = [e for e in events if isinstance(e, TrainRecord | RungRecord)]
    seen = {e for e in known if isinstance(e, TrainRecord | RungRecord)}
    yield from (r for r in records if r not in seen)
    others = [e for e in events if not isinstance(e, TrainRecord | RungRecord)]
    yield from (e for e in others if not isinstance(e, TrainSummary) and e not in known)
    summary = next((e for e in others if isinstance(e, TrainSummary)), None)
    if summary is not None:
        if not any(isinstance(e, TrainSummary) for e in known):
            yield from _ending(summary, known, events)
        return
    if lines:
        span = (lines[-1]["at"] - lines[0]["at"]) * lines[-1]["devices"]
        lines_seconds = sum(e.device_seconds for e in others if isinstance(e, LedgerLine))
        overhead = max(0.0, span - sum(r.device_seconds for r in records) - lines_seconds)
        arm = records[0].arm if records else None
        yield LedgerLine(job="", arm=arm, purpose="redone", device_seconds=overhead)


def _ending(summary: TrainSummary, known: list[Any], events: list[Any]) -> Iterator[Any]:
    """The end of a training or search whose driver died before it wrote it down."""
    mine = [e for e in events if isinstance(e, TrainRecord)]
    own = set(mine)
    steps = Steps.of(e for e in known if isinstance(e, TrainRecord) and e not in own)
    for record in mine:
        steps.add(record)
    choice = next((e for e in events if isinstance(e, SweepChoice)), None)
    if choice is None:
        complete = whole(summary, steps)
        yield from training_ledger(complete, job="", arm=summary.arm)
        yield complete
        return
    found = [e for e in [*known, *events] if isinstance(e, RungRecord)]
    rungs = {(r.trial, r.rung): r for r in found}.values()
    spent: list[TrainRecord | RungRecord] = [*steps.standing, *rungs]
    yield from search_ledger(spent, winner=choice.trials[0], job="", arm=summary.arm)
    yield summary


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n"):
            yield json.loads(text)
